"""A few seconds of video for the demo: a camera pans over a procedural street, and half-way it begins to rain."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from utils import system
from utils.demo.scene import render_scene
from utils.weather import rain

SEED = 11               # of the street and of the rain
FPS, FRAMES = 12, 48    # four seconds
SIZE = (320, 240)       # width, height of the clip
PAN = 48                # pixels that the camera travels over the larger scene
RAIN_BEGINS = 24        # frame
RAMP = 8                # frames until the rain is at full strength


def ensure_clip(path, video_writer):
    """Draw the clip into `path` unless it is there. -> Path

    video_writer: (path, frames per second) -> context manager with write(PIL image): inference.video.VideoWriter.
    """
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with system.written(path, ".mp4") as whole, video_writer(whole, FPS) as writer:
            for pixels in frames():
                writer.write(Image.fromarray(pixels))
    return path


def frames():
    """Yield the clip's FRAMES pictures, (H, W, 3) uint8."""
    width, height = SIZE
    scene = Image.fromarray(render_scene(SEED, (width + PAN, height + PAN * height // width))[0])
    # no sheets and no spray: they are drawn anew for every picture, and a veil does not flicker
    full = replace(rain.sample_parameters(rain.rng_for(SEED, "clip"), "medium"),
                   patchiness=0.0, spray=0.0, horizon=0.45)
    for i in range(FRAMES):
        share = i / (FRAMES - 1)  # of the way; the picture widens by a tenth meanwhile
        left, wide = PAN * share, 0.9 + 0.1 * share
        box = (left, 0.0, left + width * wide, height * wide)
        pixels = scene.resize(SIZE, Image.Resampling.BICUBIC, box=box)
        strength = min(1.0, (i - RAIN_BEGINS + 1) / RAMP)
        yield rainy(pixels, full, strength, i)


def rainy(picture, full, strength, number):
    """A frame with `strength` in (0, 1] of the rain `full`, dry at 0 and below; streaks fall anew in every frame."""
    pixels = np.asarray(picture)
    if strength <= 0:
        return pixels
    layers = tuple(replace(layer, count=round(layer.count * strength)) for layer in full.layers)
    dry = {"gain": 1.0, "contrast": 1.0, "saturation": 1.0, "veil": 0.0, "softness": 0.0, "noise": 0.0}
    tone = {name: value + strength * (getattr(full, name) - value) for name, value in dry.items()}
    return rain.apply_rain(pixels, replace(full, layers=layers, **tone), rain.rng_for(SEED, f"frame {number}"))
