"""Pairs for the U-Net: which clear and rainy files belong together, the part that each is in, how hard it rains.

    data/clear/, data/windshield_rainy_v40/     equal names (the extension may differ)
    data/real_rainy/                            photographs without ground truth

A split never cuts through a pair, and with SEQUENCE_SEPARATOR not through the frames of one sequence either. Frames
that lie a second apart are nearly one picture: a split through a sequence would measure memory.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import processes, system
from utils.config import UserError
from utils.datasets import image_check, image_pairs
from utils.datasets.coco import Mixture, require_clean_and_rainy
from utils.datasets.samples import digest, epoch_and_index, images_by_name
from utils.weather import rain, windshield
from utils.weather.twin import twin_above

PARTS = ("train", "val", "test")
INTENSITIES = windshield.INTENSITIES  # what `intensities` finds, from light to heavy
_ADVICE = ("Rainy partners of clear images come from python make_rain.py --kind windshield --clear ./data/clear --out "
           "./data/windshield_rainy_v40; set the constant to your data, or try --demo.")


class WindshieldPairs(image_pairs.PairedRainDataset):
    """Chosen pairs; samples as PairedRainDataset's.

    Args:
        pairs: {name: (rainy path, clear path)} from `find_pairs`; names: the chosen ones, in this order.
        transform: one of utils.datasets.presets; seed: of its randomness.
        crops: samples of each pair in an epoch; cache_gb: of decoded pairs that every process keeps in memory.
    """

    def __init__(self, pairs, names, transform, seed=0, crops=1, cache_gb=0.0):
        self.names, self.pairs = list(names), [pairs[name] for name in names]
        self.transform, self.seed, self.crops, self.cache_bytes = transform, seed, crops, int(cache_gb * 1e9)


class Walk(torch.utils.data.Dataset):
    """`count` samples of WindshieldPairs in every epoch, which walk through all pairs: few are repeated, of many each
    epoch sees another part. Keys and samples as theirs."""

    notes = ()

    def __init__(self, data, count):
        self.data, self.count, self.pairs = data, count, len(data.pairs)
        # neighbours in a folder are often alike, so the walk takes long steps, which share no factor with its length
        self.step = next(step for step in range(max(1, round(0.618 * self.pairs)), 2 * self.pairs + 1)
                         if math.gcd(step, self.pairs) == 1)

    def __len__(self):
        return self.count

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return self.data.image_paths()

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        pair = (epoch * self.count + index) * self.step % self.pairs
        return self.data[(epoch, pair + self.pairs * (index // self.pairs))]  # the sum's second part: another crop


class PairMixture(Mixture):
    """Several sets of pairs in fixed shares of every epoch, which has as many samples as the first set has crops.

    Args:
        parts: WindshieldPairs; shares: of an epoch's samples, one per part, that add up to 1.
    """

    def __init__(self, parts, shares):
        ends = np.rint(np.cumsum([0, *shares]) * len(parts[0])).astype(int)
        super().__init__(Walk(part, count) for part, count in zip(parts, np.diff(ends).tolist(), strict=True))
        self.names = parts[0].names


def find_pairs(rainy_dir, clear_dir, constants=("RAINY_DIR", "CLEAR_DIR")):
    """Look at every pair once, before anything is trained.

    Returns:
        {name: (rainy path, clear path)}, lines about what is odd but can be used.
    Raises:
        UserError: swapped folders; a rainy image without its partner, unequal sizes, unreadable files, all in one
        report; names the two `constants` that hold the folders.
    """
    rainy, clear = (images_by_name(folder, constant, _ADVICE)
                    for folder, constant in zip((rainy_dir, clear_dir), constants, strict=True))
    require_clean_and_rainy(clear_dir, rainy_dir, constants[::-1])
    folders = f"{constants[0]} = '{Path(rainy_dir).as_posix()}', {constants[1]} = '{Path(clear_dir).as_posix()}'"
    pairs = {name: (rainy[name], clear[name]) for name in sorted(rainy.keys() & clear.keys())}
    if not pairs:
        raise UserError(f"{folders}: no rainy image has a clear one of the same name, such as "
                        f"{min(rainy)} and {min(clear)}: partners have equal names relative to these folders")
    faults = [f"{path.as_posix()} has no partner in {constants[1]}" for name, path in sorted(rainy.items())
              if name not in clear]
    notes, thumbnails = [], []
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, system.available_cores())) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        for fault, small in pool.map(_look_at, pairs.values()):
            faults += [fault] if fault else []
            thumbnails.append(small)
    if faults:
        raise UserError(f"{folders}: {len(faults)} bad pair(s): {system.listed(faults, separator='; ')}. Fix or remove "
                        "these files.")
    equal = [name for name, (wet, dry) in zip(pairs, thumbnails, strict=True) if np.abs(wet - dry).max() < 1e-6]
    if equal and len(equal) == len(pairs):
        raise UserError(f"{folders}: every rainy image is its clear one over again, there is no rain to learn from")
    if equal:
        notes.append(f"{len(equal)} rainy image(s) are the same as their clear partners: {system.listed(equal, 3)}")
    if unused := len(clear.keys() - rainy.keys()):
        notes.append(f"{unused} image(s) in {constants[1]} have no rainy partner and are not used")
    odd = image_check.more_like_another(np.array(thumbnails))
    doubtful = [name for name, is_odd in zip(pairs, odd, strict=True) if is_odd]
    if doubtful:
        notes.append(f"{len(doubtful)} rainy image(s) look more like another clear image than like their partner: "
                     f"{system.listed(doubtful)}; a wrong partner teaches nonsense")
    return pairs, notes


def _look_at(pair):
    """-> (what is wrong with it or None, thumbnails of the rainy and the clear image (2, n), of mean 0 and norm 1)."""
    sizes, small = [], np.zeros((2, image_check.THUMBNAIL**2), np.float32)
    for path, row in zip(pair, small, strict=True):
        try:
            with Image.open(path) as image:
                system.require_eight_bits(image)
                sizes.append(system.upright_size(image))
                row[:] = image_check.thumbnail(image)
        except system.FAULTS as error:
            return f"{path.as_posix()} cannot be read ({error})", small
    if sizes[0] != sizes[1]:
        return (f"{pair[0].as_posix()} is {sizes[0][0]}x{sizes[0][1]}, its partner {pair[1].as_posix()} "
                f"{sizes[1][0]}x{sizes[1][1]}"), small
    return None, small


# ---- splits ----------------------------------------------------------------------------------------------------

def sequence_of(name, separator):
    """-> what names the sequence of a frame: the name up to its last separator, all of it where there is none.

    "drive07_0012" with "_" is "drive07"; with separator "" every image is its own sequence.
    """
    return name.rsplit(separator, 1)[0] if separator else name


def split_names(names, counts, seed=0, separator=""):
    """Share names out: a function of seed and the names alone, whole sequences to one part.

    Args:
        names: all pairs; counts: how many for train, val and test. Fewer names than their sum are shared out in the
            same proportion, of more some are not used. Whole sequences make the counts approximate.
    Returns:
        {"train", "val", "test": sorted names}, a line where the counts were not met, else None.
    """
    if min(counts) < 0 or counts[0] < 1 or counts[1] < 1:
        raise UserError(f"TRAIN_PAIRS = {counts[0]}, VAL_PAIRS = {counts[1]}, TEST_PAIRS = {counts[2]}: choose at "
                        "least 1 for training and validation, and no negative number")
    sequences = {}
    for name in sorted(names):
        sequences.setdefault(sequence_of(name, separator), []).append(name)
    if len(sequences) < sum(count > 0 for count in counts):
        raise UserError(f"{len(names)} pair(s) in {len(sequences)} sequence(s) are too few for a split: add images, or "
                        f"choose another SEQUENCE_SEPARATOR than {separator!r}")
    if separator and not any(separator in name for name in names):
        processes.say(f"note: SEQUENCE_SEPARATOR = {separator!r} is in no name, so each image is taken for a sequence "
                      "of its own")
    order = sorted(sequences, key=lambda name: digest(f"{seed}:{name}"))
    scale = min(1.0, len(names) / sum(counts))
    wanted = {part: max(1, round(count * scale)) for part, count in zip(PARTS, counts, strict=True)}
    if scale < 1:  # rounding must not take the last pair from training
        wanted["test"] = max(0, len(names) - wanted["val"] - wanted["train"])
        wanted["train"] = len(names)  # all that is left
    wanted["test"] = wanted["test"] if counts[2] else 0
    parts, left = {part: [] for part in PARTS}, list(order)
    for part in ("val", "test", "train"):  # the small ones first: a sequence too many does not matter to training
        while left and len(parts[part]) < wanted[part]:
            parts[part] += sequences[left.pop(0)]
    if not parts["train"]:
        raise UserError(f"no pair is left for training: the {len(sequences)} sequence(s) that SEQUENCE_SEPARATOR = "
                        f"{separator!r} makes are too large for VAL_PAIRS = {counts[1]} and TEST_PAIRS = {counts[2]}")
    parts = {part: sorted(found) for part, found in parts.items()}
    met = all(len(parts[part]) == count for part, count in zip(PARTS, counts, strict=True))
    note = None if met else "{} pairs: {} to train, {} to validate, {} to test".format(
        len(names), *(len(parts[part]) for part in PARTS))
    return parts, note


def splits_of(path):
    """-> {"train", "val", "test": entries as they stand} of a splits.json; UserError, which names SPLITS_FILE."""
    if problem := system.absent(path):
        raise UserError(f"SPLITS_FILE = '{path}' {problem}: train_unet_derain.py writes splits.json into its "
                        "CHECKPOINT_DIR, give the path of that or of your own, or SPLITS_FILE = \"\" for none")
    try:
        content = system.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"SPLITS_FILE = '{path}' is not readable JSON: {error}") from error
    if not isinstance(content, dict) or not {"train", "val"} <= set(content) or not all(
            isinstance(content.get(part, []), list) and all(isinstance(name, str) for name in content.get(part, []))
            for part in PARTS):
        raise UserError(f"SPLITS_FILE = '{path}': expected {{\"train\": [names], \"val\": [names], \"test\": [names]}}")
    return {part: content.get(part, []) for part in PARTS}


def name_of_entry(entry, known):
    """-> the pair's name that an entry of a splits.json means, which may have a file extension; known: all names."""
    return entry if entry in known else Path(entry).with_suffix("").as_posix()


