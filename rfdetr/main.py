"""What the RF-DETR training scripts share: constants and folder of a run, data, the training, parameter groups.

The scripts (train_detector_stage1.py, train_seg_stage2.py, train_seg_single_stage.py) hold the constants and the order
of things. The models to start from are in rfdetr/start.py, the loop in utils/training/engine.py, what a run prints and
leaves behind in rfdetr/run_report.py.
"""

import atexit
import contextlib
import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from pycocotools.coco import COCO

from rfdetr import features, run_report, weights
from rfdetr.config import block_size, check_resolution, default_resolution, mask_head_of, settings
from rfdetr.datasets import batches, roboflow
from utils import checkpoint, config, processes, system
from utils.config import UserError
from utils.datasets import loaders
from utils.evaluation.coco import ground_truth, identity
from utils.training import engine, run_folder
from utils.training.plan import PRECISIONS, Plan, best_precision, not_negative, share
from utils.training.run_state import is_last

NO_DECAY = ("embeddings.position_", "embeddings.cls_", "query_feat.", "reference_point_embed.")  # beside 1-D tensors


# ---- the constants of a run ----------------------------------------------------------------------------------------

def resolve(namespace, overrides, name):
    """A run's constants: the script's or the earlier run's, under those that were given.

    Args:
        namespace: the script's globals(); overrides: of `main`; RESUME, in them or in the script, is an earlier run's
        folder, or "last" for the newest one of that kind. name: what the folders begin with ("detector",
        "segmentation", "single_stage").
    Returns:
        Config, its RESUME a folder, and the content of that folder's last.pt; None without RESUME.
    Raises:
        UserError: no such run, a run of another script, another size or resolution than that run's.
    """
    last, wanted = None, overrides.get("RESUME", namespace["RESUME"])
    if not isinstance(wanted, str):
        raise UserError(f"RESUME = {wanted!r}: give the folder of an earlier run, or 'last' for the newest one")
    if wanted:
        folder = earlier_run(namespace, overrides | {"RESUME": wanted}, name)
        last = checkpoint.load(folder / "last.pt")
        if not is_last(last):
            raise UserError(f"--resume {folder.as_posix()}: last.pt in it is not of this project, or damaged")
        constants = last["constants"]
        unknown = constants.keys() - config.constants_of(namespace).keys()
        if unknown or not {"args", "class_rows"} <= last.keys():
            raise UserError(f"--resume {folder.as_posix()} is a run of another script"
                            + (f": it has {', '.join(sorted(unknown))}" if unknown else ""))
        _require_kind(last, name, folder)
        _require_fixed(last, overrides, folder)
        _note_edited(namespace, overrides, constants)
        overrides = constants | overrides | {"RESUME": str(folder)}
    return config.resolve(namespace, overrides), last


def _note_edited(namespace, overrides, constants):
    """Say which constants of a script count for nothing where RESUME was edited among them; constants: of the run that
    goes on; overrides: of `main`."""
    if "RESUME" in overrides:
        return  # given on the command line, where the others are given as well
    usual = namespace | (namespace["DEMO"] if overrides.get("demo") else {})
    idle = [f"{name} = {constants[name]!r} (not {usual[name]!r})" for name in constants
            if name not in (*overrides, "RESUME") and usual[name] != constants[name]]
    if idle:
        processes.say(f"note: RESUME goes on with that run's constants: {system.listed(idle, 8)}; others can be given "
                      "on the command line")


def _require_kind(last, name, folder):
    """UserError unless the content of a last.pt is that of a run whose folder begins with `name`."""
    kind = ("segmentation" if "STAGE1_RUN" in last["constants"] else
            "single_stage" if last["args"].get("mask_head") else "detector")
    if kind != name:
        scripts = {"segmentation": "train_seg_stage2.py", "single_stage": "train_seg_single_stage.py",
                   "detector": "train_detector_stage1.py"}
        raise UserError(f"--resume {folder.as_posix()} is a run of {scripts[kind]}: resume it with that")


def _require_fixed(last, overrides, folder):
    """UserError where a constant is given anew that decided on the network of the run that shall go on."""
    fixed = {name: last["constants"].get(name) for name in ("SIZE", "RESOLUTION", "STAGE1_RUN", "CHECKPOINT")}
    fixed["RESOLUTION"] = fixed["RESOLUTION"] or last["args"].get("resolution")
    fixed["FREEZE_BACKBONE"] = last["constants"].get("FREEZE_BACKBONE", False)  # runs of earlier releases have none
    fixed["SEG_HEAD"] = last["constants"].get("SEG_HEAD", "ours")
    for name, value in fixed.items():
        if name in overrides and value is not None and overrides[name] != value:
            raise UserError(f"--{name.lower()} {overrides[name]}, but the run in {folder.as_posix()} has {value}: "
                            "leave it out with --resume, or start a new run without")


