"""What stands behind a detector's AP: curves, thresholds, confusions, calibration, the worst mistakes. Numpy alone.

Detections are matched to objects at an IoU of 0.5 as COCO does it: best score first, each takes the object of its class
that it covers best and that is still free; what lies on a crowd region of its class alone counts neither way. Tests
hold AP50 against COCOeval. A number that does not exist (the precision of no detection, the AP of a class without
objects) is None. faster-coco-eval has curves too: sampled at 101 recalls, so that the best threshold lies between them,
and without calibration.
"""

from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from utils.boxes import MAX_DETECTIONS
from utils.evaluation import classification
from utils.evaluation.coco import METRICS, with_masks_only
from utils.evaluation.intervals import RECALLS

IOU = 0.5              # a detection that covers its object so well is right
NEAR = 0.1             # one that covers an object of its class at least so well, but not IOU, is badly placed (TIDE,
                       # Bolya et al. 2020)
BACKGROUND = "background"
SCORES = np.linspace(0, 1, 101)  # where F1 over the score is drawn


class Matching(NamedTuple):
    """The n detections and m objects that count, of all images; detections image by image, best first."""

    names: list               # K classes, in the order of their category ids
    score: np.ndarray         # (n,) in [0, 1]
    label: np.ndarray         # (n,) index of the class
    image: np.ndarray         # (n,) image ids
    box: np.ndarray           # (n, 4) [x, y, w, h] pixels
    found: np.ndarray         # (n,) index of the object that it is right about, -1 for none
    pairs: list               # n lists of (object, IoU) with an IoU of NEAR or more, of any class
    masks: list               # n RLEs, empty for boxes
    object_label: np.ndarray  # (m,) index of the class
    object_image: np.ndarray  # (m,) image ids
    object_box: np.ndarray    # (m, 4) [x, y, w, h] pixels
    object_area: np.ndarray   # (m,) of the annotation
    object_masks: list        # m RLEs, empty for boxes


def match(truth, detections, category_of, image_ids, iou_type="bbox"):
    """Match detections to objects.

    Args:
        all: of utils.evaluation.coco.coco_scores.
    Returns:
        Matching.
    """
    with_masks = iou_type == "segm"
    truth = with_masks_only(truth) if with_masks else truth
    categories = sorted(category_of.values())
    index = {category: k for k, category in enumerate(categories)}
    by_image = {image_id: [] for image_id in image_ids}
    for one in detections:
        if one["label"] in category_of and one["image_id"] in by_image:
            by_image[one["image_id"]].append(one)
    columns, objects = {name: [] for name in ("score", "label", "image", "box", "found", "pairs", "masks")}, []
    for image_id in sorted(by_image):
        notes = [note for note in truth.imgToAnns.get(image_id, ()) if note["category_id"] in index]
        best = _best(by_image[image_id], category_of, index)
        overlaps = _overlaps(best, notes, truth if with_masks else None)
        number = np.full(len(notes), -1)
        for i, note in enumerate(notes):
            if not note["iscrowd"]:
                number[i] = len(objects)
                objects.append(note)
        free = number >= 0
        for one, own in zip(best, overlaps, strict=True):
            same = np.array([note["category_id"] == category_of[one["label"]] for note in notes], bool)
            taken, ignored = _taken(own, same, free, number >= 0)
            if ignored:
                continue
            if taken >= 0:
                free[taken] = False
            near = np.flatnonzero((own >= NEAR) & (number >= 0))
            values = {"score": one["score"], "label": index[category_of[one["label"]]], "image": image_id,
                      "box": one.get("bbox", (0, 0, 0, 0)), "found": number[taken] if taken >= 0 else -1,
                      "pairs": [(int(number[i]), float(own[i])) for i in near]}
            for name, value in (values | ({"masks": one["segmentation"]} if with_masks else {})).items():
                columns[name].append(value)
    arrays = {name: np.asarray(columns[name], kind) for name, kind in (
        ("score", float), ("label", int), ("found", int))}
    return Matching([truth.cats[category]["name"] for category in categories], **arrays,
                    image=np.asarray(columns["image"]), box=np.asarray(columns["box"], float).reshape(-1, 4),
                    pairs=columns["pairs"], masks=columns["masks"],
                    object_label=np.array([index[note["category_id"]] for note in objects], int),
                    object_image=np.array([note["image_id"] for note in objects]),
                    object_box=np.array([note["bbox"] for note in objects], float).reshape(-1, 4),
                    object_area=np.array([note["area"] for note in objects], float),
                    object_masks=[truth.annToRLE(note) for note in objects] if with_masks else [])


