"""What goes wrong in careless hands, by kind: one clear line or the right result, in every script where it applies."""

import contextlib
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from test_rfdetr_data import write_dataset
from test_unet import write_pairs

from rfdetr.datasets import roboflow
from tools import constant_types
from utils import checkpoint, config, datasets, processes, system
from utils.config import UserError
from utils.datasets import layouts, presets, windshield_pairs
from utils.evaluation.coco import coco_scores, ground_truth
from utils.inference import video
from utils.networks.rain_detector import new_rain_detector, save_rain_detector
from utils.networks.rtdetr import load_rtdetr
from utils.training import engine
from utils.training.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
NAMES = {0: "person", 1: "car"}


def script(name):
    return importlib.import_module(name)


def refused(call, *words):
    """Check that `call()` is refused in one line which has every one of the words. -> the line"""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


def edited(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# ---- constants: every script -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCRIPTS)
def test_empty_text_is_refused_where_a_constant_needs_some(name):
    module = script(name)
    kinds = config.annotated_types(vars(module))
    checked = 0
    elements = {constant: entry["elements"] for constant, entry in constant_types.table().items()}
    for constant, default in config.constants_of(vars(module)).items():
        optional = {str, type(None)} <= set(kinds.get(constant, ()))
        empty = {str: "", tuple: ("",)}.get(type(default))
        if isinstance(default, tuple) and "str" not in elements[constant]:
            continue  # of numbers
        if empty is not None and default != empty:
            checked += 1
            if optional:
                assert getattr(config.resolve(vars(module), {constant: None}), constant) == ""
                config.resolve(vars(module), {constant: ""})
            else:
                refused(lambda constant=constant, empty=empty: config.resolve(vars(module), {constant: empty}),
                        constant, "empty text")
    assert checked


def test_the_table_of_types_is_up_to_date():
    assert config.TYPES_FILE.read_text(encoding="utf-8") == constant_types.text(), "python -m tools.constant_types"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_constant_edited_to_another_type_is_refused_by_name(name):
    """The default at the top of a script is what people edit: its own type says nothing then."""
    module = script(name)
    kinds = config.annotated_types(vars(module))
    wrong = {int: ("640px", 1.5, None, (640, 640), {640}), float: ("50%", None), bool: ("no", 0.99, None),
             str: (True, 3, None), tuple: ("onnx", 7, {"a", "b"}, None), dict: ("a", ())}
    checked = 0
    for constant, default in config.constants_of(vars(module)).items():
        if constant in kinds or constant == "RESUME":  # RESUME: a bool, of the RF-DETR scripts a folder
            continue
        for value in wrong[type(default)]:
            edited_script = vars(module) | {constant: value}
            refused(lambda edited_script=edited_script: config.resolve(edited_script, {}), constant)
            checked += 1
        if isinstance(default, tuple) and default:
            refused(lambda constant=constant: config.resolve(vars(module) | {constant: (b"x",)}, {}), constant, "b'x'")
    assert checked


def test_a_path_object_is_as_good_as_text():
    module = script("detect")
    assert config.resolve(vars(module) | {"SOURCE": Path("a") / "b"}, {}).SOURCE == str(Path("a") / "b")
    cfg = config.resolve(vars(script("Training_RainDetector")) | {"CLEAN_DIRS": (Path("a"),)}, {})
    assert cfg.CLEAN_DIRS == ("a",)


def test_a_forgotten_comma_is_named():
    refused(lambda: config.resolve(vars(script("export")) | {"FORMATS": ("onnx")}, {}), "FORMATS", "('onnx',)")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_demo_finds_its_weights_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = script(name)
    cfg = config.resolve(vars(module), {"demo": True})
    for constant, value in module.DEMO.items():
        if isinstance(value, str) and "assets/" in value:
            assert Path(getattr(cfg, constant)).exists(), constant
            monkeypatch.setattr(module, "__file__", str(tmp_path / "elsewhere" / "script.py"))
            refused(lambda: config.resolve(vars(module), {"demo": True}), "assets", "part of this project")
            config.resolve(vars(module), {"demo": True} | {one: {} if isinstance(text, dict) else "x"
                                                           for one, text in module.DEMO.items()
                                                           if "assets/" in str(text)})
            break


@pytest.mark.parametrize("values", [{"CHECKPOINT_EVERY": -1}, {"SAMPLE_EVERY": -1}, {"REAL_EVERY": -2},
                                    {"TARGET_PSNR": -1.0}, {"TARGET_SSIM": float("nan")}])
def test_negative_numbers_of_the_u_net(values):
    refused(lambda: script("train_unet_derain").main(**values), *values)


@pytest.mark.parametrize("rate", [10.0, 0.0, -0.5])
def test_layer_decay_is_a_share(rate):
    refused(lambda: script("train_detector_stage1").main(LAYER_DECAY=rate), "--layer_decay")


def test_rates_of_a_phase_that_is_left_out():
    refused(lambda: script("Training_FeatureDerain").main(PHASE1_EPOCHS=0, PHASE1_LR=-1.0), "PHASE1_LR")


@pytest.mark.parametrize("constant", ["RAIN_SCORE_WEIGHT", "CLEAN_SCORE_WEIGHT"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_scores_are_weighted_with_numbers(constant, value):
    refused(lambda: script("Training_FeatureDerain").main(**{constant: value}), constant)


@pytest.mark.parametrize("values", [{"COCO_RATIO": float("nan")}, {"RAIN_RATIO": float("nan")},
                                    {"COCO_RATIO": -0.5, "RAIN_RATIO": 1.5}, {"COCO_RATIO": 0.2}])
def test_shares_of_clean_and_rainy_images_are_shares(coco, values):
    settings = {"coco_ratio": 0.5, "rain_ratio": 0.5} | {name.lower(): value for name, value in values.items()}
    refused(lambda: datasets.clean_rainy_mixture(coco / "coco", coco / "coco_rain", NAMES, presets.adaptation(64),
                                                 percent=100, seed=0, **settings), "COCO_RATIO", "RAIN_RATIO")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
@pytest.mark.parametrize("name", ["Training_SPDNet", "shrink_head"])
def test_seeds_that_no_generator_takes(name, seed, tmp_path):
    settings = {"IN_CKPT": str(ROOT / "assets" / "demo" / "rfdetr_tiny.pth"), "OUT_CKPT": str(tmp_path / "out.pth"),
                "KEEP": ("car",)} if name == "shrink_head" else {}
    refused(lambda: script(name).main(**settings, SEED=seed), "SEED", str(seed))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_environment_variable_that_is_no_number(variable, monkeypatch):
    monkeypatch.setenv(variable, "abc")
    refused(processes.accelerator, variable, "'abc'", "whole number")


# ---- files and folders -----------------------------------------------------------------------------------------

def test_a_file_where_a_folder_is_needed_and_the_reverse(tmp_path):
    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    file.write_text("words")
    folder.mkdir()
    refused(lambda: datasets.images_by_name(file, "CLEAN_DIR", "Advice."), "CLEAN_DIR", "is a file, a folder is needed")
    refused(lambda: layouts.find_split(file, "val", "COCO_DIR"), "COCO_DIR", "is a file, a folder is needed")
    refused(lambda: roboflow.split_of(file, "train"), "--dataset_dir", "is a file, a folder is needed")
    refused(lambda: checkpoint.load(folder), "is a folder, a file is needed")
    refused(lambda: script("shrink_head").main(IN_CKPT=str(folder), OUT_CKPT="x", KEEP=("car",)), "--in_ckpt",
            "is a folder")
    refused(lambda: script("Training_SPDNet_Adaptation").main(SPDNET_MODEL_PATH=str(folder)), "SPDNET_MODEL_PATH",
            "is a folder")


@pytest.mark.parametrize("write", [
    lambda path: path.write_text("these are words"), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(pickle.dumps(os.getcwd)), lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 99),
    lambda path: (torch.save({"a": torch.ones(999)}, path), path.write_bytes(path.read_bytes()[:900]))])
def test_files_that_are_no_checkpoints(tmp_path, write):
    write(tmp_path / "best.pt")
    line = refused(lambda: checkpoint.load(tmp_path / "best.pt"), "best.pt", "not a readable checkpoint")
    assert "weights_only" not in line and "101" not in line and "Pytorch" not in line


@pytest.mark.parametrize(("content", "words"), [
    ({1: torch.ones(1)}, "numbered, not named"), ([1, 2], "holds a list"), ({"model": {}}, "no state dict")])
def test_checkpoints_of_another_shape(tmp_path, content, words):
    torch.save(content, tmp_path / "weights.pt")
    refused(lambda: checkpoint.load_state(tmp_path / "weights.pt"), words)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64, torch.bool])
