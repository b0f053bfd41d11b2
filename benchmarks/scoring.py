"""What COCO's scores cost: faster-coco-eval against pycocotools, on as many detections as COCO's validation set has.

    python -m benchmarks.scoring

Made-up objects (7 an image) and 100 detections an image, half of which lie near an object. Each evaluator scores the
same ones in a process of its own, one after the other; both must give the same numbers.
"""

import multiprocessing
import time
from typing import NamedTuple

import numpy as np

from benchmarks.peak_memory import PeakMemory
from utils import config, report
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.coco import _indexed, coco_scores, entries

IMAGES = 5000           # as val2017
CLASSES = 80
SEED = 0
EVALUATORS = ("pycocotools", "faster-coco-eval")


class MadeUp(NamedTuple):
    """Ground truth and detections on it."""

    truth: object      # pycocotools COCO
    found: dict        # {image id: (n, 6) array}, as `evaluation.coco.detect` gives them
    category_of: dict  # {label: category id}


def made_up(cfg):
    """-> MadeUp, the same one for the same constants."""
    random = np.random.default_rng(cfg.SEED)

    def boxes(n):
        corner, extent = random.uniform(0, 400, (n, 2)), random.uniform(8, 200, (n, 2))
        return np.concatenate([corner, extent], 1)
    notes, found = [], {}
    for image in range(1, cfg.IMAGES + 1):
        mine, labels = boxes(7), random.integers(0, cfg.CLASSES, 7)
        notes += [{"id": len(notes) + i, "image_id": image, "category_id": label + 1, "bbox": box, "iscrowd": 0,
                   "area": 0.7 * box[2] * box[3]} for i, (box, label) in
                  enumerate(zip(mine.tolist(), labels.tolist(), strict=True), 1)]
        near = random.integers(0, 7, 50)
        guesses = np.concatenate([mine[near] + random.normal(0, 8, (50, 4)).clip(-7, 7), boxes(50)])
        scores = np.concatenate([random.uniform(0.2, 1, 50), random.uniform(0, 0.3, 50)])
        classes = np.concatenate([labels[near], random.integers(0, cfg.CLASSES, 50)])
        found[image] = np.concatenate([guesses, scores[:, None], classes[:, None]], 1)
    truth = _indexed({"images": [{"id": i, "width": 640, "height": 640} for i in found],
                      "annotations": notes,
                      "categories": [{"id": i + 1, "name": str(i)} for i in range(cfg.CLASSES)]})
    return MadeUp(truth, found, {i: i + 1 for i in range(cfg.CLASSES)})


def measure(job):
    """One evaluator in this process. -> {"evaluator", "seconds", "GB" this process held, "mAP", "AP_small"}."""
    name, settings = job
    cfg = config.resolve(globals(), settings)
    if name == "pycocotools":
        coco_evaluation.COCOeval_faster = None
    data = made_up(cfg)
    with PeakMemory() as memory:
        begin = time.perf_counter()
        scores = coco_scores(data.truth, entries(data.found), data.category_of, list(data.found))
        seconds = time.perf_counter() - begin
    return {"evaluator": name, "seconds": seconds, "GB": memory.gigabytes, "mAP": scores["mAP"],
            "AP_small": scores["AP_small"]}


def main(**overrides):
    """Measure; -> one row per evaluator."""
    cfg = config.resolve(globals(), overrides)
    if coco_evaluation.COCOeval_faster is None:
        raise config.UserError("nothing to compare: pip install faster-coco-eval")
    rows = []
    for name in cfg.EVALUATORS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, ((name, overrides),)))
    for row in rows:
        row["faster"] = f"{rows[0]['seconds'] / row['seconds']:.1f} x"
    print(f"{cfg.IMAGES} images, {100 * cfg.IMAGES} detections")
    print(report.table(rows, {"evaluator": "evaluator", "seconds": "s", "faster": "vs the first", "GB": "GB",
                              "mAP": "mAP", "AP_small": "AP small"}))
    return rows


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
