"""A rain detector decides per image: rainy ones are de-rained before RT-DETR sees them, clean ones go straight to it.

    image -> rain detector -> rainy: SPDNet -> RT-DETR       (or another detector that knows rain)
                           -> clean: RT-DETR, untouched

The hard decision has no gradient. With gate="soft" a training step mixes the two images by the probability, so that
the detection loss trains the rain detector as well; in eval mode the gate is always hard.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from utils import checkpoint, feature_derain, freeze, report
from utils.config import UserError
from utils.feature_derain import FeatureDerainRTDETR
from utils.integrated_model import RainRobustOutput, derain_unclamped, detect_with_features, require_scale
from utils.networks import adapter
from utils.networks.clamp import clamp_with_return, cut_share
from utils.networks.rain_detector import load_rain_detector, save_rain_detector
from utils.networks.rtdetr import clean_features, id2label_of, load_rtdetr, rtdetr_of, trained_size
from utils.networks.spdnet import load_spdnet
from utils.transfer import sent

GATES = ("hard", "soft")


@dataclass
class ConditionalOutput(RainRobustOutput):
    """transformers' output plus what the gate did; see ConditionalRainRobustRTDETR.forward."""

    rain_stats: dict | None = None


class Seen(NamedTuple):
    """What the detector is given."""

    images: torch.Tensor  # (B, 3, H, W)
    clamped: torch.Tensor  # (), share of SPDNet's values that the clamp cut
    fallbacks: int = 0  # images that SPDNet answered with NaN or infinity, for which the original stands