def test_weights_of_another_kind_are_not_cast(kind):
    module = torch.nn.Linear(2, 2)
    state = module.state_dict() | {"weight": torch.ones(2, 2).to(kind)}
    refused(lambda: checkpoint.load_into(module, state, "w.pt"), "w.pt", "of another kind", "weight")


def test_an_unreachable_stream_is_not_called_a_bad_video():
    pytest.importorskip("cv2")
    refused(lambda: video.open_source("http://127.0.0.1:9/stream"), "SOURCE", "no answer from there")


def test_runs_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "runs").write_text("x")
    write_dataset(tmp_path / "data")
    code = script("validate_setup").main(DATASET_DIR=str(tmp_path / "data"), RUNS_DIR=str(tmp_path / "runs"),
                                         PRETRAIN_WEIGHTS="none")
    assert code == 1 and "is a file: choose another --runs_dir" in capsys.readouterr().out


# ---- RT-DETR folders -------------------------------------------------------------------------------------------

def test_another_architecture_and_gaps_in_its_classes(weights):
    edited(weights / "rtdetr" / "config.json", lambda content: content.update(id2label={"0": "person", "2": "car"}))
    refused(lambda: load_rtdetr(str(weights / "rtdetr")), "id2label", "without a gap", "0, 2")
    edited(weights / "rtdetr" / "config.json", lambda content: content.update(model_type="yolos"))
    refused(lambda: load_rtdetr(str(weights / "rtdetr")), "is a yolos, one of rt_detr, rt_detr_v2, d_fine is needed")


