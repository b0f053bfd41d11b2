"""Look before you train RF-DETR: Python, packages, GPU, data set, disk, weights, and a batch size that should fit.

    python validate_setup.py
    python validate_setup.py --demo
    python validate_setup.py --dataset_dir ./dataset --size small

Every finding is one line: [ok], [warn] (training works, but read it) or [FAIL] (training would stop). Nothing is
downloaded or changed, but --demo draws its data set. Exit code 0 without a [FAIL], else 1; the last line is the command
to go on with.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.request
from pathlib import Path

from utils import config, system
from utils.config import UserError

# torch, transformers and what needs them are imported inside functions: this script has to speak where they are missing

DATASET_DIR = "./dataset"               # Roboflow's layout, COCO's, YOLO's or Pascal VOC's, see docs/data.md
SIZE = "nano"                           # nano, small, medium, base, large or large_2026
PRETRAIN_WEIGHTS = "coco"               # coco: published weights; a checkpoint file; none: from scratch
RUNS_DIR = "./runs"                     # where runs will be written
TIMEOUT = 5.0                           # seconds to wait for the server of the published weights

DEMO = {"DATASET_DIR": "./demo/dataset", "SIZE": "tiny", "PRETRAIN_WEIGHTS": "./assets/demo/rfdetr_tiny.pth",
        "RUNS_DIR": "./demo/runs"}

_PYTHON = (3, 11)
_DISPENSABLE = {"opencv-python-headless": "only other scripts need it",
                "segmentation-models-pytorch": "only other scripts need it",
                "faster-coco-eval": "scoring takes six times as long"}  # packages and what it means to lack them
_EFFECTIVE_BATCH = 16  # batch times accumulation, of the published models
# Millions of parameters, and GB that autograd keeps per image in a stage-1 step: float32, the size's own resolution, 13
# groups of queries, counted with saved_tensors_hooks. Mixed precision needs less, temporaries come on top.
_COSTS = {"nano": (30.5, 0.47), "small": (32.1, 0.75), "medium": (33.7, 0.96), "base": (32.2, 0.95),
          "large": (135.6, 2.35), "large_2026": (33.9, 1.21), "tiny": (1.7, 0.03)}


class Findings:
    """Prints findings as they come, and remembers whether one of them stops training."""

    def __init__(self):
        self.failed = self.warned = 0

    def ok(self, text):
        print(f"[ok]   {text}", flush=True)

    def warn(self, text):
        self.warned += 1
        print(f"[warn] {text}", flush=True)

    def fail(self, text):
        self.failed += 1
        print(f"[FAIL] {text}", flush=True)


# ---- the machine ---------------------------------------------------------------------------------------------------

def check_python(found):
    """Version and system."""
    text = f"Python {platform.python_version()} on {platform.system()}, {system.available_cores()} core(s)"
    if sys.version_info < _PYTHON:
        found.fail(f"{text}: {'.'.join(map(str, _PYTHON))} or newer is needed")
    else:
        found.ok(text)


def check_packages(found, requirements):
    """Installed versions against a requirements file ("name>=1.2" per line). -> whether none is missing."""
    present, missing = [], False
    for line in requirements.read_text(encoding="utf-8").splitlines():
        wanted = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", line)
        if not wanted:
            continue  # a comment or a blank line
        name, least = wanted.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in _DISPENSABLE:
                found.warn(f"package {name} is missing: {_DISPENSABLE[name]}")
                continue
            found.fail(f"package {name} is missing: pip install -r requirements.txt")
            missing = True
            continue
        if least and _numbers(version) < _numbers(least):
            found.fail(f"package {name} {version} is older than {least}: pip install -r requirements.txt")
        present.append(f"{name} {version}")
    if present:
        found.ok(f"packages: {', '.join(present)}")
    return not missing


def _numbers(version):
    """'2.14.1+cu130' -> (2, 14, 1)"""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def check_device(found):
    """-> GB of the first GPU's memory, None without a usable GPU."""
    import torch
    if not torch.cuda.is_available():
        advice = ""
        if shutil.which("nvidia-smi"):
            advice = ("; there is an NVIDIA driver, but this torch cannot use it: install the CUDA build (README: pip "
                      "install torch torchvision --index-url https://download.pytorch.org/whl/cu130)")
        found.warn(f"torch {torch.__version__} finds no GPU: training runs on the CPU, which takes days for a full "
                   f"run{advice}")
        return None
    try:
        free, total = torch.cuda.mem_get_info()
        torch.ones(8, device="cuda").sum().item()  # a driver that is too old shows up here
    except RuntimeError as error:
        found.fail(f"the GPU does not work with this torch: {str(error).splitlines()[0]}")
        return None
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    text = (f"GPU {torch.cuda.get_device_name()}, {total / 2**30:.1f} GB ({free / 2**30:.1f} GB free), CUDA "
            f"{torch.version.cuda}, mixed precision {half}, {torch.cuda.device_count()} GPU(s)")
    if free < 0.7 * total:
        found.warn(f"{text}: other programs use much of its memory")
    else:
        found.ok(text)
    return total / 2**30


