"""Careless hands on what is there already: results of an earlier evaluation, files in the way, runs to go on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHOLE_IMAGES, names_in, write_coco
from matplotlib import pyplot as plt
from PIL import Image
from test_careless_hands import ROOT, edited, fit, refused, script
from test_rfdetr_data import write_dataset
from test_unet import write_pairs

import train_detector_stage1
import train_seg_single_stage
import train_unet_derain
from rfdetr import weights
from tools import sweep_unet_derain
from utils import checkpoint, config, datasets, feature_derain, losses, processes, report, system, visualize
from utils.config import UserError
from utils.datasets import presets, windshield_pairs
from utils.evaluation import comparison, image_quality
from utils.inference import video
from utils.networks import derainers, onnx_file
from utils.networks.rain_detector import new_rain_detector
from utils.networks.rtdetr import load_rtdetr
from utils.networks.unet import UNetDerainer, new_unet
from utils.training import run_state

STAGE1 = {"SIZE": "tiny", "RESOLUTION": 64, "EPOCHS": 1, "BATCH": 4, "ACCUM": 1, "WORKERS": 0, "MULTI_SCALE": False,
          "WARMUP_STEPS": 1, "PRETRAIN_WEIGHTS": "none"}


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8)).save(path)


# ---- files that are there already --------------------------------------------------------------------------------

def test_earlier_results_are_kept(tmp_path, capsys):
    for number in (1, 2, 3):
        folder = report.output_folder(tmp_path, ("results.json", "restored"))
        (folder / "results.json").write_text(str(number))
        (folder / "restored").mkdir()
    places = (tmp_path / "previous_1", tmp_path / "previous_2", tmp_path)
    assert [(place / "results.json").read_text() for place in places] == ["1", "2", "3"]
    assert (tmp_path / "previous_2" / "restored").is_dir() and "previous_2" in capsys.readouterr().out
    (tmp_path / "notes.txt").write_text("mine")
    report.output_folder(tmp_path, ("results.json",))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_stands_in_the_way_of_results_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "results.json").mkdir()
    refused(lambda: report.output_folder(tmp_path, ("results.json",)), "results.json", "folder")
    (tmp_path / "file").write_text("x")
    refused(lambda: report.output_folder(tmp_path / "file", ("results.json",)), "file")


@pytest.mark.parametrize("real, output", [("photos", "photos"), ("photos", "photos/out"), ("out/restored", "out")])
def test_restored_pictures_never_get_among_the_photographs(tmp_path, real, output):
    (tmp_path / real).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / real / "a.png")
    before = (tmp_path / real / "a.png").read_bytes()
    refused(lambda: script("Eval_unet_derain").main(RAINY_DIR="", REAL_DIR=str(tmp_path / real),
                                                    OUTPUT_DIR=str(tmp_path / output)), "OUTPUT_DIR", "REAL_DIR")
    assert (tmp_path / real / "a.png").read_bytes() == before


def test_export_keeps_a_file_of_the_same_name_and_knows_the_opsets(tmp_path):
    (tmp_path / "vanilla.pt2").write_text("mine")
    settings = {"RTDETR_MODEL_NAME": str(ROOT / "assets/demo/rtdetr"), "MODEL_NAME": "", "IMAGE_SIZE": 160,
                "FORMATS": ("torch.export",), "OUTPUT_DIR": str(tmp_path)}
    script("export").main(**settings)
    assert (tmp_path / "previous_1" / "vanilla.pt2").read_text() == "mine"
    assert (tmp_path / "vanilla.pt2").stat().st_size > 1000
    pytest.importorskip("onnx")
    refused(lambda: onnx_file.require_opset(99, "OPSET"), "OPSET", "99")


@pytest.fixture
def exported(tmp_path):
    """-> constants of export.py whose folder holds an earlier file."""
    (tmp_path / "vanilla.pt2").write_text("earlier")
    return {"RTDETR_MODEL_NAME": str(ROOT / "assets/demo/rtdetr"), "MODEL_NAME": "", "IMAGE_SIZE": 192,
            "FORMATS": ("torch.export",), "OUTPUT_DIR": str(tmp_path)}


@pytest.mark.parametrize("values", [{"TOLERANCE": -1.0}, {"TOLERANCE": float("nan")}, {"TOLERANCE": float("inf")},
                                    {"IMAGE_SIZE": 100}, {"FORMATS": ("pt2",)}])
def test_an_export_that_cannot_be_moves_no_earlier_file(exported, values, monkeypatch):
    module = script("export")
    monkeypatch.setattr(module, "export", lambda *_: pytest.fail("minutes of work"))
    refused(lambda: module.main(**exported | values), *values)
    assert (Path(exported["OUTPUT_DIR"]) / "vanilla.pt2").read_text() == "earlier"


def test_a_format_named_twice_is_written_once_and_another_size_is_noted(exported, monkeypatch, capsys):
    module, calls = script("export"), []

    def export(model, name, cfg, paths, derained):
        calls.append(cfg.FORMATS)
        (Path(cfg.OUTPUT_DIR) / "vanilla.pt2").write_text("new")
        return {}
    monkeypatch.setattr(module, "export", export)
    module.main(**exported | {"FORMATS": ("torch.export", "torch.export")})
    assert calls == [("torch.export",)]
    assert (Path(exported["OUTPUT_DIR"]) / "previous_1" / "vanilla.pt2").read_text() == "earlier"
    assert "RTDETR_MODEL_NAME was trained at IMAGE_SIZE = 160" in capsys.readouterr().out


def test_a_name_that_is_given_twice_is_moved_once(tmp_path):
    (tmp_path / "a.txt").write_text("earlier")
    assert (checkpoint.keep_earlier(tmp_path, ("a.txt", "a.txt")) / "a.txt").read_text() == "earlier"


@pytest.mark.parametrize("values", [{"RAIN_SHARE": 2.0}, {"RAIN_SHARE": float("nan")}, {"RAIN_THRESHOLD": 50.0},
                                    {"DERAIN_SCALE": 3.0}, {"PICTURES": 0}])
def test_shares_are_looked_at_before_any_model_is_loaded(values, tmp_path, monkeypatch):
    module = script("Eval_conditional")
    for name in ("build_models", "ensure_demo"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded first"))
    refused(lambda: module.main(demo=True, **values, OUTPUT_DIR=str(tmp_path)), *values)


@pytest.mark.parametrize("name", ["annotations/instances_val2017.json", "val2017/_annotations.coco.json",
                                  "val2017/000000000001.txt"])
@pytest.mark.parametrize("before", [True, False])
def test_rain_overwrites_no_annotations(tmp_path, name, before):
    """before: the twin was made, then its annotations edited; else they were there first."""
    source, out = write_coco(tmp_path / "coco", splits=("val",)), tmp_path / "rain"
    (source / name).write_text((source / "annotations" / "instances_val2017.json").read_text())
    settings = {"COCO": str(source), "OUT": str(out), "WORKERS": 1}
    if before:
        script("make_rain").main(**settings)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    refused(lambda: script("make_rain").main(**settings), "OUT", name)
    assert (out / name).read_text() == "mine" and (out / "rain.json").exists() == before
    (out / name).unlink()
    script("make_rain").main(**settings)
    script("make_rain").main(**settings)
    assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.fixture
def u_net(tmp_path):
    """-> constants that point Eval_unet_derain.py at small pairs and a network that was trained at 64."""
    write_pairs(tmp_path, count=6)
    (tmp_path / "real").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "real" / "a.png")
    network = UNetDerainer("unet", width=2)
    torch.save({"model": network.state_dict(), "model_args": network.model_args, "constants": {"IMAGE_SIZE": 64}},
               tmp_path / "best.pt")
    return {"CLEAR_DIR": str(tmp_path / "clear"), "RAINY_DIR": str(tmp_path / "rainy"), "SPLITS_FILE": "",
            "REAL_DIR": str(tmp_path / "real"), "UNET_PATH": str(tmp_path / "best.pt"), "LPIPS_WEIGHTS": "",
            "IMAGE_SIZE": 64, "OUTPUT_DIR": str(tmp_path / "eval"), "DATALOADER_WORKERS": 0}


@pytest.mark.parametrize("constant, value", [
    ("REAL_DIR", "typo"), ("LABELED_RAIN_DIR", "typo"), ("RTDETR_MODEL_NAME", "./typo"), ("SPLITS_FILE", "typo.json"),
    ("CLEAR_DIR", "typo"), ("LPIPS_WEIGHTS", "typo.pt")])
def test_a_typo_is_found_before_pairs_are_scored_and_moves_no_results(u_net, coco, weights, monkeypatch, constant,
                                                                      value):
    module = script("Eval_unet_derain")
    monkeypatch.setattr(module, "score_pairs", lambda *args: pytest.fail("minutes of work"))
    (Path(u_net["OUTPUT_DIR"])).mkdir()
    (Path(u_net["OUTPUT_DIR"]) / "results.json").write_text("earlier")
    settings = u_net | {"LABELED_RAIN_DIR": str(coco / "coco_rain"), "RTDETR_MODEL_NAME": str(weights / "rtdetr"),
                        "DETECTOR_SIZE": 96, constant: value}
    refused(lambda: module.main(**settings), constant, value)
    assert (Path(u_net["OUTPUT_DIR"]) / "results.json").read_text() == "earlier"


@pytest.mark.parametrize("name, values", [
    ("Eval_SPDNet_Adaptation", {"COCO_RAIN_DIR": "typo"}), ("Eval_SPDNet_Adaptation", {"PREFIXES": ("typo_",)}),
    ("Eval_FeatureDerain", {"COCO_DIR": "typo"}), ("Eval_FeatureDerain", {"PREFIXES": ("typo_",)}),
    ("Eval_conditional", {"COCO_RAIN_DIR": "typo"}), ("Eval_conditional", {"RAIN_SHARE": 7.0})])
def test_a_typo_moves_no_earlier_results(name, values, coco, weights, tmp_path):
    settings = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "IMAGE_SIZE": 96,
                "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"),
                "ADAPTED_MODEL_PATH": str(weights / "spdnet.pt"), "ORIGINAL_SPDNET_PATH": "", "DATALOADER_WORKERS": 0,
                "RAIN_DETECTOR_PATH": str(ROOT / "assets/demo/rain_detector.pt"), "NUM_WORKERS": 0,
                "MULTISCALE_MODEL_NAME": "", "OUTPUT_DIR": str(tmp_path / "eval")}
    known = config.constants_of(vars(script(name)))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text("earlier")
    refused(lambda: script(name).main(**{one: value for one, value in (settings | values).items() if one in known}),
            *values)
    assert (tmp_path / "eval" / "results.json").read_text() == "earlier"


def test_another_image_size_than_the_trained_one_is_noted(u_net, capsys):
    results = script("Eval_unet_derain").main(**u_net | {"IMAGE_SIZE": 32, "REAL_DIR": ""})
    assert "UNET_PATH was trained at IMAGE_SIZE = 64" in capsys.readouterr().out
    assert {row["size"] for row in results["pairs"]} == {"native", "32"}
    content = torch.load(u_net["UNET_PATH"])
    for constants in ({"IMAGE_SIZE": 32}, {"IMAGE_SIZE": 64, "CROP_SIZES": (32,)}, None):
        torch.save(content | {"constants": constants}, u_net["UNET_PATH"])
        known = derainers.load_trained(u_net["UNET_PATH"]).image_size
        assert known == (32 if constants == {"IMAGE_SIZE": 32} else None)
    results = script("Eval_unet_derain").main(**u_net | {"IMAGE_SIZE": 32, "REAL_DIR": ""})
    assert "was trained at" not in capsys.readouterr().out
    assert {row["size"] for row in results["pairs"]} == {"native", "32, as trained"}


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_missing_splits_file_says_where_there_is_one(tmp_path, name):
    refused(lambda: windshield_pairs.splits_of(tmp_path / name), "SPLITS_FILE", str(tmp_path), "train_unet_derain.py")


@pytest.mark.parametrize("constant", ["LPIPS_WEIGHTS", "PERCEPTUAL_WEIGHTS", "ENCODER_WEIGHTS", "BACKBONE_WEIGHTS"])
def test_a_missing_file_of_weights_names_its_constant(tmp_path, constant):
    path = str(tmp_path / "none.pt")
    calls = {"LPIPS_WEIGHTS": image_quality.load_lpips, "PERCEPTUAL_WEIGHTS": losses.PerceptualLoss,
             "ENCODER_WEIGHTS": lambda weights: new_unet("resnet34", encoder_weights=weights),
             "BACKBONE_WEIGHTS": new_rain_detector}
    refused(lambda: calls[constant](path), constant, path)


# ---- comparisons that compare nothing ----------------------------------------------------------------------------

def test_twins_with_other_boxes_are_noted(tmp_path, capsys):
    names = {0: "person", 1: "car"}
    clean, rainy = write_coco(tmp_path / "clean"), write_coco(tmp_path / "rainy")

    def opened():
        return [datasets.CocoDetectionDataset(root, "val", names, presets.evaluation(64), constant="COCO_DIR",
                                              domain="clean") for root in (rainy, clean)]
    assert comparison.are_twins(*opened()) and "other boxes" not in capsys.readouterr().out
    edited(rainy / "annotations" / "instances_val2017.json",
           lambda content: content["annotations"][0].update(bbox=[1, 1, 5, 5]))
    assert comparison.are_twins(*opened())
    assert "1 of 8 rainy images have other boxes" in capsys.readouterr().out


def test_the_same_model_twice_is_noted(tmp_path, capsys):
    cfg = config.Config(A="x/y.pt", B=str(Path("x") / "." / "y.pt"), C="")
    comparison.note_same(cfg, ("A", "B"), ("A", "C"))
    assert capsys.readouterr().out.count("note: A and B are the same") == 1


@pytest.mark.parametrize("name", ["Eval_SPDNet_Adaptation", "Eval_FeatureDerain", "Eval_conditional"])
@pytest.mark.parametrize("values", [{"PICTURES": -3}, {"SCORE_THRESHOLD": 40.0}])
def test_pages_of_nothing_are_refused(name, values, tmp_path):
    refused(lambda: script(name).main(**values, OUTPUT_DIR=str(tmp_path)), *values)


def test_twins_without_rain_are_noted(tmp_path, capsys):
    clean = write_coco(tmp_path / "clean")
    shutil.copytree(clean, tmp_path / "rainy")
    rainy, clean = (datasets.CocoDetectionDataset(tmp_path / root, "val", {0: "person", 1: "car"},
                                                  presets.evaluation(64), constant="COCO_DIR", domain="clean")
                    for root in ("rainy", "clean"))
    assert comparison.are_twins(rainy, clean) and "no rain in them" in capsys.readouterr().out
    path = rainy.folder / rainy.files[0]
    path.write_bytes(path.read_bytes() + b"rain")
    assert comparison.are_twins(rainy, clean) and "no rain" not in capsys.readouterr().out


@pytest.mark.parametrize("constant", ["FEATURE_MODEL_DIR", "RAINY_DETECTOR_NAME"])
def test_a_row_is_named_after_what_it_is(constant, coco, weights):
    """A plain detector is no feature model, and the reverse."""
    model = feature_derain.FeatureDerainRTDETR(load_rtdetr(str(weights / "rtdetr")), "multiscale")
    model.save_pretrained(coco / "feature")
    wrong = {"FEATURE_MODEL_DIR": weights / "rtdetr", "RAINY_DETECTOR_NAME": coco / "feature"}[constant]
    refused(lambda: script("Eval_conditional").main(
        COCO_DIR=str(coco / "coco"), COCO_RAIN_DIR=str(coco / "coco_rain"), IMAGE_SIZE=96, DATALOADER_WORKERS=0,
        RTDETR_MODEL_NAME=str(weights / "rtdetr"), SPDNET_MODEL_PATH=str(weights / "spdnet.pt"),
        ORIGINAL_SPDNET_PATH="", RAIN_DETECTOR_PATH=str(ROOT / "assets/demo/rain_detector.pt"),
        OUTPUT_DIR=str(coco / "out"), **{constant: str(wrong)}), constant, str(wrong))


# ---- a disk that is full -----------------------------------------------------------------------------------------

def test_pictures_that_cannot_be_written_are_one_line_and_replace_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    path = tmp_path / "map.png"
    path.write_text("earlier")
    monkeypatch.setattr(plt.Figure, "savefig", full)
    refused(lambda: visualize.bars({"a": 1.0, "b": 2.0}, path, "x"), "map.png", "free disk space")
    assert path.read_text() == "earlier" and names_in(tmp_path) == {"map.png"} and not plt.get_fignums()
    monkeypatch.setattr(Image.Image, "save", full)
    refused(lambda: train_unet_derain.save_page(Image.new("RGB", (8, 8)), path), "map.png", "free disk space")
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(lambda: train_unet_derain.copy_file(path, tmp_path / "copy" / "a.pt"), "a.pt", "free disk space")


def test_curves_that_cannot_be_drawn_end_no_training(tmp_path, monkeypatch, capsys, every_curve):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(plt.Figure, "savefig", full)
    fit(tmp_path)
    assert "drawn again after a later epoch" in capsys.readouterr().out and (tmp_path / "last.pt").is_file()


def test_an_export_onto_a_full_disk_is_one_line(exported, monkeypatch):
    """torch's own writing ends the process there, so it gets no file."""
    def full(path, content):
        raise OSError(28, "No space left on device")
    module = script("export")
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(report, "output_folder", lambda path, names: Path(path))
    refused(lambda: module.main(**exported | {"IMAGE_SIZE": 160}), "vanilla.pt2", "free disk space")
    assert (Path(exported["OUTPUT_DIR"]) / "vanilla.pt2").read_text() == "earlier"


