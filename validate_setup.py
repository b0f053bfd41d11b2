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
import sys
from pathlib import Path
from typing import NamedTuple

from rfdetr import setup_checks as rfdetr_checks
from rfdetr.setup_checks import check_batch, check_dataset, check_weights
from utils import config, system
from utils.config import UserError
from utils.next_command import command, flag, flags
from utils.training.setup_checks import (
    check_detection_data,
    check_detector,
    check_device,
    check_disk,
    check_packages,
    check_pairs,
    check_python,
    tried,
)

# torch, transformers and what needs them are imported inside functions: this script has to speak where they are missing

EXPERIMENT = "rfdetr"                   # rfdetr, spdnet, feature, unet or refiner
REPORT = ""                             # folder for report.html, a page about the data; "" for none
DATASET_DIR = "./dataset"               # Roboflow's layout, COCO's, YOLO's or Pascal VOC's, see docs/data.md
SIZE = "nano"                           # nano, small, medium, base, large, large_2026; seg_nano to seg_2xlarge
PRETRAIN_WEIGHTS = "coco"               # coco: published weights; a checkpoint file; none: from scratch
RUNS_DIR = "./runs"                     # where runs will be written
TIMEOUT = 5.0                           # seconds to wait for the server of the published weights

DEMO = {"DATASET_DIR": "./demo/dataset", "SIZE": "tiny", "PRETRAIN_WEIGHTS": "./assets/demo/rfdetr_tiny.pth",
        "RUNS_DIR": "./demo/runs"}


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
        if ("FAIL", text) not in self.lines:  # else two checks have found the same
            self.failed += 1
            self._say("FAIL", text)

    def _say(self, kind, text):
        self.lines.append((kind, text))
        print(f"{f'[{kind}]':6} {text}", flush=True)


# ---- experiments 1 to 3 --------------------------------------------------------------------------------------------

def check_spdnet(found, cfg, script):
    """Experiment 1."""
    from utils import integrated_model
    check_detection_data(found, cfg)
    constant, path = integrated_model.weights_of(cfg)
    tried(found, lambda: integrated_model.read_derainer(cfg.DERAINER, path, constant), f"weights: {constant} {path}")
    detector = check_detector(found, cfg)
    check_opening(found, cfg, detector, lambda: script.build_data(cfg, detector.config.id2label))


def check_feature(found, cfg, script):
    """Experiment 2."""
    check_detection_data(found, cfg)
    detector = check_detector(found, cfg)
    check_opening(found, cfg, detector, lambda: script.build_data(
        cfg, detector.config.id2label, next(iter(script.build_plans(cfg).values())).loss_weights))


def check_opening(found, cfg, detector, build):
    """What the training does with its data, or as much of it as can be tried without a detector (None)."""
    from utils.datasets.fresh_rain import fresh_rain
    if detector is None:
        tried(found, lambda: fresh_rain(cfg))
    elif not found.failed:
        tried(found, build, "the training can open its data")


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
    if tried(found, lambda: script.check(cfg) or True) and tried(found, diffusion_base.diffusers_and_peft) and tried(
            found, lambda: script.say_needs(cfg) or True):
        found.ok("what a step needs stands above")


def check_fit(found, cfg, one, memory):
    """-> constants for the command: BATCH_SIZE = 0 where the script's own batch may not fit."""
    if memory is None or one.fixed is None or not cfg.BATCH_SIZE:
        return {}
    side = max(getattr(cfg, "CROP_SIZES", ()) or (cfg.IMAGE_SIZE,))
    needed = one.fixed + 0.7 + cfg.BATCH_SIZE * one.per_image * (side / one.side) ** 2
    text = f"a step of BATCH_SIZE = {cfg.BATCH_SIZE} at {side} pixels takes about {needed:.1f} GB in float32"
    if needed <= 0.9 * memory:
        found.ok(text)
        return {}
    found.warn(f"{text}, this GPU has {memory:.1f}: BATCH_SIZE = 0 finds what fits, PRECISION = 'auto' needs less")
    return {"BATCH_SIZE": 0, "PRECISION": "auto"}


