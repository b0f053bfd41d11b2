"""The RF-DETR scripts' part of the demo data: the demo scenes in the layout that Roboflow exports.

    root/{train,valid,test}/_annotations.coco.json and *.jpg    copies of demo_root/coco: its training split, and its
                                                                validation split in two parts; masks as compressed RLE
    root/demo_dataset.json                                      settings, written last: then the rest is complete

As in Roboflow's own exports there is a parent category with id 0 that no annotation uses. Only the RF-DETR scripts ask
for it; utils/demo/coco.py and its settings know nothing of it.
"""

import json
import shutil
from pathlib import Path

from utils.config import UserError
from utils.demo import coco as demo
from utils.demo.build_once import build_once, put_in_place
from utils.demo.coco import annotation_file, ensure_demo

FORMAT_VERSION = 1   # raise it when the same settings would give other files
MARKER = "demo_dataset.json"
ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
OTHER_FORMS = ("annotations", "labels", "JPEGImages")  # folders of a data set as COCO, YOLO or Pascal VOC: docs/data.md
PARENT = {"id": 0, "name": "street-scenes", "supercategory": "none"}


def ensure_dataset(root="./demo/dataset", demo_root="./demo", num_train=1200, num_valid=150, num_test=50, seed=0):
    """Make sure that the data set is under root, and make it if it is missing or has other settings.

    Args:
        demo_root: where utils.demo.coco.ensure_demo keeps the scenes; drawn there if they are missing. Other numbers or
            another seed than the defaults need a demo_root of their own, else every script draws its demo anew.
        num_train, num_valid, num_test: images per split; seed: of the scenes.
    Returns:
        Path(root). Calls after the first only read its marker.
    Raises:
        UserError: a folder train, valid or test in root holds something that is not ours, or root a data set of another
            form.
    """
    root = Path(root)
    settings = {"format_version": FORMAT_VERSION, "demo_version": demo.FORMAT_VERSION, "train": int(num_train),
                "valid": int(num_valid), "test": int(num_test), "seed": int(seed)}
    if _is_complete(root, settings):
        return root
    _refuse_foreign(root)  # before the scenes are drawn, which takes a while
    scenes = ensure_demo(demo_root, num_train=num_train, num_val=num_valid + num_test, seed=seed) / "coco"

    def make(build):
        for split, source, part in (("train", "train", slice(0, num_train)), ("valid", "val", slice(0, num_valid)),
                                    ("test", "val", slice(num_valid, num_valid + num_test))):
            _copy_split(scenes, source, part, build / split)
        put_in_place(build, root, SPLITS, MARKER, settings)
        print(f"demo: drawn into {root.as_posix()}: {num_train} training, {num_valid} validation and {num_test} test "
              "images", flush=True)

    build_once(root, lambda: _is_complete(root, settings), lambda: _refuse_foreign(root), make)
    return root


def _is_complete(root, settings):
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == settings and all((root / split / ANNOTATIONS).is_file() for split in SPLITS)


def _refuse_foreign(root):
    """Never delete what we did not make, nor a copy that somebody has changed: only the marker beside it makes it ours.
    """
    for folder in (root, *(root / split for split in SPLITS)):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder.as_posix()} is a file, a folder is to be made there: choose another")
    for folder in (root / name for name in (*SPLITS, *OTHER_FORMS)):
        if folder.exists() and any(folder.iterdir()) and not (root / MARKER).is_file():
            raise UserError(f"{folder.as_posix()} has no {MARKER} beside it, so it is not RainSight's own demo data "
                            "and will not be replaced: scripts use it as it is without --demo; for demo data choose "
                            "another folder, or move it away")


def _copy_split(scenes, source, part, folder):
    """Images `part` (a slice) of the COCO-layout split `source`, with their annotations, into `folder`."""
    folder.mkdir(parents=True)
    content = json.loads(annotation_file(scenes, source).read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: image["id"])[part]
    ids = {image["id"] for image in images}
    for image in images:
        shutil.copyfile(scenes / f"{source}2017" / image["file_name"], folder / image["file_name"])
    categories = [PARENT] + [category | {"supercategory": PARENT["name"]} for category in content["categories"]]
    chosen = [note for note in content["annotations"] if note["image_id"] in ids]
    content |= {"images": images, "annotations": chosen, "categories": categories}
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")
