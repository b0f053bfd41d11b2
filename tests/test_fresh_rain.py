"""Rain drawn while loading: a function of seed, epoch and image; the clean twin in the same geometry; no rainy copy."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Killed, dies_after, names_in
from PIL import Image

import Training_FeatureDerain as Training
from utils import datasets
from utils.config import UserError
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import FreshRain, drawn_by, fresh_rain, source_of
from utils.weather.kinds import KINDS

NAMES = {0: "person", 1: "car"}
HEAVY = FreshRain({"heavy": 1.0}, seed=3, side=64)


def opened(root, rain=HEAVY, transform=None, **kwargs):
    return datasets.clean_rainy_mixture(
        root / "coco", root / "no such folder", NAMES, transform or presets.evaluation(64), coco_ratio=0.5,
        rain_ratio=0.5, percent=100, seed=0, twins=True, fresh_rain=rain, **kwargs)


def of_domain(data, epoch, domain):
    samples = [data[epoch, i] for i in range(len(data))]
    return {sample["path"]: sample for sample in samples if sample["domain"] == domain}


def test_every_epoch_has_its_own_rain_over_clean_twins_and_needs_no_rainy_copy(coco):
    data = opened(coco)
    first, again, second = (of_domain(data, epoch, "rainy") for epoch in (0, 0, 1))
    assert len(first) == 4 and all("coco_rain" not in path for path in first)
    for path, sample in first.items():
        assert torch.equal(sample["image"], again[path]["image"])
        assert not torch.equal(sample["image"], second[path]["image"])
        assert torch.equal(sample["twin"], second[path]["twin"])
        with Image.open(path) as image:
            expected = presets.evaluation(64)(datasets.read_image(image.filename))
        assert (sample["twin"].float() - expected.float()).abs().max() <= 1
        assert sample["image"].float().std() < sample["twin"].float().std()  # a veil takes contrast
    clean = of_domain(data, 0, "clean")
    assert len(clean) == 4 and all(torch.equal(s["image"], s["twin"]) for s in clean.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_ranks_see_the_same(coco, workers):
    data = opened(coco, transform=presets.adaptation(64))
    whole = list(loaders.training_loader(data, 4, workers, seed=0))
    alone = {path: image for batch in whole for path, image in zip(batch["paths"], batch["images"], strict=True)}
    assert len(alone) == 8
    for rank in range(2):
        keys = loaders.EpochBatches(8, 2, True, 0, rank, 2)
        for batch in keys:
            for sample in (data[key] for key in batch):
                assert torch.equal(sample["image"], alone[sample["path"]])


def test_large_images_shrink_with_their_boxes_before_the_rain_is_drawn(coco):
    small = of_domain(opened(coco, FreshRain({"light": 1.0}, 0, side=48)), 0, "rainy")
    plain = of_domain(opened(coco, FreshRain({"light": 1.0}, 0, side=0)), 0, "rainy")
    for path, sample in small.items():
        torch.testing.assert_close(sample["boxes"], plain[path]["boxes"], atol=1e-3, rtol=0)
        assert sample["size"] == plain[path]["size"] == (96, 96)
        # half the pixels and enlarged again: the finest detail is gone
        assert sample["twin"].float().diff(dim=2).abs().mean() < plain[path]["twin"].float().diff(dim=2).abs().mean()


def test_pairs_without_labels(coco):
    folder = coco / "coco" / "train2017"
    train, val = datasets.unlabelled_pairs(folder, coco / "coco_rain" / "train2017", presets.evaluation(64),
                                           presets.evaluation(64), percent=100, seed=0, fresh_rain=HEAVY)
    sample, later = train[0, 0], train[1, 0]
    assert sample["path"].startswith(folder.as_posix()) and torch.equal(sample["twin"], later["twin"])
    assert not torch.equal(sample["image"], later["image"])
    assert torch.equal(val[0, 0]["image"], val[1, 0]["image"]) and "coco_rain" in val[0]["path"]


def test_without_a_rainy_folder_the_validation_rain_is_drawn_once(coco):
    train, val = datasets.unlabelled_pairs(coco / "coco" / "train2017", "", presets.evaluation(64),
                                           presets.evaluation(64), percent=100, seed=0, fresh_rain=HEAVY)
    assert (len(train), len(val)) == (7, 1) and not torch.equal(train[0, 0]["image"], train[1, 0]["image"])
    loader = loaders.validation_loader(val, 1, 0)
    first, second = (next(iter(loader)) for _ in range(2))
    assert torch.equal(first["images"], second["images"]) and not torch.equal(first["images"], first["twins"])


def test_with_labels_the_validation_weather_is_drawn_once_on_clean_images(coco, capsys):
    found = datasets.clean_rainy_validation(coco / "coco", "", NAMES, presets.evaluation(64), fresh_rain=HEAVY)
    clean, rainy = found["clean"], found["rainy"]
    assert rainy.files == clean.files and rainy.annotations == clean.annotations and rainy[0]["domain"] == "rainy"
    assert torch.equal(rainy[0]["boxes"], clean[0]["boxes"]) and rainy[0]["size"] == clean[0]["size"]
    assert torch.equal(rainy[0]["image"], rainy[0]["image"]) and not torch.equal(rainy[0]["image"], clean[0]["image"])
    assert "COCO_RAIN_DIR is empty" in capsys.readouterr().out
    assert drawn_by(rainy) == ("RAIN_KINDS", "SEED") and drawn_by(clean) == ()
    theirs = datasets.clean_rainy_validation(coco / "coco", coco / "coco_rain", NAMES, presets.evaluation(64),
                                             fresh_rain=HEAVY)["rainy"]
    assert theirs.folder == coco / "coco_rain" / "val2017" and theirs.fresh_rain is None


def test_no_validation_image_is_trained_on_where_rain_is_of_few(coco, capsys):
    """The last tenth of few rainy images is another one than that of all clean ones."""
    clean, rainy = (coco / name / "train2017" for name in ("coco", "coco_rain"))
    validated = []
    for left in (8, 7, 6):
        train, val = datasets.unlabelled_pairs(clean, rainy, presets.evaluation(64), presets.evaluation(64),
                                               percent=100, seed=0, fresh_rain=HEAVY)
        names = [path.name for path, _ in val.pairs]
        assert len(names) == 1 and names[0] not in {path.name for path, _ in train.pairs}
        assert len(train) == (7 if left == 8 else 6)
        validated += names
        (rainy / names[0]).unlink()
    assert len(set(validated)) == 3 and "no rain in them" not in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "message"), [
    ({"RAIN": "new"}, "RAIN = 'new': choose auto, files or fresh"), ({"RAIN_KINDS": {}}, "RAIN_KINDS = {}"),
    ({"RAIN_KINDS": {"hail": 1.0}}, "RAIN_KINDS = .*light.*mist"), ({"RAIN_KINDS": {"light": 0.0}}, "RAIN_KINDS"),
    ({"RAIN_KINDS": {"light": -1.0, "mist": 3.0}}, "RAIN_KINDS"), ({"RAIN_KINDS": ("light",)}, "RAIN_KINDS"),
    ({"RAIN_KINDS": {"light": float("nan")}}, "RAIN_KINDS")])
def test_constants_that_cannot_be(changes, message):
    constants = {"RAIN": "fresh", "RAIN_KINDS": {"light": 1.0}, "SEED": 0, "IMAGE_SIZE": 64}
    with pytest.raises(UserError, match=message):
        fresh_rain(SimpleNamespace(**constants | changes))
    assert fresh_rain(SimpleNamespace(**constants | changes | {"RAIN": "files"})) is None
    assert fresh_rain(SimpleNamespace(**constants | {"RAIN_KINDS": {"mist": 2, "drops": 0}})).shares == {"mist": 2}


def test_every_kind_is_drawn_as_often_as_asked(coco):
    image = datasets.read_image(next((coco / "coco" / "train2017").iterdir()))
    rain = FreshRain(dict.fromkeys(KINDS, 1.0), 0, 0)
    found = {rain({"image": image}, epoch, "a")["image"].float().mean().item() for epoch in range(12)}
    assert len(found) == 12
    with pytest.raises(UserError, match="COCO_DIR.*swapped"):
        (coco / "coco" / "rain.json").write_text("{}", encoding="utf-8")
        opened(coco)


@pytest.mark.parametrize(("values", "words"), [
    ({"RAIN": "files", "RAIN_KINDS": {"drops": 1.0}}, "RAIN_KINDS has no effect"),
    ({"RAIN": "fresh", "RAIN_RATIO": 0.0}, "RAIN has no effect"),
    ({"RAIN": "fresh"}, ""), ({"RAIN": "files"}, "")])
def test_what_draws_no_rain_is_noted(values, words, capsys):
    fresh_rain(SimpleNamespace(**{"RAIN_KINDS": {"heavy": 1, "light": 1, "medium": 1.0}, "RAIN_RATIO": 0.5, "SEED": 0,
                                  "IMAGE_SIZE": 64} | values))
    printed = capsys.readouterr().out
    assert words in printed and bool(printed) == bool(words)


@pytest.mark.parametrize(("record", "changes", "expected"), [
    (None, {}, "files"), ({"kind": "streaks", "intensity": "random"}, {}, "fresh"),
    ({"intensity": "random"}, {}, "fresh"),  # written before there was another kind
    ({"kind": "streaks", "intensity": "heavy"}, {}, "files"), ({"kind": "fog", "intensity": "random"}, {}, "files"),
    ({"intensity": "random", "source": "/another/city"}, {}, "files"), ([], {}, "files"), ("{", {}, "files"),
    (None, {"RAIN_KINDS": {"mist": 1.0}}, "fresh"), (None, {"RAIN_KINDS": {"mist": 1.0}, "RAIN_RATIO": 0}, "files"),
    (None, {"COCO_RAIN_DIR": ""}, "fresh"), (None, {"COCO_RAIN_DIR": None, "RAIN_RATIO": 0.0}, "fresh"),
    ({"intensity": "random"}, {"RAIN_RATIO": 0.0}, "files"),
    ({"intensity": "random"}, {"RAIN": "files"}, "files"), (None, {"RAIN": "fresh"}, "fresh")])
@pytest.mark.parametrize("below", ["", "train2017"])
def test_auto_draws_anew_what_was_drawn_and_reads_what_may_be_photographs(tmp_path, capsys, record, changes, expected,
                                                                          below):
    """Of data sets (COCO_DIR), and of plain folders of images in them (of Training_SPDNet.py)."""
    for name in ("clean", "rain"):
        (tmp_path / name / "train2017").mkdir(parents=True)
    if record is not None:
        if isinstance(record, dict):
            record = json.dumps({"source": (tmp_path / "clean").as_posix()} | record)
        (tmp_path / "rain" / "rain.json").write_text(str(record), encoding="utf-8")
    cfg = SimpleNamespace(**{
        "RAIN": "auto", "RAIN_KINDS": {"light": 1.0, "medium": 1.0, "heavy": 1.0}, "RAIN_RATIO": 0.5, "SEED": 0,
        "IMAGE_SIZE": 64, "COCO_DIR": str(tmp_path / "clean" / below), "COCO_RAIN_DIR": str(tmp_path / "rain" / below)}
        | changes)
    if below:
        cfg.RAINY_DIR, cfg.CLEAN_DIR = vars(cfg).pop("COCO_RAIN_DIR"), cfg.COCO_DIR
    assert source_of(cfg) == expected and (fresh_rain(cfg) is None) == (expected == "files")
    shown = capsys.readouterr().out
    assert ("anew in every epoch" in shown) == (expected == "fresh" and cfg.RAIN == "auto" and cfg.RAIN_RATIO > 0)
    assert ("reads the rainy ones" in shown) == ("anew" in shown and bool(changes.get("COCO_RAIN_DIR", "x")))
    assert ("no effect with RAIN_RATIO" in shown) == ("RAIN_KINDS" in changes and not cfg.RAIN_RATIO)


def test_other_images_below_a_twin_are_not_what_it_drew(tmp_path):
    (tmp_path / "rain" / "photos").mkdir(parents=True)
    record = {"source": (tmp_path / "clean").as_posix(), "intensity": "random"}
    (tmp_path / "rain" / "rain.json").write_text(json.dumps(record), encoding="utf-8")
    cfg = SimpleNamespace(RAIN="auto", RAIN_KINDS={"light": 1.0, "medium": 1.0, "heavy": 1.0},
                          COCO_DIR=str(tmp_path / "clean"), COCO_RAIN_DIR=str(tmp_path / "rain" / "photos"))
    assert source_of(cfg) == "files"


def test_a_training_draws_by_itself_where_make_rain_made_the_twin(feature_base, tmp_path, capsys):
    settings = feature_base | {"RAIN": "auto", "PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 0}
    shutil.rmtree(feature_base["COCO_RAIN_DIR"] + "/train2017")  # which is then not read
    record = {"source": Path(feature_base["COCO_DIR"]).resolve().as_posix(), "intensity": "random"}
    Path(feature_base["COCO_RAIN_DIR"], "rain.json").write_text(json.dumps(record), encoding="utf-8")
    Training.main(**settings)
    assert "drawn anew in every epoch ('files' reads the rainy ones)" in capsys.readouterr().out


def test_a_killed_training_goes_on_bit_for_bit_without_training_images_in_rain(feature_base, tmp_path, monkeypatch):
    settings = feature_base | {"RAIN": "fresh", "PHASE1_EPOCHS": 2, "PHASE2_EPOCHS": 0}
    shutil.rmtree(feature_base["COCO_RAIN_DIR"] + "/train2017")
    Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "whole")})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "compute_losses", dies_after(3, Training.compute_losses))
        Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "cut"), "CHECKPOINT_STEPS": 1})
    Training.main(**settings | {"OUTPUT_DIR": str(tmp_path / "cut"), "RESUME": True})
    whole, cut = (torch.load(tmp_path / name / "phase1" / "last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert "phase1" in names_in(tmp_path / "cut")
