"""Detections and masks of RF-DETR at the size of the original images, and COCO's scores of them.

Masks are computed for the chosen detections only, stretched one at a time and only where they are, and kept as run
lengths: a hundred masks of a photograph of twelve megapixels never exist at once.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from pycocotools import mask as rle

from rfdetr.masks import confined, mask_logits
from utils.boxes import MAX_DETECTIONS, corner_and_extent, decode
from utils.datasets import loaders
from utils.evaluation.coco import coco_scores, ground_truth
from utils.images import to_floats
from utils.transfer import sent

KINDS = {"box": "bbox", "mask": "segm"}  # what is scored, and how COCO calls it


@torch.no_grad()
def predict_batch(model, images, sizes, top=MAX_DETECTIONS, masks=True, rows=None):
    """Detect, in one batch.

    Args:
        model: rfdetr.model.RFDETR in eval mode; images: (B, 3, S, S) float RGB in [0, 1] on its device.
        sizes: [(H, W), ...] of the original images; top: detections per image at most.
        masks: with masks, if the model has a mask head.
        rows: rows of the class head that count, None for all; the others are dropped before the `top` best are chosen.
    Returns:
        per image {"scores": (n,), "labels": (n,) rows of the head, "boxes": (n, 4) xyxy pixels of the original image,
        "queries": (n,)}, best first, and, with masks, "mask_logits": (n, S/4, S/4) float32, confined to the boxes
        where the head wants that (see `full_masks`); all on the CPU, for which a GPU is waited for twice.
    """
    outputs = model(images)
    logits = outputs["logits"]
    if rows is not None:
        rows = torch.tensor(sorted(rows))
        logits = logits[..., sent(rows, logits.device)]
    found = decode(logits, outputs["boxes"], sizes, top)
    if rows is not None:
        for one in found:
            one["labels"] = rows[one["labels"]]
    if masks and "pixel_embedding" in outputs and found:
        queries = torch.stack([one["queries"] for one in found])  # (B, n)
        image = torch.arange(len(found))[:, None].expand_as(queries)
        image, query = sent(torch.stack([image.flatten(), queries.flatten()]), logits.device)  # (B * n,) each
        logits = mask_logits(outputs, image, query, [len(one["queries"]) for one in found])
        if model.mask_head.confine:
            logits = confined(logits, outputs["boxes"][image, query])
        logits = logits.cpu()
        for one, own in zip(found, logits.split(queries.shape[1]), strict=True):
            one["mask_logits"] = own
    return found


# ---- masks at the original size --------------------------------------------------------------------------------

class Part(NamedTuple):
    """A mask (bool) of the part of an image that holds its object; outside of it the mask is empty."""

    rows: slice
    columns: slice
    inside: torch.Tensor  # (len of rows, len of columns)


def parts(logits, size):
    """Where logits (n, h, w) on the CPU, stretched bilinearly to size (H, W), are above 0.

    Equal to F.interpolate(..., mode="bilinear") > 0, but only the part around each object is computed.

    Returns:
        iterator of n Parts of the (H, W) image.
    """
    positive = logits > 0
    spans = zip(_spans(positive.any(2), size[0]), _spans(positive.any(1), size[1]), strict=True)
    for one, ((top, bottom), (left, right)) in zip(logits, spans, strict=True):
        y, x = _taps(top, bottom, size[0], one.shape[0]), _taps(left, right, size[1], one.shape[1])
        rows = torch.lerp(one[y.low], one[y.high], y.share[:, None])  # (bottom - top, w)
        inside = torch.lerp(rows[:, x.low], rows[:, x.high], x.share) > 0  # (bottom - top, right - left)
        yield Part(slice(top, bottom), slice(left, right), inside)


def _spans(hit, length):
    """-> for each of hit (n, cells) bool: (first, last + 1) of the `length` pixels along that axis that can be above 0
    where some cells are; (0, 0) without any."""
    hit = hit.numpy()
    cells = hit.shape[1]
    step = length / cells
    # a neighbour of a positive value can be above 0 up to one step away from that value's centre
    first = np.maximum(0, ((hit.argmax(1) - 0.5) * step).astype(int) - 1)
    last = np.minimum(length, ((cells - hit[:, ::-1].argmax(1) + 0.5) * step).astype(int) + 2)
    some = hit.any(1)
    return list(zip((first * some).tolist(), (last * some).tolist(), strict=True))


class _Taps(NamedTuple):
    """Linear interpolation along one axis: every pixel is (1 - share) of the cell `low` and share of the cell `high`,
    (n,) each."""

    low: torch.Tensor
    high: torch.Tensor
    share: torch.Tensor


@functools.lru_cache(maxsize=4096)  # views: in small images the same spans come again and again
def _taps(first, last, length, cells):
    """Pixels first .. last - 1 of an axis of `length` pixels, stretched from `cells` cells -> _Taps."""
    return _Taps(*(values[first:last] for values in _axis_taps(length, cells)))


@functools.lru_cache(maxsize=64)  # the hundred masks of an image, and often all images, have the same axes
def _axis_taps(length, cells):
    centre = ((torch.arange(length) + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    low = centre.floor().long()
    return _Taps(low, (low + 1).clamp(max=cells - 1), centre - low)


def full_masks(logits, size):
    """Mask logits (n, h, w) on the CPU -> (n, H, W) bool, stretched to size (H, W)."""
    masks = torch.zeros(len(logits), *size, dtype=torch.bool)
    for mask, part in zip(masks, parts(logits, size), strict=True):
        mask[part.rows, part.columns] = part.inside
    return masks


def run_lengths(found, size, within=None):
    """Masks of one image's detections (of `predict_batch`) -> [{"size": [H, W], "counts": str}, ...], COCO's RLE.

    Detections of one query share one mask, which is encoded once.

    Args:
        size: (H, W) of what the detector saw; within: None, or (H, W, top, left) of the larger image from which that
            was cut out: the masks are then of the larger one.
    """
    height, width, top, left = within or (*size, 0, 0)
    place = {query: index for index, query in enumerate(found["queries"].tolist())}  # of one detection of each query
    codes = {}
    for query, part in zip(place, parts(found["mask_logits"][list(place.values())], size), strict=True):
        pixels = np.zeros((height, width), np.uint8, order="F")
        pixels[top:top + size[0], left:left + size[1]][part.rows, part.columns] = part.inside.numpy()
        code = rle.encode(pixels)
        codes[query] = {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
    return [codes[query] for query in found["queries"].tolist()]


# ---- a data set ------------------------------------------------------------------------------------------------

def detect(model, loader, device, masks=False, name="evaluating"):
    """Detections of a whole validation loader.

    Args:
        model: RFDETR in eval mode; loader: from loaders.validation_loader over a RoboflowDataset, whose `category_of`
            says which rows count; under torchrun every rank sees its share, and all get the whole result.
    Returns:
        [{"image_id", "label": row, "bbox" [x, y, w, h] pixels, "score", with masks "segmentation": RLE}, ...].
    """
    rows = list(loader.dataset.category_of)

    def answers(batch):
        found, images = [], to_floats(batch["images"], device)
        results = predict_batch(model, images, batch["sizes"], masks=masks, rows=rows)
        for image_id, size, result in zip(batch["image_ids"], batch["sizes"], results, strict=True):
            boxes = corner_and_extent(result["boxes"]).tolist()
            entries = [{"image_id": image_id, "label": label, "bbox": box, "score": score} for label, box, score in
                       zip(result["labels"].tolist(), boxes, result["scores"].tolist(), strict=True)]
            if "mask_logits" in result:
                for entry, code in zip(entries, run_lengths(result, tuple(size)), strict=True):
                    entry["segmentation"] = code
            found += entries
        return found
    return gather_object([one for several in loaders.each(answers, loader, name) for one in several])


class Evaluation(NamedTuple):
    """COCO's scores of a data set, AP in [0, 1], -1 where there is no such object."""

    metrics: dict     # {"box/mAP", "box/AP50", "box/AP75", "box/AP_small", ..., with masks the same of "mask/"}
    per_class: list   # [{"class": name, "box": AP, with masks "mask": AP}, ...] in the order of the category ids
    detections: list  # of `detect`


def evaluate(model, loader, device, masks=False, truth=None, name="evaluating"):
    """COCO's scores of boxes and masks at the original image size.

    Args:
        model, loader: see `detect`; masks: score masks as well (the model has a mask head).
        truth: ground_truth of the loader's annotation file, None to read it.
    Returns:
        Evaluation.
    """
    data = loader.dataset
    truth = truth or ground_truth(data.annotations)
    found = detect(model, loader, device, masks, name)
    metrics, table = {}, {}
    for kind, iou_type in list(KINDS.items())[:1 + bool(masks)]:
        scores = coco_scores(truth, found, data.category_of, data.image_ids, iou_type)
        for category, value in scores.pop("per_class").items():
            table.setdefault(category, {"class": category})[kind] = value
        metrics |= {f"{kind}/{metric}": value for metric, value in scores.items()}
    return Evaluation(metrics, list(table.values()), found)