def look_at_script(found, cfg):
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
    if not found.failed:
        return command(script, cfg, but=(), **fit)
    if cfg.EXPERIMENT == "refiner" and not Path(cfg.DERAIN_MODEL_PATH).is_file():
        pairs = config.Config(demo=cfg.demo, RAINY_DIR=cfg.RAINY_DIR, CLEAR_DIR=cfg.CLEAR_DIR)
        return f"{command(importlib.import_module('train_unet_derain'), pairs)}     # the refiner needs a de-rainer"
    return (f"python validate_setup.py --experiment {cfg.EXPERIMENT}{flags(script, cfg, but=())}     # when the above "
            "is fixed")


def namespace_of(experiment):
    """-> the constants to resolve: this script's, or those of the experiment's script with _OWN."""
    if experiment == "rfdetr":
        return globals()
    return vars(importlib.import_module(_EXPERIMENTS[experiment].script)) | {
        name: globals()[name] for name in _OWN} | {"__doc__": __doc__}


def from_command_line(words):
    """-> overrides; the experiment's script says which flags there are."""
    wanted = EXPERIMENT
    for word, after in zip(words, [*words, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name.lower() == "--experiment":
            wanted = value or after
    if wanted not in ("rfdetr", *_EXPERIMENTS):
        return config.from_command_line(globals(), ["--EXPERIMENT", wanted])  # `main` says which there are
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
    changed = "".join(flag(name.lower(), getattr(cfg, name)) for name in names_kept
                      if getattr(cfg, name) != getattr(usual, name))
    if cfg.demo:
        size = f" --size {cfg.SIZE}" if cfg.SIZE != usual.SIZE else ""
        return (f"python train_detector_stage1.py --demo{size}{changed}" if ready else
                f"python validate_setup.py --demo{size}{changed}     # when the above is fixed")
    if not ready:
        if not names and not Path(cfg.DATASET_DIR).exists():
            return (f"python -m tools.make_demo_dataset{flag('out', cfg.DATASET_DIR)}     # a data set to try the "
                    "scripts with")
        return f"python validate_setup.py --size {cfg.SIZE}{changed}     # when the above is fixed"
    script = ("train_seg_single_stage.py --seg_head official --seg_lr 1e-4" if cfg.SIZE.startswith("seg_") else
              "train_detector_stage1.py")
    return (f"python {script} --size {cfg.SIZE} --epochs 1 --batch {batch[0]} --accum {batch[1]} "
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
    found, names, batch, line = Findings(), [], None, ""
    cfg = config.resolve(globals(), overrides) if experiment == "rfdetr" else None
    if cfg and cfg.SIZE not in rfdetr_checks.COSTS:
        raise UserError(f"--size {cfg.SIZE}: choose one of {', '.join(rfdetr_checks.COSTS)}")
    check_python(found)
    if check_packages(found, Path(__file__).with_name("requirements.txt")):
        try:
            if experiment == "rfdetr":
                names, batch = look_at_rfdetr(found, cfg)
            else:
                cfg = config.resolve(namespace_of(experiment), overrides)
                line = look_at_script(found, cfg)
            if cfg.REPORT:
                write_report(found, cfg)
        except (ImportError, OSError) as error:  # a package that is there but broken; OSError: a missing DLL
            found.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if experiment == "rfdetr":
        check_disk(found, cfg.RUNS_DIR, "--runs_dir", cfg.SIZE, 4 * rfdetr_checks.COSTS[cfg.SIZE][0] / 1000)
    ready = not found.failed
    if experiment == "rfdetr":
        line = next_command(cfg, ready, names, batch)
    print(f"\n{'Ready' if ready else 'Not ready'}: {found.failed} problem(s), {found.warned} warning(s). Next:\n"
          f"{line or f'python validate_setup.py --experiment {experiment}     # when the above is fixed'}")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(**from_command_line(sys.argv[1:])))
