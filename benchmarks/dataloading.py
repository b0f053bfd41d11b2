"""Claims: the loader delivers at least 60 images/s per core at 640x640 from COCO JPEGs with boxes, 25 with fresh rain.

    python -m benchmarks.dataloading --COCO_DIR ./dataset/coco

One process without workers is one core; with WORKERS the rate per worker is printed as well. Twins double the work, but
for those of fresh rain, which is drawn on them.
"""

import time

import torch

from utils import config, datasets, report
from utils.datasets import loaders, presets
from utils.datasets.annotations import read_annotations
from utils.datasets.fresh_rain import FreshRain
from utils.datasets.layouts import find_split
from utils.weather import rain

COCO_DIR = "./dataset/coco"             # COCO-layout root; its train split is read
COCO_RAIN_DIR: str | None = ""          # its rainy twin; "" skips the rows with twins
IMAGE_SIZE = 640                        # side of the square input
IMAGES = 300                            # images per measurement (repeated where the set has fewer)
WORKERS = 2                             # loader processes of the second measurement

DEMO = {"COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "IMAGE_SIZE": 160}


def rate(data, workers, images):
    """-> images per second through loader, collate and conversion, after one warm-up pass of a few batches."""
    loader = loaders.training_loader(data, 4, workers, 0)
    done, epoch, begin = -40, 0, None
    while done < images:
        loader.batch_sampler.start_at(epoch)
        for batch in loader:
            datasets.to_device(batch, "cpu")
            done += len(batch["images"])
            if done >= 0 and begin is None:
                begin, done = time.perf_counter(), 0
            if done >= images:
                break
        epoch += 1
    return done / (time.perf_counter() - begin)


def main(**overrides):
    cfg = config.resolve(globals(), overrides)
    torch.set_num_threads(1)
    content = read_annotations(find_split(cfg.COCO_DIR, "train", "COCO_DIR"))
    id2label = dict(enumerate(c["name"] for c in content["categories"]))
    settings = {"id2label": id2label, "split": "train", "constant": "COCO_DIR", "domain": "clean"}
    rows, kinds = [], {"": {}, " with fresh rain and twins": {
        "twin_root": cfg.COCO_DIR, "twin_constant": "COCO_DIR",
        "fresh_rain": FreshRain(dict.fromkeys(rain.INTENSITIES, 1.0), 0, cfg.IMAGE_SIZE)}}
    if cfg.COCO_RAIN_DIR:
        kinds[" with twins"] = {"twin_root": cfg.COCO_RAIN_DIR, "twin_constant": "COCO_RAIN_DIR"}
    for name, preset in (("adaptation", presets.adaptation), ("detection", presets.detection)):
        for kind, extra in kinds.items():
            data = datasets.CocoDetectionDataset(cfg.COCO_DIR, transform=preset(cfg.IMAGE_SIZE), **settings, **extra)
            single = rate(data, 0, cfg.IMAGES)
            shared = rate(data, cfg.WORKERS, cfg.IMAGES)
            rows.append({"preset": name + kind, "one": f"{single:.0f}", "workers": f"{shared:.0f}",
                         "each": f"{shared / cfg.WORKERS:.0f}"})
    print(report.table(rows, {"preset": f"samples/s at {cfg.IMAGE_SIZE}", "one": "1 process",
                              "workers": f"{cfg.WORKERS} workers", "each": "per worker"}))


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
