"""What the RF-DETR training scripts share: run folders, data, models to start from, parameter groups.

The scripts (train_detector_stage1.py, train_seg_stage2.py, train_seg_single_stage.py) hold the constants and the order
of things; the loop is utils/training/engine.py, what a run prints and leaves behind rfdetr/run_report.py.
"""

import atexit
import contextlib
import re
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from rfdetr import features, run_report, weights
from rfdetr.config import COCO_HEAD_ROWS, COCO_ROWS, block_size, check_resolution, default_resolution, settings
from rfdetr.datasets import roboflow
from rfdetr.model import RFDETR
from utils import checkpoint, config, freeze, processes
from utils.config import UserError
from utils.datasets import loaders
from utils.datasets.annotations import plain_name
from utils.evaluation.coco import ground_truth
from utils.training.plan import PRECISIONS, Plan, not_negative

NO_DECAY = ("embeddings.position_", "embeddings.cls_", "query_feat.", "reference_point_embed.")  # beside 1-D tensors


# ---- the run's folder, banner, precision ---------------------------------------------------------------------------

def run_folder(runs_dir, name):
    """Make runs_dir/<name>_<n> with the first free number above all others; the same on every rank.

    It belongs to this run from now on; a run that ends before it has written anything takes it away again.

    Raises:
        UserError: not writable.
    """
    choice = [None]
    if processes.is_main():
        while choice[0] is None:
            used = [int(found[1]) for path in Path(runs_dir).glob(f"{name}_*")
                    if (found := re.fullmatch(rf"{re.escape(name)}_(\d+)", path.name))]
            folder = Path(runs_dir) / f"{name}_{max(used, default=0) + 1}"
            try:
                folder.mkdir(parents=True)
                choice[0] = str(folder)
            except FileExistsError:  # another run was faster
                if not folder.is_dir():
                    raise UserError(f"cannot make {folder.as_posix()}: a file is in the way") from None
            except OSError as error:
                raise UserError(f"cannot write to {Path(runs_dir).as_posix()}: {error.strerror or error}") from error
        atexit.register(_remove_if_empty, choice[0])
    if processes.accelerator().num_processes > 1:
        broadcast_object_list(choice)
    return Path(choice[0])


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):
        Path(folder).rmdir()


def folder_of(cfg, name):
    """-> Path of this run's folder: the one to go on in, or a new one."""
    return Path(cfg.RESUME) if cfg.RESUME else run_folder(cfg.RUNS_DIR, name)


def resumed(namespace, overrides, name):
    """The constants of the run to go on with, under those that were given.

    Args:
        namespace: the script's globals(); overrides: of `main`; its RESUME is a run's folder, or "last" for the newest
        one of that kind. name: what its folders begin with ("detector", "segmentation").
    Returns:
        overrides for config.resolve, with RESUME made a folder.
    Raises:
        UserError: no such run, or a run of another script.
    """
    wanted = overrides.get("RESUME", "")
    if not wanted:
        return overrides
    folder = Path(wanted)
    if wanted == "last":
        usual = namespace["DEMO"] if overrides.get("demo") else namespace
        runs_dir = Path(overrides.get("RUNS_DIR", usual["RUNS_DIR"]))
        found = list(runs_dir.glob(f"{name}_*/last.pt"))
        if not found:
            raise UserError(f"--resume last: no {name}_*/last.pt in {runs_dir.as_posix()}")
        folder = max(found, key=lambda path: path.stat().st_mtime).parent
    if not (folder / "last.pt").is_file():
        raise UserError(f"--resume {folder.as_posix()}: there is no last.pt in it; give the folder of an earlier run, "
                        "or 'last' for the newest one")
    constants = checkpoint.load(folder / "last.pt").get("constants", {})
    if strangers := constants.keys() - config.constants_of(namespace).keys():
        raise UserError(f"--resume {folder.as_posix()} is a run of another script: it has "
                        f"{', '.join(sorted(strangers))}")
    return constants | overrides | {"RESUME": str(folder)}


