"""The moving average of the weights: its formula, what is evaluated and kept, and a resume that loses none of it."""

import math

import pytest
import torch
from conftest import Killed, dies_after
from test_engine import compute_losses, run
from torch import nn

from utils.config import UserError
from utils.training.ema import WeightAverage, mixed


def test_the_average_follows_its_formula_and_swapping_changes_nothing():
    weights = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage([weights], decay=0.9, warmup=2)
    expected = weights.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            weights += step
        average.update(step)
        decay = 0.9 * (1 - math.exp(-step / 2))
        expected = decay * expected + (1 - decay) * weights.detach()
    before = weights.detach().clone()
    with average.applied():
        torch.testing.assert_close(weights.detach(), expected)
    assert torch.equal(weights, before)
    torch.testing.assert_close(average.values[0], expected)


def test_mixing_with_other_weights_is_undone_bit_for_bit():
    own, other = [nn.Parameter(torch.tensor([1.0, 0.1])), torch.zeros(2)], [torch.tensor([3.0, 0.3]), torch.ones(2)]
    before = [tensor.detach().clone() for tensor in own]
    with mixed(own, other, 0.25):
        torch.testing.assert_close(own[0].detach(), torch.tensor([1.5, 0.15]))
        torch.testing.assert_close(own[1], torch.tensor([0.25, 0.25]))
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(own, before, strict=True))
    with pytest.raises(KeyError), mixed(own, other, 1.0):
        raise KeyError
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(own, before, strict=True))


def test_a_decay_of_one_is_refused_before_an_earlier_run_is_moved(coco, tmp_path):
    run(coco, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match="EMA_DECAY = 1.0: choose 0"):
        run(coco, tmp_path / "out", epochs=1, ema=1.0)
    assert (tmp_path / "out" / "last.pt").is_file()


def test_the_average_is_evaluated_and_kept_as_best_while_training_goes_on(coco, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.head[0].weight.detach().clone())
        return {"val/x": float(len(seen))}

    model, _ = run(coco, tmp_path / "out", epochs=2, ema=0.9, evaluate=evaluate, score="val/x",
                   extras={"class_names": ["car"]})
    best, last = (torch.load(tmp_path / "out" / name) for name in ("best.pt", "last.pt"))
    assert torch.equal(best["model"]["head.0.weight"], seen[-1])
    assert torch.equal(last["model"]["head.0.weight"], model.head[0].weight)
    assert not torch.equal(seen[-1], model.head[0].weight)
    assert any(torch.equal(value, seen[-1]) for value in last["average"])
    # averaged weights need averaged statistics: with the last step's, a detector's mAP halved while its losses fell
    assert not torch.equal(best["model"]["head.1.running_mean"], last["model"]["head.1.running_mean"])
    assert any(torch.equal(value, best["model"]["head.1.running_mean"]) for value in last["average"])
    assert len(last["average"]) == 4 + 2  # weights and biases, mean and variance; nothing of the frozen part
    assert best["class_names"] == last["class_names"] == ["car"]


@pytest.mark.parametrize("batches_before", [3, 5])
def test_a_killed_run_keeps_its_average(coco, tmp_path, batches_before):
    run(coco, tmp_path / "whole", ema=0.9)
    with pytest.raises(Killed):
        run(coco, tmp_path / "killed", ema=0.9, losses=dies_after(batches_before, compute_losses))
    run(coco, tmp_path / "killed", ema=0.9, resume=True)
    whole, killed = (torch.load(tmp_path / name / "last.pt")["average"] for name in ("whole", "killed"))
    assert whole and all(torch.equal(a, b) for a, b in zip(whole, killed, strict=True))
