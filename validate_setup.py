"""Look before you train: Python, packages, GPU, data set, disk, weights, and a batch size that should fit.

    python validate_setup.py
    python validate_setup.py --demo
    python validate_setup.py --dataset_dir ./dataset --size small
    python validate_setup.py --experiment spdnet --report ./setup

EXPERIMENT is what you want to train: rfdetr, spdnet, feature, unet or refiner. All but rfdetr take the constants and
flags of their training script. Every finding is one line: [ok], [warn] (training works, but read it) or [FAIL]
(training would stop). Nothing is downloaded or changed, but --demo draws its data set. Exit code 0 without a [FAIL],
else 1; the last line is the command to go on with. REPORT is a folder for report.html: classes, box sizes and pictures
of the data, the odd ones first.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

from utils import config, system
from utils.config import UserError

# torch, transformers and what needs them are imported inside functions: this script has to speak where they are missing

EXPERIMENT = "rfdetr"                   # rfdetr, spdnet, feature, unet or refiner
REPORT = ""                             # folder for report.html, a page about the data; "" for none
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


class Experiment(NamedTuple):
    """A training that is looked at by its script's own constants."""

    script: str
    weights: float         # GB of the networks in a checkpoint, about
    fixed: float | None    # GB of networks, optimizer and gradients; None: the script counts its step itself
    per_image: float       # GB of a step in float32 at `side`: docs/gpu.md, python -m tools.memory_table
    side: int


_EXPERIMENTS = {"spdnet": Experiment("Training_SPDNet_Adaptation", 0.1, 0.15, 2.646, 640),
                "feature": Experiment("Training_FeatureDerain", 0.15, 0.52, 0.568, 640),
                "unet": Experiment("train_unet_derain", 0.1, 0.50, 0.376, 256),
                "refiner": Experiment("train_diffusion_refiner", 0.1, None, 0.0, 256)}
_OWN = ("EXPERIMENT", "REPORT", "TIMEOUT")  # constants of this script that hold for these as well


class Findings:
    """Prints findings as they come, and remembers whether one of them stops training.

    `lines` [(kind, text), ...], `audits` [utils.datasets.audit.Audit, ...] and `pairs` {title: pairs} are what
    report.html shows.
    """

    def __init__(self):
        self.failed = self.warned = 0
        self.lines, self.audits, self.pairs = [], [], {}

    def ok(self, text):
        self._say("ok", text)

    def warn(self, text):
        self.warned += 1
        self._say("warn", text)

    def fail(self, text):
        self.failed += 1
        self._say("FAIL", text)

    def _say(self, kind, text):
        self.lines.append((kind, text))
        print(f"{f'[{kind}]':6} {text}", flush=True)


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
    if cfg.REPORT:
        from rfdetr.config import default_resolution
        look_at(found, [(data[split].annotations, split) for split in data if data[split]],
                default_resolution(cfg.SIZE))
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
    from utils import download
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
        if download.md5(cached) == published.md5:
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


# ---- the other experiments -------------------------------------------------------------------------------------------

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
    if not cfg.DETECTION_WEIGHT and datasets.without_annotations(cfg.COCO_DIR, cfg.COCO_RAIN_DIR):
        found.ok("plain folders of images without annotations, which DETECTION_WEIGHT = 0 allows")
        return
    known = {}
    for constant, advice in (("COCO_DIR", "clean"), ("COCO_RAIN_DIR", "rainy")):
        splits = []
        for split in ("train", "val"):
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
    """RTDETR_MODEL_NAME. -> the detector, None where it is not on this machine."""
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
    from utils.networks.rtdetr import load_rtdetr
    try:
        detector = load_rtdetr(name)
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


def check_spdnet(found, cfg, script):
    """Experiment 1."""
    from utils import integrated_model
    check_detection_data(found, cfg)
    constant, path = integrated_model.weights_of(cfg)
    tried(found, lambda: integrated_model.read_derainer(cfg.DERAINER, path, constant), f"weights: {constant} {path}")
    detector = check_detector(found, cfg)
    if detector is not None and not found.failed:
        tried(found, lambda: script.build_data(cfg, detector.config.id2label), "the training can open its data")


def check_feature(found, cfg, script):
    """Experiment 2."""
    check_detection_data(found, cfg)
    detector = check_detector(found, cfg)
    if detector is not None and not found.failed:
        weights = next(iter(script.build_plans(cfg).values())).loss_weights
        tried(found, lambda: script.build_data(cfg, detector.config.id2label, weights),
              "the training can open its data")


def check_unet(found, cfg, script):
    """Experiment 3."""
    check_pairs(found, cfg)
    if not found.failed and (data := tried(found, lambda: script.build_data(cfg))):
        found.ok("pairs: " + ", ".join(f"{part} {len(own)}" for part, own in data.items()))


def check_refiner(found, cfg, script):
    """The refiner behind experiment 3's de-rainer."""
    from utils.networks import diffusion_base
    check_pairs(found, cfg)
    tried(found, lambda: script.load_content(cfg), f"weights: DERAIN_MODEL_PATH {cfg.DERAIN_MODEL_PATH}")
    if tried(found, diffusion_base.diffusers_and_peft) and tried(found, lambda: script.say_needs(cfg) or True):
        found.ok("what a step needs stands above")


