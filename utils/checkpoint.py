"""Checkpoints are data, not code: the only place that calls torch.load, always with weights_only=True.

Files are written beside their target and moved into place, so a killed run never leaves half a checkpoint.
"""

import argparse
import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import system
from utils.config import UserError

WRAPPERS = ("model", "state_dict", "model_state_dict", "params", "net")  # keys under which published files keep weights


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or does not fit its network; the text names the file and what is wrong."""


def save(content, path):
    """Write tensors, numbers, strings, lists and dicts to `path` atomically; loads with a plain torch.load(path),
    also where there is no GPU."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with system.written(path, sync=True) as temporary:
            torch.save(_on_cpu(content), temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write {path.as_posix()}: {error}. Free disk space or choose another folder."
                              ) from error


def _on_cpu(content):
    if torch.is_tensor(content):
        return content.detach().cpu()
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_on_cpu, content))
    return content


def replace_folder(write, folder):
    """Let `write(path)` fill a new folder, then put it in the place of `folder`, the old one kept until that is done.

    A kill at any moment leaves the old folder, the new one, or the old one under another name (moved back next time).
    """
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}{ending}") for ending in (system.TEMPORARY, ".rainsight-old"))
    if old.exists() and not folder.exists():
        system.replace(old, folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(fresh)
        for file in fresh.rglob("*.safetensors"):
            system.give_usual_rights(file)
        system.swap_in(fresh, folder, old)
    except (OSError, SafetensorError) as error:  # a full disk; on Windows also what another program has open
        raise CheckpointError(f"cannot write {folder.as_posix()}: {error}. Free disk space, or close what has the "
                              "folder open.") from error
    shutil.rmtree(old, ignore_errors=True)


def file_digest(path):
    """-> 16 hex digits that stand for a file's content."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def load(path, device="cpu"):
    """-> the content of a checkpoint file, or the tensors of a .safetensors file. Foreign files may hold an
    argparse.Namespace; nothing else is unpickled."""
    path = Path(path)
    if problem := system.absent(path):
        raise CheckpointError(f"weight file {path.as_posix()} {problem}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, ...: whatever torch makes of a broken file
        # torch's own words lead astray: they would have the user run whatever code is in there, or are a number
        reason = error.strerror if isinstance(error, OSError) and error.strerror else (
            "it is damaged, only half there, something else, or holds other things than tensors")
        raise CheckpointError(f"{path.as_posix()} is not a readable checkpoint: {reason}") from error


def load_state(path, device="cpu"):
    """-> {name: Tensor}, the state dict in a file, without the usual wrappings ({"model": ...}, "module." prefixes)."""
    return state_of(load(path, device), path)


def state_of(content, path):
    """-> `load_state` of a file whose content was read already; path: of the file, for messages."""
    while isinstance(content, dict) and not _is_state(content):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise CheckpointError(f"{Path(path).as_posix()} holds no state dict (top-level keys: "
                                  f"{system.listed(content, 6)})")
        content = inner
    if not isinstance(content, dict):
        raise CheckpointError(f"{Path(path).as_posix()} holds a {type(content).__name__}, not a state dict")
    if not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{Path(path).as_posix()} is not a state dict: its tensors are numbered, not named")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def load_settings(path, keys, constant, otherwise, optional=()):
    """-> the dict of exactly `keys` in the JSON file that a model's folder holds beside its weights.

    optional: further keys, which files of earlier versions lack.

    Raises:
        CheckpointError: the file is missing (`otherwise` says which folder `constant` should name), or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{constant} = '{path.parent.as_posix()}' has no {path.name}: {otherwise}")
    try:
        settings = system.read_json(path)
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or not set(keys) <= settings.keys() <= {*keys, *optional}:
        raise CheckpointError(f"{constant}: {path.as_posix()} is damaged; save the model again")
    return settings


def torchvision_state(weights, published, constant, alternative):
    """-> {name: Tensor}, a network's published weights.

    Args:
        weights: "imagenet" (torchvision downloads once), or a local file of the same content.
        published: torchvision's weights enum member; constant: the script's constant that holds `weights`.
        alternative: what the user can do without them, the end of a sentence.
    Raises:
        UserError: not reachable; CheckpointError: not a readable file.
    """
    if weights != "imagenet":
        require_weights(weights, constant)
        return load_state(weights)
    try:
        return published.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: a broken download
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        network = type(published).__name__.removesuffix("_Weights")
        raise UserError(f"{constant} = 'imagenet': torchvision cannot download {network} ({reason}). Download "
                        f"{published.url} yourself and set {constant} to the file, or {alternative}.") from error


def is_local(name):
    """-> whether a model's name is a folder and no hub id ("owner/name")."""
    return (Path(name).exists() or name.startswith((".", "/", "~")) or "/" not in name
            or os.sep in name.replace("/", "", 1))


def unpickled(error):
    """-> whether a library's error is about weights that only running foreign code would read; its own words would
    advise that."""
    return "weights_only" in str(error) or "pickl" in f"{type(error).__name__} {error}".lower()


def require_weights(weights, constant):
    """CheckpointError, which names `constant`, where its local file of torchvision's weights is not there."""
    if problem := system.absent(weights):
        raise CheckpointError(f"{constant} = '{weights}' {problem}: give \"imagenet\" or a local file of torchvision's")


def _is_state(content):
    return bool(content) and all(torch.is_tensor(value) for value in content.values())


def load_into(module, state, what, target=None, advice="", kept=()):
    """Load a state dict strictly.

    Args:
        what: the source, for the error; target: what it shall fit, None for the module's class; advice: a sentence
            that ends the error.
        kept: names of the module's tensors that stay as they are, and that `state` must not have.
    Raises:
        CheckpointError: lists every kind of mismatch.
    """
    own, kept = module.state_dict(), set(kept)
    expected = {name: value for name, value in own.items() if name not in kept}
    both = [(name, state[name], value) for name, value in expected.items() if name in state]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [f"{name} {tuple(given.shape)} instead of {tuple(value.shape)}"
                             for name, given, value in both if given.shape != value.shape],
        "of another kind": [f"{name} {_kind(given)} instead of {_kind(value)} numbers"
                            for name, given, value in both if _kind(given) != _kind(value)],  # copied, they are cast
    }
    if any(problems.values()):
        parts = [f"{len(names)} {kind} ({system.listed(names, 3)})" for kind, names in problems.items() if names]
        raise CheckpointError(f"{what} does not fit {target or type(module).__name__}: keys {'; '.join(parts)}"
                              + (f". {advice}" if advice else ""))
    module.load_state_dict(own | state)