# ---- detect.py: what is not looked at ----------------------------------------------------------------------------

def test_what_a_folder_holds_besides_images_is_said(tmp_path):
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    image.save(tmp_path / "a.png")
    assert video.open_source(str(tmp_path)).notes == []
    (tmp_path / "day1").mkdir()
    image.save(tmp_path / "day1" / "b.png")
    image.save(tmp_path / "c.gif")
    image.save(tmp_path / "d.tiff", save_all=True, append_images=[image])
    notes = "\n".join(video.open_source(str(tmp_path)).notes)
    assert "1 image(s) in its folders" in notes and "c.gif" in notes and "d.tiff" in notes
    assert "several pictures" in video.open_source(str(tmp_path / "d.tiff")).notes[0]
    for name in ("detections.json", "images.json"):
        (tmp_path / name).write_text("[]")
    assert any("results of detect.py" in note for note in video.open_source(str(tmp_path)).notes)


def test_nothing_de_rained_to_show(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    refused(lambda: script("detect").main(
        SOURCE=str(tmp_path / "a.png"), MODEL="conditional", RAINY_BRANCH=str(ROOT / "assets/demo/rtdetr"),
        SHOW_DERAINED=True, OUTPUT=str(tmp_path / "out")), "SHOW_DERAINED", "RAINY_BRANCH")


# ---- runs to go on with ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """-> (settings, result) of a finished run of stage 1."""
    root = tmp_path_factory.mktemp("careless")
    settings = STAGE1 | {"DATASET_DIR": str(write_dataset(root / "dataset")), "RUNS_DIR": str(root / "runs")}
    return settings, train_detector_stage1.main(**settings)


def test_resume_edited_in_the_script_is_the_flag(stage1, monkeypatch):
    settings, result = stage1
    for value, words in ((True, ("RESUME", "'last'")), ("runs/typo_1", ("typo_1", "last.pt"))):
        monkeypatch.setattr(train_detector_stage1, "RESUME", value)
        refused(lambda: train_detector_stage1.main(**settings), *words)
    monkeypatch.setattr(train_detector_stage1, "RESUME", "last")
    cfg, last = train_detector_stage1.training.resolve(vars(train_detector_stage1), settings, "detector")
    assert Path(cfg.RESUME) == Path(result["run_dir"]) and last


@pytest.mark.parametrize("values", [{"RESOLUTION": 96}, {"SIZE": "nano"}])
def test_a_resumed_run_keeps_its_network(stage1, values):
    settings, result = stage1
    refused(lambda: train_detector_stage1.main(**settings | values | {"RESUME": result["run_dir"]}),
            f"--{next(iter(values)).lower()}", "--resume")


def test_a_run_of_another_script_or_of_other_classes(stage1, tmp_path):
    settings, result = stage1
    refused(lambda: train_seg_single_stage.main(RESUME=result["run_dir"]), "train_detector_stage1.py")
    other = write_dataset(tmp_path / "other")
    for split in ("train", "valid"):
        edited(other / split / "_annotations.coco.json",
               lambda content: content["categories"][1].update(name="ferret"))
    refused(lambda: train_detector_stage1.main(**settings | {"DATASET_DIR": str(other), "RESUME": result["run_dir"]}),
            "ferret", "cat")


def test_stage_2_advises_only_what_works(stage1, tmp_path):
    stage2 = script("train_seg_stage2")
    settings, result = stage1
    given = {name: settings[name] for name in ("SIZE", "RESOLUTION", "EPOCHS", "WORKERS")}
    refused(lambda: stage2.main(**given, DATASET_DIR=settings["DATASET_DIR"],
                                STAGE1_RUN=str(Path(result["run_dir"]) / "best.pt")), "--stage1_run", "file")
    other = write_dataset(tmp_path / "other")
    for split in ("train", "valid"):
        edited(other / split / "_annotations.coco.json",
               lambda content: content["categories"][1].update(name="ferret"))
    line = refused(lambda: stage2.main(**given, DATASET_DIR=str(other), STAGE1_RUN=result["run_dir"]), "ferret")
    assert "shrink_head" not in line and "train_detector_stage1.py" in line


def test_stage_1s_folder_with_a_typo_is_said_to_be_missing(stage1):
    settings, result = stage1
    line = refused(lambda: script("train_seg_stage2").main(
        SIZE="tiny", RUNS_DIR=settings["RUNS_DIR"], STAGE1_RUN="runs/detektor"), "--stage1_run", "runs/detektor",
        "does not exist", Path(result["run_dir"]).name)
    assert "best.pt" not in line
    refused(lambda: train_detector_stage1.main(RESUME="runs/detektor"), "--resume", "runs/detektor", "does not exist")


@pytest.mark.parametrize("name", ["train_detector_stage1", "train_seg_single_stage"])
def test_weights_and_runs_with_a_typo_are_found_before_the_demo_is_drawn(name, monkeypatch, tmp_path):
    module = script(name)
    monkeypatch.setattr(module, "ensure_dataset", lambda *_: pytest.fail("drew first"))
    refused(lambda: module.main(demo=True, PRETRAIN_WEIGHTS="cocoo", RUNS_DIR=str(tmp_path)), "--pretrain_weights",
            "cocoo", "coco ", "none")
    monkeypatch.setattr(script("train_seg_stage2"), "ensure_dataset", lambda *_: pytest.fail("drew first"))
    refused(lambda: script("train_seg_stage2").main(demo=True, CHECKPOINT="typo.pth"), "--checkpoint", "typo.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train_detector_stage1", "train_seg_single_stage"])
