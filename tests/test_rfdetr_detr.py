"""rfdetr/detr.py: construct, predict, train, export, save, with the demo's tiny size."""

import argparse
import contextlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_detector_stage1
from rfdetr import detr, names, weights
from rfdetr.config import COCO_ROWS, PUBLISHED, SIZES, Published, default_resolution
from rfdetr.model import RFDETR
from utils.config import UserError


class Tiny(detr.Detector):
    """The demo's size, which is no public class."""

    size = "tiny"


def content_of(mask_head=None, rows=4, class_rows=None, size="tiny"):
    """A checkpoint of a random model whose scores differ from query to query and class to class."""
    torch.manual_seed(0)
    model = RFDETR(size, rows, mask_head=mask_head)
    state = model.state_dict()
    torch.nn.init.normal_(state["class_embed.0.weight"], std=0.2)
    state["class_embed.0.bias"].zero_()
    class_rows = class_rows or {"cells": 0, "glomerulus": 2, "blood_vessel": 1}
    return {"model": state, "args": model.model_args, "class_names": list(class_rows), "class_rows": class_rows}


@pytest.fixture
def checkpoint_file(tmp_path):
    torch.save(content_of(), tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


@pytest.fixture
def detector(checkpoint_file):
    return Tiny(checkpoint_file, device="cpu")


@pytest.fixture
def mask_detector(tmp_path):
    torch.save(content_of("nano"), tmp_path / "masks.pth")
    return detr.Detector.from_checkpoint(tmp_path / "masks.pth", device="cpu")


def picture(width=120, height=90, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# ---- predicting ------------------------------------------------------------------------------------------------

def test_every_kind_of_image_gives_the_same_detections(detector, tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), image, array, array[:, :, ::-1][:, :, ::-1], tensor]
    found = detector.predict(kinds, threshold=0.3)
    assert len(found) == len(kinds) and len(found[0]) > 5
    for other in found[1:]:
        assert np.array_equal(other.scores, found[0].scores) and other.class_names == found[0].class_names
        assert np.array_equal(other.xyxy, found[0].xyxy)
    as_float = detector.predict(tensor.float() / 255, threshold=0.3)  # is not rounded to eight bits when stretched
    np.testing.assert_allclose(as_float.scores[:3], found[0].scores[:3], atol=0.01)


def test_detections_in_pixels_of_each_image(detector):
    images = [picture(200, 100, seed=1), picture(64, 128, seed=2), picture(160, 160, seed=3)]
    found = detector.predict(images, threshold=0.2, batch_size=2)
    alone = [detector.predict(image, threshold=0.2) for image in images]
    for image, one, single in zip(images, found, alone, strict=True):
        assert len(one) and one.masks is None
        assert one.xyxy.shape == (len(one), 4) and one.xyxy.dtype == np.float32
        assert (one.xyxy[:, :2] >= 0).all() and (one.xyxy[:, 2:] <= image.size).all()
        assert (one.xyxy[:, 2:] > one.xyxy[:, :2]).all()
        assert (np.diff(one.scores) <= 0).all() and (one.scores >= 0.2).all()
        assert set(one.class_ids) <= {0, 1, 2}  # never the background's row
        assert one.class_names == [{0: "cells", 1: "blood_vessel", 2: "glomerulus"}[row] for row in one.class_ids]
        np.testing.assert_allclose(one.scores[:5], single.scores[:5], atol=1e-5)
    assert (found[0].xyxy[:, 2] > 110).any()  # wide ones reach beyond a square's side


def test_threshold_and_empty(detector):
    image = picture()
    many, few, none = (detector.predict(image, threshold=threshold) for threshold in (0.0, 0.55, 1.0))
    assert 0 < len(few) < len(many) <= 100 and len(none) == 0 and none.xyxy.shape == (0, 4)
    assert np.array_equal(many.scores[:len(few)], few.scores)
    assert detector.predict([]) == []
    with pytest.raises(UserError, match="threshold = 50"):
        detector.predict(image, threshold=50)


def test_predictions_do_not_depend_on_the_training_mode(detector):
    image = picture()
    before = detector.predict(image, threshold=0.0)
    detector.model.train()
    after = detector.predict(image, threshold=0.0)
    assert np.array_equal(before.scores, after.scores)


@pytest.mark.parametrize("image", [
    np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), 7, None,
    torch.full((3, 8, 8), 255.0), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64)])
