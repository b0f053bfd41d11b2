"""A data set and its rainy twin on the disk: what is an image, what an annotation that the twin needs as well, and
which folders are a twin.

    COCO      annotations/*.json             Roboflow  _annotations.coco.json beside the images of a split
    YOLO      labels/NAME.txt for images/NAME.jpg, in any folders below; or NAME.txt beside NAME.jpg; data.yaml, and
              lists of images beside it
    VOC       Annotations/*.xml for JPEGImages/*.jpg, ImageSets/Main/*.txt, classes.txt
"""

from pathlib import Path
from typing import NamedTuple

from utils import system

RECORD = "rain.json"  # what make_rain.py writes into a twin: kind, source, seed, intensity, version
ANNOTATIONS = "annotations"  # COCO's folder; images in it are masks, not scenes
VOC_IMAGES, VOC_ANNOTATIONS = "JPEGImages", "Annotations"  # where it is, images elsewhere are masks (SegmentationClass)
_COCO_KEYS = {"images", "annotations", "categories"}


class Files(NamedTuple):
    """What lies below a folder, sorted paths relative to it; hidden files and folders count as not there."""

    images: list
    annotations: list  # of the layouts above
    others: list


def twin_above(folder):
    """-> Path of the rain.json of the twin that a folder is, or that it lies in; None where there is none."""
    folder = Path(str(folder)).resolve()
    return next((one / RECORD for one in (folder, *folder.parents) if (one / RECORD).is_file()), None)


def files_of(folder):
    """-> Files below a folder; links are followed."""
    found = [path.relative_to(folder) for path in system.files_in(folder, links=True)]
    voc = {VOC_IMAGES, VOC_ANNOTATIONS} <= {path.parts[0] for path in found if len(path.parts) > 1}
    images = [path for path in found if system.is_image(path) and path.parts[0] != ANNOTATIONS
              and (not voc or path.parts[0] == VOC_IMAGES)]
    known = {"texts": {text for path in images for text in yolo_texts(path)}, "voc": voc,
             "stems": {path.with_suffix("") for path in images}, "folders": {path.parent for path in images}}
    annotations = [path for path in found if _is_annotation(Path(folder), path, **known)]
    taken = {*images, *annotations}
    return Files(images, annotations, [path for path in found if path not in taken])


def yolo_texts(image):
    """-> where the labels of an image may be: beside it, or with "labels" for the last "images" of its path."""
    beside = image.with_suffix(".txt")
    at = max((i for i, part in enumerate(beside.parts[:-1]) if part == "images"), default=None)
    return [beside] if at is None else [beside, Path(*beside.parts[:at], "labels", *beside.parts[at + 1:])]


def _is_annotation(folder, path, texts, voc, stems, folders):
    """-> whether a path below a folder is one; texts: of `yolo_texts`, voc: whether the folder is in VOC's form, stems:
    of the images, folders: those that hold some."""
    if path.suffix.lower() != ".json":
        return path in texts or _is_yolo_setting(folder, path) or (voc and _is_of_voc(path, stems))
    if path.parts[:-1] == (ANNOTATIONS,):
        return True
    if path.parent not in folders or path.with_suffix("") in stems:  # a file per image (LabelMe) holds its pixels
        return False
    try:
        content = system.read_json(folder / path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= _COCO_KEYS


def _is_yolo_setting(folder, path):
    """-> whether a path below a folder is, at its top, a YAML file with classes, or a text that lists images."""
    if len(path.parts) > 1 or path.suffix.lower() not in (".yaml", ".yml", ".txt"):
        return False
    try:
        lines = (folder / path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
        return False
    if path.suffix.lower() == ".txt":
        return bool(lines) and system.is_image(lines[0].strip())
    return any(line.startswith(("names:", "nc:")) for line in lines)


def _is_of_voc(path, stems):
    """-> whether a path is of VOC's form: an image's XML, a list of images, the classes."""
    if path.parts[0] == VOC_ANNOTATIONS:
        return path.suffix.lower() == ".xml" and Path(VOC_IMAGES, *path.parts[1:]).with_suffix("") in stems
    return path.parts[:2] == ("ImageSets", "Main") or path == Path("classes.txt")


def listed_images(folder, annotations):
    """-> paths relative to a folder, as text, of the images that COCO's annotation files in it list.

    instances_<split>.json in annotations/ lists the images of <split>/, a file in another place those beside it.
    Annotations of other kinds, and of splits that are not there, list none.
    """
    names = []
    for path in annotations:
        split = Path(path.stem.split("_", 1)[-1]) if path.parts[0] == ANNOTATIONS else path.parent
        if path.suffix.lower() != ".json" or not (Path(folder) / split).is_dir():
            continue
        try:
            found = [(split / image["file_name"]).as_posix() for image in system.read_json(folder / path)["images"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        names += found
    return names
