"""Rain that is drawn while images are loaded: another one on every image in every epoch, and no rainy copy on the disk.

A fixed rainy copy shows a network the same streaks again and again, which it can learn by heart; rain drawn anew wins
more at no cost but the drawing (docs/lab_notes.md, "Fresh rain").
"""

from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from utils import processes, system
from utils.config import UserError
from utils.weather import kinds, rain, severity, twin

SOURCES = ("auto", "files", "fresh")
_USUAL = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # RAIN_KINDS that nobody has changed


class FreshRain:
    """Draws weather on samples.

    Args:
        shares: {kind of kinds.KINDS: share}, of any sum.
        seed: with the epoch and the image's name it decides on the weather, so that a resumed run, other workers or
            more processes see the same.
        side: the short side in pixels to which larger images are shrunk before, usually the network's input: what is
            drawn finer than that would be lost, and the time with it. 0: never.
    """

    def __init__(self, shares, seed, side):
        self.shares, self.seed, self.side = shares, seed, side

    def __call__(self, sample, epoch, name, twin=False):
        """A clean sample {"image": (3, H, W) uint8, "boxes": ...} before its transform -> the same in the rain; twin:
        with the clean image as "twin"."""
        size = tuple(sample["image"].shape[-2:])
        if 0 < self.side < min(size):
            scale = self.side / min(size)
            sample = v2.Resize([max(1, round(length * scale)) for length in size], antialias=True)(sample)
        clean = sample["image"]
        pixels = np.ascontiguousarray(clean.permute(1, 2, 0).numpy())
        pixels = np.array(self.draw(pixels, rain.rng_for(self.seed, f"{epoch}:{name}")))
        sample = sample | {"image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))}
        return sample | ({"twin": clean} if twin else {})

    def draw(self, pixels, rng):
        """(H, W, 3) uint8 -> the same in weather of one of the kinds."""
        return kinds.draw(pixels, rng, self.shares)


def drawn_by(data):
    """-> names of the constants that decide on the weather of a validation set, where it is drawn: with others no score
    means the same."""
    return ("RAIN_KINDS", "SEED") if data.fresh_rain else ()


class SteadyWeather(FreshRain):
    """One weather of utils.weather.severity at one level, the same on an image every time, for evaluations."""

    def __init__(self, weather, level, seed, side):
        self.weather, self.level, self.seed, self.side = weather, level, seed, side

    def __call__(self, sample, epoch, name, twin=False):
        """See FreshRain; whatever the epoch."""
        return super().__call__(sample, f"{self.weather} {self.level}", name, twin)

    def draw(self, pixels, rng):
        return severity.WEATHERS[self.weather](pixels, rng, self.level)


def source_of(cfg):
    """-> "files" or "fresh": what RAIN comes to. "auto" is "fresh" where there are no rainy images, where RAIN_KINDS
    has been changed, and where the rainy images are what make_rain.py made of the clean ones, with streaks of all
    intensities: what was drawn there once can as well be drawn anew. Others are read: they may be photographs."""
    if cfg.RAIN not in SOURCES:
        raise UserError(f"RAIN = {cfg.RAIN!r}: choose {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")
    if cfg.RAIN != "auto":
        return cfg.RAIN
    rainy, clean = _folders(cfg)
    if not rainy:
        return "fresh"
    if getattr(cfg, "RAIN_RATIO", 1) == 0:
        return "files"
    return "fresh" if cfg.RAIN_KINDS != _USUAL or _was_drawn(rainy, clean) else "files"


def _folders(cfg):
    """-> the constants with the rainy and with the clean images."""
    pair = ("COCO_RAIN_DIR", "COCO_DIR") if hasattr(cfg, "COCO_RAIN_DIR") else ("RAINY_DIR", "CLEAN_DIR")
    return tuple(getattr(cfg, name) for name in pair)


def _was_drawn(rainy, clean):
    """-> whether make_rain.py wrote the rainy images, of the clean ones, with what RAIN_KINDS draws if nobody has
    changed it."""
    rainy, clean = (Path(str(one)).parent if Path(str(one)).is_file() else Path(str(one)) for one in (rainy, clean))
    record = twin.twin_above(rainy)
    try:
        found = system.read_json(record) if record else None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        return False
    source = Path(str(found.get("source"))) / rainy.resolve().relative_to(record.parent)
    return (source.resolve() == clean.resolve()
            and (found.get("kind", "streaks"), found.get("intensity")) == ("streaks", "random"))


def fresh_rain(cfg, side=None):
    """-> FreshRain of a script's constants RAIN and RAIN_KINDS, None where the rain is that of files, see `source_of`.

    Args:
        side: see FreshRain; None takes IMAGE_SIZE.
    Raises:
        UserError: unknown or useless values.
    """
    source, ratio = source_of(cfg), getattr(cfg, "RAIN_RATIO", 1)
    if source == "files":
        if cfg.RAIN_KINDS != _USUAL:
            processes.say("note: RAIN_KINDS has no effect with " + (
                f"RAIN_RATIO = {ratio}: no training image is to be rainy" if cfg.RAIN == "auto" else
                f"RAIN = {cfg.RAIN!r}: RAIN = 'fresh' draws these kinds"))
        return None
    if ratio == 0 and cfg.RAIN == "fresh":
        processes.say(f"note: RAIN has no effect on training images with RAIN_RATIO = {ratio}: none is to be rainy")
    elif ratio and cfg.RAIN == "auto":
        instead = " ('files' reads the rainy ones)" if _folders(cfg)[0] else ""
        processes.say(f"RAIN = 'auto': the training images' rain is drawn anew in every epoch{instead}")
    return FreshRain(kinds.require_shares(cfg.RAIN_KINDS), cfg.SEED, cfg.IMAGE_SIZE if side is None else side)