def test_other_images_are_refused(detector, image):
    with pytest.raises(UserError, match=r"predict\(\) cannot use a"):
        detector.predict(image)


def test_masks_have_the_images_size(mask_detector):
    image = picture(150, 70)
    found = mask_detector.predict(image, threshold=0.3)
    assert mask_detector.size is None and mask_detector.model.model_args["size"] == "tiny"
    assert found.masks.shape == (len(found), 70, 150) and found.masks.dtype == bool
    nothing = mask_detector.predict(image, threshold=1.0)
    assert nothing.masks.shape == (0, 70, 150)


def test_to_supervision(mask_detector, monkeypatch):
    found = mask_detector.predict(picture(), threshold=0.3)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()
    fake = types.SimpleNamespace(Detections=lambda **given: given)
    monkeypatch.setitem(sys.modules, "supervision", fake)
    given = found.to_supervision()
    assert given["xyxy"] is found.xyxy and given["confidence"] is found.scores and given["mask"] is found.masks
    assert given["class_id"].tolist() == found.class_ids.tolist()
    assert given["data"]["class_name"].tolist() == found.class_names


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("values", [
    {"batch_size": 0}, {"batch_size": -1}, {"batch_size": 1.5}, {"batch_size": "8"}, {"batch_size": True},
    {"threshold": "0.5"}, {"threshold": 1.5}, {"threshold": float("nan")}, {"threshold": None}, {"threshold": True}])
def test_numbers_that_predict_cannot_use(detector, values, monkeypatch):
    monkeypatch.setattr(detr, "as_tensor", lambda image: pytest.fail("looked at images first"))
    refused(lambda: detector.predict([picture(), picture()], **values), *values)


def test_numpys_numbers_are_thresholds(detector):
    assert len(detector.predict(picture(), threshold=np.float32(0.25))) == len(detector.predict(picture(),
                                                                                               threshold=0.25))


