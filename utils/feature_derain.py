"""Rain suppressed in RT-DETR's features: small modules between the backbone and the hybrid encoder.

Per scale a block estimates where rain is (a mask), turns those places down by a learnable share, and adds a learnt
correction under CBAM attention (Woo et al., ECCV 2018; RT-DETR: Zhao et al., CVPR 2024). A fresh module is the
identity, so training starts at the pretrained detector's own accuracy: `blend` and the last convolution of every
correction are zero. There is no normalisation layer inside: nothing depends on what else is in the batch.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import RTDetrImageProcessor
from transformers.models.rt_detr.modeling_rt_detr import RTDetrObjectDetectionOutput

from utils import checkpoint, freeze, report, system
from utils.config import UserError
from utils.networks.distillation import compared
from utils.networks.rtdetr import (
    backbone_features,
    clean_features,
    detect_from_features,
    encode,
    load_rtdetr,
    select_features,
)

DERAIN_TYPES = ("multiscale", "lightweight", "none")
WIDTH = 0.375  # of the corrections: 1.46M parameters on R18; 0.125 brings them to 0.34M
_MAX_CHANNELS = (128, 256, 512)  # R18's; a wider backbone (R50) does not make the corrections wider
SETTINGS = "feature_derain.json"


# ---- attention -------------------------------------------------------------------------------------------------

class ChannelAttention(nn.Module):
    """CBAM's channel gate: (B, C, h, w) -> (B, C, 1, 1) in (0, 1), one shared MLP on the mean and on the maximum."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(),
                                 nn.Conv2d(hidden, channels, 1, bias=False))

    def forward(self, x):
        return torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))


class SpatialAttention(nn.Module):
    """CBAM's spatial gate: (B, C, h, w) -> (B, 1, h, w) in (0, 1), from the mean and the maximum over channels."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class CBAM(nn.Module):
    """Channel gate, then spatial gate: (B, C, h, w) -> the same shape."""

    def __init__(self, channels, reduction=16, kernel_size=7):
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x):
        x = x * self.channel(x)
        return x * self.spatial(x)


# ---- one scale -------------------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + attention(bottleneck(x)): 1x1 to `hidden` channels, 3x3, 1x1 back, which starts at zero.

    Plain 3x3 convolutions at 512 channels would cost 4.7M parameters a block; this costs 0.5M.
    """

    def __init__(self, channels, hidden, attention=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(),
                                  nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        self.attention = attention or nn.Identity()
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x):
        return x + self.attention(self.body(x))


