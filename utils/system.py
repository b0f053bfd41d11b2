"""Files that appear whole, JSON, the cache folder, processor cores, image files, words for messages.

Without torch, which worker processes need not load.
"""

import json
import os
import struct
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.config import UserError

try:
    from PIL.ExifTags import Base
    from PIL.Image import DecompressionBombError, Transpose

    TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
             5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
except ImportError:  # validate_setup.py says so, and must get that far
    DecompressionBombError = OSError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
TEMPORARY = ".rainsight-tmp"  # how the name of a file or folder ends that is not complete yet
FAULTS = (OSError, SyntaxError, ValueError, DecompressionBombError)  # what Pillow raises on broken files


@contextmanager
def written(path, ending=TEMPORARY, sync=False):
    """Yield a path beside `path` to write to; afterwards the file takes the place of `path`, after an error it goes.

    A kill leaves a hidden file that ends in `ending`. sync: wait until it is on the disk, so that not even a blackout
    leaves an empty file where the old one was; too slow for many small files.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # still open on Windows: the first error is the one to tell
            temporary.unlink()
        raise


def give_usual_rights(path):
    """The rights that any new file gets: safetensors from 0.8 on lets only their owner read what it writes
    (github.com/safetensors/safetensors/issues/782), which shuts out a group's other users and containers."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def replace(temporary, path):
    """os.replace of a file or folder, tried for two seconds: on Windows a virus scanner or an open reader can hold the
    target, or a file in the folder, that long."""
    for patience in (0.1, 0.3, 0.6, 1.0, None):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if patience is None:
                raise
            time.sleep(patience)


def swap_in(fresh, folder, aside):
    """The folder `fresh` takes the place of `folder`, which moves to `aside` where it exists."""
    if folder.exists():
        replace(folder, aside)
    replace(fresh, folder)


def cache_folder():
    """-> Path of the folder for downloaded weights and the like: RAINSIGHT_CACHE, else ~/.cache/rainsight."""
    return Path(os.environ.get("RAINSIGHT_CACHE") or Path.home() / ".cache" / "rainsight")


def available_cores():
    """-> number of cores that this process may use (a container or taskset may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_json(path, object_hook=None):
    """-> the content of a JSON file in UTF-8, with or without a BOM; object_hook: of json.loads.

    Raises:
        OSError: not there, not readable; ValueError: not JSON, also where it is nested too deeply to be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_hook=object_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:  # PowerShell's > writes UTF-16
        raise ValueError("it is not in UTF-8: save it as UTF-8") from None


def numbered_lines(path):
    """-> [(number from 1, text without blanks around it), ...] of a text file's lines that hold something; UserError
    where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(path).as_posix()} cannot be read ({error}): save it as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def absent(path, folder=False):
    """-> what a path is instead of the file (or folder) that it should be, for a message; "" where it is that."""
    path = Path(path)
    if not path.exists():
        return "does not exist"
    if folder:
        return "" if path.is_dir() else "is a file, a folder is needed"
    return "" if path.is_file() else "is a folder, a file is needed"


def is_image(path):
    """-> whether a path has an image file's ending."""
    return Path(path).suffix.lower() in SUFFIXES


def files_in(folder, below=True, links=False):
    """-> sorted paths of the files in a folder; hidden files and folders (".name") are left out.

    Args:
        below: also those in its folders, and so on; links: also in folders that are symbolic links.
    """
    found, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=links):
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        if links:  # a link to a folder that is there already, or to one above, would be walked without end
            places = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
            folders[:] = [name for name, place in places.items() if place not in seen and not seen.add(place)]
        found += [Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found)


def images_in(folder, below=True, links=False):
    """-> sorted paths of the images in a folder, see `files_in`."""
    return [path for path in files_in(folder, below, links) if is_image(path)]


def listed(items, most=5, separator=", ", total=None):
    """-> the first `most` items and how many more there are, for a message: "a, b, c and 4 more".

    total: how many there are, where `items` are only some of them.
    """
    items = list(items)
    shown = items[:most]
    left = (len(items) if total is None else total) - len(shown)
    return separator.join(map(str, shown)) + (f" and {left} more" if left else "")


def orientation(image):
    """-> how an open PIL image is to be turned and mirrored, as its EXIF data says (telephones write it): 1, upright as
    it is stored, to 8; from 5 on its sides change places."""
    try:
        number = image.getexif().get(Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged EXIF data: the pixels are sound
        return 1
    return number if number in range(1, 9) else 1


def upright(image):
    """-> an open PIL image as viewers show it, see `orientation`."""
    number = orientation(image)
    return image if number == 1 else image.transpose(TURNS[number])


def as_stored(image, number):
    """-> an upright PIL image turned and mirrored back to what `orientation` was the number of."""
    return image if number == 1 else image.transpose(TURNS[{6: 8, 8: 6}.get(number, number)])


def upright_size(image):
    """-> (width, height) of an open PIL image as viewers show it, see `orientation`."""
    return image.size[::-1] if orientation(image) >= 5 else image.size


def require_eight_bits(image):
    """ValueError where an open PIL image has more than 8 bits per channel: as 8 bits it would be all white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
