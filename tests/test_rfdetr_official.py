"""Roboflow's segmentation checkpoints: --seg_head official, sizes seg_nano to seg_2xlarge, files of their form."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import rfdetr_fill
import torch
from rfdetr_data import CLASSES, write_dataset

import shrink_head
import train_detector_stage1
import train_seg_single_stage
from rfdetr import config, detr, evaluate, masks, names, start, weights
from rfdetr.model import RFDETR
from utils.config import UserError

# parameters with all groups, resolution, queries: counted in and read from rfdetr 1.11.2
SIZES = {"seg_nano": (33_577_475, 312, 100), "seg_small": (33_711_107, 384, 100), "seg_medium": (35_694_259, 432, 200),
         "seg_large": (35_873_971, 504, 200), "seg_xlarge": (38_113_635, 624, 300),
         "seg_2xlarge": (38_648_163, 768, 300), "seg_preview": (34_153_555, 432, 200)}
SMALL = {"SIZE": "tiny", "RESOLUTION": 64, "EPOCHS": 1, "BATCH": 4, "ACCUM": 1, "WORKERS": 0, "MULTI_SCALE": False,
         "WARMUP_STEPS": 1}


def theirs(state):
    """A state dict of ours by the names of Roboflow's package, with the empty buffer that it writes."""
    return {"_kp_active_mask": torch.zeros(0, 0, dtype=torch.bool)} | {
        name.replace("mask_head.", "segmentation_head.", 1): value
        for name, value in names.published_file(state).items()}


def write_theirs(model, path, fill=False):
    """A checkpoint in the published form: {"model", "args": Namespace}, perhaps filled by names. -> path"""
    state = theirs(model.state_dict())
    if fill:
        state = {name: rfdetr_fill.fill_tensor(name, value.shape) if value.numel() else value
                 for name, value in state.items()}
    torch.save({"model": state, "args": argparse.Namespace(resolution=model.model_args["resolution"], lr=1e-4)}, path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny model with the official head, as a file of their form with COCO's 91 rows. -> (model, path)"""
    torch.manual_seed(1)
    model = RFDETR("tiny", 91, 64, mask_head="official").eval()
    torch.nn.init.normal_(model.mask_head.bias)
    return model, write_theirs(model, tmp_path_factory.mktemp("theirs") / "seg_tiny.pt")


@pytest.mark.parametrize("size", SIZES)
def test_names_shapes_and_numbers_of_parameters_are_the_published_ones(size):
    with torch.device("meta"):
        model = RFDETR(size, 91, mask_head="official")
    state = theirs(model.state_dict())
    del state["_kp_active_mask"]
    expected = json.loads((rfdetr_fill.DATA / "published_names.json").read_text(encoding="utf-8"))[size]
    text = "\n".join(sorted(f"{name} {list(value.shape)}" for name, value in state.items()))
    assert len(state) == expected["tensors"] and hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]
    assert (model.count_parameters()[0], model.model_args["resolution"], model.detector.config.num_queries) \
        == SIZES[size]
    assert size in config.PUBLISHED and weights.size_of(names.with_our_heads(state), "file") == size


def test_a_file_of_the_published_form_gives_the_published_packages_outputs(tmp_path):
    """reference_seg_nano.npz: logits, boxes and masks of a few queries, from rfdetr 1.11.2 with filled weights."""
    with torch.device("meta"):
        shapes = RFDETR("seg_nano", 91, mask_head="official")
    path = write_theirs(shapes, tmp_path / "rf-detr-seg-nano.pt", fill=True)
    found = detr.RFDETRSegNano(str(path), device="cpu")
    assert found.model.model_args["mask_head"] == "official" and found.class_rows == config.COCO_ROWS
    pixels = rfdetr_fill.fill_input(1, 312)
    with torch.no_grad():
        outputs = found.model(pixels * found.model.std + found.model.mean)
        logits = masks.every_mask(outputs)[0]
    reference = {key: torch.from_numpy(value) for key, value in
                 np.load(rfdetr_fill.DATA / "reference_seg_nano.npz").items()}
    query = reference["queries"]
    for key in ("logits", "boxes"):
        assert (outputs[key][0, query] - reference[key]).abs().max() < 1e-4
    assert logits.shape == (100, 78, 78) and reference["masks"].abs().max() > 20
    difference = (logits[query][:, ::6, ::6] - reference["masks"]).abs().max()
    assert difference < 1e-5 * reference["masks"].abs().max()


def test_official_masks_are_not_confined_to_boxes(tiny):
    model, _ = tiny
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        outputs = model(images)
        found = evaluate.predict_batch(model, images, [(64, 64)])[0]
        exported = detr.Deployable(model)(images)[2]
    assert torch.allclose(found["mask_logits"], masks.every_mask(outputs)[0, found["queries"]], atol=1e-5)
    assert torch.allclose(exported, masks.every_mask(outputs))


def test_every_parameter_of_the_official_head_learns_and_none_of_the_image():
    torch.manual_seed(0)
    model = RFDETR("tiny", 4, 64, mask_head="official").train()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    features, queries = torch.rand(2, 128, 8, 8), torch.rand(2, 5, 128)
    pixels, embedded = model.mask_head(features, images, queries, torch.rand(2, 5, 4))
    assert pixels.shape == (2, 129, 16, 16) and embedded.shape == (2, 5, 129)
    (embedded @ pixels.flatten(2)).sigmoid().sum().backward()
    assert not [name for name, p in model.mask_head.named_parameters() if p.grad is None or not p.grad.any()]
    assert images.grad is None