class FeatureDerainBlock(nn.Module):
    """One scale of the multiscale module.

    Args:
        channels: C of the features.
        num_residual_blocks: corrections after the suppression, 1 or more; the last one has CBAM.
        hidden: channels inside a correction.
    """

    def __init__(self, channels, num_residual_blocks, hidden):
        super().__init__()
        narrow = max(channels // 16, 8)
        self.rain_mask = nn.Sequential(nn.Conv2d(channels, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, 1, 3, padding=1),
                                       nn.Sigmoid())
        nn.init.constant_(self.rain_mask[2].bias, -2.0)  # 0.1: nearly closed, yet with a gradient
        self.blend = nn.Parameter(torch.zeros(()))  # share of the masked features that is taken away
        self.refine = nn.Sequential(*(
            ResidualBlock(channels, hidden, CBAM(channels) if i + 1 == num_residual_blocks else None)
            for i in range(num_residual_blocks)))

    def forward(self, features):
        """(B, C, h, w) -> the same shape, de-rained."""
        mask = self.rain_mask(features)  # (B, 1, h, w) in (0, 1)
        return self.refine(features * (1 - mask * self.blend))


class LightweightBlock(nn.Module):
    """One scale of the lightweight module, 21 parameters: 3x3 spatial attention, 1x1 scaling, one factor."""

    def __init__(self):
        super().__init__()
        self.attention = SpatialAttention(3)
        self.scaling = nn.Conv2d(1, 1, 1)
        self.blend = nn.Parameter(torch.zeros(()))
        nn.init.constant_(self.scaling.weight, 4.0)  # the gate's narrow range becomes a mask from 0.02 to 0.5
        nn.init.constant_(self.scaling.bias, -4.0)

    def rain_mask(self, features):
        """(B, C, h, w) -> (B, 1, h, w) in (0, 1)."""
        return torch.sigmoid(self.scaling(self.attention(features)))

    def forward(self, features):
        """(B, C, h, w) -> the same shape, de-rained."""
        return features * (1 - self.rain_mask(features) * self.blend)


# ---- all scales ------------------------------------------------------------------------------------------------

class _PerScale(nn.Module):
    """One block per scale; a block maps (B, C, h, w) to the same shape and has `rain_mask` and `blend`."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features):
        """Sequence of (B, C, h, w), one per scale -> list of the same shapes."""
        return [block(level) for block, level in zip(self.blocks, features, strict=True)]

    def rain_masks(self, features):
        """-> [(B, 1, h, w) in (0, 1), ...]: where each scale sees rain."""
        return [block.rain_mask(level) for block, level in zip(self.blocks, features, strict=True)]


class MultiScaleFeatureDerain(_PerScale):
    """Mask, suppression and correction on every scale.

    Args:
        channels: C of each scale, (128, 256, 512) for R18 and R34.
        num_residual_blocks: corrections per scale.
        width: channels inside a correction, as a share of `channels`.
    """

    def __init__(self, channels=_MAX_CHANNELS, num_residual_blocks=2, width=WIDTH):
        if num_residual_blocks < 1:
            raise UserError(f"NUM_RESIDUAL_BLOCKS = {num_residual_blocks}: choose 1 or more")
        if not 0 < width <= 1:
            raise UserError(f"REFINE_WIDTH = {width}: choose a number above 0, up to 1")
        super().__init__(FeatureDerainBlock(c, num_residual_blocks, max(round(width * min(c, most)), 4))
                         for c, most in zip(channels, _MAX_CHANNELS, strict=True))


class LightweightFeatureDerain(_PerScale):
    """Suppression alone: 63 parameters for three scales, whatever their channels. Fast, and learns little."""

    def __init__(self, channels=_MAX_CHANNELS):
        super().__init__(LightweightBlock() for _ in channels)


def create_derain_module(derain_type, channels, num_residual_blocks=2, width=WIDTH):
    """-> the module of one of DERAIN_TYPES; nn.Identity for "none"."""
    if derain_type == "multiscale":
        return MultiScaleFeatureDerain(channels, num_residual_blocks, width)
    if derain_type == "lightweight":
        return LightweightFeatureDerain(channels)
    if derain_type == "none":
        return nn.Identity()
    raise UserError(f"DERAIN_TYPE = {derain_type!r}: choose one of {', '.join(DERAIN_TYPES)}")


# ---- detector --------------------------------------------------------------------------------------------------

@dataclass
class FeatureDerainOutput(RTDetrObjectDetectionOutput):
    """transformers' output plus the features that the encoder was given; see FeatureDerainRTDETR.forward."""

    features: tuple | None = None  # (B, C, h, w) per scale, de-rained
    masks: tuple | None = None  # (B, 1, h, w) in (0, 1) per scale, only where they were asked for
    taught: dict | None = None  # {term: scalar}, only with a teacher's answer


class FeatureDerainRTDETR(nn.Module):
    """RT-DETR whose backbone features pass a de-raining module before the encoder.

    Args:
        rtdetr: transformers' RTDetrForObjectDetection; its backbone gives the channels of the scales.
        derain_type: "multiscale", "lightweight" or "none" (the plain detector).
        num_residual_blocks, width: see MultiScaleFeatureDerain.
    """

    def __init__(self, rtdetr, derain_type="multiscale", num_residual_blocks=2, width=WIDTH):
        super().__init__()
        channels = rtdetr.model.backbone.intermediate_channel_sizes
        self.rtdetr = rtdetr
        self.derain_module = create_derain_module(derain_type, channels, num_residual_blocks, width)
        self.settings = {"derain_type": derain_type, "num_residual_blocks": num_residual_blocks, "width": width}

    @property
    def model_args(self):
        """What is needed to build this module again, as plain data."""
        return self.settings | {"detector": self.rtdetr.config.to_dict()}

    def freeze_detector(self):
        """Phase 1: only `derain_module` trains."""
        freeze.freeze(self.rtdetr)

    def unfreeze_detector(self, freeze_batch_norm=True):
        """Phase 2: everything trains, save the BatchNorm layers (statistics, scale and shift) where asked for.

        A pretrained detector's statistics come from large batches of clean images. Small batches of rain would pull
        them away within an epoch, for clean images as well, and RT-DETR keeps its backbone's frozen for that reason.
        """
        backbone_stays = freeze.is_frozen(self.rtdetr.model.backbone)
        freeze.unfreeze(self.rtdetr)
        for module in self.rtdetr.modules():
            if isinstance(module, nn.BatchNorm2d):
                (freeze.freeze if freeze_batch_norm else freeze.unfreeze)(module)
        if backbone_stays:
            freeze.freeze(self.rtdetr.model.backbone)

    def forward(self, pixel_values, labels=None, detect=True, feature_level="backbone", masks=False, answer=None,
                terms=(), over_ranks=True):
        """Backbone, de-raining, encoder and decoder.

        Args:
            pixel_values: (B, 3, H, W) RGB in [0, 1], sides a multiple of 32.
            labels: None, or B dicts {"class_labels": (N,) int64, "boxes": (N, 4) normalised cxcywh} for the loss.
            detect: False stops behind the features (consistency training without labels).
            feature_level: which features to return, one of detector.FEATURE_LEVELS.
            masks: return the rain masks as well (for a loss on them), where there is a module.
            answer: what a teacher says of the clean twins (distillation.Answer), or None; with it `detect` counts as
                True, and without labels the detections may be those of its queries. terms, over_ranks: of the
                comparison with it, see distillation.compared.
        Returns:
            FeatureDerainOutput: transformers' `loss`, `loss_dict`, `logits` (B, Q, K), `pred_boxes` (B, Q, 4)
            normalised cxcywh, ..., plus `features` and, where asked for, `masks` and `taught`.
        """
        raw = backbone_features(self.rtdetr, pixel_values)
        levels = tuple(self.derain_module(raw))
        rest, outputs, taught = partial(detect_from_features, self.rtdetr, levels, labels), {}, None
        if answer is not None:
            outputs, taught = compared(self.rtdetr, rest, answer, terms, over_ranks, own_queries=labels is not None)
        elif detect:
            outputs = rest()
        if feature_level == "backbone":
            encoded = ()
        elif outputs:
            encoded = outputs.encoder_last_hidden_state
        else:
            encoded = encode(self.rtdetr, levels)[1].last_hidden_state
        return FeatureDerainOutput(**outputs, features=select_features(levels, encoded, feature_level),
                                   masks=tuple(self.derain_module.rain_masks(raw)) if masks else None, taught=taught)

    @torch.no_grad()
    def rain_masks(self, pixel_values):
        """Images (B, 3, H, W) in [0, 1] -> [(B, 1, h, w) in (0, 1), ...] per scale; [] without a module."""
        if isinstance(self.derain_module, nn.Identity):
            return []
        return self.derain_module.rain_masks(backbone_features(self.rtdetr, pixel_values))

    @torch.no_grad()
    def clean_features(self, images, feature_level):
        """See utils.networks.rtdetr.clean_features; the de-raining module is left out."""
        return clean_features(self.rtdetr, images, feature_level)

    def save_pretrained(self, folder, image_size=640):
        """Write folder/rtdetr/ (Hugging Face layout, with its image processor), folder/derain.pt and settings."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.rtdetr.save_pretrained(folder / "rtdetr")
        size = {"height": image_size, "width": image_size}
        RTDetrImageProcessor(size=size, do_normalize=False).save_pretrained(folder / "rtdetr")
        checkpoint.save(self.derain_module.state_dict(), folder / "derain.pt")
        report.write_json(folder / SETTINGS, self.settings)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", constant="folder", derain_type=None):
        """Read what `save_pretrained` wrote, in eval mode; UserError that names `constant` otherwise.

        derain_type: what the model must be, None for any.
        """
        folder = Path(folder)
        if problem := system.absent(folder, folder=True):
            raise UserError(f"{constant} = '{folder.as_posix()}' {problem}: Training_FeatureDerain.py writes it "
                            "(for a --demo: Training_FeatureDerain.py --demo)")
        settings = checkpoint.load_settings(folder / SETTINGS, ("derain_type", "num_residual_blocks", "width"),
                                            constant, "give the folder model/ that Training_FeatureDerain.py wrote")
        if derain_type not in (None, settings["derain_type"]):
            raise UserError(f"{constant} = '{folder.as_posix()}' holds DERAIN_TYPE = '{settings['derain_type']}', "
                            f"not '{derain_type}'")
        model = cls(load_rtdetr(str(folder / "rtdetr"), constant=constant), **settings)
        state = checkpoint.load(folder / "derain.pt")
        checkpoint.load_into(model.derain_module, state, (folder / "derain.pt").as_posix())
        return model.to(device).eval()


def mask_overlay(image, mask):
    """Image (3, H, W) in [0, 1] and mask (1, h, w) in [0, 1] -> (3, H, W): the masked places in red on grey."""
    mask = F.interpolate(mask[None].float(), image.shape[-2:], mode="bilinear", align_corners=False)[0]  # (1, H, W)
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    return grey * (1 - mask) + mask * torch.tensor([1.0, 0.1, 0.1], device=image.device).view(3, 1, 1)


def create_feature_derain_rtdetr(model_name="PekingU/rtdetr_r18vd", derain_type="multiscale", num_residual_blocks=2,
                                 freeze_backbone=False, device="cpu", width=WIDTH):
    """A pretrained RT-DETR with a fresh de-raining module, in eval mode; detects exactly as the pretrained one does.

    Args:
        model_name: hub id or folder, see load_rtdetr (as are the errors).
        derain_type: "multiscale", "lightweight" or "none".
        num_residual_blocks, width: see MultiScaleFeatureDerain.
        freeze_backbone: keep the backbone as it is for good (see utils.freeze).
    """
    model = FeatureDerainRTDETR(load_rtdetr(model_name), derain_type, num_residual_blocks, width)
    if freeze_backbone:
        freeze.freeze(model.rtdetr.model.backbone)
    return model.to(device).eval()
