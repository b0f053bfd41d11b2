"""Losses that more than one script uses. Every one runs in float32, whatever autocast says."""

from contextlib import contextmanager

import pytorch_msssim
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

from utils import checkpoint, freeze
from utils.transfer import sent

_SSIM_WINDOW = pytorch_msssim.SSIM(channel=1).win  # (1, 1, 1, 11)
RAIN_MASK_FULL = 0.2  # difference to the clean twin (51 of 255 levels) from which on a mask should be 1


@contextmanager
def float32(device_type):
    """Switch autocast off: squared pixels and box losses lose too much in half precision."""
    with torch.autocast(device_type, enabled=False):
        yield


def count_over_ranks(count, device, least=1.0):
    """A count of this rank's batch -> the mean over all ranks, which have `least` together at least: float, a Tensor
    under torchrun or where `count` is one (a GPU is not waited for).

    DDP averages the ranks' gradients, so that losses divided by this add up to one batch of all ranks' images.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count.clamp(min=least) if isinstance(count, torch.Tensor) else max(float(count), least)
    total = torch.zeros((), device=device) + count
    torch.distributed.all_reduce(total)
    return total.clamp(min=least) / torch.distributed.get_world_size()


def feature_consistency(features, targets):
    """Relative squared error of feature maps, averaged over levels.

    Per image and level |f - t|^2 / |t|^2, so that levels of different size and scale count alike; 0 where the
    de-rained image has the features of its clean twin, about 1 where it has none of them.

    Args:
        features, targets: sequences of (B, C, h, w), one per level; targets carry no gradient.
    Returns:
        scalar Tensor.
    """
    with float32(features[0].device.type):
        terms = []
        for feature, target in zip(features, targets, strict=True):
            feature, target = feature.float().flatten(1), target.detach().float().flatten(1)  # (B, C*h*w)
            terms.append((feature - target).square().sum(1) / target.square().sum(1).clamp(min=1e-6))
        return torch.stack(terms).mean()


def rain_mask_loss(masks, rainy, clean):
    """Cross entropy of rain masks against what rain really changed, averaged over pixels and then over scales.

    The target is the mean absolute difference of the colours, averaged over a mask's pixel, in shares of
    RAIN_MASK_FULL: 0 where the image is its clean twin's equal.

    Args:
        masks: sequence of (B, 1, h, w) in (0, 1), one per scale; rainy, clean: (B, 3, H, W) in [0, 1].
    Returns:
        scalar Tensor.
    """
    with float32(rainy.device.type):
        change = (rainy.float() - clean.float()).abs().mean(1, keepdim=True) / RAIN_MASK_FULL  # (B, 1, H, W)
        return torch.stack([_cross_entropy(mask.float(), F.adaptive_avg_pool2d(change, mask.shape[-2:]).clamp(max=1))
                            for mask in masks]).mean()


def _cross_entropy(shares, targets):
    """Binary cross entropy; NaN where shares are no numbers, for which torch raises (on a GPU it ends the process)."""
    finite = torch.isfinite(shares)
    entropy = F.binary_cross_entropy(torch.where(finite, shares, 0.5), targets)
    return torch.where(finite.all(), entropy, float("nan"))


def pixel_l1(images, targets):
    """Mean absolute difference of images in [0, 1]: scalar Tensor."""
    with float32(images.device.type):
        return F.l1_loss(images.float(), targets.float())


def charbonnier(images, targets, eps=1e-3):
    """Mean of sqrt(error^2 + eps^2), an L1 that is smooth at zero (Charbonnier et al. 1994), of images in [0, 1]:
    scalar Tensor, eps for equal images."""
    with float32(images.device.type):
        return ((images.float() - targets.float()).square() + eps**2).sqrt().mean()


def psnr_loss(images, targets):
    """10 log10 of each image's mean squared error: minus its PSNR in dB (Chen et al. 2022), averaged; scalar Tensor.

    Its gradient grows as the error falls; equal images count as 80 dB.
    """
    with float32(images.device.type):
        error = (images.float() - targets.float()).square().flatten(1).mean(1)
        return 10 * (error + 1e-8).log10().mean()


def fft_l1(images, targets):
    """Mean absolute difference of the real and imaginary parts of the spectra (orthonormal, so that it has the size of
    `pixel_l1`): scalar Tensor. Cho et al., "Rethinking Coarse-to-Fine Approach in Single Image Deblurring", ICCV 2021.
    """
    with float32(images.device.type):
        return torch.view_as_real(torch.fft.rfft2(images.float() - targets.float(), norm="ortho")).abs().mean()


def staged_mse(stages, target):
    """Mean squared error of every stage's image against the target, summed (SPDNet supervises all three stages).

    Args:
        stages: sequence of (B, 3, H, W) in [0, 1]; target: (B, 3, H, W) in [0, 1].
    """
    with float32(target.device.type):
        return sum(F.mse_loss(stage.float(), target.float()) for stage in stages)


def ssim(images, targets, data_range, size_average=False):
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 x 11 pixels, sigma 1.5.

    Args:
        images, targets: (B, C, H, W) in [0, data_range], sides of at least 11 pixels.
    Returns:
        (B,), or the mean as a scalar with `size_average`.
    """
    window = sent(_SSIM_WINDOW, images.device).repeat(images.shape[1], 1, 1, 1)  # pytorch_msssim's own waits for a GPU
    return pytorch_msssim.ssim(images, targets, data_range, size_average, win=window)


def ssim_loss(images, targets):
    """1 - SSIM of images in [0, 1], each side at least 11 pixels: scalar Tensor in [0, 2]."""
    with float32(images.device.type):
        return 1 - ssim(images.float(), targets.float(), 1.0, size_average=True)


class PerceptualLoss(nn.Module):
    """Squared error of VGG16's third-block features (Johnson et al. 2016): images in [0, 1] -> scalar Tensor.

    VGG is frozen and sees ImageNet-normalised images, as in its own training; 0 for equal images.

    Args:
        weights: "imagenet" (torchvision downloads 528 MB once), or a local file with torchvision's vgg16 state dict.
    Raises:
        UserError: not reachable, or a file that does not fit; names PERCEPTUAL_WEIGHTS.
    """

    def __init__(self, weights="imagenet"):
        super().__init__()
        state = checkpoint.torchvision_state(weights, VGG16_Weights.IMAGENET1K_V1, "PERCEPTUAL_WEIGHTS",
                                             "set PERCEPTUAL_WEIGHT = 0 to train without it")
        self.features = vgg16(weights=None).features[:16]
        state = {name.removeprefix("features."): value for name, value in state.items()}
        own = self.features.state_dict()  # the file's later blocks and its classifier are not needed
        checkpoint.load_into(self.features, {name: state[name] for name in own if name in state},
                             f"PERCEPTUAL_WEIGHTS = '{weights}'")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        freeze.freeze(self)

    def forward(self, images, targets):
        with float32(images.device.type):
            found = self.features((images.float() - self.mean) / self.std)
            with torch.no_grad():
                wanted = self.features((targets.float() - self.mean) / self.std)
            return F.mse_loss(found, wanted)