# ---- training, files ----------------------------------------------------------------------------------------------

def test_an_official_checkpoint_is_fine_tuned_evaluated_shrunk_and_written_back(tiny, tmp_path):
    model, path = tiny
    data = str(write_dataset(tmp_path / "dataset", counts={"train": 4, "valid": 2}))
    result = train_seg_single_stage.main(**SMALL, DATASET_DIR=data, RUNS_DIR=str(tmp_path), SEG_HEAD="official",
                                         PRETRAIN_WEIGHTS=str(path))
    assert result["valid"]["mask/mAP"] >= 0
    best = Path(result["run_dir"]) / "best.pt"
    loaded, info = weights.load_detector(best)
    assert info["args"]["mask_head"] == "official" and info["args"]["num_rows"] == 91
    assert set(info["class_rows"]) == set(CLASSES)
    before, after = model.mask_head.state_dict(), loaded.mask_head.state_dict()
    assert all(not torch.equal(before[name], value) for name, value in after.items())  # trained ...
    assert all((before[name] - value).abs().max() < 0.1 for name, value in after.items())  # ... from the file's
    shrink_head.main(IN_CKPT=str(best), OUT_CKPT=str(tmp_path / "small.pth"), KEEP=list(CLASSES))
    shrunk, _ = weights.load_detector(tmp_path / "small.pth")
    assert shrunk.model_args["mask_head"] == "official" and shrunk.model_args["num_rows"] == len(CLASSES) + 1
    back = torch.load(weights.export_roboflow(best, tmp_path / "back.pth"))["model"]
    assert back.keys() == theirs(model.state_dict()).keys() - {"_kp_active_mask"}


def test_wrong_combinations_are_one_line(tiny, tmp_path, capsys):
    _, path = tiny
    source = weights.read(path)

    def refused(message, *args):
        with pytest.raises(UserError, match=message) as caught:
            start.with_weights(*args)
        assert "\n" not in str(caught.value)

    refused("holds a mask head of the kind 'official'.*--seg_head official", source, "tiny", ["a"], 64, "ours")
    torch.manual_seed(0)
    ours = {"model": RFDETR("tiny", 91, 64, mask_head="nano").state_dict()}
    refused("holds a mask head of the kind 'nano'.*--seg_head ours", weights.read(ours), "tiny", ["a"], 64, "official")
    with torch.device("meta"):
        other = RFDETR("seg_small", 91, mask_head="official")
    other = weights.read({"model": {name: torch.empty(value.shape)
                                    for name, value in theirs(other.state_dict()).items()}})
    refused("--size nano, but .* of size seg_small", other, "nano", ["a"], 384, "official")
    capsys.readouterr()
    start.with_weights(other, "seg_nano", ["a"], 312, None)  # the same shapes, but the patches of another image
    assert "--size seg_small" in capsys.readouterr().out
    start.with_weights(other, "seg_small", ["a"], 384, None)
    assert "--size" not in capsys.readouterr().out
    refused("--size seg_medium, but .* of size seg_small", other, "seg_medium", ["a"], 432, "official")
    with pytest.raises(UserError, match="--seg_head theirs: choose one of ours, official"):
        train_seg_single_stage.main(**SMALL, SEG_HEAD="theirs", PRETRAIN_WEIGHTS="none")
    anew = start.with_weights(source, "tiny", ["a"], 64, "ours", ("mask_head.*",))
    assert anew.model.model_args["mask_head"] == "nano"
    assert set(anew.loaded["left_out"]) == {f"mask_head.{name}" for name in anew.model.mask_head.state_dict()}
    assert start.with_weights(source, "tiny", ["a"], 64).model.mask_head is None  # stage 1 takes the detector alone


def test_a_new_segmentation_model_has_masks_and_train_says_that_it_loses_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detr.RFDETRSegNano, "size", "tiny")  # 1.8 million parameters instead of 34
    model = detr.RFDETRSegNano(None, num_classes=2, device="cpu")
    assert model.model.model_args["mask_head"] == "official"
    assert model.predict(np.zeros((40, 60, 3), np.uint8), threshold=0.0).masks.shape[1:] == (40, 60)
    assert detr.RFDETRNano.masks is False
    monkeypatch.setattr(train_detector_stage1, "main", lambda **constants: {"checkpoint": str(tmp_path / "none")})
    model.train(tmp_path, 1)
    assert "mask head" in capsys.readouterr().out


@pytest.mark.parametrize("head, words", [
    ("official", ("train_seg_single_stage.py", "--seg_head official", "--pretrain_weights b.pth")),
    (None, ("train_seg_stage2.py", "--checkpoint b.pth"))])
def test_a_shrunk_file_goes_on_with_the_training_that_takes_its_head(head, words):
    line = shrink_head.next_command({"size": "seg_nano", "mask_head": head}, Path("runs/a.pth"), Path("b.pth"),
                                    {"DATASET_DIR": "data"})
    assert all(word in line for word in (*words, "--dataset_dir data"))
