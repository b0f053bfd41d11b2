"""The settings of a training, checked in one place."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.config import UserError
from utils.training.schedule import SCHEDULES

PRECISIONS = ("float32", "bf16")  # what every network here stands; fp16 is for those that say so
DECAY_AT = (0.5, 0.75, 0.9)  # shares of the run at which SCHEDULE = "step" halves the rate, where a script names none


def require_settings(*, epochs, rates, loss_weights, accumulate, clip_norm, warmup_steps, schedule, precision, ema,
                     checkpoint_steps, patience=None, milestones=DECAY_AT, plateau=None, precisions=PRECISIONS,
                     decays=()):
    """UserError for what `fit` refuses; rates, decays: learning rates and weight decays of the parameter groups."""
    known_schedules = SCHEDULES if plateau else [name for name in SCHEDULES if name != "plateau"]
    for name, value, known in (("PRECISION", precision, precisions), ("SCHEDULE", schedule, known_schedules)):
        if value not in known:
            raise UserError(f"{name} = {value!r}: choose one of {', '.join(known)}")
    if (precision == "bf16" and torch.cuda.is_available()
            and not torch.cuda.is_bf16_supported(including_emulation=False)):
        raise UserError(f"PRECISION = 'bf16': {torch.cuda.get_device_name()} has no bf16 (GPUs from Ampere on have); "
                        "choose float32")
    for name, value in (("NUM_EPOCHS", epochs), ("GRADIENT_ACCUMULATION_STEPS", accumulate),
                        ("CHECKPOINT_STEPS", checkpoint_steps)):
        if value < 1:
            raise UserError(f"{name} = {value}: choose 1 or more")
    if (patience or 0) < 0:
        raise UserError(f"EARLY_STOPPING_PATIENCE = {patience}: choose 0 (never stop early) or more")
    if schedule == "step" and not (isinstance(milestones, (tuple, list)) and milestones
                                   and all(0 < share < 1 for share in milestones)):
        raise UserError(f"DECAY_AT = {milestones}: choose shares of the run between 0 and 1, such as (0.5, 0.75)")
    if not 0 <= ema < 1:
        raise UserError(f"EMA_DECAY = {ema}: choose 0 (no average) or a number below 1, such as 0.999")
    if rates and not any(rates):
        raise UserError("every learning rate (LEARNING_RATE, or the constants that end in _LR) is 0: nothing would "
                        "train")
    for what, value in [*(("a learning rate (LEARNING_RATE, or a constant that ends in _LR)", rate) for rate in rates),
                        *(("a weight decay (WEIGHT_DECAY)", d) for d in decays),
                        *((f"the weight of the loss '{name}'", weight) for name, weight in loss_weights.items()),
                        ("CLIP_NORM", clip_norm or 0.0), ("WARMUP_STEPS", warmup_steps)]:
        if not 0 <= value < math.inf:
            raise UserError(f"{what} is {value}: choose a number that is not negative")


@dataclass(frozen=True)
class Settings:
    """The arguments of `engine.fit` that are plain data; they are explained there. `folder` is its output_dir."""

    folder: Path
    epochs: int
    loss_weights: dict
    score: str | None
    accumulate: int
    clip_norm: float | None
    schedule: str
    warmup_steps: int
    milestones: tuple
    plateau: tuple | None
    precision: str
    ema: float
    constants: dict
    extras: dict
    resume_hint: str
    checkpoint_steps: int
    own_files: tuple
