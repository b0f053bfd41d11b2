"""Files that appear whole or not at all: written beside their target, then moved into its place. No torch in here."""

import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written(path, ending=".tmp", sync=False):
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