@pytest.mark.parametrize("split, other", [("train", "training"), ("valid", "val"), ("valid", "validation"),
                                          ("test", "testing"), ("test", None)])
def test_a_split_of_another_name_is_found_before_the_model_is_built(name, split, other, tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "data", splits=("train", "valid", "test"))
    if other:
        (root / split).rename(root / other)
    else:
        shutil.rmtree(root / split)
    module = script(name)
    monkeypatch.setattr(module, "new_detector", lambda *_, **__: pytest.fail("built first"))
    refused(lambda: module.main(**STAGE1, DATASET_DIR=str(root), RUNS_DIR=str(tmp_path / "runs"), RUN_TEST=True),
            "--dataset_dir", split, other or "test")


def test_what_decides_nothing_in_a_training_of_rfdetr_is_said(capsys):
    for name, values in (("train_detector_stage1", {"MULTI_SCALE": False, "EXPANDED_SCALES": True}),
                         ("train_seg_single_stage", {"MULTI_SCALE": False, "EXPANDED_SCALES": True}),
                         ("train_seg_stage2", {"MULTI_SCALE": False, "EXPANDED_SCALES": True}),
                         ("train_seg_stage2", {"CACHE_DIR": "cache"}),
                         ("train_detector_stage1", {"PRETRAIN_WEIGHTS": "none", "PRETRAIN_EXCLUDE_KEYS": ("a*",)})):
        module = script(name)
        module.training.note_without_effect(config.resolve(vars(module), {}))
        assert not capsys.readouterr().out
        module.training.note_without_effect(config.resolve(vars(module), values))
        assert f"--{list(values)[-1].lower()}" in capsys.readouterr().out


