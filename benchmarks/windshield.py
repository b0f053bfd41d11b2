"""Speed of the windshield rain on one core: milliseconds per image and images per second.

    python -m benchmarks.windshield

Claim: at 640 x 360, one core writes a windshield twin at 10 images/s or more from JPEG to JPEG, for every intensity.
"windshield" is add_windshield_rain alone, "drops" add_drops alone; "end to end" decodes a JPEG file, adds windshield
rain, and encodes it with the same tables. Medians of wall time over REPEATS images with different seeds, after a
warm-up; the work is single-threaded, so a load above the number of cores makes the numbers worse.
"""

import os
import platform
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import make_rain
from benchmarks.rain import median_ms, require_pairs, test_picture
from utils import config
from utils.weather import rain, windshield

SIZES = ((160, 160), (640, 360), (1280, 720))  # width, height
REPEATS = 20                                   # images per number; the largest size takes a quarter of them


def main(**overrides):
    cfg = config.resolve(globals(), overrides)
    require_pairs(cfg.SIZES)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} core(s){load}; "
          f"Python {platform.python_version()}, numpy {np.__version__}, Pillow {Image.__version__}")
    print(f"{'size':>11} {'intensity':>10} {'drops':>12} {'windshield':>12} {'end to end':>12} "
          f"{'images/s per core':>18}")
    add = windshield.add_windshield_rain
    with tempfile.TemporaryDirectory() as folder:
        for width, height in cfg.SIZES:
            pixels = test_picture(width, height)
            source, target = Path(folder) / "clean.jpg", Path(folder) / "rainy.jpg"
            Image.fromarray(pixels).save(source, quality=90)
            repeats = max(3, cfg.REPEATS // (4 if width * height > 500_000 else 1))
            for intensity in windshield.INTENSITIES:
                def alone(i, function=add, p=pixels, n=source.name, k=intensity):
                    return function(p, rain.rng_for(i, n), k)

                drops = median_ms(partial(alone, function=windshield.add_drops), repeats)
                both = median_ms(alone, repeats)
                whole = median_ms(lambda i, f=(source, target), k=intensity: make_rain.rain_one((*f, i, k), add),
                                  repeats)
                print(f"{width:>6}x{height:<4} {intensity:>10} {drops:>9.1f} ms {both:>9.1f} ms {whole:>9.1f} ms "
                      f"{1e3 / whole:>18.1f}")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
