"""Pairs of one scene in rain and without, as plain folders of images."""

from pathlib import Path

import torch
from torchvision import tv_tensors

from utils import system
from utils.config import UserError
from utils.datasets import image_check, layouts
from utils.datasets.coco import require_clean_and_rainy, require_no_rain
from utils.datasets.fresh_rain import source_of
from utils.datasets.layouts import ADVICE
from utils.datasets.presets import OverEpochs
from utils.datasets.samples import epoch_and_index, images_by_name, read_image, sample_randomness, seeded_subset


class PairedRainDataset(torch.utils.data.Dataset):
    """Rainy images and their clean partners of the same relative name (the extension may differ), without boxes.

    Sample: {"image": rainy (3, H, W) uint8, "twin": clean, "boxes": (0, 4), "labels": (0,), "image_id": index, "size",
    "domain": "rainy", "path"}, so that everything that takes CocoDetectionDataset's samples takes these.

    Args:
        rainy_dir, clean_dir: folders, searched recursively; `constants` are their names for error messages.
        transform: one of utils.datasets.presets.
        percent, part, seed: see `seeded_subset`; two data sets with parts (0, 0.9) and (0.9, 1) never share a pair.
        limit: at most so many pairs (a seeded choice), None for all.
        fresh_rain: FreshRain that draws on the clean images in the place of those of rainy_dir, which is then not read.
    """

    crops = 1         # samples of each pair in an epoch
    fresh_rain = None
    notes = ()        # on what is odd about annotations, of which there are none
    cache_bytes = 0   # of decoded pairs that may be kept in memory ...
    cached_bytes = 0  # ... and that are

    def __init__(self, rainy_dir, clean_dir, transform, *, constants=("RAINY_DIR", "CLEAN_DIR"), percent=100, seed=0,
                 part=(0.0, 1.0), limit=None, check=True, fresh_rain=None):
        clean = images_by_name(clean_dir, constants[1], ADVICE["clean"])
        if fresh_rain:
            rainy, rainy_dir = clean, clean_dir
            require_no_rain(clean_dir, constants[::-1])
        else:
            rainy = images_by_name(rainy_dir, constants[0], ADVICE["rainy"])
            require_clean_and_rainy(clean_dir, rainy_dir, constants[::-1])
        alone = sorted(rainy.keys() - clean.keys())
        if alone:
            raise UserError(f"{constants[1]} = '{Path(clean_dir).as_posix()}' has no clean partner for "
                            f"{system.listed(alone)} of {constants[0]} = '{Path(rainy_dir).as_posix()}'")
        names = sorted(rainy)
        if limit is not None:
            percent = min(percent, 100 * limit / len(names))
        names = [names[i] for i in seeded_subset(names, percent, seed, part)]
        if not names:
            raise UserError(f"{constants[bool(fresh_rain)]} = '{Path(rainy_dir).as_posix()}' has too few images for a "
                            "split: add some, or choose a larger share of them (PERCENT_DATASET)")
        self.pairs = [(rainy[name], clean[name]) for name in names]
        self.transform, self.seed, self.fresh_rain = transform, seed, fresh_rain
        if check:
            rainy, clean = zip(*self.pairs, strict=True)
            if fresh_rain:  # each would be found to be its own partner
                image_check.check_images(clean, constants[1])
            else:
                image_check.check_images(rainy + clean, " and ".join(constants),
                                         partners=clean + (None,) * len(clean))

    def __len__(self):
        return len(self.pairs) * self.crops

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return [path for pair in self.pairs for path in pair]

    def read(self, index):
        """-> rainy and clean image of a pair, (3, H, W) uint8; kept for the next time while the cache has room."""
        cache = self.__dict__.setdefault("_cache", {})
        if index not in cache:
            pair = read_pair(*self.pairs[index])
            if self.cached_bytes + 2 * pair[0].numel() > self.cache_bytes:
                return pair
            cache[index] = pair
            self.cached_bytes += 2 * pair[0].numel()
        return cache[index]

    def __getstate__(self):  # a loading process fills a cache of its own
        return {name: value for name, value in vars(self).items() if name not in ("_cache", "cached_bytes")}

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        number, index = index, index % len(self.pairs)
        rainy, clean = self.read(index)
        size = tuple(rainy.shape[-2:])
        sample = {"image": tv_tensors.Image(rainy), "twin": tv_tensors.Image(clean)}
        if self.fresh_rain:
            name = f"{number}:{self.pairs[index][0].name}"
            sample = self.fresh_rain({"image": sample["image"]}, epoch, name, twin=True)
        transform = self.transform.at(epoch) if isinstance(self.transform, OverEpochs) else self.transform
        with sample_randomness(self.seed, epoch, number):
            sample = transform(sample)
        return sample | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": index,
                         "size": size, "domain": "rainy", "path": self.pairs[index][0].as_posix()}


