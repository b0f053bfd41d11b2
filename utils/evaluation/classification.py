"""How good is a yes/no detector with a probability: ROC, calibration, the choice of a threshold, the usual counts.

`scores` and `targets` are numpy arrays (N,): any number that grows with "yes", such as a probability, and 0/1.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from utils.config import UserError


def auroc(scores, targets):
    """Area under the ROC curve: the chance that a yes scores above a no (ties count half); NaN without both."""
    scores, targets = np.asarray(scores, float), np.asarray(targets, bool)
    yes, no = int(targets.sum()), int((~targets).sum())
    if not yes or not no:
        return float("nan")
    return float((rankdata(scores)[targets].sum() - yes * (yes + 1) / 2) / (yes * no))  # Mann-Whitney U


class RocCurve(NamedTuple):
    """Arrays of equal length, from the strictest threshold to the laxest."""

    false_alarms: np.ndarray  # share of the no's that score at or above the threshold
    recall: np.ndarray        # share of the yes's that do
    thresholds: np.ndarray    # begins with infinity


def roc_curve(scores, targets):
    """-> RocCurve, one point for each distinct score and (0, 0)."""
    scores, targets = np.asarray(scores, float), np.asarray(targets, bool)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores change together
    recall = np.cumsum(targets[order])[last] / max(targets.sum(), 1)
    alarms = np.cumsum(~targets[order])[last] / max((~targets).sum(), 1)
    return RocCurve(np.append(0.0, alarms), np.append(0.0, recall), np.append(np.inf, scores[order][last]))


def require_rate(rate):
    """UserError unless `rate` is a wanted rate of false alarms."""
    if not 0 <= rate < 1:
        raise UserError(f"FALSE_ALARM_RATE = {rate}: choose a share in [0, 1), such as 0.01")


def threshold_for_false_alarms(scores, targets, rate):
    """-> a threshold at or above which at most `rate` of the no's score, and as many yes's as that allows.

    It lies half-way between two scores, so that it does not hang on the last digit of one image; above all scores it
    is the next float32. Compare in float32: that is what a checkpoint keeps it in.
    """
    require_rate(rate)
    scores = np.asarray(scores, np.float32)
    negative = np.sort(scores[~np.asarray(targets, bool)])[::-1]
    if not len(negative):
        raise ValueError("no negative sample to choose a threshold on")
    allowed = int(rate * len(negative))  # so many false alarms are fine
    quiet = negative[allowed]  # this one must stay below the threshold
    above = scores[scores > quiet]
    half_way = np.float32((float(quiet) + float(above.min())) / 2) if len(above) else quiet
    return float(half_way if half_way > quiet else np.nextafter(quiet, np.float32(np.inf)))


def counts(scores, targets, threshold):
    """Confusion counts at a threshold and what follows from them.

    Returns:
        {"true_positive", "false_positive", "false_negative", "true_negative": int, "accuracy", "precision", "recall",
        "f1", "false_alarm_rate": float, None where there is nothing to divide by}.
    """
    said, targets = np.asarray(scores, float) >= threshold, np.asarray(targets, bool)
    tp, fp = int((said & targets).sum()), int((said & ~targets).sum())
    fn, tn = int((~said & targets).sum()), int((~said & ~targets).sum())

    def share(part, whole):
        return part / whole if whole else None
    return {"true_positive": tp, "false_positive": fp, "false_negative": fn, "true_negative": tn,
            "accuracy": share(tp + tn, tp + fp + fn + tn), "precision": share(tp, tp + fp),
            "recall": share(tp, tp + fn), "f1": share(2 * tp, 2 * tp + fp + fn), "false_alarm_rate": share(fp, fp + tn)}


def fit_temperature(logits, targets):
    """The temperature that minimises the negative log-likelihood of sigmoid(logits / temperature).

    Guo et al., ICML 2017, with Platt's targets (1999): a little less than certain, else data without any mistake would
    drive the temperature to zero. One convex variable (1 / temperature): a bisection on its derivative finds it.

    Args:
        logits: (N,) Tensor; targets: (N,) Tensor of 0 and 1.
    Returns:
        float in [0.05, 20]; 20 means no better than chance.
    """
    logits, targets = logits.double(), targets.double()
    yes, no = targets.sum(), (1 - targets).sum()
    targets = torch.where(targets > 0.5, (yes + 1) / (yes + 2), 1 / (no + 2))

    def slope(scale):  # of the mean negative log-likelihood with respect to scale = 1 / temperature
        return ((torch.sigmoid(logits * scale) - targets) * logits).mean().item()
    low, high = 1 / 20, 20.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / middle


def calibration_error(probabilities, targets, bins=10):
    """Expected calibration error: mean |confidence - frequency| over equal-width bins, weighted by their size."""
    rows = reliability(probabilities, targets, bins)
    return float(sum(abs(row.confidence - row.frequency) * row.count for row in rows) / sum(row.count for row in rows))


class ReliabilityBin(NamedTuple):
    """The answers whose probability lies in one of the equal-width bins."""

    low: float         # where the bin begins
    count: int
    confidence: float  # mean probability
    frequency: float   # share of yes's


def reliability(probabilities, targets, bins=10):
    """-> [ReliabilityBin, ...] of the bins that are not empty, in rising order; probabilities in [0, 1]."""
    p, t = np.asarray(probabilities, float), np.asarray(targets, float)
    which = np.minimum((p * bins).astype(int), bins - 1)
    return [ReliabilityBin(float(b) / bins, int((which == b).sum()), float(p[which == b].mean()),
                           float(t[which == b].mean())) for b in np.unique(which)]
