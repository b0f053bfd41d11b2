"""A folder belongs to one run at a time: who writes it now, and what killed runs left in it.

The lock is the operating system's (filelock), which frees it when its process ends, however it ends. It may not reach
other machines that share the folder (network drives, Colab's Drive), so the run also says in .run.json who it is, and
renews the file's time while it lives. The empty file .run.lock stays behind; it means nothing.
"""

import json
import os
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from utils import processes, system
from utils.config import UserError, writing

OWNER, LOCK = ".run.json", ".run.lock"
BEAT_SECONDS = 10     # between two signs of life of a run
PATIENCE_SECONDS = 15  # for the lock of a killed run, whose loader processes hold it until they see that it is gone

_held = set()          # folders that this process has claimed


@contextmanager
def claimed(folder):
    """Within, `folder` (made where it is missing) is this run's alone; also inside another `claimed` of this process.

    Only the main process of several claims it.

    Raises:
        UserError: another run has it (the text says which), or it cannot be written.
    """
    folder = Path(folder).resolve()
    if not processes.is_main() or folder in _held:
        yield
        return
    lock = _acquired(folder)
    _held.add(folder)
    ended = threading.Event()
    try:
        _require_nobody_elsewhere(folder)
        with writing(folder / OWNER):
            (folder / OWNER).write_text(json.dumps(_self()), encoding="utf-8")
        threading.Thread(target=_beat, args=(folder / OWNER, ended), daemon=True).start()
        remove_leftovers(folder)
        yield
    finally:
        ended.set()
        _held.remove(folder)
        if _owner_of(folder) == _self():
            with suppress(OSError):
                (folder / OWNER).unlink()
        lock.release()


def remove_leftovers(folder):
    """Delete what killed processes of this project had half written into `folder`, and nothing else."""
    for path in folder.glob(f".*{system.TEMPORARY}"):
        process = re.fullmatch(rf"\..+\.(\d+){re.escape(system.TEMPORARY)}", path.name)
        if process and path.is_file() and not psutil.pid_exists(int(process[1])):
            with suppress(OSError):
                path.unlink()


def _self():
    return {"host": socket.gethostname(), "process": os.getpid()}


def _acquired(folder):
    """-> the folder's lock, held."""
    lock = FileLock(folder / LOCK)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write to {folder.as_posix()}: it is a file, a folder is needed: choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = _owner_of(folder)
        killed = owner and owner["host"] == socket.gethostname() and not psutil.pid_exists(owner["process"])
        lock.acquire(timeout=PATIENCE_SECONDS if killed else 1)
    except Timeout:
        raise _in_use(folder, _owner_of(folder)) from None
    except OSError as error:
        raise UserError(f"cannot write to {folder.as_posix()}: {error.strerror or error}") from error
    return lock


def _require_nobody_elsewhere(folder):
    """UserError where a run on another machine gives signs of life. Clocks differ, so the file's time is only compared
    with itself."""
    owner = _owner_of(folder)
    if not owner or owner["host"] == socket.gethostname():
        return  # that run held the lock that this one has now, so it is over
    print(f"{folder.as_posix()} was last written by a run on {owner['host']}: waiting {2.5 * BEAT_SECONDS:.0f} s for "
          "signs of life", flush=True)
    before = _time_of(folder / OWNER)
    time.sleep(2.5 * BEAT_SECONDS)
    if _time_of(folder / OWNER) != before:
        raise _in_use(folder, owner)


def _in_use(folder, owner):
    who = f" (process {owner['process']} on {owner['host']})" if owner else ""
    return UserError(f"{folder.as_posix()} is in use by a run that has not ended{who}: wait for it, stop it, or choose "
                     "another folder")


def _owner_of(folder):
    """-> {"host", "process"} of who says that the folder is theirs, None where nobody does."""
    try:
        owner = system.read_json(folder / OWNER)
        return owner if isinstance(owner["host"], str) and isinstance(owner["process"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _time_of(path):
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return None


def _beat(path, ended):
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a drive that is gone for a moment
            os.utime(path)
