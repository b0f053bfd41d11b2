"""Annotations as COCO's entries: what must be in them, and how their categories map to a model's classes. Where they
lie, and in which forms, is in layouts.py."""

import math
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

from utils import system
from utils.config import UserError
from utils.datasets import layouts

# Spellings of one class in published label lists (left: PASCAL VOC style, as in PekingU/rtdetr_*; right: COCO).
SAME_CLASS = {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
              "diningtable": "dining table", "tvmonitor": "tv"}


def read_annotations(source, masks=True):
    """-> the content of a COCO annotation file, or what is the same of YOLO's or Pascal VOC's; UserError where it is
    none, which names file and line.

    Args:
        source: layouts.Split, or the path of a COCO file.
        masks: False drops the polygons while reading: a third of the memory for COCO's training file, and faster.
    """
    if isinstance(source, layouts.Split) and source.form != "coco":
        content = layouts.read_foreign(source, masks)
        _require_entries(content, str(source))
        return content
    path = source.file if isinstance(source, layouts.Split) else source
    try:
        content = system.read_json(path, object_hook=None if masks else _without_mask)
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(path).as_posix()} is not readable JSON: {error}") from error
    missing = [key for key in ("images", "annotations", "categories")
               if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{Path(path).as_posix()} has no {', '.join(missing)}: not a COCO annotation file")
    try:
        _require_entries(content, Path(path).as_posix())
    except TypeError:  # a number where a list should be, a list as an id
        raise UserError(f"{Path(path).as_posix()}: its parts are not lists of entries with plain ids; not a COCO "
                        "annotation file") from None
    return content


class UsableBoxes(NamedTuple):
    """What of M annotated boxes is trained on and scored."""

    owner: np.ndarray  # (M,) int64: which of the images each is in
    corners: np.ndarray  # (M, 4) float64 [x1, y1, x2, y2] in pixels, the parts inside of their images
    kept: np.ndarray  # (M,) bool: at least a pixel wide and high there; the others are left out everywhere
    notes: list  # lines about boxes that were clipped or left out


def usable_boxes(objects, images, source):
    """Clip boxes to their images and leave thin ones out; the same rules for every experiment.

    Args:
        objects: annotations of a file that `read_annotations` has read, or some of them; images: its images.
        source: named in errors and notes; None for neither, where the file has been checked before.
    Raises:
        UserError: boxes that seem to be shares of the image, or [x1, y1, x2, y2].
    """
    index_of = {image["id"]: i for i, image in enumerate(images)}
    owner = np.array([index_of[note["image_id"]] for note in objects], np.int64)
    extent = np.array([[image["width"], image["height"]] * 2 for image in images], np.float64).reshape(-1, 4)[owner]
    corners = np.array([note["bbox"] for note in objects], np.float64).reshape(-1, 4)
    shares = bool(len(corners)) and (corners >= 0).all() and (corners <= 1).all()
    # all of them would be boxes as [x1, y1, x2, y2], which of many true ones is next to impossible
    as_corners = (corners[:, 2:] > corners[:, :2]).all() and (corners[:, 2:] <= extent[:, 2:] + 1).all()
    sides = corners[:, 2:].copy()
    corners[:, 2:] += corners[:, :2]
    inside = np.clip(corners, 0, extent)
    kept = (inside[:, 2:] - inside[:, :2] >= 1).all(1)
    clipped = (np.abs(inside - corners) > 1).any(1) & kept
    left_out, cut, usable = int((~kept).sum()), int(clipped.sum()), int(kept.sum())
    if source is None:
        return UsableBoxes(owner, inside, kept, [])
    if left_out >= 5 and not usable and (sides >= 1).all():
        raise UserError(f"{source}: all {left_out} box(es) lie outside of their images: do the annotations belong to "
                        "images of another size?")
    if left_out and not usable and (shares or left_out >= 5):
        raise UserError(f"{source}: all {left_out} box(es) are thinner than one pixel: bbox must be [x, y, width, "
                        "height] in pixels, not in shares of the image")
    if (cut > usable / 2 and cut >= (2 if as_corners else 10)) or (cut and as_corners and usable >= 5):
        raise UserError(f"{source}: {cut} of {usable} boxes reach out of their image: bbox must be [x, y, width, "
                        "height], not [x1, y1, x2, y2]")
    same = Counter((note["image_id"], note["category_id"], *note["bbox"]) for note in objects)
    areas = sum(note.get("area") is not None and note["area"] < 1
                for note, used in zip(objects, kept, strict=True) if used)
    counts = {"box(es) reached out of their image by more than a pixel and were clipped": cut,
              "box(es) thinner than one pixel were left out": left_out,
              "object(s) stand there twice (same image, category and box): a detector finds one of them, the other "
              "counts as missed": sum(count - 1 for count in same.values()),
              "object(s) have an area below one pixel, 0 or a share of the image: they count as small, whatever their "
              "box is": areas}
    return UsableBoxes(owner, inside, kept, [f"{source}: {count} {what}" for what, count in counts.items() if count])


def image_by_image(owner, kept, count):
    """Order objects by their images, and within one as they were.

    Args:
        owner: (M,) of UsableBoxes; kept: (M,) bool; count: of images.
    Returns:
        (n,) indices of the kept objects; (count + 1,) ends: those of image i are indices[ends[i]:ends[i + 1]].
    """
    chosen = np.flatnonzero(kept)
    ends = np.cumsum([0, *np.bincount(owner[chosen], minlength=count)])
    return chosen[np.argsort(owner[chosen], kind="stable")], ends


def notes_on_images(images, source):
    """-> lines about images of a file that are allowed and yet hardly meant."""
    counts = Counter(image["file_name"] for image in images)
    double = [name for name, count in counts.items() if count > 1]
    return [f"{source}: {len(double)} file name(s) stand under several image ids, so that each shows a part of the "
            f"objects: {system.listed(double, 3)}"] if double else []


def require_own_ids(content, part, source):
    """UserError that names `source` where two entries of a part ("images", "annotations", "categories") share an id."""
    counts = Counter(entry["id"] for entry in content[part])
    if double := [entry_id for entry_id, count in counts.items() if count > 1]:
        raise UserError(f"{source}: several '{part}' have the id {double[0]} ({len(double)} ids stand twice or more): "
                        "give every entry its own")


def _without_mask(entry):
    entry.pop("segmentation", None)
    return entry


def _is_number(value):
    return isinstance(value, (int, float)) and abs(value) < math.inf  # false for NaN


def _require_entries(content, source):
    """UserError that names `source` and the first entry which lacks something, or refers to what is not there."""
    needed = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"),
              "annotations": ("id", "image_id", "category_id", "bbox")}
    for part, keys in needed.items():
        for entry in content[part]:
            if missing := [key for key in keys if not isinstance(entry, dict) or key not in entry]:
                raise UserError(f"{source}: an entry of '{part}' has no {', '.join(missing)}: "
                                f"{str(entry)[:120]}")
    for image in content["images"]:
        name = image["file_name"]
        if not isinstance(name, str):
            raise UserError(f"{source}: image {image['id']}: file_name {str(name)[:40]} is no text")
        if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):  # half a character
            raise UserError(f"{source}: image {image['id']}: file_name {ascii(name)[:120]} holds characters that no "
                            "file name has")
        path = PureWindowsPath(name)  # knows both slashes
        if path.root or ".." in path.parts:
            # it would leave the folder: a rainy twin, whose annotations are a copy, would read the clean images
            raise UserError(f"{source}: image {image['id']}: file_name {name[:120]} must be a path below the image "
                            "folder, such as 000000000139.jpg")
        if not all(_is_number(image[side]) and image[side] > 0 for side in ("width", "height")):
            raise UserError(f"{source}: image {image['id']}: width and height must be positive numbers, "
                            f"not {str(image['width'])[:20]!r} and {str(image['height'])[:20]!r}")
    for category in content["categories"]:
        name = category["name"]
        if not (isinstance(name, str) and name.strip()):
            raise UserError(f"{source}: category {category['id']} is called {str(name)[:60]!r}; a name is text, and "
                            "not empty")
    for note in content["annotations"]:
        box = note["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
            raise UserError(f"{source}: annotation {note['id']}: bbox {str(box)[:80]} is not "
                            "[x, y, width, height]")
        if box[2] < 0 or box[3] < 0:
            raise UserError(f"{source}: annotation {note['id']}: bbox {str(box)[:80]} has a negative width or height: "
                            "bbox must be [x, y, width, height] from the upper left corner")
        if note.get("iscrowd") not in (None, 0, 1):
            raise UserError(f"{source}: annotation {note['id']}: iscrowd {str(note['iscrowd'])[:40]!r} is not 0 or 1")
        if (area := note.get("area")) is not None and not (_is_number(area) and area >= 0):
            raise UserError(f"{source}: annotation {note['id']}: area {str(area)[:40]!r} is not a number of pixels")
    _require_listed(content, "category_id", "categories", source)
    for part in ("images", "categories"):
        require_own_ids(content, part, source)
    _require_listed(content, "image_id", "images", source)


def _require_listed(content, key, part, source):
    """UserError where annotations name by `key` what the part does not list."""
    known = {entry["id"] for entry in content[part]}
    strays = sorted({note[key] for note in content["annotations"]} - known, key=str)
    alike = {str(value) for value in known} & set(map(str, strays))
    if alike:
        here, there = (next(value for value in values if str(value) in alike) for values in (strays, known))
        raise UserError(f"{source}: annotations have the {key} {here!r}, '{part}' the id {there!r}: one is text, the "
                        "other a number; write both as numbers")
    if strays:
        raise UserError(f"{source}: annotations name {key.replace('_', ' ')}(s) {system.listed(strays)} that its "
                        f"'{part}' do not list")


def label_table(categories, id2label, source, unknown="error"):
    """Map a file's category ids to a model's labels by name.

    Args:
        categories: the annotation file's [{"id", "name"}, ...].
        id2label: {label: name} of the model, as in a Hugging Face config.
        source: named in the error.
        unknown: "error", "ignore" to leave categories out that the model does not know, None to only look.
    Returns:
        {category id: label}.
    Raises:
        UserError: the model does not know a category, or no category at all.
    """
    if unknown not in ("error", "ignore", None):
        raise UserError(f"UNKNOWN_CATEGORIES = {unknown!r}: choose error or ignore")
    known = {plain_name(name): int(label) for label, name in id2label.items()}
    table = {c["id"]: known[plain_name(c["name"])] for c in categories if plain_name(c["name"]) in known}
    left_out = [repr(c["name"]) for c in categories if c["id"] not in table]
    if left_out and unknown and (unknown == "error" or not table):
        raise UserError(f"{source}: the detector does not know {system.listed(left_out)} (its classes: "
                        f"{system.listed(id2label.values(), 8)}). Use a detector trained on these classes, or "
                        "UNKNOWN_CATEGORIES = 'ignore' to leave them out.")
    return table


def one_category_each(label_of, annotations, source):
    """Turn `label_table`'s answer round: -> {label: category id}, under which its detections are scored.

    A category without annotations counts for nothing (Roboflow's exports have one, often of a class's name). UserError
    where two categories with annotations are the same class: the objects of one of them would all count as missed.
    """
    used = {note["category_id"] for note in annotations}
    found = {}
    for category, label in sorted(label_of.items(), key=lambda item: item[0] in used):
        if category in used and found.get(label) in used:
            raise UserError(f"{source}: categories {found[label]} and {category} are the same class of the detector; "
                            "give their annotations one category_id")
        found[label] = category
    return found


def plain_name(name):
    """-> the spelling by which class names are compared: without capitals, COCO's word where there are two."""
    name = str(name).strip().lower()
    return SAME_CLASS.get(name, name)