def test_objects_that_stand_twice_are_noted_by_a_training(tmp_path, capsys):
    root = write_dataset(tmp_path / "data")
    edited(root / "valid" / "_annotations.coco.json",
           lambda content: content["annotations"].append(content["annotations"][0] | {"id": 99}))
    module = script("train_detector_stage1")
    cfg = config.resolve(vars(module), STAGE1 | {"DATASET_DIR": str(root)})
    module.training.open_splits(cfg, {"cat": 0, "dog": 1}, 64)
    assert "valid/_annotations.coco.json: 1 object(s) stand there twice" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [{"cat": 99}, {"cat": "one"}, {"cat": -1}])
def test_class_rows_that_the_head_lacks(stage1, rows, tmp_path):
    content = torch.load(Path(stage1[1]["run_dir"]) / "best.pt")
    torch.save(content | {"class_rows": rows}, tmp_path / "best.pt")
    refused(lambda: weights.rows_of(tmp_path / "best.pt"), "class_rows")


@pytest.fixture
def again(stage1, tmp_path):
    """-> settings that resume a copy of the finished run on a copy of its data."""
    settings, result = stage1
    return {"RESUME": shutil.copytree(result["run_dir"], tmp_path / "runs" / "detector_tiny_64_1").as_posix(),
            "DATASET_DIR": shutil.copytree(settings["DATASET_DIR"], tmp_path / "data").as_posix()}


def test_an_edited_validation_of_rfdetr_is_not_resumed(again):
    train_detector_stage1.main(**again)  # a copy elsewhere is the same data
    edited(Path(again["DATASET_DIR"]) / "valid" / "_annotations.coco.json",
           lambda content: content["annotations"][0]["bbox"].__setitem__(2, 7))
    refused(lambda: train_detector_stage1.main(**again), "last.pt", "validated on other data", "--resume")


def test_a_best_pt_of_another_run_is_noted(again, capsys):
    run = Path(again["RESUME"])
    train_detector_stage1.main(**again)
    assert "not this run's epoch" not in capsys.readouterr().out
    content = torch.load(run / "best.pt")
    for other in (content | {"metrics": {"box/mAP": 0.9}}, {"model": content["model"]}, content["model"]):
        torch.save(other, run / "best.pt")
        train_detector_stage1.main(**again)
        assert "best.pt is not this run's epoch 1" in capsys.readouterr().out


def test_results_that_cannot_be_written_end_in_one_line(again):
    (Path(again["RESUME"]) / "results.json").unlink()
    (Path(again["RESUME"]) / "results.json").mkdir()
    refused(lambda: train_detector_stage1.main(**again), "cannot write", "results.json")


def test_constants_edited_beside_resume_are_said_to_count_for_nothing(again, monkeypatch, capsys):
    def noted(**given):
        train_detector_stage1.training.resolve(vars(train_detector_stage1), given, "detector")
        return capsys.readouterr().out
    assert not noted(**again, EPOCHS=4)
    last = torch.load(Path(again["RESUME"]) / "last.pt")["constants"]
    for name, value in (last | {"RESUME": again["RESUME"], "EPOCHS": 4}).items():
        monkeypatch.setattr(train_detector_stage1, name, value)
    assert "note: RESUME goes on with that run's constants: EPOCHS = 1 (not 4); others" in noted()
    assert not noted(EPOCHS=5)


def test_a_stage_1_run_beside_a_checkpoint_of_another_folder_is_noted(again, tmp_path, capsys):
    start, file = script("rfdetr.start"), Path(again["RESUME"]) / "checkpoint_best_regular.pth"
    for folder, noted in ((again["RESUME"], False), ("runs/detector_nano_384_9", True), ("", False)):
        cfg = config.resolve(vars(script("train_seg_stage2")), {"STAGE1_RUN": folder, "CHECKPOINT": str(file)})
        assert start.stage1_checkpoint(cfg) == file
        assert ("--stage1_run runs/detector_nano_384_9 has no effect" in capsys.readouterr().out) == noted


def test_a_u_net_of_another_width_names_the_constant(tmp_path, capsys, monkeypatch):
    write_pairs(tmp_path)
    monkeypatch.setattr(train_unet_derain, "ensure_windshield_demo", lambda: None)
    settings = {"demo": True, "CLEAR_DIR": str(tmp_path / "clear"), "RAINY_DIR": str(tmp_path / "rainy"),
                "REAL_DIR": "", "IMAGE_SIZE": 32, "BASE_WIDTH": 2, "EPOCHS": 1, "CHECKPOINT_DIR": str(tmp_path / "run")}
    train_unet_derain.main(**settings)
    wider = settings | {"RESUME": True, "BASE_WIDTH": 4}
    refused(lambda: train_unet_derain.main(**wider), "BASE_WIDTH was 2", "RESUME")
    capsys.readouterr()
    train_unet_derain.main(**settings | {"RESUME": True, "TRAIN_PAIRS": 5, "EPOCHS": 2})
    assert "split as" in capsys.readouterr().out


# ---- trainings ---------------------------------------------------------------------------------------------------

def test_products_of_another_script_move_with_their_run(tmp_path, capsys):
    """A folder that two scripts are given: nothing of the one's stays beside the other's."""
    (tmp_path / "notes.txt").write_text("mine")
    for names in (("first.pt", "pipeline"), ("second.pt",)):
        fit(tmp_path, own_files=names)
        (tmp_path / names[0]).write_text("weights")
    earlier = tmp_path / "previous_1"
    assert (earlier / "first.pt").is_file() and (earlier / "last.pt").is_file() and not (tmp_path / "first.pt").exists()
    assert (tmp_path / "second.pt").is_file() and (tmp_path / "notes.txt").read_text() == "mine"
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    for files in ([7], "notes.txt", ["../outside.txt"], None):  # a file that somebody edited
        (tmp_path / "metrics.json").write_text(json.dumps(content | {"files": files}), encoding="utf-8")
        fit(tmp_path)
    assert (tmp_path / "notes.txt").is_file()