def test_a_config_that_is_a_list(weights):
    (weights / "rtdetr" / "config.json").write_text("[1]", encoding="utf-8")
    refused(lambda: load_rtdetr(str(weights / "rtdetr")), "its config.json is not that of a model")


def test_a_pickle_as_weights_gets_no_advice_to_run_it(weights):
    (weights / "rtdetr" / "model.safetensors").unlink()
    with open(weights / "rtdetr" / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": os.getcwd}, file)
    line = refused(lambda: load_rtdetr(str(weights / "rtdetr")), "RTDETR_MODEL_NAME", "other things than tensors")
    assert "weights_only" not in line


# ---- clean and rainy, swapped or the same ----------------------------------------------------------------------

@pytest.mark.parametrize("swap", [True, False])
def test_swapped_or_equal_folders_of_the_u_net(tmp_path, swap):
    write_pairs(tmp_path, count=6)
    (tmp_path / "rainy" / "rain.json").write_text("{}")
    clear, rainy = ("rainy", "clear") if swap else ("clear", "clear")
    refused(lambda: windshield_pairs.find_pairs(tmp_path / rainy, tmp_path / clear), "CLEAR_DIR", "RAINY_DIR",
            "swapped" if swap else "the same folder")


@pytest.mark.parametrize("constants", [("CLEAN_DIRS", "RAINY_DIRS"), ("TEST_CLEAN_DIRS", "TEST_RAINY_DIRS")])
def test_swapped_folders_of_the_rain_detector(tmp_path, constants):
    write_coco(tmp_path / "clean")
    write_coco(tmp_path / "rain")
    (tmp_path / "rain" / "rain.json").write_text("{}")
    right = {"CLEAN_DIRS": (str(tmp_path / "clean" / "train2017"),), "RAINY_DIRS": (str(tmp_path / "rain/train2017"),)}
    swapped = dict(zip(constants, reversed(list(right.values())), strict=True))
    settings = right | swapped | {"BACKBONE_WEIGHTS": "", "PERCENT_DATASET": 100, "VALIDATION_SHARE": 0.4,
                                  "OUTPUT_DIR": str(tmp_path / "out")}
    refused(lambda: script("Training_RainDetector").main(**settings), constants[0], "rain.json")


# ---- annotations: both experiments -----------------------------------------------------------------------------

def open_coco(root):
    return datasets.CocoDetectionDataset(root, "val", NAMES, presets.evaluation(64), constant="COCO_DIR",
                                         domain="clean")


def open_roboflow(root):
    return roboflow.RoboflowDataset(root, "train", {"cat": 0, "dog": 1}, 64, train=False)


@pytest.fixture(params=["COCO_DIR", "--dataset_dir"])
def annotated(request, tmp_path):
    """A data set of either layout: its annotation file, and what opens it."""
    if request.param == "COCO_DIR":
        write_coco(tmp_path / "coco")
        return (tmp_path / "coco" / "annotations" / "instances_val2017.json", lambda: open_coco(tmp_path / "coco"))
    write_dataset(tmp_path / "data")
    return tmp_path / "data" / "train" / layouts.ROBOFLOW_FILE, lambda: open_roboflow(tmp_path / "data")


def corners_for_extents(content):
    for note in content["annotations"]:
        x, y, w, h = note["bbox"]
        note["bbox"] = [x, y, x + w, y + h]


def shares(content):
    size = {image["id"]: (image["width"], image["height"]) * 2 for image in content["images"]}
    for note in content["annotations"]:
        note["bbox"] = [value / side for value, side in zip(note["bbox"], size[note["image_id"]], strict=True)]


@pytest.mark.parametrize(("change", "words"), [
    (corners_for_extents, "not [x1, y1, x2, y2]"),
    (shares, "not in shares of the image"),
    (lambda content: content["annotations"][0].update(bbox=[30, 30, -10, 10]), "negative width or height"),
    (lambda content: content.update(annotations=[content["annotations"][0] | {"id": i, "bbox": [9000, 9, 20, 20]}
                                                 for i in range(1, 7)]), "outside of their images"),
    (lambda content: content["categories"][0].update(name=None), "a name is text"),
    (lambda content: content["categories"][0].update(name=7), "a name is text"),
    (lambda content: content["categories"][0].update(name=["car"]), "a name is text"),
    (lambda content: content["categories"][0].update(name=" "), "a name is text"),
    (lambda content: [note.update(image_id=str(note["image_id"])) for note in content["annotations"]],
     "image_id '1', 'images' the id 1: one is text"),
    (lambda content: [note.update(category_id=str(note["category_id"])) for note in content["annotations"]],
     "one is text, the other a number"),
    (lambda content: content["annotations"][0].update(image_id="none"), "image id(s) none that its 'images' do not"),
    (lambda content: content["images"][0].update(file_name="half \ud800.jpg"), "no file name has"),
])
def test_annotations_that_mean_something_else(annotated, change, words):
    path, opened = annotated
    edited(path, change)
    refused(opened, path.as_posix(), words)


def test_json_nested_without_end(annotated):
    path, opened = annotated
    path.write_text('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}", encoding="utf-8")
    refused(opened, path.as_posix(), "nested too deeply")


def test_a_file_name_under_several_ids_is_noted(annotated):
    path, opened = annotated
    edited(path, lambda content: content["images"].append(content["images"][0] | {"id": 99}))
    assert any("1 file name(s) stand under several image ids" in note for note in opened().notes)


def test_objects_that_stand_twice_or_have_no_area_are_noted(annotated):
    path, opened = annotated
    assert not any("twice" in note or "an area" in note for note in opened().notes)
    edited(path, lambda content: content["annotations"].extend(
        note | {"id": 900 + i, "area": 0.004 * i} for i, note in enumerate(content["annotations"][:2])))
    notes = " ".join(opened().notes)
    assert "2 object(s) stand there twice" in notes and "2 object(s) have an area below one pixel" in notes


def test_boxes_that_are_left_out_are_not_missed(annotated):
    """Perfect detections of what is left score 1.0."""
    path, opened = annotated
    edited(path, lambda content: content["annotations"].extend(
        content["annotations"][0] | {"id": 50 + i, "bbox": [5 * i, 5, 0.4, 20]} for i in range(3)))
    data, truth = opened(), ground_truth(path)
    assert any("3 box(es) thinner than one pixel were left out" in note for note in data.notes)
    label_of = {category: label for label, category in data.category_of.items()}
    perfect = [{"image_id": note["image_id"], "label": label_of[note["category_id"]], "bbox": note["bbox"], "score": 1}
               for note in json.loads(path.read_text(encoding="utf-8"))["annotations"] if note["bbox"][2] >= 1]
    assert len(perfect) == len(data.labels)
    assert coco_scores(truth, perfect, data.category_of, data.image_ids)["mAP"] == pytest.approx(1.0)


def test_a_mask_beside_its_box_is_noted(tmp_path):
    write_dataset(tmp_path, kind="polygon")
    edited(tmp_path / "train" / layouts.ROBOFLOW_FILE,
           lambda content: content["annotations"][0].update(segmentation=[[40, 30, 60, 30, 60, 46, 40, 46]]))
    data = roboflow.RoboflowDataset(tmp_path, "train", {"cat": 0, "dog": 1}, 64, train=False, masks=True)
    assert any("1 mask(s) do not fit their box" in note for note in data.notes)


@pytest.mark.parametrize("name", ["000000000001.gif", "000000000001"])
def test_rain_is_not_silently_left_out(tmp_path, name):
    write_coco(tmp_path / "coco", splits=("val",))
    shutil.copy(tmp_path / "coco/val2017/000000000001.jpg", tmp_path / "coco/val2017" / name)
    edited(tmp_path / "coco/annotations/instances_val2017.json",
           lambda content: content["images"][0].update(file_name=name))
    refused(lambda: script("make_rain").main(COCO=str(tmp_path / "coco"), OUT=str(tmp_path / "rain"), WORKERS=1),
            "1 image(s) that the annotations list are of a kind that is not read", name)


def twin_of(folder, capsys, **settings):
    """-> the folder's rainy twin, what was said."""
    capsys.readouterr()
    script("make_rain").main(**{"KIND": "windshield", "CLEAR": str(folder), "OUT": str(folder) + "_rain", "WORKERS": 1,
                                "INTENSITY": "light"} | settings)
    return Path(str(folder) + "_rain"), capsys.readouterr().out


@pytest.mark.parametrize("image, labels", [
    ("train/images/a.jpg", "train/labels/a.txt"), ("images/train/a.jpg", "labels/train/a.txt"), ("a.jpg", "a.txt"),
    ("train/a.jpg", "train/_annotations.coco.json")])
def test_annotations_in_other_layouts_come_along(tmp_path, capsys, image, labels):
    root = tmp_path / "data"
    for name in (image, labels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(root / image)
    (root / labels).write_text(json.dumps({"images": [{"file_name": "a.jpg"}], "annotations": [], "categories": []}))
    out, said = twin_of(root, capsys)
    assert (out / labels).read_bytes() == (root / labels).read_bytes() and (out / image).is_file()
    assert "1 file(s) copied" in said and "note:" not in said


@pytest.mark.parametrize("names", [("a.gif", "b.GIF", "c.heic"), ("clip.mp4",), ("data.yaml",), ("a.json",), ("a.xml",),
                                   ("annotations/a.png", "README")])
def test_rain_says_which_files_it_leaves_out(tmp_path, capsys, names):
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    (tmp_path / "data" / "annotations" / "b.json").write_text("{}")
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "a.jpg")
    for name in names:
        (tmp_path / "data" / name).write_text("{}")
    out, said = twin_of(tmp_path / "data", capsys)
    (note,) = (line for line in said.splitlines() if line.startswith("note:"))
    assert f"{len(names)} file(s) of CLEAR" in note and all(Path(name).suffix.lower() in note for name in names)
    assert not any((out / name).exists() for name in names)


@pytest.mark.parametrize("workers", [1, 2])
def test_rain_says_what_an_image_loses(tmp_path, capsys, workers):
    (tmp_path / "data").mkdir()
    whole, clear = (Image.new("RGBA", (32, 32), (9, 9, 9, alpha)) for alpha in (255, 0))
    for i in range(10):
        whole.save(tmp_path / "data" / f"whole{i}.png")
    clear.save(tmp_path / "data" / "clear.png")
    clear.convert("P").save(tmp_path / "data" / "palette.png", transparency=0)
    for name in ("pages.tif", "moves.webp", "moves.png"):
        whole.convert("RGB").save(tmp_path / "data" / name, save_all=True,
                                  append_images=[Image.new("RGB", (32, 32), "red")])
    _, said = twin_of(tmp_path / "data", capsys, WORKERS=workers)
    several, transparent = (line for line in said.splitlines() if line.startswith("note:"))
    assert "3 image(s)" in several and "pages.tif" in several and "moves.png" in several
    assert "2 image(s)" in transparent and "clear.png" in transparent and "palette.png" in transparent


@pytest.mark.parametrize("folder", [".", "train", "train/images"])
def test_rain_is_not_taken_for_clean_images(tmp_path, capsys, folder):
    """Neither the twin nor a folder in it, nor a folder that has one in it; by no script that has a constant for them.
    And how hard it rains is known in all of them."""
    (tmp_path / "all" / "data" / "train" / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "all" / "data" / "train" / "images" / "a.png")
    out, _ = twin_of(tmp_path / "all" / "data", capsys)
    refused(lambda: twin_of(out / folder, capsys, OUT=str(tmp_path / "again")), "CLEAR", "rain.json")
    refused(lambda: twin_of(tmp_path / "all", capsys), "CLEAR", "rain.json")
    refused(lambda: datasets.require_no_rain(out / folder, ("CLEAN_DIR", "RAINY_DIR")), "CLEAN_DIR", "rain.json")
    pairs = {"a": (out / "train" / "images" / "a.png", None)}
    assert windshield_pairs.intensities(out / folder, pairs) == {"a": "light"}
    assert not (tmp_path / "again").exists()


# ---- pairs and splits ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    {"train": [1, 2], "val": [3]}, {"train": None, "val": ["a"]}, {"train": [["a"]], "val": ["b"]}, [], "x", 7,
    {"train": "a", "val": "b"}])
