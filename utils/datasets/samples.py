"""What every data set is made of: one image from disk, a seeded choice, a sample's own randomness, a batch."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import system
from utils.config import UserError
from utils.images import to_floats


def read_image(path):
    """-> (3, H, W) uint8 RGB, upright as viewers and labelling tools show it (its EXIF orientation applied).

    Raises:
        UserError: missing or broken; names the file.
    """
    try:
        with Image.open(path) as image:
            system.require_eight_bits(image)
            return torch.from_numpy(np.asarray(system.upright(image).convert("RGB")).copy()).permute(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"image not found: {Path(path).as_posix()}") from None
    except system.FAULTS as error:
        raise UserError(f"cannot read image {Path(path).as_posix()}: {error}") from error


def digest(text):
    """-> 8 bytes that depend on the text alone, on every machine; also for file names that UTF-8 lacks."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def seeded_subset(names, percent, seed, part=(0.0, 1.0)):
    """-> sorted indices of `percent` of `names`: the same on every machine, whatever the order in the file.

    `part` = (first, last) keeps that share of the subset; parts that do not overlap share no name.
    """
    if not 0 < percent <= 100:
        raise UserError(f"PERCENT_DATASET = {percent}: choose a number above 0, up to 100")
    digests = [digest(f"{seed}:{name}") for name in names]
    order = sorted(range(len(names)), key=digests.__getitem__)[:max(1, round(len(names) * percent / 100))]
    return sorted(order[round(part[0] * len(order)):round(part[1] * len(order))])


def evenly(items, count):
    """-> up to `count` of the items of a sequence (samples of a data set as well), evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@contextlib.contextmanager
def sample_randomness(seed, epoch, index):
    """Within, torch's CPU randomness is a function of the three numbers; outside, it goes on untouched."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
        yield


def epoch_and_index(key):
    """-> (epoch, index) of a data set's key, which is `(epoch, index)`, or `index` alone for epoch 0."""
    return key if isinstance(key, tuple) else (0, key)


def images_by_name(folder, constant, advice):
    """-> {relative name without extension: path} of the images below a folder.

    Raises:
        UserError: names `constant`; where the folder does not exist, it ends in `advice`: where to get the images.
    """
    folder = Path(folder)
    if problem := system.absent(folder, folder=True):
        raise UserError(f"{constant} = '{folder.as_posix()}' {problem}. {advice}")
    found = {}
    for path in system.images_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if found.setdefault(name, path) != path:
            raise UserError(f"{constant}: {found[name].as_posix()} and {path.name} share a name; keep one of them")
    if not found:
        raise UserError(f"{constant} = '{folder.as_posix()}' holds no images ({' '.join(system.SUFFIXES)})")
    return found


def parts(batch, most):
    """-> [batches of up to `most` images, None for all], in order; a batch's values are tensors and lists of B entries.
    """
    size = len(batch["images"])
    if most is None or size <= most:
        return [batch]
    return [{name: values[first:first + most] for name, values in batch.items()} for first in range(0, size, most)]


def collate(samples):
    """-> batch {"images": (B, 3, H, W) uint8, "twins": the same or absent, "labels": [{"class_labels": (N,), "boxes":
    (N, 4) cxcywh}, ...] as Hugging Face's DETR models take them, "image_ids", "sizes", "domains", "paths": lists}."""
    batch = {"images": torch.stack([s["image"].as_subclass(torch.Tensor) for s in samples]),
             "labels": [{"class_labels": s["labels"], "boxes": s["boxes"]} for s in samples]}
    if "twin" in samples[0]:
        batch["twins"] = torch.stack([s["twin"].as_subclass(torch.Tensor) for s in samples])
    for key in ("image_id", "size", "domain", "path"):
        batch[f"{key}s"] = [s[key] for s in samples]
    return batch


def collate_with_digests(samples):
    """`collate`, with "twin_digests": B keys, equal where the twins are equal pixel for pixel."""
    return collate(samples) | {"twin_digests": [hashlib.blake2b(s["twin"].numpy().tobytes(), digest_size=16).digest()
                                                for s in samples]}


def to_device(batch, device):
    """-> the batch on `device`, its images as float32 in [0, 1]."""
    moved = dict(batch)
    for key in ("images", "twins"):
        if key in batch:
            moved[key] = to_floats(batch[key], device)
    moved["labels"] = [{k: v.to(device, non_blocking=True) for k, v in label.items()} for label in batch["labels"]]
    return moved


def images_below(folders, constant):
    """-> sorted paths of all images below the folders, each once."""
    found = {}
    for folder in folders:
        folder = Path(str(folder))
        if problem := system.absent(folder, folder=True):
            raise UserError(f"{constant}: '{folder.as_posix()}' {problem}. Set the constant to folders of images, or "
                            "try --demo.")
        paths = system.images_in(folder)
        if not paths:
            raise UserError(f"{constant}: '{folder.as_posix()}' holds no images "
                            f"({' '.join(system.SUFFIXES)})")
        found |= {path.resolve(): path for path in paths}
    return sorted(found.values())
