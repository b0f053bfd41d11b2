"""Mask logits of chosen queries, the losses of masks, and what masks cost in the matching.

The losses are those of Cheng et al., "Mask2Former", 2022: binary cross-entropy and dice at points, most of which lie
where the mask is uncertain (Kirillov et al., "PointRend", 2020). One deviation: half of the points that are looked at
lie around the object, because uniform points hardly ever meet an object that covers a thousandth of the image.

Or, with `crop`, at every cell of the object's own box and nowhere else, divided by its area: the idea of Bolya et al.,
"YOLACT", 2019, and of Saakyan et al., "D-FINE-seg", arXiv 2602.23043, who add masks to the matching as well.
"""

import torch
import torch.nn.functional as F

from utils.losses import count_over_ranks, float32
from utils.networks.matching import Matches

CANDIDATES = 3        # points looked at for every one that is kept
UNCERTAIN = 0.75      # share of the points that are the most uncertain candidates; the others are random
AROUND = 1.5          # points "around an object" lie in its box enlarged by this factor
MIN_EXTENT = 0.03     # and by so much of the image at least
OUTSIDE = 0.25        # cells that a mask may reach out of its box, see docs/lab_notes.md
TOUCHED = 0.49        # a cell belongs to a box that covers a hundredth of its width and height at least


def mask_logits(outputs, batch_index, query_index, counts=None):
    """Mask logits of chosen queries.

    Args:
        outputs: with "pixel_embedding" (B, C, h, w) and "query_embedding" (B, q, C); h = w = S / 4.
        batch_index, query_index: (n,) int64, image and query of every mask.
        counts: masks of each image, B numbers, where the indices go image by image: so no GPU is asked for them.
    Returns:
        (n, h, w) float32; above 0 is the object.
    """
    pixels, queries = outputs["pixel_embedding"], outputs["query_embedding"]
    with float32(pixels.device.type):
        pixels, queries = pixels.float(), queries.float()
        height, width = pixels.shape[-2:]
        if len(batch_index) == queries.shape[0] * queries.shape[1]:  # all of them (export): no loop
            return every_mask(outputs)[batch_index, query_index]
        if counts is None:
            order = batch_index.argsort(stable=True)
            counts = torch.bincount(batch_index, minlength=len(pixels)).tolist()
            found = mask_logits(outputs, batch_index[order], query_index[order], counts)
            return found[order.argsort()]  # as they were asked for
        chosen = queries[batch_index, query_index]  # (n, C), image after image
        # per image: its chosen queries (., C) times its pixels (C, h * w)
        found = torch.cat([part @ pixel.flatten(1) for part, pixel in zip(chosen.split(counts), pixels, strict=True)])
        return found.unflatten(1, (height, width))  # (n, h, w)


def every_mask(outputs):
    """Mask logits of all queries (export): "pixel_embedding" (B, C, h, w), "query_embedding" (B, q, C) -> (B, q, h, w).
    """
    pixels = outputs["pixel_embedding"].float()
    return torch.bmm(outputs["query_embedding"].float(), pixels.flatten(2)).unflatten(2, pixels.shape[-2:])


def confined(logits, boxes):
    """Keep masks to their boxes (as Bolya et al., "YOLACT", 2019, crop theirs): the losses look at points around the
    objects, so that a mask may also light up on its object's likes far away.

    Args:
        logits: (n, h, w); boxes: (n, 4) normalised cxcywh of the detections.
    Returns:
        (n, h, w); at cells whose centres lie more than OUTSIDE cells beside the box at most -1.
    """
    height, width = logits.shape[-2:]
    least = 1 - 2 * OUTSIDE  # cells: so that a box narrower than a cell keeps the one that it lies in
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:3].clamp(min=least / width), boxes[:, 3:].clamp(min=least / height)], 1)
    inside = cells_of(boxes, height, width, cells=OUTSIDE)
    return torch.where(inside, logits, logits.clamp(max=-1))


