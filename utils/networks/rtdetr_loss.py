"""RT-DETR's criterion: Hungarian matching, varifocal loss, L1 and GIoU in every decoder layer.

Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024; the varifocal loss is that of Zhang et al.,
"VarifocalNet", CVPR 2021. Written from the papers, with the numbers of transformers' RTDetrForObjectDetectionLoss up to
float32 rounding, which tests hold; all layers are computed together and a GPU is waited for once (see `matching`).
"""

import torch
import torch.nn.functional as F
from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss

from utils.boxes import box_overlap
from utils.losses import count_over_ranks, float32
from utils.networks.matching import Matches, assign, objects_of
from utils.transfer import sent

WORST = 1e8  # cost that stands in for one that is not finite
TINY = 1e-8  # keeps the logarithms of the matching finite


def rtdetr_loss(logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None,
                enc_topk_logits=None, enc_topk_bboxes=None, denoising_meta_values=None, **unused):
    """The loss that transformers asks for; `detector.loss_function = rtdetr_loss` installs it.

    Differences to transformers' own: it runs in float32 under autocast; under torchrun it is normalised by the boxes of
    all ranks, so that two processes equal one with the double batch; outputs that are not finite give a loss of NaN,
    which is the training loop's to report, instead of an exception; queries are always matched by their focal cost.

    Args:
        logits: (B, Q, K), pred_boxes: (B, Q, 4) normalised cxcywh, of the last layer; Q with the D denoising queries
            first. outputs_class: (B, L, Q, K), outputs_coord: (B, L, Q, 4), of all layers. enc_topk_logits,
            enc_topk_bboxes: of the proposals, without denoising queries.
        labels: [{"class_labels": (n,) int64, "boxes": (n, 4) cxcywh}, ...], one per image.
        config: RTDetrConfig; denoising_meta_values: of transformers, None without denoising queries.
    Returns:
        (loss, {"loss_vfl", "loss_bbox", "loss_giou" of the last layer, with suffix _aux_<i> those of the other layers
        and of the proposals, with _dn_<i> those of the denoising queries: weighted, scalars}, None).
    """
    with float32(logits.device.type):
        objects = objects_of(labels)
        divisor = count_over_ranks(len(objects.image), logits.device)
        if config.auxiliary_loss:
            classes, boxes = outputs_class.float(), outputs_coord.float()  # (B, L, Q, .)
        else:
            classes, boxes = logits.float()[:, None], pred_boxes.float()[:, None]  # (B, 1, Q, .)
        layers, terms = classes.shape[1], {}
        suffixes = [*(f"_aux_{i}" for i in range(layers - 1)), ""]
        if denoising_meta_values is not None:
            split = denoising_meta_values["dn_num_split"]
            (noisy, classes), (noisy_boxes, boxes) = classes.split(split, 2), boxes.split(split, 2)
            if config.auxiliary_loss:
                pairs, groups = _denoising_pairs(denoising_meta_values, objects, layers)
                terms = _terms(noisy, noisy_boxes, pairs, objects, divisor * groups, config,
                               [f"_dn_{i}" for i in range(layers)])
        if config.auxiliary_loss:
            classes = torch.cat([classes, enc_topk_logits.float()[:, None]], 1)  # (B, S, Q, K)
            boxes = torch.cat([boxes, enc_topk_bboxes.float()[:, None]], 1)  # (B, S, Q, 4)
            suffixes.append(f"_aux_{layers - 1}")
        pairs = match(classes, boxes, objects, config).to(logits.device)
        terms |= _terms(classes, boxes, pairs, objects, divisor, config, suffixes)
        finite = torch.isfinite(classes).all() & torch.isfinite(boxes).all()
        loss = torch.where(finite, torch.stack(list(terms.values())).sum(), float("nan"))
    return loss, terms, None


def dfine_loss(logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None, **others):
    """D-FINE's criterion, transformers' own: RT-DETR's terms, and those of the edges' distributions (Peng et al.,
    "D-FINE", ICLR 2025: "fgl" against the objects, "ddf" between the decoder's layers).

    Differences to transformers': float32 under autocast; under torchrun normalised by the boxes of all ranks; outputs
    that are not finite give NaN.

    Args:
        others: what else transformers hands over; all as in `rtdetr_loss`.
    Returns:
        (loss, {"loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", ... of the last layer, with suffixes those of the
        others: weighted, scalars}, None).
    """
    with float32(logits.device.type):
        own = sum(len(label["class_labels"]) for label in labels)
        share = max(own, 1) / count_over_ranks(own, logits.device)  # transformers divides by this rank's boxes
        finite = torch.isfinite(outputs_class).all() & torch.isfinite(outputs_coord).all()
        as_floats = [torch.where(finite, tensor.float(), 0.5) for tensor in (logits, pred_boxes, outputs_class,
                                                                             outputs_coord)]
        others = {name: _floats(value) for name, value in others.items()}
        _, terms, _ = DFineForObjectDetectionLoss(as_floats[0], labels, device, as_floats[1], config, *as_floats[2:],
                                                  **others)
        terms = {name: value if "ddf" in name else share * value for name, value in terms.items()}
        loss = torch.where(finite, torch.stack(list(terms.values())).sum(), float("nan"))
    return loss, terms, None


