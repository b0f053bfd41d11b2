"""What validate_setup.py looks at before a training of any experiment: the machine, the disk, detection data, pairs of
images, the detector.

Every check takes `found`, a validate_setup.Findings, and tells it what it has seen; experiment 4's own are in
rfdetr/setup_checks.py.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.request
from pathlib import Path

from utils import system
from utils.config import UserError

# torch and what needs it are imported inside functions: validate_setup.py has to speak where they are missing

_PYTHON = (3, 11)
_DISPENSABLE = {"opencv-python-headless": "only other scripts need it",
                "segmentation-models-pytorch": "only other scripts need it",
                "faster-coco-eval": "scoring takes six times as long"}  # packages and what it means to lack them


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


def check_disk(found, folder, setting, what, weights):
    """Room for one run: three files of weights, and last.pt (weights, the optimizer's two moments, the average), which
    is there twice while it is replaced: 11 times the weights.

    Args:
        folder: of the run; setting: the constant or flag that holds it; what: is run; weights: GB.
    """
    given, folder = folder, Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        found.fail(f"{setting} {given}: {folder.as_posix()} is a file: choose another {setting}")
        return
    free, needed = shutil.disk_usage(folder).free / 2**30, 11 * weights + 0.1
    text = f"{free:.1f} GB free for {given}; a run of {what} takes about {needed:.1f} GB"
    if not os.access(folder, os.W_OK):
        found.fail(f"{folder.as_posix()} is not writable: choose another {setting}")
    elif free < needed:
        found.fail(f"{text}: free some space, or choose another {setting}")
    elif free < 3 * needed:
        found.warn(text)
    else:
        found.ok(text)


# ---- data and weights ----------------------------------------------------------------------------------------------

def look_at(found, splits, side):
    """Take stock of the splits of one data set for report.html, and find images that are in two of them.

    Args:
        splits: [(layouts.Split, title), ...], the training split first; side: pixels of the training's images.
    Returns:
        [Audit, ...] of those that can be read.
    """
    from utils.datasets import audit, image_check
    audits = []
    for split, title in splits:
        try:
            audits.append(audit.of_split(split, side, title))
        except UserError as error:
            found.fail(str(error))
    for one in audits[1:]:
        same = image_check.same_content(one.paths(), audits[0].paths())
        audit.mark_shared(one, audits[0], same)
    found.audits += audits
    return audits


def check_detection_data(found, cfg):
    """COCO_DIR and COCO_RAIN_DIR: counts, odd images, files, twins, images in two splits."""
    from utils import datasets
    from utils.datasets import audit, image_check, layouts
    from utils.datasets.fresh_rain import source_of
    try:
        fresh = source_of(cfg) == "fresh"
        if datasets.is_unlabelled(cfg):
            found.ok("plain folders of images without annotations, which DETECTION_WEIGHT = 0 allows")
            return
    except UserError as error:
        found.fail(str(error))
        return
    known = {"COCO_RAIN_DIR": {}}
    roots = [("COCO_DIR", "clean"), ("COCO_RAIN_DIR", "rainy")]
    if fresh and not cfg.COCO_RAIN_DIR:
        found.ok("COCO_RAIN_DIR is empty: all weather is drawn by RAIN_KINDS")
        roots.pop()
    for constant, advice in roots:
        splits = []
        for split in ("val",) if fresh and advice == "rainy" else ("train", "val"):  # fresh rain is not read
            try:
                place = layouts.find_split(getattr(cfg, constant), split, constant, layouts.ADVICE[advice])
                splits.append((place, f"{constant}, {split}"))
            except UserError as error:
                found.fail(str(error))
        audits = look_at(found, splits, cfg.IMAGE_SIZE)
        for one in audits:
            (found.ok if len(one.sizes) else found.warn)(audit.summary(one))
            for note in one.notes:
                found.warn(note)
            try:
                image_check.check_images(one.paths(), one.title)
                found.ok(f"{one.title}: all image files are there and can be read")
            except UserError as error:
                found.fail(str(error))
            shared = [image for image in one.images if image.reasons[:1] and image.reasons[0].startswith("same")]
            if shared:
                found.warn(f"{one.title}: {len(shared)} of {len(one.images)} images are in the training split as well "
                           f"({system.listed([image.path.name for image in shared], 3)}): its score says little")
        known[constant] = {one.title.split(", ")[1]: {path.name for path in one.paths()} for one in audits}
    for split, names in known["COCO_RAIN_DIR"].items():
        if alone := names - known["COCO_DIR"].get(split, names):
            found.fail(f"{len(alone)} {split} images of COCO_RAIN_DIR have no clean twin of that name in COCO_DIR: "
                       f"{system.listed(sorted(alone), 3)}")


def check_pairs(found, cfg):
    """RAINY_DIR and CLEAR_DIR: partners, sizes, files, the same scene twice."""
    from utils.datasets import image_check, windshield_pairs
    try:
        pairs, notes = windshield_pairs.find_pairs(cfg.RAINY_DIR, cfg.CLEAR_DIR)
    except UserError as error:
        found.fail(str(error))
        return
    found.ok(f"RAINY_DIR, CLEAR_DIR: {len(pairs)} pairs, all of them readable and of equal size")
    found.pairs["RAINY_DIR and CLEAR_DIR"] = list(pairs.values())
    for note in notes:
        found.warn(note)
    rainy = [path for path, _ in pairs.values()]
    same = [(path, other) for path, other in image_check.same_content(rainy, rainy).items() if path != other]
    if same:
        found.warn(f"RAINY_DIR: {len(same)} image(s) are there twice or more, such as {same[0][0].name} and "
                   f"{same[0][1].name}: a split may train and test on the same")


def check_detector(found, cfg):
    """RTDETR_MODEL_NAME, and IMAGE_SIZE for it. -> the detector, None where it is not on this machine."""
    from utils import checkpoint
    name = cfg.RTDETR_MODEL_NAME
    if not checkpoint.is_local(name):
        from huggingface_hub import try_to_load_from_cache
        files = ("config.json", "model.safetensors")
        if not all(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            reachable(found, f"https://huggingface.co/{name}/resolve/main/config.json", cfg.TIMEOUT, name,
                      f"On a machine with network run 'hf download {name} --local-dir {name.split('/')[-1]}' and set "
                      "RTDETR_MODEL_NAME to that folder")
            return None
    from utils.networks.rtdetr import load_rtdetr, require_queries
    try:
        detector = load_rtdetr(name)
        require_queries(detector, cfg.IMAGE_SIZE)
    except UserError as error:
        found.fail(str(error))
        return None
    found.ok(f"weights: RTDETR_MODEL_NAME {name}, {detector.config.num_labels} classes")
    return detector


def reachable(found, url, timeout, what, otherwise):
    """Whether a server has what a training would download."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            found.ok(f"weights: {url} answers; training downloads {what} once")
    except (OSError, ValueError, OverflowError) as error:
        found.fail(f"weights: {url} cannot be reached ({getattr(error, 'reason', error)}). {otherwise}")


def tried(found, work, text=None):
    """-> what `work()` returns, None where it raises a UserError, which is a finding; text: to say otherwise."""
    try:
        answer = work()
    except UserError as error:
        found.fail(str(error))
        return None
    if text:
        found.ok(text)
    return answer
