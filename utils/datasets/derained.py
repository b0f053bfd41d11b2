"""A de-rainer's outputs as pairs with the clear images, for what comes behind it: made once, kept as PNG files.

A de-rainer leaves other traces on images that it was trained on than on new ones. What learns from its outputs must see
those of images that it has not been trained on: its validation part, or with `in_folds` all of its training part, each
half from a network that was trained on the other half.
"""

import hashlib
import json
from pathlib import Path

from PIL import Image

from utils import checkpoint, config, processes, system
from utils.datasets import windshield_pairs
from utils.datasets.samples import digest, read_image
from utils.datasets.windshield_pairs import sequence_of
from utils.images import to_bytes, to_floats

# ---- which images ----------------------------------------------------------------------------------------------

def parts_of(weights, found, splits_file, rainy_dir, clear_dir):
    """-> {"train", "val", "test": names}, the parts of the pairs that the de-rainer DERAIN_MODEL_PATH = `weights` knew.

    Args:
        found: {name: pair} of RAINY_DIR and CLEAR_DIR, the two folders; splits_file: SPLITS_FILE, "" for the
            splits.json beside the weights.
    Raises:
        UserError: no such file, it belongs to other pairs or to another de-rainer, or the folders are swapped.
    """
    where = f"DERAIN_MODEL_PATH = '{weights}'"
    file = Path(splits_file or Path(weights).with_name("splits.json"))
    if not splits_file and not file.is_file():
        raise config.UserError(f"{where} has no splits.json beside it: set SPLITS_FILE to the one that its training "
                               "wrote, so that the refiner knows which pairs the de-rainer was trained on")
    rained, own = windshield_pairs.splits_beside(weights)
    if rained and rained == Path(clear_dir).resolve() != Path(rainy_dir).resolve():
        raise config.UserError(f"CLEAR_DIR = '{clear_dir}' is the folder of the rainy images that {where} was trained "
                               f"on: CLEAR_DIR and RAINY_DIR = '{rainy_dir}' are swapped")
    parts = windshield_pairs.read_splits(file, found, "SPLITS_FILE" if splits_file else "DERAIN_MODEL_PATH")
    trained = {windshield_pairs.name_of_entry(entry, found) for entry in own.get("train", ())}
    if splits_file and (seen := sorted(trained & {*parts["val"], *parts["test"]})):
        raise config.UserError(f"SPLITS_FILE = '{splits_file}': {len(seen)} of its validation and test pairs are "
                               f"training pairs of {where}, as splits.json beside that says ({system.listed(seen, 3)})"
                               ": set SPLITS_FILE = \"\", or give the file of that network's training")
    return parts


def shared_out(names, separator, weights):
    """The validation part of the de-rainer DERAIN_MODEL_PATH = `weights`, shared out where nothing else is learned
    from. -> {"train": four fifths of the names, "val": the others}; sequences stay together."""
    if len({sequence_of(name, separator) for name in names}) < 2:
        raise config.UserError(f"DERAIN_MODEL_PATH = '{weights}': its validation part is too small to be shared out, "
                               f"{len(names)} pair(s) in one sequence: set FOLDS = 2, or train it with more VAL_PAIRS")
    some = max(1, len(names) - round(0.8 * len(names)))
    return windshield_pairs.split_names(names, (len(names) - some, some, 0), 0, separator)[0]


def in_folds(names, folds, separator):
    """-> [[names of a fold], ...]: each name is in one of them, the frames of a sequence together."""
    sequences = sorted({sequence_of(name, separator) for name in names}, key=digest)
    fold_of = {sequence: i % folds for i, sequence in enumerate(sequences)}
    return [[name for name in names if fold_of[sequence_of(name, separator)] == fold] for fold in range(folds)]


def fold_name(network, splits):
    """-> name of the folder in which a fold's network is kept: another one for other pairs, so that nobody takes a
    network for one that has not seen them. network: digest of the de-rainer's file; splits: of the fold's training."""
    content = json.dumps(splits, sort_keys=True).encode(errors="surrogatepass")
    return f"{network}_{hashlib.blake2b(content, digest_size=4).hexdigest()}"


# ---- their images ----------------------------------------------------------------------------------------------

def derained_pairs(derain, pairs, names, folder):
    """The de-rained images of chosen pairs; those that are there from an earlier run are taken as they are.

    Args:
        derain: (1, 3, H, W) in [0, 1] -> the same de-rained; pairs: {name: (rainy path, clear path)}.
        names: the chosen ones; folder: where this network's images are kept. A file's name tells the rainy image's
            content, so that other rain under the same names is not taken for it.
    Returns:
        {name: (de-rained path, clear path)}.
    """
    found = {name: (Path(folder) / f"{name}_{checkpoint.file_digest(pairs[name][0])}.png", pairs[name][1])
             for name in names}
    missing = [name for name, (path, _) in found.items() if not is_whole(path, pairs[name][0])]

    def make():
        for name in processes.progress(missing, "de-raining"):
            restored = derain(to_floats(read_image(pairs[name][0])[None]))
            pixels = to_bytes(restored[0]).permute(1, 2, 0).contiguous().cpu().numpy()
            with config.writing(found[name][0]):
                found[name][0].parent.mkdir(parents=True, exist_ok=True)
                with system.written(found[name][0]) as temporary:
                    Image.fromarray(pixels).save(temporary, "PNG")
    processes.main_first(make, "de-raining")
    return found


def is_whole(path, source):
    """-> whether a kept PNG file is there, complete, and as large as the image that it was made of; a folder that is
    copied or synchronised may hold half of it."""
    try:
        with Image.open(path) as kept, Image.open(source) as given:
            fits = kept.size == system.upright_size(given)
            kept.verify()
            return fits
    except system.FAULTS:
        return False
