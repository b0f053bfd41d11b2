"""Every image file is decoded once before a run starts, and not again while it stays as it is; and do pairs show one
scene?"""

import hashlib
import os
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from utils import processes, system
from utils.config import UserError

RULES = 3         # raise it when a check finds more than it did: what was found good before is then looked at again
REMEMBERED = 500  # images from which on a check takes long enough (COCO: minutes) to remember that it found nothing
ODD_MARGIN = 0.25  # a pair is odd if another partner is so much more like the image (correlation of thumbnails)
SSIM_WINDOW = 11  # pixels: smaller images have no SSIM
THUMBNAIL = 24    # pixels
_COMPARED = 2000  # other partners that an image is compared with, at most
_SAMPLED = 200    # pairs that are looked at where thousands may be given
_ODD = 0.05       # share of odd ones from which on it is no longer the rain: of the demo's pairs 0.5% are odd


def check_images(paths, what, sizes=None, partners=None):
    """Decode every file once, at low resolution. Under torchrun the main process does it, so every process must call.

    A truncated JPEG is found as well: the entropy-coded data is read to the end, only the inverse DCT is skipped. That
    a large set was found good is remembered in the cache folder, by its files' paths, sizes and times. Images that are
    stored turned (EXIF orientation) are noted with their number; sizes are those of the upright image.

    Args:
        paths: files; what: where they come from, for the message.
        sizes: the (width, height) that each must have, one per path, None for any.
        partners: images of the same scenes, one per path, None for none: their sizes must be equal, and pairs that seem
            to show two scenes are noted.
    Raises:
        UserError: names the broken, missing and misshapen ones.
    """
    processes.main_first(lambda: _check(paths, what, sizes or [None] * len(paths), partners or [None] * len(paths)),
                         f"checking {what}")