def build_plan(cfg, learning_rates, loss_weights):
    """-> Plan of a script's constants, see Plan.of; UserError, by the flags' names, for settings that cannot be."""
    flags = {"epochs": "--epochs", "batch_size": "--batch", "accumulate": "--accum", "workers": "--workers",
             "patience": "--patience", "weight_decay": "--weight_decay", "clip_norm": "--clip_norm",
             "warmup_steps": "--warmup_steps", "checkpoint_steps": "--checkpoint_steps"}
    given = {"precision": amp_precision(cfg.NO_AMP), "precisions": PRECISIONS, "resume": bool(cfg.RESUME)}
    if hasattr(cfg, "EMA"):
        flags["ema"], given["ema"] = "--ema_decay", cfg.EMA_DECAY if cfg.EMA else 0.0
    if hasattr(cfg, "LAYER_DECAY"):
        not_negative("--layer_decay", cfg.LAYER_DECAY)
    return Plan.of(cfg, given, learning_rates, loss_weights, **flags)


def device_name():
    """-> what the banner calls the device."""
    device = processes.device()
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def amp_precision(no_amp):
    """-> "float32", "bf16" or "fp16": what mixed precision is on this device. A CPU gains nothing from it."""
    if no_amp or processes.device().type != "cuda":
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ---- data ----------------------------------------------------------------------------------------------------------

def class_names(dataset_dir):
    """-> the data set's class names; prints what was dropped."""
    names, notes = roboflow.class_names_of(dataset_dir)
    for note in notes:
        processes.say(f"note: {note}")
    return names


def open_dataset(cfg, split, class_rows, resolution, train=False, with_masks=False):
    """-> RoboflowDataset of one split; prints its notes."""
    data = roboflow.RoboflowDataset(cfg.DATASET_DIR, split, class_rows, resolution, train=train, masks=with_masks,
                                    seed=cfg.SEED, augmentation=cfg.AUGMENTATION)
    if split == "valid" and not len(data.labels):
        raise UserError(f"{data.annotation_file.as_posix()} has no object: nothing to choose the best epoch by")
    for note in data.notes:
        processes.say(f"note: {note}")
    return data


def open_splits(cfg, class_rows, resolution, with_masks=False, augment=True):
    """-> {"train", "valid", with RUN_TEST "test": RoboflowDataset}; only "train" is augmented."""
    return {split: open_dataset(cfg, split, class_rows, resolution, split == "train" and augment, with_masks)
            for split in (["train", "valid", "test"] if cfg.RUN_TEST else ["train", "valid"])}


def batch_sizes(cfg, size, resolution):
    """-> the sizes that multi-scale training draws from; () without it."""
    if not cfg.MULTI_SCALE:
        return ()
    one = settings(size)
    return roboflow.multi_scale_sizes(resolution, block_size(size), cfg.EXPANDED_SCALES, one["queries"], one["patch"])


def training_loader(cfg, data, size, resolution):
    """-> loader of `data`, every batch stretched to one size."""
    collate = roboflow.Collate(resolution, batch_sizes(cfg, size, resolution), cfg.SEED)
    return loaders.training_loader(data, cfg.BATCH, cfg.WORKERS, cfg.SEED, collate=collate)


def evaluation_splits(cfg, data, resolution):
    """-> {"valid", perhaps "test": (loader in order, always at `resolution`, ground truth)} of `open_splits`' data."""
    return {split: (loaders.validation_loader(one, cfg.BATCH, cfg.WORKERS, collate=roboflow.Collate(resolution)),
                    ground_truth(one.annotation_file))
            for split, one in data.items() if split != "train"}


