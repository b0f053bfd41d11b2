"""Boxes: from a detector's raw outputs to pixels, and between the formats that files, models and pictures use."""

import torch
from torchvision.transforms.v2 import functional as F

from utils.config import UserError

MAX_DETECTIONS = 100  # per image, COCO's rule


def normalised_boxes(boxes):
    """BoundingBoxes (N, 4) XYXY pixels -> Tensor (N, 4) cxcywh in [0, 1]."""
    height, width = boxes.canvas_size
    boxes = F.convert_bounding_box_format(boxes, new_format="CXCYWH").as_subclass(torch.Tensor)
    return boxes / torch.tensor([width, height, width, height], dtype=torch.float32)


def pixel_corners(boxes, height, width):
    """Boxes (N, 4) normalised cxcywh -> (N, 4) xyxy pixels."""
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


def box_overlap(boxes, others):
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes that broadcast against each other.

    Args:
        boxes, others: (..., 4) cxcywh, float32.
    Returns:
        IoU in [0, 1] and GIoU in [-1, 1], (...) each; boxes without area give finite numbers and gradients.
    """
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    low2, high2 = others[..., :2] - others[..., 2:] / 2, others[..., :2] + others[..., 2:] / 2
    shared = _area((torch.minimum(high, high2) - torch.maximum(low, low2)).clamp(min=0))
    hull = _area((torch.maximum(high, high2) - torch.minimum(low, low2)).clamp(min=0)).clamp(min=1e-12)
    union = (_area(boxes[..., 2:]) + _area(others[..., 2:]) - shared).clamp(min=1e-12)
    iou = shared / union
    return iou, iou - (hull - union) / hull


def _area(extent):
    """(..., 2) -> (...): not prod(-1), whose gradient asks the GPU whether a factor is zero."""
    return extent[..., 0] * extent[..., 1]


def decode(logits, boxes, sizes, top=MAX_DETECTIONS):
    """RT-DETR's raw outputs -> detections (what transformers' post_process_object_detection does, focal loss form).

    Args:
        logits: (B, Q, K); boxes: (B, Q, 4) normalised cxcywh; sizes: [(H, W), ...] original image sizes.
    Returns:
        per image {"scores": (n,), "labels": (n,), "boxes": (n, 4) xyxy pixels, "queries": (n,) the query behind each},
        best first, n = min(top, Q * K), on the CPU: a GPU is waited for once.
    Raises:
        UserError: outputs that are not finite.
    """
    logits, boxes = logits.float(), boxes.float()
    classes = logits.shape[-1]
    finite = torch.isfinite(logits).all() & torch.isfinite(boxes).all()
    scores, index = logits.sigmoid().flatten(1).topk(min(top, logits.shape[1] * classes), dim=1)  # (B, n)
    queries = index // classes
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))  # (B, n, 4)
    numbers = torch.stack([torch.where(finite, scores, float("nan")), index % classes, queries], -1)  # (B, n, 3)
    scores, labels, queries, chosen = torch.cat([numbers, chosen], -1).cpu().split([1, 1, 1, 4], -1)
    if scores.isnan().any():
        raise UserError("the detector's outputs are not finite: its weights are damaged, or the training has "
                        "diverged; lower LEARNING_RATE or raise WARMUP_STEPS, or look at the weight file")
    scale = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float32).reshape(-1, 1, 4)  # (B, 1, 4)
    centre, extent = chosen[..., :2], chosen[..., 2:]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], -1) * scale
    return [{"scores": s[:, 0], "labels": i[:, 0].long(), "boxes": c, "queries": q[:, 0].long()}
            for s, i, c, q in zip(scores, labels, corners, queries, strict=True)]


def corner_and_extent(boxes):
    """(n, 4) xyxy -> (n, 4) float64 [x, y, w, h], as COCO's files have them."""
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    return torch.stack([x1, y1, x2 - x1, y2 - y1], -1)