def test_products_that_an_earlier_version_did_not_list_move_as_well(tmp_path):
    mine = {"notes.txt", "data.pt"}
    theirs = {"checkpoint_best_regular.pth", "checkpoint.pt", "results.json", "spdnet_best.pt", "last.pt"}
    for name in mine | theirs:
        (tmp_path / name).write_text(name)
    (tmp_path / "metrics.json").write_text(json.dumps({"best_epoch": 1, "history": []}), encoding="utf-8")
    run_state.set_aside(tmp_path, ())
    assert names_in(tmp_path) == mine | {"previous_1"}
    assert names_in(tmp_path / "previous_1") == theirs | {"metrics.json"}


def test_a_run_of_rfdetr_moves_aside_as_a_whole(again):
    run = Path(again["RESUME"])
    products = names_in(run)
    assert {"checkpoint_best_regular.pth", "checkpoint.pt", "results.json", "predictions.png"} < products
    fit(run)
    assert names_in(run / "previous_1") == products
    assert names_in(run) == {"last.pt", "best.pt", "metrics.json", "curves.png", "tb", "previous_1"}
    run_state.set_aside(run, ("phase1",))  # of a script whose own runs are in folders below
    assert names_in(run) == {"previous_1", "previous_2"}


@pytest.mark.parametrize("change", ["SEED", "RENDERED_SHARE", "RAIN_KINDS", "images"])
def test_a_rain_detector_is_not_resumed_on_another_validation(coco, change):
    settings = {"CLEAN_DIRS": (str(coco / "coco" / "train2017"),), "RAINY_DIRS": (str(coco / "coco_rain/train2017"),),
                "BACKBONE_WEIGHTS": "", "NUM_EPOCHS": 1, "BATCH_SIZE": 4, "PERCENT_DATASET": 100, "WARMUP_STEPS": 0,
                "VALIDATION_SHARE": 0.4, "DATALOADER_WORKERS": 0, "OUTPUT_DIR": str(coco / "out")}
    settings |= {f"TEST_{kind}_DIRS": (str(coco / root / "val2017"),)
                 for kind, root in (("CLEAN", "coco"), ("RAINY", "coco_rain"))}
    module = script("Training_RainDetector")
    module.main(**settings)
    module.main(**settings, RESUME=True)
    assert (coco / "out" / "previous_1" / "test.json").is_file() and (coco / "out" / "test.json").is_file()
    if change == "images":
        for path in (coco / "coco_rain" / "train2017").iterdir():
            path.write_bytes(path.read_bytes() + b"another")
    other = {"SEED": {"SEED": 3}, "RENDERED_SHARE": {"RENDERED_SHARE": 0.2}, "RAIN_KINDS": {"RAIN_KINDS": {"fog": 1.0}},
             "images": {}}[change]
    refused(lambda: module.main(**settings | other, RESUME=True), "last.pt", change)


def test_an_spdnet_is_not_resumed_on_other_validation_images(coco):
    roots = [f"{coco / root}/{split}2017" for split in ("train", "val") for root in ("coco_rain", "coco")]
    settings = dict(zip(("RAINY_DIR", "CLEAN_DIR", "VAL_RAINY_DIR", "VAL_CLEAN_DIR"), roots, strict=True)) | {
        "SPDNET_N_FEATS": 6, "SPDNET_N_RESBLOCKS": 1, "PATCH_SIZE": 16, "NUM_EPOCHS": 1, "BATCH_SIZE": 8,
        "WARMUP_STEPS": 0, "VAL_IMAGES": 2, "DATALOADER_WORKERS": 0, "OUTPUT_DIR": str(coco / "out")}
    module = script("Training_SPDNet")
    module.main(**settings)
    module.main(**settings, RESUME=True)
    refused(lambda: module.main(**settings | {"SEED": 5}, RESUME=True), "last.pt", "validated on other data")


def test_a_detector_is_resumed_with_the_classes_and_the_score_of_its_run(coco):
    settings = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "RTDETR_MODEL_NAME": "",
                "ARCHITECTURE": "tiny", "IMAGE_SIZE": 96, "NUM_EPOCHS": 1, "BATCH_SIZE": 8, "WARMUP_STEPS": 0,
                "DATALOADER_WORKERS": 0, "OUTPUT_DIR": str(coco / "out"), "COCO_RATIO": 0.5, "RAIN_RATIO": 0.5}
    module = script("Training_RTDETR")
    module.main(**settings)
    refused(lambda: module.main(**settings | {"COCO_RATIO": 0.75, "RAIN_RATIO": 0.25}, RESUME=True), "RAIN_RATIO")
    for root in ("coco", "coco_rain"):
        edited(coco / root / "annotations" / "instances_train2017.json",
               lambda content: [one.update(name={"person": "car", "car": "person"}[one["name"]])
                                for one in content["categories"]])
    refused(lambda: module.main(**settings, RESUME=True), "classes was ['person', 'car'], is now ['car', 'person']")


@pytest.mark.parametrize("name", ["Training_SPDNet_Adaptation", "Training_FeatureDerain"])
def test_a_run_without_labels_is_resumed_by_the_score_that_it_had(name, coco, weights):
    for root in ("coco", "coco_rain"):
        shutil.rmtree(coco / root / "annotations")
    settings = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
                "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"),
                "IMAGE_SIZE": 96, "NUM_EPOCHS": 1, "PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 0, "BATCH_SIZE": 8,
                "DETECTION_WEIGHT": 0.0, "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0, "NUM_WORKERS": 0,
                "OUTPUT_DIR": str(coco / "out"), "FEATURE_LEVEL": "encoder"}
    module = script(name)
    settings = {one: value for one, value in settings.items() if one in config.constants_of(vars(module))}
    module.main(**settings)
    refused(lambda: module.main(**settings | {"FEATURE_LEVEL": "backbone"}, RESUME=True), "last.pt", "FEATURE_LEVEL")
    refused(lambda: module.main(**settings | {"SEED": 3}, RESUME=True), "last.pt", "validated on other data")


def test_a_full_disk_or_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    refused(lambda: fit(tmp_path), "cannot write", tmp_path.as_posix(), "No space left on device")


def test_a_folder_that_cannot_be_is_found_before_the_first_validation(coco, weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    fit(tmp_path / "other", evaluate=lambda model: {"m": 1.0})
    for name, changes in {
        "Training_SPDNet": {"RAINY_DIR": str(coco / "coco_rain/train2017"), "CLEAN_DIR": str(coco / "coco/train2017"),
                            "VAL_RAINY_DIR": str(coco / "coco_rain/val2017"),
                            "VAL_CLEAN_DIR": str(coco / "coco/val2017"), "PATCH_SIZE": 32, "SPDNET_N_FEATS": 8,
                            "SPDNET_N_RESBLOCKS": 1},
        "Training_Conditional": {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"),
                                 "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "IMAGE_SIZE": 96,
                                 "SPDNET_MODEL_PATH": str(weights / "spdnet.pt")}}.items():
        module = script(name)
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("validated first"))
        refused(lambda m=module, c=changes: m.main(**c, OUTPUT_DIR=str(tmp_path / "file")), "file")
        refused(lambda m=module, c=changes: m.main(**c, OUTPUT_DIR=str(tmp_path / "other"), RESUME=True),
                "last.pt", "scored by m")