def _best(found, category_of, index):
    """-> an image's detections, best first, at most COCO's number of each class."""
    kept, counts = [], [0] * len(index)
    for i in np.argsort([-one["score"] for one in found], kind="stable"):
        k = index[category_of[found[i]["label"]]]
        counts[k] += 1
        if counts[k] <= MAX_DETECTIONS:
            kept.append(found[i])
    return kept


def _overlaps(found, notes, truth):
    """-> (detections, objects) IoU of an image, of a crowd region the share of the detection in it; truth: the ground
    truth where masks are compared, else None."""
    if not found or not notes:
        return np.zeros((len(found), len(notes)))
    crowd = [int(note["iscrowd"]) for note in notes]
    if truth:
        return rle.iou([one["segmentation"] for one in found], [truth.annToRLE(note) for note in notes], crowd)
    return rle.iou(np.array([one["bbox"] for one in found], float), np.array([note["bbox"] for note in notes], float),
                   crowd)


def _taken(own, same, free, counts):
    """One detection: own (objects,) IoU; same, free, counts (objects,) bool: of its class, not taken yet, no crowd.
    -> (the object that it takes or -1, whether it lies on a crowd of its class instead)."""
    candidates = np.flatnonzero(same & free & (own >= IOU))
    if len(candidates):
        return candidates[::-1][np.argmax(own[candidates[::-1]])], False  # of equal ones the last, as COCOeval has it
    return -1, bool((same & ~counts & (own >= IOU)).any())


class Curve(NamedTuple):
    """What a threshold on the score gives: a point for each distinct score, the highest first."""

    score: np.ndarray  # (p,) keep detections from this score on
    right: np.ndarray  # (p,) of those kept
    kept: np.ndarray   # (p,)
    objects: int       # that are to be found

    @property
    def f1(self):
        """(p,) 2 right / (kept + objects)."""
        return 2 * self.right / np.maximum(self.kept + self.objects, 1)

    def best(self):
        """-> {"threshold", "F1", "precision", "recall"} where F1 is highest (of equals the highest score), None where
        there is no such number: no object, no detection, or none that is right."""
        if not self.objects:
            return {"threshold": None, "F1": None, "precision": None, "recall": None}
        if not len(self.score):
            return {"threshold": None, "F1": 0.0, "precision": None, "recall": 0.0}
        at = int(np.argmax(self.f1))
        right = int(self.right[at])
        return {"threshold": float(self.score[at]) if right else None, "F1": float(self.f1[at]),
                "precision": right / int(self.kept[at]), "recall": right / self.objects}

    def f1_from(self, scores):
        """-> (len(scores),) F1 at these thresholds, 0 where nothing is kept; None without objects."""
        if not self.objects:
            return None
        kept = np.searchsorted(-self.score, -np.asarray(scores), side="right")  # points whose score is high enough
        return np.append(0.0, self.f1)[kept]


def curve(scores, right, objects):
    """-> Curve of detections with these scores (n,), `right` (n,) bool, where there are so many objects."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(order) else order
    return Curve(scores[order][last], np.cumsum(right[order])[last], last + 1, int(objects))


def precisions(scores, right, objects):
    """-> (101,) precision at the recalls 0, 0.01, ..., 1, the best one at that recall or a higher one, whose mean is
    COCO's AP at this IoU; None without objects."""
    if not objects:
        return None
    right = np.asarray(right, bool)[np.argsort(-scores, kind="stable")].cumsum()
    precision = np.append(np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1], 0.0)
    return precision[np.searchsorted(right / objects, RECALLS, side="left")]


class Details(NamedTuple):
    """Of one detector on one set of images."""

    names: list           # K classes
    matching: Matching
    curves: list          # K Curves
    precisions: list      # K of `precisions`
    pooled: Curve         # of all classes together, with one threshold
    precision: object     # (101,) mean of `precisions`, None without any object
    threshold: object     # where the pooled F1 is highest, None where no detection is right
    confusion: object     # (K + 1, K + 1) counts [object's class, detected class] at it, the last is the background
    reliability: list     # [ReliabilityBin, ...] of all detections
    images: int


def details(truth, detections, category_of, image_ids, iou_type="bbox"):
    """-> Details. Args: of utils.evaluation.coco.coco_scores."""
    found = match(truth, detections, category_of, image_ids, iou_type)
    right, classes = found.found >= 0, range(len(found.names))
    parts = [(found.score[found.label == k], right[found.label == k], int((found.object_label == k).sum()))
             for k in classes]
    own = [precisions(*part) for part in parts]
    known = [values for values in own if values is not None]
    pooled = curve(found.score, right, len(found.object_label))
    threshold = pooled.best()["threshold"]
    return Details(found.names, found, [curve(*part) for part in parts], own, pooled,
                   np.mean(known, 0) if known else None, threshold, confusion(found, threshold),
                   classification.reliability(found.score, right), len(image_ids))


