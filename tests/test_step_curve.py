"""Losses per optimizer step: kept in last.pt, bounded, drawn in curves.png."""

import numpy as np
import pytest
import torch
from conftest import Killed, dies_after
from PIL import Image
from test_engine import compute_losses, run

from utils import visualize
from utils.training.step_curve import StepCurve


def test_many_steps_stay_few_points_and_keep_their_mean():
    curve = StepCurve(limit=8)
    for step in range(1, 101):
        curve.add({"loss": float(step)})
        curve.add({"loss": float(step) + 1})  # two batches per step
        curve.end_step(step)
    assert curve.every == 16 and curve.points["step"] == [16, 32, 48, 64, 80, 96]
    assert curve.points["loss"] == [9.0, 25.0, 41.0, 57.0, 73.0, 89.0]
    resumed = StepCurve(limit=8)
    resumed.load(curve.state())
    for one in (curve, resumed):
        for step in range(101, 113):
            one.add({"loss": 0.0})
            one.end_step(step)
    assert resumed.points == curve.points and curve.points["step"][-1] == 112


def test_losses_keep_their_order_and_gaps_are_no_numbers():
    names = ["gate", "detection", "features", "clamped", "loss"]
    curve = StepCurve()
    for step in (1, 2):
        curve.add({name: float(step) for name in names})
        curve.end_step(step)
    curve.add({"fft": 3.0, "loss": 3.0})  # a resumed run with other losses
    curve.end_step(3)
    assert list(curve.points) == ["step", *names, "fft"]
    np.testing.assert_equal(curve.points["gate"], [1.0, 2.0, np.nan])
    np.testing.assert_equal(curve.points["fft"], [np.nan, np.nan, 3.0])
    assert curve.points["loss"] == [1.0, 2.0, 3.0]


def test_a_killed_run_resumes_with_the_same_curve(coco, tmp_path):
    run(coco, tmp_path / "whole")
    with pytest.raises(Killed):
        run(coco, tmp_path / "killed", losses=dies_after(5, compute_losses))
    run(coco, tmp_path / "killed", resume=True)
    whole, resumed = (torch.load(tmp_path / out / "last.pt")["curve"] for out in ("whole", "killed"))
    assert whole == resumed and whole["points"]["step"] == [1, 2, 3, 4, 5, 6]
    assert len(whole["points"]["mse"]) == len(whole["points"]["loss"]) == 6


def test_a_checkpoint_without_a_curve_resumes(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1)
    content = torch.load(tmp_path / "out" / "last.pt")
    del content["curve"]
    torch.save(content, tmp_path / "out" / "last.pt")
    run(coco, tmp_path / "out", epochs=2, resume=True)
    assert torch.load(tmp_path / "out" / "last.pt")["curve"]["points"]["step"] == [3, 4]


def test_curves_are_drawn_with_and_without_steps(tmp_path):
    history = [{"epoch": 1, "step": 50, "loss": 1.0, "val/mAP": 0.1, "time": {}},
               {"epoch": 2, "step": 100, "loss": 0.5, "val/mAP": 0.2, "time": {}}]
    values = [1 / step for step in range(1, 101)]
    steps = {"step": list(range(1, 101)), "loss": values, "odd": [float("nan")] * 100}
    for name, points in (("with", steps), ("without", None), ("empty", {"step": []})):
        visualize.curves(history, tmp_path / f"{name}.png", points)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes["with"][1] > 1.5 * sizes["without"][1] and sizes["empty"] == sizes["without"]
    smooth = visualize.smoothed([0.0, 1.0] * 50)
    assert len(smooth) == 100 and np.allclose(smooth[10:90], 0.5, atol=0.11)
    assert np.allclose(visualize.smoothed([1.0, float("nan"), 3.0] * 20)[1:-1], 2.0)
