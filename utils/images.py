"""Images as tensors: the one place where bytes become floats, and back."""

import torch

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
