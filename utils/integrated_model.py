"""SPDNet in front of RT-DETR: one module that de-rains and detects, differentiable from the loss to the first pixel."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.rt_detr.modeling_rt_detr import RTDetrObjectDetectionOutput

from utils import checkpoint, freeze, report
from utils.config import UserError
from utils.images import antialiased
from utils.networks.clamp import clamp_with_return, cut_share
from utils.networks.derainers import load_derainer
from utils.networks.distillation import compared
from utils.networks.rtdetr import backbone_features, clean_features, detect_from_features, load_rtdetr, select_features
from utils.networks.spdnet import SPDNet, load_spdnet
from utils.networks.spdnet_init import init_near_identity

DERAINERS = {"spdnet": "SPDNet", "unet": "U-Net", "nafnet": "NAFNet"}  # what may be adapted, and how pages call it
_FILE = ("derainer.pt", "spdnet.pt")  # in the folder of save_pretrained
PIXELS_AT_ONCE = 4 * 640 * 640  # that SPDNet sees at a time without gradients: about 1 GB for 640 x 640


@dataclass
class RainRobustOutput(RTDetrObjectDetectionOutput):
    """transformers' output plus the de-raining side; see RainRobustRTDETR.forward."""

    derained: torch.Tensor | None = None  # (B, 3, H, W) in [0, 1]
    clamped: torch.Tensor | None = None  # scalar, share of values that the clamp cut
    derained_clean: torch.Tensor | None = None  # (B', 3, H, W) in [0, 1], only where `clean` was given
    features: tuple | None = None  # (B, C, h, w) per level, only where they were asked for
    taught: dict | None = None  # {term of distillation.TERMS: scalar}, only with a teacher's answer


def require_scale(derain_scale):
    """UserError unless the scale is one that de-raining takes."""
    if not 0.1 <= derain_scale <= 1:  # SPDNet needs a handful of pixels
        raise UserError(f"DERAIN_SCALE = {derain_scale}: choose a number from 0.1 to 1, such as 1.0 or 0.5")


def require_derainer(name):
    """UserError unless DERAINER names a network that can be adapted."""
    if name not in DERAINERS:
        raise UserError(f"DERAINER = {name!r}: choose one of {', '.join(DERAINERS)}")


def weights_of(cfg):
    """-> (constant, path) of the weights of a script's DERAINER."""
    constant = "SPDNET_MODEL_PATH" if cfg.DERAINER == "spdnet" else "DERAIN_MODEL_PATH"
    return constant, getattr(cfg, constant)


def read_derainer(name, path, constant):
    """-> a de-rainer that can train: SPDNet of a state dict, or a network of train_unet_derain.py, all but the latter's
    BatchNorm layers: batches in front of a detector are too small for their statistics.

    Args:
        name: of DERAINERS; path: of its weights; constant: the script's for the path, for messages.
    """
    if name == "spdnet":
        return load_spdnet(path, constant=constant)
    derainer = load_derainer(name, path, constant=constant)
    freeze.unfreeze(derainer)
    for module in derainer.modules():
        if isinstance(module, nn.BatchNorm2d):
            freeze.freeze(module)
    return derainer


def name_of(derainer):
    """-> which of DERAINERS a network is."""
    if isinstance(derainer, SPDNet):
        return "spdnet"
    return "nafnet" if derainer.model_args["arch"] == "nafnet" else "unet"


def write_derainer(derainer, path):
    """Write the weights so that `read_derainer` and every script that takes such a network read them."""
    content = derainer.state_dict()
    if not isinstance(derainer, SPDNet):
        content = {"model": content, "model_args": derainer.model_args}
    checkpoint.save(content, path)


def require_trained_scale(spdnet_path, derain_scale):
    """UserError where best.pt beside the weights says that they were trained at another DERAIN_SCALE."""
    scale = trained_scale(spdnet_path, derain_scale)
    if scale != derain_scale:
        raise UserError(f"DERAIN_SCALE = {derain_scale}, but {spdnet_path} was trained with {scale}: set it to that")


def trained_scale(path, default=1.0):
    """-> the DERAIN_SCALE that best.pt beside a de-rainer's weights says, `default` without one."""
    return (_best_beside(path).get("model_args") or {}).get("derain_scale", default)