class ConditionalRainRobustRTDETR(nn.Module):
    """De-rain where it rains, then detect.

    Args:
        rain_detector: RainDetector.
        derain_module: SPDNet or another de-rainer (see integrated_model.derain_unclamped), or None where
            `rainy_detector` takes its place.
        detection_module: transformers' RTDetrForObjectDetection; all images, or the clean ones.
        rain_threshold: an image is rainy from this probability on; None takes the rain detector's own.
        gate: "hard", or "soft" for training (see above).
        derain_scale: see integrated_model.derain_unclamped.
        rainy_detector: None, or a detector of the same classes and number of queries that rainy images go to as
            they are: an RT-DETR fine-tuned on rain, or a FeatureDerainRTDETR.
    """

    def __init__(self, rain_detector, derain_module, detection_module, rain_threshold=0.5, gate="hard",
                 derain_scale=1.0, rainy_detector=None):
        super().__init__()
        require_scale(derain_scale)
        if gate not in GATES:
            raise UserError(f"GATE = {gate!r}: choose {' or '.join(GATES)}")
        if (derain_module is None) == (rainy_detector is None):
            raise ValueError("give either a derain_module or a rainy_detector")
        if gate == "soft" and derain_module is None:
            raise UserError("GATE = 'soft' mixes images, so it needs RAINY_BRANCH = 'spdnet'")
        if rainy_detector is not None:
            require_same_outputs(detection_module, rainy_detector)
        self.rain_detector, self.derain_module, self.detection_module = rain_detector, derain_module, detection_module
        self.rainy_detector = rainy_detector
        self.rain_threshold = threshold_of(rain_detector, rain_threshold)
        self.gate, self.derain_scale = gate, derain_scale

    def train(self, mode=True):
        """Train mode, except for the rain detector: its BatchNorm statistics do not suit small batches."""
        super().train(mode)
        self.rain_detector.eval()
        return self

    def forward(self, pixel_values, labels=None, feature_level=None, decide=None):
        """Gate, de-rain, detect.

        Args:
            pixel_values: (B, 3, H, W) RGB in [0, 1], sides a multiple of 32; B may be 0.
            labels: None, or B dicts {"class_labels": (N,) int64, "boxes": (N, 4) normalised cxcywh} for the loss.
            feature_level: None or one of detector.FEATURE_LEVELS: features of the images that the detector saw
                (SPDNet only).
            decide: None, or a function of the probabilities (B,) that says which images are rainy, (B,) bool, in place
                of the threshold: a video's WeatherGate.
        Returns:
            ConditionalOutput: transformers' fields (`logits` (B, Q, K), `pred_boxes` (B, Q, 4), `loss` ...; only the
            first two where two detectors shared a batch), `derained` (B, 3, H, W): the images that were detected on,
            `clamped`, `features`, and `rain_stats`: {"scores": (B,) probability, "logits": (B,) its calibrated logit,
            "mask": (B,) bool, "num_rainy", "num_clean", "num_fallback": int}, the last counting images that SPDNet
            answered with NaN or infinity, for which the original was used (in train mode they reach the loss, and
            training stops).
        Raises:
            ValueError: labels, where a rainy_detector takes part: two detectors have no common loss.
        """
        if labels is not None and self.rainy_detector is not None:
            raise ValueError("there is no common loss of two detectors: train each by itself")
        logits = self.rain_detector.logit(pixel_values) if len(pixel_values) else pixel_values.new_zeros(0)
        scores = torch.sigmoid(logits)
        mask = decide(scores) if decide else scores >= self.rain_threshold
        rainy, clean = parted(mask)
        seen = self._seen(pixel_values, scores, rainy)
        stats = {"scores": scores, "logits": logits, "mask": mask, "num_rainy": len(rainy), "num_clean": len(clean),
                 "num_fallback": seen.fallbacks}
        if not len(seen.images):
            outputs = self._nothing(seen.images)
        elif self.rainy_detector is None:
            outputs = detect_with_features(self.detection_module, seen.images, labels, feature_level)
        else:
            outputs = self._detect_apart(seen.images, rainy, clean)
        return ConditionalOutput(**outputs, derained=seen.images, clamped=seen.clamped, rain_stats=stats)

    def _seen(self, images, scores, rainy):
        """What the gate and SPDNet make of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1]; scores: (B,) probability of rain; rainy: (R,) int64, images where it rains.
        """
        if self.rainy_detector is not None:
            return self._untouched(images)  # rainy images go to another detector as they are
        if self.gate == "soft" and self.training:
            return self._mixed(images, scores)
        if len(rainy):
            return self._derained(images, rainy)
        if self.training and torch.is_grad_enabled():
            # nothing to learn from this batch, but the step needs a gradient, and torchrun one on every rank
            return self._untouched(images + 0.0 * sum(p.sum() for p in self.derain_module.parameters()
                                                      if p.requires_grad))
        return self._untouched(images)  # the very tensor: bit for bit what the detector alone would see

    def _untouched(self, images):
        return Seen(images, clamped=images.new_zeros(()))

    def _mixed(self, images, scores):
        """Soft gate: each image mixed with its de-rained self, by the probability of rain."""
        restored = derain_unclamped(self.derain_module, images, self.derain_scale)
        share = scores[:, None, None, None]  # (B, 1, 1, 1)
        return Seen(share * clamp_with_return(restored) + (1 - share) * images, cut_share(restored))

    def _derained(self, images, rainy):
        """Hard gate: rainy images de-rained, the others as they are."""
        restored, fallbacks = derain_unclamped(self.derain_module, images[rainy], self.derain_scale), 0  # (R, 3, H, W)
        if not self.training:
            broken = ~restored.isfinite().flatten(1).all(1)
            restored = torch.where(broken[:, None, None, None], images[rainy], restored)
            fallbacks = int(broken.sum())
        seen = images.clone()
        seen[rainy] = clamp_with_return(restored).to(seen.dtype)
        return Seen(seen, cut_share(restored), fallbacks)

    def _detect_apart(self, images, rainy, clean):
        """Clean images to one detector, rainy ones to the other. -> {"logits", "pred_boxes"}, more for one detector"""
        if not len(rainy) or not len(clean):
            outputs = (self.rainy_detector if len(rainy) else self.detection_module)(pixel_values=images)
            return {name: value for name, value in outputs.items() if name != "features"}  # FeatureDerainRTDETR's own
        dry, wet = self.detection_module(pixel_values=images[clean]), self.rainy_detector(pixel_values=images[rainy])
        merged = {}
        for name in ("logits", "pred_boxes"):
            merged[name] = dry[name].new_empty(len(images), *dry[name].shape[1:])
            merged[name][clean], merged[name][rainy] = dry[name], wet[name]
        return merged

    def _nothing(self, images):
        config = self.detection_module.config
        return {"logits": images.new_zeros(0, config.num_queries, config.num_labels),
                "pred_boxes": images.new_zeros(0, config.num_queries, 4)}

    def clean_features(self, images, feature_level):
        """See utils.networks.rtdetr.clean_features."""
        return clean_features(self.detection_module, images, feature_level)

    @property
    def rtdetr(self):
        """The RT-DETR of clean images; every wrapper of this project has it under this name."""
        return self.detection_module

    @property
    def model_args(self):
        """What is needed to build this module again, as plain data."""
        args = {"rain_detector": self.rain_detector.model_args, "rain_threshold": self.rain_threshold,
                "gate": self.gate, "derain_scale": self.derain_scale,
                "detector": self.detection_module.config.to_dict()}
        if self.derain_module is not None:
            args |= {"n_feats": self.derain_module.n_feats, "n_resblocks": self.derain_module.n_resblocks}
        return args

    def save_pretrained(self, folder):
        """Write the whole pipeline: rain_detector.pt, spdnet.pt or rainy_detector/, rtdetr/, conditional.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_rain_detector(self.rain_detector, folder / "rain_detector.pt")
        self.detection_module.save_pretrained(folder / "rtdetr")
        if self.derain_module is not None:
            checkpoint.save(self.derain_module.state_dict(), folder / "spdnet.pt")
        else:
            self.rainy_detector.save_pretrained(folder / "rainy_detector")
        settings = {"rain_threshold": self.rain_threshold, "derain_scale": self.derain_scale,
                    "rainy_branch": "spdnet" if self.derain_module is not None else "detector"}
        report.write_json(folder / "conditional.json", settings)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", gate="hard", constant="folder"):
        """Read what `save_pretrained` wrote, in eval mode, the detector frozen; UserError that names `constant`."""
        folder = Path(folder)
        settings = checkpoint.load_settings(
            folder / "conditional.json", ("rainy_branch", "rain_threshold", "derain_scale"), constant,
            "give the folder pipeline/ that Training_Conditional.py (or save_pretrained) wrote")
        branch = {"spdnet_path": folder / "spdnet.pt"} if settings["rainy_branch"] == "spdnet" else {
            "rainy_detector_name": str(folder / "rainy_detector")}
        return load_conditional_model(folder / "rain_detector.pt", str(folder / "rtdetr"), **branch, device=device,
                                      rain_threshold=settings["rain_threshold"], gate=gate,
                                      derain_scale=settings["derain_scale"])


def parted(mask):
    """(B,) bool -> where it is True, where it is False: int64 indices on its device; a GPU is waited for once."""
    values = mask.tolist()
    return [sent(torch.tensor([i for i, value in enumerate(values) if value == wanted], dtype=torch.int64), mask.device)
            for wanted in (True, False)]


def threshold_of(rain_detector, rain_threshold):
    """-> the threshold to use: the given one, or the rain detector's own for None; UserError unless a probability."""
    require_threshold(rain_threshold)
    return rain_detector.operating_threshold.item() if rain_threshold is None else float(rain_threshold)