def test_splits_that_are_no_names(tmp_path, content):
    (tmp_path / "splits.json").write_text(json.dumps(content), encoding="utf-8")
    refused(lambda: windshield_pairs.read_splits(tmp_path / "splits.json", ["a", "b"]), "SPLITS_FILE")


def test_splits_with_a_byte_order_mark(tmp_path):
    (tmp_path / "splits.json").write_text('{"train": ["a"], "val": ["b"]}', encoding="utf-8-sig")
    assert windshield_pairs.read_splits(tmp_path / "splits.json", ["a", "b"])["train"] == ["a"]


def test_images_of_sixteen_bits_in_pairs_and_broken_ones_in_real_rain(tmp_path):
    write_pairs(tmp_path, count=6)
    first = sorted((tmp_path / "rainy").iterdir())[0]
    size = Image.open(first).size
    deep = first.with_suffix(".png")
    first.unlink()
    Image.fromarray(np.full(size[::-1], 40000, np.uint16)).save(deep)
    refused(lambda: windshield_pairs.find_pairs(tmp_path / "rainy", tmp_path / "clear"), deep.name, "8 bits")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"no picture")
    train = script("train_unet_derain")
    refused(lambda: train.real_photographs(config.resolve(vars(train), {"REAL_DIR": str(tmp_path / "real")})),
            "REAL_DIR", "a.jpg")


