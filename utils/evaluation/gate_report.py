"""What Eval_conditional.py says about a gate: its table of costs, its mistakes, the summary on the console.

A row of `table` is {"model", "branch": its rainy branch, "clean/mAP", ..., "derained_clean", "derained_rainy": shares
of the images that take the branch}, and from `add_cost` on "ms_clean", "images_per_s_clean", ... as well.
"""

from pathlib import Path

import numpy as np

from utils import report, system
from utils.evaluation import gates, rain_report


def add_cost(table, latency):
    """Mean ms per image on clean and rainy images at batch 1, and images/s at batch N, worked out from the parts' own
    times and the shares of images that take each."""
    one, many = ({name: list(values.values())[i] for name, values in latency.items()} for i in (0, -1))
    for row in table:
        gated = row["model"].startswith(("conditional", "graded"))
        for domain in gates.DOMAINS:
            share = row[f"derained_{domain}"]
            cost = [gated * ms["gate"] + share * ms[row["branch"]] + (1 - share) * ms["vanilla"] for ms in (one, many)]
            row |= {f"ms_{domain}": cost[0], f"images_per_s_{domain}": 1000 / cost[1]}


def predictions(data, scores):
    """-> {domain: {"domain", "paths", "probabilities": of rain}} of the images, as rain_report takes them."""
    return {domain: {"domain": domain,
                     "paths": [(data[domain].folder / name).as_posix() for name in data[domain].files],
                     "probabilities": np.array([scores[domain][i] for i in data[domain].image_ids])}
            for domain in gates.DOMAINS}


def mistakes(predicted, threshold):
    """Images of one domain that the gate takes for the other -> [(path, probability), ...]."""
    return [(path, float(p)) for path, p in zip(predicted["paths"], predicted["probabilities"], strict=True)
            if (p >= threshold) == (predicted["domain"] == "clean")]


def cost_table(table, batch):
    """-> text: the share of images that each row sends to its rainy branch, ms per image, images/s at `batch`."""
    headings, cells = {"model": "model"}, [{"model": row["model"]} for row in table]
    for domain in gates.DOMAINS:
        headings |= {f"share_{domain}": f"{domain} to the branch", f"ms_{domain}": f"ms/{domain} image",
                     f"speed_{domain}": f"{domain}/s, {batch}"}
        for cell, row in zip(cells, table, strict=True):
            cell |= {f"share_{domain}": f"{100 * row[f'derained_{domain}']:.1f}%",
                     f"ms_{domain}": f"{row[f'ms_{domain}']:.1f}",
                     f"speed_{domain}": f"{row[f'images_per_s_{domain}']:.1f}"}
    return report.table(cells, headings)


def print_summary(table, branch, latency, gate, false_alarms, missed, fallbacks):
    """The rows, the gate, the images on which it errs, and the speed on clean images with the leading branch."""
    headings = {"model": "model"} | {f"{part}/{metric}": f"{part} {metric}" for part in ("clean", "rainy", "mix")
                                     for metric in gates.COLUMNS}
    print("\n" + report.table(table, headings))
    print("\n" + cost_table(table, batch=list(latency["vanilla"])[-1]))
    for name, count in fallbacks.items():
        if count:
            print(f"note: the de-rainer of '{name}' answered {count} image(s) with NaN or infinity; the original "
                  "stands there")
    print("\nRain detector:\n" + rain_report.describe(gate))
    rows = {row["model"]: row for row in table}
    vanilla, gated = rows["vanilla (never)"]["clean/mAP"], rows[f"conditional {branch}"]["clean/mAP"]
    if not false_alarms:
        print(f"clean images: no false alarm; conditional mAP {gated!r}, vanilla {vanilla!r}")
    else:
        shown = system.listed([f"{Path(path).name} ({p:.3f})" for path, p in false_alarms], 10)
        print(f"clean images: {len(false_alarms)} false alarm(s): {shown} (results.json has all); conditional mAP "
              f"{gated - vanilla:+.4f} against vanilla")
    print(f"rainy images: {len(missed)} taken for clean")
    one = {name: values["batch 1"] for name, values in latency.items()}
    print(f"clean image, batch 1: {one['conditional, clean']:.1f} ms, always {branch} {one[branch]:.1f} ms: "
          f"{one[branch] / one['conditional, clean']:.1f} times as fast; the gate is "
          f"{100 * one['gate'] / one['vanilla']:.1f}% of RT-DETR's time")


def print_thresholds(thresholds):
    """The threshold of each branch's own rain detector that is best for the mix, and what may be expected of it."""
    cells = [{"branch": branch} | {name: None if value is None else f"{value:.{3 if name == 'threshold' else 4}f}"
                                   for name, value in chosen.items()} for branch, chosen in thresholds.items()]
    print("\nThreshold by the mAP of the mix; mAP is the mean over held-out halves of it, which is not that of all:")
    print(report.table(cells, {"branch": "branch", "plain": "mAP, never", "as_set": "threshold as set",
                               "threshold": "threshold by mAP", "score": "its mAP"}))
