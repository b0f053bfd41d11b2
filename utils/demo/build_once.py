"""Let one of many processes make a folder of data while the others wait, and never leave half of it.

The lock is the operating system's (filelock: flock, on Windows LockFileEx), which frees it when its process ends,
however it ends. The empty file root/.lock may stay behind; it means nothing.
"""

import json
import shutil
import uuid

from filelock import FileLock, Timeout

from utils import system

LOOK_SECONDS = 0.2                  # a process that waits for the lock looks so often whether the data is complete


def build_once(root, done, refuse, make):
    """Let one process make what is missing under `root`, while others wait for it.

    Args:
        done: () -> whether it is complete; refuse: () -> None, UserError where files of others are in the way.
        make: (folder) -> None, makes it in a new folder under `root` and moves it to its place. The folder is removed
            afterwards, whatever happens.
    """
    if done():
        return
    refuse()                                             # here already: a folder of others gets no lock file
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    if not acquired(lock, done, root):
        return
    try:
        if not done():
            refuse()
            remove_leftovers(root)
            build = root / f".building-{uuid.uuid4().hex}"
            try:
                make(build)
            finally:
                shutil.rmtree(build, ignore_errors=True)
    finally:
        lock.release()


def acquired(lock, done, root):
    """Wait for the lock. -> True with the lock held, False without it as soon as done() is true."""
    told = False
    while not done():
        try:
            lock.acquire(timeout=LOOK_SECONDS)
            return True
        except Timeout:
            if not told:
                print(f"demo: another process draws {root}, waiting for it", flush=True)
                told = True
    return False


def put_in_place(build, root, parts, marker, settings):
    """Swap the finished folders `parts` in. Meanwhile the marker says that they are unfinished: a killed process leaves
    folders that are ours to replace, and folders without any marker are somebody else's."""
    with system.written(root / marker) as temporary:
        temporary.write_text(json.dumps({"unfinished": True}), encoding="utf-8")
    for part in parts:
        system.swap_in(build / part, root / part, build / f"old-{part}")
    (build / marker).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    system.replace(build / marker, root / marker)


def remove_leftovers(root):
    """Delete what interrupted runs left; called only by the holder of the lock."""
    for folder in root.glob(".building-*"):
        shutil.rmtree(folder, ignore_errors=True)