# ---- divergence ------------------------------------------------------------------------------------------------

class Numbers(torch.utils.data.Dataset):
    """Four pictures of 2 x 2 pixels as a data set of this project."""

    notes = ()

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return {"image": torch.full((3, 2, 2), 9, dtype=torch.uint8), "labels": torch.zeros(0), "image_id": 0,
                "boxes": torch.zeros(0, 4), "size": (2, 2), "domain": "clean", "path": "a.jpg"}


def fit(folder, evaluate=None, loss=lambda model, batch: {"loss": model(batch["images"].mean((2, 3))).square().mean()},
        epochs=2, on_best=None, own_files=(), **settings):
    model = torch.nn.Linear(3, 1)
    plan = Plan(epochs=epochs, learning_rates={"LR": 1e-3}, loss_weights={"loss": 1.0}, **settings)
    loader = datasets.loaders.training_loader(Numbers(), 2, 0, 0)
    return engine.fit(model, loader, loss, plan, output_dir=folder, evaluate=evaluate, score="m" if evaluate else None,
                      on_best=on_best, own_files=own_files,
                      parameters=[{"params": list(model.parameters()), "lr": 1e-3}])


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    scores = iter([0.5, float("nan")])
    refused(lambda: fit(tmp_path, lambda model: {"m": next(scores)}), "m is not a number after epoch 2",
            "last.pt holds the last good weights")
    assert torch.load(tmp_path / "best.pt")["epoch"] == 1
    resumed = fit(tmp_path, lambda model: {"m": 0.7}, resume=True)  # the epoch is there, only its validation is not
    assert resumed["best_epoch"] == 2 and len(resumed["history"]) == 2


