"""What a run of RF-DETR starts from: an earlier run, published weights, a checkpoint, or nothing.

Every file is read once: its content is handed on, from here to engine.fit.
"""

from pathlib import Path
from typing import NamedTuple

from rfdetr import run_report, weights
from rfdetr.config import default_resolution, mask_head_of
from rfdetr.model import RFDETR
from utils import freeze, processes, system
from utils.config import UserError
from utils.datasets.annotations import plain_name
from utils.next_command import pasted


class Start(NamedTuple):
    """The model at the start of a run, and what the run has to know of it."""

    model: RFDETR
    class_names: list         # of the data set, in its order
    class_rows: dict          # {class name: row of the class head}
    resolution: int           # side of the square input
    last: dict | None = None  # content of last.pt where an earlier run goes on


def new_detector(cfg, last, class_names, resolution, seg_head=None):
    """The whole model to train: an earlier run's, or one with published, earlier or random weights.

    With FREEZE_BACKBONE its ViT is frozen.

    Args:
        cfg: constants of stage 1 or of the single stage; last: content of the earlier run's last.pt, or None.
        class_names: of the data set; resolution: side of the square input.
        seg_head: None, or the mask head, one of config.SEG_HEADS.
    Returns:
        Start. Rows of its class head: 91 with COCO weights, as many as an earlier checkpoint has, and one per class
        plus one for the background from scratch.
    Raises:
        UserError: weights that are not there, not reachable, or of another network.
    """
    if last:
        _require_same_classes(cfg, last, class_names)
        # engine.fit loads the weights, and checks that the frozen ones are those of last.pt
        model = weights.load_detector(last)[0] if cfg.FREEZE_BACKBONE else RFDETR(**last["args"])
        return Start(_prepared(model, cfg), class_names, last["class_rows"], resolution, last)
    source = _pretrained(cfg)
    new = with_weights(source, cfg.SIZE, class_names, resolution, seg_head, cfg.PRETRAIN_EXCLUDE_KEYS)
    if source:
        processes.say(f"weights: {source.name} ({new.loaded['loaded']} tensors)")
        if new.loaded["left_out"]:
            processes.say(f"note: {len(new.loaded['left_out'])} tensors start anew: "
                          f"{system.listed(new.loaded['left_out'], 4)}")
    processes.say(_class_head_line(new.class_rows, new.model.model_args["num_rows"], new.known))
    return Start(_prepared(new.model, cfg), class_names, new.class_rows, resolution)


def _prepared(model, cfg):
    """-> the model, its ViT frozen, or computing its blocks twice, if the constants say so."""
    if cfg.FREEZE_BACKBONE:
        freeze.freeze(model.vit)
    if cfg.GRADIENT_CHECKPOINTING:
        model.checkpoint_blocks()
    return model


class WithWeights(NamedTuple):
    """A new model, and what it took over."""

    model: RFDETR
    class_rows: dict     # {class name: row of the class head}
    known: dict | None   # {class name: row} of the weights, None from scratch
    loaded: dict | None  # of weights.load_pretrained


def with_weights(source, size, class_names, resolution, seg_head=None, exclude=()):
    """-> WithWeights of a size; what validate_setup.py tries and a training does.

    Args:
        source: weights.Checkpoint, None from scratch; class_names: of the data set; seg_head: of `new_detector`;
        exclude: of load_pretrained.
    Raises:
        UserError: weights of another size or with another mask head, or with fewer rows than there are classes.
    """
    if source:
        weights.require_size(source, size)
    rows, known = weights.rows_of(source) if source else (len(class_names) + 1, None)
    class_rows = weights.assign_rows(class_names, rows, known or {})
    model = RFDETR(size, rows, resolution, mask_head=mask_head_of(size, seg_head) if seg_head else None)
    return WithWeights(model, class_rows, known, weights.load_pretrained(model, source, exclude) if source else None)


def _require_same_classes(cfg, last, class_names):
    """UserError unless the data set has the classes of the run that goes on."""
    if set(class_names) != set(last["class_rows"]):
        raise UserError(f"--resume {Path(cfg.RESUME).as_posix()} was trained on the classes "
                        f"{system.listed(last['class_rows'], 8)}, --dataset_dir {Path(cfg.DATASET_DIR).as_posix()} has "
                        f"{system.listed(class_names, 8)}: give that run's data set, or start a new run without "
                        "--resume")


def _pretrained(cfg):
    """-> weights.Checkpoint that PRETRAIN_WEIGHTS names, None for a start from scratch."""
    choice = cfg.PRETRAIN_WEIGHTS
    if choice.lower() == "none":
        return None
    return weights.read(weights.fetch(cfg.SIZE) if choice.lower() == "coco" else choice)


def _class_head_line(class_rows, rows, known):
    """-> which of the `rows` rows each class trains on, and which classes the weights do not know; known: {name: row}
    of the weights, None from scratch."""
    row_of = {plain_name(name): row for name, row in (known or {}).items()}
    unknown = [name for name, row in class_rows.items() if row_of.get(plain_name(name)) != row]
    shown = system.listed([f"{name} -> row {row}" for name, row in class_rows.items()], 12)
    return (f"class head of {rows} rows: {shown}"
            + (f"; not known to the weights: {system.listed(unknown)}" if known is not None and unknown else ""))


