"""How far a detector's mAP would move on other images of the same kind: bootstrap intervals over images.

COCO's matching is done once; a resample (images drawn with replacement, Efron 1979) only weighs each image by how often
it was drawn. Models that looked at the same images are compared on the same resamples, so that a difference between
them has an interval of its own, which is narrower than the two models' intervals suggest.
"""

import contextlib
import io
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.evaluation.coco import results_of

RECALLS = np.linspace(0, 1, 101)
LEVEL = 0.95


class Category(NamedTuple):
    """The detections of one category in all images, best first, and its objects."""

    image: np.ndarray    # (n,), index of the image
    right: np.ndarray    # (T, n) bool, matched at each IoU
    wrong: np.ndarray    # (T, n) bool, not matched; neither for detections of crowds and the like
    objects: np.ndarray  # (images,), objects that are to be found
    score: np.ndarray    # (n,), falling


def matches_of(truth, detections, category_of, image_ids):
    """COCO's matching, boxes of all sizes, the 100 best detections of an image.

    Args:
        all: of utils.evaluation.coco.coco_scores.
    Returns:
        [Category, ...] of the categories that have objects.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO()
        found.dataset = truth.dataset | {"annotations": results_of(detections, category_of, "bbox")}
        found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.imgIds, evaluator.params.catIds = sorted(image_ids), sorted(category_of.values())
        evaluator.params.areaRng, evaluator.params.areaRngLbl = evaluator.params.areaRng[:1], ["all"]
        evaluator.evaluate()
    images, levels = len(evaluator.params.imgIds), len(evaluator.params.iouThrs)
    categories = []
    for k in range(len(evaluator.params.catIds)):
        parts = [(i, part) for i, part in enumerate(evaluator.evalImgs[k * images:(k + 1) * images]) if part]
        objects = np.zeros(images)
        for i, part in parts:
            objects[i] = np.sum(np.asarray(part["gtIgnore"]) == 0)
        if not objects.sum():
            continue
        scores = np.concatenate([part["dtScores"] for _, part in parts])
        matched, ignored = (np.concatenate([np.reshape(part[key], (levels, -1)) for _, part in parts], 1) > 0
                            for key in ("dtMatches", "dtIgnore"))
        image = np.repeat([i for i, _ in parts], [len(part["dtScores"]) for _, part in parts])
        order = np.argsort(-scores, kind="mergesort")  # as COCOeval orders equal scores
        categories.append(Category(image[order], (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order],
                                   objects, scores[order]))
    return categories


def weighted_map(categories, weights):
    """-> mAP as COCO computes it where image i stands weights[i] times in the data set; NaN without any object.

    Args:
        categories: of `matches_of`; weights: (images,), not negative.
    """
    found = weighted_precisions(categories, weights)
    return float(found.mean()) if len(found) else float("nan")


def weighted_precisions(categories, weights):
    """-> (categories that have objects, IoUs): the average precisions that `weighted_map` is the mean of."""
    values = []
    for own in categories:
        objects = own.objects @ weights
        if not objects:
            continue
        weight = weights[own.image]
        seen = weight > 0
        if not seen.any():
            values.append([0.0] * len(own.right))
            continue
        right, wrong = ((part[:, seen] * weight[seen]).cumsum(1) for part in (own.right, own.wrong))  # (T, n)
        recall = right / objects
        precision = right / np.maximum(right + wrong, np.finfo(float).tiny)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]  # at this recall or a higher one
        row = []
        for levels, reached in zip(precision, recall, strict=True):
            at = np.searchsorted(reached, RECALLS, side="left")
            row.append(np.where(at < len(levels), levels[np.minimum(at, len(levels) - 1)], 0.0).mean())
        values.append(row)
    return np.array(values)


def drawn(rng, images):
    """-> (images,) how often each of `images` images is in one resample, drawn with replacement."""
    return np.bincount(rng.integers(images, size=images), minlength=images).astype(float)


def resampled_maps(models, images, resamples=1000, seed=0):
    """-> {model: (resamples,) mAP}, the same resamples for every model.

    Args:
        models: {model: its [Category, ...] of `matches_of`}; images: how many were looked at.
    """
    rng, found = np.random.default_rng(seed), {name: [] for name in models}
    for _ in range(resamples):
        weights = drawn(rng, images)
        for name, categories in models.items():
            found[name].append(weighted_map(categories, weights))
    return {name: np.array(values) for name, values in found.items()}


def interval(values):
    """-> (low, high), the percentile interval of resampled numbers; resamples without any object do not count, and
    without any other there is None."""
    if np.isnan(values).all():
        return None
    low, high = np.nanquantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