def test_an_error_of_the_validation_leaves_the_epoch_behind(tmp_path):
    def broken(model):
        raise UserError("the detector's outputs are not finite")
    refused(lambda: fit(tmp_path, broken), "outputs are not finite")
    assert torch.load(tmp_path / "last.pt")["batch"] == 2
    assert len(fit(tmp_path, lambda model: {"m": 1.0}, resume=True)["history"]) == 2


def test_a_best_epoch_whose_files_cannot_be_written_is_validated_again(tmp_path):
    def full_disk(model):
        raise checkpoint.CheckpointError("cannot write model: no space left")
    refused(lambda: fit(tmp_path, lambda model: {"m": 1.0}, on_best=full_disk), "no space left")
    left = torch.load(tmp_path / "last.pt")
    assert (left["epoch"], left["batch"], left["history"]) == (0, 2, [])
    written = []
    result = fit(tmp_path, lambda model: {"m": 1.0}, on_best=written.append, resume=True)
    assert len(result["history"]) == 2 and result["best_epoch"] == 1 and len(written) == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3:  # what a step on infinite gradients does
            model.weight.data.fill_(float("inf"))
            return {"loss": (model.weight * 0).nan_to_num().sum() + model.bias.sum()}
        return {"loss": model(batch["images"].mean((2, 3))).square().mean()}
    refused(lambda: fit(tmp_path, loss=loss, checkpoint_steps=1), "not finite after epoch 2, batch 1",
            "last.pt holds the last good weights")
    assert all(torch.isfinite(value).all() for value in torch.load(tmp_path / "last.pt")["model"].values())


