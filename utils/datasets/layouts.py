"""Where the images and annotations of a data set lie: COCO (the standard layout, or Roboflow's), YOLO, or Pascal VOC,
recognised by what lies there. docs/data.md shows them.

    COCO      root/train2017/*.jpg, root/annotations/instances_train2017.json           the same for val2017, test2017
    Roboflow  root/train/_annotations.coco.json, root/train/*.jpg                       the same for valid/, test/
    YOLO      see utils/datasets/yolo.py         Pascal VOC  see utils/datasets/voc.py
"""

from pathlib import Path
from typing import NamedTuple

from utils import system
from utils.config import UserError
from utils.datasets import voc, yolo

SPLITS = ("train", "val", "test")
FORMS = {"yolo": yolo, "voc": voc}  # besides "coco"
ROBOFLOW_FILE = "_annotations.coco.json"
_FOLDERS = {"standard": {"train": "train2017", "val": "val2017", "test": "test2017"},
            "roboflow": {"train": "train", "val": "valid", "test": "test"}}
_OTHER_NAMES = {"train": ("training",), "valid": ("val", "validation"), "test": ("testing",)}  # of Roboflow's folders
_OTHER_WORDS = ("training", "valid", "validation", "testing")  # of YOLO's and VOC's splits
ADVICE = {  # what a user can do who lacks the images
    "clean": "COCO is at https://cocodataset.org/#download; set the constant to your data, or try --demo.",
    "rainy": "Make it with make_rain.py, set the constant to your data, or try --demo.",
    "masks": "Export your project as COCO (Segmentation), draw a data set with 'python -m tools.make_demo_dataset', or "
             "try --demo.",
}
EXPECTED = {
    "standard": "expected <folder>/{folder}/*.jpg and <folder>/annotations/instances_{folder}.json, or a data set in "
                "Roboflow's layout, YOLO's or Pascal VOC's (docs/data.md)",
    "roboflow": "expected train/, valid/ and perhaps test/ in it, each with _annotations.coco.json and its images, or "
                "a data set in COCO's standard layout, YOLO's or Pascal VOC's (docs/data.md)",
}


class Split(NamedTuple):
    """One split of a data set; its text is what messages call it. `annotations.read_annotations` reads it."""

    form: str     # "coco", "yolo" or "voc"
    folder: Path  # of the images: file names are relative to it
    file: Path    # that says what is in the split: COCO's JSON, data.yaml, VOC's list (Annotations where it has none)
    name: str     # "train", "val" or "test"

    def __str__(self):
        return self.file.as_posix() + (f" ({self.name})" if self.form == "yolo" else "")


def find_split(root, split, constant, advice=ADVICE["clean"], usual="standard"):
    """-> Split of a data set.

    Args:
        root: the data set's folder, or its data.yaml; split: "train", "val" (or "valid"), "test".
        constant: the script's constant or --flag that holds `root`.
        usual: "standard" or "roboflow", the layout that is described to a user who has none.
    Raises:
        UserError: names `constant` and what is missing, and ends in `advice`: where the user can get it.
    """
    if not str(root):
        raise UserError(f"{constant} is empty: give the folder of a data set. {advice}")
    root, name = Path(root), "val" if split == "valid" else split
    named = _named(root, constant)
    layout = layout_of(root) or usual
    if layout == "yolo":
        file = yolo.settings_file(root)
        return Split("yolo", yolo.images_of(file, name)[0], file, name)
    if layout == "voc":
        return Split("voc", root / voc.IMAGES, voc.require_split(root, name, named), name)
    folder, file = _coco_paths(root, name, layout)
    for path in (root, folder, file):
        if problem := system.absent(path, folder=path != file):
            _require_usual_name(root, folder, path, layout, named)
            raise UserError(f"{named}: {path.as_posix()} {problem}; {EXPECTED[layout].format(folder=folder.name)}. "
                            f"{_hint(root)}{advice}")
    return Split("coco", folder, file, name)


def has_split(root, name):
    """-> whether a data set has annotations of "train", "val" or "test"."""
    layout = layout_of(root)
    if layout == "yolo":
        return bool(yolo.read_settings(yolo.settings_file(root))[0].get(name))
    if layout == "voc":
        return voc.split_file(root, name) is not None
    return layout is not None and _coco_paths(Path(root), name, layout)[1].is_file()


