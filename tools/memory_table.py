"""What fits on a GPU of 8, 12 or 16 GB: the memory of every training, counted without a GPU.

    python -m tools.memory_table

Every script runs up to its training loop, with the guides' settings, networks of the published sizes with random
weights, and a few drawn scenes at the guides' image sizes. utils/training/needs.py then counts the tensors of one step.
Prints the Markdown table of docs/gpu.md. Needs PyTorch's CUDA build (on Linux PyPI's), but no GPU.
"""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from unittest import mock

import utils.threads  # noqa: F401 (before torch)

import torch
from PIL import Image

import rfdetr.main
from rfdetr.config import COCO_ROWS
from tools import golden, stand_in_gpu
from utils import checkpoint, config, report
from utils.networks.rain_detector import RainDetector, save_rain_detector
from utils.networks.rtdetr import new_rtdetr
from utils.networks.spdnet import SPDNet
from utils.training import engine, needs

ONLY = ()                               # scripts, () for all
GPUS = (8, 12, 16)                      # GB of the GPUs in the table

DEMO = {"ONLY": ("train_unet_derain", "Training_RainDetector")}
_BF16, _KEPT = {"PRECISION": "bf16"}, {"ACTIVATION_CHECKPOINTING": False}
_PHASE2 = {"PHASE1_EPOCHS": 0}
ROWS = (  # script, constants that differ from its own
    ("Training_SPDNet_Adaptation", {}), ("Training_SPDNet_Adaptation", _BF16),
    ("Training_SPDNet_Adaptation", _KEPT), ("Training_SPDNet_Adaptation", _BF16 | _KEPT),
    ("Training_SPDNet", {}), ("Training_RTDETR", {}), ("Training_RTDETR", _BF16),
    ("Training_WeatherAdapter", {}), ("Training_WeatherAdapter", _BF16), ("Training_RainDetector", {}),
    ("Training_Conditional", {}), ("Training_Conditional", _BF16),
    ("Training_FeatureDerain", {}), ("Training_FeatureDerain", _BF16),
    ("Training_FeatureDerain", _PHASE2), ("Training_FeatureDerain", _PHASE2 | _BF16),
    ("train_unet_derain", {}), ("train_unet_derain", {"CROP_SIZES": ()}),
    ("train_unet_derain", {"CROP_SIZES": (), "IMAGE_SIZE": 512}), ("train_unet_derain", {"ARCH": "nafnet"}),
    *(("train_detector_stage1", {"SIZE": size}) for size in ("nano", "small", "medium")),
    ("train_seg_stage2", {}), ("train_seg_stage2", {"CACHE_FEATURES": True}), ("train_seg_single_stage", {}),
)
_FILES = {  # where `prepare` puts what every script reads, and what they write
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "DATASET_DIR": "./demo/dataset",
    "RAINY_DIR": "./pairs/rainy", "CLEAN_DIR": "./pairs/clear", "CLEAR_DIR": "./pairs/clear",
    "VAL_RAINY_DIR": "./pairs/rainy", "VAL_CLEAN_DIR": "./pairs/clear", "REAL_DIR": "",
    "CLEAN_DIRS": ("./pairs/clear",), "RAINY_DIRS": ("./pairs/rainy",), "RTDETR_MODEL_NAME": "./rtdetr",
    "SPDNET_MODEL_PATH": "./spdnet.pt", "RAIN_DETECTOR_PATH": "./rain_detector.pt", "BACKBONE_WEIGHTS": "",
    "PRETRAIN_WEIGHTS": "none", "CHECKPOINT": "./detector.pth", "OUTPUT_DIR": "./run", "CHECKPOINT_DIR": "./run",
    "RUNS_DIR": "./run", "CACHE_DIR": "./cache", "PERCENT_DATASET": 100, "VALIDATION_SHARE": 0.5, "BASELINES": False,
    "MULTI_SCALE": False,
    "DATALOADER_WORKERS": 0, "NUM_WORKERS": 0, "WORKERS": 0}
_ORIGINAL = {"Training_SPDNet": {"SPDNET_MODEL_PATH": ""}}


class Found(BaseException):
    """Ends a script where its training would begin; holds what was found out."""