def _floats(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def match(logits, boxes, objects, config):
    """Every layer's queries and the objects: logits (B, S, Q, K), boxes (B, S, Q, 4), Objects -> Matches on the CPU."""
    return assign([torch.cat([_costs(logits[:, stage], boxes[:, stage], part, config) for part in objects.parts()])
                   for stage in range(logits.shape[1])], objects.counts)


def _costs(logits, boxes, objects, config):
    """Logits (B, Q, K), boxes (B, Q, 4) of one layer -> (N, Q), finite: focal cost, L1 and negative GIoU."""
    score = logits[objects.image, :, objects.classes].sigmoid()  # (N, Q)
    positive = config.matcher_alpha * (1 - score) ** config.matcher_gamma * -(score + TINY).log()
    negative = (1 - config.matcher_alpha) * score**config.matcher_gamma * -(1 - score + TINY).log()
    candidates, wanted = boxes[objects.image], objects.boxes[:, None]  # (N, Q, 4), (N, 1, 4)
    costs = (config.matcher_class_cost * (positive - negative)
             + config.matcher_bbox_cost * (candidates - wanted).abs().sum(-1)
             - config.matcher_giou_cost * box_overlap(candidates, wanted)[1])
    return costs.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)


def _denoising_pairs(meta, objects, layers):
    """The denoising queries that were made from an object -> (their Matches, denoising groups)."""
    groups, counts = meta["dn_num_group"], objects.counts
    starts = [sum(counts[:i]) for i in range(len(counts))]
    image = torch.cat([torch.full((groups * count,), i) for i, count in enumerate(counts)])  # (n,)
    target = torch.cat([torch.arange(start, start + count).repeat(groups)
                        for start, count in zip(starts, counts, strict=True)])  # (n,)
    image, target = sent(torch.stack([image, target]), objects.image.device)
    query = torch.cat(list(meta["dn_positive_idx"]))  # (n,)
    return Matches(image, query.expand(layers, -1), target.expand(layers, -1)), groups


def _terms(logits, boxes, pairs, objects, divisor, config, suffixes):
    """-> {"loss_vfl<suffix>", "loss_bbox<suffix>", "loss_giou<suffix>"}, weighted scalars, for every stage's suffix.

    Args:
        logits: (B, S, Q, K); boxes: (B, S, Q, 4); pairs: Matches of S stages, on their device.
        divisor: what the sums over queries and images are divided by.
    """
    stage = torch.arange(len(suffixes), device=logits.device)[:, None]  # (S, 1)
    at = pairs.image, stage, pairs.query  # these broadcast to (S, n)
    found, wanted = boxes[at], objects.boxes[pairs.target]  # (S, n, 4)
    iou, giou = box_overlap(found, wanted)  # (S, n)
    by_term = {"vfl": _varifocal(logits, (*at, objects.classes[pairs.target]), iou.detach(), config) / divisor,
               "bbox": (found - wanted).abs().sum((1, 2)) / divisor,
               "giou": (1 - giou).sum(1) / divisor}
    return {f"loss_{name}{suffix}": value for name, values in by_term.items()
            for suffix, value in zip(suffixes, getattr(config, f"weight_loss_{name}") * values, strict=True)}


def _varifocal(logits, matched, iou, config):
    """Cross entropy of scores: a matched one is asked for its box's IoU, with that weight, every other one for 0 with
    weight alpha * score^gamma.

    Args:
        logits: (B, S, Q, K); matched: four indices into them, which broadcast to (S, n); iou: (S, n).
    Returns:
        (S,), summed over images, queries and classes.
    """
    score = logits.detach().sigmoid()
    target = torch.zeros_like(score).index_put(matched, iou)
    weight = (config.focal_loss_alpha * score**config.focal_loss_gamma).index_put(matched, iou)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none").sum((0, 2, 3))