def pretraining_note(spdnet_path, derain_scale):
    """-> a line where best.pt of Training_SPDNet.py beside the weights names another scale than DERAIN_SCALE, or None.

    A line and no error: adaptation may well move an SPDNet to another scale, it only starts further off.
    """
    scale = (_best_beside(spdnet_path).get("constants") or {}).get("IMAGE_SCALE")
    if scale in (None, derain_scale):
        return None
    return (f"{Path(spdnet_path).as_posix()} was trained with IMAGE_SCALE = {scale}: DERAIN_SCALE = {scale} shows it "
            f"rain of the size that it knows, here it is {derain_scale}")


def trained_size(spdnet_path):
    """-> IMAGE_SIZE of the run whose best.pt lies beside the weights, None without."""
    return (_best_beside(spdnet_path).get("constants") or {}).get("IMAGE_SIZE")


def _best_beside(spdnet_path):
    """-> the content of best.pt in the folder of the weights; {} without, or where it is somebody else's."""
    try:
        content = checkpoint.load(Path(spdnet_path).with_name("best.pt"))
    except checkpoint.CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def _in_parts(derainer, images):
    """The de-rainer's answer in [0, 1]; without gradients as many images at a time as PIXELS_AT_ONCE allows, at least
    one."""
    def derain(part):
        return derainer(part * 255)[0] / 255 if isinstance(derainer, SPDNet) else derainer(part)
    if torch.compiler.is_exporting():  # a file for batches of any size
        return derain(images)
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1]))
    if torch.is_grad_enabled() or len(images) <= at_once:
        return derain(images)
    return torch.cat([derain(part) for part in images.split(at_once)])


def derain_unclamped(derainer, pixel_values, scale=1.0):
    """A de-rainer in the project's unit, SPDNet's output as it is.

    Args:
        derainer: SPDNet, which works in [0, 255], or a network of load_derainer, which works in [0, 1] and clamps.
        pixel_values: (B, 3, H, W) in [0, 1].
        scale: 1.0, or 0.5 to let it see half the size: its correction is enlarged and added, a quarter of the cost.
            Both ways go by the sizes in whole pixels, so that the correction lies where it belongs at any scale.
    Returns:
        (B, 3, H, W), which may leave [0, 1].
    """
    if scale == 1:
        return _in_parts(derainer, pixel_values)
    small = antialiased(pixel_values, [int(side * scale) for side in pixel_values.shape[-2:]])
    correction = _in_parts(derainer, small) - small
    return pixel_values + F.interpolate(correction, pixel_values.shape[-2:], mode="bilinear", align_corners=False)


def detect_with_features(rtdetr, images, labels=None, feature_level=None):
    """-> RainRobustOutput of images (B, 3, H, W) in [0, 1], with the features of `feature_level` where one is given."""
    if feature_level is None:
        return RainRobustOutput(**rtdetr(pixel_values=images, labels=labels))
    levels = backbone_features(rtdetr, images)
    outputs = detect_from_features(rtdetr, levels, labels)
    return RainRobustOutput(
        **outputs, features=select_features(levels, outputs.encoder_last_hidden_state, feature_level))