def require_threshold(rain_threshold):
    """UserError unless RAIN_THRESHOLD is a probability or None."""
    if rain_threshold is None:
        return
    try:
        value = float(rain_threshold)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"RAIN_THRESHOLD = {rain_threshold!r}: choose a probability in [0, 1], or None for the one "
                        "that Training_RainDetector.py chose")


def require_same_outputs(one, other, constant="RAINY_BRANCH"):
    """UserError unless two detectors answer with the same classes and the same number of queries."""
    one, other = rtdetr_of(one), rtdetr_of(other)
    if id2label_of(one) != id2label_of(other):
        raise UserError(f"{constant}: the detector for rainy images has other classes than the one for clean images")
    if one.config.num_queries != other.config.num_queries:
        raise UserError(f"{constant}: the detector for rainy images has {other.config.num_queries} queries, the one "
                        f"for clean images {one.config.num_queries}")


def load_rainy_detector(name, device="cpu", constant="RAINY_BRANCH", base=None):
    """-> a frozen detector for rainy images: a folder of Training_FeatureDerain.py, an adapter of
    Training_WeatherAdapter.py folded into `base`, the detector of clean images, else see load_rtdetr."""
    if adapter.is_adapter(name):
        if base is None:
            raise UserError(f"{constant} = '{name}' is an adapter, which needs the detector that it was trained for")
        return adapter.fold(base, name, constant).to(device)
    if (Path(name) / feature_derain.SETTINGS).is_file():
        return freeze.freeze(FeatureDerainRTDETR.from_pretrained(name, device, constant))
    return freeze.freeze(load_rtdetr(name, device=device, constant=constant))


def learnt_size(name, constant):
    """-> side of the images that a detector has learnt from, None where nothing says it (or it is on the hub).

    Args:
        name: a folder of save_pretrained or of Training_FeatureDerain.py, an adapter's file, or a hub id; constant: the
            script's for it, for messages.
    """
    if adapter.is_adapter(name):
        return adapter.read(name, constant)[1].get("image_size")
    return trained_size(name) or trained_size(Path(name) / "rtdetr")  # of a folder of Training_FeatureDerain.py


def learnt_sizes(cfg, constants):
    """-> {constant: `learnt_size` of what it names}, of a script's constants that are not empty."""
    return {constant: learnt_size(getattr(cfg, constant), constant) for constant in constants if getattr(cfg, constant)}


def load_conditional_model(rain_detector_path, rtdetr_name, spdnet_path=None, rainy_detector_name=None, device="cpu",
                           rain_threshold=0.5, gate="hard", derain_scale=1.0):
    """Build the conditional model from files, in eval mode, its detectors frozen.

    Args:
        spdnet_path or rainy_detector_name: exactly one of them, the branch of rainy images.
    Raises:
        UserError: naming the constant whose file is missing or does not fit.
    """
    rain_detector = load_rain_detector(rain_detector_path)
    rtdetr = freeze.freeze(load_rtdetr(rtdetr_name))
    spdnet = None if spdnet_path is None else load_spdnet(spdnet_path, constant="SPDNET_MODEL_PATH")
    rainy = None if rainy_detector_name is None else load_rainy_detector(rainy_detector_name, base=rtdetr)
    return ConditionalRainRobustRTDETR(rain_detector, spdnet, rtdetr, rain_threshold, gate, derain_scale,
                                       rainy).to(device).eval()
