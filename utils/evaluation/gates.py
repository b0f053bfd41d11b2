"""What gates and rainy branches are worth: detections of every branch are computed once, then combined per image.

`found` is {domain: {branch: evaluation.coco.detect's result}} with domains "clean" and "rainy"; `scores` is {domain:
{image_id: probability of rain}}. Whether an image takes one branch or the other changes nothing in the branch itself,
so a gate is a choice per image; tests hold the choice against the conditional model's own output.
"""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object

from utils import datasets, processes
from utils.config import UserError
from utils.datasets import loaders
from utils.evaluation import intervals
from utils.evaluation.coco import coco_scores, entries, ground_truth, merged_ground_truth
from utils.images import to_floats

COLUMNS = ("mAP", "AP50", "AP75")
DOMAINS = ("clean", "rainy")


class AlwaysRainy(torch.nn.Module):
    """Stands in for a rain detector where every image is to be de-rained."""

    def logit(self, images):
        """(B, 3, H, W) -> (B,) infinity."""
        return images.new_full((len(images),), torch.inf)


@torch.no_grad()
def gate_scores(rain_detector, loader, device):
    """-> {image_id: probability of rain} over a validation loader, of all ranks."""
    def answers(batch):
        images = to_floats(batch["images"], device)
        return list(zip(batch["image_ids"], rain_detector.probability(images).tolist(), strict=True))
    return dict(gather_object([one for several in loaders.each(answers, loader) for one in several]))


@dataclass
class Part:
    """A set of images to score on: [(domain, image_id), ...], their ground truth, and the ids they have in it."""

    images: list
    truth: object  # pycocotools COCO
    new_ids: dict  # {(domain, image_id): id in truth}
    category_of: dict  # {label: category id}
    known: dict = field(default_factory=dict)  # scores by what was chosen: many gates choose alike

    def scores(self, found, choose):
        """COCO scores where an image takes the branch choose(domain, image_id); see the module."""
        taken = tuple(choose(*key) for key in self.images)
        if taken not in self.known:
            self.known[taken] = coco_scores(self.truth, self._entries(found, taken), self.category_of,
                                            list(self.new_ids.values()))
        return self.known[taken]

    def matches(self, found, choose):
        """COCO's matching where an image takes the branch choose(domain, image_id): [intervals.Category, ...]."""
        return intervals.matches_of(self.truth, self._entries(found, [choose(*key) for key in self.images]),
                                    self.category_of, list(self.new_ids.values()))

    def order(self):
        """-> indices into `images`, in the order in which `matches` numbers them: pycocotools' is that of rising id."""
        return sorted(range(len(self.images)), key=lambda i: self.new_ids[self.images[i]])

    def _entries(self, found, taken):
        return entries({self.new_ids[key]: found[key[0]][name][key[1]]
                        for key, name in zip(self.images, taken, strict=True)})


def part_of(data):
    """-> Part of all images of one CocoDetectionDataset."""
    keys = [(data.domain, image_id) for image_id in data.image_ids]
    return Part(keys, ground_truth(data.annotations), {key: key[1] for key in keys}, data.category_of)


def require_rain_share(rain_share):
    """UserError unless RAIN_SHARE is one."""
    if not 0 <= rain_share <= 1:
        raise UserError(f"RAIN_SHARE = {rain_share}: choose a share in [0, 1]")


def mixed_part(clean, rainy, rain_share, seed):
    """-> Part of clean and rainy images, `rain_share` of them rainy: a seeded choice in which no scene is seen twice.

    Args:
        clean, rainy: CocoDetectionDataset; a file name that both hold (a twin) is taken once, and as many images as the
            share allows.
    """
    require_rain_share(rain_share)
    twins = {*clean.files} & {*rainy.files}
    if twins:
        wet = _seeded(rainy, min(round(rain_share * len({*clean.files, *rainy.files})), len(rainy)), seed)
        taken = {rainy.files[i] for i in wet}
        dry = [i for i, name in enumerate(clean.files) if name not in taken]
        if len(twins) < max(len(clean), len(rainy)):  # some twins are missing: there may be too many of one kind
            total = min(len(wet) / rain_share if rain_share else np.inf,
                        len(dry) / (1 - rain_share) if rain_share < 1 else np.inf)
            wet, dry = wet[:round(rain_share * total)], dry[:round((1 - rain_share) * total)]
    else:
        total = min(len(rainy) / rain_share if rain_share else np.inf,
                    len(clean) / (1 - rain_share) if rain_share < 1 else np.inf)
        wet = _seeded(rainy, round(rain_share * total), seed)
        dry = _seeded(clean, round((1 - rain_share) * total), seed)
    keys = [("clean", clean.image_ids[i]) for i in dry] + [("rainy", rainy.image_ids[i]) for i in wet]
    new_ids = {key: number for number, key in enumerate(keys, 1)}
    category_of = _common_categories(clean, rainy)
    truth = merged_ground_truth(
        {data.domain: data.annotations for data in (clean, rainy)}, new_ids,
        {data.domain: {category: category_of[label] for label, category in data.category_of.items()}
         for data in (clean, rainy)})
    return Part(keys, truth, new_ids, category_of)


def _seeded(data, count, seed):
    """-> indices of `count` images, a seeded choice."""
    return datasets.seeded_subset(data.files, 100 * count / len(data.files), seed) if count else []


def _common_categories(clean, rainy):
    """-> {label: category id} for both annotation files: the clean one's numbers, and new ones for classes that only
    the rainy one has where its own mean something else there."""
    both = dict(clean.category_of)
    for label, category in rainy.category_of.items():
        if label not in both:
            taken = {*both.values()}
            both[label] = category if category not in taken else next(i for i in itertools.count(1) if i not in taken)
    return both


