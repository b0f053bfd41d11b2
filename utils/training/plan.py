"""The plan of a training: every setting stands here once, with its default, meaning, check and usual constant.

A script's `main` makes it before anything expensive (data, networks, folders), so that a mistyped constant ends the
script at once; `engine.fit` and the run's state read it. A new setting is one more field of `Plan`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from utils import fast, processes
from utils.config import UserError
from utils.training import trackers
from utils.training.schedule import SCHEDULES

# {precision: type of autocast}, which is off for float32; all that the engine knows
AUTOCAST = {"float32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(AUTOCAST)
AUTO = "auto"  # a precision that `best_precision` stands in for


# ---- checks: (name as the user knows it, value, Plan) -> None, or UserError ------------------------------------------

def refused(name, value, advice):
    """-> UserError for a constant ("NUM_EPOCHS") or a flag ("--epochs") with a value that cannot be."""
    return UserError(f"{name} {value}: {advice}" if name.startswith("--") else f"{name} = {value!r}: {advice}")


def whole(least, meaning=""):
    """A whole number from `least` on; meaning: what `least` itself stands for, in words."""
    def check(name, value, plan=None):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise refused(name, value, f"choose {least}{f' ({meaning})' if meaning else ''} or more, a whole number")
    return check


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def not_negative(name, value, plan=None):
    """A finite number, 0 or above."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise refused(name, value, "choose a number that is not negative")


def below_one(name, value, plan):
    """A number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise refused(name, value, "choose 0 (none) or a number below 1, such as 0.999")


def inside(name, value, plan):
    """A number in (0, 1)."""
    if not _is_number(value) or not 0 < value < 1:
        raise refused(name, value, "choose a number between 0 and 1, such as 0.5")


def usable_seed(name, value, plan=None):
    """A number that Python, numpy and torch take as a seed."""
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise refused(name, value, f"choose a number from 0 to {2**32 - 1}")


def share(name, value, plan=None):
    """A number in (0, 1]."""
    if not _is_number(value) or not 0 < value <= 1:
        raise refused(name, value, "choose a number above 0, up to 1")


def yes_or_no(name, value, plan):
    """True or False."""
    if not isinstance(value, bool):
        raise refused(name, value, "choose True or False")


def text(name, value, plan):
    """A str."""
    if not isinstance(value, str):
        raise refused(name, value, "give a text")


def rates_per_group(names, values, plan):
    """{constant: rate}, none negative, not all 0."""
    for name, rate in values.items():
        not_negative(name, rate)
    if not any(values.values()):
        raise UserError(f"every learning rate ({', '.join(values)}) is 0: nothing would train")


def weights_of_losses(names, values, plan):
    """{name of the loss: weight}, none negative, not all 0."""
    for loss, weight in values.items():
        not_negative(names.get(loss, f"the weight of the loss '{loss}'"), weight)
    if not any(values.values()):
        which = f" ({', '.join(names.values())})" if names else ""
        raise UserError(f"every loss weight is 0{which}: there is nothing to train on")


def known_schedule(name, value, plan):
    """One of SCHEDULES; "plateau" only where the script names a metric for it."""
    known = [kind for kind in SCHEDULES if kind != "plateau" or plan.plateau_metric]
    if value not in known:
        raise refused(name, value, f"choose one of {', '.join(known)}")


def shares_of_the_run(name, value, plan):
    """Shares of the run, asked for where the schedule is "step"."""
    if plan.schedule == "step" and not (isinstance(value, (tuple, list)) and value
                                        and all(_is_number(share) and 0 < share < 1 for share in value)):
        raise refused(name, value, "choose shares of the run between 0 and 1, such as (0.5, 0.75)")


def known_precisions(name, value, plan):
    """Some of PRECISIONS."""
    if not value or not set(value) <= set(PRECISIONS):
        raise refused(name, value, f"choose some of {', '.join(PRECISIONS)}")


def usable_precision(name, value, plan):
    """One of the plan's precisions, and one that this GPU computes in."""
    if value not in plan.precisions:
        raise refused(name, value, f"choose one of {', '.join((AUTO, *plan.precisions))}")
    if (value == "bf16" and torch.cuda.is_available()
            and not torch.cuda.is_bf16_supported(including_emulation=False)):
        raise refused(name, value, f"{torch.cuda.get_device_name()} has no bf16 (GPUs from Ampere on have); choose "
                                   "float32")


