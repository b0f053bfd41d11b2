"""A de-rainer's outputs as pairs with the clear images, for what comes behind it: made once, kept as PNG files.

A de-rainer leaves other traces on images that it was trained on than on new ones. What learns from its outputs must see
those of images that it has not been trained on: its validation part, or with `in_folds` all of its training part, each
half from a network that was trained on the other half.
"""

import hashlib
from pathlib import Path

from PIL import Image

from utils import processes, system
from utils.datasets.samples import digest, read_image
from utils.datasets.windshield_pairs import sequence_of
from utils.images import to_bytes, to_floats


def network_digest(path):
    """-> 16 hex digits that stand for a weight file's content."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def in_folds(names, folds, separator):
    """-> [[names of a fold], ...]: each name is in one of them, the frames of a sequence together."""
    sequences = sorted({sequence_of(name, separator) for name in names}, key=digest)
    fold_of = {sequence: i % folds for i, sequence in enumerate(sequences)}
    return [[name for name in names if fold_of[sequence_of(name, separator)] == fold] for fold in range(folds)]


def derained_pairs(derain, pairs, names, folder):
    """The de-rained images of chosen pairs; those that are there from an earlier run are taken as they are.

    Args:
        derain: (1, 3, H, W) in [0, 1] -> the same de-rained; pairs: {name: (rainy path, clear path)}.
        names: the chosen ones; folder: where this network's images are kept.
    Returns:
        {name: (de-rained path, clear path)}.
    """
    found = {name: (Path(folder) / f"{name}.png", pairs[name][1]) for name in names}
    missing = [name for name, (path, _) in found.items()
               if not path.is_file() or path.stat().st_mtime < pairs[name][0].stat().st_mtime]

    def make():
        for name in processes.progress(missing, "de-raining"):
            restored = derain(to_floats(read_image(pairs[name][0])[None]))
            pixels = to_bytes(restored[0]).permute(1, 2, 0).contiguous().cpu().numpy()
            found[name][0].parent.mkdir(parents=True, exist_ok=True)
            with system.written(found[name][0]) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
    processes.main_first(make, "de-raining")
    return found
