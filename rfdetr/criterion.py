"""Matching and losses of RF-DETR's detector.

Robinson et al., "RF-DETR", arXiv 2511.09554, which takes them from Chen et al., "LW-DETR", arXiv 2406.03459:
Hungarian matching in every query group, IoU-aware binary cross-entropy, L1 and GIoU on normalised boxes, the same for
every decoder layer and for the encoder's proposals. Written from the papers; the numbers equal the published package's.

Everything here runs in float32, whatever autocast says, and an image without objects is an image like any other.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from utils.losses import float32

ALPHA = 0.25                         # weight of the score in the target of the IoU-aware loss, IoU has the rest
GAMMA = 2                            # how fast easy negatives lose their weight
MIN_TARGET = 0.01                    # a matched query is asked for at least this score, however bad its box
MATCH_COSTS = (2.0, 5.0, 2.0)        # class, L1, GIoU
LOSS_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # the same in every layer
SUMMED_WEIGHTS = LOSS_WEIGHTS | {"loss_aux": 1.0}  # of `summed_up`, whose "loss_aux" has LOSS_WEIGHTS in it
WORST = 1e8                          # cost that stands in for one that is not finite


# ---- boxes -----------------------------------------------------------------------------------------------------

def box_overlap(boxes, others):
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes that broadcast against each other.

    Args:
        boxes, others: (..., 4) cxcywh, float32.
    Returns:
        IoU in [0, 1] and GIoU in [-1, 1], (...) each; boxes without area give finite numbers and gradients.
    """
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    low2, high2 = others[..., :2] - others[..., 2:] / 2, others[..., :2] + others[..., 2:] / 2
    shared = (torch.minimum(high, high2) - torch.maximum(low, low2)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, high2) - torch.minimum(low, low2)).clamp(min=0).prod(-1).clamp(min=1e-12)
    union = (boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - shared).clamp(min=1e-12)
    iou = shared / union
    return iou, iou - (hull - union) / hull


# ---- matching --------------------------------------------------------------------------------------------------

@torch.no_grad()
def match(logits, boxes, labels, groups=1):
    """Give every object of an image one query of every group, at the least total cost.

    The cost of a pair is 2 times the focal cost of the object's class (Lin et al. 2017; positive minus negative term),
    5 times the L1 distance of the boxes, 2 times their negative GIoU.

    Args:
        logits: (B, Q, K); boxes: (B, Q, 4) normalised cxcywh; Q is `groups` times the queries, group after group.
        labels: [{"class_labels": (N,) int64 rows of the head, "boxes": (N, 4) cxcywh}, ...], one per image.
    Returns:
        [(query index (n,), target index (n,)), ...] int64 on the CPU, one per image, n = groups * min(N, Q / groups),
        group by group and within a group by rising query index. With more objects than queries some are left over.
    """
    group = logits.shape[1] // groups
    with float32(logits.device.type):
        costs = [_costs(logits[i].float(), boxes[i].float(), label) for i, label in enumerate(labels)]  # (Q, N) each
    pairs = []
    for cost in costs:  # all of them are queued on the GPU before the first one is waited for
        queries, targets = [], []
        for g, part in enumerate(cost.cpu().split(group)):  # (Q / groups, N)
            query, target = linear_sum_assignment(part.numpy())
            queries.append(torch.from_numpy(query) + g * group)
            targets.append(torch.from_numpy(target))
        pairs.append((torch.cat(queries), torch.cat(targets)))
    return pairs


def _costs(logits, boxes, label):
    """Logits (Q, K), boxes (Q, 4) and one image's N objects -> (Q, N), finite."""
    wanted = logits[:, label["class_labels"]]  # (Q, N)
    score = wanted.sigmoid()
    positive = ALPHA * (1 - score) ** GAMMA * -F.logsigmoid(wanted)
    negative = (1 - ALPHA) * score**GAMMA * -F.logsigmoid(-wanted)
    targets = label["boxes"].float()
    distance = (boxes[:, None] - targets).abs().sum(-1)  # (Q, N)
    giou = box_overlap(boxes[:, None], targets)[1]
    by_class, by_distance, by_giou = MATCH_COSTS
    costs = by_class * (positive - negative) + by_distance * distance - by_giou * giou
    return costs.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)


