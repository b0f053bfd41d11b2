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


def decode(logits, boxes, sizes, top=MAX_DETECTIONS):
    """RT-DETR's raw outputs -> detections (what transformers' post_process_object_detection does, focal loss form).

    Args:
        logits: (B, Q, K); boxes: (B, Q, 4) normalised cxcywh; sizes: [(H, W), ...] original image sizes.
    Returns:
        per image {"scores": (n,), "labels": (n,), "boxes": (n, 4) xyxy pixels, "queries": (n,) the query behind each},
        best first, n = min(top, Q * K).
    Raises:
        UserError: outputs that are not finite.
    """
    logits, boxes = logits.float(), boxes.float()
    if not (torch.isfinite(logits).all() and torch.isfinite(boxes).all()):
        raise UserError("the detector's outputs are not finite: its weights are damaged, or the training has "
                        "diverged; lower LEARNING_RATE or raise WARMUP_STEPS, or look at the weight file")
    classes = logits.shape[-1]
    scores, index = logits.sigmoid().flatten(1).topk(min(top, logits.shape[1] * classes), dim=1)  # (B, n)
    chosen = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))  # (B, n, 4)
    centre, extent = chosen[..., :2], chosen[..., 2:]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], -1)
    scale = boxes.new_tensor([[w, h, w, h] for h, w in sizes]).reshape(-1, 4)  # (B, 4)
    corners = corners * scale[:, None]
    return [{"scores": s, "labels": i % classes, "boxes": c, "queries": i // classes}
            for s, i, c in zip(scores, index, corners, strict=True)]


def corner_and_extent(boxes):
    """(n, 4) xyxy -> (n, 4) float64 [x, y, w, h], as COCO's files have them."""
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    return torch.stack([x1, y1, x2 - x1, y2 - y1], -1)
