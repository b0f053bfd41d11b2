"""What RF-DETR costs: forward per size, a step of stage 1 and of stage 2, an epoch with and without cached features.

    python -m benchmarks.rfdetr                     # minutes on two CPU cores
    python -m benchmarks.rfdetr --demo              # the demo's tiny detector, seconds

Goals: a step of stage 2 (nano, 384, batch 1) takes at most 0.40 s and 1.5 GB on two CPU cores; an epoch with cached
features is at least 8 times as fast as one without. Random weights, which change no time. Every row runs in a process
of its own, whose largest resident memory is the row's memory (on a GPU: what torch had allocated at most).
"""

import concurrent.futures
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import train_detector_stage1
import train_seg_stage2
from benchmarks.peak_memory import PeakMemory
from rfdetr import criterion
from rfdetr import main as training
from rfdetr.config import default_resolution, mask_head_of
from rfdetr.datasets.roboflow import RoboflowDataset
from rfdetr.model import RFDETR
from utils import config, datasets, freeze, processes, report

SIZES = ("nano", "small", "medium", "base", "large", "large_2026")  # of the forward rows
FORWARD_BATCH = 1                       # images per forward
STEP_SIZE = "nano"                      # of the training steps and of the epochs
STEP_BATCHES = (1, 4)                   # images per training step
OBJECTS = 8                             # per image
ROUNDS = 5                              # measurements of a forward or a step, after two for warm-up
EPOCH_IMAGES = 32                       # images of an epoch; 0 leaves the epochs out
EPOCH_BATCH = 4                         # images per step in an epoch
THREADS = 0                             # of torch; 0 leaves it to torch

DEMO = {"SIZES": ("tiny",), "STEP_SIZE": "tiny", "STEP_BATCHES": (1, 8), "ROUNDS": 3}
_ROWS = 6  # of the class head: five classes and background


def seconds_of(call, rounds, warmup=2):
    """-> median seconds of one call: of the clock, and of the processor (all threads; what other jobs take is not in
    it)."""
    walls, processor = [], []
    for _ in range(warmup + rounds):
        begin, begin_processor = time.perf_counter(), time.process_time()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - begin)
        processor.append(time.process_time() - begin_processor)
    return statistics.median(walls[warmup:]), statistics.median(processor[warmup:])


