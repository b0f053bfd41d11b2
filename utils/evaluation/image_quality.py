"""Image quality: PSNR, SSIM and LPIPS of restored images against their clean twins."""

import warnings

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import AlexNet_Weights

from utils import checkpoint, freeze
from utils.losses import ssim
from utils.transfer import sent

_LUMA = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1)  # MATLAB's rgb2ycbcr

_TINY = 1e-6  # of DISTS: slopes of less than a thousandth count as none


def luma(images):
    """Y of MATLAB's rgb2ycbcr: (B, 3, H, W) in [0, 1] -> (B, 1, H, W) float64 in [16, 235].

    The de-raining literature measures on this channel; scores on RGB read about 1 to 2 dB lower.
    """
    return (images.double() * sent(_LUMA, images.device)).sum(1, keepdim=True) + 16


def psnr(images, targets, peak):
    """Peak signal-to-noise ratio per image in dB: (B, C, H, W) twice, values in [0, peak] -> (B,) float64."""
    error = (images.double() - targets.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error.clamp(min=1e-12))


def image_quality(images, targets):
    """-> {"psnr", "ssim", "psnr_y", "ssim_y"}: (B,) each, on RGB in [0, 1] and on MATLAB's Y (peak 255).

    SSIM after Wang et al. 2004 (11x11 Gaussian, sigma 1.5).
    """
    images, targets = images.double().clamp(0, 1), targets.double()
    y, y_target = luma(images), luma(targets)
    return {"psnr": psnr(images, targets, 1.0), "ssim": ssim(images, targets, data_range=1.0),
            "psnr_y": psnr(y, y_target, 255.0),
            "ssim_y": ssim(y, y_target, data_range=255.0)}


def quality_by_protocol(images, targets):
    """PSNR and SSIM as three communities measure them; figures of one protocol say nothing beside those of another.

    Args:
        images, targets: (B, 3, H, W) in [0, 1], sides of at least 11 pixels.
    Returns:
        {"psnr_y", "ssim_y": PReNet's (result cut to 8 bits, Y of MATLAB's rgb2ycbcr as it is), "psnr_y8", "ssim_y8":
        MPRNet's and Restormer's (result and Y rounded to 8 bits), "psnr", "ssim": on RGB, result rounded: (B,) each}.
    """
    images, targets = images.double().clamp(0, 1), targets.double()
    cut, rounded = (images * 255 + 1e-6).floor() / 255, (images * 255).round() / 255  # 1e-6: 8 bits are no loss
    found = {}
    for end, y, y_target in (("y", luma(cut), luma(targets)), ("y8", luma(rounded).round(), luma(targets).round())):
        found |= {f"psnr_{end}": psnr(y, y_target, 255.0),
                  f"ssim_{end}": ssim(y, y_target, data_range=255.0)}
    return found | {"psnr": psnr(rounded, targets, 1.0),
                    "ssim": ssim(rounded, targets, data_range=1.0)}


def texture_similarity(images, targets, levels=4):
    """How alike details are in strength and place, blur being the usual loss; 1 for equal images, else less.

    The two terms of DISTS (Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", TPAMI
    2020, equations 4 and 5), taken of the slopes in a pyramid of halvings in the place of VGG's features, so that no
    weights are needed.

    Args:
        images, targets: (B, 3, H, W) in [0, 1], sides of at least 2 pixels; smaller levels than that are left out.
    Returns:
        (B,) float64.
    """
    images, targets = images.double().clamp(0, 1), targets.double()
    found = []
    for _ in range(levels):
        for axis in (-1, -2):
            a, b = (one.diff(dim=axis).abs().flatten(2) for one in (images, targets))  # (B, 3, pixels)
            mean_a, mean_b = a.mean(2), b.mean(2)
            covariance = ((a - mean_a[..., None]) * (b - mean_b[..., None])).mean(2)
            texture = (2 * mean_a * mean_b + _TINY) / (mean_a**2 + mean_b**2 + _TINY)
            structure = (2 * covariance + _TINY) / (a.var(2, correction=0) + b.var(2, correction=0) + _TINY)
            found.append((texture + structure).mean(1) / 2)
        if min(images.shape[-2:]) < 4:
            break
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
    return torch.stack(found).mean(0)


def bootstrap_interval(values, level=0.95, resamples=2000, seed=0):
    """-> (low, high), the percentile bootstrap interval of the mean of `values` (Efron 1979); None, None for one value.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return None, None
    means = np.random.default_rng(seed).choice(values, (resamples, len(values))).mean(1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def means_and_intervals(scores):
    """{metric: [value per image]} -> {metric: mean, metric_low, metric_high: `bootstrap_interval`}."""
    values = {}
    for metric, found in scores.items():
        low, high = bootstrap_interval(found)
        values |= {metric: float(np.mean(found)), f"{metric}_low": low, f"{metric}_high": high}
    return values


def full_quality(images, targets, lpips_model=None):
    """`image_quality`, the mean squared error on RGB in [0, 1], and LPIPS where its network is given.

    Args:
        images, targets: (B, 3, H, W) in [0, 1]; lpips_model: from `load_lpips`, or None.
    Returns:
        {"psnr", "ssim", "psnr_y", "ssim_y", "mse" and perhaps "lpips": (B,)}.
    """
    found = image_quality(images, targets)
    found["mse"] = (images.double().clamp(0, 1) - targets.double()).square().flatten(1).mean(1)
    if lpips_model is not None:
        with torch.no_grad():
            found["lpips"] = lpips_model(images.float().clamp(0, 1), targets.float(), normalize=True).flatten()
    return found


def load_lpips(weights, device="cpu"):
    """LPIPS 0.1 on AlexNet (Zhang et al. 2018), lower is better; its linear weights come with the package `lpips`.

    Args:
        weights: "imagenet" (torchvision downloads AlexNet, 233 MB, once), or a local file with torchvision's alexnet
            state dict.
    Raises:
        UserError: not reachable, or a file that does not fit; names LPIPS_WEIGHTS.
    """
    state = checkpoint.torchvision_state(weights, AlexNet_Weights.IMAGENET1K_V1, "LPIPS_WEIGHTS",
                                         "to \"\" to leave LPIPS out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision for AlexNet by a parameter of old
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # lpips cuts AlexNet into slice1..slice5 and keeps the layers' numbers: slice2.3.weight is features.3.weight
    own = {name: f"features.{name.split('.', 1)[1]}" for name in model.net.state_dict()}
    checkpoint.load_into(model.net, {name: state[theirs] for name, theirs in own.items() if theirs in state},
                         f"LPIPS_WEIGHTS = '{weights}'")
    return freeze.freeze(model).to(device)
