"""COCO in both layouts, YOLO and Pascal VOC: read alike everywhere, converted without loss, refused with their line."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from pycocotools import mask as rle
from rfdetr_data import write_dataset

import make_rain
import Training_RTDETR
import validate_setup
from rfdetr import setup_checks
from rfdetr.datasets import roboflow
from tools import convert_dataset
from utils import config, datasets
from utils.config import UserError
from utils.datasets import layouts, presets, voc, yolo
from utils.datasets.annotations import read_annotations
from utils.datasets.layouts import find_split
from utils.demo.roboflow import ensure_dataset
from utils.evaluation.coco import ground_truth, identity

SQUARE = [10.0, 10.0, 20.25, 10.0, 20.25, 20.5, 10.0, 20.5]
TRIANGLES = [[30.0, 5.0, 40.0, 5.0, 35.0, 15.5], [41.0, 30.0, 36.0, 40.0, 46.0, 40.0],  # the second the other way round
             [5.5, 40.0, 9.5, 40.0, 9.5, 47.0]]


def draw(path, size=(64, 48), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def awkward(root):
    """COCO with names that need care (YOLO puts "labels" for the last "images" of a path), an image without boxes, a
    class without boxes, a crowd, a mask of three parts."""
    for split in ("train", "val"):
        names = ["two words.png", "stra\u00dfe \u00e4\u00f6.jpg", "below/images/a.b.jpg", "empty.jpg"]
        names = [f"{split} {name}" if "/" not in name else name.replace("a.b", f"{split}.b") for name in names]
        for seed, name in enumerate(names):
            draw(root / f"{split}2017" / name, seed=seed)
        notes = [(11, 7, [1.2345, 2.5, 30.1234, 20.25], 0, []), (11, 2, [0, 0, 64, 48], 1, []),
                 (12, 2, [10.0, 10.0, 10.25, 10.5], 0, [SQUARE]), (12, 7, [5.5, 5.0, 40.5, 42.0], 0, TRIANGLES),
                 (13, 7, [3.0, 4.0, 5.0, 6.0], 0, [])]
        content = {"images": [{"id": 11 + i, "file_name": name, "width": 64, "height": 48}
                              for i, name in enumerate(names)],
                   "categories": [{"id": 2, "name": "car"}, {"id": 5, "name": "never seen"},
                                  {"id": 7, "name": "p\u00e9rson"}],
                   "annotations": [{"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd,
                                    "area": box[2] * box[3], "segmentation": shape}
                                   for i, (image, category, box, crowd, shape) in enumerate(notes, 1)]}
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return root


def convert(source, to, out):
    return convert_dataset.main(SOURCE=str(source), TO=to, OUT=str(out))


def content_of(root, split="train"):
    return read_annotations(find_split(root, split, "COCO_DIR"))


def objects(content, crowds=True):
    """-> {file name: [(class, box, iscrowd, segmentation), ...] in order}"""
    names = {one["id"]: one["name"] for one in content["categories"]}
    found = {image["file_name"]: [] for image in content["images"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for note in content["annotations"]:
        if crowds or not note["iscrowd"]:
            found[files[note["image_id"]]].append(
                (names[note["category_id"]], note["bbox"], note["iscrowd"], note["segmentation"]))
    return found


def assert_same(one, other, masks):
    assert one.keys() == other.keys()
    for name, expected in one.items():
        assert [(note[0], note[2]) for note in expected] == [(note[0], note[2]) for note in other[name]]
        for note, again in zip(expected, other[name], strict=True):
            assert np.abs(np.subtract(note[1], again[1])).max() < 1e-3
            if masks and note[3]:
                assert sorted(map(len, note[3])) == sorted(map(len, again[3]))
                ours, theirs = (rle.decode(rle.merge(rle.frPyObjects(shape, 48, 64))) for shape in (note[3], again[3]))
                assert ours.any() and (ours == theirs).all()
                assert np.abs(np.sort(np.concatenate(note[3])) - np.sort(np.concatenate(again[3]))).max() < 1e-3


def test_a_split_under_another_name_is_refused_instead_of_left_out(tmp_path):
    source = write_coco(tmp_path / "coco", ids=range(1, 4))
    convert(source, "yolo", tmp_path / "yolo")
    convert(source, "voc", tmp_path / "voc")
    (source / "annotations" / "instances_val2017.json").rename(source / "annotations" / "instances_val.json")
    settings = tmp_path / "yolo" / "data.yaml"
    settings.write_text(settings.read_text(encoding="utf-8").replace("val:", "valid:"), encoding="utf-8")
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    (lists / "val.txt").rename(lists / "valid.txt")
    for name in ("train", "val"):
        (tmp_path / "roboflow" / name).mkdir(parents=True)
        (tmp_path / "roboflow" / name / "_annotations.coco.json").write_text("{}", encoding="utf-8")
    for form, words in (("coco", "instances_val.json would be left out: .*instances_val2017.json"),
                        ("yolo", "valid: in .*data.yaml would be left out: .*train, val, test"),
                        ("voc", "valid.txt would be left out"), ("roboflow", "roboflow/val would be .*valid, test")):
        with pytest.raises(UserError, match=f"SOURCE = '.*{words}"):
            convert(tmp_path / form, "yolo" if form != "yolo" else "coco", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- there and back ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ways", [("yolo",), ("voc",), ("yolo", "yolo", "voc", "yolo"), ("voc", "voc", "yolo")])
def test_a_round_trip_keeps_boxes_images_and_classes(tmp_path, ways):
    root = source = awkward(tmp_path / "source")
    for number, to in enumerate((*ways, "coco")):
        convert(root, to, tmp_path / f"{number}")
        root = tmp_path / f"{number}"
    for split in ("train", "val"):
        before, after = content_of(source, split), content_of(root, split)
        assert_same(objects(before, crowds="yolo" not in ways), objects(after), masks="voc" not in ways)
        assert [one["name"] for one in after["categories"]] == ["car", "never seen", "p\u00e9rson"]
        for image in after["images"]:
            folder = find_split(root, split, "COCO_DIR").folder
            assert (folder / image["file_name"]).read_bytes() == (
                source / f"{split}2017" / image["file_name"]).read_bytes()


def test_what_a_form_cannot_hold_is_counted_and_said_once(tmp_path, capsys):
    source = awkward(tmp_path / "source")
    lost = convert(source, "yolo", tmp_path / "yolo")["lost"]
    assert [(what[:22], count) for what, count in lost.items()] == [("crowd or difficult obj", 2)]
    assert capsys.readouterr().out.count("note: ") == 1
    lost = convert(source, "voc", tmp_path / "voc")["lost"]
    assert [(what[:12], count) for what, count in lost.items()] == [("mask(s) left", 4)]
    content = json.loads((source / "annotations" / "instances_val2017.json").read_text(encoding="utf-8"))
    content["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": [10, 20, 3042]}
    content["annotations"][2]["bbox"] = [10, 10, 30, 10]
    content["annotations"][4]["bbox"] = [60, 4, 10, 6]
    (source / "annotations" / "instances_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    lost = convert(source, "yolo", tmp_path / "again")["lost"]
    assert sorted((what[:14], count) for what, count in lost.items()) == [
        ("box(es) differ", 1), ("crowd or diffi", 2), ("mask(s) writte", 1), ("object(s) reac", 1)]
    clipped = objects(content_of(tmp_path / "again", "val"))["below/images/val.b.jpg"]
    assert clipped[0][1] == pytest.approx([60, 4, 4, 6])


def test_polygons_with_holes_of_other_tools_stay_in_one_piece():
    outer, hole = [(0, 0), (10, 0), (10, 10), (0, 10)], [(2, 2), (2, 4), (4, 4), (4, 2)]
    walk = [*outer, outer[0], *hole, hole[0]]
    assert yolo._parts(walk) == [walk]
    other = [(20, 20), (30, 20), (30, 30)]
    assert yolo._parts(yolo._joined([outer, other, hole[::-1]])) == [outer, other, hole[::-1]]


def test_the_tool_refuses_what_would_be_lost_and_leaves_nothing_half_made(tmp_path, monkeypatch):
    source = write_coco(tmp_path / "coco", ids=range(1, 4))
    for settings, words in (({}, "SOURCE is not set"), ({"SOURCE": "x", "TO": "txt", "OUT": "y"}, "TO = 'txt'"),
                            ({"SOURCE": str(source), "TO": "voc", "OUT": str(tmp_path)}, "OUT = .* is there already"),
                            ({"SOURCE": str(tmp_path / "no"), "TO": "voc", "OUT": "y"}, "SOURCE = .*does not exist")):
        with pytest.raises(UserError, match=words):
            convert_dataset.main(**settings)
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        with pytest.raises(UserError, match="OUT = '.': give the name"):
            convert(source, "yolo", ".")
    (tmp_path / "here").rmdir()
    # the same names in two splits: VOC has one folder for all
    convert(source, "voc", tmp_path / "voc")
    assert content_of(tmp_path / "voc", "val")["images"][0]["file_name"] == "val/000000000001.jpg"
    assert len(content_of(tmp_path / "voc")["annotations"]) == len(content_of(source)["annotations"])
    draw(source / "train2017" / "000000000001.png", (96, 96))
    content = content_of(source)
    content["images"].append({"id": 99, "file_name": "000000000001.png", "width": 96, "height": 96})
    (source / "annotations" / "instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="called '000000000001' and differ in their ending"):
        convert(source, "yolo", tmp_path / "yolo")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        convert(source, "coco", tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"coco", "voc"}


# ---- the same data in every form -----------------------------------------------------------------------------------

@pytest.fixture
def forms(tmp_path):
    """-> {form: root} of the same clean images."""
    roots = {"coco": tmp_path / "coco"}
    write_coco(roots["coco"], ids=range(1, 9), splits=("train",))
    write_coco(roots["coco"], ids=range(11, 15), splits=("val",), seed=1)
    for form in ("yolo", "voc"):
        roots[form] = tmp_path / form
        convert(roots["coco"], form, roots[form])
    roots["roboflow"] = tmp_path / "roboflow"
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copytree(roots["coco"] / f"{split}2017", roots["roboflow"] / name)
        shutil.copyfile(roots["coco"] / "annotations" / f"instances_{split}2017.json",
                        roots["roboflow"] / name / layouts.ROBOFLOW_FILE)
    return roots


def assert_equal_samples(one, other):
    assert len(one) == len(other) > 0
    for i in range(len(one)):
        a, b = one[1, i], other[1, i]
        assert torch.equal(torch.as_tensor(a["image"]), torch.as_tensor(b["image"]))
        assert torch.equal(a["labels"], b["labels"]) and (a["image_id"], a["size"]) == (b["image_id"], b["size"])
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-5, rtol=0)


def test_a_training_gets_the_same_samples_from_every_form(forms):
    built = {}
    for form, root in forms.items():
        cfg = config.resolve(vars(Training_RTDETR), {
            "demo": True, "COCO_DIR": str(root), "COCO_RATIO": 1.0, "RAIN_RATIO": 0.0, "PERCENT_DATASET": 70,
            "BATCH_SIZE": 2, "IMAGE_SIZE": 64})
        model = Training_RTDETR.build_model(cfg)
        assert model.config.id2label == {0: "person", 1: "car"}
        train, val = Training_RTDETR.build_loaders(cfg, model.config.id2label)
        built[form] = train.dataset, val["clean"].dataset, identity(ground_truth(val["clean"].dataset.annotations))[0]
    for form in ("yolo", "voc", "roboflow"):
        for one, other in zip(built["coco"][:2], built[form][:2], strict=True):
            assert_equal_samples(one, other)
        assert built[form][2] == built["coco"][2]
    assert len(next(iter(built.values()))[0]) == 6


def test_rf_detr_gets_the_same_samples_from_every_form(forms):
    found = {form: [roboflow.RoboflowDataset(root, split, {"person": 0, "car": 1}, 64, train=split == "train")
                    for split in ("train", "valid")] for form, root in forms.items()}
    for form, root in forms.items():
        assert roboflow.class_names_of(root) == (["person", "car"], [])
        for one, other in zip(found["roboflow"], found[form], strict=True):
            assert_equal_samples(one, other)


def test_rf_detr_takes_polygons_from_yolo(tmp_path):
    write_dataset(tmp_path / "roboflow")
    for file in (tmp_path / "roboflow").glob(f"*/{layouts.ROBOFLOW_FILE}"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content["annotations"] = [note for note in content["annotations"] if isinstance(note["segmentation"], list)]
        file.write_text(json.dumps(content), encoding="utf-8")
    convert(tmp_path / "roboflow", "yolo", tmp_path / "yolo")
    names, notes = roboflow.class_names_of(tmp_path / "yolo")
    assert names == ["tissue", "cells", "blood_vessel", "glomerulus"] and not notes  # YOLO knows no parent
    rows = {name: row for row, name in enumerate(names)}
    one, other = (roboflow.RoboflowDataset(tmp_path / form, "train", rows, 96, train=False, masks=True)
                  for form in ("roboflow", "yolo"))
    assert len(other.labels) == len(one.labels) > 0
    for i in range(len(one)):
        assert torch.equal(one[i]["masks"], other[i]["masks"])


def test_the_setup_check_reads_every_form(forms, capsys):
    for form, root in forms.items():
        found = validate_setup.Findings()
        assert setup_checks.check_dataset(found, config.Config(DATASET_DIR=str(root), REPORT="")) == ["person", "car"]
        assert not found.failed, form
        assert "train: 8 images (3 without objects), 8 objects: person 5, car 3" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["yolo", "voc", "roboflow"])
def test_a_rainy_twin_reads_like_its_source(forms, tmp_path, form):
    if form == "voc":
        draw(forms["voc"] / "SegmentationClass" / "000000000001.png")
    report = make_rain.main(COCO=str(forms[form]), OUT=str(tmp_path / "rain"), WORKERS=1)
    assert report["written"] == 12
    data = datasets.clean_rainy_mixture(str(forms[form]), str(tmp_path / "rain"), {0: "person", 1: "car"},
                                        presets.evaluation(64), coco_ratio=0.0, rain_ratio=1.0, percent=100, seed=0,
                                        twins=True)
    rain, clean = data.parts[0], datasets.CocoDetectionDataset(
        forms[form], "train", {0: "person", 1: "car"}, presets.evaluation(64), constant="COCO_DIR", domain="clean")
    assert rain.files == clean.files and np.array_equal(rain.boxes, clean.boxes)
    assert torch.equal(rain[0]["twin"], clean[0]["image"]) and not torch.equal(rain[0]["image"], clean[0]["image"])
    with pytest.raises(UserError, match="COCO_DIR = .*holds rain"):
        datasets.require_no_rain(tmp_path / "rain", ("COCO_DIR", "COCO_RAIN_DIR"))


def test_a_twin_whose_data_yaml_leads_back_to_the_clean_images_is_refused(forms, tmp_path):
    images = sorted((forms["yolo"] / "images" / "train").iterdir())
    (forms["yolo"] / "train.txt").write_text("\n".join(map(str, images)), encoding="utf-8")
    file = forms["yolo"] / "data.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("images/train", "train.txt"), encoding="utf-8")
    assert len(content_of(forms["yolo"])["images"]) == 8
    make_rain.main(COCO=str(forms["yolo"]), OUT=str(tmp_path / "rain"), WORKERS=1)
    with pytest.raises(UserError, match="rain/data.yaml leads out of the rainy twin"):
        find_split(tmp_path / "rain", "train", "COCO_RAIN_DIR")


def test_folders_with_annotations_of_any_form_are_not_taken_for_plain_images(forms, tmp_path):
    draw(tmp_path / "plain" / "a.jpg")
    assert datasets.without_annotations(tmp_path / "plain", tmp_path / "plain")
    for root in forms.values():
        assert not datasets.without_annotations(tmp_path / "plain", root)


# ---- YOLO as people have it ----------------------------------------------------------------------------------------

def write_yolo(root, settings, labels="1 0.5 0.5 0.25 0.5\n", image="images/train/a.jpg"):
    draw(root / image)
    if labels is not None:
        text = (root / image.replace("images/", "labels/")).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(labels, encoding="utf-8")
    (root / "data.yaml").write_text(settings, encoding="utf-8")
    return root


PLAIN = "train: images/train\nval: images/train\nnames: [person, car]\n"


@pytest.mark.parametrize(("settings", "image"), [
    (PLAIN, "images/train/a.jpg"),
    ("train: images/train\nval: x\nnames:\n  0: person\n  1: car\nnc: 2\n", "images/train/a.jpg"),
    ("train: ../train/images\nval: ../valid/images\nnames: ['person', 'car']\n", "train/images/a.jpg"),  # Roboflow's
    ("path: ../ROOT\ntrain: images/train\nnames: [person, car]\n", "images/train/a.jpg"),
    ("path: ROOT\ntrain: images/train\nnames: [person, car]\n", "images/train/a.jpg"),  # as in Ultralytics' coco8.yaml
    ("path: /not/here\ntrain: images\\train\nnames: [person, car]\n", "images/train/a.jpg"),
    ("train: [images/train, images/more]\nnames: [person, car]\n", "images/train/a.jpg"),
    ("train: train.txt\nnames: [person, car]\n", "images/train/a.jpg"),
])
def test_the_ways_in_which_data_yaml_names_images(tmp_path, settings, image):
    root = write_yolo(tmp_path / "ROOT", settings, image=image)
    if "more" in settings:
        draw(root / "images" / "more" / "b.jpg")
    if "txt" in settings:
        (root / "train.txt").write_text(f"./{image}\n\n", encoding="utf-8")
    for place in (root, root / "data.yaml"):
        content = content_of(place)
        assert [one["name"] for one in content["categories"]] == ["person", "car"]
        assert content["annotations"][0] | {"id": 1} == {
            "id": 1, "image_id": 1, "category_id": 2, "bbox": [24, 12, 16, 24], "area": 384, "iscrowd": 0,
            "segmentation": []}
        split = find_split(place, "train", "COCO_DIR")
        assert all((split.folder / one["file_name"]).is_file() for one in content["images"])
        assert len(content["images"]) == (2 if "more" in settings else 1)


def test_data_yaml_may_lie_elsewhere_and_labels_beside_the_images(tmp_path):
    write_yolo(tmp_path / "data", PLAIN, labels=None)
    (tmp_path / "data" / "images" / "train" / "a.txt").write_text("0 0.25 0.25 0.5 0.5", encoding="utf-8")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "mine.yaml").write_text(f"path: {(tmp_path / 'data').as_posix()}\n{PLAIN}", "utf-8")
    assert content_of(tmp_path / "settings")["annotations"][0]["bbox"] == [0, 0, 32, 24]
    (tmp_path / "settings" / "other.yaml").write_text(PLAIN, "utf-8")
    with pytest.raises(UserError, match="several YAML files with classes .mine.yaml, other.yaml"):
        content_of(tmp_path / "settings")
    assert content_of(tmp_path / "settings" / "mine.yaml")["images"]


def test_labels_are_shares_of_the_upright_image(tmp_path):
    root = write_yolo(tmp_path, PLAIN)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    with Image.open(root / "images" / "train" / "a.jpg") as image:
        image.save(root / "images" / "train" / "a.jpg", exif=exif)
    content = content_of(root)
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (48, 64)
    assert content["annotations"][0]["bbox"] == [18, 16, 12, 32]


@pytest.mark.parametrize(("row", "words"), [
    ("1 0.5 0.5 0.25", "4 values"), ("1 0.5 0.5 0.25 0.5 0.9", "6 values"),
    ("car 0.5 0.5 0.2 0.2", "not numbers alone"),
    ("2 0.5 0.5 0.2 0.2", "class 2, but names has the classes 0 to 1"), ("0.5 0.5 0.5 0.2 0.2", "class 0.5"),
    ("-1 0.5 0.5 0.2 0.2", "class -1"), ("1 32 24 16 24", "32 is no share"), ("1 nan 0.5 0.2 0.2", "nan is no share"),
    ("1 0.5 0.5 -0.005 0.2", "negative width"), ("1 0.1 0.1 0.2 0.1 0.2 1.2", "1.2 is no share"),
    ("nan 0.5 0.5 0.2 0.2", "class nan")])
def test_a_malformed_label_is_named_with_file_and_line(tmp_path, row, words):
    root = write_yolo(tmp_path, PLAIN, labels=f"0 0.5 0.5 0.5 0.5\n\n{row}\n")
    with pytest.raises(UserError, match=f"labels/train/a.txt line 3: .*{words}"):
        content_of(root)


@pytest.mark.parametrize(("settings", "words"), [
    ("train: images/train\nnames: [person\n", "data.yaml line 3: no YAML"), ("- a\n- b\n", "holds no 'key: value'"),
    ("train: images/train\nnames: [yes, car]\n", "class 0 is read as True: write its name in quotes"),
    ("train: images/train\nnames: {0: person, 2: car}\n", "must be 0 to 1, not 0, 2"),
    ("train: images/train\nnames: [car, car]\n", "two classes are called 'car'"),
    ("train: images/train\nnames: [person, car]\nnc: 3\n", "nc is 3, but it has 2 names"),
    ("train: images/train\n", "has no names"), ("val: images/train\nnames: [person, car]\n", "has no 'train:'"),
    ("train: images/none\nnames: [person, car]\n", "'train: images/none' is not there; looked for .*images/none"),
    ("train: train.txt\nnames: [person, car]\n", "train.txt line 2: .*b.jpg does not exist")])
def test_a_wrong_data_yaml_is_named(tmp_path, settings, words):
    root = write_yolo(tmp_path, settings)
    (root / "train.txt").write_text("./images/train/a.jpg\nb.jpg\n", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        content_of(root)


def test_images_without_any_labels_and_a_missing_data_yaml_are_errors(tmp_path):
    write_yolo(tmp_path, PLAIN, labels=None)
    with pytest.raises(UserError, match="none of its 1 images has labels; .*labels/train/a.txt"):
        content_of(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match="COCO_DIR = .*lacks data.yaml"):
        content_of(tmp_path)


# ---- Pascal VOC as people have it ----------------------------------------------------------------------------------

XML = """<annotation>
  <size><width>64</width><height>48</height></size>
  <object>
    <name>car</name>
    <difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox>
    <part><name>wheel</name><bndbox><xmin>x</xmin></bndbox></part>
  </object>
