"""The demo data set: drawn on first use, so that every script runs without a download.

    root/demo.json                                        settings, written last: it says that the rest is complete
    root/coco/{train2017,val2017}/000000000001.jpg        clean street scenes (utils/demo/scene.py)
    root/coco/annotations/instances_{train,val}2017.json  COCO layout, masks as compressed RLE
    root/coco_rain/...                                    the same names, scenes and annotations, in the rain

`ensure_demo` may be called by many processes at once: one draws, the others wait. What is half made lives in
`root/.building-*` and never counts. A further part of the demo is one more entry in PARTS.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from utils.config import UserError
from utils.demo.build_once import build_once, put_in_place
from utils.demo.scene import CATEGORIES, render_scene
from utils.system import available_cores
from utils.weather import rain

FORMAT_VERSION = 1                  # raise it when the same settings would give other files
MAKER = "RainSight demo"            # the description inside our annotation files
PARTS = ("coco", "coco_rain")       # the folders under root that belong to us; nothing else there is touched
SPLITS = {"train": 0, "val": 900_000}           # the first image id of a split follows this number
PARALLEL_FROM = 100                 # scenes; fewer are drawn in this process
JPEG = {"quality": 92, "subsampling": 0}


def ensure_demo(root="./demo", num_train=1200, num_val=200, size=(160, 160), seed=0):
    """Make sure that the demo data set is under root, and draw it if it is missing or has other settings.

    Args:
        num_train, num_val: scenes per split; size: (width, height); seed: of all scenes and all rain.
    Returns:
        Path(root). Calls after the first only read root/demo.json.
    Raises:
        UserError: root/coco or root/coco_rain holds something that is not a demo data set.
    """
    root = Path(root)
    settings = {"format_version": FORMAT_VERSION, "rain_version": rain.VERSION, "num_train": int(num_train),
                "num_val": int(num_val), "size": [int(s) for s in size], "seed": int(seed)}

    def make(build):
        draw_all(build, settings)
        put_in_place(build, root, PARTS, "demo.json", settings)

    build_once(root, lambda: is_complete(root, settings), lambda: refuse_foreign(root), make)
    return root


def is_complete(root, settings):
    """Whether root holds the finished data set of these settings."""
    try:
        found = json.loads((root / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = [annotation_file(root / part, split) for part in PARTS for split in SPLITS]
    return found == settings and all(file.is_file() for file in files)


def annotation_file(part, split):
    return part / "annotations" / f"instances_{split}2017.json"


# --- drawing -------------------------------------------------------------------

def scene_seed(seed, split, index):
    """A number that no other (seed, split, index) has: the sizes of the fields do not overlap."""
    return (seed * 8 + list(SPLITS).index(split)) * 2 ** 32 + index


def draw_all(build, settings):
    """Draw every scene into build/coco and build/coco_rain, and write their annotation files."""
    for part in PARTS:
        for split in SPLITS:
            (build / part / f"{split}2017").mkdir(parents=True)
        (build / part / "annotations").mkdir()
    jobs = [(split, index) for split in SPLITS for index in range(settings[f"num_{split}"])]
    images, annotations = {s: [] for s in SPLITS}, {s: [] for s in SPLITS}
    found = results(partial(draw_one, build, settings), jobs)
    for (split, _), (image, entries) in zip(jobs, found, strict=True):
        images[split].append(image)
        annotations[split] += entries
    for split in SPLITS:
        for number, entry in enumerate(annotations[split], SPLITS[split] * 100 + 1):
            entry["id"] = number
        content = {"info": {"description": MAKER, "version": str(FORMAT_VERSION), "settings": settings},
                   "licenses": [], "images": images[split], "annotations": annotations[split],
                   "categories": CATEGORIES}
        for part in PARTS:
            annotation_file(build / part, split).write_text(json.dumps(content), encoding="utf-8")


def results(function, jobs):
    """-> [function(job)] of every job, in order; over all cores when there are many."""
    workers = min(available_cores(), 8)
    if len(jobs) > PARALLEL_FROM and workers > 1 and not multiprocessing.current_process().daemon:
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                try:
                    return list(progress(pool.map(function, jobs, chunksize=16), len(jobs)))
                except BaseException:                    # Ctrl+C need not wait for the rest
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool:                        # a main module that cannot be imported, as from stdin
            print("demo: no worker processes here, drawing in this one")
    return [function(job) for job in progress(jobs, len(jobs))]


def progress(items, total):
    return tqdm(items, total=total, desc="drawing the demo data", unit="scene", ascii=True,
                disable=total <= PARALLEL_FROM)


def draw_one(build, settings, job):
    """Draw, rain on and save one scene. Returns its COCO image record and its annotations, without their ids."""
    split, index = job
    width, height = settings["size"]
    image, objects = render_scene(scene_seed(settings["seed"], split, index), (width, height))
    image_id = SPLITS[split] + index + 1
    name = f"{image_id:012d}.jpg"
    rainy = rain.add_rain(image, rain.rng_for(settings["seed"], name))
    for part, pixels in zip(PARTS, (image, rainy), strict=True):
        Image.fromarray(pixels).save(build / part / f"{split}2017" / name, **JPEG)
    record = {"id": image_id, "file_name": name, "width": width, "height": height}
    return record, [annotation(image_id, thing) for thing in objects]


def annotation(image_id, thing):
    """COCO annotation of an object of render_scene: tight xywh box, area in mask pixels, compressed RLE."""
    mask = thing["mask"]
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"image_id": image_id, "category_id": thing["category_id"], "iscrowd": 0, "area": float(mask.sum()),
            "bbox": [float(xs[0]), float(ys[0]), float(xs[-1] + 1 - xs[0]), float(ys[-1] + 1 - ys[0])],
            "segmentation": {"size": [int(s) for s in code["size"]], "counts": code["counts"].decode("ascii")}}


# --- files of others -------------------------------------------------------------

def refuse_foreign(root):
    """Never delete what we did not draw, nor a copy that somebody has changed: demo.json beside it makes it ours."""
    if (root / "demo.json").is_file():
        return
    for folder in (root / part for part in PARTS):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} has no demo.json beside it, so it is not RainSight's own demo data set and will "
                            "not be replaced. Move it away, or give ensure_demo another root.")


