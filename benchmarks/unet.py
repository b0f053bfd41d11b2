"""Speed of the windshield U-Net: images/s in training and inference, memory format and precision against plain.

    python -m benchmarks.unet                       # both architectures at 256 and 512
    python -m benchmarks.unet --demo                # a narrow network at 96, a minute on a loaded CPU

All variants run in turn in one process and their medians are compared, so that the ratios survive a noisy machine.
A training step is forward, L1 and SSIM, backward and Adam. The last table compares the loader with the training step:
its share of waiting is what a step would wait for its batch if WORKERS processes load while the step runs.
"""

import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import config, datasets, losses, report, system
from utils.datasets import loaders, presets, windshield_pairs
from utils.networks.unet import new_unet

ARCHITECTURES = ("unet", "resnet34")    # see train_unet_derain.ARCH
BASE_WIDTH = 64                         # of "unet"
SIZES = (256, 512)                      # sides of the square input
BATCH_SIZE = 8                          # for training and inference
ROUNDS = 5                              # measurements per variant, after one of warm-up
HALF = "bf16"                           # autocast of the half-precision variants: bf16 or fp16
WORKERS = 4                             # loader processes; at most the number of cores is used
FILE_SIZE = (1280, 720)                 # width and height of the JPEG pairs that the loader reads

DEMO = {"ARCHITECTURES": ("unet",), "BASE_WIDTH": 8, "SIZES": (96,), "BATCH_SIZE": 4, "ROUNDS": 3, "WORKERS": 1,
        "FILE_SIZE": (320, 180)}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def variants(cfg, arch, device):
    """-> {name: (model, dtype of its autocast or None)}, equal weights."""
    found = {}
    for name, layout in (("plain", torch.contiguous_format), ("channels-last", torch.channels_last)):
        for half in (False, True):
            torch.manual_seed(0)
            model = new_unet(arch, cfg.BASE_WIDTH).to(device, memory_format=layout)
            found[name + (f" {cfg.HALF}" if half else "")] = (model, _DTYPES[cfg.HALF] if half else None)
    return found


def training_step(model, dtype, optimizer, scaler, images, targets):
    """One step as utils/training/engine.py makes it."""
    with torch.autocast(images.device.type, dtype or torch.bfloat16, dtype is not None):
        restored = model(images)
    loss = losses.pixel_l1(restored, targets) + 0.2 * losses.ssim_loss(restored, targets)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def inference(model, dtype, images):
    """One batch as evaluation runs it."""
    with torch.autocast(images.device.type, dtype or torch.bfloat16, dtype is not None):
        model(images)


def medians(calls, rounds, device):
    """{name: callable} -> {name: median seconds}, one of each per round, after one round of warm-up."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(cfg, arch, size, device):
    """-> [{"arch", "size", "variant", "training" and "inference": images/s, "faster": against plain}, ...]."""
    images, targets = (torch.rand(cfg.BATCH_SIZE, 3, size, size, device=device) for _ in range(2))
    models, training, forward = variants(cfg, arch, device), {}, {}
    for name, (model, dtype) in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        training[name] = functools.partial(training_step, model, dtype, optimizer, scaler, images, targets)
        forward[name] = functools.partial(inference, model, dtype, images)
    seconds = medians(training, cfg.ROUNDS, device)
    for model, _ in models.values():
        model.eval()
    ahead = medians(forward, cfg.ROUNDS, device)
    return [{"arch": arch, "size": size, "variant": name, "training": f"{cfg.BATCH_SIZE / seconds[name]:.1f}",
             "inference": f"{cfg.BATCH_SIZE / ahead[name]:.1f}", "faster": f"{seconds['plain'] / seconds[name]:.2f} x",
             "faster_inference": f"{ahead['plain'] / ahead[name]:.2f} x", "step": seconds[name]} for name in models]


def write_pairs(folder, size, count=24):
    """JPEG pairs of smooth noise, as large on disk as photographs of their size roughly are."""
    rng = np.random.default_rng(0)
    for part in ("rainy", "clear"):
        (folder / part).mkdir()
        for i in range(count):
            coarse = rng.integers(0, 255, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / part / f"{i}.jpg", quality=92)


def loader_rate(cfg, folder, size, least=100):
    """-> pairs/s of the training loader at `size`, after a first pass."""
    found, _ = windshield_pairs.find_pairs(folder / "rainy", folder / "clear")
    data = windshield_pairs.WindshieldPairs(found, found, presets.unet_training(size))
    loader, seen, begin = loaders.training_loader(data, cfg.BATCH_SIZE, cfg.WORKERS, 0), 0, None
    for epoch in range(10**6):
        loader.batch_sampler.start_at(epoch)
        for batch in loader:
            datasets.to_device(batch, "cpu")
            seen += len(batch["images"]) if begin else 0
        if seen >= least:
            return seen / (time.perf_counter() - begin)
        begin = begin or time.perf_counter()


def main(**overrides):
    """Measure and print; -> {"speed": rows, "loader": rows}."""
    cfg = config.resolve(globals(), overrides)
    if cfg.HALF not in _DTYPES:
        raise config.UserError(f"HALF = {cfg.HALF!r}: choose one of {', '.join(_DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{where}, batch {cfg.BATCH_SIZE}, median of {cfg.ROUNDS}")
    rows = [row for arch in cfg.ARCHITECTURES for size in cfg.SIZES for row in measure(cfg, arch, size, device)]
    print(report.table(rows, {"arch": "network", "size": "size", "variant": "variant", "training": "training images/s",
                              "faster": "vs plain", "inference": "inference images/s", "faster_inference": "vs plain"}))
    loading = []
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), cfg.FILE_SIZE)
        for size in cfg.SIZES:
            rate = loader_rate(cfg, Path(folder), size)
            for row in (row for row in rows if row["size"] == size):
                needed = cfg.BATCH_SIZE / row["step"]
                loading.append({"network": f"{row['arch']}, {row['variant']}", "size": size, "loader": f"{rate:.0f}",
                                "training": f"{needed:.1f}", "waiting": f"{100 * max(0, 1 - rate / needed):.0f}%"})
    workers = min(cfg.WORKERS, system.available_cores())
    print(f"\nloader: {workers} process(es), JPEG pairs of {cfg.FILE_SIZE[0]}x{cfg.FILE_SIZE[1]}\n" + report.table(
        loading, {"network": "network", "size": "size", "loader": "loader pairs/s", "training": "training pairs/s",
                  "waiting": "waiting for data"}))
    return {"speed": rows, "loader": loading}


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
