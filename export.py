"""Export the plain and the feature-de-raining detector: ONNX (for onnxruntime, TensorRT) and torch.export.

    python export.py --demo
    python export.py --FORMATS "('torch.export',)"

Writes OUTPUT_DIR/vanilla.onnx, feature_derain.onnx and the same as .pt2, then runs each file on random images and
compares its outputs with PyTorch's. Input: pixel_values (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE) RGB in [0, 1]; outputs:
logits (B, Q, K) and pred_boxes (B, Q, 4), normalised cxcywh. ONNX needs: pip install onnx onnxscript onnxruntime
"""

import importlib
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from utils import checkpoint, config, detector, feature_derain, processes, report

RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # the plain detector; "" leaves it out
MODEL_NAME = "./outputs_feature_derain/model"  # from Training_FeatureDerain.py; "" leaves it out
IMAGE_SIZE = 640                        # side of the square input, fixed in the files
BATCH_SIZE = 1                          # images per call, fixed in the files
FORMATS = ("onnx", "torch.export")      # which files to write
OPSET = 18                              # of ONNX; 17 or newer
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
        models["vanilla"] = detector.load_rtdetr(cfg.RTDETR_MODEL_NAME)
    if cfg.MODEL_NAME:
        models["feature_derain"] = feature_derain.FeatureDerainRTDETR.from_pretrained(cfg.MODEL_NAME,
                                                                                      constant="MODEL_NAME")
    if not models:
        raise config.UserError("RTDETR_MODEL_NAME and MODEL_NAME are both empty: nothing to export")
    return {name: Deployable(model).eval() for name, model in models.items()}


def require_onnx():
    """UserError that says what to install where an optional package is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise config.UserError(f"the format 'onnx' needs the package {name}: pip install onnx onnxscript "
                                   "onnxruntime, or choose FORMATS = ('torch.export',)") from None


def to_torch_export(program, path):
    """Write the exported program. -> callable of the file that was written."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def to_onnx(program, path, opset):
    """Write ONNX. -> callable of the file that was written, run by onnxruntime on the CPU."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # remarks on torchvision's operators, which are not used
    torch.onnx.export(program, f=str(path), opset_version=opset, dynamo=True, external_data=False, verbose=False,
                      input_names=["pixel_values"], output_names=list(_OUTPUTS))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(a) for a in session.run(None, {"pixel_values": images.numpy()})]


def difference(outputs, expected):
    """-> the largest absolute difference of two (logits, pred_boxes). Queries are compared in order of their values,
    because equally good ones may swap places."""
    return max((ours.sort(1).values - theirs.sort(1).values).abs().max().item()
               for ours, theirs in zip(outputs, expected, strict=True))


@torch.no_grad()
def export(model, name, cfg):
    """Write one model in every format. -> {format: largest difference from PyTorch}; UserError above TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(cfg.BATCH_SIZE, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, generator=generator)
    expected = model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch and transformers that a user cannot act on
        program = torch.export.export(model, (images,), strict=False)
    found = {}
    for kind in cfg.FORMATS:
        path = Path(cfg.OUTPUT_DIR) / f"{name}{_SUFFIXES[kind]}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = to_onnx(program, path, cfg.OPSET) if kind == "onnx" else to_torch_export(program, path)
        found[kind] = difference(written(images), expected)
        if not found[kind] <= cfg.TOLERANCE:
            raise config.UserError(f"{path.as_posix()} differs from PyTorch by {found[kind]:.1e}, more than TOLERANCE "
                                   f"= {cfg.TOLERANCE}: do not deploy it")
    return found


def main(**overrides):
    """Export; -> {model: {format: largest difference}}."""
    cfg = config.resolve(globals(), overrides)
    detector.require_size(cfg.IMAGE_SIZE)
    if not cfg.FORMATS or set(cfg.FORMATS) - _SUFFIXES.keys():
        raise config.UserError(f"FORMATS = {cfg.FORMATS!r}: choose from {', '.join(_SUFFIXES)}")
    if cfg.OPSET < 17:
        raise config.UserError(f"OPSET = {cfg.OPSET}: RT-DETR needs 17 or newer")
    if "onnx" in cfg.FORMATS:
        require_onnx()
    checkpoint.require_writable(cfg.OUTPUT_DIR)
    results = {name: export(model, name, cfg) for name, model in build_models(cfg).items()}
    rows = [{"file": f"{name}{_SUFFIXES[kind]}", "difference": f"{value:.1e}",
             "size": f"{(Path(cfg.OUTPUT_DIR) / (name + _SUFFIXES[kind])).stat().st_size / 2**20:.1f}"}
            for name, differences in results.items() for kind, value in differences.items()]
    processes.say(report.table(rows, {"file": f"in {Path(cfg.OUTPUT_DIR).as_posix()}",
                                      "difference": "largest difference from PyTorch", "size": "MB"}))
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