def check_disk(found, cfg):
    """Room for one run: three files of weights, and last.pt (weights, the optimizer's two moments, the average), which
    is there twice while it is replaced: 11 times the weights."""
    folder = Path(cfg.RUNS_DIR).resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        found.fail(f"--runs_dir {cfg.RUNS_DIR}: {folder.as_posix()} is a file: choose another --runs_dir")
        return
    free, needed = shutil.disk_usage(folder).free / 2**30, 11 * 4 * _COSTS[cfg.SIZE][0] / 1000 + 0.1
    text = f"{free:.1f} GB free for {cfg.RUNS_DIR}; a run of {cfg.SIZE} takes about {needed:.1f} GB"
    if not os.access(folder, os.W_OK):
        found.fail(f"{folder.as_posix()} is not writable: choose another --runs_dir")
    elif free < needed:
        found.fail(f"{text}: free some space, or choose another --runs_dir")
    elif free < 3 * needed:
        found.warn(text)
    else:
        found.ok(text)


# ---- the data set --------------------------------------------------------------------------------------------------

def check_dataset(found, cfg):
    """Structure and annotations of all splits. -> class names, [] where there is no usable training split."""
    from rfdetr.datasets import roboflow
    from utils.datasets.layouts import has_split
    root = Path(cfg.DATASET_DIR)
    try:
        names, notes = roboflow.class_names_of(root)
    except UserError as error:
        found.fail(str(error))
        return []
    for note in notes:
        found.ok(note)
    found.ok(f"{len(names)} classes to train: {system.listed(names, 20)}")
    data = {}
    for split in roboflow.SPLITS:
        if split == "test" and not has_split(root, "test"):
            found.ok(f"{root.as_posix()}: no test/ or other test images, which are optional (--run_test 1 needs them)")
        else:
            data[split] = check_split(found, root, split, names)
    for split in ("valid", "test"):
        if data.get("train") and data.get(split):
            if note := roboflow.note_on_shared_images(data["train"], data[split], split):
                found.warn(note)
    return names