def test_pil_images_are_refused_as_their_files_are(detector, tmp_path):
    deep = Image.fromarray(np.full((64, 64), 40_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    picture().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for image in (deep, tmp_path / "deep.png", deep.convert("I"), deep.convert("F")):
        refused(lambda image=image: detector.predict(image), "8 bits per channel")
    for image in (tmp_path / "cut.png", Image.open(tmp_path / "cut.png")):
        refused(lambda image=image: detector.predict(image), "image")
    assert len(detector.predict(picture().convert("L"), threshold=0.0))


# ---- constructing ------------------------------------------------------------------------------------------------

def test_public_sizes():
    expected = {"RFDETRNano": 384, "RFDETRSmall": 512, "RFDETRMedium": 576, "RFDETRBase": 560, "RFDETRLarge": 560,
                "RFDETRLarge2026": 704, "RFDETRSegNano": 312, "RFDETRSegSmall": 384, "RFDETRSegMedium": 432,
                "RFDETRSegLarge": 504, "RFDETRSegXLarge": 624, "RFDETRSeg2XLarge": 768, "RFDETRSegPreview": 432}
    classes = {name: getattr(detr, name) for name in expected}
    assert {name: default_resolution(one.size) for name, one in classes.items()} == expected
    assert {one.size for one in classes.values()} == set(PUBLISHED)


def test_random_weights(tmp_path):
    one = Tiny(None, num_classes=3, device="cpu")
    assert one.model.model_args["num_rows"] == 4 and one.class_names == ["class 0", "class 1", "class 2"]
    assert Tiny("none", device="cpu", resolution=192).resolution == 192
    assert Tiny(None, device="cpu").class_rows == COCO_ROWS
    with pytest.raises(UserError, match="num_classes = 0"):
        Tiny(None, num_classes=0)


def test_published_weights_by_name(tmp_path, monkeypatch):
    """A published file of the tiny size that does not exist: 91 rows, Roboflow's names, a Namespace."""
    content = content_of(rows=91)
    state = names.published_file(content["model"])
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "tiny.pth")
    asked = []
    monkeypatch.setitem(PUBLISHED, "tiny", Published("rf-detr-tiny.pth", "https://nowhere.invalid/tiny.pth", "0" * 32))
    monkeypatch.setattr(weights, "fetch", lambda size: asked.append(size) or tmp_path / "tiny.pth")
    for name in ("coco", "rf-detr-tiny.pth"):
        one = Tiny(name, device="cpu")
        assert one.class_rows == COCO_ROWS and len(one.class_names) == 80 and one.class_names[0] == "person"
        assert torch.equal(one.model.state_dict()["class_embed.0.weight"], content["model"]["class_embed.0.weight"])
    assert asked == ["tiny", "tiny"]
    found = one.predict(picture(), threshold=0.0)
    assert all(COCO_ROWS[name] == row for name, row in zip(found.class_names, found.class_ids, strict=True))
    fresh = Tiny("coco", num_classes=2, device="cpu").model.state_dict()
    assert fresh["class_embed.0.weight"].shape[0] == fresh["transformer.enc_out_class_embed.0.bias"].shape[0] == 3
    assert torch.equal(fresh["query_feat.weight"], state["query_feat.weight"])
    with pytest.raises(UserError, match="is of size small, this is tiny"):
        Tiny("rf-detr-small.pth")


def test_files_that_do_not_fit(tmp_path, checkpoint_file):
    with pytest.raises(UserError, match="weight file .* does not exist"):
        Tiny(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="holds a detector of size tiny, not nano"):
        detr.RFDETRNano.from_checkpoint(checkpoint_file)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict under 'model'"):
        Tiny(tmp_path / "list.pth")
    torch.save({"model": content_of()["model"]}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say its size"):
        detr.Detector(tmp_path / "bare.pth")
    with pytest.raises(UserError, match="RFDETRNano"):
        detr.Detector()


@pytest.mark.parametrize("values", [
    {"num_classes": "3"}, {"num_classes": 1.5}, {"num_classes": -1}, {"num_classes": True}, {"device": "gpu"},
    {"resolution": "160"}, {"resolution": 0},
    {"device": "cuda:99"}, {"device": 99}, {"device": 1.5}, {"pretrain_weights": 3}, {"pretrain_weights": "cocoo"}])
def test_what_no_detector_can_be_made_of(values, monkeypatch):
    monkeypatch.setattr(detr, "RFDETR", lambda *_, **__: pytest.fail("built first"))
    refused(lambda: Tiny(**{"pretrain_weights": None} | values), *values)


def test_a_device_is_one_that_this_machine_has():
    assert detr.usable_device("cpu") == detr.usable_device(torch.device("cpu")) == torch.device("cpu")
    assert detr.usable_device(None) == detr.processes.device()
    if not torch.cuda.is_available():
        refused(lambda: detr.usable_device("cuda"), "device = 'cuda'", "cpu")


def test_save_replaces_only_what_it_wrote(detector, tmp_path):
    torch.save(content_of() | {"optimizer": {}}, tmp_path / "last.pt")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "last.pt", tmp_path / "notes.txt", tmp_path / "folder"):
        before = path.is_file() and path.read_bytes()
        refused(lambda path=path: detector.save(path), path.name)
        refused(lambda path=path: weights.export_roboflow(tmp_path / "detector.pth", path), path.name)
        assert (path.is_file() and path.read_bytes()) == before
    for _ in range(2):
        detector.save(tmp_path / "mine.pth")
        weights.export_roboflow(tmp_path / "mine.pth", tmp_path / "theirs.pth")
    assert not (tmp_path / "previous_1").exists()  # equal files are only written again


def test_save_and_export_keep_what_was_there(detector, tmp_path, monkeypatch, capsys):
    """The best weights of a run have the entries of `save`'s own file."""
    best = tmp_path / "checkpoint_best_regular.pth"
    torch.save(content_of(rows=3, class_rows={"cat": 0, "dog": 1}), best)
    before = best.read_bytes()
    detector.save(best)
    assert (tmp_path / "previous_1" / best.name).read_bytes() == before and torch.load(best)["class_names"] != ["cat"]
    assert "previous_1/checkpoint_best_regular.pth" in capsys.readouterr().out
    (tmp_path / "model.onnx").write_text("another's")

    class Program:
        def write(self, program, path, *args):
            Path(path).write_text("new")
            return lambda images: None
    monkeypatch.setattr(detr.onnx_file, "require_packages", lambda *_: None)
    monkeypatch.setattr(detr.onnx_file, "export_program", lambda *_: None)
    monkeypatch.setattr(detr.onnx_file, "write", Program().write)
    for difference, kept in ((1.0, "another's"), (0.0, "new")):
        monkeypatch.setattr(detr.onnx_file, "difference", lambda *_, d=difference: d)
        with contextlib.suppress(UserError):
            detector.export(tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx").read_text() == kept
    assert (tmp_path / "previous_2" / "model.onnx").read_text() == "another's"


def test_names_that_no_file_has(detector, tmp_path):
    for name in (3, None, ""):
        refused(lambda name=name: detector.save(name), f"save({name!r})")
        refused(lambda name=name: detector.export(name), f"export({name!r})")
    for name in ("x.pth", "x"):
        refused(lambda name=name: detector.export(tmp_path / name), name, ".onnx")
    assert not list(tmp_path.glob("x*"))


def test_a_detector_trains_its_own_size(detector):
    refused(lambda: detector.train("data", 1, size="nano"), "size='nano'", "tiny")


def test_a_photograph_of_a_telephone_is_turned_as_its_file_is(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as image:
        assert torch.equal(detr.as_tensor(image), detr.as_tensor(tmp_path / "phone.png"))
        assert detr.as_tensor(image).shape[-2:] == image.size


def test_save_and_load_again(mask_detector, tmp_path):
    mask_detector.save(tmp_path / "again.pth")
    loaded = torch.load(tmp_path / "again.pth")  # plain
    assert loaded["class_names"] == ["cells", "blood_vessel", "glomerulus"] and loaded["args"]["mask_head"] == "nano"
    again = Tiny.from_checkpoint(tmp_path / "again.pth", device="cpu")
    assert again.class_rows == mask_detector.class_rows
    one, other = (d.predict(picture(), threshold=0.3) for d in (mask_detector, again))
    assert np.array_equal(one.scores, other.scores) and np.array_equal(one.masks, other.masks)


# ---- training ------------------------------------------------------------------------------------------------

def test_train_is_stage_1_with_the_constants_in_small_letters(detector, checkpoint_file, tmp_path, monkeypatch):
    calls = []

    def fake_main(**constants):
        calls.append(constants)
        torch.save(content_of(rows=3, class_rows={"cat": 0, "dog": 1}), tmp_path / "best.pth")
        return {"run_dir": str(tmp_path), "checkpoint": str(tmp_path / "best.pth"), "best_score": 0.5}

    monkeypatch.setattr(train_detector_stage1, "main", fake_main)
    result = detector.train(dataset_dir=tmp_path / "data", epochs=2, batch=3, multi_scale=False)
    assert result["best_score"] == 0.5
    assert calls[0] == {"SIZE": "tiny", "RESOLUTION": 160, "PRETRAIN_WEIGHTS": str(checkpoint_file),
                        "DATASET_DIR": str(tmp_path / "data"), "EPOCHS": 2, "BATCH": 3, "MULTI_SCALE": False}
    assert detector.class_names == ["cat", "dog"] and not detector.model.training  # goes on with the best weights
    assert set(detector.predict(picture(), threshold=0.0).class_names) <= {"cat", "dog"}
    detector.train(dataset_dir=tmp_path / "data", epochs=1)
    assert calls[1]["PRETRAIN_WEIGHTS"] == str(tmp_path / "best.pth")


def write_dataset(root):
    """Roboflow layout: four training and two validation images, one box each."""
    for split, count in (("train", 4), ("valid", 2)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            picture(seed=i).save(root / split / f"{i}.jpg")
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 120, "height": 90} for i in range(count)],
            "annotations": [{"id": i + 1, "image_id": i, "category_id": 1 + i % 2, "bbox": [20, 10, 60, 50],
                             "area": 3000, "iscrowd": 0} for i in range(count)],
            "categories": [{"id": 1, "name": "cells"}, {"id": 2, "name": "tubule"}]}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_train_for_real(detector, tmp_path):
    result = detector.train(dataset_dir=write_dataset(tmp_path / "data"), epochs=1, batch=2, accum=1, workers=0,
                            multi_scale=False, warmup_steps=0, runs_dir=str(tmp_path / "runs"))
    assert (tmp_path / "runs" / "detector_tiny_160_1" / "checkpoint_best_regular.pth").is_file()
    assert Path(result["run_dir"]).name == "detector_tiny_160_1" and len(result["history"]) == 1
    # of the four rows: "cells" stays on the one that it had, "tubule" takes a free one
    assert detector.class_names[0] == "cells" and set(detector.class_names) == {"cells", "tubule"}
    assert detector.model.model_args["num_rows"] == 4
    assert set(detector.predict(picture(), threshold=0.0).class_names) <= {"cells", "tubule"}


# ---- export --------------------------------------------------------------------------------------------------

def test_export_answers_as_pytorch_does(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    fewer = {"blocks": 2, "stages": (1, 2), "decoder_layers": 1}  # the exporter's time grows with the layers
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | fewer)
    torch.save(content_of("nano"), tmp_path / "masks.pth")
    mask_detector = Tiny(tmp_path / "masks.pth", device="cpu")
    difference = mask_detector.export(tmp_path / "model.onnx")
    assert difference < 1e-3 and [path.name for path in tmp_path.glob("*.onnx*")] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("logits", [1, 60, 4]), ("boxes", [1, 60, 4]), ("mask_logits", [1, 60, 40, 40])]
    images = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(9))
    logits, boxes, _ = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = mask_detector.model(images)
    np.testing.assert_allclose(np.sort(logits, 1), expected["logits"].sort(1).values, atol=1e-3)
    np.testing.assert_allclose(np.sort(boxes, 1), expected["boxes"].sort(1).values, atol=1e-3)


