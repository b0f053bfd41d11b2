"""Small objects in large images: the image is also seen in overlapping tiles, and what several views found is merged.

A detector sees every image stretched to one square, in which the small objects of a large photograph vanish. Tiles keep
them large; the whole image, seen as well, keeps the objects that no tile holds. Then the same object has been seen by
several views, whole or cut off at the edge of a tile.
"""

from typing import NamedTuple

import torch
from pycocotools import mask as rle

from utils.config import UserError

AGREE = 0.5       # IoU, in the region that both views saw, from which on two boxes are the same object
TWINS = 0.8       # the same within one view: a detector's two answers for one object, which it does not compare itself
INSIDE = 0.8      # share of a cut box that lies in another one, from which on it is a part of it
EDGE = 0.02       # of a tile's side: so near to its edge a box counts as cut


class View(NamedTuple):
    """A rectangle of the image, in its pixels."""

    left: int
    top: int
    right: int
    bottom: int


def require(tile, overlap):
    """UserError unless TILE and OVERLAP go together."""
    if tile < 0 or overlap < 0 or tile and 2 * overlap > tile:
        raise UserError(f"TILE = {tile}, OVERLAP = {overlap}: give pixels, with an overlap of at most half a tile, "
                        "such as 640 and 128; TILE = 0 for whole images alone")


def views(height, width, tile, overlap):
    """-> [View, ...] that cover the image, each of `tile` pixels per side where the image has so many, neighbours
    sharing at least `overlap` pixels; [] where one tile would hold all of it."""
    if max(height, width) <= tile:
        return []
    return [View(left, top, min(left + tile, width), min(top + tile, height))
            for top in _starts(height, tile, overlap) for left in _starts(width, tile, overlap)]


def _starts(side, tile, overlap):
    """-> first pixels of the tiles along a side, evenly spaced; the last one ends with the image."""
    gaps = max(0, -(-(side - tile) // (tile - overlap)))
    return [round(i * (side - tile) / gaps) for i in range(gaps)] + [max(0, side - tile)]


class _Found(NamedTuple):
    """Detections of all views together, best first."""

    boxes: torch.Tensor    # (n, 4) xyxy pixels of the image
    scores: torch.Tensor   # (n,)
    labels: torch.Tensor   # (n,)
    views: torch.Tensor    # (n, 4) the View of each
    numbers: torch.Tensor  # (n,) which view that is
    cut: torch.Tensor      # (n,) bool, touches an edge of its view that is not the image's


def merged(parts, height, width, top):
    """Detections of several views of an image -> those of the image, every object once.

    Two boxes of one class are the same object where they agree in the region that both views saw (of one view: where
    they nearly cover each other), or where one of them is cut off by its view and lies in the other view's. A box that
    no view cuts off stands for the object, the best one; where there is none, the pieces together do.

    Args:
        parts: [(View, {"boxes": (n, 4) xyxy pixels of the image, "scores", "labels": (n,), "masks": [RLE of the whole
            image, ...] where there are some}), ...]; height, width: of the image; top: detections at most.
    Returns:
        a dict of the same kind, best first.
    """
    found, order = _together(parts, height, width)
    same = _same(found)
    free = torch.ones(len(order), dtype=torch.bool)
    groups = []
    for i in torch.nonzero(~found.cut)[:, 0].tolist():  # best first
        if free[i]:
            free[i] = False
            free &= ~same[i]
            groups.append([i])
    for i in torch.nonzero(found.cut)[:, 0].tolist():
        if free[i]:
            groups.append(_pieces(i, same, free))
    groups = sorted(groups, key=lambda group: -found.scores[group[0]].item())[:top]
    best = torch.tensor([group[0] for group in groups], dtype=torch.int64)
    one = {"boxes": torch.stack([_hull(found.boxes[group]) for group in groups]) if groups else found.boxes,
           "scores": found.scores[best], "labels": found.labels[best]}
    if any("masks" in part for _, part in parts):
        masks = [mask for _, part in parts for mask in part["masks"]]
        one["masks"] = [joined([masks[order[i]] for i in group]) for group in groups]
    return one


def _together(parts, height, width):
    """-> (_Found, the place of each among the parts' detections one after the other)."""
    boxes, scores, labels = (torch.cat([part[key] for _, part in parts]) for key in ("boxes", "scores", "labels"))
    counts = torch.tensor([len(part["scores"]) for _, part in parts])
    rectangles = torch.tensor([view for view, _ in parts], dtype=torch.float32)
    numbers = torch.arange(len(parts)).repeat_interleave(counts)
    own = rectangles[numbers]  # (n, 4)
    near = EDGE * (own[:, 2:] - own[:, :2]).repeat(1, 2)  # (n, 4)
    inner = own != torch.tensor([0, 0, width, height])
    cut = (inner & ((boxes - own).abs() <= near)).any(1)
    order = scores.argsort(descending=True, stable=True)
    return _Found(*(values[order] for values in (boxes, scores, labels, own, numbers, cut))), order.tolist()


def _same(found):
    """-> (n, n) bool: which pairs are the same object."""
    boxes, views_ = found.boxes[:, None], found.views[:, None]  # (n, 1, 4), against (n, 4)
    low, high = torch.maximum(views_, found.views), torch.minimum(views_, found.views)
    shared = torch.cat([low[..., :2], high[..., 2:]], -1)  # (n, n, 4) what both views saw

    def clipped(box):
        return torch.cat([torch.maximum(box[..., :2], shared[..., :2]), torch.minimum(box[..., 2:], shared[..., 2:])],
                         -1)
    one, other = clipped(boxes), clipped(found.boxes)
    overlap = _area(torch.cat([torch.maximum(one[..., :2], other[..., :2]),
                               torch.minimum(one[..., 2:], other[..., 2:])], -1))
    one_view = found.numbers[:, None] == found.numbers
    least = torch.where(one_view, TWINS, AGREE)
    agree = overlap >= least * (_area(one) + _area(other) - overlap).clamp(min=1e-9)
    inside = found.cut[:, None] & (overlap >= INSIDE * _area(boxes).clamp(min=1e-9)) & ~one_view
    pairs = (agree & (overlap > 0)) | inside | inside.T
    return pairs & (found.labels[:, None] == found.labels)


def _area(boxes):
    """(..., 4) xyxy -> (...), 0 where nothing is left of a box."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def _pieces(first, same, free):
    """-> the cut boxes that go with `first`, or with one that goes with it, and so on; they are not free any more."""
    group, at = [first], 0
    free[first] = False
    while at < len(group):
        more = torch.nonzero(same[group[at]] & free)[:, 0].tolist()
        free[more] = False
        group += more
        at += 1
    return group


def _hull(boxes):
    """(n, 4) -> (4,), around all of them."""
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def joined(masks):
    """Run lengths of the parts of an object -> of the whole object."""
    if len(masks) == 1:
        return masks[0]
    whole = rle.merge(masks)
    return {"size": list(whole["size"]), "counts": whole["counts"].decode("ascii")}