def test_phase_1_is_not_trained_on_below_a_phase_2(feature_base):
    module = script("Training_FeatureDerain")
    settings = feature_base | {"PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 1}
    module.main(**settings)
    refused(lambda: module.main(**settings | {"PHASE1_EPOCHS": 2, "RESUME": True}), "PHASE1_EPOCHS", "phase2")
    module.main(**settings | {"PHASE2_EPOCHS": 2, "RESUME": True})


def test_images_that_are_trained_on_and_scored_are_noted(coco, small_detector, tmp_path, capsys):
    root = coco / "coco"
    names = small_detector.config.id2label
    train = datasets.CocoDetectionDataset(root, "train", names, presets.evaluation(64), constant="COCO_DIR",
                                          domain="clean")
    for copied in (False, True):
        if copied:
            for path in (root / "train2017").iterdir():
                shutil.copyfile(path, root / "val2017" / path.name)
            shutil.copyfile(root / "annotations/instances_train2017.json",
                            root / "annotations/instances_val2017.json")
        datasets.clean_rainy_validation(str(root), "", names, presets.evaluation(64), domains=("clean",), train=train)
        assert ("trained on as well" in capsys.readouterr().out) == copied


def test_the_rain_detectors_folders(tmp_path, capsys):
    module = script("Training_RainDetector")
    write_coco(tmp_path / "clean")
    write_coco(tmp_path / "rain", brightness=160)
    clean, rainy = (str(tmp_path / name / "train2017") for name in ("clean", "rain"))
    settings = {"CLEAN_DIRS": (clean,), "RAINY_DIRS": (rainy,), "BACKBONE_WEIGHTS": "", "PERCENT_DATASET": 100,
                "VALIDATION_SHARE": 0.4, "OUTPUT_DIR": str(tmp_path / "out")}
    for changes, words in (({"OUTPUT_DIR": f"{clean}/out"}, ("OUTPUT_DIR", "CLEAN_DIRS")),
                           ({"VALIDATION_SHARE": 1e-9}, ("VALIDATION_SHARE",)),
                           ({"BACKBONE_WEIGHTS": "imagenett"}, ("BACKBONE_WEIGHTS", "imagenet"))):
        refused(lambda c=changes: module.main(**settings | c), *words)
    cfg = config.resolve(vars(module), settings | {"TEST_CLEAN_DIRS": (clean,), "TEST_RAINY_DIRS": (rainy,)})
    module.build_data(cfg)
    text = capsys.readouterr().out
    assert "of TEST_CLEAN_DIRS are trained on" in text and "of TEST_RAINY_DIRS are trained on" in text
    (tmp_path / "link").symlink_to(clean, target_is_directory=True)
    refused(lambda: module.build_data(config.resolve(vars(module), settings | {
        "RAINY_DIRS": (str(tmp_path / "link"),)})), "CLEAN_DIRS", "RAINY_DIRS")


def test_what_decides_nothing_in_a_training_of_spdnet_is_said(coco, weights, tmp_path, capsys):
    module = script("Training_SPDNet")
    settings = {"RAINY_DIR": str(coco / "coco_rain/train2017"), "CLEAN_DIR": str(coco / "coco/train2017"),
                "VAL_RAINY_DIR": str(coco / "coco_rain/val2017"), "VAL_CLEAN_DIR": str(coco / "coco/val2017"),
                "PATCH_SIZE": 500, "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"), "SPDNET_N_FEATS": 32}
    cfg = config.resolve(vars(module), settings)
    module.build_model(cfg, "cpu")
    module.build_loaders(cfg)
    text = capsys.readouterr().out
    assert "SPDNET_N_FEATS" in text and "PATCH_SIZE = 500" in text
    refused(lambda: module.build_model(config.resolve(vars(module), settings | {"INITIALISATION": "idd"}), "cpu"),
            "INITIALISATION", "idd")


def test_a_twin_that_is_missing_is_named_once_and_with_its_constant(coco):
    (coco / "coco" / "train2017" / "000000000001.jpg").unlink()
    line = refused(lambda: datasets.CocoDetectionDataset(
        coco / "coco_rain", "train", {0: "person", 1: "car"}, presets.evaluation(64), constant="COCO_RAIN_DIR",
        domain="rainy", twin_root=coco / "coco", twin_constant="COCO_DIR"), "COCO_DIR", "missing")
    assert line.count("000000000001.jpg") == 1 and "1 bad image(s)" in line


def test_another_validation_than_before_is_not_resumed(tmp_path, every_curve):
    write_pairs(tmp_path, count=6)
    settings = {"CLEAR_DIR": str(tmp_path / "clear"), "RAINY_DIR": str(tmp_path / "rainy"), "REAL_DIR": "",
                "CHECKPOINT_DIR": str(tmp_path / "run"), **WHOLE_IMAGES, "BASE_WIDTH": 2,
                "IMAGE_SIZE": 32, "EPOCHS": 1, "BATCH_SIZE": 4, "DATALOADER_WORKERS": 0}
    train_unet_derain.main(**settings)
    for changes in ({"IMAGE_SIZE": 64}, {"KEEP_TONE": True}, {"RESIDUAL": False}, {"OPTIMIZER": "sgd"},
                    {"CROP_SIZES": (32,)}):
        refused(lambda c=changes: train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 2} | c), *changes,
                "last.pt", "RESUME")
    # other losses do not change what is measured, and the curves have gaps where there were none of them
    result = train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 2, "L1_WEIGHT": 0.0, "FFT_WEIGHT": 1.0})
    again = train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 2, "L1_WEIGHT": 0.0, "FFT_WEIGHT": 1.0})
    assert len(result["history"]) == len(again["history"]) == 2 and (tmp_path / "run" / "curves.png").is_file()
    kept = json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "splits.json").unlink()  # the same constants give the same pairs again, others others
    refused(lambda: train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 3, "SEED": 1, "VAL_PAIRS": 600}),
            "last.pt", "validated on other data")
    train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 3})
    assert json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8")) == kept
    next((tmp_path / "rainy").glob(f"{kept['val'][0]}.*")).unlink()
    line = refused(lambda: train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 4}), kept["val"][0], "RESUME")
    assert "SPLITS_FILE" not in line


@pytest.mark.parametrize("optimizer, other", [("adam", "sgd"), ("sgd", "adam")])
def test_another_optimizer_than_before_is_not_resumed(tmp_path, optimizer, other):
    write_pairs(tmp_path, count=6)
    settings = {"CLEAR_DIR": str(tmp_path / "clear"), "RAINY_DIR": str(tmp_path / "rainy"), "REAL_DIR": "",
                "CHECKPOINT_DIR": str(tmp_path / "run"), **WHOLE_IMAGES, "BASE_WIDTH": 2,
                "IMAGE_SIZE": 32, "EPOCHS": 1, "BATCH_SIZE": 4, "DATALOADER_WORKERS": 0, "OPTIMIZER": optimizer}
    train_unet_derain.main(**settings)
    refused(lambda: train_unet_derain.main(**settings | {"RESUME": True, "EPOCHS": 2, "OPTIMIZER": other}),
            f"OPTIMIZER was '{optimizer}', is now '{other}'", "RESUME")


@pytest.mark.parametrize("name", ["Training_SPDNet_Adaptation", "Training_RTDETR"])
def test_another_scale_or_an_edited_validation_is_not_resumed(name, coco, weights, tmp_path):
    module = script(name)
    settings = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
                "IMAGE_SIZE": 96, "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "OUTPUT_DIR": str(tmp_path / "out"),
                "NUM_EPOCHS": 1, "BATCH_SIZE": 4, "WARMUP_STEPS": 0, "DATALOADER_WORKERS": 0}
    own = {"SPDNET_MODEL_PATH": str(weights / "spdnet.pt"), "BASELINES": False}
    settings |= own if name == "Training_SPDNet_Adaptation" else {}
    module.main(**settings)
    more = settings | {"RESUME": True, "NUM_EPOCHS": 2}
    if name == "Training_SPDNet_Adaptation":
        refused(lambda: module.main(**more, DERAIN_SCALE=0.5), "DERAIN_SCALE was 1.0, is now 0.5")
    for root in ("coco", "coco_rain"):
        edited(coco / root / "annotations" / "instances_val2017.json",
               lambda content: content["annotations"][0].update(bbox=[8, 8, 31, 40]))
    refused(lambda: module.main(**more), "last.pt", "validated on other data")


