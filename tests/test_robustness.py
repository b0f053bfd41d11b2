"""Eval_robustness.py: weather in strengths, mPC and rPC by hand, intervals, the script itself."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import names_in
from transformers import RTDetrImageProcessor

import Eval_robustness as script
from utils import config, datasets, freeze
from utils.config import UserError
from utils.datasets.fresh_rain import SteadyWeather
from utils.evaluation import robustness
from utils.networks import adapter
from utils.networks.rtdetr import load_rtdetr, new_rtdetr
from utils.weather import rain, severity


@pytest.fixture
def base(coco, weights):
    """Constants that point the evaluation at eight small images and two detectors of one kind."""
    return {"COCO_DIR": str(coco / "coco"), "PERCENT_DATASET": 100, "IMAGE_SIZE": 96, "RESAMPLES": 10, "PICTURES": 1,
            "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "WEATHER": ("rain", "jpeg"), "DATALOADER_WORKERS": 0,
            "MODELS": {"plain": ("rtdetr", str(weights / "rtdetr")), "behind": ("spdnet", str(weights / "spdnet.pt"))},
            "OUTPUT_DIR": str(coco / "out")}


@pytest.mark.parametrize("name", severity.WEATHERS)
def test_every_strength_changes_the_picture_more_and_equal_seeds_alike(name):
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    draw, before = severity.WEATHERS[name], image.copy()
    changes = []
    for level in range(len(severity.LEVELS)):
        one, again = (draw(image, rain.rng_for(3, "a"), level) for _ in range(2))
        assert one.shape == image.shape and one.dtype == np.uint8 and np.array_equal(one, again)
        changes.append(np.mean([np.abs(draw(image, rain.rng_for(seed, "a"), level).astype(float) - image).mean()
                                for seed in range(8)]))
    assert np.array_equal(image, before) and 0 < changes[0] < changes[1] < changes[2]


def test_steady_weather_is_the_same_every_time_and_another_at_each_level(coco):
    image = datasets.read_image(next((coco / "coco" / "val2017").iterdir()))
    sample = {"image": image}
    light, heavy = (SteadyWeather("rain", level, seed=0, side=0) for level in (0, 2))
    first, later = light(sample, 0, "a.jpg")["image"], light(sample, 5, "a.jpg")["image"]
    assert first.equal(later) and not first.equal(heavy(sample, 0, "a.jpg")["image"])
    assert not first.equal(light(sample, 0, "b.jpg")["image"])


def test_mpc_and_rpc_by_hand():
    """mPC = mean over weathers of the mean over levels; rPC = mPC / clean."""
    scores = {"one": {(None, 0): 0.8, ("rain", 0): 0.6, ("rain", 1): 0.4, ("rain", 2): 0.2, ("mist", 0): 0.8,
                      ("mist", 1): 0.7, ("mist", 2): 0.6}}
    scores["other"] = {condition: value / 2 for condition, value in scores["one"].items()}
    rows = robustness.table(scores, {})
    assert rows[0].pop("model") == "one"
    assert rows[0] == pytest.approx({"clean": 0.8, "mPC": 0.55, "rPC": 0.6875, "rain": 0.4, "mist": 0.7})
    assert rows[1]["mPC"] == pytest.approx(0.275) and rows[1]["rPC"] == pytest.approx(0.6875)
    spread = np.linspace(-0.1, 0.1, 101)
    drawn = {name: {condition: value + spread for condition, value in found.items()} for name, found in scores.items()}
    rows = robustness.table(scores, drawn)
    assert rows[0]["mPC_interval"] == pytest.approx((0.455, 0.645)) and "gain_interval" not in rows[0]
    assert rows[1]["gain_interval"] == pytest.approx((-0.275, -0.275))  # both moved alike
    text = robustness.shown(rows)
    assert "0.5500 [0.4550, 0.6450]" in text and "-0.2750 [-0.2750, -0.2750]" in text


def test_the_script_scores_and_draws(base, capsys):
    result = script.main(**base)
    assert result["images"] == 8 and len(result["scores"]["plain"]) == 7
    out = Path(base["OUTPUT_DIR"])
    assert names_in(out) == {"results.json", "report.html", "robustness.md", "heat_map.png", "examples.png"}
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
    row = written["table"][1]
    assert row["model"] == "behind" and {"mPC", "rPC", "rain", "jpeg", "gain_interval"} <= row.keys()
    found = written["scores"]["behind"]
    assert row["jpeg"] == pytest.approx(np.mean([found[f"jpeg {level}"] for level in severity.LEVELS]))
    assert row["clean"] == found["clean"] == pytest.approx(written["details"]["clean"]["behind"]["mAP"])
    assert written["details"].keys() == {"clean", "rain medium", "jpeg medium"}
    shown = capsys.readouterr().out
    assert "gain in mPC" in shown and shown.isascii()
    RTDetrImageProcessor(size={"height": 128, "width": 128}).save_pretrained(base["RTDETR_MODEL_NAME"])
    plain = script.main(**base | {"RESAMPLES": 0, "WEATHER": ("rain",)})
    shown = capsys.readouterr().out
    for name in ("MODELS: 'plain'", "RTDETR_MODEL_NAME"):  # the latter behind SPDNet
        assert f"note: {name} was trained at IMAGE_SIZE = 128, IMAGE_SIZE is 96" in shown
    assert plain["table"][0]["rain"] == pytest.approx(row_of(written, "plain")["rain"])  # weather does not depend on it


def test_an_adapter_is_folded_into_the_base(base, weights, tmp_path):
    pytest.importorskip("peft")
    detector, path = load_rtdetr(base["RTDETR_MODEL_NAME"]), tmp_path / "rain.safetensors"
    changed = adapter.inject(detector, 2, 2, ("attention",))
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapter.write(changed, path, freeze.fingerprint(detector), rank=2, alpha=2)
    cfg = config.resolve(vars(script), base | {"MODELS": base["MODELS"] | {"folded": ("adapter", str(path))}})
    script.check(cfg)
    found, pixels = script.build_model(cfg, "folded", "cpu"), torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(found(pixels).logits, adapter.fold(detector, path, "")(pixels).logits)
        assert not torch.allclose(found(pixels).logits, detector(pixels).logits, atol=1e-2)
    new_rtdetr("tiny", {0: "person", 1: "car"}).save_pretrained(weights / "other")
    cfg.RTDETR_MODEL_NAME = str(weights / "other")
    with pytest.raises(UserError, match="MODELS: 'folded' = .*for another detector than RTDETR_MODEL_NAME"):
        script.build_model(cfg, "folded", "cpu")


def row_of(written, model):
    return next(row for row in written["table"] if row["model"] == model)


@pytest.mark.parametrize(("changes", "message"), [
    ({"WEATHER": ("hail",)}, "WEATHER = .*rain, mist"), ({"WEATHER": ()}, "WEATHER"),
    ({"WEATHER": ("rain", "rain")}, "WEATHER"), ({"MODELS": {}}, "MODELS is empty"), ({"RESAMPLES": -1}, "RESAMPLES"),
    ({"MODELS": {"a": "rtdetr"}}, "MODELS: 'a' must be"), ({"MODELS": {"a": ("yolo", "b.pt")}}, "MODELS: 'a' must be"),
    ({"MODELS": {"a": ("rtdetr", "./none")}}, "MODELS: 'a' = './none' does not exist"),
    ({"MODELS": {1: ("rtdetr", "./none")}}, "MODELS: 1: .*must be text"),
    ({"MODELS": {"a": ("rtdetr", None)}}, "MODELS: 'a': .*must be text"),
    ({"MODELS": {"a": ("adapter", " ")}}, "MODELS: 'a': .*not empty"),
    ({"MODELS": {"a": ("adapter", "./none.safetensors")}}, "MODELS: 'a' = './none.safetensors' does not exist"),
    ({"MODELS": {"a": ("unet", "./none.pt")}}, "MODELS: 'a' = './none.pt' does not exist"),
    ({"MODELS": {"a": ("conditional", "./none")}}, "MODELS: 'a'"), ({"COCO_DIR": "./none"}, "COCO_DIR")])
def test_what_cannot_be_evaluated_is_one_line(base, changes, message):
    with pytest.raises(UserError, match=message):
        script.main(**base | changes)
    assert not Path(base["OUTPUT_DIR"]).exists()


def test_detectors_of_other_classes_are_refused(base, weights, small_detector, tmp_path):

    other = copy.deepcopy(small_detector)
    other.config.id2label = {0: "cat", 1: "dog"}
    other.save_pretrained(tmp_path / "other")
    models = base["MODELS"] | {"other": ("rtdetr", str(tmp_path / "other"))}
    with pytest.raises(UserError, match="'other' and 'plain' know other classes"):
        script.main(**base | {"MODELS": models})