def check_fit(found, cfg, one, memory):
    """-> flags for the command: BATCH_SIZE = 0 where the script's own batch may not fit."""
    if memory is None or one.fixed is None or not cfg.BATCH_SIZE:
        return ""
    needed = one.fixed + 0.7 + cfg.BATCH_SIZE * one.per_image * (cfg.IMAGE_SIZE / one.side) ** 2
    text = f"a step of BATCH_SIZE = {cfg.BATCH_SIZE} at {cfg.IMAGE_SIZE} pixels takes about {needed:.1f} GB in float32"
    if needed <= 0.9 * memory:
        found.ok(text)
        return ""
    found.warn(f"{text}, this GPU has {memory:.1f}: BATCH_SIZE = 0 finds what fits, PRECISION = 'auto' needs less")
    return " --BATCH_SIZE 0 --PRECISION auto"


def look_at_script(found, cfg, overrides):
    """Check one of _EXPERIMENTS. -> the command to go on with."""
    one = _EXPERIMENTS[cfg.EXPERIMENT]
    script = importlib.import_module(one.script)
    memory = check_device(found)
    if cfg.demo:
        for draw in ("ensure_demo", "ensure_windshield_demo"):
            if hasattr(script, draw):
                getattr(script, draw)()
        found.ok("--demo looks at its own scenes; leave it out to look at data of yours")
    for check in ("check", "build_plan", "build_plans"):
        if hasattr(script, check):
            tried(found, lambda name=check: getattr(script, name)(cfg))
    {"spdnet": check_spdnet, "feature": check_feature, "unet": check_unet, "refiner": check_refiner}[cfg.EXPERIMENT](
        found, cfg, script)
    folder = "CHECKPOINT_DIR" if hasattr(cfg, "CHECKPOINT_DIR") else "OUTPUT_DIR"
    fit = check_fit(found, cfg, one, memory)
    check_disk(found, getattr(cfg, folder), folder, cfg.EXPERIMENT, one.weights)
    given = "".join(f' --{name} "{value}"' if isinstance(value, str) else f" --{name} {value}"
                    for name, value in overrides.items() if name not in (*_OWN, "demo"))
    if not found.failed:
        return f"python {one.script}.py{' --demo' if cfg.demo else ''}{given}{fit}"
    if cfg.EXPERIMENT == "refiner" and not Path(cfg.DERAIN_MODEL_PATH).is_file():
        return f"python train_unet_derain.py{' --demo' if cfg.demo else ''}     (the refiner needs a de-rainer)"
    return (f"python validate_setup.py --experiment {cfg.EXPERIMENT}{' --demo' if cfg.demo else ''}{given}     (when "
            "the above is fixed)")


def namespace_of(experiment):
    """-> the constants to resolve: this script's, or those of the experiment's script with _OWN."""
    if experiment == "rfdetr" or experiment not in _EXPERIMENTS:
        return globals()
    return vars(importlib.import_module(_EXPERIMENTS[experiment].script)) | {
        name: globals()[name] for name in _OWN} | {"__doc__": __doc__}


def from_command_line(words):
    """-> overrides; the experiment's script says which flags there are."""
    wanted = EXPERIMENT
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag.lower() == "--experiment":
            wanted = value or after
    try:
        namespace = namespace_of(wanted)
    except ImportError:  # `main` says what is missing
        return {"EXPERIMENT": wanted}
    return config.from_command_line(namespace, words)


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


def look_at_rfdetr(found, cfg):
    """-> the class names and (batch, accumulation) for the command at the end."""
    import rfdetr.weights  # noqa: F401  everything that the checks below need
    memory = check_device(found)
    if cfg.demo:
        from utils.demo.roboflow import ensure_dataset
        ensure_dataset(cfg.DATASET_DIR)
        found.ok(f"--demo looks at its own scenes, in {Path(cfg.DATASET_DIR).as_posix()}; leave it out to look "
                 "at data of yours")
    names = check_dataset(found, cfg)
    check_weights(found, cfg, names)
    return names, check_batch(found, cfg, memory)


def write_report(found, cfg):
    """report.html in the folder REPORT."""
    from utils.evaluation import data_page
    path = data_page.write(cfg.REPORT, f"Before training: {cfg.EXPERIMENT}", found.lines, found.audits, found.pairs,
                           cfg.as_dict())
    print(f"report: {path.as_posix()}")


def main(**overrides):
    """Check everything. -> 0 if training can start, else 1."""
    experiment = overrides.get("EXPERIMENT", EXPERIMENT)
    if experiment not in ("rfdetr", *_EXPERIMENTS):
        raise UserError(f"EXPERIMENT = {experiment!r}: choose one of rfdetr, {', '.join(_EXPERIMENTS)}")
    found, names, batch, command = Findings(), [], None, ""
    cfg = config.resolve(globals(), overrides) if experiment == "rfdetr" else None
    if cfg and cfg.SIZE not in _COSTS:
        raise UserError(f"--size {cfg.SIZE}: choose one of {', '.join(_COSTS)}")
    check_python(found)
    if check_packages(found, Path(__file__).with_name("requirements.txt")):
        try:
            if experiment == "rfdetr":
                names, batch = look_at_rfdetr(found, cfg)
            else:
                cfg = config.resolve(namespace_of(experiment), overrides)
                command = look_at_script(found, cfg, overrides)
            if cfg.REPORT:
                write_report(found, cfg)
        except (ImportError, OSError) as error:  # a package that is there but broken; OSError: a missing DLL
            found.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if experiment == "rfdetr":
        check_disk(found, cfg.RUNS_DIR, "--runs_dir", cfg.SIZE, 4 * _COSTS[cfg.SIZE][0] / 1000)
    ready = not found.failed
    if experiment == "rfdetr":
        command = next_command(cfg, ready, names, batch)
    print(f"\n{'Ready' if ready else 'Not ready'}: {found.failed} problem(s), {found.warned} warning(s). Next:\n"
          f"{command or f'python validate_setup.py --experiment {experiment}     (when the above is fixed)'}")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(**from_command_line(sys.argv[1:])))
