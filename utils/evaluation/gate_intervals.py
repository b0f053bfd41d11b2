"""How sure the numbers of a gated comparison are: 95% bootstrap intervals over images, all rows on the same resamples.

See gates.py for `found` and `choose`, intervals.py for the bootstrap. Clean images and their rainy twins are drawn
together, so that the share of the rain gap has an interval as well.
"""

from typing import NamedTuple

import numpy as np

from utils import processes, report
from utils.evaluation import intervals

METRICS = ("mAP", "AP50")


class Interval(NamedTuple):
    """A number and the percentile interval of its resamples; None where there are none."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self):
        if self.value is None:
            return "-"
        return f"{self.value:.4f}" + ("" if self.low is None else f" ({self.low:.4f} to {self.high:.4f})")


def compared(rows, parts, found, groups, twins, resamples, seed=0):
    """Every row on the clean images, on the rainy ones, and on groups of these.

    Args:
        rows: [(name, branch, choose), ...], the first is what the others are compared with.
        parts: {"clean", "rainy": gates.Part}, in this order; groups: {name: ids of rainy images}.
        twins: whether both parts hold the same scenes in the same order; resamples: of the bootstrap.
    Returns:
        [{"model", "images": "clean", "rainy" or a group, "mAP", "AP50": Interval; "mAP_gain", "AP50_gain": Interval of
        the difference to the first row; "gap": Interval of the share of its rain gap, None without one}, ...].
    """
    matched = {domain: _matches(rows, part, found) for domain, part in parts.items()}
    weights = _resampled({domain: len(part.images) for domain, part in parts.items()}, twins, resamples, seed)
    members = {"clean": None, "rainy": None} | {name: set(ids) for name, ids in groups.items()}
    values, known = {images: {} for images in members}, {}
    for images, name in processes.progress([(images, row[0]) for images in members for row in rows], "intervals"):
        domain = "clean" if images == "clean" else "rainy"
        categories = matched[domain][name]
        if (images, id(categories)) not in known:  # many gates choose alike
            known[images, id(categories)] = _scores(categories, parts[domain], members[images], weights[domain])
        values[images][name] = known[images, id(categories)]
    first = rows[0][0]
    table = [_row(first, name, images, values[images]) for images in members for name in values[images]]
    if twins:
        _add_gaps(table, first, values["rainy"], values["clean"])
    return table


def _scores(categories, part, ids, weights):
    """-> {metric: (1 + resamples,)} of the images `ids` of a part, None for all; weights: of `_resampled`."""
    inside = np.array([ids is None or part.new_ids[key] in ids for key in part.images], float)
    order = part.order()
    values = [_averages(intervals.weighted_precisions(categories, (one * inside)[order])) for one in weights]
    return dict(zip(METRICS, np.transpose(values), strict=True))


def _averages(precisions):
    """(categories, IoUs from 0.5 on) -> values of METRICS, NaN without any object."""
    return (precisions.mean(), precisions[:, 0].mean()) if len(precisions) else (np.nan, np.nan)


def _resampled(sizes, twins, resamples, seed):
    """-> {domain: [(images,) how often each image counts]}, first all once, then the resamples; twins alike."""
    rng = np.random.default_rng(seed)
    weights = {domain: [np.ones(images)] for domain, images in sizes.items()}
    for _ in range(resamples):
        for domain, images in sizes.items():
            if twins and domain == "rainy":
                weights[domain].append(weights["clean"][-1])
            else:
                weights[domain].append(intervals.drawn(rng, images))
    return weights


def _matches(rows, part, found):
    """-> {row: [intervals.Category, ...]}; each choice of branches is matched once."""
    known, matched = {}, {}
    for name, _, choose in rows:
        taken = tuple(choose(*key) for key in part.images)
        if taken not in known:
            known[taken] = part.matches(found, choose)
        matched[name] = known[taken]
    return matched


def _interval(values):
    """(1 + resamples,) values, the first of all images -> Interval."""
    value = None if np.isnan(values[0]) else float(values[0])
    bounds = intervals.interval(values[1:]) if len(values) > 1 else None
    return Interval(value, *(bounds or (None, None)))


def _row(first, name, images, values):
    row = {"model": name, "images": images, "gap": None}
    for metric in METRICS:
        row |= {metric: _interval(values[name][metric]),
                f"{metric}_gain": _interval(values[name][metric] - values[first][metric])}
    return row


def _add_gaps(table, first, values, clean):
    """The share of the first row's rain gap that each row wins back, in the rows of all rainy images."""
    gap = clean[first]["mAP"] - values[first]["mAP"]
    if not gap[0] > 0:
        return
    for row in table:
        if row["images"] == "rainy" and row["model"] != first:
            won = values[row["model"]]["mAP"] - values[first]["mAP"]
            row["gap"] = _interval(np.divide(won, gap, out=np.full_like(gap, np.nan), where=gap > 0))


def text(table):
    """-> the table of `compared` for the console."""
    first = table[0]["model"]
    cells = [{"model": row["model"], "images": row["images"], "gap": "" if row["gap"] is None else str(row["gap"])}
             | {key: "" if key.endswith("_gain") and row["model"] == first else str(row[key])
                for metric in METRICS for key in (metric, f"{metric}_gain")} for row in table]
    return report.table(cells, {"model": "model", "images": "images", "mAP": "mAP (95% interval)",
                                "mAP_gain": "against vanilla", "AP50": "AP50", "AP50_gain": "against vanilla",
                                "gap": "share of the rain gap"})


def as_numbers(table):
    """-> the same for a JSON file: each Interval as {"value", "low", "high"}."""
    return [{key: value._asdict() if isinstance(value, Interval) else value for key, value in row.items()}
            for row in table]
