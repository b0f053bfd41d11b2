"""Learning rates as functions: of the optimizer step, or of the epochs so far. Nothing here has a state to save."""

import math

SCHEDULES = ("constant", "cosine", "step", "plateau")


def schedule_factor(kind, step, total, warmup, milestones=(), gamma=0.5):
    """-> the factor on every group's learning rate for optimizer step `step` (0-based) of `total`.

    Linear warm-up over `warmup` steps, then "constant", "cosine" (to 1% of the rate), or "step" (times gamma at each
    milestone, given as a share of the run). "plateau" is constant here and has `plateau_factor` as well.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "cosine":
        progress = (step - warmup) / max(total - warmup, 1)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    if kind == "step":
        return gamma ** sum(step >= share * total for share in milestones)
    return 1.0


def plateau_factor(losses, patience, factor, threshold=1e-4):
    """-> what torch's ReduceLROnPlateau (mode "min", relative threshold) has multiplied the rate with after `losses`.

    Args:
        losses: one per finished epoch; patience: epochs without a better one that are put up with; factor: in (0, 1).
    """
    product, best, bad = 1.0, math.inf, 0
    for loss in losses:
        if loss < best * (1 - threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            product, bad = product * factor, 0
    return product
