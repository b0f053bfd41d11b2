"""Export the plain and the feature-de-raining detector: ONNX (for onnxruntime, TensorRT) and torch.export.

    python export.py --demo
    python export.py --FORMATS "('torch.export',)"

Writes OUTPUT_DIR/vanilla.onnx, feature_derain.onnx and the same as .pt2, then runs each file on random images and
compares its outputs with PyTorch's. Input: pixel_values (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE) RGB in [0, 1]; outputs:
logits (B, Q, K) and pred_boxes (B, Q, 4), normalised cxcywh. ONNX needs: pip install onnx onnxscript onnxruntime
"""

import io
import warnings
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from torch import nn

from utils import config, feature_derain, processes, report, system
from utils.evaluation import comparison
from utils.networks import onnx_file
from utils.networks.rtdetr import load_rtdetr, require_queries, require_size, rtdetr_of, trained_size
from utils.training.plan import not_negative

RTDETR_MODEL_NAME: str | None = "PekingU/rtdetr_r18vd"  # the plain detector; "" leaves it out
MODEL_NAME: str | None = "./outputs_feature_derain/model"  # from Training_FeatureDerain.py; "" leaves it out
IMAGE_SIZE = 640                        # side of the square input, fixed in the files
BATCH_SIZE = 1                          # images per call, fixed in the files
FORMATS = ("onnx", "torch.export")      # which files to write
OPSET = 18                              # of ONNX; 18 or newer
TOLERANCE = 1e-3                        # largest difference from PyTorch's logits and boxes that is accepted
OUTPUT_DIR = "./outputs_feature_derain/export"

DEMO = {"RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "MODEL_NAME": "./demo/outputs_feature_derain/model",
        "IMAGE_SIZE": 160, "OUTPUT_DIR": "./demo/outputs_feature_derain/export"}
_SUFFIXES = {"onnx": ".onnx", "torch.export": ".pt2"}
_OUTPUTS = ("logits", "pred_boxes")


class Deployable(nn.Module):
    """A detector with plain tensors in and out: (B, 3, H, W) in [0, 1] -> logits (B, Q, K), pred_boxes (B, Q, 4)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


def build_models(cfg):
    """-> {name: Deployable in eval mode, on the CPU}."""
    models = {}
    if cfg.RTDETR_MODEL_NAME:
        models["vanilla"] = load_rtdetr(cfg.RTDETR_MODEL_NAME)
    if cfg.MODEL_NAME:
        models["feature_derain"] = feature_derain.FeatureDerainRTDETR.from_pretrained(cfg.MODEL_NAME,
                                                                                      constant="MODEL_NAME")
    if not models:
        raise config.UserError("RTDETR_MODEL_NAME and MODEL_NAME are both empty: nothing to export")
    for model in models.values():
        require_queries(rtdetr_of(model), cfg.IMAGE_SIZE)
    folders = {"RTDETR_MODEL_NAME": "", "MODEL_NAME": "rtdetr"}
    comparison.note_other_sizes({constant: trained_size(Path(getattr(cfg, constant)) / inner)
                                 for constant, inner in folders.items() if getattr(cfg, constant)}, cfg.IMAGE_SIZE)
    return {name: Deployable(model).eval() for name, model in models.items()}


def to_torch_export(program, path):
    """Write the exported program. -> callable of the file that was written."""
    content = io.BytesIO()  # a full disk would end the process within torch's own writing
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())
    return torch.export.load(path).module()


@torch.no_grad()
def export(model, name, cfg):
    """Write one model in every format. -> {format: largest difference from PyTorch}; UserError above TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(cfg.BATCH_SIZE, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, generator=generator)
    expected = model(images)
    program = onnx_file.export_program(model, images)
    found = {}
    for kind in cfg.FORMATS:
        path = Path(cfg.OUTPUT_DIR) / f"{name}{_SUFFIXES[kind]}"
        with config.writing(path), system.written(path, path.suffix) as temporary:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                written = (onnx_file.write(program, temporary, cfg.OPSET, "pixel_values", _OUTPUTS) if kind == "onnx"
                           else to_torch_export(program, temporary))
            found[kind] = onnx_file.difference(written(images), expected)
            del written  # Windows: an open file can be neither moved nor deleted
            if not found[kind] <= cfg.TOLERANCE:
                raise config.UserError(f"{path.name} differs from PyTorch by {found[kind]:.1e}, more than TOLERANCE = "
                                       f"{cfg.TOLERANCE}, and was not written to {cfg.OUTPUT_DIR}")
    return found


def require_usable(cfg):
    """UserError for constants with which nothing could be written; takes formats out that are named twice, and in the
    demo those whose packages are missing."""
    require_size(cfg.IMAGE_SIZE)
    if cfg.BATCH_SIZE < 1:
        raise config.UserError(f"BATCH_SIZE = {cfg.BATCH_SIZE}: choose 1 or more")
    not_negative("TOLERANCE", cfg.TOLERANCE)
    if not cfg.FORMATS or set(cfg.FORMATS) - _SUFFIXES.keys():
        raise config.UserError(f"FORMATS = {cfg.FORMATS!r}: choose from {', '.join(_SUFFIXES)}")
    cfg.FORMATS = tuple(dict.fromkeys(cfg.FORMATS))
    if "onnx" in cfg.FORMATS:
        onnx_file.require_opset(cfg.OPSET, "OPSET")
        try:
            onnx_file.require_packages("the format 'onnx'", ", or choose FORMATS = ('torch.export',)")
        except config.UserError as error:
            if not cfg.demo:
                raise
            processes.say(f"note: no ONNX files: {error}")
            cfg.FORMATS = tuple(kind for kind in cfg.FORMATS if kind != "onnx")


def main(**overrides):
    """Export; -> {model: {format: largest difference}}."""
    cfg = config.resolve(globals(), overrides)
    processes.require_one("export.py")
    require_usable(cfg)
    models = build_models(cfg)
    report.output_folder(cfg.OUTPUT_DIR, [f"{name}{_SUFFIXES[kind]}" for name in models for kind in cfg.FORMATS])
    results = {name: export(model, name, cfg) for name, model in models.items()}
    rows = [{"file": f"{name}{_SUFFIXES[kind]}", "difference": f"{value:.1e}",
             "size": f"{(Path(cfg.OUTPUT_DIR) / (name + _SUFFIXES[kind])).stat().st_size / 2**20:.1f}"}
            for name, differences in results.items() for kind, value in differences.items()]
    processes.say(report.table(rows, {"file": f"in {Path(cfg.OUTPUT_DIR).as_posix()}",
                                      "difference": "largest difference from PyTorch", "size": "MB"}))
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
