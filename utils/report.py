"""Tables on the console, results.json with everything that is needed to repeat a run."""

import json
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from utils import checkpoint, processes, system
from utils.config import UserError, writing

LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "pycocotools", "faster-coco-eval", "numpy",
             "pillow")


def write_json(path, content):
    """Write JSON in UTF-8, atomically; UserError where that cannot be."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with system.written(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8",
                                 errors="backslashreplace")  # half a character of a file name: as JSON writes it


def output_folder(path, names):
    """Make a folder ready for an evaluation's files, before anything is computed.

    Args:
        path: the folder; names: of the files and folders that will be written into it. Those of an earlier evaluation
        are moved into previous_<n>, and one line says so.
    Returns:
        Path of the folder.
    Raises:
        UserError: it cannot be written, or something of another kind has one of the names.
    """
    folder = Path(path)
    if processes.is_main():
        checkpoint.require_writable(folder)
        for name in names:
            if Path(name).suffix and (folder / name).is_dir():
                raise UserError(f"{(folder / name).as_posix()} is a folder, and a file of that name is to be written: "
                                "choose another OUTPUT_DIR")
        if earlier := checkpoint.keep_earlier(folder, names):
            print(f"{folder.as_posix()} held earlier results: moved to {earlier.as_posix()}")
    return folder


def require_new(name, path):
    """UserError where a folder that is to be written holds something already, or is a file; name: of its constant."""
    folder = Path(path)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{name} = '{path}' is there already: choose another folder, or remove it")


def require_apart(name, path, sources):
    """UserError where files that a script writes would lie among the images that it reads, and be read the next time.

    Args:
        name, path: of the constant that says where to write; sources: [(constant, folder or None), ...].
    """
    for constant, folder in sources:
        if folder and Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{name} = '{path}' lies in {constant} = '{Path(folder).as_posix()}' and would be "
                            "taken for a part of it the next time: choose a folder elsewhere")


def write_results(path, constants, results):
    """results.json: the constants, where and with what it was measured, and {name: anything JSON} `results`."""
    write_json(path, {"results": results, "constants": constants, "environment": environment()})


def environment():
    """-> {"commit", "date", "python", "machine", "device", library versions}."""
    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"commit": _commit(), "date": datetime.now().isoformat(timespec="seconds"),
            "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
            "device": device} | {name: version(name) for name in LIBRARIES} | {"torch": torch.__version__}


def _commit():
    """-> the git commit of this checkout, with "+changes" where files differ from it; None outside git."""
    def git(*words):
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout
    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def markdown(rows, columns):
    """-> a Markdown table of {key: text} rows; columns: {key: heading}. None shows "-"."""
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(key) if row.get(key) is not None else "-") for key in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def table(rows, columns):
    """-> a text table.

    Args:
        rows: [{column: value}, ...]; columns: {key: heading}. Floats show four digits, None as "-".
    """
    def cell(value):
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    body = [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns.values(), *body, strict=True)]
    lines = ["  ".join(text.ljust(width) if i == 0 else text.rjust(width)
                       for i, (text, width) in enumerate(zip(line, widths, strict=True)))
             for line in [list(columns.values()), *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