def check_split(found, root, split, names):
    """One split: JSON, classes, boxes, image files, masks. What is wrong with test/ stops no training: warnings.
    -> RoboflowDataset, None where it cannot be read."""
    from rfdetr.datasets import roboflow
    from utils.datasets import image_check

    def bad(text):
        if split == "test":
            found.warn(f"{text} (only --run_test 1 reads test/)")
        else:
            found.fail(text)

    try:
        place, content = roboflow.read_split(root, split)
        data = roboflow.RoboflowDataset(root, split, {name: row for row, name in enumerate(names)}, 384, train=False,
                                        check=False)
    except UserError as error:
        bad(str(error))
        return None
    listed = {c["name"] for c in content["categories"]} & set(names)
    counts = {name: int((data.labels == row).sum()) for row, name in enumerate(names)}
    empty = int((data.ends[1:] == data.ends[:-1]).sum())
    (found.ok if len(data.labels) else bad)(
        f"{split}: {len(data)} images ({empty} without objects), {len(data.labels)} objects: "
        + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for note in data.notes:
        found.warn(note)
    if len(listed) < len(names):
        found.warn(f"{split}: its categories lack {system.listed(sorted(set(names) - listed))} of train")
    elif absent := [name for name, count in counts.items() if not count]:
        found.warn(f"{split}: no object of {system.listed(absent)}: "
                   + ("nothing to learn from" if split == "train" else "no mAP for that"))
    try:
        image_check.check_images([place.folder / name for name in data.files], split,
                                 [(image["width"], image["height"]) for image in content["images"]])
        found.ok(f"{split}: all image files are there and can be read")
    except UserError as error:
        bad(str(error))
    if place.form == "coco":  # in the other forms several splits may share a folder
        names_on_disk = {path.relative_to(place.folder).as_posix() for path in system.images_in(place.folder)}
        if strays := sorted(names_on_disk - {Path(name).as_posix() for name in data.files}):
            found.warn(f"{split}: {len(strays)} image(s) that the annotation file does not list, such as {strays[0]}")
    check_masks(found, bad, split, content)
    return data


def check_masks(found, bad, split, content):
    """How many objects have a mask, and whether all of those can be decoded; bad: of `check_split`."""
    import numpy as np

    from rfdetr.datasets import roboflow
    images = {image["id"]: image for image in content["images"]}
    objects = [note for note in content["annotations"] if not note.get("iscrowd", 0)]
    with_mask, broken, codes, owners = 0, [], [], []
    for note in objects:
        image = images[note["image_id"]]
        try:
            code = roboflow.mask_code(note.get("segmentation"), image["height"], image["width"])
            with_mask += code is not None
            if code is not None:
                codes.append(code)
                owners.append((image, note["bbox"]))
        except ValueError as error:
            broken.append(f"annotation {note['id']} of {image['file_name']} ({error})")
    if broken:
        bad(f"{split}: {len(broken)} mask(s) cannot be decoded: {system.listed(broken, 3, '; ')}")
    elif objects and not with_mask:
        found.warn(f"{split}: {roboflow.NO_MASKS}: stage 1 works, stage 2 needs masks")
    elif with_mask < len(objects):
        found.warn(f"{split}: {len(objects) - with_mask} of {len(objects)} objects have no mask; stage 2 leaves them "
                   "out")
    elif objects:
        found.ok(f"{split}: all {with_mask} masks can be decoded")
    corners = np.array([[x, y, x + w, y + h] for _, (x, y, w, h) in owners], float).reshape(-1, 4)
    if elsewhere := roboflow.masks_elsewhere(codes, [image for image, _ in owners], corners):
        found.warn(f"{split}: {elsewhere} {roboflow.ELSEWHERE}")


# ---- weights and batch ---------------------------------------------------------------------------------------------

def check_weights(found, cfg, names=()):
    """The weights that training starts from: a file, which must fit SIZE and the classes, the cache, or the server."""
    if cfg.PRETRAIN_WEIGHTS.lower() == "none":
        found.ok("weights: from scratch (--pretrain_weights none), which takes many more epochs and images")
        return
    from rfdetr import start, weights
    from rfdetr.config import PUBLISHED, default_resolution
    if cfg.PRETRAIN_WEIGHTS.lower() != "coco":
        try:
            weights.require_source(cfg.PRETRAIN_WEIGHTS, "--pretrain_weights")
            source = weights.read(cfg.PRETRAIN_WEIGHTS)
            start.with_weights(source, cfg.SIZE, names, default_resolution(cfg.SIZE))
            rows, known = weights.rows_of(source)
            found.ok(f"weights: {Path(cfg.PRETRAIN_WEIGHTS).as_posix()} ({rows} class rows"
                     + (f", knows {system.listed(known, 6)})" if known else ")"))
        except UserError as error:
            text = str(error)
            found.fail(text if text.startswith("--") else f"--pretrain_weights: {text}")
        return
    if cfg.SIZE not in PUBLISHED:
        found.fail(f"nobody has published weights of size {cfg.SIZE}: give --pretrain_weights none or a checkpoint")
        return
    published = PUBLISHED[cfg.SIZE]
    cached = system.cache_folder() / published.file
    if cached.is_file():
        if weights.md5(cached) == published.md5:
            found.ok(f"weights: {cached.as_posix()}")
        else:
            found.fail(f"weights: {cached.as_posix()} is damaged (its MD5 sum is wrong): delete it; training loads it "
                       "again")
        return
    try:
        request = urllib.request.Request(published.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=cfg.TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0) / 2**20
        found.ok(f"weights: {published.url} answers; training downloads {f'{size:.0f} MB' if size else 'it'} once")
    except (OSError, ValueError, OverflowError) as error:  # URLError is an OSError; the last: an endless TIMEOUT
        found.fail(f"weights: {published.url} cannot be reached ({getattr(error, 'reason', error)}). Put that file at "
                   f"{cached.as_posix()}, or train with --pretrain_weights none")


def suggest_batch(size, memory):
    """-> {multi-scale or not: batch, a power of two that should fit}, whether one image fits without multi-scale.

    Args:
        memory: GB of the GPU; None: a CPU, where larger batches gain nothing.
    """
    from rfdetr.config import block_size, default_resolution, detector_config
    from rfdetr.datasets.roboflow import multi_scale_sizes
    parameters, per_image = _COSTS[size]
    own, settings = default_resolution(size), detector_config(size, 2)
    largest = max(multi_scale_sizes(own, block_size(size), False, settings.num_queries,
                                    settings.backbone_config.patch_size))
    # weights, gradients, two moments, average; CUDA itself; a tenth stays free
    if memory is None:
        return {False: 2, True: 2}, True
    room = 0.9 * memory - 0.6 - 5 * 4 * parameters / 1000
    batches = {}
    for multi_scale, side in ((False, own), (True, largest)):
        fits = room / (per_image * (side / own) ** 2)
        batches[multi_scale] = next(batch for batch in (16, 8, 4, 2, 1) if batch <= fits or batch == 1)
    return batches, room >= per_image


def check_batch(found, cfg, memory):
    """-> (batch, accumulation) for the command at the end."""
    batches, fits = suggest_batch(cfg.SIZE, memory)
    accumulation = _EFFECTIVE_BATCH // batches[False]
    text = (f"suggested for {cfg.SIZE} on {f'{memory:.0f} GB' if memory else 'the CPU'}: --batch {batches[False]} "
            f"--accum {accumulation}; with --multi_scale 1 --batch {batches[True]} --accum "
            f"{_EFFECTIVE_BATCH // batches[True]} (an estimate: out of memory? halve batch, double accum)")
    if fits:
        found.ok(text)
    else:
        found.warn(f"{text}; even one image may not fit: try a smaller size")
    return batches[False], accumulation


# ---- all of it -----------------------------------------------------------------------------------------------------

def next_command(cfg, ready, names, batch):
    """-> the command to go on with."""
    usual = config.resolve(globals(), {"demo": cfg.demo})
    names_kept = ("DATASET_DIR", "PRETRAIN_WEIGHTS", "RUNS_DIR")
    changed = "".join(f' --{name.lower()} "{getattr(cfg, name)}"' for name in names_kept
                      if getattr(cfg, name) != getattr(usual, name))
    if cfg.demo:
        size = f" --size {cfg.SIZE}" if cfg.SIZE != usual.SIZE else ""
        return (f"python train_detector_stage1.py --demo{size}{changed}" if ready else
                f"python validate_setup.py --demo{size}{changed}     (when the above is fixed)")
    if not ready:
        if not names and not Path(cfg.DATASET_DIR).exists():
            return (f'python -m tools.make_demo_dataset --out "{cfg.DATASET_DIR}"     (a data set to try the scripts '
                    "with)")
        return f"python validate_setup.py --size {cfg.SIZE}{changed}     (when the above is fixed)"
    return (f"python train_detector_stage1.py --size {cfg.SIZE} --epochs 1 --batch {batch[0]} --accum {batch[1]} "
            f"--workers {min(2, system.available_cores())} --multi_scale 0{changed}")


def main(**overrides):
    """Check everything. -> 0 if training can start, else 1."""
    cfg = config.resolve(globals(), overrides)
    if cfg.SIZE not in _COSTS:
        raise UserError(f"--size {cfg.SIZE}: choose one of {', '.join(_COSTS)}")
    found, names, batch = Findings(), [], None
    check_python(found)
    if check_packages(found, Path(__file__).with_name("requirements.txt")):
        try:
            import rfdetr.weights  # noqa: F401  everything that the checks below need
            memory = check_device(found)
            if cfg.demo:
                from utils.demo.roboflow import ensure_dataset
                ensure_dataset(cfg.DATASET_DIR)
                found.ok(f"--demo looks at its own scenes, in {Path(cfg.DATASET_DIR).as_posix()}; leave it out to look "
                         "at data of yours")
            names = check_dataset(found, cfg)
            check_weights(found, cfg, names)
            batch = check_batch(found, cfg, memory)
        except (ImportError, OSError) as error:  # a package that is there but broken; OSError: a missing DLL
            found.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    check_disk(found, cfg)
    ready = not found.failed
    print(f"\n{'Ready' if ready else 'Not ready'}: {found.failed} problem(s), {found.warned} warning(s). Next:\n"
          f"{next_command(cfg, ready, names, batch)}")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(**config.from_command_line(globals())))
