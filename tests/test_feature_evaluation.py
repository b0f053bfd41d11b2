"""Eval_FeatureDerain.py, and the lists of MixedRain images that it can read."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CATEGORIES
from PIL import Image

import Eval_FeatureDerain
from utils import feature_derain
from utils.config import UserError
from utils.datasets import mixedrain, presets

LABELS = {label: category["name"] for label, category in enumerate(CATEGORIES)}


@pytest.fixture
def base(feature_base):
    return feature_base


@pytest.fixture
def evaluation_base(base, weights, small_detector):
    """Constants of the evaluation, with a fresh multiscale and a lightweight model on disk."""
    for name in ("multiscale", "lightweight"):
        feature_derain.FeatureDerainRTDETR(small_detector, name).save_pretrained(weights / name, 96)
    return {name: base[name] for name in ("COCO_DIR", "COCO_RAIN_DIR", "IMAGE_SIZE", "RTDETR_MODEL_NAME",
                                          "NUM_WORKERS")} | {
        "MULTISCALE_MODEL_NAME": str(weights / "multiscale"), "LIGHTWEIGHT_MODEL_NAME": str(weights / "lightweight"),
        "FINETUNED_MODEL_NAME": str(weights / "rtdetr"), "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"),
        "ADAPTED_MODEL_PATH": str(weights / "spdnet.pt"), "EVAL_BATCH_SIZE": 4, "PICTURES": 2,
        "OUTPUT_DIR": str(weights / "eval")}


def test_evaluation_reports_all_rows(evaluation_base, capsys):
    results = Eval_FeatureDerain.main(**evaluation_base | {"PREFIXES": ("00000000000",)})
    rows = {(row["model"], row["images"]): row for row in results["scores"]}
    assert len(rows) == 18  # six models; rainy, rainy with that prefix and clean
    assert rows["Vanilla RT-DETR", "00000000000*"]["count"] <= rows["Vanilla RT-DETR", "rainy"]["count"]
    for images in ("rainy", "clean"):  # fresh modules and an equal detector: vanilla's own scores
        vanilla = rows["Vanilla RT-DETR", images]
        for name in ("Feature-Level (Multiscale)", "Feature-Level (Lightweight)", "Fine-tuned RT-DETR"):
            assert rows[name, images]["mAP"] == pytest.approx(vanilla["mAP"], abs=1e-6)
    assert results["cost"]["Feature-Level (Lightweight)"]["parameters"] == (
        results["cost"]["Vanilla RT-DETR"]["parameters"] + 63)
    shown = capsys.readouterr().out
    assert shown.isascii() and "De-rain Time" in shown and "No De-rain" in shown and "rain gap won back" in shown
    out = Path(evaluation_base["OUTPUT_DIR"])
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "masks.png", "latency_map.png"}
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
    assert written["milliseconds_per_image"]["Feature-Level (Multiscale)"]["batch 1"] > 0
    assert Image.open(out / "masks.png").width > 9 * 240  # three detections, two times three masks


def test_missing_optional_models_are_notes_and_required_ones_errors(evaluation_base, weights, capsys):
    few = evaluation_base | {"LIGHTWEIGHT_MODEL_NAME": "", "FINETUNED_MODEL_NAME": "", "SPDNET_MODEL_PATH": "./none.pt",
                             "ADAPTED_MODEL_PATH": "./none.pt"}
    results = Eval_FeatureDerain.main(**few)
    assert [row["model"] for row in results["scores"][:2]] == ["Vanilla RT-DETR", "Feature-Level (Multiscale)"]
    shown = capsys.readouterr().out
    assert "was trained at" not in shown
    Eval_FeatureDerain.main(**few | {"IMAGE_SIZE": 128, "PICTURES": 1})
    assert "MULTISCALE_MODEL_NAME was trained at IMAGE_SIZE = 96, IMAGE_SIZE is 128" in capsys.readouterr().out
    for note in ("note: LIGHTWEIGHT_MODEL_NAME is empty", "note: SPDNET_MODEL_PATH './none.pt' does not exist"):
        assert note in shown
    for change, message in (({"MULTISCALE_MODEL_NAME": "./none"}, "MULTISCALE_MODEL_NAME.*Training_FeatureDerain"),
                            ({"RTDETR_MODEL_NAME": "./none"}, "RTDETR_MODEL_NAME"),
                            ({"DATASET": "kitti"}, "DATASET = 'kitti'"),
                            ({"MULTISCALE_MODEL_NAME": str(weights / "lightweight")},
                             "MULTISCALE_MODEL_NAME.*DERAIN_TYPE = 'lightweight', not 'multiscale'"),
                            ({"OUTPUT_DIR": str(weights / "rtdetr" / "config.json")}, "cannot write to"),
                            ({"NUM_WORKERS": -1}, "NUM_WORKERS = -1"),
                            ({"DATASET": "mixedrain", "MIXEDRAIN_DIR": "./none"}, "MIXEDRAIN_DIR.*labels.txt")):
        with pytest.raises(UserError, match=message):
            Eval_FeatureDerain.main(**few | change)
    torch.save({"model_args": {"derain_scale": 0.5}}, weights / "best.pt")
    with pytest.raises(UserError, match="DERAIN_SCALE = 1.0, but .* was trained with 0.5"):
        Eval_FeatureDerain.main(**evaluation_base)


@pytest.fixture
def mixed(tmp_path):
    """Four images, one per kind of weather; the clear one has no objects."""
    folder = tmp_path / "MixedRain"
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate(("mist_001.jpg", "rain_storm_7.png", "snow_storm-2.jpg", "sunny.jpg")):
        Image.new("RGB", (120, 80), (60 * i, 90, 120)).save(folder / "images" / name)
    (folder / "labels.txt").write_text("mist_001 0 0.5 0.5 0.5 0.25\nrain_storm_7.png 1 0.25 0.5 0.5 1.0\n\n"
                                       "mist_001.jpg 1 0.9 0.9 0.1 0.1\nsnow_storm-2 9 0.5 0.5 0.2 0.2\n",
                                       encoding="utf-8")
    return folder


def test_mixedrain_loader(mixed, tmp_path):
    data = mixedrain.MixedRainDataset(mixed, LABELS, presets.evaluation(96), tmp_path / "converted", unknown="ignore")
    assert len(data) == 4 and data.kinds() == {"mist": [1], "rain_storm": [2], "snow_storm": [3], "clear": [4]}
    sample = data[data.files.index("mist_001.jpg")]
    torch.testing.assert_close(sample["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.9, 0.9, 0.1, 0.1]]))
    assert sample["labels"].tolist() == [0, 1] and sample["image"].shape == (3, 96, 96)
    assert data[data.files.index("sunny.jpg")]["boxes"].shape == (0, 4)
    assert data[data.files.index("snow_storm-2.jpg")]["boxes"].shape == (0, 4)  # a truck, which this detector ignores


@pytest.mark.parametrize(("line", "message"), [
    ("mist_001 0 0.5 0.5 0.5", "line 2.*is not 'image_id class_id"),
    ("mist_001 car 0.5 0.5 0.5 0.5", "line 2.*is not 'image_id class_id"),
    ("mist_002 0 0.5 0.5 0.5 0.5", "line 2.*no image named 'mist_002'"),
    ("mist_001 10 0.5 0.5 0.5 0.5", "line 2.*class_id 10 is not one of 0 .person. to 9 .truck."),
    ("mist_001 0 50 0.5 0.5 0.5", "line 2.*shares of the image"),
    ("mist_001 0 nan 0.5 0.5 0.5", "line 2.*shares of the image"),
])
def test_mixedrain_names_the_bad_line(mixed, line, message):
    (mixed / "labels.txt").write_text(f"mist_001 0 0.5 0.5 0.5 0.25\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        mixedrain.read_mixedrain(mixed)
    assert "\n" not in str(error.value)


def test_mixedrain_names_may_hold_spaces(mixed):
    (mixed / "images" / "sunny.jpg").rename(mixed / "images" / "mist on the  bridge.jpg")
    (mixed / "labels.txt").write_text("mist on the  bridge.jpg 0 0.5 0.5 0.5 0.25\nmist_001 1 0.5 0.5 0.5 0.25\n",
                                      encoding="utf-8")
    content = mixedrain.read_mixedrain(mixed)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert [names[note["image_id"]] for note in content["annotations"]] == ["mist on the  bridge.jpg", "mist_001.jpg"]


def test_mixedrain_in_another_encoding(mixed):
    (mixed / "labels.txt").write_bytes("mist_\u00e9 0 0.5 0.5 0.5 0.25".encode("latin-1"))
    with pytest.raises(UserError, match="labels.txt cannot be read.*save it as UTF-8"):
        mixedrain.read_mixedrain(mixed)


def test_evaluation_on_mixedrain(evaluation_base, mixed, capsys):
    results = Eval_FeatureDerain.main(**evaluation_base | {
        "DATASET": "mixedrain", "MIXEDRAIN_DIR": str(mixed), "UNKNOWN_CATEGORIES": "ignore",
        "LIGHTWEIGHT_MODEL_NAME": "", "FINETUNED_MODEL_NAME": "", "SPDNET_MODEL_PATH": "", "ADAPTED_MODEL_PATH": ""})
    kinds = [(row["images"], row["count"]) for row in results["scores"] if row["model"] == "Vanilla RT-DETR"]
    assert kinds == [("mixedrain", 4), ("mist", 1), ("rain_storm", 1), ("snow_storm", 1), ("clear", 1)]
    assert "snow_storm" in capsys.readouterr().out