# ---- stage 2 -------------------------------------------------------------------------------------------------------

def stage1_checkpoint(cfg):
    """-> Path of the detector to freeze: CHECKPOINT, else STAGE1_RUN's best.pt or last.pt; with RESUME its own."""
    if cfg.RESUME:
        return Path(cfg.RESUME) / "last.pt"
    if cfg.CHECKPOINT:
        if problem := system.absent(cfg.CHECKPOINT):
            raise UserError(f"--checkpoint {Path(cfg.CHECKPOINT).as_posix()} {problem}: give the file that "
                            "shrink_head.py wrote, or leave it out to take --stage1_run's best.pt")
        if cfg.STAGE1_RUN and not Path(cfg.CHECKPOINT).resolve().is_relative_to(Path(cfg.STAGE1_RUN).resolve()):
            processes.say(f"note: --stage1_run {Path(cfg.STAGE1_RUN).as_posix()} has no effect: the detector is "
                          f"--checkpoint {Path(cfg.CHECKPOINT).as_posix()}, which does not lie in it")
        return Path(cfg.CHECKPOINT)
    if not cfg.STAGE1_RUN:
        raise UserError("which detector? Give --stage1_run runs/detector_<size>_<resolution>_<n> (and the shrunken "
                        "file as --checkpoint), or try --demo")
    if Path(cfg.STAGE1_RUN).is_file():
        raise UserError(f"--stage1_run {Path(cfg.STAGE1_RUN).as_posix()} is a file: give the folder of the run, and a "
                        "file as --checkpoint")
    for name in ("best.pt", "last.pt"):
        if (Path(cfg.STAGE1_RUN) / name).is_file():
            return Path(cfg.STAGE1_RUN) / name
    if problem := system.absent(cfg.STAGE1_RUN, folder=True):
        there = sorted(path.as_posix() for path in Path(cfg.RUNS_DIR).glob(f"detector_{cfg.SIZE}_*"))
        raise UserError(f"--stage1_run {Path(cfg.STAGE1_RUN).as_posix()} {problem}: give the folder of a run of "
                        "train_detector_stage1.py"
                        + (f" ({Path(cfg.RUNS_DIR).as_posix()} has {system.listed(there)})" if there else ""))
    raise UserError(f"No checkpoint found in Stage-1 directory {Path(cfg.STAGE1_RUN).as_posix()}: there is neither "
                    "best.pt nor last.pt. Did train_detector_stage1.py finish an epoch?")


def frozen_detector_with_masks(cfg, last, source, class_names):
    """The detector of stage 1, frozen, with a new mask head; of an earlier run of stage 2 its own.

    Args:
        cfg: constants of stage 2; last: content of the earlier run's last.pt, or None.
        source: Path, of `stage1_checkpoint`; class_names: of the data set.
    Returns:
        Start.
    Raises:
        UserError: another size, a head that was not shrunk to the data set's classes, other classes.
    """
    if last:  # with its weights: engine.fit checks that the frozen ones are those of last.pt
        _require_same_classes(cfg, last, class_names)
        model, found = weights.load_detector(last)
        freeze.freeze(model.detector)
        return Start(model, class_names, found["class_rows"], found["args"]["resolution"], last)
    given = weights.read(source)
    args, known = weights.model_args_of(given), weights.rows_of(given)[1]
    _require_stage2_fit(cfg, source, args, known, class_names)
    resolution = cfg.RESOLUTION or args.get("resolution") or default_resolution(cfg.SIZE)
    model = RFDETR(cfg.SIZE, args["num_rows"], resolution, mask_head=mask_head_of(cfg.SIZE))
    weights.load_pretrained(model, given)
    freeze.freeze(model.detector)
    return Start(model, class_names, {name: known[name] for name in class_names}, resolution)


def _require_stage2_fit(cfg, source, args, known, class_names):
    """UserError unless a checkpoint of these model arguments and known classes is a detector of the data set's."""
    if args["size"] != cfg.SIZE:
        raise UserError(f"--size {cfg.SIZE}, but {source.as_posix()} holds a detector of size {args['size']}")
    best = source.parent / "checkpoint_best_regular.pth"  # stage 1's best weights, if they are still there
    shrink = run_report.shrink_command(best if best.is_file() else source, class_names)
    whole = weights.rows_of(best)[1] if best.is_file() and best != source else known
    if unknown := [name for name in class_names if name not in whole]:
        raise UserError(f"{source.as_posix()} knows {system.listed(whole, 8)}, but not {system.listed(unknown, 8)} of "
                        "the data set: train stage 1 on this data set first (train_detector_stage1.py --dataset_dir "
                        f"{pasted(Path(cfg.DATASET_DIR))})")
    if args["num_rows"] != len(class_names) + 1:
        raise UserError(f"Frozen detector head out_dim ({args['num_rows']}) != requested ({len(class_names) + 1}): cut "
                        "the head to the data set's classes first, then give the new file as --checkpoint:\n"
                        f"  {shrink}")
    if unknown := [name for name in class_names if name not in known]:
        raise UserError(f"{source.as_posix()} knows {', '.join(known)}, but not {', '.join(unknown)} of the data set. "
                        f"Cut the head of the stage-1 checkpoint to these classes:\n  {shrink}")
