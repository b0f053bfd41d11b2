"""Masks as annotation files have them, checked and turned into compressed RLE counts, about a hundred bytes each, and
masks at the size that the network sees."""

import numpy as np
import torch
from pycocotools import mask as rle


def mask_code(segmentation, height, width):
    """-> an annotation's mask as compressed RLE counts (bytes), None where it has none or one without pixels.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], {"size", "counts": str or list of int}, or nothing.
    Raises:
        ValueError: that cannot be a mask of a (height, width) image; the text says why.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return _rle_code(segmentation, height, width)
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation):
        raise ValueError("it is neither a list of polygons nor RLE")
    return _polygons_code(segmentation, height, width)


def _rle_code(segmentation, height, width):
    """`mask_code` of {"size", "counts"}, compressed (str) or not (list)."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != [height, width] or not all(type(side) is int for side in size):
        raise ValueError(f"its RLE has the size {size}, the image is {height} high and {width} wide")
    if isinstance(counts, list):
        if not all(type(n) is int and 0 <= n <= height * width for n in counts):
            raise ValueError(f"its RLE counts are not whole numbers from 0 to the image's {height * width} pixels")
        runs = np.array(counts, np.int64)
    elif isinstance(counts, str):
        runs = _runs(counts)
    else:
        raise ValueError("its RLE has no counts")
    if runs.sum() != height * width or (runs < 0).any():  # pycocotools would write beyond the image
        raise ValueError(f"its RLE covers {int(runs.sum())} pixels, the image has {height * width}")
    if not runs[1::2].sum():
        return None
    return counts.encode() if isinstance(counts, str) else rle.frPyObjects(segmentation, height, width)["counts"]


def _polygons_code(segmentation, height, width):
    """`mask_code` of [[x, y, x, y, ...], ...]."""
    far = 10 * max(height, width)  # pycocotools walks along every edge, pixel by pixel
    if any(isinstance(value, (list, dict)) for part in segmentation for value in part):
        raise ValueError("its polygon is a list of points [[x, y], ...]; COCO has plain numbers, [x, y, x, y, ...]")
    polygons = [part for part in segmentation if len(part) >= 6]  # two points are no area
    for part in polygons:
        if len(part) % 2 or not all(isinstance(v, (int, float)) and -far <= v <= far for v in part):
            raise ValueError("its polygon is not a list of x, y in the image")
    if not polygons:
        return None
    merged = rle.merge(rle.frPyObjects(polygons, height, width))
    return merged["counts"] if rle.area(merged) else None


def _runs(counts):
    """COCO's string of compressed counts -> run lengths (n,) int64, checked; pycocotools itself trusts it.

    A character holds five bits of a number, lowest first, and whether more follow; from the fourth on, numbers are
    differences from the one before the last.
    """
    try:
        digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("its RLE string holds characters that no RLE has") from None
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("its RLE string is cut off or holds characters that no RLE has")
    last = (digits & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(digits.size) - np.repeat(starts, np.diff(np.append(starts, digits.size)))
    if place.max() > 6:
        raise ValueError("its RLE string holds a number that no image has")
    numbers = np.add.reduceat((digits & 31) << (5 * place), starts)
    numbers -= np.where(digits[last] & 16, 1 << (5 * (place[last] + 1)), 0)  # the sign bit
    numbers[1::2], numbers[2::2] = numbers[1::2].cumsum(), numbers[2::2].cumsum()
    return numbers


def masks_elsewhere(codes, images, corners):
    """-> how many of n masks do not fit their boxes: the extent of the mask and the box share less than half of what
    they cover together.

    Args:
        codes: of `mask_code`; images: entries of the annotation file; corners: (n, 4) xyxy pixels.
    """
    if not len(codes):
        return 0
    found = rle.toBbox([{"size": [image["height"], image["width"]], "counts": code}
                        for code, image in zip(codes, images, strict=True)]).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    sides = np.minimum(found[:, 2:], corners[:, 2:]) - np.maximum(found[:, :2], corners[:, :2])
    shared = sides.clip(min=0).prod(1)
    together = sum((one[:, 2:] - one[:, :2]).prod(1) for one in (found, corners)) - shared
    return int((shared < 0.5 * together).sum())


def stretched_masks(masks, size):
    """(N, H, W) bool -> (N, *size) bool, nearest pixel; a mask that would vanish keeps every pixel it touches."""
    if not len(masks) or tuple(masks.shape[-2:]) == tuple(size):
        return masks.new_zeros(len(masks), *size) if not len(masks) else masks
    masks = masks.as_subclass(torch.Tensor)
    result = torch.nn.functional.interpolate(masks[None].byte(), size, mode="nearest-exact")[0].bool()
    lost = ~result.flatten(1).any(1) & masks.flatten(1).any(1)
    if lost.any():
        result[lost] = torch.nn.functional.adaptive_max_pool2d(masks[lost].float(), size) > 0
    return result