def earlier_run(namespace, overrides, name):
    """-> Path of the run's folder that RESUME names; the arguments are those of `resolve`."""
    wanted = overrides["RESUME"]
    folder = Path(wanted)
    if wanted == "last":
        usual = namespace["DEMO"] if overrides.get("demo") else namespace
        runs_dir = Path(overrides.get("RUNS_DIR", usual["RUNS_DIR"]))
        found = list(runs_dir.glob(f"{name}_*/last.pt"))
        if not found:
            raise UserError(f"--resume last: no {name}_*/last.pt in {runs_dir.as_posix()}")
        folder = max(found, key=lambda path: path.stat().st_mtime).parent
    if problem := system.absent(folder, folder=True):
        raise UserError(f"--resume {folder.as_posix()} {problem}: give the folder of an earlier run, the one with "
                        "last.pt in it, or 'last' for the newest one")
    if not (folder / "last.pt").is_file():
        raise UserError(f"--resume {folder.as_posix()}: there is no last.pt in it; give the folder of an earlier run, "
                        "or 'last' for the newest one")
    return folder


def build_plan(cfg, learning_rates, loss_weights):
    """-> Plan of a script's constants, see Plan.of; UserError, by the flags' names, for settings that cannot be."""
    flags = {"epochs": "--epochs", "batch_size": "--batch", "accumulate": "--accum", "workers": "--workers",
             "patience": "--patience", "weight_decay": "--weight_decay", "clip_norm": "--clip_norm",
             "warmup_steps": "--warmup_steps", "checkpoint_steps": "--checkpoint_steps"}
    given = {"precision": amp_precision(cfg.NO_AMP), "precisions": PRECISIONS, "resume": bool(cfg.RESUME)}
    if hasattr(cfg, "PRETRAIN_WEIGHTS") and not cfg.RESUME:
        weights.require_source(cfg.PRETRAIN_WEIGHTS, "--pretrain_weights")
    if hasattr(cfg, "EMA"):
        flags["ema"], given["ema"] = "--ema_decay", cfg.EMA_DECAY if cfg.EMA else 0.0
    if hasattr(cfg, "SEG_HEAD"):
        mask_head_of(cfg.SIZE, cfg.SEG_HEAD)
    if hasattr(cfg, "LAYER_DECAY"):
        share("--layer_decay", cfg.LAYER_DECAY)
    if hasattr(cfg, "MASK_COST"):
        not_negative("--mask_cost", cfg.MASK_COST)
        if cfg.MASK_CROP and cfg.SEG_HEAD == "official":
            raise UserError("--mask_crop 1 needs --seg_head ours: the masks of the official head are not kept to their "
                            "boxes afterwards, and what is outside would be left to chance")
    return Plan.of(cfg, given, learning_rates, loss_weights, **flags)


def resolution_of(cfg):
    """-> the side of the square input; checked."""
    resolution = cfg.RESOLUTION or default_resolution(cfg.SIZE)
    check_resolution(cfg.SIZE, resolution)
    return resolution


# ---- a run, from its banner to its results ---------------------------------------------------------------------------

def begin(cfg, title, name, resolution, more=None):
    """Choose the run's folder and print the banner.

    Args:
        title: of the banner; name: what the folder begins with; resolution: side of the square input.
        more: {label: value}, further lines of the banner.
    Returns:
        Path of the folder: the earlier run's, or a new RUNS_DIR/<name>_<size>_<resolution>_<n>.
    """
    note_without_effect(cfg)
    folder = Path(cfg.RESUME) if cfg.RESUME else new_folder(cfg.RUNS_DIR, f"{name}_{cfg.SIZE}_{resolution}")
    processes.say(run_report.banner(title, {
        "Model Size": cfg.SIZE, "Resolution": resolution, **(more or {}), "Epochs": cfg.EPOCHS,
        "Batch": f"{cfg.BATCH} x {cfg.ACCUM} (accumulation)" if cfg.BATCH else "as many as fit",
        "Device": device_name(), "Dataset": Path(cfg.DATASET_DIR).resolve(), "Output": folder.resolve()}))
    return folder


