"""Models as files take them: plain tensors in and out, and what each file needs to be told (formats.Model).

What may become INT8 stands here, because it was found by trial for each network.
"""

import math
import re

from torch import nn

from utils import config, processes
from utils.conditional_model import threshold_of
from utils.inference import formats
from utils.networks import diffusion_base
from utils.networks.derainers import load_derainer, load_refined
from utils.networks.refiner import merged, read_settings
from utils.networks.rtdetr import id2label_of, require_queries, rtdetr_of

_QUANTISED = ("backbone", "encoder", "encoder_input_proj")  # of RT-DETR; decoder and heads stay in float32
# Of de-rainers; what NAFNet's channel attention multiplies by, its depthwise convolutions (OpenVINO loses 14 dB there)
# and the convolutions that see and make pixels stay in float32, as norms, gates and sums do
_DERAINER_INT8 = formats.Int8(("Conv",), ("net",), ("attention", "depthwise"), ends=True)
_REFINER_INT8 = _DERAINER_INT8._replace(parts=("derainer.net", "refiner.net"))  # of mode "pixel"
_NO_HALF = {"onnx-fp16": "SPDNet overflows in float16"}


class Deployable(nn.Module):
    """A detector with plain tensors in and out: (B, 3, H, W) in [0, 1] -> logits (B, Q, K), pred_boxes (B, Q, 4)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model(pixel_values=pixel_values)
        return outputs.logits, outputs.pred_boxes


class Gate(nn.Module):
    """A rain detector with plain tensors: (B, 3, H, W) in [0, 1] -> (B,) calibrated probability of rain."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.probability(pixel_values)


def detector(model, image_size, least_map, spdnet=False):
    """-> formats.Model of a detector of the RT-DETR family, alone or behind a de-rainer.

    Args:
        image_size: side of the square input, fixed in the file.
        least_map: share of PyTorch's mAP that a file must keep.
        spdnet: whether SPDNet is a part of it.
    """
    require_queries(rtdetr_of(model), image_size)
    about = {"kind": "detector", "outputs": ["logits", "pred_boxes"], "image_size": image_size,
             "classes": {str(label): name for label, name in id2label_of(rtdetr_of(model)).items()}}
    return formats.Model(Deployable(model), about, _NO_HALF if spdnet else {}, least_map,
                         formats.Int8(("Conv",), _QUANTISED, ("derain_module",)))  # a U-Net has an encoder as well


def rain_detector(model, image_size, threshold):
    """-> formats.Model of a rain detector; threshold: an image is rainy from this probability on, None: its own."""
    about = {"kind": "rain detector", "outputs": ["probability"], "image_size": image_size,
             "rain_threshold": threshold_of(model, threshold)}
    why = "a rain detector costs little, and its probability is calibrated for float32"
    return formats.Model(Gate(model), about, {"onnx-int8": why, "openvino-int8": why})


def derainer(name, path):
    """-> formats.Model of a de-rainer's file, for images of any size; name: spdnet, unet or nafnet."""
    model = load_derainer(name, path, constant="DERAIN_MODEL_PATH")
    multiple = max(model.multiple, 4)  # SPDNet halves twice
    about = {"kind": "derainer", "outputs": ["restored"], "image_size": None, "multiple": multiple}
    return formats.Model(model, about, _NO_HALF if name == "spdnet" else {}, int8=_DERAINER_INT8)


def refiner(folder, licence):
    """-> formats.Model of a refiner: its de-rainer, encoder, U-Net, decoder and blend as one, for images of any size.

    Args:
        folder: REFINER_DIR, from train_diffusion_refiner.py.
        licence: BASE_LICENCE, of the base's weights; "" or None: what the base's README.md states.

    Raises:
        UserError: mode "sample"; a base whose licence is unknown, or forbids changed copies.
    """
    content = read_settings(folder)
    mode = content["settings"]["mode"]
    if mode == "sample":
        raise config.UserError(f"REFINER_DIR = '{folder}' is of MODE 'sample', a loop over noise that is no "
                               "single graph: train one with MODE = 'one_step', or leave REFINER_DIR empty")
    about = {"kind": "derainer", "outputs": ["restored"], "image_size": None}
    if mode == "one_step":
        base = content["base"]
        licence = licence or diffusion_base.licence_of(base)
        if not licence:
            raise config.UserError(f"REFINER_DIR = '{folder}': the file would hold the weights of its base "
                                   f"'{base}', whose licence is stated nowhere (license: on top of its README.md): "
                                   "find out whether you may pass changed copies on, and give it as BASE_LICENCE")
        if re.search(r"\bnd\b|no.?deriv", licence.lower()):
            raise config.UserError(f"REFINER_DIR = '{folder}': the licence of its base '{base}', {licence}, "
                                   "forbids changed copies, and the file would be one: leave REFINER_DIR empty")
        processes.say(f"note: the refiner's file holds the weights of {base}, changed by LoRA; their licence, "
                      f"{licence}, goes with every copy of it")
        about |= {"base": base, "licence": licence, "largest_batch": 63}  # diffusers takes another way from 64 on
    model = load_refined(folder)
    model.refiner = merged(model.refiner)
    about["multiple"] = math.lcm(model.derainer.multiple, model.refiner.multiple, 4)
    why = "onnxruntime converts files of up to 2 GB, and the published base is larger"
    without = dict.fromkeys(("onnx-fp16", "onnx-int8", "openvino-int8"), why) if mode == "one_step" else {}
    return formats.Model(model, about, without, int8=_REFINER_INT8)


def keep_in_float32(models, names):
    """-> {name: formats.Model} whose modules of these names (INT8_KEPT) INT8 leaves alone as well."""
    inside = [f".{name}." for model in models.values() for name, _ in model.module.named_modules()]
    if unknown := [name for name in names if not any(f".{name}." in one for one in inside)]:
        raise config.UserError(f"INT8_KEPT holds {unknown[0]!r}, but nothing that is exported has a module of that "
                               "name, such as backbone or encoder")
    found = {}
    for name, model in models.items():
        found[name] = model._replace(int8=model.int8._replace(kept=(*model.int8.kept, *names)))
        if names and set(model.int8.parts) <= set(names):
            why = "INT8_KEPT leaves nothing of it to INT8"
            found[name] = found[name]._replace(without={"onnx-int8": why, "openvino-int8": why} | model.without)
    return found