def test_what_a_training_of_a_u_net_writes_lies_apart_from_its_data(tmp_path, capsys):
    write_pairs(tmp_path / "data", count=8)
    clear, rainy = (str(tmp_path / "data" / name) for name in ("clear", "rainy"))
    settings = {"CLEAR_DIR": clear, "RAINY_DIR": rainy, "REAL_DIR": "", "CHECKPOINT_DIR": str(tmp_path / "run"),
                **WHOLE_IMAGES, "BASE_WIDTH": 2, "IMAGE_SIZE": 32, "TRAIN_PAIRS": 4,
                "VAL_PAIRS": 2, "TEST_PAIRS": 2, "EPOCHS": 1, "BATCH_SIZE": 4, "DATALOADER_WORKERS": 0}
    for name in ("CLEAR_DIR", "RAINY_DIR"):
        refused(lambda n=name: train_unet_derain.main(**settings | {"CHECKPOINT_DIR": f"{settings[n]}/run"}),
                "CHECKPOINT_DIR", name)
    refused(lambda: train_unet_derain.main(**settings | {"TARGET_SSIM": 85.0}), "TARGET_SSIM")
    train_unet_derain.main(**settings | {"MORE_PAIRS": ((clear, rainy, 0.5),), "CROP_SIZES": (500,),
                                         "EARLY_STAGES_WEIGHT": 1.0})
    text = capsys.readouterr().out
    assert "MORE_PAIRS: 4 of 8 pairs" in text and "CROP_SIZES = (500,)" in text and "EARLY_STAGES_WEIGHT has no" in text
    splits = json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8"))
    evaluate = script("Eval_unet_derain")
    for file, noted in ((str(tmp_path / "run" / "splits.json"), False), ("", True)):
        cfg = config.resolve(vars(evaluate), {"CLEAR_DIR": clear, "RAINY_DIR": rainy, "SPLITS_FILE": file,
                                              "UNET_PATH": str(tmp_path / "run" / "best.pt")})
        evaluate.test_pairs(cfg)
        assert ("6 of 8 pairs were trained or validated on" in capsys.readouterr().out) == noted
    assert len(splits["train"]) == 4
    found, _ = windshield_pairs.find_pairs(rainy, clear)
    assert len(windshield_pairs.trained_on(tmp_path / "run" / "best.pt", rainy, found)) == 6
    assert windshield_pairs.trained_on(tmp_path / "run" / "best.pt", clear, found) == set()  # other data, equal names


def test_a_number_may_be_the_name_of_a_folder(tmp_path, monkeypatch):
    module = script("train_unet_derain")
    argv = ["x", "--CLEAR_DIR", "2024", "--CHECKPOINT_DIR", "1", "--SEQUENCE_SEPARATOR", "0"]
    cfg = config.resolve(vars(module), config.from_command_line(vars(module), argv[1:]))
    assert (cfg.CLEAR_DIR, cfg.CHECKPOINT_DIR, cfg.SEQUENCE_SEPARATOR) == ("2024", "1", "0")
    refused(lambda: config.resolve(vars(module), {"IMAGE_SIZE": "640"}), "IMAGE_SIZE", "640")


def test_rain_that_is_older_than_its_image_and_links_in_a_circle(tmp_path, capsys):
    for n in range(3):
        write_picture(tmp_path / "clear" / f"{n}.png")
    rain = script("make_rain")
    settings = {"KIND": "windshield", "CLEAR": str(tmp_path / "clear"), "OUT": str(tmp_path / "rainy"), "WORKERS": 1}
    rain.main(**settings)
    assert "are older" not in capsys.readouterr().out
    later = (tmp_path / "rainy" / "1.png").stat().st_mtime + 60
    os.utime(tmp_path / "clear" / "1.png", (later, later))
    rain.main(**settings)
    assert "1 rainy image(s) are older" in capsys.readouterr().out
    rain.main(**settings | {"COCO": str(tmp_path / "coco")})
    assert "COCO has no effect" in capsys.readouterr().out
    (tmp_path / "clear" / "again").symlink_to(tmp_path / "clear", target_is_directory=True)
    assert len(system.images_in(tmp_path / "clear", links=True)) == 3


# ---- the sweep ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, words", [
    ({"VARIABLES": {1: (2,)}}, ("1", "no such constant")), ({"VARIABLES": {"demo": (False,)}}, ("'demo'",)),
    ({"VARIABLES": {"LEARNING_RATE": (1e-4,)}}, ("nothing to search",)), ({"MARGIN": float("nan")}, ("MARGIN",)),
    ({"MARGIN": -5.0}, ("MARGIN",)), ({"VARIABLES": {"ARCH": ("unet", "resnet999")}}, ("ARCH", "resnet999")),
    ({"VARIABLES": {"TARGET_PSNR": (20.0, 0.0)}}, ("TARGET_PSNR",)), ({"BASE": {"TARGET_SSIM": 0.9}}, ("TARGET_SSIM",)),
    *(({"VARIABLES": {name: values}}, (name, "BASE")) for name, values in {
        "VAL_PAIRS": (50, 150), "TRAIN_PAIRS": (500,), "TEST_PAIRS": (0,), "SEED": (1, 2), "SEQUENCE_SEPARATOR": ("_",),
        "RAINY_DIR": ("./a", "./b"), "SPLITS_FILE": ("./a.json",)}.items()),
    ({"VARIABLES": {"SEED": (1,)}}, ("SEED", "SPLITS_FILE")),
    ({"VARIABLES": {"BASE_WIDTH": (32,)}}, ("BASE_WIDTH", "ARCH = 'resnet34'")),
    ({"VARIABLES": {"BASE_WIDTH": (32,), "ARCH": ("unet",)}}, ("BASE_WIDTH", "ARCH = 'resnet34'")),  # too late
    ({"BASE": {"ARCH": "unet"}, "VARIABLES": {"NAFNET_WIDTH": (32,)}}, ("NAFNET_WIDTH", "ARCH = 'unet'")),
    ({"BASE": {"ARCH": "nafnet"}, "VARIABLES": {"DROPOUT": (0.1,)}}, ("DROPOUT", "ARCH = 'nafnet'")),
    ({"VARIABLES": {"DECAY_AT": ((0.5,),)}}, ("DECAY_AT", "SCHEDULER")),
    ({"BASE": {"OPTIMIZER": "sgd"}, "VARIABLES": {"BETAS": ((0.9, 0.9),)}}, ("BETAS", "OPTIMIZER")),
    ({"BASE": {"CROP_SIZES": (64,)}, "VARIABLES": {"RANDOM_CROP": (True,)}}, ("RANDOM_CROP", "CROP_SIZES")),
])
def test_a_search_that_cannot_be(values, words, tmp_path):
    refused(lambda: sweep_unet_derain.main(**values, OUTPUT_DIR=str(tmp_path)), *words)


