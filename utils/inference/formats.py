"""The formats of export.py: how a model is written in each, and how alike a file's answers and the model's are.

A format that starts from another one (INT8 from float32 ONNX, OpenVINO from ONNX) writes that one first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.ops import box_iou

from utils import datasets
from utils.boxes import decode
from utils.datasets import presets
from utils.datasets.samples import evenly
from utils.images import to_floats
from utils.inference import exported
from utils.networks import onnx_file
from utils.networks.folding import folded
from utils.networks.tiling import to_multiple


class Format(NamedTuple):
    """A kind of file."""

    ending: str      # of the file, behind the model's name
    reduced: bool    # other arithmetic than float32: judged by what it finds, not by TOLERANCE
    packages: tuple  # beyond requirements.txt


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {"onnx": Format(".onnx", False, _ONNX), "onnx-fp16": Format("_fp16.onnx", True, _ONNX),
            "onnx-int8": Format("_int8.onnx", True, _ONNX), "openvino": Format(".xml", False, (*_ONNX, "openvino")),
            "openvino-int8": Format("_int8.xml", True, (*_ONNX, "openvino")), "torch.export": Format(".pt2", False, ())}
_BATCH = 2  # of the example that is traced: 1 would be fixed


class Int8(NamedTuple):
    """What INT8 takes of a model, see onnx_file.write_int8."""

    operators: tuple
    parts: tuple        # modules
    kept: tuple = ()    # modules within them that stay in float32
    ends: bool = False  # the first and the last of the operators of each part stay in float32


class Model(NamedTuple):
    """What is exported."""

    module: nn.Module     # plain tensors in and out, in eval mode, on the CPU
    about: dict           # of utils.inference.exported, for its files
    without: dict = {}    # {format: why it is not written}
    least_map: float = 0  # share of the mAP that its files must keep
    int8: Int8 = Int8((), ())


# ---- writing ------------------------------------------------------------------------------------------------------

def writers(model, folder, paths, opset, limit=None):
    """Trace a model.

    Args:
        folder: where files lie that other formats start from; paths: of images to calibrate INT8 on; opset:
            of ONNX; limit: of a de-rainer, see `unscaled_images`.
    Returns:
        {format: function of the path to write}.
    """
    (height, width), dynamic = example_of(model)
    program = onnx_file.export_program(folded(model.module), torch.rand(_BATCH, 3, height, width), dynamic)
    name, about = model.about["model"], model.about

    def source(kind):
        path = folder / f"{name}{FORMATS[kind].ending}"
        if not path.exists():
            found[kind](path)
        return path

    def onnx(path):
        onnx_file.write(program, path, opset, about["input"], about["outputs"], about)

    def int8(path):
        real = (real_images(paths, about["image_size"]) if about["image_size"] else
                unscaled_images(paths, limit, about["multiple"]))
        calibration = (one.numpy() for one in real)
        onnx_file.write_int8(source("onnx"), path, calibration, *model.int8)
    found: dict[str, Callable] = {
        "onnx": onnx, "onnx-fp16": lambda path: onnx_file.write_half(source("onnx"), path), "onnx-int8": int8,
        "openvino": lambda path: exported.write_openvino(source("onnx"), path, about),
        "openvino-int8": lambda path: exported.write_openvino(source("onnx-int8"), path, about),
        "torch.export": lambda path: exported.write_torch_export(program, path, about)}
    return found


def example_of(model):
    """-> ((H, W) of the example that is traced, {dimension: torch.export.Dim}): any batch, of de-rainers any size."""
    side, batch = model.about["image_size"], torch.export.Dim("batch", max=model.about.get("largest_batch"))
    if side:
        return (side, side), {0: batch}
    step = model.about["multiple"]
    height, width = (torch.export.Dim(name, min=2, max=1024) for name in ("rows", "columns"))
    return (8 * step, 10 * step), {0: batch, 2: step * height, 3: step * width}


# ---- comparing ----------------------------------------------------------------------------------------------------

def real_images(paths, side):
    """Paths -> iterator of (1, 3, side, side) float32 in [0, 1]."""
    stretch = presets.evaluation(side)
    for path in paths:
        yield to_floats(stretch(datasets.read_image(path)))[None]


def unscaled_images(paths, limit, multiple=1):
    """Paths -> iterator of (1, 3, H, W) float32 in [0, 1] as a de-rainer sees them, for which rain has a size: at the
    images' own scale, of larger ones the middle of `limit` pixels a side (None: all), mirrored up to `multiple`."""
    cut = presets.scaled(1.0, limit)
    for path in paths:
        image = to_floats(cut({"image": tv_tensors.Image(datasets.read_image(path))})["image"])[None]
        yield to_multiple(image.as_subclass(torch.Tensor), multiple, 2 * multiple)


def parts_of(path):
    """-> [the file that was written, then those beside it that belong to it]."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    return [path, beside] if beside.exists() else [path]


def batches(model, paths, image_size):
    """-> the batches that a model's files are compared on: four images together and one alone; of a de-rainer also one
    of another shape, about image_size. Noise where there are no images."""
    side = model.about["image_size"] or image_size
    four = (torch.cat(list(real_images(evenly(paths, min(4, len(paths))), side))) if paths else
            torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)))
    found = [four, four[:1]]
    if model.about["image_size"] is None:
        cut = model.about["multiple"]
        found = [four[:2, :, cut:], four[:1, :, :-cut + 1, 1:]]  # the second is no multiple: padded
    return found


@torch.no_grad()
def answers(model, images_):
    """-> the module's outputs as exported.Exported gives them."""
    run = exported.Exported(lambda x: [found] if torch.is_tensor(found := model.module(x)) else list(found),
                            model.about, model.about["model"])
    return run(images_)


def agreement(found, expected, least=0.4):
    """-> share of two detectors' boxes with a score of at least `least` that both have (the same class, IoU 0.7)."""
    both, several = 0, 0
    pairs = (decode(one.logits, one.pred_boxes, [(1, 1)] * len(one.logits)) for one in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        ours, theirs = ({key: one[key][one["scores"] >= least] for key in ("boxes", "labels")}
                        for one in (ours, theirs))
        same = (box_iou(ours["boxes"], theirs["boxes"]) >= 0.7) & (ours["labels"][:, None] == theirs["labels"])
        both += int(same.any(1).sum()) + int(same.any(0).sum())
        several += len(ours["labels"]) + len(theirs["labels"])
    return both / several if several else 1.0


def largest_difference(found, expected, about):
    """-> of two answers; queries of a detector are compared in order of their values, see onnx_file.difference."""
    ours, theirs = ([getattr(one, name) for name in about["outputs"]] for one in (found, expected))
    if about["kind"] == "detector":
        return onnx_file.difference(ours, theirs)
    return onnx_file.largest((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