def note_without_effect(cfg):
    """Say which settings decide nothing beside the others."""
    frozen = getattr(cfg, "FREEZE_BACKBONE", False)
    from_scratch = getattr(cfg, "PRETRAIN_WEIGHTS", "").lower() == "none" and not cfg.demo  # the demo sets both
    idle = {"--expanded_scales 1 needs --multi_scale 1": cfg.EXPANDED_SCALES and not cfg.MULTI_SCALE,
            "--cache_dir needs --cache_features 1": getattr(cfg, "CACHE_DIR", "") and not cfg.CACHE_FEATURES,
            "--pretrain_exclude_keys needs other --pretrain_weights than none":
                from_scratch and getattr(cfg, "PRETRAIN_EXCLUDE_KEYS", ()),
            "--backbone_lr and --layer_decay need --freeze_backbone 0": frozen,
            "--gradient_checkpointing 1 needs --freeze_backbone 0":
                frozen and getattr(cfg, "GRADIENT_CHECKPOINTING", False)}
    for text, applies in idle.items():
        if applies:
            processes.say(f"note: without effect here: {text}")


def train(cfg, plan, start, folder, data, loader, compute_losses, *, parameters, best_file=None, epoch_file=None,
          config_file=None, remember=False):
    """Train, then evaluate the best epoch and write results.json, report.html and predictions.png.

    The best epoch is that of the highest mask mAP where the model has a mask head, else of the highest box mAP.

    Args:
        cfg: constants of one of the scripts; plan: of `build_plan`; start: of rfdetr.start; folder: of `begin`.
        data: of `open_splits`; loader: of data["train"].
        compute_losses, parameters: see engine.fit.
        best_file, epoch_file: names in `folder` for the weights alone, of the best and of the latest epoch;
            config_file: name of what the script has written there before.
        remember: on a CPU, validate with what the detector, which is frozen, said before the first epoch
            (features.Remembered); a GPU is quick at that, and its memory is wanted for other things.
    Returns:
        {"run_dir": str, "history", "best_epoch", "best_score", "stopped", "valid": {metric: value}, "test": the same
        or None}, see engine.fit and run_report.final.
    """
    model, with_masks = start.model, start.model.mask_head is not None
    extras = weights.description(model, start.class_names, start.class_rows)
    splits = evaluation_splits(cfg, data, start.resolution)
    remembered = features.Remembered(model) if remember and processes.device().type == "cpu" else None

    to_file = partial(save_weights, extras=extras)
    plan = dataclasses.replace(plan, resume_hint=f"--resume {folder.as_posix()}")
    with run_folder.claimed(folder):
        if remembered:
            remembered.see(splits["valid"].loader)
        result = engine.fit(
            model, loader, compute_losses, plan, output_dir=folder, parameters=parameters,
            score="mask/mAP" if with_masks else "box/mAP",
            evaluate=partial(run_report.scores, loader=splits["valid"].loader, truth=splits["valid"].truth,
                             with_masks=with_masks, remembered=remembered),
            on_best=partial(to_file, path=folder / best_file) if best_file else None,
            on_epoch=partial(to_file, path=folder / epoch_file) if epoch_file else None,
            sample_images=partial(run_report.sample_images, loader=splits["valid"].loader,
                                  class_rows=start.class_rows),
            constants=cfg.as_dict(), extras=extras, last=start.last, written_before=(config_file,),
            own_files=tuple(filter(None, (best_file, epoch_file, config_file, "results.json", "report.html",
                                           "predictions.png"))),
            validated_on=identity(splits["valid"].truth, with_masks), validated_images=data["valid"].image_paths())
        vars(cfg).update(result.get("chosen", {}))  # for results.json
        _require_best(folder, result, best_file, extras)
        return result | run_report.final(model, cfg, folder, splits, start.class_rows, with_masks, result)


def _require_best(folder, result, best_file, extras):
    """Say where a resumed run's best epoch was deleted; write `best_file` again where only that is gone."""
    if not processes.is_main() or not result["history"]:
        return
    if not (folder / "best.pt").is_file():
        processes.say(f"note: {(folder / 'best.pt').as_posix()} of epoch {result['best_epoch']} is no longer there, so "
                      "there is nothing to evaluate; last.pt holds the latest weights")
    elif best_file and not (folder / best_file).is_file():
        checkpoint.save(extras | {"model": checkpoint.load(folder / "best.pt")["model"]}, folder / best_file)