def taking(branch, goes, plain="vanilla"):
    """-> choose(domain, image_id): `branch` for images that `goes` says True of, else `plain`."""
    return lambda *key: branch if goes(*key) else plain


def graded_gate(scores, steps, plain="vanilla"):
    """-> choose(domain, image_id) of a gate that takes more of a specialist the surer it is of rain: the probability,
    rounded to a step. steps: names in `found`, evenly spaced from the least to the whole specialist."""
    names = [plain, *steps]
    return lambda domain, image_id: names[int(len(steps) * scores[domain][image_id] + 0.5)]


def hard_gate(scores, threshold):
    """-> goes(domain, image_id) of a gate: rainy from `threshold` on."""
    return lambda domain, image_id: scores[domain][image_id] >= threshold


def sweep(part, found, scores, plain, branch, milliseconds, steps=21):
    """The gate at many thresholds.

    Args:
        part: Part; found, scores: see the module; plain, branch: names in `found`.
        milliseconds: {"gate", "plain", "branch": ms per image}, to work out the mean cost.
    Returns:
        [{"threshold", "derained": share, "mAP", "ms": per image}, ...], rising thresholds; 0 sends every image to the
        branch, the last one (above 1) none.
    """
    rows = []
    for threshold in processes.progress([*np.linspace(0, 1, steps), 1.01], "thresholds"):
        goes = hard_gate(scores, threshold)
        share = float(np.mean([goes(*key) for key in part.images]))
        cost = milliseconds["gate"] + share * milliseconds["branch"] + (1 - share) * milliseconds["plain"]
        rows.append({"threshold": float(threshold), "derained": share, "ms": cost,
                     "mAP": part.scores(found, taking(branch, goes, plain))["mAP"]})
    return rows


class Chosen(NamedTuple):
    """A threshold that was chosen by the mAP of a mix."""

    threshold: float | None  # None: the mix has no object
    score: float | None  # mAP of the mix that is to be expected: each half of the images scored with the other half's
                         # choice; None: too few images hold objects for two halves
    as_set: float | None = None  # on the same halves: mean mAP with the threshold that is set,
    plain: float | None = None  # and where no image takes the branch


def best_threshold(part, found, scores, branch, as_set, plain="vanilla", plain_matches=None, candidates=21, splits=10,
                   seed=0):
    """-> Chosen: the threshold with the best mAP on average over random halves of the images, so that few images that
    happen to lie well do not decide; among equals the middle one. Of images too few for halves it is the best of all.

    Args:
        part: Part; found, scores: see the module; plain, branch: names in `found`; as_set: the threshold in use.
        plain_matches: part.matches of `plain` on all images, where they are there already.
        candidates: thresholds that are tried, between the images' own probabilities.
    """
    one = plain_matches or part.matches(found, lambda *key: plain)
    other = part.matches(found, lambda *key: branch)
    order = part.order()
    probabilities = np.array([scores[part.images[i][0]][part.images[i][1]] for i in order])
    at = np.unique(np.quantile(probabilities, np.linspace(0, 1, candidates), method="nearest"))
    thresholds = np.concatenate([[0.0], (at[1:] + at[:-1]) / 2, [1.0 if at[-1] < 1 else 1.01]])

    def tables_of(several):
        return [[_merged(*pair, probabilities >= threshold) for pair in zip(one, other, strict=True)]
                for threshold in several]
    tables, known = tables_of(thresholds), tables_of((as_set, np.inf))
    rng, halves, honest, beside = np.random.default_rng(seed), [], [], []
    for _ in range(splits):
        first = np.zeros(len(order), bool)
        for domain in DOMAINS:  # half of each
            own = rng.permutation([place for place, i in enumerate(order) if part.images[i][0] == domain])
            first[own[:len(own) // 2].astype(int)] = True
        values = [_maps(tables, weights) for weights in (first, ~first)]
        if not np.isnan(values).any():  # both halves hold objects
            honest += [values[1][_middle_best(values[0])], values[0][_middle_best(values[1])]]
            halves += values
            beside += [_maps(known, weights) for weights in (first, ~first)]
    means = np.mean(halves, 0) if halves else _maps(tables, np.ones(len(order)))
    best = None if np.isnan(means).any() else float(thresholds[_middle_best(means)])
    return Chosen(best, float(np.mean(honest)), *np.mean(beside, 0).tolist()) if honest else Chosen(best, None)


def _maps(tables, weights):
    """-> mAP of every table ([intervals.Category, ...]) where image i stands weights[i] times; NaN without objects."""
    return np.array([intervals.weighted_map(table, weights.astype(float)) for table in tables])


def _middle_best(values):
    best = np.flatnonzero(values >= values.max() - 1e-12)
    return best[len(best) // 2]


def _merged(one, other, takes_other):
    """intervals.Category of two branches -> that of a gate: `other`'s detections in images where takes_other (images,)
    bool, else `one`'s."""
    kept = ~takes_other[one.image], takes_other[other.image]
    score = np.concatenate([one.score[kept[0]], other.score[kept[1]]])
    order = np.argsort(-score, kind="mergesort")
    image, right, wrong = (np.concatenate([getattr(own, name)[..., keep] for own, keep in zip((one, other), kept,
                                                                                               strict=True)], -1)
                           for name in ("image", "right", "wrong"))
    return intervals.Category(image[order], right[:, order], wrong[:, order], one.objects, score[order])