def read_pair(rainy, clean):
    """-> the two images, (3, H, W) uint8 each.

    Raises:
        UserError: a file cannot be read, or their sizes differ; names the files.
    """
    first = read_image(rainy)
    images = first, first if clean == rainy else read_image(clean)  # fresh rain is drawn on the clean one
    if images[0].shape != images[1].shape:
        sizes = ["{2}x{1}".format(*image.shape) for image in images]
        raise UserError(f"{rainy.as_posix()} is {sizes[0]}, its clean partner {clean.as_posix()} is {sizes[1]}")
    return images


def without_annotations(clean_dir, rainy_dir):
    """-> whether both are plain folders of images, without annotations of a form that is read; rainy_dir "" is none,
    which is as good."""
    return all(Path(folder).is_dir() and not (Path(folder) / "annotations").exists() and not layouts.layout_of(folder)
               for folder in ([clean_dir, rainy_dir] if rainy_dir else [clean_dir]))


def is_unlabelled(cfg):
    """-> whether a script's constants ask for training on plain folders of images: DETECTION_WEIGHT is 0, COCO_DIR and
    COCO_RAIN_DIR are `without_annotations`.

    Raises:
        UserError: COCO_DIR is, and there is neither a rainy folder nor rain to draw, or DETECTION_WEIGHT is not 0.
    """
    rainy_dir = cfg.COCO_RAIN_DIR
    if not without_annotations(cfg.COCO_DIR, ""):
        return False
    if cfg.DETECTION_WEIGHT:
        if system.images_in(cfg.COCO_DIR, below=False):
            raise UserError(f"COCO_DIR = '{Path(cfg.COCO_DIR).as_posix()}' holds images, but no annotations: "
                            "DETECTION_WEIGHT = 0 trains without labels, by the clean twins alone; for a training with "
                            f"labels {layouts.EXPECTED['standard'].format(folder='train2017')}")
        return False
    if not rainy_dir and source_of(cfg) != "fresh":
        raise UserError("COCO_RAIN_DIR is empty: give the folder of COCO_DIR's images in rain, which make_rain.py "
                        "writes, or set RAIN = 'fresh', which draws rain on them")
    if rainy_dir and not Path(rainy_dir).is_dir():
        raise UserError(f"COCO_RAIN_DIR = '{Path(rainy_dir).as_posix()}' does not exist: give the folder of COCO_DIR's "
                        "images in rain, which make_rain.py writes, or '' with RAIN = 'fresh', which draws the rain")
    return not rainy_dir or without_annotations(rainy_dir, "")


def unlabelled_pairs(coco_dir, rain_dir, train_transform, val_transform, *, percent, seed, fresh_rain=None):
    """Plain folders (the constants COCO_DIR and COCO_RAIN_DIR, see `is_unlabelled`) in two parts that share no pair.

    Args:
        coco_dir, rain_dir: folders of images; with rain_dir "" the validation part's rain is drawn as well, once: a
            validation loader's keys are those of epoch 0.
        fresh_rain: FreshRain of the training part, or None.
    Returns:
        PairedRainDataset of nine tenths to train on, PairedRainDataset of the rest to validate on.
    """
    train, val = (PairedRainDataset(rain_dir, coco_dir, transform, constants=("COCO_RAIN_DIR", "COCO_DIR"),
                                    percent=percent, seed=seed, part=part, fresh_rain=own)
                  for transform, part, own in ((train_transform, (0.0, 0.9), fresh_rain),
                                               (val_transform, (0.9, 1.0), None if rain_dir else fresh_rain)))
    validated = {clean for _, clean in val.pairs}  # of fewer images than the clean ones others are the last tenth
    train.pairs = [pair for pair in train.pairs if pair[1] not in validated]
    return train, val