class RainRobustRTDETR(nn.Module):
    """De-rain, then detect.

    Args:
        spdnet: SPDNet (works in [0, 255]; this class owns the conversion), or another de-rainer, see `read_derainer`.
        rtdetr: transformers' RTDetrForObjectDetection.
        freeze_derain, freeze_detection: freeze that part for good (parameters, buffers and mode, see utils.freeze).
        derain_scale: 1.0, or 0.5 to let SPDNet see the image at half size: its correction is enlarged and added, at a
            quarter of the cost.
    """

    def __init__(self, spdnet, rtdetr, freeze_derain=False, freeze_detection=False, derain_scale=1.0):
        super().__init__()
        require_scale(derain_scale)
        self.derain_module = spdnet
        self.detection_module = rtdetr
        self.derain_scale = derain_scale
        if freeze_derain:
            freeze.freeze(spdnet)
        if freeze_detection:
            freeze.freeze(rtdetr)

    @property
    def rtdetr(self):
        """RT-DETR itself; every wrapper of this project has it under this name."""
        return self.detection_module

    @property
    def model_args(self):
        """What is needed to build this module again, as plain data."""
        own = ({"n_feats": self.derain_module.n_feats, "n_resblocks": self.derain_module.n_resblocks}
               if isinstance(self.derain_module, SPDNet) else {"derainer": self.derain_module.model_args})
        return own | {"derain_scale": self.derain_scale, "detector": self.detection_module.config.to_dict()}

    def derain_unclamped(self, pixel_values):
        """(B, 3, H, W) in [0, 1] -> (B, 3, H, W), SPDNet's own output in the same unit, which may leave [0, 1]."""
        return derain_unclamped(self.derain_module, pixel_values, self.derain_scale)

    def derain(self, pixel_values):
        """(B, 3, H, W) rainy in [0, 1] -> the same shape and range, de-rained."""
        return clamp_with_return(self.derain_unclamped(pixel_values))

    def forward(self, pixel_values, labels=None, clean=None, feature_level=None, answer=None, terms=(),
                over_ranks=True):
        """De-rain and detect.

        Args:
            pixel_values: (B, 3, H, W) RGB in [0, 1], sides a multiple of 32.
            labels: None, or B dicts {"class_labels": (N,) int64, "boxes": (N, 4) normalised cxcywh} for the loss.
            clean: None, or (B', 3, H, W) images that only pass the de-rainer (for an identity loss).
            feature_level: None or one of detector.FEATURE_LEVELS: which features of the de-rained images to return.
            answer: what a teacher says of the clean twins (distillation.Answer), or None; with it and without labels
                the detections may be those of its queries. terms, over_ranks: of the comparison with it, see
                distillation.compared.
        Returns:
            RainRobustOutput: transformers' `loss`, `loss_dict`, `logits`, `pred_boxes`, ..., plus `derained`,
            `clamped`, and where asked for `derained_clean`, `features` and `taught`.
        """
        batch = pixel_values.shape[0]  # len() would fix the batch of an exported file
        restored = self.derain_unclamped(pixel_values if clean is None else torch.cat([pixel_values, clean]))
        images = clamp_with_return(restored)
        detect = partial(detect_with_features, self.detection_module, images[:batch], labels, feature_level)
        outputs, taught = (detect(), None) if answer is None else compared(
            self.detection_module, detect, answer, terms, over_ranks, own_queries=labels is not None)
        return RainRobustOutput(**outputs, derained=images[:batch], clamped=cut_share(restored),
                                derained_clean=None if clean is None else images[batch:], taught=taught)

    def clean_features(self, images, feature_level):
        """See utils.networks.rtdetr.clean_features."""
        return clean_features(self.detection_module, images, feature_level)

    def save_pretrained(self, folder):
        """Write folder/spdnet.pt (a plain SPDNet state dict; derainer.pt of another one), folder/rtdetr/ (Hugging Face
        layout) and settings."""
        folder, name = Path(folder), name_of(self.derain_module)
        folder.mkdir(parents=True, exist_ok=True)
        write_derainer(self.derain_module, folder / _FILE[name == "spdnet"])
        self.detection_module.save_pretrained(folder / "rtdetr")
        report.write_json(folder / "integrated.json", {"derain_scale": self.derain_scale, "derainer": name})

    @classmethod
    def from_pretrained(cls, folder, device="cpu", freeze_derain=False, freeze_detection=False):
        """Read what `save_pretrained` wrote."""
        folder = Path(folder)
        settings = checkpoint.load_settings(folder / "integrated.json", ("derain_scale",), "folder",
                                            "not a folder of RainRobustRTDETR", optional=("derainer",))
        name = settings.get("derainer", "spdnet")  # the only one of earlier versions
        require_derainer(name)
        derainer = read_derainer(name, folder / _FILE[name == "spdnet"], "folder")
        rtdetr = load_rtdetr(str(folder / "rtdetr"), device=device, constant="folder")
        return cls(derainer, rtdetr, freeze_derain, freeze_detection, settings["derain_scale"]).to(device)


def load_integrated_model(spdnet_path, rtdetr_name, num_labels=80, device="cpu", freeze_derain=False,
                          freeze_detection=False, derain_scale=1.0, derainer="spdnet", constant="SPDNET_MODEL_PATH"):
    """Build the integrated model from files.

    Args:
        spdnet_path: SPDNet state dict (published or ours; its size is read from the shapes), or None for a new
            full-size SPDNet near the identity; with another `derainer` (of DERAINERS) the file of that.
        rtdetr_name: hub id or local folder; num_labels: classes it must have, None for whatever it has.
    Raises:
        UserError: naming the constant whose file is missing or does not fit.
    """
    spdnet = (init_near_identity(SPDNet()) if spdnet_path is None
              else read_derainer(derainer, spdnet_path, constant))
    rtdetr = load_rtdetr(rtdetr_name, num_labels, device)
    return RainRobustRTDETR(spdnet, rtdetr, freeze_derain, freeze_detection, derain_scale).to(device)
