"""Weather and other trouble in three strengths, for measuring how well a detector bears them.

Rain, mist, fog and drops are those that trainings can draw; the others are what cameras do to pictures, and no training
here shows them. Strengths are LEVELS; all draw their details from a generator, so that equal seeds give equal pixels.
"""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageFilter

from utils.weather import rain
from utils.weather.windshield import add_drops

LEVELS = rain.INTENSITIES  # light, medium, heavy
_VEIL = ((0.35, 0.7), (0.7, 1.2), (1.2, 1.8))   # optical depth of mist at the far end, before rain.py's bound
_FOG = ((0.8, 1.4), (1.4, 2.4), (2.4, 4.0))    # of fog, which hides what is far
_GAMMA = ((1.6, 2.0), (2.2, 2.8), (3.0, 4.0))   # exponent that darkens, with
_DARK = ((0.7, 0.8), (0.5, 0.6), (0.3, 0.4))    # a factor: dusk to night
_BLUR = ((0.002, 0.003), (0.004, 0.006), (0.008, 0.01))  # radius, share of the short side
_NOISE = ((6, 10), (14, 20), (28, 38))          # standard deviation in grey levels
_JPEG = ((20, 30), (10, 15), (4, 7))            # quality


def mist(image, rng, level):
    p = dataclasses.replace(rain.mist_parameters(rng), veil=float(rng.uniform(*_VEIL[level])))
    return rain.apply_rain(image, p, rng)


def fog(image, rng, level):
    p = dataclasses.replace(rain.fog_parameters(rng), veil=float(rng.uniform(*_FOG[level])))
    return rain.apply_rain(image, p, rng)


def dark(image, rng, level):
    scaled = (image / np.float32(255)) ** np.float32(rng.uniform(*_GAMMA[level])) * rng.uniform(*_DARK[level])
    return (255 * scaled).round().astype(np.uint8)


def blur(image, rng, level):
    radius = rng.uniform(*_BLUR[level]) * min(image.shape[:2])
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noise(image, rng, level):
    grain = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(*_NOISE[level]))
    return np.clip(image + grain, 0, 255).round().astype(np.uint8)


def jpeg(image, rng, level):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(_JPEG[level][0], _JPEG[level][1] + 1)))
    return np.asarray(Image.open(buffer))


WEATHERS = {  # name: function (image (H, W, 3) uint8, rng, index into LEVELS) -> the same shape and type
    "rain": lambda image, rng, level: rain.add_rain(image, rng, LEVELS[level]),
    "mist": mist, "fog": fog,
    "drops": lambda image, rng, level: add_drops(image, rng, LEVELS[level]),
    "dark": dark, "blur": blur, "noise": noise, "jpeg": jpeg,
}
