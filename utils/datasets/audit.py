"""What a detection data set holds, for a person who is about to train on it: counts, sizes, and what looks odd."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import system
from utils.datasets.annotations import notes_on_images, read_annotations, usable_boxes

TINY = 8  # pixels, side of a square of the box's area once the image has the training's size: one cell of a feature map


class Image(NamedTuple):
    """One image with its boxes."""

    path: Path
    boxes: np.ndarray   # (n, 4) xyxy pixels of the file
    labels: np.ndarray  # (n,) rows of Audit.names
    reasons: list       # why a person should look at it, the worst first; [] for none


class Audit(NamedTuple):
    """One split of a data set."""

    title: str         # as tables call it
    names: list        # of the classes, in the order of the annotations
    counts: dict       # {class: objects}
    images: list       # of Image, all of them
    sizes: np.ndarray  # (N,) sides of squares as large as the boxes, pixels of an image of the training's size
    notes: list        # lines about boxes that were clipped, left out, or stand there twice

    @property
    def empty(self):
        """Images without objects."""
        return sum(not len(image.boxes) for image in self.images)

    @property
    def tiny(self):
        """Boxes below TINY pixels."""
        return int((self.sizes < TINY).sum())

    @property
    def odd(self):
        """-> the images with reasons, those with the most serious first."""
        return sorted((image for image in self.images if image.reasons), key=lambda image: _RANK[_kind(image)])

    def paths(self):
        return [image.path for image in self.images]


_RANK = {"same": 0, "boxes": 1, "tiny": 2, "empty": 3}


def _kind(image):
    return image.reasons[0].split(":")[0]


def of_split(split, side, title):
    """-> Audit of a layouts.Split.

    Args:
        side: of the square that the training makes of an image, pixels.
    Raises:
        UserError: annotations that no training would take.
    """
    content = read_annotations(split, masks=False)
    names = {category["id"]: category["name"] for category in content["categories"]}
    row = {category: i for i, category in enumerate(names)}
    images = content["images"]
    objects = [note for note in content["annotations"] if not note.get("iscrowd", 0)]
    usable = usable_boxes(objects, images, str(split))
    labels = np.array([row[note["category_id"]] for note in objects], np.int64)
    extent = np.array([[image["width"], image["height"]] for image in images], float).reshape(-1, 2)[usable.owner]
    sizes = np.sqrt(np.prod((usable.corners[:, 2:] - usable.corners[:, :2]) / extent, 1)) * side  # (M,)
    left_out = Counter(usable.owner[~usable.kept].tolist())
    tiny = Counter(usable.owner[usable.kept & (sizes < TINY)].tolist())
    order = np.argsort(usable.owner, kind="stable")
    ends = np.searchsorted(usable.owner[order], np.arange(len(images) + 1))
    found = []
    for i, image in enumerate(images):
        own = order[ends[i]:ends[i + 1]]
        own = own[usable.kept[own]]
        reasons = [f"boxes: {left_out[i]} thinner than a pixel"] if left_out[i] else []
        reasons += [f"tiny: {tiny[i]} of {len(own)} boxes below {TINY} pixels at {side}"] if tiny[i] else []
        reasons += [] if len(own) else ["empty: no object"]
        found.append(Image(split.folder / image["file_name"], usable.corners[own], labels[own], reasons))
    kept = Counter(labels[usable.kept].tolist())
    return Audit(title, list(names.values()), {name: kept[row[category]] for category, name in names.items()}, found,
                 sizes[usable.kept], usable.notes + notes_on_images(images, str(split)))


def mark_shared(audit, other, same):
    """Note in an audit's images that their content is in another split as well.

    Args:
        same: {path of `audit`: path of `other`} of image_check.same_content.
    """
    for image in audit.images:
        if image.path in same:
            image.reasons.insert(0, f"same: as {same[image.path].name} of {other.title}")


def summary(audit):
    """-> one line: images, empty and tiny ones, objects of every class."""
    counts = [f"{name} {count}" for name, count in audit.counts.items() if count]
    return (f"{audit.title}: {len(audit.images)} images ({audit.empty} without objects), {len(audit.sizes)} objects "
            f"({audit.tiny} below {TINY} pixels at the training's size): {system.listed(counts, 20)}")