</annotation>
"""


def write_voc(root, xml=XML, names=("a",), lists=("train", "val")):
    for name in names:
        draw(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8")
    for one in lists:
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{one}.txt").write_text("\n".join(names), encoding="utf-8")
    return root


def test_voc_counts_pixels_from_one_and_difficult_is_a_crowd(tmp_path):
    root = write_voc(tmp_path, names=("a", "two words"))
    content = content_of(root)
    assert [(note["bbox"], note["iscrowd"]) for note in content["annotations"]] == [([0, 0, 64, 48], 1)] * 2
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "two words.jpg"]
    assert [note["ignore"] for note in ground_truth(find_split(root, "val", "COCO_DIR")).dataset["annotations"]
            if "ignore" in note] == []
    (root / "Annotations" / "a.xml").write_text(XML.replace("64</width>", "0</width>").replace(">1<", ">0<"), "utf-8")
    content = content_of(root)
    assert (content["images"][0]["width"], content["annotations"][0]["bbox"]) == (64, [-1, -1, 65, 49])


def test_classes_are_numbered_alike_in_every_split(tmp_path):
    root = write_voc(tmp_path, names=("a", "b"), lists=())
    (root / "Annotations" / "b.xml").write_text(XML.replace("car", "bus"), encoding="utf-8")
    for name in "ab":
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{'train' if name == 'a' else 'val'}.txt").write_text(name, encoding="utf-8")
    for classes in (["bus", "car"], ["car", "tram", "bus"]):
        for split in ("train", "val"):
            assert [one["name"] for one in content_of(root, split)["categories"]] == classes
        (root / "classes.txt").write_text("car\ntram\nbus\n", encoding="utf-8")
    (root / "classes.txt").write_text("tram\n", encoding="utf-8")
    with pytest.raises(UserError, match="a.xml line 3: class 'car' is not in .*classes.txt"):
        content_of(root)


def test_which_images_a_split_has(tmp_path):
    def lists(root):
        return [voc.split_file(root, name) and voc.split_file(root, name).stem for name in ("train", "val", "test")]
    assert lists(write_voc(tmp_path / "1", lists=("train", "val", "trainval", "test"))) == ["train", "val", "test"]
    assert lists(write_voc(tmp_path / "2", lists=("trainval", "test"))) == ["trainval", "test", None]
    assert lists(write_voc(tmp_path / "3", lists=("trainval", "val"))) == [None, "val", None]  # it holds val's images
    assert lists(write_voc(tmp_path / "4", lists=("test",))) == [None, "test", None]
    assert lists(write_voc(tmp_path / "5", lists=())) == [None, "Annotations", None]
    assert len(content_of(tmp_path / "5", "val")["images"]) == 1
    for root in (tmp_path / "4", tmp_path / "5"):
        with pytest.raises(UserError, match="COCO_DIR = .*for 'train': write .*ImageSets/Main/train.txt"):
            content_of(root)
    with pytest.raises(UserError, match="Pascal VOC's data are in .*/1: give that folder"):
        content_of(tmp_path)


@pytest.mark.parametrize(("before", "after", "words"), [
    ("<xmax>64</xmax>", "", "line 6: <xmax> is None, not a number"),
    ("<xmax>64", "<xmax>wide", "line 6: <xmax> is 'wide'"), ("<name>car</name>", "", "line 3: .*no <name>"),
    ("<xmin>1<", "<xmin>66<", "line 6: xmax 64 .* lies before xmin 66"),
    ("<difficult>1", "<difficult>maybe", "line 3: <difficult> is 'maybe'"), ("bndbox", "box", "line 3: .*no <bndbox>"),
    ("</object>", "</objekt>", "line 8: no XML"), ("<width>64", "<width>wide", "line 2: <width> is 'wide'")])
def test_a_malformed_xml_file_is_named_with_its_line(tmp_path, before, after, words):
    with pytest.raises(UserError, match=f"Annotations/a.xml {words}"):
        content_of(write_voc(tmp_path, XML.replace(before, after)))


def test_images_and_xml_files_that_are_missing_are_named(tmp_path):
    root = write_voc(tmp_path, names=("a", "b"))
    (root / "Annotations" / "b.xml").unlink()
    with pytest.raises(UserError, match="1 of 2 images of .*train.txt have no XML file .*b.: write one without <obj"):
        content_of(root)
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(UserError, match="train.txt line 2: .*no image called 'b'"):
        content_of(root)
    draw(root / "JPEGImages" / "a.png")
    with pytest.raises(UserError, match="a.jpg and a.png differ in their ending alone"):
        content_of(root)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_demo_data_are_not_drawn_into_a_data_set_of_ones_own(forms, form):
    before = sorted(forms[form].rglob("*"))
    with pytest.raises(UserError, match="is not RainSight's own demo data and will not be replaced"):
        ensure_dataset(forms[form])
    assert sorted(forms[form].rglob("*")) == before
