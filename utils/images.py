"""Images as tensors: the one place where bytes become floats, and back; and where a network makes them smaller."""

import torch
import torch.nn.functional as F

from utils.transfer import sent


def to_floats(images, device=None):
    """(..., 3, H, W) uint8 -> float32 in [0, 1], on `device` where one is given (moved as bytes: a quarter of the
    traffic). TypeError for anything but bytes, which would be divided a second time."""
    if images.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images.dtype}")
    if device is not None:
        images = sent(images, device)
    return images.float().div_(255)


def to_bytes(images):
    """(..., 3, H, W) float in [0, 1] -> uint8, rounded; values outside are cut."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte()


def antialiased(images, size):
    """(B, C, H, W) -> (B, C, *size), bilinear with antialiasing, differentiable.

    Making smaller is in an exported file two matrix products, equal to rounding: OpenVINO and TensorRT know no
    antialiasing resize (OpenVINO leaves the antialiasing out, without a word). H and W are fixed in such a file.
    """
    exporting = torch.compiler.is_exporting()
    if not exporting or all(wanted >= length for length, wanted in zip(images.shape[-2:], size, strict=True)):
        return F.interpolate(images, size, mode="bilinear", antialias=not exporting, align_corners=False)
    rows, columns = (torch.tensor(_shares(length, wanted), dtype=images.dtype, device=images.device)
                     for length, wanted in zip(images.shape[-2:], size, strict=True))
    return rows @ images @ columns.T


def _shares(length, wanted):
    """-> `wanted` rows of `length` shares: what each output takes of each input, a triangle as wide as the step."""
    step = length / wanted
    width = max(step, 1.0)
    rows = []
    for centre in ((index + 0.5) * step for index in range(wanted)):
        row = [max(0.0, 1 - abs(at + 0.5 - centre) / width) for at in range(length)]
        rows.append([share / sum(row) for share in row])
    return rows