def cached_loader(cfg, model, data, resolution):
    """-> training loader over the frozen detector's features of `data` (opened without augmentation, with masks)."""
    if cfg.MULTI_SCALE:
        processes.say("note: cached features are those of one size: no multi-scale, no augmentation but mirroring")
    folder = Path(cfg.CACHE_DIR) if cfg.CACHE_DIR else Path(cfg.RUNS_DIR) / "feature_cache"
    data = features.CachedDataset(folder, model, data, resolution, cfg.BATCH, cfg.WORKERS)
    return loaders.training_loader(data, cfg.BATCH, cfg.WORKERS, cfg.SEED, collate=features.collate)


# ---- the model -----------------------------------------------------------------------------------------------------

def resolution_of(cfg):
    """-> the side of the square input; checked."""
    resolution = cfg.RESOLUTION or default_resolution(cfg.SIZE)
    check_resolution(cfg.SIZE, resolution)
    return resolution


def new_detector(cfg, names, resolution, with_masks=False):
    """The model to train: with published or earlier weights, or new.

    Returns:
        RFDETR, {class name: row of its head}. Rows: 91 with COCO weights, as many as an earlier checkpoint has, and
        one per class plus one for the background from scratch.
    Raises:
        UserError: weights that are not there, not reachable, or of another network.
    """
    if cfg.RESUME:  # the run's own weights come with last.pt
        content = checkpoint.load(Path(cfg.RESUME) / "last.pt")
        return RFDETR(**content["args"]), content["class_rows"]
    head = mask_head_of(cfg.SIZE) if with_masks else None
    if cfg.PRETRAIN_WEIGHTS.lower() == "none":
        rows, known, source = len(names) + 1, {}, None
    elif cfg.PRETRAIN_WEIGHTS.lower() == "coco":
        rows, known, source = COCO_HEAD_ROWS, COCO_ROWS, weights.fetch(cfg.SIZE)
    else:
        source = cfg.PRETRAIN_WEIGHTS
        rows, known = weights.rows_of(source)
    class_rows = weights.assign_rows(names, rows, known)
    model = RFDETR(cfg.SIZE, rows, resolution, mask_head=head)
    if source:
        found = weights.load_pretrained(model, source, exclude=cfg.PRETRAIN_EXCLUDE_KEYS)
        processes.say(f"weights: {Path(source).as_posix()} ({found['loaded']} tensors)")
        if found["left_out"]:
            processes.say(f"note: {len(found['left_out'])} tensors start anew: {', '.join(found['left_out'][:4])}"
                          f"{', ...' if len(found['left_out']) > 4 else ''}")
    row_of = {plain_name(name): row for name, row in known.items()}
    new = [name for name in names if row_of.get(plain_name(name)) != class_rows[name]]
    processes.say("class head: " + ", ".join(f"{name} -> row {row}" for name, row in list(class_rows.items())[:12])
                  + (", ..." if len(names) > 12 else "") + f" of {rows}"
                  + (f"; not known to the weights: {', '.join(new[:5])}" if source and new else ""))
    return model, class_rows


def mask_head_of(size):
    """-> the kind of mask head that goes with a size: the light one for the smallest detectors."""
    return "nano" if size in ("nano", "tiny") else "full"


def stage1_checkpoint(cfg):
    """-> Path of the detector to freeze: CHECKPOINT, else STAGE1_RUN's best.pt or last.pt; with RESUME its own."""
    if cfg.RESUME:
        return Path(cfg.RESUME) / "last.pt"
    if cfg.CHECKPOINT:
        if not Path(cfg.CHECKPOINT).is_file():
            raise UserError(f"--checkpoint {Path(cfg.CHECKPOINT).as_posix()} does not exist: give the file that "
                            "shrink_head.py wrote, or leave it out to take --stage1_run's best.pt")
        return Path(cfg.CHECKPOINT)
    if not cfg.STAGE1_RUN:
        raise UserError("which detector? Give --stage1_run runs/detector_<size>_<resolution>_<n> (and the shrunken "
                        "file as --checkpoint), or try --demo")
    for name in ("best.pt", "last.pt"):
        if (Path(cfg.STAGE1_RUN) / name).is_file():
            return Path(cfg.STAGE1_RUN) / name
    raise UserError(f"No checkpoint found in Stage-1 directory {Path(cfg.STAGE1_RUN).as_posix()}: there is neither "
                    "best.pt nor last.pt. Did train_detector_stage1.py finish an epoch?")


