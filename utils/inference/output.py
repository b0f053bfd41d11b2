"""The folder that detect.py writes into: a new one, or that of a run which goes on; the same in every process."""

import contextlib
import itertools
from pathlib import Path

from accelerate.utils import broadcast_object_list

from utils import config, processes
from utils.inference import detections


def claimed(cfg, source, constants):
    """-> the folder of the results, the same in every process: a new one, or with RESUME the last one. Of images those
    that are done already, and those of other processes, are taken out of the source."""
    worker = processes.accelerator()
    found = [None]
    if worker.is_main_process:
        try:
            found = [last_folder(cfg.OUTPUT) if cfg.RESUME else new_folder(cfg.OUTPUT)]
        except config.UserError as error:
            found = [error]
    if worker.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], config.UserError):
        raise found[0]
    done = detections.done_images(found[0], constants) if cfg.RESUME else ()
    if not source.fps:
        source.take(cfg.MAX_FRAMES, done, (worker.process_index, worker.num_processes))
    if done:
        processes.say(f"going on in {found[0].as_posix()}: {len(done)} image(s) are done already")
    processes.wait_for_all()  # nobody writes before everybody has read what is done
    return found[0]


def last_folder(output):
    """-> the last of OUTPUT, OUTPUT2, ..., whose run was stopped or killed."""
    path, folder = Path(output), None
    for candidate in numbered(path):
        if not candidate.is_dir():
            break
        folder = candidate
    if folder is None or not detections.journals(folder):
        what = f"OUTPUT = '{path.as_posix()}' does not exist" if folder is None else f"{folder.as_posix()} is finished"
        raise config.UserError(f"RESUME: {what}, there is no run to go on with: leave RESUME out")
    return folder


def numbered(path):
    """Yield path, path2, path3, ..."""
    return (path.with_name(path.name + (str(number) if number > 1 else "")) for number in itertools.count(1))


def new_folder(output):
    """-> a folder that did not exist before: OUTPUT, OUTPUT2, OUTPUT3, ..."""
    path = Path(output)
    if not path.name or path.name == "..":
        raise config.UserError(f"OUTPUT = '{output}': give a folder of its own")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in numbered(path):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise config.UserError(f"OUTPUT = '{path.as_posix()}' cannot be made: {error}") from error