def cells_of(boxes, height, width, cells=TOUCHED):
    """The cells of a map of height x width that boxes (n, 4), normalised cxcywh, touch -> (n, height, width) bool.

    Args:
        cells: a cell belongs to a box whose border is so many cells at most from its centre.
    """
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    half = boxes[:, 2:].float() / 2
    inside_x = (x - boxes[:, :1].float()).abs() <= half[:, :1] + cells / width  # (n, w)
    inside_y = (y - boxes[:, 1:2].float()).abs() <= half[:, 1:] + cells / height  # (n, h)
    return inside_y[:, :, None] & inside_x[:, None]


def mask_losses(outputs, labels, indices, points=None, generator=None, crop=False):
    """Losses of the masks of matched queries.

    Args:
        outputs: see `mask_logits`.
        labels: [{"class_labels": (N,), "boxes": (N, 4) cxcywh, "masks": (N, S, S) bool}, ...], one per image.
        indices: [(query index (n,), target index (n,)), ...] on the CPU, of rfdetr.criterion.match.
        points: per mask, None for a quarter of the mask's pixels; generator: of the points, None for torch's own.
        crop: compare at the cells that the object's box touches instead; nothing is drawn at random then.
    Returns:
        {"loss_mask": binary cross-entropy, mean over points (over the box's cells), "loss_dice": 1 - dice in [0, 1]},
        means over the masks of all ranks: float32 scalars. Without any object both are 0 and still have gradients (of
        0) for every rank's DDP.
    """
    pixels, queries = outputs["pixel_embedding"], outputs["query_embedding"]
    with float32(pixels.device.type):
        image, (query,), (target,) = whole_batch(indices, labels).to(pixels.device)  # (n,) each
        masks = count_over_ranks(len(image), pixels.device)  # every rank, also one without objects, takes part
        if len(image) == 0:
            nothing = (pixels.float().sum() + queries.float().sum()) * 0
            return {"loss_mask": nothing, "loss_dice": nothing}
        logits = mask_logits(outputs, image, query, [len(own) for own, _ in indices])  # (n, h, w)
        boxes = torch.cat([label["boxes"] for label in labels]).float()[target]  # (n, 4)
        if crop:
            wanted = torch.cat([cell_shares(label["masks"], logits.shape[-2:]) for label in labels])[target]
            entropy, dice = _in_boxes(logits, wanted, boxes)
        else:
            wanted = torch.cat([label["masks"] for label in labels])[target]  # (n, S, S) bool
            entropy, dice = _at_points(logits, wanted, boxes, points, generator)
        return {"loss_mask": entropy.sum() / masks, "loss_dice": (1 - dice).sum() / masks}


def _at_points(logits, wanted, boxes, points, generator):
    """Logits (n, h, w), masks (n, S, S) bool, boxes (n, 4) -> cross-entropy and dice at chosen points, (n,) each."""
    points = points or max(logits[0].numel() // 4, 1)
    with torch.no_grad():
        where = choose_points(logits, boxes, points, generator)  # (n, P, 2)
        wanted = values_at(wanted, where)  # (n, P)
    found = sample(logits, where)  # (n, P)
    entropy = F.binary_cross_entropy_with_logits(found, wanted, reduction="none").mean(1)
    return entropy, _dice(found.sigmoid(), wanted)


def _in_boxes(logits, wanted, boxes):
    """Logits and shares (n, h, w), boxes (n, 4) -> cross-entropy per cell of the box, and dice in the box, (n,) each.
    """
    inside = cells_of(boxes, *logits.shape[-2:]).float().flatten(1)  # (n, h * w)
    logits, wanted = logits.flatten(1), wanted.flatten(1) * inside
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, weight=inside, reduction="none").sum(1)
    return entropy / inside.sum(1).clamp(min=1), _dice(logits.sigmoid() * inside, wanted)


def _dice(score, wanted):
    """Probabilities and targets (n, P) in [0, 1] -> (n,), 1 where they agree everywhere."""
    return (2 * (score * wanted).sum(1) + 1) / (score.sum(1) + wanted.sum(1) + 1)