def test_searches_that_can_be():
    for values in ({}, {"VARIABLES": {"SEED": (1,)}, "BASE": {"SPLITS_FILE": "./splits.json"}},
                   {"VARIABLES": {"ARCH": ("unet",), "BASE_WIDTH": (32,)}},
                   {"VARIABLES": {"SCHEDULER": ("step",), "DECAY_AT": ((0.5,),)}}, {"demo": True}):
        sweep_unet_derain.check(config.resolve(vars(sweep_unet_derain), values))


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """-> (call(**settings) of a sweep whose trainings take no time, the settings that were trained, its folder)."""
    write_pairs(tmp_path)
    begun = []

    def pretend(**settings):
        begun.append(settings)
        folder = Path(settings["CHECKPOINT_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.pt").write_text(str(len(begun)))
        record = {"val/psnr": 20.0 - len(begun), "val/ssim": 0.5, "val/loss": 0.1, "images_per_s": 1.0}
        return {"stopped": "", "history": [record], "best_epoch": 1, "rainy_input": {"val/psnr": 20.0}}
    monkeypatch.setattr(train_unet_derain, "main", pretend)
    pairs = {"CLEAR_DIR": str(tmp_path / "clear"), "RAINY_DIR": str(tmp_path / "rainy")}

    def call(variables, base=None, **settings):
        return sweep_unet_derain.main(BASE=pairs | (base or {}), VARIABLES=variables, SWEEP_EPOCHS=1,
                                      OUTPUT_DIR=str(tmp_path / "sweep"), **settings)
    return call, begun, tmp_path / "sweep"


@pytest.mark.parametrize("change", ["variables", "base", "margin", "pairs", "another's file"])
def test_another_search_in_the_same_folder_replaces_nothing(searched, change):
    call, begun, folder = searched
    first = call({"DROPOUT": (0.0,)})
    assert call({"DROPOUT": (0.0,)}) == first and len(begun) == 2 and not (folder / "previous_1").exists()
    before = {name: (folder / name).read_bytes() for name in ("sweep.json", "sweep.png", "baseline/trial.json")}
    if change == "variables":  # the baseline is the same, so it is not trained again
        call({"FLIP": (0.0,)})
    elif change == "base":
        call({"DROPOUT": (0.0,)}, {"FLIP": 0.0})
    elif change == "margin":
        call({"DROPOUT": (0.0,)}, MARGIN=0.1)
    elif change == "pairs":
        for name in ("clear", "rainy"):
            Image.new("RGB", (48, 48)).save(folder.parent / name / "one_more.png")
        call({"DROPOUT": (0.0,)})
    else:
        (folder / "sweep.json").write_text("[7]")
        before["sweep.json"] = b"[7]"
        call({"DROPOUT": (0.0,)})
    assert len(begun) == {"variables": 3, "base": 4, "margin": 2, "pairs": 4, "another's file": 2}[change]
    for name in ("sweep.json", "sweep.png"):
        assert (folder / "previous_1" / name).read_bytes() == before[name] and (folder / name).is_file()
    retrained = change in ("base", "pairs")
    kept = folder / "baseline" / ("previous_1" if retrained else "")
    assert (kept / "trial.json").read_bytes() == before["baseline/trial.json"]
    assert (kept / "run" / "best.pt").read_text() == "1"


def test_a_variable_without_effect_in_its_turn_is_left_out(searched, capsys):
    call, begun, _ = searched
    rows = call({"ARCH": ("unet",), "BASE_WIDTH": (32,)}, {"ARCH": "resnet34"})["trials"]
    assert [row["variable"] for row in rows] == ["baseline", "ARCH"] and len(begun) == 2
    assert "note: BASE_WIDTH is left out" in capsys.readouterr().out


def test_what_was_asked_for_and_does_nothing_is_noted(tmp_path, capsys):
    """Not what merely stands at the top of the script."""
    with pytest.raises(UserError, match="RAINY_DIR"):
        train_unet_derain.main(ARCH="unet", NAFNET_WIDTH=24, BASE_WIDTH=2, ENCODER_WEIGHTS="imagenet", REAL_DIR="",
                               PERCEPTUAL_WEIGHT=0.0, DECAY_AT=(0.5,), RAINY_DIR=str(tmp_path / "none"),
                               CLEAR_DIR=str(tmp_path))
    notes = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert [line.split()[1] for line in notes] == ["NAFNET_WIDTH", "DECAY_AT"]


def test_a_search_ends_in_a_command_that_trains_what_was_searched():
    cfg = config.resolve(vars(sweep_unet_derain), {"BASE": {"CLEAR_DIR": "a b/c", "BETAS": (0.9, 0.99)}})
    words = [sweep_unet_derain.as_words(value) for value in (*cfg.BASE.values(), "unet", 1e-3, True, "")]
    assert words == ['"a b/c"', '"(0.9, 0.99)"', "unet", "0.001", "True", '""']


def test_other_pairs_are_another_search(tmp_path):
    write_pairs(tmp_path)
    cfg = config.resolve(vars(sweep_unet_derain), {"BASE": {"CLEAR_DIR": str(tmp_path / "clear"),
                                                            "RAINY_DIR": str(tmp_path / "rainy")}})
    before = sweep_unet_derain.data_of(cfg)
    assert sweep_unet_derain.data_of(cfg) == before
    next((tmp_path / "rainy").iterdir()).write_bytes(b"another")
    assert sweep_unet_derain.data_of(cfg) != before


# ---- command line and environment --------------------------------------------------------------------------------

@pytest.mark.parametrize("words, expected", [
    (["--IMAGE_SIZE"], "expected one argument"), (["-help"], "help"), (["--MODEL_NAME", "a", "b.png"], "b.png"),
])
def test_the_command_line_is_refused_in_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        config.from_command_line(vars(script("export")), words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and expected in told and told.count("\n") == 1, told


def test_a_script_refuses_its_command_line_in_one_line():
    answer = subprocess.run([sys.executable, "export.py", "--IMAGE_SIZE"], cwd=ROOT, capture_output=True, text=True,
                            timeout=300)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr


def test_negative_numbers_and_truth_values_of_the_command_line():
    namespace = {"RATE": 1e-4, "SHOW": False}
    assert config.from_command_line(namespace, ["--RATE", "-1e-4"]) == {"RATE": -1e-4}
    refused(lambda: config.from_command_line(namespace, ["--SHOW=off"]), "True or False")


@pytest.mark.parametrize("text", ["C:\new\table.png", "a\0b"])
def test_control_characters_in_a_path(text):
    refused(lambda: config.resolve(vars(script("detect")), {"SOURCE": text}), "SOURCE", "control character")


def test_a_home_folder_is_one():
    cfg = config.resolve(vars(script("detect")), {"SOURCE": "~/a.png"})
    assert cfg.SOURCE == str(Path.home() / "a.png")


def test_a_constant_that_was_renamed():
    namespace = {name: value for name, value in vars(script("export")).items() if name != "IMAGE_SIZE"}
    cfg = config.resolve(namespace, {})
    refused(lambda: cfg.IMAGE_SIZE, "IMAGE_SIZE", "renamed")
    assert not hasattr(cfg, "IMAGE_SIZE")


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"RANK": "5", "WORLD_SIZE": "1"}])
def test_variables_of_torchrun_without_torchrun(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(processes.accelerator, "WORLD_SIZE", "torchrun")


def test_a_notebook_shows_one_line(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    try:
        config.short_errors_in_notebook()
        shell.run_cell("from utils.config import UserError\nraise UserError('IMAGE_SIZE = 250: choose 256')")
        answer = capsys.readouterr()
        assert "Error: IMAGE_SIZE = 250" in answer.err and "Traceback" not in answer.out + answer.err
    finally:
        shell.set_custom_exc((), None)
        shell.clear_instance()


def test_a_demo_data_set_where_a_file_is(tmp_path):
    (tmp_path / "dataset").write_text("mine")
    refused(lambda: script("tools.make_demo_dataset").main(OUT=str(tmp_path / "dataset")), "dataset", "file")


def test_a_constant_that_is_missing_is_an_error_of_the_user():
    assert issubclass(config.MissingConstant, UserError) and issubclass(config.MissingConstant, AttributeError)
    assert json.dumps(config.Config(A=1).as_dict()) == '{"A": 1}'