def frozen_detector_with_masks(cfg, source, names):
    """-> RFDETR of the checkpoint with its detector frozen and a new mask head, {class name: row}, resolution.

    Raises:
        UserError: another size, a head that was not shrunk to the data set's classes, other classes.
    """
    model, found = weights.load_detector(source)
    args = found["args"]
    if cfg.RESUME:
        freeze.freeze(model.detector)
        return model, found["class_rows"], args["resolution"]
    if args["size"] != cfg.SIZE:
        raise UserError(f"--size {cfg.SIZE}, but {source.as_posix()} holds a detector of size {args['size']}")
    shrink = run_report.shrink_command(shrinkable(source), names)
    if args["num_rows"] != len(names) + 1:
        raise UserError(f"Frozen detector head out_dim ({args['num_rows']}) != requested ({len(names) + 1}): cut the "
                        f"head to the data set's classes first, then give the new file as --checkpoint:\n  {shrink}")
    if strangers := [name for name in names if name not in found["class_rows"]]:
        raise UserError(f"{source.as_posix()} knows {', '.join(found['class_rows'])}, but not {', '.join(strangers)} "
                        f"of the data set. Cut the head of the stage-1 checkpoint to these classes:\n  {shrink}")
    resolution = cfg.RESOLUTION or args["resolution"]
    model = RFDETR(cfg.SIZE, args["num_rows"], resolution, mask_head=mask_head_of(cfg.SIZE))
    weights.load_pretrained(model, source)
    freeze.freeze(model.detector)
    return model, {name: found["class_rows"][name] for name in names}, resolution


def shrinkable(source):
    """-> the checkpoint beside `source` that shrink_head.py should read: stage 1's best weights."""
    best = source.parent / "checkpoint_best_regular.pth"
    return best if best.is_file() else source


def save_latest(model, history, extras, path):
    """`save_weights` after every epoch, see engine.fit's on_epoch."""
    save_weights(model, extras, path)


def save_weights(model, extras, path):
    """A checkpoint without the optimizer; extras: of weights.description."""
    if processes.is_main():
        checkpoint.save(extras | {"model": model.state_dict()}, path)


def parameter_groups(model, lr, backbone_lr, layer_decay, weight_decay, mask_head_lr=None):
    """Groups for the optimizer: the ViT's layers at their own rates, the mask head at its own, the rest at `lr`.

    Block i of n (from the input) trains with backbone_lr * layer_decay ** (n - i), the embeddings with
    layer_decay ** n: the deeper, the more general (Bao et al., "BEiT", 2022; RF-DETR does the same). Biases,
    normalisation layers, layer scales and embeddings have no weight decay.
    """
    depth = model.detector.config.backbone_config.num_hidden_layers
    groups = {}  # (place in the list, with weight decay): the order must not depend on the rates, or no run resumes
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        place, rate = 0, lr
        if name.startswith("mask_head."):
            place, rate = 1, lr if mask_head_lr is None else mask_head_lr
        elif ".backbone." in name and ".projector." not in name:
            block = re.search(r"\.layers?\.(\d+)\.", name)
            layer = int(block[1]) + 1 if block else (0 if "embeddings" in name else depth)
            place, rate = 2 + depth - layer, backbone_lr * layer_decay ** (depth - layer)
        decays = parameter.ndim > 1 and not any(part in name for part in NO_DECAY)
        group = groups.setdefault((place, not decays), {"params": [], "lr": rate,
                                                        "weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