def cell_shares(masks, size):
    """Masks (n, S, S) bool -> (n, *size) float32: how much of every cell of a map of that size is the object."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0]


@torch.no_grad()
def matching_costs(outputs, labels, crop=False):
    """What it costs to give an object a query by their masks, for criterion.match and criterion.detection_losses.

    Binary cross-entropy per cell plus 1 - dice of the query's mask and the object's, over the whole map or, with
    `crop`, over the cells that the object's box touches: what `mask_losses` will ask of the pair, without its points.

    Args:
        outputs: see `mask_logits`; labels: see `mask_losses`.
    Returns:
        (N, q) float32 of the batch's N objects, image after image, and the queries of their own image.
    """
    pixels, queries = outputs["pixel_embedding"], outputs["query_embedding"]
    with float32(pixels.device.type):
        size, costs = pixels.shape[-2:], [queries.new_zeros(0, queries.shape[1], dtype=torch.float32)]
        for pixel, query, label in zip(pixels.float(), queries.float(), labels, strict=True):
            if not len(label["boxes"]):
                continue
            logits = query @ pixel.flatten(1)  # (q, h * w)
            wanted = cell_shares(label["masks"], size).flatten(1)  # (n, h * w)
            inside = cells_of(label["boxes"], *size).flatten(1).float() if crop else torch.ones_like(wanted)
            wanted, score = wanted * inside, logits.sigmoid()
            # softplus(x) - x * wanted is the cross-entropy of a cell
            entropy = (inside @ F.softplus(logits).T - wanted @ logits.T) / inside.sum(1, keepdim=True).clamp(min=1)
            dice = (2 * wanted @ score.T + 1) / (inside @ score.T + wanted.sum(1, keepdim=True) + 1)  # (n, q)
            costs.append(entropy + 1 - dice)
        return torch.cat(costs)


def whole_batch(indices, labels):
    """Pairs of criterion.match, image by image -> matching.Matches of one stage on the CPU."""
    counts = [len(label["class_labels"]) for label in labels]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(indices)])
    query = torch.cat([query for query, _ in indices])
    target = torch.cat([target + start for (_, target), start in zip(indices, starts, strict=True)])
    return Matches(image, query[None], target[None])


def choose_points(logits, boxes, points, generator=None):
    """Points at which masks are compared: the most uncertain of many, and some at random.

    Args:
        logits: (n, h, w); boxes: (n, 4) cxcywh of the objects.
    Returns:
        (n, points, 2) x, y in [0, 1].
    """
    count = len(logits)
    uncertain = int(UNCERTAIN * points)
    candidates = random_points(boxes, CANDIDATES * points, generator)
    doubt = -sample(logits, candidates).abs()  # (n, CANDIDATES * points)
    best = doubt.topk(uncertain, dim=1).indices  # (n, uncertain)
    chosen = candidates.gather(1, best[..., None].expand(count, uncertain, 2))  # (n, uncertain, 2)
    return torch.cat([chosen, random_points(boxes, points - uncertain, generator)], 1)


def random_points(boxes, points, generator=None):
    """(n, 4) cxcywh -> (n, points, 2) x, y in [0, 1]: half anywhere in the image, half around the box."""
    near = points // 2
    uniform = torch.rand(len(boxes), points, 2, device=boxes.device, generator=generator)
    extent = (boxes[:, None, 2:] * AROUND).clamp(min=MIN_EXTENT)
    low = (boxes[:, None, :2] - extent / 2).clamp(0, 1)
    high = (boxes[:, None, :2] + extent / 2).clamp(0, 1)
    return torch.cat([uniform[:, near:], low + uniform[:, :near] * (high - low)], 1)


def sample(maps, where):
    """Bilinear values, as of a resized map: maps (n, h, w), where (n, P, 2) x, y in [0, 1] -> (n, P)."""
    grid = (2 * where - 1)[:, None]  # (n, 1, P, 2)
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0, 0]


def values_at(masks, where):
    """The pixel that a point lies in: masks (n, H, W) bool, where (n, P, 2) x, y in [0, 1] -> (n, P) float32."""
    height, width = masks.shape[-2:]
    x = (where[..., 0] * width).long().clamp(0, width - 1)
    y = (where[..., 1] * height).long().clamp(0, height - 1)
    return masks.flatten(1).gather(1, y * width + x).float()  # of (n, H * W)
