"""Speed of the synthetic rain on one core: milliseconds per image and images per second.

    python -m benchmarks.rain

Claim: at 640 x 480, one core writes a rainy twin at 25 images/s or more from JPEG to JPEG, for every intensity.
"add_rain" is the rain alone; "end to end" decodes a JPEG file, adds rain, and encodes it with the same tables.
Medians of wall time over REPEATS images with different seeds, after a warm-up; the work is single-threaded, so a
load above the number of cores makes the numbers worse.
"""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import make_rain
from utils import config
from utils.weather import rain

SIZES = ((640, 480), (1280, 720), (3840, 2160))  # width, height
REPEATS = 25                                     # images per number; the largest size takes a fifth of them


def test_picture(width, height):
    """(H, W, 3) uint8 with structure at all scales: a JPEG of it is about as large as one of a photograph."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (3, 12, 48, 160):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip((total / 4 - 128) * 1.8 + 118, 0, 255).astype(np.uint8)


def median_ms(function, repeats):
    """Median wall time of function(i) in milliseconds, after two warm-up calls."""
    for i in (0, 1):
        function(i)
    times = []
    for i in range(repeats):
        started = time.perf_counter()
        function(i)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def require_pairs(sizes):
    """UserError unless SIZES holds pairs of width and height."""
    if not all(isinstance(size, (tuple, list)) and len(size) == 2 for size in sizes):
        raise config.UserError(f"SIZES = {sizes}: give pairs of width and height, such as ((640, 480),)")


def main(**overrides):
    cfg = config.resolve(globals(), overrides)
    require_pairs(cfg.SIZES)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} core(s){load}; "
          f"Python {platform.python_version()}, numpy {np.__version__}, Pillow {Image.__version__}")
    print(f"{'size':>11} {'intensity':>10} {'add_rain':>12} {'end to end':>12} {'images/s per core':>18}")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in cfg.SIZES:
            pixels = test_picture(width, height)
            source, target = Path(folder) / "clean.jpg", Path(folder) / "rainy.jpg"
            Image.fromarray(pixels).save(source, quality=90)
            repeats = max(3, cfg.REPEATS // (5 if width * height > 4_000_000 else 1))
            for intensity in rain.INTENSITIES:
                files = (source, target)
                alone = median_ms(lambda i, p=pixels, n=source.name, k=intensity:
                                  rain.add_rain(p, rain.rng_for(i, n), k), repeats)
                whole = median_ms(lambda i, f=files, k=intensity: make_rain.rain_one((*f, i, k)), repeats)
                print(f"{width:>6}x{height:<4} {intensity:>10} {alone:>9.1f} ms {whole:>9.1f} ms {1e3 / whole:>18.1f}")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