def _check(paths, what, sizes, partners):
    large, seal = len(paths) >= REMEMBERED, None
    if large:
        with suppress(OSError, RuntimeError):  # no home folder, or one that this user may not look into
            seal = system.cache_folder() / "checked_images" / _fingerprint(paths, sizes, partners)
            if seal.exists():
                if note := seal.read_text(encoding="utf-8"):
                    processes.say(note)
                return
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, system.available_cores())) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        answers = pool.map(_problem, paths, sizes, partners)
        found = list(processes.progress(answers, f"checking {what}", total=len(paths), unit="image",
                                        shown=large))
    broken = [text for text, _ in found if text]
    if broken:
        raise UserError(f"{len(broken)} bad image(s) in {what}: {system.listed(broken, separator='; ')}. "
                        f"Replace them or remove them from the data set.{_other_spelling(paths)}")
    note = ""
    if turned := [Path(path).as_posix() for path, (_, is_turned) in zip(paths, found, strict=True) if is_turned]:
        note = (f"note: {what}: {len(turned)} image(s) are stored turned or mirrored and are read upright, as their "
                f"EXIF orientation says and viewers show them: {system.listed(turned, 3)}")
        processes.say(note)
    pairs = [pair for pair in zip(paths, partners, strict=True) if pair[1] is not None]
    sample = pairs[::max(1, len(pairs) // _SAMPLED)]
    thumbnails = _thumbnails(sample)
    odd = [Path(path).as_posix() for (path, _), is_odd in zip(sample, more_like_another(thumbnails), strict=True)
           if is_odd]
    if len(sample) > 1 and np.abs(thumbnails[:, 0] - thumbnails[:, 1]).max() < 1e-6:
        processes.say(f"note: {what}: the rainy images are their clean partners over again, there is no rain in them")
    elif len(odd) > max(1, _ODD * len(sample)):  # a single one has no other to be mixed up with
        processes.say(f"note: {what}: {len(odd)} of {len(sample)} images look more like another one's partner than "
                      f"like their own, or not like it at all: {system.listed(odd)}; a wrong partner teaches nonsense")
    elif seal is not None:
        with suppress(OSError):  # not remembered, then
            seal.parent.mkdir(parents=True, exist_ok=True)
            seal.write_text(note, encoding="utf-8")


def _problem(path, expected, partner):
    """-> what is wrong with a file (None if nothing is), whether it is stored turned or mirrored."""
    name, turned = Path(path).as_posix(), False
    try:
        with Image.open(path) as image:
            size, turned = system.upright_size(image), system.orientation(image) != 1
            if expected and size != expected:
                on_its_side = ": it was made of the picture as it is stored, on its side; turn it, or save the " \
                              "image without its EXIF orientation" if size == expected[::-1] and turned else ""
                return (f"{name} (is {size[0]}x{size[1]}, its annotation says {expected[0]}x{expected[1]}"
                        f"{on_its_side})", turned)
            if partner is not None:
                with Image.open(partner) as other:
                    others = system.upright_size(other)
                if size != others:
                    return (f"{name} (is {size[0]}x{size[1]}, its partner {Path(partner).as_posix()} "
                            f"{others[0]}x{others[1]})", turned)
            system.require_eight_bits(image)
            _draft(image)
            image.load()
    except FileNotFoundError as error:
        return f"{Path(error.filename or path).as_posix()} (missing)", turned
    except system.FAULTS as error:
        return f"{name} ({error})", turned
    return None, turned


def _other_spelling(paths):
    """-> for a message, under which name the folder has the first missing file: other capitals, another ending, or
    letters in two parts, as macOS writes them; "" where it has none such."""
    def plain(path):
        return unicodedata.normalize("NFC", path.stem).casefold()
    missing = next((path for path in map(Path, paths) if not path.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return ""
    for path in sorted(missing.parent.iterdir()):
        if system.is_image(path) and plain(path) == plain(missing):
            return (f" {missing.name!a} is there as {path.name!a}: rename the files, or write these names into the "
                    "annotation file.")
    return ""


def contents(paths, times=False):
    """-> what tells image files from others without reading them, as plain data: the names of folder and file, sizes in
    bytes and, with `times` (which a copy may not have), when they were changed; whatever the order of `paths`."""
    def state(path):
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # no longer there: a data set that opens such a file says so
            return None
        return [found.st_size, found.st_mtime_ns] if times else found.st_size
    return sorted([Path(path).parent.name, Path(path).name, str(state(path))] for path in paths)


def same_content(paths, others):
    """-> {path: one of the others that is the same file, byte for byte}; missing files are reported elsewhere."""
    def by_size(files):
        found = {}
        for path in files:
            with suppress(OSError):
                found.setdefault(path.stat().st_size, []).append(path)
        return found

    def content(path):
        return hashlib.blake2b(path.read_bytes()).digest()
    theirs, same = by_size(others), {}
    for size, own in by_size(paths).items():
        if size in theirs:
            known = {content(path): path for path in theirs[size]}
            same |= {path: known[digest] for path in own if (digest := content(path)) in known}
    return same


def size_of(path):
    """-> (width, height) of an image file that has been checked, upright."""
    with Image.open(path) as image:
        return system.upright_size(image)


def size_or_error(path):
    """-> (width, height) of an image file that has not been checked; UserError where it is none."""
    try:
        return size_of(path)
    except system.FAULTS as error:
        raise UserError(f"{Path(path).as_posix()} is no image ({error}): replace it, or remove it from the data "
                        "set") from None


def smaller_than(paths, side):
    """-> those of the image files (checked ones) that have a side of fewer than so many pixels, as text."""
    return [Path(path).as_posix() for path in paths if min(size_of(path)) < side]


def _draft(image):
    """Let an open JPEG be decoded at an eighth of its size."""
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))


def _fingerprint(paths, sizes, partners):
    """-> name for the state of these files and of what is asked of them."""
    digest = hashlib.sha256(f"{RULES}\n".encode())
    for path, *asked in zip(paths, sizes, partners, strict=True):
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            state = None  # will be reported as missing
        digest.update(f"{os.path.abspath(path)}|{state and (state.st_size, state.st_mtime_ns)}|{asked}\n".encode(
            errors="surrogatepass"))
    return digest.hexdigest()


def _thumbnails(pairs):
    """[(path, its partner), ...] -> (N, 2, n) of `thumbnail`."""
    def look(pair):
        small = []
        for path in pair:
            with Image.open(path) as image:
                small.append(thumbnail(image))
        return small
    with ThreadPoolExecutor(min(8, system.available_cores())) as pool:
        return np.array(list(pool.map(look, pairs)))


def thumbnail(image):
    """Open PIL image -> (n,) float32 of mean 0 and norm 1, whose products are correlations."""
    _draft(image)
    small = system.upright(image).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    grey = np.asarray(small, np.float32).ravel()
    grey = grey - grey.mean()
    return grey / max(float(np.linalg.norm(grey)), 1e-6)


def more_like_another(thumbnails):
    """(N, 2, n) thumbnails of images and their partners -> (N,) bool, see ODD_MARGIN; also where an image is rather its
    partner's negative, as one that is turned often is."""
    if not len(thumbnails):
        return []
    images, partners = thumbnails[:, 0], thumbnails[:, 1]
    own = (images * partners).sum(1)
    others = partners[::-(-len(partners) // _COMPARED)]
    return ((images @ others.T).max(1) > own + ODD_MARGIN) | (own < 0)
