"""What detect.py draws: boxes, masks and numbers on a frame, a line about the gate, panels side by side."""

import torch
from PIL import Image
from pycocotools import mask as rle

from utils import visualize


def draw(cfg, image, result, id2label):
    """-> PIL image: vanilla (COMPARE) | chosen | what the detector saw (SHOW_DERAINED), each of the image's size."""
    titles = {"spdnet": cfg.DERAIN}  # MODEL = "spdnet" is whatever DERAIN names
    panels = [draw_result(image, titles.get(name, name), one, id2label) for name, one in result.items()]
    if cfg.SHOW_DERAINED:
        panels.append(draw_seen(result[cfg.MODEL], panels[0].size))
    return side_by_side(panels)


def draw_result(image, name, one, id2label):
    """One model's detections on the image, with a line about its gate and their number.

    Args:
        image: (3, H, W) uint8; name: of the model; one: see detect.detect_frames; id2label: {label: class name}.
    Returns:
        PIL image of the image's size.
    """
    gate = "" if one["branch"] is None else f"rain {one['rain']:.2f}, {one['branch']} branch, "
    what = image, one["boxes"], one["labels"], id2label
    notes = [f" #{number}" if number else "" for number in one["tracks"].tolist()] if "tracks" in one else None
    if one.get("masks"):
        masks = torch.from_numpy(rle.decode(one["masks"])).permute(2, 0, 1)  # (n, H, W)
        picture = visualize.draw_masks(*what, masks, one["scores"], notes=notes)
    else:
        picture = visualize.draw_boxes(*what, one["scores"], notes=notes)
    return with_banner(picture, f"{name}: {gate}{len(one['boxes'])} objects")


def draw_seen(one, size):
    """The de-rained image that the detector saw, enlarged to `size` (width, height). -> PIL image"""
    picture = visualize.to_pil(one["seen"]).resize(size, Image.Resampling.BICUBIC)
    return with_banner(picture, "what the detector saw")


def side_by_side(panels):
    """PIL images of one size -> one PIL image, from left to right."""
    if len(panels) == 1:
        return panels[0]
    width, height = panels[0].size
    page = Image.new("RGB", (width * len(panels), height))
    for i, panel in enumerate(panels):
        page.paste(panel, (i * width, 0))
    return page


def with_banner(picture, text):
    """Write a line onto a dark strip in the lower left corner, in place. -> the picture"""
    strip, _ = visualize.lettering(text, max(11, picture.height // 36), visualize.PAPER, visualize.INK, margin=3)
    picture.paste(strip, (0, picture.height - strip.height))
    return picture