def test_nothing_is_promised_that_was_not_saved(tmp_path):
    refused(lambda: fit(tmp_path, loss=lambda model, batch: {"loss": model.bias.sum() * float("nan")}),
            "the loss is not finite in epoch 1, batch 1", "nothing has been saved yet")
    assert not (tmp_path / "last.pt").exists()


@pytest.fixture
def broken_weights(coco, weights):
    """The small weights of conftest with a number that is none in each."""
    state = torch.load(weights / "spdnet.pt")
    for value in state.values():
        value.fill_(float("nan"))
    torch.save(state, weights / "spdnet.pt")
    detector = load_rtdetr(str(weights / "rtdetr"))
    next(detector.model.backbone.parameters()).data.fill_(float("nan"))
    detector.save_pretrained(weights / "broken")
    return {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "PERCENT_DATASET": 100,
            "IMAGE_SIZE": 96, "OUTPUT_DIR": str(coco / "out"), "BATCH_SIZE": 2, "WARMUP_STEPS": 0}


@pytest.mark.parametrize(("name", "changes"), [
    ("Training_SPDNet_Adaptation", {"SPDNET_MODEL_PATH": "spdnet.pt", "RTDETR_MODEL_NAME": "rtdetr"}),
    ("Training_SPDNet_Adaptation", {"SPDNET_MODEL_PATH": "spdnet.pt", "RTDETR_MODEL_NAME": "rtdetr",
                                    "BASELINES": False}),
    ("Training_FeatureDerain", {"RTDETR_MODEL_NAME": "broken"}),
    ("Training_RTDETR", {"RTDETR_MODEL_NAME": "broken", "AUGMENTATION": "mirror"}),
    ("Eval_SPDNet_Adaptation", {"SPDNET_MODEL_PATH": "spdnet.pt", "ADAPTED_MODEL_PATH": "spdnet.pt",
                                "RTDETR_MODEL_NAME": "rtdetr"}),
])
def test_weights_that_are_no_numbers_end_in_one_line(broken_weights, weights, name, changes):
    module, workers = script(name), "NUM_WORKERS" if name == "Training_FeatureDerain" else "DATALOADER_WORKERS"
    settings = broken_weights | {constant: str(weights / value) if str(value) in ("spdnet.pt", "rtdetr", "broken")
                                 else value for constant, value in changes.items()} | {workers: 0}
    known = config.constants_of(vars(module))
    refused(lambda: module.main(**{one: value for one, value in settings.items() if one in known}), "not finite")