def confusion(found, threshold):
    """Count what detections from a threshold on say about objects.

    The matching within classes comes first, so that the diagonal holds the detections that are right; those left over
    take the free objects of other classes that they cover (IoU 0.5), best score first.

    Args:
        found: Matching; threshold: None where there is none.
    Returns:
        (K + 1, K + 1) int [object's class, detected class]; row K: nothing was there, column K: missed. None without a
        threshold.
    """
    if threshold is None:
        return None
    size = len(found.names)
    counts, kept = np.zeros((size + 1, size + 1), int), found.score >= threshold
    free = np.ones(len(found.object_label), bool)
    free[found.found[kept & (found.found >= 0)]] = False
    for i in sorted(np.flatnonzero(kept), key=lambda i: -found.score[i]):
        label = found.label[i]
        if found.found[i] >= 0:
            counts[label, label] += 1
            continue
        others = [(iou, one) for one, iou in found.pairs[i] if iou >= IOU and free[one]
                  and found.object_label[one] != label]
        if others:
            _, one = max(others)
            free[one] = False
        counts[found.object_label[one] if others else size, label] += 1
    for one in np.flatnonzero(free):
        counts[found.object_label[one], size] += 1
    return counts


def false_positives(one, most):
    """-> [(index of the detection, what is wrong with it), ...], the most confident ones of a Details."""
    found = one.matching
    wrong = np.flatnonzero(found.found < 0)
    wrong = wrong[np.argsort(-found.score[wrong], kind="stable")][:most]
    return [(int(i), _fault(found, i)) for i in wrong]


def _fault(found, i):
    """-> words for a detection that is not right."""
    pairs = sorted(found.pairs[i], key=lambda pair: -pair[1])
    own = [iou for one, iou in pairs if found.object_label[one] == found.label[i]]
    others = [(one, iou) for one, iou in pairs if found.object_label[one] != found.label[i] and iou >= IOU]
    if own and own[0] >= IOU:
        return "found twice"
    if others:
        return f"is {found.names[found.object_label[others[0][0]]]}"
    return f"badly placed, IoU {own[0]:.2f}" if own else "nothing there"


def misses(one, most):
    """-> [(index of the object, the score of the detection that is right about it below the threshold, or None), ...],
    the largest objects of a Details that were not found at its threshold."""
    found = one.matching
    scores = dict(zip(found.found.tolist(), found.score.tolist(), strict=True))  # -1 is no object's index
    limit = np.inf if one.threshold is None else one.threshold
    missed = [i for i in np.argsort(-found.object_area, kind="stable").tolist() if scores.get(i, -np.inf) < limit]
    return [(i, scores.get(i)) for i in missed[:most]]


def numbers(one, scores):
    """-> what results.json holds of a Details: plain data, None for what does not exist.

    Args:
        scores: of coco_scores, for the APs by size.
    """
    found = one.matching
    right = found.found >= 0
    rows = []
    for k, name in enumerate(found.names):
        own = found.label == k
        rows.append({"class": name, "objects": one.curves[k].objects, "detections": int(own.sum()),
                     "AP50": None if one.precisions[k] is None else float(one.precisions[k].mean()),
                     **one.curves[k].best(), "calibration_error": _calibration_error(found.score[own], right[own])})
    return {"IoU": IOU, "images": one.images, "objects": len(found.object_label), "detections": len(found.score),
            **{name: defined(scores[name]) for name in METRICS}, **one.pooled.best(),
            "calibration_error": _calibration_error(found.score, right), "classes": rows,
            "confusion": _confusion_by_name(one),
            "reliability": [row._asdict() for row in one.reliability],
            "precision_at_recall": None if one.precision is None else [round(float(v), 4) for v in one.precision[::10]],
            "F1_from_score": None if not one.pooled.objects else [
                round(float(v), 4) for v in one.pooled.f1_from(SCORES[::10])]}


def _confusion_by_name(one):
    """-> {object's class: {detected class: count}}, without zeros: of 80 classes few are ever confused."""
    if one.confusion is None:
        return None
    names, found = [*one.matching.names, BACKGROUND], {}
    for i, j in np.argwhere(one.confusion).tolist():
        found.setdefault(names[i], {})[names[j]] = int(one.confusion[i, j])
    return found


def _calibration_error(scores, right):
    return classification.calibration_error(scores, right) if len(scores) else None


def defined(score):
    """-> a score of coco_scores, None for its -1: there is no such object."""
    return None if score < 0 else score
