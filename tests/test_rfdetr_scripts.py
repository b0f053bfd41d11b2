"""The RF-DETR scripts end to end on eight images: stage 1, shrink, stage 2, cache, single stage, resume, two ranks."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Killed, dies_after
from rfdetr_data import CLASSES, write_dataset
from script_processes import on_two_processes, under_torchrun

import shrink_head
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
from rfdetr import criterion, features, start, weights
from rfdetr import main as training
from utils import checkpoint, config, datasets, freeze
from utils.config import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"SIZE": "tiny", "RESOLUTION": 64, "EPOCHS": 1, "BATCH": 4, "ACCUM": 1, "WORKERS": 0, "MULTI_SCALE": False,
         "WARMUP_STEPS": 1}
STAGE1 = SMALL | {"PRETRAIN_WEIGHTS": "none"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return str(write_dataset(tmp_path_factory.mktemp("rfdetr") / "dataset"))


@pytest.fixture(scope="module")
def stage1(dataset, tmp_path_factory):
    """A finished run of stage 1 from scratch, and what it printed nothing of."""
    return train_detector_stage1.main(**STAGE1, DATASET_DIR=dataset, RUN_TEST=True,
                                      RUNS_DIR=str(tmp_path_factory.mktemp("runs")))


class Counted:
    """How often each file is read through checkpoint.load, and how many RFDETRs are built."""

    def __init__(self, monkeypatch):
        self.read, self.contents, self.built = Counter(), {}, 0
        load, init = checkpoint.load, weights.RFDETR.__init__

        def counted_load(path, *args):
            name = Path(path).name
            self.read[name] += 1
            self.contents[name] = load(path, *args)
            return self.contents[name]

        def counted_init(model, *args, **kwargs):
            self.built += 1
            init(model, *args, **kwargs)

        monkeypatch.setattr(checkpoint, "load", counted_load)
        monkeypatch.setattr(weights.RFDETR, "__init__", counted_init)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- stage 1 ---------------------------------------------------------------------------------------------------

def test_stage1_writes_its_files(stage1):
    folder = Path(stage1["run_dir"])
    assert folder.name == "detector_tiny_64_1"
    names = {path.name for path in folder.iterdir()}
    assert {"best.pt", "last.pt", "checkpoint.pt", "checkpoint_best_regular.pth", "metrics.json", "results.json", "tb",
            "curves.png", "predictions.png"} <= names
    for name in ("best.pt", "last.pt", "checkpoint.pt", "checkpoint_best_regular.pth"):
        content = torch.load(folder / name)
        assert content["model"]["class_embed.0.weight"].shape[0] == len(CLASSES) + 1, name
        assert content["class_names"] == list(CLASSES) and content["args"]["size"] == "tiny"
        assert content["class_rows"] == {name: i for i, name in enumerate(CLASSES)}
    assert stage1["test"]["box/mAP"] >= 0 and "mask/mAP" not in stage1["valid"]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {row["class"] for row in results["results"]["valid"]["per_class"]} == set(CLASSES)
    details = results["results"]["details"]["test"]["RF-DETR, box"]
    assert details["mAP"] == pytest.approx(stage1["test"]["box/mAP"]) and (folder / "report.html").is_file()


def test_a_new_run_gets_a_new_folder(tmp_path):
    for name in ("detector_nano_384_2", "detector_nano_384_10", "detector_nano_384_x", "detector_nano_3840_77"):
        (tmp_path / name).mkdir()
    for number in (11, 12):  # the second one starts before the first has written anything
        assert training.new_folder(tmp_path, "detector_nano_384").name == f"detector_nano_384_{number}"
    assert training.new_folder(tmp_path / "none_yet", "detector_nano_384").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to .*file/runs"):
        training.new_folder(tmp_path / "file" / "runs", "detector_nano_384")


def test_stage1_resumes_bit_for_bit_with_its_own_constants(dataset, tmp_path, monkeypatch):
    settings = STAGE1 | {"DATASET_DIR": dataset, "EPOCHS": 2, "CHECKPOINT_STEPS": 1, "MULTI_SCALE": True}
    whole = train_detector_stage1.main(**settings, RUNS_DIR=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_detector_stage1, "compute_losses", dies_after(3, train_detector_stage1.compute_losses))
        train_detector_stage1.main(**settings, RUNS_DIR=str(tmp_path / "killed"))
    with pytest.raises(UserError, match="run of another script"):
        train_seg_stage2.main(RESUME=str(tmp_path / "killed" / "detector_tiny_64_1"))
    with monkeypatch.context() as patch:
        patch.setattr(weights, "load_pretrained", None)  # nothing but last.pt is asked for
        resumed = train_detector_stage1.main(RESUME="last", RUNS_DIR=str(tmp_path / "killed"))
    assert Path(resumed["run_dir"]).name == "detector_tiny_64_1"
    first, second = (torch.load(Path(run["run_dir"]) / "last.pt") for run in (whole, resumed))
    assert first["epoch"] == second["epoch"] == 2 and same(first["model"], second["model"])
    assert all(torch.equal(a, b) for a, b in zip(first["average"], second["average"], strict=True))


def test_training_lowers_the_loss(dataset):
    """The script's loss and parameter groups on one batch."""
    torch.manual_seed(0)
    cfg = config.resolve(vars(train_detector_stage1), STAGE1 | {"DATASET_DIR": dataset})
    model, _, rows, *_ = start.new_detector(cfg, None, list(CLASSES), 64)
    loader = training.training_loader(cfg, training.open_dataset(cfg, "train", rows, 64), "tiny", 64)
    batch = datasets.to_device(next(iter(loader)), "cpu")
    optimizer = torch.optim.AdamW(training.parameter_groups(model.train(), 5e-4, 5e-4, 1.0, 0.0))
    weight_of, totals = criterion.SUMMED_WEIGHTS, []
    for _ in range(12):
        losses = train_detector_stage1.compute_losses(model, batch)
        total = sum(weight * losses[name] for name, weight in weight_of.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.95 * totals[0]


def test_layers_of_the_backbone_train_at_their_own_rates():
    model = weights.RFDETR("tiny", 4)
    groups = training.parameter_groups(model, lr=1e-4, backbone_lr=1e-3, layer_decay=0.5, weight_decay=1e-2)
    other = training.parameter_groups(model, lr=2e-3, backbone_lr=2e-3, layer_decay=1.0, weight_decay=0.0)
    shapes = [[[p.shape for p in group["params"]] for group in some] for some in (groups, other)]
    assert shapes[0] == shapes[1]  # another rate can resume
    names = {id(p): name for name, p in model.named_parameters()}
    rate = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rate) == {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = {int(name.split("encoder.layer.")[1].split(".")[0]): value[0] for name, value in rate.items()
              if "encoder.layer." in name}
    assert blocks == pytest.approx({i: 1e-3 * 0.5 ** (5 - i) for i in range(6)})
    assert rate["detector.model.backbone.backbone.embeddings.patch_embeddings.projection.weight"][0] == (
        pytest.approx(1e-3 * 0.5**6))
    assert rate["detector.model.backbone.backbone.embeddings.position_embeddings"][1] == 0
    assert rate["detector.model.query_feat.weight"] == (1e-4, 0.0)
    assert rate["detector.class_embed.weight"] == (1e-4, 1e-2) and rate["detector.class_embed.bias"] == (1e-4, 0.0)
    assert all(decay == 0 for name, (_, decay) in rate.items() if name.endswith("bias") or "norm" in name)


def test_next_command_can_be_pasted(stage1, tmp_path, dataset, capsys):
    """Stage 1 from 91 rows prints the shrink command; its words, run as they are, give a head of N + 1 rows."""
    torch.manual_seed(0)
    coco = weights.RFDETR("tiny", 91, 64)
    checkpoint.save(weights.checkpoint_content(coco, ["person"], {"person": 1, "car": 3}), tmp_path / "start.pth")
    result = train_detector_stage1.main(**SMALL | {"PRETRAIN_WEIGHTS": str(tmp_path / "start.pth")},
                                        DATASET_DIR=dataset, RUNS_DIR=str(tmp_path))
    text = capsys.readouterr().out
    assert "STAGE 1: DETECTOR TRAINING" in text and "Model Size:" in text and text.isascii()
    assert torch.load(result["checkpoint"])["model"]["class_embed.0.weight"].shape[0] == 91
    line = next(line for line in text.splitlines() if "shrink_head.py" in line)
    words = line.split()[2:]
    flags = {"--in_ckpt": words[1], "--out_ckpt": words[3]}
    kept = tuple(word.strip('"') for word in words[words.index("--keep") + 1:])
    assert kept == CLASSES and list(flags) == [words[0], words[2]]
    shrink_head.main(IN_CKPT=flags["--in_ckpt"], OUT_CKPT=flags["--out_ckpt"], KEEP=kept)
    assert torch.load(flags["--out_ckpt"])["model"]["class_embed.0.weight"].shape[0] == 4


@pytest.mark.parametrize(("changes", "message"), [
    ({"SIZE": "huge"}, "size 'huge': choose one of nano"),
    ({"RESOLUTION": 100}, "--resolution 100: size tiny needs a multiple of 16"),
    ({"DATASET_DIR": "nowhere"}, "nowhere does not exist"),
    ({"PRETRAIN_WEIGHTS": "missing.pth"}, "weight file missing.pth does not exist"),
    ({"RESUME": "nowhere"}, "--resume nowhere does not exist: .*last.pt"),
    ({"LR": -1.0}, "^--lr -1.0: .* not negative"),
    ({"EPOCHS": 0}, "--epochs 0: choose 1 or more"),
    ({"BATCH": -1}, r"--batch -1: choose 0 \(the most that fit\) or more"),
    ({"WORKERS": -1}, "--workers -1: choose 0 or more"),
    ({"EMA_DECAY": 1.0}, "--ema_decay 1.0"),
    ({"LAYER_DECAY": -1.0}, "--layer_decay -1.0"),
    ({"AUGMENTATION": "strong"}, "--augmentation strong: choose full or mirror"),
])
def test_stage1_errors_are_one_line(dataset, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train_detector_stage1.main(**STAGE1 | {"DATASET_DIR": dataset, "RUNS_DIR": str(tmp_path)} | changes)
    assert "\n" not in str(error.value)


# ---- stage 2 ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cached", [False, True])
def test_stage2_trains_masks_and_leaves_the_detector_alone(stage1, dataset, tmp_path, capsys, cached):
    result = train_seg_stage2.main(
        **SMALL | {"EPOCHS": 2, "SEG_LR": 1e-3}, DATASET_DIR=dataset, RUNS_DIR=str(tmp_path), RUN_TEST=True,
        STAGE1_RUN=stage1["run_dir"], CHECKPOINT=stage1["checkpoint"], CACHE_FEATURES=cached)
    text = capsys.readouterr().out
    for part in ("STAGE 2: SEGMENTATION HEAD TRAINING", "[ok] Found Stage-1 checkpoint",
                 "[ok] Validated: 10/10 sample annotations contain segmentation masks", "[ok] Detector frozen:",
                 "(MaskHeadNano)"):
        assert part in text, part
    folder = Path(result["run_dir"])
    assert folder.name == "segmentation_tiny_64_1"
    assert {"best.pt", "last.pt", "stage2_config.json", "metrics.json", "tb", "predictions.png"} <= {
        path.name for path in folder.iterdir()}
    before = torch.load(stage1["checkpoint"])["model"]
    after = torch.load(folder / "best.pt")["model"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(name.startswith("mask_head.") for name in after)
    for split in ("valid", "test"):  # the same boxes, to the last digit
        for name in ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"):
            assert result[split][f"box/{name}"] == stage1[split][f"box/{name}"], (split, name)
        assert 0 <= result[split]["mask/mAP"] <= 1
    assert json.loads((folder / "stage2_config.json").read_text(encoding="utf-8"))["CLASS_NAMES"] == list(CLASSES)
    assert "stage2_config.json" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["files"]


def test_stage2_resumes_bit_for_bit(stage1, dataset, tmp_path, monkeypatch):
    settings = SMALL | {"EPOCHS": 2, "DATASET_DIR": dataset, "CHECKPOINT": stage1["checkpoint"], "CHECKPOINT_STEPS": 1,
                        "CACHE_FEATURES": True, "CACHE_DIR": str(tmp_path / "cache")}
    whole = train_seg_stage2.main(**settings, RUNS_DIR=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_seg_stage2, "compute_losses", dies_after(3, train_seg_stage2.compute_losses))
        train_seg_stage2.main(**settings, RUNS_DIR=str(tmp_path / "killed"))
    resumed = train_seg_stage2.main(RESUME=str(tmp_path / "killed" / "segmentation_tiny_64_1"))
    first, second = (torch.load(Path(run["run_dir"]) / "last.pt")["model"] for run in (whole, resumed))
    assert same(first, second)


def test_cached_features_give_the_losses_of_the_detector(stage1, dataset, tmp_path):
    cfg = config.resolve(vars(train_seg_stage2), SMALL | {
        "DATASET_DIR": dataset, "CHECKPOINT": stage1["checkpoint"], "CACHE_DIR": str(tmp_path)})
    model, _, rows, resolution, _ = start.frozen_detector_with_masks(
        cfg, None, Path(stage1["checkpoint"]), list(CLASSES))
    data = training.open_dataset(cfg, "train", rows, resolution, with_masks=True)
    loader = training.cached_loader(cfg, model, data, resolution)
    files = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 * len(data)
    seen = set()
    for epoch in range(4):
        for index in range(len(data)):
            sample = loader.dataset[(epoch, index)]
            direct = loader.collate_fn([sample])
            images = direct["images"].float() / 255
            with torch.no_grad():
                fresh = model.eval()(images)
                cached = model(images, cached=features.stacked(direct["labels"]))
            (query, target), = criterion.match(fresh["logits"], fresh["boxes"], direct["labels"])
            assert torch.equal(target.sort().values, torch.arange(len(sample["labels"])))
            wanted = fresh["query_embedding"][0, query[target.argsort()]]
            torch.testing.assert_close(cached["query_embedding"][0], wanted, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(cached["pixel_embedding"], fresh["pixel_embedding"], atol=3e-2, rtol=3e-2)
            seen.add((index, tuple(sample["image"].flatten()[:50].tolist())))
    assert len(seen) > len(data)  # mirror images too
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    training.cached_loader(cfg, model, data, resolution)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}  # nothing twice


def test_a_remembered_detector_runs_once_and_its_masks_stay_those_of_the_head():
    torch.manual_seed(0)
    model = weights.RFDETR("tiny", 4, 64, mask_head="nano").eval()
    batches, calls = torch.rand(2, 3, 3, 64, 64), []
    model.detector.register_forward_hook(lambda *_: calls.append(1))
    batch_bytes = sum(model(batches[0])[name].nbytes for name in ("logits", "boxes", "queries", "features"))
    calls.clear()
    with torch.no_grad():
        for limit, expected in ((10 * batch_bytes, [1, 2, 2, 2, 2, 2]), (batch_bytes, [1, 2, 2, 3, 3, 4]),
                                (0, [1, 2, 3, 4, 5, 6])):
            remembered, counts = features.Remembered(model, limit), []
            assert remembered.mask_head is model.mask_head
            for _ in range(3):
                for images in batches:
                    found, before = remembered(images), len(calls)
                    direct = model(images)
                    del calls[before:]
                    counts.append(len(calls))
                    assert all(torch.equal(found[name], direct[name]) for name in
                               ("logits", "boxes", "queries", "features", "pixel_embedding", "query_embedding"))
                for parameter in model.mask_head.parameters():
                    parameter.add_(0.01)  # the head learns meanwhile
            assert counts == expected, limit
            calls.clear()
            features.Remembered(model, limit).see([{"images": (255 * images).byte(), "sizes": [(64, 64)] * 3}
                                                   for images in (batches[0], batches[1], batches[0])])
            assert len(calls) == {10 * batch_bytes: 2, batch_bytes: 2, 0: 1}[limit]  # and no more once it is full
            calls.clear()


def test_stage2_with_cached_features_validates_with_one_pass_of_the_detector(stage1, dataset, tmp_path, monkeypatch):
    """And scores what a validation without memory scores, in every epoch."""
    settings = SMALL | {"EPOCHS": 2, "SEG_LR": 1e-2, "DATASET_DIR": dataset, "CHECKPOINT": stage1["checkpoint"],
                        "CACHE_FEATURES": True, "CACHE_DIR": str(tmp_path / "cache")}
    remembering, asked = features.Remembered.__call__, []

    def compared(self, images):
        found = remembering(self, images)
        asked.append(len(self.kept))
        direct = self.model(images)
        assert all(torch.equal(found[name], direct[name]) for name in ("logits", "boxes", "query_embedding"))
        return found

    monkeypatch.setattr(features.Remembered, "__call__", compared)
    result = train_seg_stage2.main(**settings, RUNS_DIR=str(tmp_path))
    assert asked == [1, 1, 1]  # four validation images are one batch, kept before the first of two epochs
    assert result["history"][-1]["box/mAP"] == result["history"][0]["box/mAP"]


def test_a_head_that_was_not_shrunk_is_refused_with_the_command(stage1, dataset, tmp_path):
    model = weights.RFDETR("tiny", 91, 64)
    checkpoint.save(weights.checkpoint_content(model, list(CLASSES), dict(zip(CLASSES, (5, 6, 7), strict=True))),
                    tmp_path / "best.pt")
    with pytest.raises(UserError) as error:
        train_seg_stage2.main(**SMALL, DATASET_DIR=dataset, RUNS_DIR=str(tmp_path / "runs"), STAGE1_RUN=str(tmp_path))
    text = str(error.value)
    assert "Frozen detector head out_dim (91) != requested (4)" in text
    assert ('python shrink_head.py --in_ckpt ' + (tmp_path / "best.pt").as_posix()) in text
    assert '--keep "cells" "blood_vessel" "glomerulus"' in text


def test_stage2_errors(stage1, dataset, tmp_path):
    common = SMALL | {"DATASET_DIR": dataset, "RUNS_DIR": str(tmp_path / "runs")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No checkpoint found in Stage-1 directory"):
        train_seg_stage2.main(**common, STAGE1_RUN=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="which detector"):
        train_seg_stage2.main(**common)
    with pytest.raises(UserError, match="does not exist: give the file that shrink_head.py wrote"):
        train_seg_stage2.main(**common, CHECKPOINT="gone.pth")
    with pytest.raises(UserError, match="holds a detector of size tiny"):
        train_seg_stage2.main(**common | {"SIZE": "nano"}, CHECKPOINT=stage1["checkpoint"])
    boxes_only = write_dataset(tmp_path / "boxes", masks=False)
    with pytest.raises(UserError, match="No segmentation masks found in COCO annotations"):
        train_seg_stage2.main(**common | {"DATASET_DIR": str(boxes_only)}, CHECKPOINT=stage1["checkpoint"])


# ---- nothing is read or built twice ------------------------------------------------------------------------------

@pytest.mark.parametrize(("script", "source"), [
    (train_detector_stage1, "PRETRAIN_WEIGHTS"), (train_seg_stage2, "CHECKPOINT"),
    (train_seg_single_stage, "PRETRAIN_WEIGHTS")])
def test_a_run_reads_every_checkpoint_and_builds_its_model_once(stage1, dataset, tmp_path, monkeypatch, script, source):
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        first = script.main(**SMALL | {source: stage1["checkpoint"]}, DATASET_DIR=dataset, RUNS_DIR=str(tmp_path))
    # best.pt is the run's own, read for the final evaluation
    assert counted.read == {"checkpoint_best_regular.pth": 1, "best.pt": 1} and counted.built == 1
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        second = script.main(RESUME=first["run_dir"], EPOCHS=2)
    assert counted.read == {"last.pt": 1, "best.pt": 1} and counted.built == 1
    assert counted.contents["last.pt"] == {}  # not kept in memory while the run goes on
    assert [record["epoch"] for record in second["history"]] == [1, 2]


# ---- files of earlier releases -----------------------------------------------------------------------------------

# What train_detector_stage1.py of the first release wrote beside its tensors.
CONSTANTS = {
    "SIZE": "tiny", "RESOLUTION": 64, "PRETRAIN_WEIGHTS": "none", "PRETRAIN_EXCLUDE_KEYS": (), "MULTI_SCALE": False,
    "EXPANDED_SCALES": False, "AUGMENTATION": "full", "WORKERS": 0, "EPOCHS": 2, "BATCH": 4, "ACCUM": 1, "LR": 1e-4,
    "BACKBONE_LR": 1.5e-4, "LAYER_DECAY": 0.8, "WEIGHT_DECAY": 1e-4, "CLIP_NORM": 0.1, "WARMUP_STEPS": 1, "EMA": True,
    "EMA_DECAY": 0.993, "NO_AMP": False, "PATIENCE": 10, "SEED": 0, "RUN_TEST": False, "RESUME": "",
    "CHECKPOINT_STEPS": 200}


@pytest.fixture
def earlier(dataset, tmp_path):
    """-> folder with last.pt and best.pt of a run after its first epoch, written by hand, and its model."""
    torch.manual_seed(3)
    model = weights.RFDETR("tiny", 4, 64)
    args = {"size": "tiny", "num_rows": 4, "mask_head": None, "resolution": 64}
    groups = training.parameter_groups(model, 1e-4, 1.5e-4, 0.8, 1e-4)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    record = {"epoch": 1, "step": 2, "loss_ce": 1.0, "loss_bbox": 1.0, "loss_giou": 1.0, "loss_aux": 1.0,
              "class_error": 90.0, "loss": 9.0, "images_per_s": 1.0, "time": {"data": 1.0}, "box/mAP": 0.0}
    common = {
        "args": args, "class_names": list(CLASSES), "class_rows": {name: i for i, name in enumerate(CLASSES)},
        "model": {name: value.clone() for name, value in model.state_dict().items()}, "model_args": args,
        "constants": CONSTANTS | {"DATASET_DIR": dataset, "RUNS_DIR": str(tmp_path)}, "epoch": 1}
    folder = tmp_path / "detector_tiny_64_1"
    folder.mkdir()
    torch.save(common | {"metrics": record}, folder / "best.pt")
    torch.save(common | {
        "optimizer": optimizer.state_dict(), "average": [value.detach().clone() for value in trained], "batch": 0,
        "batches": 2, "step": 2, "bad_epochs": 0, "score": "box/mAP", "best_score": 0.0, "best_epoch": 1,
        "history": [record], "scaler": {}, "torch_rng": torch.get_rng_state(), "cuda_rng": [], "sums": {}},
        folder / "last.pt")
    return folder, model


def test_a_checkpoint_of_an_earlier_release_loads(earlier, dataset):
    folder, model = earlier
    for name in ("best.pt", "last.pt"):
        loaded, info = weights.load_detector(folder / name)
        assert same(loaded.state_dict(), model.state_dict())
        assert info["class_names"] == list(CLASSES) and weights.rows_of(folder / name)[0] == 4
    result = train_seg_stage2.main(**SMALL, DATASET_DIR=dataset, STAGE1_RUN=str(folder), RUNS_DIR=str(folder.parent))
    content = torch.load(Path(result["run_dir"]) / "last.pt")
    assert all(torch.equal(content["model"][name], value) for name, value in model.state_dict().items())


def test_a_run_of_an_earlier_release_resumes(earlier):
    folder, _ = earlier
    saved = torch.load(folder / "last.pt")
    result = train_detector_stage1.main(RESUME=str(folder))
    assert [record["epoch"] for record in result["history"]] == [1, 2] and result["history"][0] == saved["history"][0]
    content = torch.load(folder / "last.pt")
    assert content["step"] == 4 and content.keys() >= saved.keys()
    changed = [name for name, value in saved["model"].items() if not torch.equal(value, content["model"][name])]
    assert "class_embed.0.weight" in changed
    first = next(iter(content["optimizer"]["state"]))
    assert content["optimizer"]["state"][first]["step"] == saved["optimizer"]["state"][first]["step"] + 2


def test_a_last_pt_of_another_program_is_refused(tmp_path):
    checkpoint.save({"model": {}, "constants": {}}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt in it is not of this project"):
        train_detector_stage1.main(RESUME=str(tmp_path))


# ---- single stage, batches without objects, two processes --------------------------------------------------------

def test_single_stage_trains_everything(stage1, dataset, tmp_path):
    result = train_seg_single_stage.main(**SMALL | {"EPOCHS": 2}, DATASET_DIR=dataset, RUNS_DIR=str(tmp_path),
                                         PRETRAIN_WEIGHTS=stage1["checkpoint"])
    assert Path(result["run_dir"]).name == "single_stage_tiny_64_1"
    before, after = torch.load(stage1["checkpoint"])["model"], torch.load(Path(result["run_dir"]) / "last.pt")["model"]
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"class_embed", "bbox_embed", "transformer", "backbone"} <= changed
    assert result["valid"]["mask/mAP"] >= 0


def test_single_stage_hands_mask_crop_and_mask_cost_to_its_losses(dataset, tmp_path, monkeypatch):
    plain, given = train_seg_single_stage.compute_losses, []
    monkeypatch.setattr(train_seg_single_stage, "compute_losses",
                        lambda *args, **kwargs: given.append(kwargs) or plain(*args, **kwargs))
    common = STAGE1 | {"DATASET_DIR": dataset, "RUNS_DIR": str(tmp_path)}
    runs = [train_seg_single_stage.main(**common, **changes) for changes in ({}, {"MASK_CROP": True, "MASK_COST": 2})]
    assert given[0] == {"crop": False, "mask_cost": 0.0} and given[-1] == {"crop": True, "mask_cost": 2}
    losses = [run["history"][0]["loss_mask"] for run in runs]
    assert losses[0] != losses[1] and all(loss > 0 for loss in losses)


@pytest.mark.parametrize(("changes", "message"), [
    ({"MASK_COST": -1.0}, "^--mask_cost -1.0: choose a number that is not negative"),
    ({"MASK_COST": float("nan")}, "^--mask_cost nan: choose a number that is not negative"),
    ({"MASK_COST": "much"}, "MASK_COST"),
    ({"MASK_CROP": 2}, "MASK_CROP"),
    ({"MASK_CROP": True, "SEG_HEAD": "official"}, "^--mask_crop 1 needs --seg_head ours"),
])
def test_single_stage_errors_are_one_line(dataset, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train_seg_single_stage.main(**STAGE1 | {"DATASET_DIR": dataset, "RUNS_DIR": str(tmp_path)} | changes)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "masks_in_boxes"), [
    (train_seg_stage2, False), (train_seg_single_stage, False), (train_seg_single_stage, True)])
def test_a_batch_without_objects_has_finite_losses_and_gradients(script, masks_in_boxes):
    model = weights.RFDETR("tiny", 4, 64, mask_head="nano").train()
    if script is train_seg_stage2:
        freeze.freeze(model.detector)
    labels = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
               "masks": torch.zeros(0, 64, 64, dtype=torch.bool)} for _ in range(2)]
    settings = {"crop": True, "mask_cost": 1.0} if masks_in_boxes else {}
    losses = script.compute_losses(model, {"images": torch.rand(2, 3, 64, 64), "labels": labels}, **settings)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(value for value in losses.values() if value.requires_grad).backward()
    found = [p.grad for p in model.mask_head.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in found)


def test_two_processes_share_a_run(dataset, tmp_path):
    """torchrun on gloo: one folder, one history, the losses of both ranks."""
    printed = under_torchrun("train_detector_stage1", STAGE1 | {
        "BATCH": 2, "DATASET_DIR": dataset, "RUNS_DIR": tmp_path})
    assert [path.name for path in tmp_path.iterdir()] == ["detector_tiny_64_1"]
    history = json.loads((tmp_path / "detector_tiny_64_1" / "metrics.json").read_text(encoding="utf-8"))["history"]
    assert len(history) == 1 and history[0]["step"] == 2
    assert printed.count("STAGE 1: DETECTOR TRAINING") == 1


def test_two_processes_fill_one_cache_and_train_masks(stage1, dataset, tmp_path):
    """Stage 2 on two processes with cached features: every image is computed by somebody."""
    on_two_processes("train_seg_stage2", SMALL | {
        "RESOLUTION": 0, "BATCH": 2, "CACHE_FEATURES": True, "CHECKPOINT": stage1["checkpoint"], "DATASET_DIR": dataset,
        "RUNS_DIR": tmp_path})
    assert len(list((tmp_path / "feature_cache").rglob("*.safetensors"))) == 2 * 8
    assert (tmp_path / "segmentation_tiny_64_1" / "best.pt").is_file()