def random_batch(batch, side, objects, device):
    """-> images (B, 3, S, S) in [0, 1], labels with boxes, rows and rectangular masks."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for _ in range(batch):
        centre = torch.rand(objects, 2, generator=generator) * 0.6 + 0.2
        extent = torch.rand(objects, 2, generator=generator) * 0.2 + 0.1
        grid = (torch.arange(side) + 0.5) / side
        inside = [(grid - centre[:, axis, None]).abs() < extent[:, axis, None] / 2 for axis in (0, 1)]  # (n, S) each
        labels.append({"boxes": torch.cat([centre, extent], 1).to(device),
                       "class_labels": torch.randint(_ROWS - 1, (objects,), generator=generator).to(device),
                       "masks": (inside[1][:, :, None] & inside[0][:, None, :]).to(device)})
    return torch.rand(batch, 3, side, side, generator=generator).to(device), labels


# ---- the rows, each in a process of its own ------------------------------------------------------------------------

def forward_row(cfg, size, batch):
    """One forward in eval mode."""
    device, side = processes.device(), default_resolution(size)
    model = RFDETR(size, 91, side).eval().to(device)
    images = torch.rand(batch, 3, side, side, device=device)
    with torch.no_grad():
        return seconds_of(lambda: model(images), cfg.ROUNDS)


def stage1_row(cfg, size, batch):
    """Forward with all query groups, losses, backward, clipping, AdamW."""
    device, side = processes.device(), default_resolution(size)
    model = RFDETR(size, 91, side).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images, labels = random_batch(batch, side, cfg.OBJECTS, device)

    def step():
        losses = train_detector_stage1.compute_losses(model, {"images": images, "labels": labels})
        sum(weight * losses[name] for name, weight in criterion.SUMMED_WEIGHTS.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seconds_of(step, cfg.ROUNDS)


def segmentation_model(size):
    """-> RFDETR with a mask head and its detector frozen, as stage 2 has it."""
    model = RFDETR(size, _ROWS, default_resolution(size), mask_head=mask_head_of(size))
    freeze.freeze(model.detector)
    return model.train().to(processes.device())


def stage2_step(model, optimizer, batch):
    """Forward, matching, mask losses, backward, AdamW, as train_seg_stage2.py does it; `batch` on the device."""
    sum(train_seg_stage2.compute_losses(model, batch).values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def stage2_row(cfg, size, batch):
    """A step of the mask head on the frozen detector."""
    model = segmentation_model(size)
    optimizer = torch.optim.AdamW(model.mask_head.parameters(), lr=1e-4)
    images, labels = random_batch(batch, default_resolution(size), cfg.OBJECTS, processes.device())
    return seconds_of(lambda: stage2_step(model, optimizer, {"images": images, "labels": labels}), cfg.ROUNDS)


def write_dataset(root, number, side, objects):
    """A Roboflow-layout training set of noise pictures with rectangles."""
    folder = Path(root) / "train"
    folder.mkdir()
    rng, images, notes = np.random.default_rng(0), [], []
    for i in range(number):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": side, "height": side})
        for _ in range(objects):
            x, y, w, h = (float(value) for value in rng.integers(side // 16, side // 3, 4))
            notes.append({"id": len(notes) + 1, "image_id": i, "category_id": int(rng.integers(1, _ROWS)),
                          "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                          "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    content = {"images": images, "annotations": notes,
               "categories": [{"id": i, "name": f"class{i}"} for i in range(1, _ROWS)]}
    (folder / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8")


def epoch_row(cfg, size, batch, use_cache):
    """An epoch of stage 2 over EPOCH_IMAGES images: loading, steps. Filling the cache is not counted."""
    model, side = segmentation_model(size), default_resolution(size)
    optimizer = torch.optim.AdamW(model.mask_head.parameters(), lr=1e-4)
    device = processes.device()
    with tempfile.TemporaryDirectory() as root:
        write_dataset(root, cfg.EPOCH_IMAGES, side, cfg.OBJECTS)
        rows = {f"class{i}": i - 1 for i in range(1, _ROWS)}
        data = RoboflowDataset(root, "train", rows, side, train=not use_cache, masks=True)
        settings = SimpleNamespace(BATCH=batch, WORKERS=0, SEED=0, MULTI_SCALE=False, EXPANDED_SCALES=False,
                                   CACHE_DIR=str(Path(root) / "cache"))
        loader = (training.cached_loader(settings, model, data, side) if use_cache else
                  training.training_loader(settings, data, size, side))
        model.train()

        def epoch():
            for content in loader:
                stage2_step(model, optimizer, datasets.to_device(content, device))
        return seconds_of(epoch, 3, warmup=1)


def cached_epoch_row(cfg, size, batch):
    return epoch_row(cfg, size, batch, use_cache=True)


def plain_epoch_row(cfg, size, batch):
    return epoch_row(cfg, size, batch, use_cache=False)


def in_own_process(row, constants, size, batch):
    """Runs in the child. -> {"seconds", "cpu seconds", "gigabytes"}"""
    cfg = SimpleNamespace(**constants)
    if cfg.THREADS:
        torch.set_num_threads(cfg.THREADS)
    torch.manual_seed(0)
    with PeakMemory() as memory:
        seconds, processor = row(cfg, size, batch)
    return {"seconds": seconds, "cpu seconds": processor, "gigabytes": memory.gigabytes}


def measure(cfg, row, size, batch):
    """-> {"what", "size", "batch", "seconds", "cpu seconds", "gigabytes"} of one row, measured in a fresh process."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(in_own_process, row, cfg.as_dict(), size, batch).result()
    name = row.__name__.removesuffix("_row").replace("_", " ").replace("stage", "stage-")
    print(f"  {name}, {size}, batch {batch}: {1000 * found['seconds']:.0f} ms, {found['gigabytes']:.2f} GB", flush=True)
    return {"what": name, "size": size, "batch": batch} | found


def main(**overrides):
    """Measure; -> the table's rows."""
    cfg = config.resolve(globals(), overrides)
    if cfg.THREADS:
        torch.set_num_threads(cfg.THREADS)
    print(f"{report.environment()['device']}, {cfg.OBJECTS} objects per image")
    jobs = [(forward_row, size, cfg.FORWARD_BATCH) for size in cfg.SIZES]
    jobs += [(row, cfg.STEP_SIZE, batch) for row in (stage1_row, stage2_row) for batch in cfg.STEP_BATCHES]
    if cfg.EPOCH_IMAGES:
        jobs += [(row, cfg.STEP_SIZE, cfg.EPOCH_BATCH) for row in (plain_epoch_row, cached_epoch_row)]
    rows = [measure(cfg, *job) for job in jobs]
    for row in rows:
        images = cfg.EPOCH_IMAGES if "epoch" in row["what"] else row["batch"]
        row["ms"], row["cpu"] = f"{1000 * row['seconds']:.0f}", f"{1000 * row['cpu seconds']:.0f}"
        row["per image"], row["GB"] = f"{1000 * row['seconds'] / images:.0f}", f"{row['gigabytes']:.2f}"
    print(report.table(rows, {"what": "what", "size": "size", "batch": "batch", "ms": "ms", "cpu": "CPU ms",
                              "per image": "ms per image", "GB": "GB"}))
    if cfg.EPOCH_IMAGES:
        ratios = [rows[-2][time_of] / rows[-1][time_of] for time_of in ("seconds", "cpu seconds")]
        print(f"an epoch with cached features is {ratios[0]:.1f} times as fast ({ratios[1]:.1f} by processor time)")
    return rows


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
