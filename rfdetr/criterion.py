"""Matching and losses of RF-DETR's detector.

Robinson et al., "RF-DETR", arXiv 2511.09554, which takes them from Chen et al., "LW-DETR", arXiv 2406.03459:
Hungarian matching in every query group, IoU-aware binary cross-entropy, L1 and GIoU on normalised boxes, the same for
every decoder layer and for the encoder's proposals. Written from the papers; the numbers equal the published package's.

Everything here runs in float32, whatever autocast says, and an image without objects is an image like any other.
"""

import torch
import torch.nn.functional as F

from utils.boxes import box_overlap
from utils.losses import count_over_ranks, float32
from utils.networks.matching import assign, objects_of
from utils.transfer import sent

ALPHA = 0.25                         # weight of the score in the target of the IoU-aware loss, IoU has the rest
GAMMA = 2                            # how fast easy negatives lose their weight
MIN_TARGET = 0.01                    # a matched query is asked for at least this score, however bad its box
MATCH_COSTS = (2.0, 5.0, 2.0)        # class, L1, GIoU
LOSS_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # the same in every layer
SUMMED_WEIGHTS = LOSS_WEIGHTS | {"loss_aux": 1.0}  # of `summed_up`, whose "loss_aux" has LOSS_WEIGHTS in it
WORST = 1e8                          # cost that stands in for one that is not finite


# ---- matching --------------------------------------------------------------------------------------------------

def match(logits, boxes, labels, groups=1, further=None):
    """Give every object of an image one query of every group, at the least total cost.

    The cost of a pair is 2 times the focal cost of the object's class (Lin et al. 2017; positive minus negative term),
    5 times the L1 distance of the boxes, 2 times their negative GIoU.

    Args:
        logits: (B, Q, K); boxes: (B, Q, 4) normalised cxcywh; Q is `groups` times the queries, group after group.
        labels: [{"class_labels": (N,) int64 rows of the head, "boxes": (N, 4) cxcywh}, ...], one per image.
        further: (objects of the batch, q) that is added to the cost of the first q queries, such as
            MASK_COST * masks.matching_costs; None for none.
    Returns:
        [(query index (n,), target index (n,)), ...] int64 on the CPU, one per image, n = groups * min(N, Q / groups),
        group by group and within a group by rising query index. With more objects than queries some are left over.
    """
    objects = objects_of(labels)
    found = _assigned([{"logits": logits, "boxes": boxes}], objects, groups, further)
    starts = torch.tensor(objects.counts).cumsum(0) - torch.tensor(objects.counts)
    own = found.target[0] - starts[found.image]
    sizes = found.image.bincount(minlength=len(labels)).tolist()
    return list(zip(found.query[0].split(sizes), own.split(sizes), strict=True))


@torch.no_grad()
def _assigned(stages, objects, groups, further=None):
    """Decoder layers {"logits" (B, Q, K), "boxes" (B, Q, 4)}, Objects, `further` of the first layer (see `match`) ->
    matching.Matches of all, on the CPU."""
    costs = [torch.cat([_costs(stage["logits"], stage["boxes"], part) for part in objects.parts()])
             for stage in stages]  # (N, Q) each
    if further is not None:
        costs[0][:, :further.shape[1]] += further.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
    return assign(costs, objects.counts, groups)


def _costs(logits, boxes, objects):
    """Logits (B, Q, K), boxes (B, Q, 4) of one layer, and Objects -> (N, Q), finite."""
    with float32(logits.device.type):
        wanted = logits[objects.image, :, objects.classes].float()  # (N, Q)
        score = wanted.sigmoid()
        positive = ALPHA * (1 - score) ** GAMMA * -F.logsigmoid(wanted)
        negative = (1 - ALPHA) * score**GAMMA * -F.logsigmoid(-wanted)
        candidates, targets = boxes[objects.image].float(), objects.boxes[:, None]  # (N, Q, 4), (N, 1, 4)
        distance = (candidates - targets).abs().sum(-1)  # (N, Q)
        giou = box_overlap(candidates, targets)[1]
        by_class, by_distance, by_giou = MATCH_COSTS
        costs = by_class * (positive - negative) + by_distance * distance - by_giou * giou
        return costs.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)


# ---- losses ----------------------------------------------------------------------------------------------------

