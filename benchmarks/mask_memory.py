"""Claim: the masks of 300 detections on a photograph of twelve megapixels take no 2 GB, the whole process included.

    python -m benchmarks.mask_memory

What RF-DETR's validation does with one image's mask logits: stretched one at a time to the original size, run lengths
kept. The logits are random blobs of all sizes.
"""

import time

import utils.threads  # noqa: F401 (before torch)

import torch

from benchmarks.peak_memory import PeakMemory
from rfdetr.evaluate import run_lengths
from utils import config

QUERIES = 300                           # detections of the image
WIDTH = 4000                            # of the image, in pixels
HEIGHT = 3000
CELLS = 108                             # side of a mask before it is stretched, a quarter of the detector's input


def blobs(number, cells):
    """-> (number, cells, cells) mask logits, each positive here and there within one rectangle."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((number, cells, cells), -5.0)
    for one in logits:
        top, left, height, width = (int(v) for v in torch.randint(0, cells // 2, (4,), generator=generator))
        part = one[top:top + 5 + height, left:left + 5 + width]
        part.copy_(torch.randn(part.shape, generator=generator) + 1)
    return logits


def main(**overrides):
    """Print the most memory that the process held and the CPU time; -> GB."""
    cfg = config.resolve(globals(), overrides)
    torch.set_num_threads(1)
    found = {"queries": torch.arange(cfg.QUERIES), "mask_logits": blobs(cfg.QUERIES, cfg.CELLS)}
    with PeakMemory() as peak:
        begin = time.process_time()
        run_lengths(found, (cfg.HEIGHT, cfg.WIDTH))
        seconds = time.process_time() - begin
    print(f"{cfg.QUERIES} masks of a {cfg.WIDTH} x {cfg.HEIGHT} image: at most {peak.gigabytes:.2f} GB in the whole "
          f"process, {seconds:.1f} s of CPU time")
    return peak.gigabytes


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