def trained_on(weights, rainy_dir, names):
    """-> which of a folder's pairs the network of train_unet_derain.py was trained or validated on, as the splits.json
    beside its weights says; an empty set where nothing is known, or where that was another folder.

    Args:
        weights: path of its best.pt; rainy_dir: folder of the rainy images; names: of the pairs in question.
    """
    folder, parts = splits_beside(weights)
    if folder != Path(rainy_dir).resolve():
        return set()
    return {name_of_entry(entry, names) for part in ("train", "val") for entry in parts[part]} & set(names)


def splits_beside(weights):
    """-> (folder of the rainy images, {"train", "val", "test": entries}) of the splits.json beside a network's weights;
    (None, {}) where there is none, or one of another form."""
    try:
        file = Path(weights).with_name("splits.json")
        return Path(system.read_json(file)["rainy_dir"]), splits_of(file)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None, {}


def read_splits(path, names, constant="SPLITS_FILE"):
    """-> {"train", "val", "test": sorted names} of a splits.json of that form (with or without file extensions).

    Raises:
        UserError: no such file, unknown names, a name in two parts; names `constant`, which led to the file.
    """
    content = splits_of(path)
    known, parts, seen = set(names), {part: [] for part in PARTS}, {}
    for part in PARTS:
        for entry in content[part]:
            name = name_of_entry(entry, known)
            if name not in known:
                raise UserError(f"{constant}, {path}: '{entry}' of {part} is no pair of RAINY_DIR and CLEAR_DIR: "
                                "bring it back, or take it out of the file")
            if name in seen:
                raise UserError(f"{constant}, {path}: '{entry}' is in {seen[name]} and in {part}")
            seen[name] = part
            parts[part].append(name)
    if not parts["train"] or not parts["val"]:
        raise UserError(f"{constant}, {path}: train and val need at least one name each")
    if left := len(known) - len(seen):
        processes.say(f"note: {left} of {len(known)} pairs are in no part of {Path(path).as_posix()} and are not used")
    return {part: sorted(found) for part, found in parts.items()}


# ---- what is known of the rain -----------------------------------------------------------------------------------

def intensities(rainy_dir, pairs):
    """-> {name: "light", "medium" or "heavy"} of a folder that make_rain.py --kind windshield wrote, or of one in it,
    else {}.

    The rain of a file is a function of the seed and of its name, so its intensity can be drawn again.
    """
    record = twin_above(rainy_dir)
    if record is None:
        return {}
    try:
        settings = system.read_json(record)
        if settings["kind"] != "windshield" or settings["version"] != windshield.VERSION:
            return {}
        seed, intensity = settings["seed"], settings["intensity"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: windshield.sample_parameters(rain.rng_for(seed, rainy.name), intensity).intensity
            for name, (rainy, _) in pairs.items()}
