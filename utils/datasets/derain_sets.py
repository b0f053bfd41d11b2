"""Test sets of the de-raining literature, known by their layout: which rainy file belongs to which clean one.

| set | layout |
|---|---|
| plain pairs | rainy/NAME, clean/NAME (what make_rain.py writes: windshield_rainy_v40/, clear/) |
| Rain100L, Rain100H (Yang et al. 2017) | rainy/rain-001.png with norain-001.png beside or above; rain/, norain/ |
| Rain200L, Rain200H | rain/1x2.png, norain/1.png |
| Rain800 (Zhang et al.), Rain1200 (Zhang & Patel 2018) | one wide file: both images side by side |
| Rain1400 (Fu et al. 2017) | rainy_image/901_1.jpg to 901_14.jpg, ground_truth/901.jpg |
| SPA-Data (Wang et al. 2019) | rain/NAME_rain.png (or NAME.png), gt/NAMEgt.png (or gt/NAME.png) |
| RainDrop (Qian et al. 2018) | data/0_rain.png, gt/0_clean.png |
| RainDS (Quan et al. 2021) | raindrop/, rainstreak/, rainstreak_raindrop/ with rd-1.png, ..., gt/norain-1.png |
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from utils import system
from utils.config import UserError
from utils.datasets import image_check
from utils.datasets.image_pairs import read_pair
from utils.datasets.samples import read_image

RAINY = ("rainy", "rain", "rainy_image", "data", "input", "lq", "rainstreak_raindrop", "rainstreak", "raindrop",
         "windshield_rainy_v40")
CLEAN = ("clean", "clear", "norain", "gt", "ground_truth", "target", "hq")
_TOGETHER = ("raindrop", "rainstreak", "rainstreak_raindrop")  # RainDS: three rainy folders of one test set
_WIDE = 1.1   # wide files of two images, in a folder without partners, are at least so much wider than high (Rain800
              # has portraits beside each other), ...
_ALIKE = 0.3  # ... and their halves show one scene: correlation of the details, of photographs 0.0, of pairs 0.75 to 1
_LOOKED_AT = 20  # wide files
# what names say beside the number: "norain-001", "0_clean", "12gt", "3x2", "rd-rs-7"
_WORDS = re.compile(r"^(?:norain|rain|rd-rs|rd|rs|im)[-_]?(?=\d)|[-_]?(?:norain|rain|clean|gt)$|(?<=\d)x2$",
                    re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A rainy image and its clean one; of a wide file the halves, where `halves` says which is the rainy one."""

    rainy: Path
    clean: Path
    halves: str = ""  # "left" or "right": the rainy half of one wide file

    def size(self):
        """-> (width, height) of either image."""
        width, height = image_check.size_of(self.rainy)
        return (width // 2 if self.halves else width), height

    def read(self):
        """-> rainy, clean, (3, H, W) uint8 each; UserError where they cannot be read or their sizes differ."""
        if not self.halves:
            return read_pair(self.rainy, self.clean)
        left, right = _halves(read_image(self.rainy))
        return (left, right) if self.halves == "left" else (right, left)


def find_pairs(root, constant="TEST_SETS"):
    """The pairs of one test set.

    Args:
        root: folder of the set, see the top of this file; constant: the script's constant that holds it.
    Returns:
        {name: Pair}, sorted by name; lines about what is odd but can be used.
    Raises:
        UserError: no folder, no pairs, rainy images without partner, files that are broken, of unequal sizes or too
        small (all are named); names `constant`.
    """
    pairs, notes = _by_layout(Path(root), constant)
    _check(pairs, f"{constant}: {Path(root).as_posix()}")
    return pairs, notes


def _by_layout(root, constant):
    if problem := system.absent(root, folder=True):
        raise UserError(f"{constant}: '{root.as_posix()}' {problem}")
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    clean_folders, rainy_folders = ([folders[name] for name in names if name in folders] for names in (CLEAN, RAINY))
    for found in (clean_folders, rainy_folders):
        if len(found) > 1 and any(folder.name.lower() not in _TOGETHER for folder in found):
            raise UserError(f"{constant}: '{root.as_posix()}' has {system.listed([path.name for path in found])}: make "
                            "each a set of its own")
    if rainy_folders:
        return _by_name(root, rainy_folders, clean_folders[0] if clean_folders else root, constant)
    images = system.images_in(root, below=False)
    if images and all(_is_wide(path) for path in images) and (side := _rainy_half(images)):
        return ({path.stem: Pair(path, path, side) for path in images},
                [f"{root.as_posix()}: wide files of two images, the rainy one taken to be on the {side} (more detail)"])
    raise UserError(f"{constant}: '{root.as_posix()}' is no known test set: expected a folder of rainy images "
                    f"({', '.join(RAINY[:5])}) and one of clean ones ({', '.join(CLEAN[:5])}), or wide files of both")


def _check(pairs, what):
    """UserError for files that cannot be read, are unequal or too small, before anything is computed."""
    rainy, clean = zip(*((pair.rainy, pair.clean) for pair in pairs.values()), strict=True)
    wide = [pair for pair in pairs.values() if pair.halves]
    image_check.check_images(list(rainy) + ([] if wide else sorted(set(clean))), what,
                             partners=None if wide else list(clean) + [None] * len(set(clean)))
    if small := [pair.rainy.as_posix() for pair in pairs.values() if min(pair.size()) < image_check.SSIM_WINDOW]:
        raise UserError(f"{what}: {system.listed(small, 3)}: sides of at least {image_check.SSIM_WINDOW} pixels are "
                        "needed, the window of SSIM")


def _by_name(root, rainy_folders, clean_folder, constant):
    clean = {}
    for path in system.images_in(clean_folder, below=clean_folder != root):
        key = _key(path.relative_to(clean_folder))
        if clean.setdefault(key, path) != path:
            raise UserError(f"{constant}: {clean[key].as_posix()} and {path.name} could both be the clean image {key}")
    pairs, alone = {}, []
    for folder in rainy_folders:
        for path in system.images_in(folder):
            key = _key(path.relative_to(folder))
            if folder.name.lower() == "rainy_image":  # Rain1400: 901_1 to 901_14 belong to 901
                partner = clean.get(key) or clean.get(key.rsplit("_", 1)[0])
            else:
                partner = clean.get(key)
            name = path.relative_to(folder).with_suffix("").as_posix()
            name = f"{folder.name}/{name}" if len(rainy_folders) > 1 else name
            if partner is None:
                alone.append(path.as_posix())
            elif pairs.setdefault(name, Pair(path, partner)).rainy != path:
                raise UserError(f"{constant}: {pairs[name].rainy.as_posix()} and {path.name} share a name; keep one of "
                                "them")
    if alone:
        raise UserError(f"{constant}: '{root.as_posix()}': no clean partner for {system.listed(alone, 3)}")
    if not pairs:
        raise UserError(f"{constant}: '{root.as_posix()}' holds no images")
    unused = sorted(set(clean.values()) - {pair.clean for pair in pairs.values()})
    notes = [f"{constant}: {len(unused)} clean image(s) of '{root.as_posix()}' have no rainy one and are not used: "
             f"{system.listed([path.name for path in unused], 3)}"] if unused else []
    return dict(sorted(pairs.items())), notes


def _key(path):
    """-> what a rainy and a clean name have in common: "rain/norain-001.png" -> "001"."""
    stem, before = path.stem, None
    while before != stem:
        before, stem = stem, _WORDS.sub("", stem)
    return (path.parent / (stem or path.stem)).as_posix().lower()


def _is_wide(path):
    try:
        with Image.open(path) as image:
            return image.width % 2 == 0 and image.width / image.height >= _WIDE
    except system.FAULTS as error:
        raise UserError(f"cannot read image {path.as_posix()}: {error}") from error


def _halves(image):
    width = image.shape[-1] // 2
    return image[..., :width], image[..., width:]


def _details(half, side=32, around=5):
    """(3, H, W) uint8 -> (side^2,) of mean 0 and norm 1: a small grey image less its blur, in which the halves of a
    photograph have nothing in common and rain hardly shows."""
    grey = F.interpolate(half.float().mean(0, keepdim=True)[None], (side, side), mode="area")
    fine = (grey - F.avg_pool2d(grey, around, 1, around // 2, count_include_pad=False)).flatten()
    return F.normalize(fine - fine.mean(), dim=0)


def _rainy_half(paths):
    """-> "left" or "right": the half with more detail in most of the files, since rain adds some; "" where the halves
    do not show one scene."""
    votes, alike = [], []
    for path in paths[::max(1, len(paths) // _LOOKED_AT)]:
        left, right = _halves(read_image(path))
        alike.append(_details(left) @ _details(right))
        votes.append(bool(left.float().diff(dim=-1).abs().mean() > right.float().diff(dim=-1).abs().mean()))
    if torch.stack(alike).median() < _ALIKE:
        return ""
    return "left" if 2 * sum(votes) > len(votes) else "right"