@pytest.mark.parametrize("name", ["Training_SPDNet", "Training_RainDetector", "Training_Conditional",
                                  "train_detector_stage1"])
def test_a_rate_that_is_far_too_high_ends_in_one_line(name, coco, weights, tmp_path):
    """The run ends at the first number that is none: in a loss, in an output, in the weights or as a score."""
    small = {"LEARNING_RATE": 1e30, "WARMUP_STEPS": 0, "BATCH_SIZE": 4, "DATALOADER_WORKERS": 0, "CLIP_NORM": 0.0,
             "OUTPUT_DIR": str(tmp_path / "out"), "PERCENT_DATASET": 100}
    train = {kind: str(coco / root / "train2017") for kind, root in (("clean", "coco"), ("rainy", "coco_rain"))}
    if name == "Training_SPDNet":
        own = {"RAINY_DIR": train["rainy"], "CLEAN_DIR": train["clean"], "VAL_RAINY_DIR": train["rainy"],
               "VAL_CLEAN_DIR": train["clean"], "SPDNET_N_FEATS": 8, "SPDNET_N_RESBLOCKS": 1, "PATCH_SIZE": 32}
    elif name == "Training_RainDetector":
        own = {"RAINY_DIRS": (train["rainy"],), "CLEAN_DIRS": (train["clean"],), "BACKBONE_WEIGHTS": "",
               "VALIDATION_SHARE": 0.4}
    elif name == "Training_Conditional":
        save_rain_detector(new_rain_detector(""), tmp_path / "gate.pt")
        own = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "IMAGE_SIZE": 96,
               "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"), "RAIN_DETECTOR_PATH": str(tmp_path / "gate.pt"),
               "RTDETR_MODEL_NAME": str(weights / "rtdetr"), "RAIN_DETECTOR_LEARNING_RATE": 1e30}
    else:
        write_dataset(tmp_path / "data")
        own = {"SIZE": "tiny", "RESOLUTION": 64, "PRETRAIN_WEIGHTS": "none", "DATASET_DIR": str(tmp_path / "data"),
               "RUNS_DIR": str(tmp_path / "runs"), "BATCH": 1, "ACCUM": 1, "WORKERS": 0, "EMA": False, "LR": 1e30,
               "MULTI_SCALE": False, "EPOCHS": 3}
    module = script(name)
    known = config.constants_of(vars(module))
    line = refused(lambda: module.main(**{one: value for one, value in (small | own).items() if one in known}))
    assert "not finite" in line or "not a number" in line


# ---- a last.pt that is none --------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    lambda content: [content], lambda content: content | {"constants": ["NUM_EPOCHS"]},
    lambda content: content | {"history": 3}, lambda content: content | {"epoch": "two"},
    lambda content: content | {"optimizer": []}, lambda content: {"model": content["model"]},
    lambda content: content | {"torch_rng": None}, lambda content: content | {"curve": 7}])
def test_resume_from_something_else(tmp_path, change):
    fit(tmp_path, epochs=1)
    torch.save(change(torch.load(tmp_path / "last.pt")), tmp_path / "last.pt")
    refused(lambda: fit(tmp_path, resume=True), "last.pt", "not a last.pt of this project")


# ---- how a script ends -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "memory is full"), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you "
                                                     "tried to allocate 4000000000000 bytes"), "memory is full"),
    (KeyboardInterrupt(), "stopped")])
def test_the_last_line_of_a_script(error, words, capsys):
    config._show_user_errors(type(error), error, None)
    shown = capsys.readouterr().err
    assert words in shown and len(shown.splitlines()) == 1


def test_ctrl_c_while_a_script_imports():
    done = subprocess.run([sys.executable, "-c", "import utils\nraise KeyboardInterrupt"], cwd=ROOT, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == "stopped\n"


def test_file_names_that_utf_8_lacks_are_read_and_reported(tmp_path):
    """Linux lets a file name be any bytes."""
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    (path,) = system.images_in(tmp_path)
    assert datasets.seeded_subset([path.name], 100, 0) == [0]
    from utils import report
    report.write_json(tmp_path / "out.json", {"path": str(path)})
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["path"] == str(path)
    with contextlib.suppress(UserError):
        datasets.read_image(path)
