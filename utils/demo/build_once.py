"""Let one of many processes make a folder of data while the others wait, and never leave half of it."""

import json
import os
import shutil
import socket
import time
import uuid
from contextlib import contextmanager

from utils import system

STALE_SECONDS = 60                  # a lock that was not refreshed for so long belongs to a dead process


def build_once(root, done, refuse, make):
    """Let one process make what is missing under `root`, while others wait for it.

    Args:
        done: () -> whether it is complete; refuse: () -> None, UserError where files of others are in the way.
        make: (folder, refresh) -> None, makes it in a new folder under `root`, moves it to its place, and calls
            refresh() now and then. The folder is removed afterwards, whatever happens.
    """
    if done():
        return
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root / ".lock", done) as (mine, refresh):
        if not mine or done():
            return
        refuse()
        remove_leftovers(root)
        build = root / f".building-{uuid.uuid4().hex}"
        try:
            make(build, refresh)
        finally:
            shutil.rmtree(build, ignore_errors=True)


def put_in_place(build, root, parts, marker, settings):
    """Swap the finished folders `parts` in. The marker goes first and comes last: without it nothing counts."""
    (root / marker).unlink(missing_ok=True)
    for part in parts:
        system.swap_in(build / part, root / part, build / f"old-{part}")
    (build / marker).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    system.replace(build / marker, root / marker)


def remove_leftovers(root):
    """Delete what interrupted runs left; called only by the holder of the lock."""
    for folder in root.glob(".building-*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_one(lock, done):
    """Hold the lock file, or wait until it is free or done() is true.

    Yields (mine, refresh): whether this process holds the lock, and a function that shows it is alive.
    A lock that nobody refreshes is taken over.
    """
    token = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    mine, told = False, False
    while not mine and not done():
        try:
            with open(lock, "x", encoding="ascii", errors="replace") as file:
                file.write(token)
            mine = True
        except FileExistsError:
            if is_stale(lock):
                lock.unlink(missing_ok=True)
                continue
            if not told:
                print(f"demo: another process draws {lock.parent}, waiting for it")
                told = True
            time.sleep(0.2)
        except PermissionError:                          # Windows, while the holder deletes it
            time.sleep(0.2)
    last = time.monotonic()

    def refresh():
        nonlocal last
        if time.monotonic() - last > 2 and holder(lock) == token:
            last = time.monotonic()
            os.utime(lock)
    try:
        yield mine, refresh
    finally:
        if mine and holder(lock) == token:
            lock.unlink(missing_ok=True)


def holder(lock):
    try:
        return lock.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def is_stale(lock):
    """Whether the lock's process is gone: dead on this machine, or silent for STALE_SECONDS."""
    try:
        if time.time() - lock.stat().st_mtime > STALE_SECONDS:
            return True
    except OSError:
        return False
    host, _, rest = holder(lock).partition(" ")
    if os.name != "posix" or host != socket.gethostname() or " " not in rest:
        return False                                     # os.kill(pid, 0) would end the process on Windows
    try:
        os.kill(int(rest.split()[0]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        pass
    return False