def prepare(train=4, val=2, side=640):
    """Fill the current folder: so many scenes, pairs of that size, networks of the published sizes with random
    weights."""
    golden.draw_scenes(Path("demo"), train, val)
    for name, folder in (("rainy", "coco_rain"), ("clear", "coco")):
        for path in sorted((Path("demo") / folder).rglob("*.jpg")):
            target = Path("pairs") / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize((side, side)).save(target)
    classes = dict(enumerate(COCO_ROWS))
    new_rtdetr("r18", classes, train_backbone_norms=False).save_pretrained("rtdetr")
    checkpoint.save(SPDNet(32, 3).state_dict(), Path("spdnet.pt"))
    save_rain_detector(RainDetector(), Path("rain_detector.pt"))


def require_scripts(name, scripts):
    """UserError unless a constant holds names of scripts in ROWS, without .py."""
    known = dict.fromkeys(script for script, _ in ROWS)
    if unknown := [script for script in scripts if script not in known]:
        raise config.UserError(f"{name}: {unknown[0]!r} is not in the table; choose some of {', '.join(known)}")


def settings_of(script):
    """-> {constant: value}: the files of `prepare`, for a script that is otherwise as published."""
    known = golden.demo_of(script)[1]
    return {name: value for name, value in (_FILES | _ORIGINAL.get(script, {})).items() if name in known}


def needs_of(script, constants):
    """-> needs.Needs of a script with the published settings and the `constants`; writes ./detector.pth in stage 1."""
    def fit(model, loader, compute_losses, plan, *, parameters, optimizer=torch.optim.AdamW, extras=None, **others):
        if script == "train_detector_stage1" and constants["SIZE"] == "nano":
            checkpoint.save(extras | {"model": model.state_dict()}, Path("detector.pth"))
        raise Found(needs.of_training(model, loader, compute_losses, plan, parameters, optimizer))
    with mock.patch.object(engine, "fit", fit), as_on_a_gpu(), open(os.devnull, "w", encoding="utf-8") as nowhere, \
            contextlib.redirect_stdout(nowhere):
        try:
            importlib.import_module(script).main(**settings_of(script), **constants)
        except Found as found:
            return found.args[0]
    raise RuntimeError(f"{script} has not come to its training")


@contextlib.contextmanager
def as_on_a_gpu():
    """Within, torch answers about a GPU that is not there as about one from Ampere on: autocast, bf16, attention."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **others):
        if not query.is_cuda:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in (
                (rfdetr.main, "amp_precision", lambda off: "float32" if off else "bf16"),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda *args, **others: True),
                (torch.nn.functional, "scaled_dot_product_attention", attention)):
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


def main(**overrides):
    """-> [{"script", "constants", "needs": Needs}, ...]"""
    cfg = config.resolve(globals(), overrides)
    require_scripts("ONLY", cfg.ONLY)
    if not cfg.GPUS or not all(isinstance(gigabytes, int) and gigabytes > 0 for gigabytes in cfg.GPUS):
        raise config.UserError(f"GPUS = {cfg.GPUS}: give whole gigabytes from 1 on, such as {GPUS}")
    kept = None if torch.cuda.is_available() else stand_in_gpu.accelerator_without_devices()
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        for script, constants in ROWS:
            if not cfg.ONLY or script in cfg.ONLY:
                found.append({"script": script, "constants": constants, "needs": needs_of(script, constants)})
                print(f"{script} {constants}: {found[-1]['needs']}", flush=True)
    del kept
    print(as_markdown(found, cfg.GPUS))
    return found


def as_markdown(found, gpus=GPUS):
    """-> the table of docs/gpu.md, with a column for each of so many GB."""
    rows = []
    for row in found:
        own = row["needs"]
        constants = ", ".join(f"`{name} = {value!r}`" for name, value in row["constants"].items()) or "the script's"
        rows.append({"script": f"`{row['script']}.py`", "constants": constants,
                     "rest": f"{own.total - own.activations:.2f} GB",
                     "image": f"{own.activations / own.images:.3f} GB", "all": f"{own.total:.1f} GB ({own.images})"}
                    | {gigabytes: own.batch_for(gigabytes) for gigabytes in gpus})
    return report.markdown(rows, {
        "script": "script", "constants": "constants", "rest": "networks, optimizer, gradients", "image": "per image",
        "all": "in all"} | {gigabytes: f"batch on {gigabytes} GB" for gigabytes in gpus})


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