def detection_losses(outputs, labels, groups, further=None):
    """Every loss term of a batch.

    Args:
        outputs: of rfdetr.model.RFDETR: "logits" (B, Q, K), "boxes" (B, Q, 4) cxcywh, "aux" [the same of the decoder's
            other layers], "enc" the same of the proposals; Q = groups * queries.
        labels: [{"class_labels": (N,) int64 rows, "boxes": (N, 4) cxcywh}, ...]; N may be 0.
        groups: the model's groups in the mode that made `outputs` (model.groups).
        further: see `match`; counts in the matching of the last layer.
    Returns:
        {"loss_ce", "loss_bbox", "loss_giou", "class_error" (percent of matched queries whose best class is wrong),
        "cardinality_error" (|queries whose best class is not the last row - objects|, the published package's count,
        which says little of a sigmoid head)} of the last layer, with suffix _0, _1, ... those of "aux", with _enc those
        of "enc" (without class_error): float32 scalars. Weights: `loss_weights`.
    """
    stages = {"": outputs} | {f"_{i}": stage for i, stage in enumerate(outputs["aux"])} | {"_enc": outputs["enc"]}
    objects, device = objects_of(labels), outputs["logits"].device
    boxes = count_over_ranks(groups * len(objects.image), device)
    pairs = _assigned(stages.values(), objects, groups, further).to(device)
    counts = sent(torch.tensor(objects.counts), device)
    losses = {}
    for i, (suffix, stage) in enumerate(stages.items()):
        with float32(device.type):
            found = _stage_losses(stage["logits"].float(), stage["boxes"].float(), (pairs.image, pairs.query[i]),
                                  pairs.target[i], objects, counts, boxes)
        if suffix:
            del found["class_error"]
        losses |= {f"{name}{suffix}": value for name, value in found.items()}
    return losses


def _stage_losses(logits, boxes, matched, target, objects, counts, num_boxes):
    """Terms of one decoder layer.

    Args:
        logits: (B, Q, K); boxes: (B, Q, 4); matched: image and query of every pair, target: its object, (n,) each.
        counts: (B,) objects of each image; num_boxes: what the sums are divided by.
    """
    classes, wanted = objects.classes[target], objects.boxes[target]  # (n,), (n, 4)
    found = boxes[matched]  # (n, 4)
    iou, giou = box_overlap(found, wanted)
    with torch.no_grad():
        wrong = (logits[matched].argmax(-1) != classes).float().sum() / max(len(classes), 1)
        cardinality = ((logits.argmax(-1) != logits.shape[-1] - 1).sum(1) - counts).float().abs().mean()
    return {"loss_ce": _iou_aware_loss(logits, (*matched, classes), iou.detach()) / num_boxes,
            "loss_bbox": (found - wanted).abs().sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
            "class_error": 100 * wrong, "cardinality_error": cardinality}


def _iou_aware_loss(logits, matched, iou):
    """LW-DETR's classification loss, summed: a matched query is asked for the score t = score^alpha * IoU^(1 - alpha),
    every other one for 0 with weight score^2.

    Args:
        logits: (B, Q, K); matched: (image, query, class), (n,) each; iou: (n,) of the matched boxes, no gradient.
    """
    score = logits.sigmoid()
    target = (score[matched].detach() ** ALPHA * iou ** (1 - ALPHA)).clamp(min=MIN_TARGET)  # (n,)
    negative = (score**GAMMA).index_put(matched, 1 - target)
    # logsigmoid and not log(sigmoid): finite for every finite logit
    positive = target * F.logsigmoid(logits[matched])
    return -positive.sum() - (negative * F.logsigmoid(-logits)).sum()


def loss_weights(decoder_layers):
    """-> {name: weight} of the terms of `detection_losses` that count."""
    suffixes = ["", *(f"_{i}" for i in range(decoder_layers - 1)), "_enc"]
    return {f"{name}{suffix}": weight for suffix in suffixes for name, weight in LOSS_WEIGHTS.items()}


def summed_up(losses):
    """Terms of `detection_losses` -> {"loss_ce", "loss_bbox", "loss_giou"} of the last layer, "loss_aux": all the other
    layers' and the proposals' terms with their weights, and "class_error". Weights: SUMMED_WEIGHTS; the total is that
    of `loss_weights`."""
    earlier = {name: value for name, value in losses.items() if name.startswith("loss_") and name.count("_") > 1}
    last = {name: losses[name] for name in LOSS_WEIGHTS}
    aux = sum(LOSS_WEIGHTS["_".join(name.split("_")[:2])] * value for name, value in earlier.items())
    return last | {"loss_aux": aux, "class_error": losses["class_error"]}