def _kind(value):
    """-> "real", "complex" or "whole" (also of truth values) numbers of a tensor."""
    return "complex" if value.is_complex() else "real" if value.is_floating_point() else "whole"


def load_network(path, build, arguments, constant, script, device="cpu", content=None):
    """-> the network of a checkpoint that says how to build it, in eval mode.

    Args:
        path: file with "model" (its state dict) and "model_args"; build: (**model_args) -> nn.Module.
        arguments: names that model_args must have at least; constant: the script's constant that holds `path`.
        script: what writes such files, for messages; content: of the file, where it was read already.
    Raises:
        UserError: the file is missing or holds something else; names `constant`.
    """
    if problem := system.absent(path):
        raise UserError(f"{constant} = '{path}' {problem}: train one with {script}")
    content = load(path) if content is None else content
    args = content.get("model_args") if isinstance(content, dict) else None
    foreign = UserError(f"{constant} = '{path}' is not a file of {script} (no model_args of its network in it)")
    if not isinstance(args, dict) or not set(args) >= set(arguments) or "model" not in content:
        raise foreign
    try:
        network = build(**args)
    except TypeError as error:  # arguments that it does not take, or of another kind
        raise foreign from error
    load_into(network, content["model"], f"{constant} = '{path}'")
    return network.to(device).eval()


def keep_earlier(folder, names, what="results"):
    """Move the files of `names` that are in `folder` into folder/previous_<n>, so that new ones replace nothing.

    Returns:
        Path of that folder, None where there was nothing to move.
    Raises:
        UserError: they cannot be moved.
    """
    folder = Path(folder)
    earlier = [folder / name for name in dict.fromkeys(names) if (folder / name).exists()]
    if not earlier:
        return None
    number = next(n for n in range(1, 10**6) if not (folder / f"previous_{n}").exists())
    target = folder / f"previous_{number}"
    try:
        target.mkdir()
        for path in earlier:
            shutil.move(str(path), target / path.name)
    except OSError as error:  # Windows: TensorBoard or another program still has a file open
        raise UserError(f"cannot move the earlier {what} in {folder.as_posix()} aside ({error}): close what has them "
                        "open, or choose another folder") from error
    return target


def require_replaceable(path, entries, maker):
    """UserError where something stands at `path` that is not a checkpoint of exactly these entries.

    Args:
        entries: keys of the content that `maker` (for the message) writes there; a run's last.pt has more, and is not
            replaced.
    Returns:
        the content of what stands there, None where there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path.as_posix()} is a folder: give a file name")
    if not path.exists():
        return None
    try:
        content = load(path)
    except CheckpointError:
        content = None
    if not isinstance(content, dict) or content.keys() != set(entries):
        raise UserError(f"{path.as_posix()} exists and was not written by {maker}: choose another name")
    return content


def equal(one, other):
    """-> whether two checkpoints' contents are the same, tensors bit for bit."""
    if torch.is_tensor(one) or torch.is_tensor(other):
        return (torch.is_tensor(one) and torch.is_tensor(other) and one.dtype == other.dtype
                and torch.equal(one.cpu(), other.cpu()))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def require_writable(folder, megabytes=100):
    """Make `folder`, prove that it can be written and has `megabytes` free; UserError before training otherwise."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write to {folder.as_posix()}: it is a file, a folder is needed: choose another")
    probe = folder / f".write_test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder.as_posix()}: {error.strerror or error}") from error
    free = shutil.disk_usage(folder).free / 2**20
    if free < megabytes:
        raise UserError(f"{folder.as_posix()} has {free:.0f} MB free, this run needs about {megabytes:.0f} MB")
    return folder
