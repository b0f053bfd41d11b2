"""Rain detector: one logit per image, cheap enough to run in front of every detection.

MobileNetV3-Small features (Howard et al., "Searching for MobileNetV3", ICCV 2019; torchvision's) and a head of two
layers. It owns its resize to 224 x 224 and its ImageNet normalisation, so that callers pass what the detector gets.
Its probability is calibrated by a temperature (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017), and
it carries the threshold that its training chose for a wanted rate of false alarms.
"""

import torch
from torch import nn
from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

from utils import checkpoint
from utils.images import antialiased

SIDE = 224  # of the square that the network sees, as in ImageNet training
_FEATURES = 576  # channels of MobileNetV3-Small's last map


class RainDetector(nn.Module):
    """Is it raining?

    Args:
        hidden: width of the head's first layer; dropout: between its two layers.
    """

    def __init__(self, hidden=128, dropout=0.2):
        super().__init__()
        self.model_args = {"hidden": hidden, "dropout": dropout}
        self.features = mobilenet_v3_small(weights=None).features
        for module in self.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # torchvision's 0.01 lags behind a short training by hundreds of steps
        self.head = nn.Sequential(nn.Linear(_FEATURES, hidden), nn.Hardswish(), nn.Dropout(dropout),
                                  nn.Linear(hidden, 1))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("operating_threshold", torch.tensor(0.5))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # 1.6 times the training speed on a CPU

    def forward(self, images):
        """(B, 3, H, W) RGB in [0, 1], any size -> (B,) logit of "rainy", not yet calibrated."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = antialiased(images, (SIDE, SIDE))
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.head(self.features(images).mean((2, 3))).squeeze(1)  # (B, 576) -> (B,)

    def logit(self, images):
        """(B, 3, H, W) in [0, 1] -> (B,) calibrated logit, float32; differentiable."""
        return self(images).float() / self.temperature

    def probability(self, images):
        """(B, 3, H, W) in [0, 1] -> (B,) calibrated probability of rain; differentiable."""
        return torch.sigmoid(self.logit(images))

    @torch.no_grad()
    def predict(self, images, threshold=0.5):
        """Decide per image.

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; threshold: rainy from this probability on, None for the one that
                the training chose (`operating_threshold`).
        Returns:
            is_rainy (B,) bool, probability (B,) float.
        """
        probability = self.probability(images)
        return probability >= (self.operating_threshold if threshold is None else threshold), probability


def new_rain_detector(backbone_weights="imagenet", **model_args):
    """A rain detector that is still to be trained.

    Args:
        backbone_weights: "imagenet" (torchvision downloads 10 MB once), "" for random ones, or a local file with
            torchvision's state dict of mobilenet_v3_small.
    Raises:
        UserError: not reachable, or a file that does not fit; names BACKBONE_WEIGHTS.
    """
    detector = RainDetector(**model_args)
    if not backbone_weights:
        return detector
    state = checkpoint.torchvision_state(backbone_weights, MobileNet_V3_Small_Weights.IMAGENET1K_V1,
                                         "BACKBONE_WEIGHTS", "to \"\" to train from random weights")
    features = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    checkpoint.load_into(detector.features, features, f"BACKBONE_WEIGHTS = '{backbone_weights}'")
    return detector


def save_rain_detector(detector, path):
    """Write weights, calibration and what is needed to build the network again."""
    checkpoint.save({"model": detector.state_dict(), "model_args": detector.model_args}, path)


def load_rain_detector(path, device="cpu", constant="RAIN_DETECTOR_PATH"):
    """-> the RainDetector of a file that `save_rain_detector` wrote, in eval mode.

    Raises:
        UserError: the file is missing or holds something else; names `constant`.
    """
    return checkpoint.load_network(path, RainDetector, ("hidden", "dropout"), constant, "Training_RainDetector.py",
                                   device)