def known_speedups(name, value, plan):
    """Some of fast.TRAINING."""
    fast.require(name, value, fast.TRAINING)


def known_trackers(name, value, plan):
    """Some of trackers.KNOWN, installed."""
    trackers.require(name, value)


# ---- the plan ------------------------------------------------------------------------------------------------------

def setting(constant, check, **default):
    """A field of Plan. constant: its usual name in a script; check: of the above; default: `default=`, or none."""
    return dataclasses.field(metadata={"constant": constant, "check": check}, **default)


@dataclass(frozen=True)
class Plan:
    """What `engine.fit` needs to know besides functions, parameters and folders. Checked when it is made.

    Scripts make one with `Plan.of`. `dataclasses.replace(plan, epochs=3)` makes a changed one, checked again.

    Raises:
        UserError: a value that cannot be, by the name of the constant or flag that the user has set.
    """

    # passes over the training data
    epochs: int = setting("NUM_EPOCHS", whole(1))
    # {constant: learning rate}; the rates themselves stand in the parameter groups that the script hands to `fit`
    learning_rates: dict = setting(None, rates_per_group)
    # {name of a loss: weight}: these of the losses are weighted and summed, others are only reported
    loss_weights: dict = setting(None, weights_of_losses)

    # of the script's parameter groups
    weight_decay: float = setting("WEIGHT_DECAY", not_negative, default=0.0)
    # of the script's loaders: images per batch and process (0: `engine.fit` finds the most that fit, see
    # training/batch_trial.py), those of a validation batch, processes that load images
    batch_size: int = setting("BATCH_SIZE", whole(0, "the most that fit"), default=1)
    eval_batch_size: int = setting("EVAL_BATCH_SIZE", whole(1), default=1)
    workers: int = setting("DATALOADER_WORKERS", whole(0), default=0)

    # the batch that the script's other settings were made for: with batch_size 0 its product with `accumulate` stays
    usual_batch: int = setting(None, whole(1), default=1)

    # batches per optimizer step; the last, smaller group of an epoch counts as well
    accumulate: int = setting("GRADIENT_ACCUMULATION_STEPS", whole(1), default=1)
    # limit of the gradient's norm, 0 for none
    clip_norm: float = setting("CLIP_NORM", not_negative, default=0.0)
    # optimizer steps of linear warm-up, and what follows them: see `schedule.schedule_factor`
    warmup_steps: int = setting("WARMUP_STEPS", whole(0), default=0)
    schedule: str = setting("SCHEDULE", known_schedule, default="cosine")
    # shares of the run at which the schedule "step" halves the learning rate
    milestones: tuple = setting("DECAY_AT", shares_of_the_run, default=(0.5, 0.75, 0.9))
    # the schedule "plateau": a metric of `evaluate` that should fall ("" where a script has none), epochs without a
    # lower one that are put up with, what the learning rate is then multiplied by; see `schedule.plateau_factor`
    plateau_metric: str = setting(None, text, default="")
    plateau_patience: int = setting("PLATEAU_PATIENCE", whole(0), default=5)
    plateau_factor: float = setting("PLATEAU_FACTOR", inside, default=0.5)
    # one of `precisions`; "bf16" and "fp16" are autocast (weights and losses stay float32), "fp16" with a scaled loss;
    # a script's "auto" is one of them by the time that there is a plan
    precision: str = setting("PRECISION", usable_precision, default="float32")
    # what the network stands: all networks here train in bf16, few in fp16
    precisions: tuple = setting(None, known_precisions, default=("float32", "bf16"))
    # what makes a GPU faster, see utils/fast.py
    fast: tuple = setting("FAST", known_speedups, default=())
    # decay of a moving average of the trained weights, 0 for none. The average is then what is evaluated, handed to
    # `on_best` and kept as best.pt; last.pt holds both
    ema: float = setting("EMA_DECAY", below_one, default=0.0)
    # epochs without a better score before the run stops
    patience: int = setting("EARLY_STOPPING_PATIENCE", whole(0, "never stop early"), default=0)

    # where the curves of the run go, see training/trackers.py
    trackers: tuple = setting("TRACKERS", known_trackers, default=("tensorboard",))
    # optimizer steps between two writes of last.pt within an epoch
    checkpoint_steps: int = setting("CHECKPOINT_STEPS", whole(1), default=200)
    # go on from last.pt (from the start where there is none), and how a user says that
    resume: bool = setting("RESUME", yes_or_no, default=False)
    resume_hint: str = setting(None, text, default="RESUME = True")

    # {field: the script's name for it}, of `loss_weights` {loss: name}; where it says nothing the usual one holds
    names: dict = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self):
        for one in settings():
            one.metadata["check"](self.name_of(one.name), getattr(self, one.name), self)

    def name_of(self, field):
        """-> the constant or flag that sets a field, for messages; of `loss_weights` {loss: name}."""
        usual = {one.name: one.metadata["constant"] or one.name for one in settings()} | {"loss_weights": {}}
        return self.names.get(field, usual[field])

    @classmethod
    def of(cls, cfg, given=None, learning_rates=("LEARNING_RATE",), loss_weights=None, **names):
        """The plan of a script's resolved constants.

        A field takes its value from `given`, else from the constant that `names` names, else from the constant with the
        usual name, and where cfg has none of these from its default.

        Args:
            cfg: config.Config; a precision "auto" in it becomes the one that is chosen, so that whatever keeps the
                constants keeps that.
            given: {field: value} of what no constant alone sets.
            learning_rates: names of the constants with the learning rates.
            loss_weights: {loss: name of the constant with its weight, or the weight itself}; losses with the weight 0
                are left out of the plan.
            names: {field: the script's own name for it}, a constant ("EPOCHS") or, where users know it as a flag, that
                ("--epochs").
        """
        if unknown := names.keys() - {one.name for one in settings()}:
            raise TypeError(f"Plan has no {', '.join(sorted(unknown))}")
        sources = loss_weights or {}
        weights = {loss: _constant(cfg, source) if isinstance(source, str) else source
                   for loss, source in sources.items()}
        values = {"learning_rates": {name: _constant(cfg, name) for name in learning_rates},
                  "loss_weights": {loss: weight for loss, weight in weights.items() if weight}}
        for one in settings():
            usual = one.metadata["constant"]
            if one.name in names:
                values[one.name] = _constant(cfg, names[one.name])
            elif usual and hasattr(cfg, usual):
                values[one.name] = getattr(cfg, usual)
        names["loss_weights"] = {loss: source for loss, source in sources.items() if isinstance(source, str)}
        values |= given or {}
        batch = names.get("batch_size", "BATCH_SIZE").removeprefix("--").upper()
        if batch in (usual := getattr(cfg, "usual_batch", {})):
            values.setdefault("usual_batch", usual[batch])
        if values.get("precision") == AUTO:
            precisions = values.get("precisions", cls.precisions)
            cfg.PRECISION = values["precision"] = best_precision(precisions, processes.device())
            processes.say(f"PRECISION = '{AUTO}': {cfg.PRECISION}")
        return cls(**values, names=names)


def settings():
    """-> the fields of Plan that are settings."""
    return [one for one in dataclasses.fields(Plan) if one.metadata]


def best_precision(precisions, device):
    """-> the fastest of some PRECISIONS that a device computes in by itself: bf16, on GPUs without it fp16, float32."""
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    else:
        half = "float32" if processes.bf16_is_emulated(device) else "bf16"
    return half if half in precisions else "float32"


def _constant(cfg, name):
    """-> the value of a constant, also by its flag: "--epochs" is EPOCHS."""
    return getattr(cfg, name.removeprefix("--").upper())
