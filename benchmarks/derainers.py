"""Speed and memory of every de-rainer: milliseconds and gigabytes per image, forward pass, batch 1.

    python -m benchmarks.derainers                  # all networks at 256 and 640, two on a photograph of 12 megapixels
    python -m benchmarks.derainers --demo           # a few at 64, seconds

All networks take turns in one process and medians are compared, so that the ratios survive a noisy machine. Memory on a
CPU is what the process holds at most above what it held before, on a GPU what torch allocated; of the photograph, which
is restored in tiles by a process of its own, all that the process holds, Python and torch included. Weights do not
matter: they are random. "NAFNet" is train_unet_derain.py's default; MPRNet and Restormer need published files and are
left out.
"""

import copy
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import utils.threads  # noqa: F401 (before torch)

import torch

from benchmarks.peak_memory import PeakMemory
from utils import config, processes, report
from utils.evaluation import latency
from utils.networks.derainers import Derainer
from utils.networks.tiling import restore, usual_overlap
from utils.networks.unet import new_unet

NETWORKS = ("unet", "nafnet", "spdnet", "prenet", "prn_r", "rescan", "ddn", "derainnet")
SIZES = (256, 640)                      # sides of the square input
NAFNET = {}                             # its settings that are not the defaults, such as {"width": 24, "patch": 1}
PHOTOGRAPH = (3000, 4000)               # height and width of a photograph ...
TILE = 1024                             # ... its tiles ...
PHOTOGRAPH_NETWORKS = ("unet", "nafnet")  # ... and who restores it
ROUNDS = 3                              # measurements per network, after one of warm-up
CHANNELS_LAST = False                   # memory format of weights and images

DEMO = {"NETWORKS": ("nafnet", "prn_r", "ddn"), "SIZES": (64,), "PHOTOGRAPH": (150, 200), "TILE": 64,
        "PHOTOGRAPH_NETWORKS": ("nafnet",), "ROUNDS": 1}


def build(cfg, name, device):
    """-> the network in eval mode, by name."""
    model = new_unet("unet") if name == "unet" else Derainer(name, **(cfg.NAFNET if name == "nafnet" else {}))
    layout = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    return model.eval().to(device, memory_format=layout)


@torch.no_grad()
def measure(cfg, size, device):
    """-> [{"network", "size", "ms", "GB"}, ...], one network in memory at a time for the latter."""
    layout = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    images = torch.rand(1, 3, size, size, device=device).contiguous(memory_format=layout)
    models = {name: build(cfg, name, device) for name in cfg.NETWORKS}
    milliseconds = latency.latencies(models, images, warmup=1, repeats=cfg.ROUNDS)
    rows = []
    for name, model in models.items():
        own = copy.deepcopy(model)
        with PeakMemory() as before:
            time.sleep(0.1)  # a few looks at it
        with PeakMemory() as peak:
            own(images)
        rows.append({"network": name, "size": size, "ms": milliseconds[name],
                     "GB": max(0.0, peak.gigabytes - before.gigabytes)})
    return rows


@torch.no_grad()
def photograph(constants, name):
    """-> {"network", "size", "ms", "GB"} of a whole photograph in tiles; in a process of its own, for its memory."""
    cfg = config.resolve(globals(), constants)
    device = processes.device()
    model = build(cfg, name, device)
    with PeakMemory() as peak:
        images = torch.rand(1, 3, *cfg.PHOTOGRAPH)
        begin = time.perf_counter()
        restore(model, images, cfg.TILE, usual_overlap(cfg.TILE))
        seconds = time.perf_counter() - begin
    return {"network": name, "size": "{1} x {0}".format(*cfg.PHOTOGRAPH), "ms": 1000 * seconds, "GB": peak.gigabytes}


def main(**overrides):
    """Measure and print; -> rows."""
    cfg = config.resolve(globals(), overrides)
    device = processes.announced_device()
    rows = []
    for name in cfg.PHOTOGRAPH_NETWORKS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(photograph, cfg.as_dict(), name).result())
    rows = [row for size in cfg.SIZES for row in measure(cfg, size, device)] + rows
    print(report.table(rows, {"network": "network", "size": "size", "ms": "ms", "GB": "GB"}))
    return rows


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
