"""Write a data set in another form: COCO, YOLO or Pascal VOC, from any of the three. docs/data.md shows them.

    python -m tools.convert_dataset --SOURCE ./dataset/coco --TO yolo --OUT ./dataset/coco_yolo
    python -m tools.convert_dataset --SOURCE ./RTTS --TO coco --OUT ./dataset/rtts

All splits of SOURCE that have annotations are converted and their images copied; SOURCE stays as it is. Boxes keep
their place to a thousandth of a pixel. What a form cannot hold (YOLO: crowds and difficult objects, masks as RLE; VOC:
masks) is counted and said. OUT appears when it is complete.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

from utils import config, processes, system
from utils.config import UserError
from utils.datasets import image_check, voc, yolo
from utils.datasets.annotations import read_annotations
from utils.datasets.layouts import SPLITS, find_split, has_split, require_usual_splits

SOURCE: str = ""   # the data set to convert: its folder, or its data.yaml
TO = ""            # coco (the standard layout), yolo or voc
OUT = ""           # the folder to write, which is not there yet

_WRITERS = {"yolo": yolo.write, "voc": voc.write}


def write_coco(out, _, contents):
    """Write COCO's standard layout; arguments and answer as of `yolo.write`, but the category ids stay as they are."""
    places = {}
    (Path(out) / "annotations").mkdir(parents=True)
    for split, content in contents.items():
        file = Path(out, "annotations", f"instances_{split}2017.json")
        file.write_text(json.dumps(content), encoding="utf-8")
        places |= {(split, image["file_name"]): Path(f"{split}2017", image["file_name"]) for image in content["images"]}
    return places, Counter()


def open_source(root):
    """-> ({split: layouts.Split}, {split: content}) of all splits that have annotations; their images are checked."""
    names = [name for name in SPLITS if has_split(root, name)]
    if names:
        require_usual_splits(root, "SOURCE")
    found = {name: find_split(root, name, "SOURCE") for name in names or ("train",)}  # of none: says what is missing
    contents = {name: read_annotations(split) for name, split in found.items()}
    for name, split in found.items():
        images = contents[name]["images"]
        image_check.check_images([split.folder / image["file_name"] for image in images], f"SOURCE ({name})",
                                 [(image["width"], image["height"]) for image in images])
    return found, contents


def numbered(contents):
    """Give the categories of several contents the ids 1, 2, ... in the order of their ids, by name.

    Returns:
        names of the classes in order; {split: content with these ids}.
    """
    by_id = {}
    for content in contents.values():
        for category in content["categories"]:
            if by_id.setdefault(category["id"], category["name"]) != category["name"]:
                raise UserError(f"SOURCE: category {category['id']} is {by_id[category['id']]!r} in one split and "
                                f"{category['name']!r} in another: give all splits the same categories")
    names = list(dict.fromkeys(by_id[category] for category in sorted(by_id)))
    new = {category: names.index(name) + 1 for category, name in by_id.items()}
    return names, {split: content | {"annotations": [note | {"category_id": new[note["category_id"]]}
                                                     for note in content["annotations"]]}
                   for split, content in contents.items()}


def require_own_stems(contents):
    """UserError where two images of a split differ in their ending alone: YOLO and VOC name annotations without it; or
    where one has an ending by which it would not be found."""
    for split, content in contents.items():
        if odd := [image["file_name"] for image in content["images"] if not system.is_image(image["file_name"])]:
            raise UserError(f"SOURCE ({split}): {len(odd)} image(s) are of a kind that is not read in a folder "
                            f"({' '.join(system.SUFFIXES)}): {system.listed(odd, 3)}")
        stems = Counter(Path(image["file_name"]).with_suffix("").as_posix()
                        for image in content["images"])
        if double := [stem for stem, count in stems.items() if count > 1]:
            raise UserError(f"SOURCE ({split}): several images are called {double[0]!r} and differ in their ending at "
                            "most, but YOLO and VOC name annotations without it: rename them")


def convert(found, contents, to, out):
    """Write the data set into `out`, a new folder. -> Counter of what was lost, by its description."""
    if to == "coco":
        names, write = [], write_coco
    else:
        require_own_stems(contents)
        names, contents = numbered(contents)
        write = _WRITERS[to]
    places, lost = write(out, names, contents)
    for split, file_name in processes.progress(list(places), "copying", shown=len(places) > 1000):
        target = out / places[split, file_name]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[split].folder / file_name, target)
    return lost


def main(**overrides):
    """Convert; -> {"images": {split: count}, "objects": {split: count}, "lost": {what: count}}."""
    cfg = config.resolve(globals(), overrides)
    for name in ("SOURCE", "TO", "OUT"):
        if not getattr(cfg, name):
            raise UserError(f"{name} is not set: give --SOURCE DIR --TO coco|yolo|voc --OUT DIR")
    if cfg.TO not in ("coco", *_WRITERS):
        raise UserError(f"TO = {cfg.TO!r}: choose coco, yolo or voc")
    root, out = Path(cfg.SOURCE), Path(cfg.OUT)
    if not out.name or out.name == "..":  # the folder that this runs in cannot be put in place as a whole
        raise UserError(f"OUT = '{out.as_posix()}': give the name of a new folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"OUT = '{out.as_posix()}' is there already: give a folder that is not, or delete it")
    found, contents = open_source(root)
    building = out.with_name(f".{out.name}{system.TEMPORARY}")
    with config.writing(out):
        shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
        building.mkdir(parents=True)
        try:
            lost = convert(found, contents, cfg.TO, building)
            if out.exists():  # empty
                out.rmdir()
            system.replace(building, out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    report = {"images": {split: len(content["images"]) for split, content in contents.items()},
              "objects": {split: len(content["annotations"]) for split, content in contents.items()},
              "lost": {what: count for what, count in lost.items() if count}}
    for split, one in found.items():
        print(f"{split}: {report['images'][split]} images, {report['objects'][split]} objects of {one}")
    for what, count in report["lost"].items():
        print(f"note: {count} {what}")
    print(f"written: {out.as_posix()} ({cfg.TO})")
    return report


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