class Matches(NamedTuple):
    """The matched pairs of a whole batch, (n,) int64 each."""

    image: torch.Tensor   # index of the image in the batch
    query: torch.Tensor   # index of the query in its image
    target: torch.Tensor  # index of the object, counted on through the objects of all images


def flat_indices(indices, labels, device):
    """Pairs of `match`, image by image -> Matches of the batch on `device`."""
    counts = [len(label["class_labels"]) for label in labels]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(indices)])
    query = torch.cat([query for query, _ in indices])
    target = torch.cat([target + start for (_, target), start in zip(indices, starts, strict=True)])
    return Matches(image.to(device), query.to(device), target.to(device))


# ---- losses ----------------------------------------------------------------------------------------------------

def count_over_ranks(count, device):
    """A count of this rank's batch -> the mean over all ranks, at least 1: float.

    DDP averages the ranks' gradients, so that losses divided by this add up to one batch of all ranks' images.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return max(float(count), 1.0)
    total = torch.tensor(float(count), device=device)
    torch.distributed.all_reduce(total)
    return max(total.item() / torch.distributed.get_world_size(), 1.0)


def detection_losses(outputs, labels, groups):
    """Every loss term of a batch.

    Args:
        outputs: of rfdetr.model.RFDETR: "logits" (B, Q, K), "boxes" (B, Q, 4) cxcywh, "aux" [the same of the decoder's
            other layers], "enc" the same of the proposals; Q = groups * queries.
        labels: [{"class_labels": (N,) int64 rows, "boxes": (N, 4) cxcywh}, ...]; N may be 0.
        groups: the model's groups in the mode that made `outputs` (model.groups).
    Returns:
        {"loss_ce", "loss_bbox", "loss_giou", "class_error" (percent of matched queries whose best class is wrong),
        "cardinality_error" (|queries whose best class is not the last row - objects|, the published package's count,
        which says little of a sigmoid head)} of the last layer, with suffix _0, _1, ... those of "aux", with _enc those
        of "enc" (without class_error): float32 scalars. Weights: `loss_weights`.
    """
    boxes = count_over_ranks(groups * sum(len(label["class_labels"]) for label in labels), outputs["logits"].device)
    stages = {"": outputs} | {f"_{i}": stage for i, stage in enumerate(outputs["aux"])} | {"_enc": outputs["enc"]}
    losses = {}
    for suffix, stage in stages.items():
        with float32(stage["logits"].device.type):
            found = _stage_losses(stage["logits"].float(), stage["boxes"].float(), labels, groups, boxes)
        if suffix:
            del found["class_error"]
        losses |= {f"{name}{suffix}": value for name, value in found.items()}
    return losses


def _stage_losses(logits, boxes, labels, groups, num_boxes):
    """Terms of one decoder layer: logits (B, Q, K), boxes (B, Q, 4)."""
    image, query, target = flat_indices(match(logits, boxes, labels, groups), labels, logits.device)  # (n,) each
    classes = torch.cat([label["class_labels"] for label in labels])[target]  # (n,)
    wanted = torch.cat([label["boxes"] for label in labels]).float()[target]  # (n, 4)
    found = boxes[image, query]  # (n, 4)
    iou, giou = box_overlap(found, wanted)
    objects = logits.new_tensor([len(label["class_labels"]) for label in labels])
    with torch.no_grad():
        wrong = (logits[image, query].argmax(-1) != classes).float().sum() / max(len(classes), 1)
        cardinality = ((logits.argmax(-1) != logits.shape[-1] - 1).sum(1) - objects).abs().mean()
    return {"loss_ce": _iou_aware_loss(logits, (image, query, classes), iou.detach()) / num_boxes,
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