def require_usual_splits(root, constant):
    """UserError where a data set has annotations under a name that no split has, which would be left out: val/ for
    Roboflow's valid/, instances_val.json for instances_val2017.json, "valid:" in a data.yaml."""
    root, layout = Path(root), layout_of(root)
    usual = tuple(_FOLDERS[layout].values()) if layout in _FOLDERS else SPLITS
    if layout == "roboflow":
        found = [path.parent for path in sorted(root.glob(f"*/{ROBOFLOW_FILE}")) if path.parent.name not in usual]
    elif layout == "standard":
        known = [f"instances_{folder}.json" for folder in usual]
        found = [path for path in sorted(root.glob("annotations/instances_*.json")) if path.name not in known]
        usual = known
    elif layout == "yolo":
        file = yolo.settings_file(root)
        found = [f"{key}: in {file.as_posix()}" for key in yolo.read_settings(file)[0] if key in _OTHER_WORDS]
    else:
        found = [path for word in _OTHER_WORDS if (path := root / voc.LISTS / f"{word}.txt").is_file()]
    if found:
        what = found[0].as_posix() if isinstance(found[0], Path) else found[0]
        raise UserError(f"{_named(root, constant)}: {what} would be left out: call it by one of {', '.join(usual)}, or "
                        "move it away")


def _named(root, constant):
    return f"{constant} {root.as_posix()}" if constant.startswith("--") else f"{constant} = '{root.as_posix()}'"


def layout_of(root):
    """-> "standard", "roboflow", "yolo" or "voc", by the annotations that lie below a folder; None where there are none
    of them."""
    root = Path(root)
    if not root.is_dir():
        return "yolo" if yolo.settings_file(root) else None
    for layout in _FOLDERS:
        if any(_coco_paths(root, name, layout)[1].is_file() for name in SPLITS):
            return layout
    if voc.is_root(root):
        return "voc"
    if yolo.settings_file(root):
        return "yolo"
    return None


def _coco_paths(root, name, layout):
    """-> (folder of the images, annotation file)"""
    folder = root / _FOLDERS[layout][name]
    return folder, (folder / ROBOFLOW_FILE if layout == "roboflow" else
                    root / "annotations" / f"instances_{folder.name}.json")


def _require_usual_name(root, folder, missing, layout, named):
    """UserError where Roboflow's folder of a split is there under another name."""
    other = next((name for name in _OTHER_NAMES.get(folder.name, ()) if (root / name).is_dir()), None)
    if layout == "roboflow" and other and missing == folder:
        raise UserError(f"{named} has a folder {other}: it must be called {folder.name}")


def _hint(root):
    """-> what a folder lacks that is nearly a data set, for a message."""
    if not root.is_dir():
        return ""
    if (root / "images").is_dir() and (root / "labels").is_dir():
        return "It has images/ and labels/ as YOLO does, and lacks data.yaml with train, val and names. "
    if inner := next((path for path in sorted(root.glob("*/")) + sorted(root.glob("*/*/")) if voc.is_root(path)), None):
        return f"Pascal VOC's data are in {inner.as_posix()}: give that folder. "
    if any(any(root.glob(pattern)) for pattern in ("*.xml", "*/*.xml")):
        return "It has XML files; Pascal VOC's form has them in Annotations/ and the images in JPEGImages/. "
    return ""


def read_foreign(split, masks=True):
    """-> COCO content of a split in another form: categories 1, 2, ... in the order of its classes, objects 1, 2, ...

    An image's id is the number that its file is called by, where all are called by different ones, as in COCO; else
    they are counted from 1.
    """
    names, images = FORMS[split.form].read(split.file, split.name, masks)
    stems = [Path(image["file_name"]).stem for image in images]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) < 16]
    ids = numbers if len(set(numbers)) == len(images) else range(1, len(images) + 1)
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(names, 1)]}
    for image_id, image in zip(ids, images, strict=True):
        for one in image.pop("objects"):
            category = one.pop("category") + 1
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": image_id,
                                           "category_id": category} | one)
        content["images"].append({"id": image_id} | image)
    return content