def test_export_refuses(detector, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="opset = 17.*18"):
        detector.export(tmp_path / "a.onnx", opset=17)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install -r requirements-export.txt"):
        detector.export(tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_an_export_that_cannot_be_is_refused_before_the_work(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(detr.onnx_file, "export_program", lambda *_: pytest.fail("exported first"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "best.pth").write_text("weights")
    for path in (tmp_path / "folder", tmp_path / "best.pth"):
        refused(lambda path=path: detector.export(path), path.name)
    for batch_size in (0, -1, 1.5, "1"):
        refused(lambda batch_size=batch_size: detector.export(tmp_path / "a.onnx", batch_size=batch_size), "batch_size")
    for opset in ("18", 18.5, 1):
        refused(lambda opset=opset: detr.onnx_file.require_opset(opset, "opset"), f"opset = {opset!r}")
    assert (tmp_path / "best.pth").read_text() == "weights"


@pytest.mark.parametrize("culprit", ["require_writable", "Deployable.forward", "export"])
def test_a_failed_export_leaves_the_model_on_its_device_and_no_file(detector, tmp_path, monkeypatch, culprit):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)

    def fail(*args, **kwargs):
        raise UserError("on purpose")

    moves, model = [], detector.model  # there is one device: what counts is that the last move is back to it
    monkeypatch.setattr(detr.Deployable, "cpu", lambda self: moves.append("away") or self)
    monkeypatch.setattr(model, "to", lambda device: moves.append(device) or model)
    if culprit == "require_writable":
        monkeypatch.setattr(detr.checkpoint, "require_writable", fail)
    elif culprit == "export":
        monkeypatch.setattr(torch.export, "export", fail)
    else:
        monkeypatch.setattr(detr.Deployable, "forward", fail)
    with pytest.raises(UserError, match="on purpose"):
        detector.export(tmp_path / "model.onnx")
    assert moves == ([] if culprit == "require_writable" else ["away", torch.device("cpu")])
    assert list(tmp_path.glob("*onnx*")) == list(tmp_path.glob(".*onnx*")) == []
