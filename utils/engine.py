"""The one training loop: every script calls `fit`, two phases are two calls.

It runs on Hugging Face Accelerate, so `torchrun script.py` and `accelerate launch script.py` make the same script
multi-GPU. What a run needs in order to go on after a kill is in OUTPUT_DIR/last.pt, see `_Run.state`.
"""

import math
import random
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import checkpoint, datasets, freeze, processes, report, visualize
from utils.clock import Clock
from utils.config import UserError
from utils.ema import WeightAverage
from utils.schedule import SCHEDULES, plateau_factor, schedule_factor

PRECISIONS = ("float32", "bf16")  # what every network here stands; fp16 is for those that say so
_AUTOCAST = {"float32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}  # off for float32
OWN_FILES = ("last.pt", "best.pt", "metrics.json", "curves.png", "tb")  # what fit writes into the output folder


def seed_everything(seed):
    """Seed Python, numpy and torch (initial weights, dropout); data has its own seeds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- the loop --------------------------------------------------------------------------------------------------

def fit(model, loader, compute_losses, *, output_dir, epochs, parameters, loss_weights, evaluate=None, score=None,
        on_best=None, sample_images=None, accumulate=1, clip_norm=None, warmup_steps=0, schedule="cosine",
        milestones=(), plateau=None, precision="float32", precisions=PRECISIONS, optimizer=torch.optim.AdamW,
        patience=None, stop=None, on_epoch=None, ema=0.0, constants=None, extras=None, resume=False,
        resume_hint="RESUME = True", checkpoint_steps=200, own_files=()):
    """Train `model` and keep the best epoch.

    Args:
        model: nn.Module; frozen parts went through `freeze.freeze` and are checked to come out bit-identical.
        loader: from `loaders.training_loader`.
        compute_losses: (model, batch) -> {name: scalar Tensor}. Names in `loss_weights` are weighted and summed, the
            others are only reported. Under torchrun `model` is the distributed wrapper: call it, do not reach inside
            for a trainable part.
        parameters: groups for the optimizer, [{"params": [...], "lr": float, "weight_decay": float}, ...].
        loss_weights: {name: float}.
        evaluate: (plain model in eval mode) -> {name: float}; called after every epoch on every rank.
        score: the metric that "best" and early stopping go by (higher is better); None keeps the last epoch.
        on_best: (plain model) -> None, writes the script's own output; main process only.
        sample_images: (plain model) -> {tag: (3, H, W) float image in [0, 1]} for TensorBoard.
        accumulate: batches per optimizer step; the last, smaller group of an epoch counts as well.
        clip_norm: limit of the gradient's norm, 0 or None for none.
        warmup_steps, schedule, milestones: see `schedule_factor`, in optimizer steps.
        plateau: for schedule "plateau", (name of a metric that should fall, patience, factor): see `plateau_factor`.
        precision: one of `precisions`; "bf16" and "fp16" are autocast (weights and losses stay float32), "fp16" with
            a scaled loss.
        optimizer: (groups, weight_decay=0.0) -> torch optimizer.
        patience: epochs without a better score before the run stops, None for never.
        stop: (history) -> why the run should end, or None; asked before every epoch, after a resume as well.
        on_epoch: (plain model in eval mode, history) -> None, called when the epoch is saved; every rank.
        ema: decay of a moving average of the trained weights (see `WeightAverage`), which is then what is evaluated,
            handed to `on_best` and kept as best.pt; 0: without. last.pt holds both.
        constants: {name: value}, stored in checkpoints; a resumed run reports those that differ.
        extras: {key: tensors, numbers, strings}, further entries of last.pt and best.pt.
        resume: go on from output_dir/last.pt (from the start where there is none); resume_hint: how a user says that.
        checkpoint_steps: optimizer steps between two writes of last.pt within an epoch.
        own_files: names that `on_best` writes into output_dir; a new start moves them aside with the rest.
    Returns:
        {"history": [{"epoch": 1, ...}, ...], "best_epoch": int, "best_score": float or None, "stopped": str}.
    Raises:
        UserError: nothing to train, a loss that is not finite, an unwritable folder.
        RuntimeError: a frozen module has changed (a bug in a script, never the user's mistake).
    """
    require_settings(epochs=epochs, rates=[group["lr"] for group in parameters], loss_weights=loss_weights,
                     accumulate=accumulate, clip_norm=clip_norm, warmup_steps=warmup_steps, schedule=schedule,
                     plateau=plateau, precision=precision, precisions=precisions, ema=ema,
                     checkpoint_steps=checkpoint_steps,
                     decays=[group.get("weight_decay", 0.0) for group in parameters])
    run = _Run(model, loader, compute_losses, Path(output_dir), epochs, parameters, loss_weights, score, accumulate,
               clip_norm, schedule, warmup_steps, milestones, plateau, precision, optimizer, ema,
               constants or {}, extras or {}, resume_hint, checkpoint_steps, own_files)
    run.prepare(resume)
    stopped = "all epochs done"
    with _Interrupts() as run.interrupts:
        while run.epoch < epochs:
            if patience is not None and run.bad_epochs >= patience:
                stopped = f"no better {score} in {patience} epochs"
                break
            if stop and run.history and (reason := stop(run.history)):
                stopped = reason
                break
            record = train_one_epoch(run)
            if record is None:
                stopped = "interrupted"
                break
            plain = run.accelerator.unwrap_model(run.model)
            plain.eval()
            processes.same_buffers(plain)  # BatchNorm statistics are each rank's own, and rank 0's are saved
            with run.average.applied() if run.average else nullcontext():
                if run.average:
                    processes.same_buffers(plain)  # now the average's
                with torch.no_grad():
                    record.update(evaluate(plain) if evaluate else {})
                    pictures = sample_images(plain) if sample_images and run.main else {}
                run.finish_epoch(record, plain, pictures, on_best)
            run.save_last()
            run.accelerator.wait_for_everyone()
            if on_epoch:
                with torch.no_grad():
                    on_epoch(plain, run.history)
    run.close(stopped)
    return {"history": run.history, "best_epoch": run.best_epoch, "best_score": run.best_score, "stopped": stopped}


def require_settings(*, epochs, rates, loss_weights, accumulate, clip_norm, warmup_steps, schedule, precision, ema,
                     checkpoint_steps, plateau=None, precisions=PRECISIONS, decays=()):
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
    if not 0 <= ema < 1:
        raise UserError(f"EMA_DECAY = {ema}: choose 0 (no average) or a number below 1, such as 0.999")
    for what, value in [*(("a learning rate", rate) for rate in rates), *(("a weight decay", d) for d in decays),
                        *((f"the weight of the loss '{name}'", weight) for name, weight in loss_weights.items()),
                        ("CLIP_NORM", clip_norm or 0.0), ("WARMUP_STEPS", warmup_steps)]:
        if not 0 <= value < math.inf:
            raise UserError(f"{what} is {value}: choose a number that is not negative")


def train_one_epoch(run):
    """One pass over the loader, or the rest of one after a resume. -> the epoch's record, None after Ctrl+C."""
    model, accelerator, clock = run.model, run.accelerator, run.clock
    model.train()
    run.loader.batch_sampler.start_at(run.epoch, run.batch)
    bar = tqdm(total=len(run.loader.batch_sampler), initial=run.batch, desc=f"epoch {run.epoch + 1}/{run.epochs}",
               ascii=True, dynamic_ncols=True, disable=None if run.main else True, leave=False)
    clock.start()
    for batch in run.loader:
        if accelerator.process_index:  # rank 0's stream is saved and restored; the others' follow from where they are
            torch.manual_seed(run.seed + (accelerator.process_index << 40) + (run.epoch << 24) + run.batch)
        batch = datasets.to_device(batch, accelerator.device)
        clock.lap("data")
        first = run.batch - run.batch % run.accumulate
        group = min(run.accumulate, len(run.loader.batch_sampler) - first)  # the last group may be smaller
        last_of_group = run.batch + 1 == first + group

        with nullcontext() if last_of_group else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, _AUTOCAST[run.precision], run.precision != "float32"):
                losses = run.compute_losses(model, batch)
            total = sum(weight * losses[name].float() for name, weight in run.loss_weights.items())
            require_finite(total, losses, run, batch)
            clock.lap("forward")
            accelerator.backward(run.scaler.scale(total / group))
            clock.lap("backward")

        if last_of_group:
            run.scaler.unscale_(run.optimizer)
            if run.clip_norm:
                accelerator.clip_grad_norm_(run.trainable, run.clip_norm)
            rate = run.set_learning_rates()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            if run.average:
                run.average.update(run.step)
            clock.lap("step")

        run.batch += 1
        run.add_up(losses, total, len(batch["images"]))
        if last_of_group:
            run.log_step(bar, rate)
            interrupted = processes.any_of(run.interrupts.asked)  # all ranks stop at the same step
            if interrupted or run.step % run.checkpoint_steps == 0:
                run.save_last()
                clock.lap("save")
            if interrupted:
                bar.close()
                return None
        bar.update()
    bar.close()
    return run.epoch_record()


def require_finite(total, losses, run, batch):
    """Stop at the first loss that is not finite, naming the losses and the images."""
    if torch.isfinite(total):
        return
    values = ", ".join(f"{name}={value.item():.4g}" for name, value in losses.items())
    raise UserError(f"the loss is not finite in epoch {run.epoch + 1}, batch {run.batch + 1} ({values}; images "
                    f"{', '.join(batch['paths'][:4])}). Lower the learning rate, raise WARMUP_STEPS, or train in "
                    "float32 where this was fp16; "
                    f"{(run.folder / 'last.pt').as_posix()} holds the last good weights.")


class _Run:
    """The state of one `fit`: what is saved, what is counted, what is written."""

    def __init__(self, model, loader, compute_losses, folder, epochs, parameters, loss_weights, score, accumulate,
                 clip_norm, schedule, warmup_steps, milestones, plateau, precision, optimizer, ema, constants, extras,
                 resume_hint, checkpoint_steps, own_files):
        self.accelerator = processes.accelerator()
        self.main = self.accelerator.is_main_process
        self.model, self.loader, self.compute_losses = model, loader, compute_losses
        self.folder, self.epochs, self.loss_weights, self.score = folder, epochs, loss_weights, score
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self.schedule, self.warmup_steps, self.milestones, self.plateau = schedule, warmup_steps, milestones, plateau
        self.precision, self.constants, self.checkpoint_steps = precision, constants, checkpoint_steps
        self.own_files, self.ema, self.extras, self.resume_hint = own_files, ema, extras, resume_hint
        self.trainable = [p for group in parameters for p in group["params"]]
        if not self.trainable or not any(p.requires_grad for p in self.trainable):
            raise UserError("nothing to train: every parameter is frozen")
        self.optimizer = optimizer(parameters, weight_decay=0.0)  # AdamW is Adam then, unless a group says otherwise
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = self.batch = self.step = self.bad_epochs = self.best_epoch = 0
        self.best_score, self.history, self.sums = None, [], {}
        self.clock = Clock(self.accelerator.device)
        self.seed = torch.initial_seed() % 2**24  # of the ranks' own randomness, see train_one_epoch
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=precision == "fp16")

    @property
    def total_steps(self):
        return self.epochs * math.ceil(len(self.loader.batch_sampler) / self.accumulate)

    def prepare(self, resume):
        """Check the folder, load or set aside an earlier run, wrap model and optimizer."""
        if self.main:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**20
            # last.pt (Adam: 3 times the weights, the average once more) twice while it is replaced, and best.pt
            checkpoint.require_writable(self.folder, megabytes=(11 if self.ema else 8) * size + 50)
            if not resume:
                set_aside(self.folder, (*OWN_FILES, *self.own_files), self.resume_hint)
            for leftover in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.accelerator.wait_for_everyone()
        self.frozen = {name: (module, freeze.fingerprint(module))
                       for name, module in freeze.frozen_modules(self.model).items()}
        content = None
        if resume and (self.folder / "last.pt").is_file():
            content = checkpoint.load(self.folder / "last.pt")
            checkpoint.load_into(self.model, content["model"], (self.folder / "last.pt").as_posix())
            for name, (module, before) in self.frozen.items():
                if freeze.fingerprint(module) != before:
                    raise UserError(f"{(self.folder / 'last.pt').as_posix()} was trained with another frozen {name}: "
                                    f"resume with the weights of that run, or start anew without {self.resume_hint}")
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.average = None
        if self.ema:
            weights = [p for p in self.trainable if p.requires_grad]
            self.average = WeightAverage(weights + freeze.running_statistics(self.model), self.ema)
        if content:
            self._restore(content)
        elif resume and self.main:
            print(f"nothing to resume in {self.folder.as_posix()}, starting from the beginning")
        self.writer = SummaryWriter(self.folder / "tb", purge_step=self.step) if self.main else None

    def state(self):
        """-> what last.pt holds: numbers, strings and tensors only."""
        plain = self.accelerator.unwrap_model(self.model)
        return self.extras | {
            "model": plain.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else [],
            "model_args": getattr(plain, "model_args", {}), "constants": self.constants,
            "epoch": self.epoch, "batch": self.batch, "batches": len(self.loader.batch_sampler),
            "step": self.step, "bad_epochs": self.bad_epochs,
            "best_score": self.best_score, "best_epoch": self.best_epoch, "history": self.history,
            "scaler": self.scaler.state_dict(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def _restore(self, content):
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise UserError(f"{(self.folder / 'last.pt').as_posix()} was trained with other trainable parts ({error}): "
                            f"resume with that run's constants, or start anew without {self.resume_hint}") from error
        for name in ("epoch", "batch", "step", "bad_epochs", "best_score", "best_epoch", "history", "sums"):
            setattr(self, name, content[name])
        if self.average:
            self.average.load(content.get("average") or self.average.tensors)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["torch_rng"].cpu())
        if content["cuda_rng"] and torch.cuda.device_count() == len(content["cuda_rng"]):
            torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_rng"]])
        if not self.main:
            self.sums = {}  # the saved sums are those of all ranks
        if self.batch and (content["batches"] != len(self.loader.batch_sampler) or self.batch % self.accumulate
                           and self.batch != content["batches"]):
            processes.say("note: batch size, accumulation, data or number of processes have changed: "
                          f"epoch {self.epoch + 1} starts again")
            self.batch, self.sums = 0, {}
        if self.main:
            print(f"resuming {self.folder.as_posix()} at epoch {self.epoch + 1}, batch {self.batch + 1}")
            earlier = content["constants"]
            for name, value in self.constants.items():
                if name != "RESUME" and earlier.get(name, "unknown") != value:
                    print(f"  note: {name} was {earlier.get(name, 'unknown')!r}, is now {value!r}")

    def save_last(self):
        """Write last.pt, from which a killed run goes on; every rank calls it, the main one writes."""
        state = self.state() | {"sums": self.sums_of_all()}
        if self.main:
            checkpoint.save(state, self.folder / "last.pt")

    def sums_of_all(self):
        """-> {name: sum over images}, "images": of every rank; every rank calls it."""
        sums = {}
        for part in gather_object([self.sums]):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def set_learning_rates(self):
        factor = schedule_factor(self.schedule, self.step, self.total_steps, self.warmup_steps, self.milestones)
        if self.schedule == "plateau":
            name, patience, cut = self.plateau
            factor *= plateau_factor([record[name] for record in self.history], patience, cut)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        return self.base_rates[0] * factor

    def add_up(self, losses, total, images):
        values = {name: value.detach().float().item() for name, value in losses.items()} | {"loss": total.item()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images
        self.sums["images"] = self.sums.get("images", 0) + images
        self.clock.images += images
        self.latest = values

    def log_step(self, bar, rate):
        if not self.main:
            return
        shown = {name: f"{value:.3g}" for name, value in self.latest.items()} | {"lr": f"{rate:.1e}"}
        if self.accelerator.device.type == "cuda":
            shown["GB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        shown["images/s"] = f"{self.clock.rate():.1f}"
        bar.set_postfix(shown, refresh=False)
        for name, value in self.latest.items():
            self.writer.add_scalar(f"train/{name}", value, self.step)
        self.writer.add_scalar("train/learning_rate", rate, self.step)

    def epoch_record(self):
        """-> {"epoch", "step", mean of every loss over images and ranks, "images_per_s", "time": shares}."""
        sums = self.sums_of_all()
        images = sums.pop("images")
        record = {"epoch": self.epoch + 1, "step": self.step} | {name: v / images for name, v in sums.items()}
        seconds, shares = self.clock.summary()
        record["images_per_s"] = self.clock.images * self.accelerator.num_processes / max(seconds, 1e-9)
        return record | {"time": shares}

    def finish_epoch(self, record, plain, pictures, on_best):
        """Compare, write best and last checkpoints, metrics.json, curves, TensorBoard, one line on the console."""
        value = record.get(self.score) if self.score else None
        better = value is None or self.best_score is None or value > self.best_score
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        self.history.append(record)
        if better:
            self.best_score, self.best_epoch, self.bad_epochs = value, self.epoch, 0
        else:
            self.bad_epochs += 1
        if self.main:
            if better:
                checkpoint.save(self.extras | {
                                 "model": plain.state_dict(), "model_args": getattr(plain, "model_args", {}),
                                 "constants": self.constants, "epoch": self.epoch, "metrics": record},
                                self.folder / "best.pt")
                if on_best:
                    on_best(plain)
            best = {"best_epoch": self.best_epoch, "best_score": self.best_score, "score": self.score}
            report.write_json(self.folder / "metrics.json", best | {"history": self.history})
            visualize.curves(self.history, self.folder / "curves.png")
            for name, number in record.items():
                if isinstance(number, (int, float)):
                    self.writer.add_scalar(name if "/" in name else f"epoch/{name}", number, self.epoch)
            for tag, picture in pictures.items():
                self.writer.add_image(tag, picture.clamp(0, 1), self.epoch)
            self.writer.flush()
            print(self._line(record, better), flush=True)

    def _line(self, record, better):
        hidden = {"epoch", "step", "loss", "images_per_s", "time"}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name not in hidden)
        best = f"  [best{'' if better else f' {self.best_score:.4f} in epoch {self.best_epoch}'}]" if self.score else ""
        times = " ".join(f"{name} {100 * share:.0f}%" for name, share in record["time"].items())
        return (f"epoch {record['epoch']}/{self.epochs}  {numbers}{best}  "
                f"{record['images_per_s']:.1f} images/s  ({times})")

    def close(self, stopped):
        for name, (module, before) in self.frozen.items():
            if freeze.fingerprint(module) != before:
                raise RuntimeError(f"the frozen module '{name or type(module).__name__}' changed during training")
        if self.main:
            self.writer.close()
            if stopped == "interrupted":
                print(f"interrupted: saved {(self.folder / 'last.pt').as_posix()}; {self.resume_hint} goes on from "
                      "there")
            else:
                best = "" if self.best_score is None else (
                    f", best {self.score} {self.best_score:.4f} in epoch {self.best_epoch}")
                print(f"training ended: {stopped}{best}")


def set_aside(folder, names, resume_hint="RESUME = True"):
    """Move an earlier run's files into folder/previous_<n>, so that a new start loses nothing."""
    earlier = [folder / name for name in names if (folder / name).exists()]
    if not earlier:
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"previous_{n}").exists())
    target = folder / f"previous_{number}"
    try:
        target.mkdir()
        for path in earlier:
            shutil.move(str(path), target / path.name)
    except OSError as error:  # Windows: TensorBoard or another program still has a file open
        raise UserError(f"cannot move the earlier run in {folder.as_posix()} aside ({error}): close what has it open, "
                        "or choose another OUTPUT_DIR") from error
    print(f"{folder.as_posix()} held an earlier run: moved to {target.as_posix()} (with {resume_hint} it would have "
          "gone on; for that, move these files back)")


class _Interrupts:
    """Within, the first Ctrl+C only sets `asked`; a second one interrupts at once."""

    def __enter__(self):
        self.asked = False
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nCtrl+C: finishing this step, then saving (once more to stop at once)", flush=True)

    def __exit__(self, *error):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