def save_weights(model, history=None, *, extras, path):
    """A checkpoint without the optimizer; extras: of weights.description. engine.fit hands over the history as well."""
    if processes.is_main():
        checkpoint.save(extras | {"model": model.state_dict()}, path)


def new_folder(runs_dir, name):
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
        if [path.name for path in Path(folder).iterdir()] == [run_folder.LOCK]:
            (Path(folder) / run_folder.LOCK).unlink()
        Path(folder).rmdir()


def device_name():
    """-> what the banner calls the device."""
    device = processes.device()
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def amp_precision(no_amp):
    """-> "float32", "bf16" or "fp16": what mixed precision is on this device. A CPU gains nothing from it."""
    if no_amp or processes.device().type != "cuda":
        return "float32"
    return best_precision(PRECISIONS, processes.device())


# ---- data ----------------------------------------------------------------------------------------------------------

def class_names(cfg):
    """-> the data set's class names; prints what was dropped. UserError where a split that the run reads is missing."""
    for split in ("train", "valid", "test") if cfg.RUN_TEST else ("train", "valid"):
        roboflow.split_of(cfg.DATASET_DIR, split)
    names, notes = roboflow.class_names_of(cfg.DATASET_DIR)
    for note in notes:
        processes.say(f"note: {note}")
    return names


def open_dataset(cfg, split, class_rows, resolution, train=False, with_masks=False):
    """-> RoboflowDataset of one split; prints its notes."""
    data = roboflow.RoboflowDataset(cfg.DATASET_DIR, split, class_rows, resolution, train=train, masks=with_masks,
                                    seed=cfg.SEED, augmentation=cfg.AUGMENTATION)
    if split == "valid" and not len(data.labels):
        raise UserError(f"{data.annotations} has no object: nothing to choose the best epoch by")
    for note in data.notes:
        processes.say(f"note: {note}")
    return data


def open_splits(cfg, class_rows, resolution, with_masks=False, augment=True):
    """-> {"train", "valid", with RUN_TEST "test": RoboflowDataset}; only "train" is augmented."""
    found = {split: open_dataset(cfg, split, class_rows, resolution, split == "train" and augment, with_masks)
             for split in (["train", "valid", "test"] if cfg.RUN_TEST else ["train", "valid"])}
    for split in found.keys() - {"train"}:
        if note := roboflow.note_on_shared_images(found["train"], found[split], split):
            processes.say(f"note: {note}")
    return found


def batch_sizes(cfg, size, resolution):
    """-> the sizes that multi-scale training draws from; () without it."""
    if not cfg.MULTI_SCALE:
        return ()
    one = settings(size)
    return batches.multi_scale_sizes(resolution, block_size(size), cfg.EXPANDED_SCALES, one["queries"], one["patch"])


def training_loader(cfg, data, size, resolution):
    """-> loader of `data`, every batch stretched to one size."""
    collate = batches.Collate(resolution, batch_sizes(cfg, size, resolution), cfg.SEED)
    return loaders.training_loader(data, cfg.BATCH, cfg.WORKERS, cfg.SEED, collate=collate)


def _still_batch(cfg):
    """-> images per batch where nothing trains, also with BATCH = 0."""
    return cfg.BATCH or cfg.usual_batch["BATCH"]


class Evaluated(NamedTuple):
    """A split that is scored."""

    loader: torch.utils.data.DataLoader  # in order, always at one resolution
    truth: COCO


def evaluation_splits(cfg, data, resolution):
    """-> {"valid", perhaps "test": Evaluated} of `open_splits`' data."""
    return {split: Evaluated(
                loaders.validation_loader(one, _still_batch(cfg), cfg.WORKERS, collate=batches.Collate(resolution)),
                ground_truth(one.annotations))
            for split, one in data.items() if split != "train"}


def cached_loader(cfg, model, data, resolution):
    """-> training loader over the frozen detector's features of `data` (opened without augmentation, with masks)."""
    if cfg.MULTI_SCALE or cfg.AUGMENTATION != "mirror":
        processes.say("note: cached features are those of one size: no multi-scale, no augmentation but mirroring")
    folder = Path(cfg.CACHE_DIR) if cfg.CACHE_DIR else Path(cfg.RUNS_DIR) / "feature_cache"
    data = features.CachedDataset(folder, model, data, resolution, _still_batch(cfg), cfg.WORKERS)
    return loaders.training_loader(data, cfg.BATCH, cfg.WORKERS, cfg.SEED, collate=features.collate)


# ---- parameters ----------------------------------------------------------------------------------------------------

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
