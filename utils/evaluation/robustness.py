"""Tables and pictures of Eval_robustness.py: mPC and rPC of Michaelis et al. (2019), with bootstrap intervals."""

from pathlib import Path

import numpy as np

from utils import report, system, visualize
from utils.config import UserError, writing
from utils.datasets.windshield_pairs import INTENSITIES
from utils.evaluation import intervals
from utils.networks.rtdetr import id2label_of, rtdetr_of

CLEAN = (None, 0)


def name_of(weather, level):
    """-> "rain heavy", or "clean"."""
    return f"{weather} {INTENSITIES[level]}" if weather else "clean"


def common_classes(models):
    """-> {label: name} that all models share; UserError where they do not."""
    found = {row: id2label_of(rtdetr_of(model)) for row, model in models.items()}
    first = next(iter(found))
    for row, classes in found.items():
        if classes != found[first]:
            raise UserError(f"MODELS: {row!r} and {first!r} know other classes, or in another order: their mAPs could "
                            "not be compared")
    return found[first]


def mean_of(scores):
    """{condition: mAP or (resamples,) mAPs} -> mPC: the mean over levels of each weather, then over weathers."""
    weathers = dict.fromkeys(weather for weather, _ in scores if weather)
    return np.mean([np.mean([value for (own, _), value in scores.items() if own == weather], axis=0)
                    for weather in weathers], axis=0)


def resampled(matches, images, resamples, seed):
    """-> {model: {condition: (resamples,) mAP}}, the same resamples of images for all; {} for resamples = 0.

    Args:
        matches: {model: {condition: [intervals.Category, ...]}}.
    """
    if not resamples:
        return {}
    flat = {(row, condition): own for row, found in matches.items() for condition, own in found.items()}
    maps = intervals.resampled_maps(flat, images, resamples, seed)
    return {row: {condition: maps[row, condition] for condition in found} for row, found in matches.items()}


def table(scores, resamples):
    """-> [{"model", "clean", "mPC", "rPC", each weather: mean mAP over its levels, and with resamples "clean_interval",
    "mPC_interval", "rPC_interval", "gain_interval": of mPC over the first model}, ...].

    Args:
        scores: {model: {condition: mAP}}; resamples: of `resampled`.
    """
    rows, first = [], next(iter(scores))
    for row, found in scores.items():
        mpc = float(mean_of(found))
        one = {"model": row, "clean": found[CLEAN], "mPC": mpc, "rPC": mpc / found[CLEAN] if found[CLEAN] else 0.0}
        for weather in dict.fromkeys(weather for weather, _ in found if weather):
            one[weather] = float(np.mean([value for (own, _), value in found.items() if own == weather]))
        if resamples:
            drawn = mean_of(resamples[row])
            clean = resamples[row][CLEAN]
            one |= {"clean_interval": intervals.interval(clean), "mPC_interval": intervals.interval(drawn),
                    "rPC_interval": intervals.interval(drawn / np.where(clean > 0, clean, np.nan))}
            if row != first:
                one["gain_interval"] = intervals.interval(drawn - mean_of(resamples[first]))
        rows.append(one)
    return rows


def columns_of(rows):
    """-> {key: heading} of the tables that people read."""
    weathers = [key for key in rows[0] if key not in ("model", "clean", "mPC", "rPC") and not key.endswith("_interval")]
    return {"model": "model", "clean": "clean", "mPC": "mPC", "gain": "gain in mPC", "rPC": "rPC"} | {
        weather: weather for weather in weathers}


def as_text(rows):
    """-> the rows of `table` with numbers and intervals as text."""
    def with_interval(row, key, digits=4):
        found = row.get(f"{key}_interval")
        return f"{row[key]:.{digits}f}" + (f" [{found[0]:.{digits}f}, {found[1]:.{digits}f}]" if found else "")
    texts = []
    for row in rows:
        gain = "" if row is rows[0] else f"{row['mPC'] - rows[0]['mPC']:+.4f}"
        if row.get("gain_interval"):
            gain += " [{:+.4f}, {:+.4f}]".format(*row["gain_interval"])
        texts.append({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} | {
            key: with_interval(row, key) for key in ("clean", "mPC", "rPC")} | {"gain": gain})
    return texts


def shown(rows):
    """-> the table for the console."""
    return report.table(as_text(rows), columns_of(rows))


def write_markdown(rows, scores, path):
    """The table, and mAP of every condition."""
    conditions = list(next(iter(scores.values())))
    every = [{"condition": name_of(*condition)} | {row: f"{found[condition]:.4f}" for row, found in scores.items()}
             for condition in conditions]
    text = report.markdown(as_text(rows), columns_of(rows)) + "\n" + report.markdown(
        every, {"condition": "mAP"} | {row: row for row in scores})
    with writing(path), system.written(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def heat_map(scores, path):
    """Models against conditions: the share of the clean mAP that is left, in a PNG."""
    conditions = [condition for condition in next(iter(scores.values())) if condition != CLEAN]
    shares = [[found[condition] / found[CLEAN] if found[CLEAN] else 0.0 for condition in conditions]
              for found in scores.values()]
    visualize.heat_map(shares, list(scores), [name_of(*condition) for condition in conditions], path,
                       "share of the mAP on clean images")
