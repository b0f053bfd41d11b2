"""The state of one `engine.fit`: what it counts, what last.pt holds so that a killed run goes on, what it writes."""

import hashlib
import json
import math
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object

from utils import checkpoint, freeze, processes, report, system, visualize
from utils.config import UserError
from utils.datasets import image_check
from utils.training import needs, run_folder
from utils.training.clock import Clock
from utils.training.ema import WeightAverage
from utils.training.schedule import plateau_factor, schedule_factor
from utils.training.step_curve import StepCurve
from utils.training.trackers import Trackers

OWN_FILES = ("last.pt", "best.pt", "metrics.json", "curves.png", "tb")  # what a run writes into its folder
UNLISTED = (  # what the scripts wrote beside these when metrics.json did not list it yet
    "checkpoint_best_regular.pth", "checkpoint.pt", "stage2_config.json", "results.json", "predictions.png",
    "spdnet_best.pt", "spdnet_adapted.pt", "before_after.png", "rain_detector_best.pt", "test.json", "rain_roc.png",
    "rain_mistakes.png", "detector", "pipeline", "checkpoints", "samples", "real_rain", "splits.json")
DRAWING_PAUSE = 30  # seconds between two drawings of curves.png, which takes as long as some epochs of small data


class Run:
    """Model, optimizer, counters and scores of one training.

    Args:
        plan: Plan, how it is done; folder: Path of what it writes; the others are explained at `engine.fit`.
    """

    def __init__(self, model, loader, plan, parameters, optimizer, folder, score, constants, extras, own_files,
                 fixed=(), validated_on=None, validated_images=(), written_before=(), lasting_files=()):
        self.accelerator = processes.accelerator()
        self.main = self.accelerator.is_main_process
        self.model, self.loader, self.plan = model, loader, plan
        self.folder, self.last = folder, folder / "last.pt"
        self.score, self.constants, self.extras, self.own_files = score, constants, extras, own_files
        self.fixed, self.written_before, self.lasting_files = fixed, written_before, lasting_files
        self.validated_on = None if validated_on is None else _digest(validated_on)
        self.validated_images = _digest(image_check.contents(validated_images)) if validated_images else None
        trained_images = getattr(loader.dataset, "image_paths", tuple)()  # data without images of its own has none
        self.trained_images = _digest(image_check.contents(trained_images, times=True)) if trained_images else None
        self.trainable = [p for group in parameters for p in group["params"]]
        if not any(p.requires_grad for group in parameters if group["lr"] for p in group["params"]):
            raise UserError("nothing to train: every parameter is frozen or has a learning rate of 0")
        self.optimizer = optimizer(parameters, weight_decay=0.0)  # AdamW is Adam then, unless a group says otherwise
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = self.batch = self.step = self.bad_epochs = self.best_epoch = 0
        self.best_score, self.history, self.sums = None, [], {}
        self.needs, self.steps_done = None, 0  # of needs.said_before; optimizer steps of this process
        self.clock, self.curve = Clock(self.accelerator.device), StepCurve()
        self.drawn_epochs, self.drawn_at = 0, time.monotonic()
        self.seed = torch.initial_seed() % 2**24  # of the ranks' own randomness, see train_one_epoch
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=plan.precision == "fp16")

    @property
    def total_steps(self):
        return self.plan.epochs * math.ceil(len(self.loader.batch_sampler) / self.plan.accumulate)

    def prepare(self, last=None):
        """Check the folder, load or set aside an earlier run, wrap model and optimizer."""
        if self.main:
            size = sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**20
            # last.pt (Adam: 3 times the weights, the average once more) twice while it is replaced, and best.pt
            checkpoint.require_writable(self.folder, megabytes=(11 if self.plan.ema else 8) * size + 50)
            if not self.plan.resume or not (last or self.last.is_file()):  # without last.pt nothing goes on
                own = [name for name in (*self.own_files, *self.lasting_files) if name not in self.written_before]
                set_aside(self.folder, own, self.plan.resume_hint)
        self.accelerator.wait_for_everyone()
        self.frozen = {name: (module, freeze.fingerprint(module))
                       for name, module in freeze.frozen_modules(self.model).items()}
        content = None
        if self.plan.resume and (last or self.last.is_file()):
            content = last or checkpoint.load(self.last)
            if not is_last(content):
                raise _not_ours(self.last, self.plan)
            self._require_same_run(content)
            advice = self._advice(content)
            checkpoint.load_into(self.model, content["model"], self.last.as_posix(), advice=advice)
            for name, (module, before) in self.frozen.items():
                if freeze.fingerprint(module) != before:
                    raise UserError(f"{self.last.as_posix()} was trained with another frozen {name}, or trained it. "
                                    + (advice or self._start_anew("Resume with the weights of that run")))
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.average = None
        if self.plan.ema:
            weights = [p for p in self.trainable if p.requires_grad]
            self.average = WeightAverage(weights + freeze.running_statistics(self.model), self.plan.ema)
        if content:
            try:
                self._restore(content)
            except torch.OutOfMemoryError:
                raise
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                raise _not_ours(self.last, self.plan) from error
            content.clear()  # the caller may hold it as well, and the training needs the memory
        elif self.plan.resume and self.main:
            print(f"nothing to resume in {self.folder.as_posix()}, starting from the beginning")
        self.trackers = Trackers(self.plan.trackers, self.folder, self.constants, self.step)

    def _advice(self, content):
        """-> a sentence for a last.pt that does not fit: the constants that its run had otherwise; "" where all are the
        same."""
        changed = ", ".join(f"{name} was {content['constants'].get(name, 'unknown')!r}, is now {value!r}"
                            for name, value in self.changed_constants(content))
        return changed and self._start_anew(f"That run had other constants ({changed}): set back what decides on the "
                                            "network and on what of it is trained")

    def _start_anew(self, otherwise):
        return f"{otherwise}, or start anew without {self.plan.resume_hint}"

    def _require_same_run(self, content):
        """UserError where the content of last.pt is of a run that cannot go on as what this one is."""
        _require_score(content, self.score, self.last, self.plan)
        before = content["constants"]
        if other := ", ".join(f"{name} was {before[name]!r}, is now {value!r}" for name, value
                              in self.changed_constants(content) if name in self.fixed and name in before):
            raise UserError(f"{self.last.as_posix()} was trained with other constants ({other}): its network, its "
                            "optimizer or its best score would not mean the same; set them back, or start anew "
                            f"without {self.plan.resume_hint}")
        there = [(content.get(name), getattr(self, name)) for name in ("validated_on", "validated_images")]
        if any(old and new and old != new for old, new in there):  # neither is in files of earlier versions
            raise UserError(f"{self.last.as_posix()} was validated on other data (images or annotations have changed "
                            "since), so its best score could not be compared with new ones: give that run's data, or "
                            f"start anew without {self.plan.resume_hint}")

    def state(self):
        """-> what last.pt holds: numbers, strings and tensors only."""
        plain = self.accelerator.unwrap_model(self.model)
        return self.extras | {
            "model": plain.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else [],
            "model_args": getattr(plain, "model_args", {}), "constants": self.constants,
            "epoch": self.epoch, "batch": self.batch, "batches": len(self.loader.batch_sampler),
            "step": self.step, "bad_epochs": self.bad_epochs,
            "score": self.score, "best_score": self.best_score, "best_epoch": self.best_epoch,
            "history": self.history, "curve": self.curve.state(), "validated_on": self.validated_on,
            "validated_images": self.validated_images, "trained_images": self.trained_images,
            "scaler": self.scaler.state_dict(), "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def _restore(self, content):
        settings = [{name: value for name, value in group.items() if name != "params"}
                    for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            otherwise = self._advice(content) or self._start_anew("Resume with that run's constants")
            raise UserError(f"{self.last.as_posix()} was trained with other trainable parts ({error}). {otherwise}"
                            ) from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # weight decay and the like are what the constants say now
        for name in ("epoch", "batch", "step", "bad_epochs", "best_score", "best_epoch", "history", "sums"):
            setattr(self, name, content[name])
        if self.average:
            self.average.load(content.get("average") or self.average.tensors)
        if "curve" in content:  # not in files of earlier versions
            self.curve.load(content["curve"])
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["torch_rng"].cpu())
        if content["cuda_rng"] and torch.cuda.device_count() == len(content["cuda_rng"]):
            torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_rng"]])
        if not self.main:
            self.sums = {}  # the saved sums are those of all ranks
        group_is_open = self.batch % self.plan.accumulate and self.batch != content["batches"]
        if self.batch and (content["batches"] != len(self.loader.batch_sampler) or group_is_open):
            processes.say("note: batch size, accumulation, data or number of processes have changed: "
                          f"epoch {self.epoch + 1} starts again")
            self.batch, self.sums = 0, {}
        elif content["batches"] != len(self.loader.batch_sampler):
            processes.say(f"note: an epoch has {len(self.loader.batch_sampler)} batches, it had {content['batches']}: "
                          "batch size, data or number of processes have changed")
        if self.main:
            print(f"resuming {self.folder.as_posix()} at epoch {self.epoch + 1}, batch {self.batch + 1}")
            for name, value in self.changed_constants(content):
                print(f"  note: {name} was {content['constants'].get(name, 'unknown')!r}, is now {value!r}")
            if content.get("trained_images") not in (None, self.trained_images):  # None: of earlier versions
                print("  note: the training images are not those that this run has seen so far (other files, or their "
                      "sizes or times have changed)")

    def changed_constants(self, content):
        """-> [(name, value now), ...] of the constants that a last.pt's run had otherwise; content: of the file."""
        return [(name, value) for name, value in self.constants.items()
                if name != "RESUME" and content["constants"].get(name, "unknown") != value]

    def save_last(self):
        """Write last.pt, from which a killed run goes on; every rank calls it, the main one writes.

        Raises:
            UserError: weights that are not finite; the earlier last.pt stays.
        """
        state = self.state() | {"sums": self.sums_of_all()}
        if broken := [name for name, value in state["model"].items() if value.is_floating_point()
                      and not torch.isfinite(value).all()]:
            raise self.diverged(f"{len(broken)} weights are not finite after epoch {self.epoch + 1}, batch {self.batch}"
                                f" ({system.listed(broken, 2)})")
        if self.main:
            checkpoint.save(state, self.last)

    def diverged(self, what):
        """-> UserError: what is not finite (in words), what to do, what is saved."""
        saved = (f"{self.last.as_posix()} holds the last good weights" if self.last.is_file() else
                 "nothing has been saved yet")
        return UserError(f"{what}. Lower the learning rate, raise {self.plan.name_of('warmup_steps')}, or train in "
                         f"float32 where this was fp16, and look whether the start weights are sound; {saved}.")

    def sums_of_all(self):
        """-> {name: sum over images}, "images": of every rank; every rank calls it."""
        sums = {}
        for part in gather_object([self.sums]):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def set_learning_rates(self):
        plan = self.plan
        factor = schedule_factor(plan.schedule, self.step, self.total_steps, plan.warmup_steps, plan.milestones)
        if plan.schedule == "plateau":
            metric = [record[plan.plateau_metric] for record in self.history]
            factor *= plateau_factor(metric, plan.plateau_patience, plan.plateau_factor)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        return self.base_rates[0] * factor

    def add_up(self, values, images):
        """Count a batch of so many images and its losses, {name: float}."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images
        self.sums["images"] = self.sums.get("images", 0) + images
        self.clock.images += images
        self.curve.add(values)
        self.latest = values

    def log_step(self, bar, rate):
        self.curve.end_step(self.step)
        if not self.main:
            return
        self.steps_done += 1
        if self.needs and self.steps_done == 2:  # the first one had no state of the optimizer yet
            needs.said_after(self.needs, self.accelerator.device)
        shown = {name: f"{value:.3g}" for name, value in self.latest.items()} | {"lr": f"{rate:.1e}"}
        if self.accelerator.device.type == "cuda":
            shown["GB"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        shown["images/s"] = f"{self.clock.rate():.1f}"
        bar.set_postfix(shown, refresh=False)
        values = {f"train/{name}": value for name, value in self.latest.items()}
        self.trackers.step(values | {"train/learning_rate": rate}, self.step)

    def epoch_record(self):
        """-> {"epoch", "step", mean of every loss over images and ranks, "images_per_s", "time": shares}."""
        sums = self.sums_of_all()
        images = sums.pop("images")
        record = {"epoch": self.epoch + 1, "step": self.step} | {name: v / images for name, v in sums.items()}
        seconds, shares = self.clock.summary()
        record["images_per_s"] = self.clock.images * self.accelerator.num_processes / max(seconds, 1e-9)
        return record | {"time": shares}

    def count_epoch(self, record, plain, on_best):
        """Compare with the best epoch so far; keep this one as best.pt where it is better. -> whether it is.

        Raises:
            UserError: a score that is not a number.
        """
        value = record.get(self.score) if self.score else None
        if value is not None and math.isnan(value):
            raise self.diverged(f"{self.score} is not a number after epoch {self.epoch + 1}")
        better = value is None or self.best_score is None or value > self.best_score
        if self.main and better:  # first: where this fails, the epoch's validation is done again by a resumed run
            content = {"model": plain.state_dict(), "model_args": getattr(plain, "model_args", {}),
                       "constants": self.constants, "epoch": self.epoch + 1, "metrics": record}
            checkpoint.save(self.extras | content, self.folder / "best.pt")
            if on_best:
                on_best(plain)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        self.history.append(record)
        if better:
            self.best_score, self.best_epoch, self.bad_epochs = value, self.epoch, 0
        else:
            self.bad_epochs += 1
        return better

    def report_epoch(self, record, better, pictures):
        """metrics.json, trackers, a line on the console, now and then curves.png, once last.pt holds the epoch."""
        if not self.main:
            return
        best = {"best_epoch": self.best_epoch, "best_score": self.best_score, "score": self.score,
                "files": list(self.own_files)}
        try:
            report.write_json(self.folder / "metrics.json", best | {"history": self.history})
        except (OSError, UserError) as error:  # open in another program on Windows: no reason to end a training
            print(f"note: {error}: written again after the next epoch")
        if time.monotonic() - self.drawn_at >= DRAWING_PAUSE:
            self.draw_curves()
        self.trackers.epoch({name if "/" in name else f"epoch/{name}": number for name, number in record.items()
                             if isinstance(number, (int, float))}, self.epoch, self.step, pictures)
        print(self._line(record, better), flush=True)

    def draw_curves(self):
        """curves.png of all epochs so far, where it does not show them yet."""
        if not self.main or self.drawn_epochs == len(self.history):
            return
        self.drawn_at = time.monotonic()
        try:
            visualize.curves(self.history, self.folder / "curves.png", self.curve.points)
            self.drawn_epochs = len(self.history)
        except UserError as error:  # a full disk; on Windows open in another program
            print(f"note: {error}: drawn again after a later epoch")

    def _line(self, record, better):
        hidden = {"epoch", "step", "loss", "images_per_s", "time"}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name not in hidden)
        best = ""
        if self.score:
            best = "  [best]" if better else f"  [best {self.best_score:.4f} in epoch {self.best_epoch}]"
        times = " ".join(f"{name} {100 * share:.0f}%" for name, share in record["time"].items())
        return (f"epoch {record['epoch']}/{self.plan.epochs}  {numbers}{best}  "
                f"{record['images_per_s']:.1f} images/s  ({times})")

    def close(self, stopped):
        for name, (module, before) in self.frozen.items():
            if freeze.fingerprint(module) != before:
                raise RuntimeError(f"the frozen module '{name or type(module).__name__}' changed during training")
        if self.main:
            if stopped == "interrupted":
                print(f"interrupted: saved {self.last.as_posix()}; {self.plan.resume_hint} goes on from there")
            else:
                best = "" if self.best_score is None else (
                    f", best {self.score} {self.best_score:.4f} in epoch {self.best_epoch}")
                print(f"training ended: {stopped}{best}")


def _digest(content):
    return hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=16).hexdigest()


def is_last(content):
    """-> whether a file's content looks like a last.pt."""
    kinds = {"model": dict, "optimizer": dict, "constants": dict, "epoch": int, "batch": int, "history": list}
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())


def require_free(folder, plan, score):
    """UserError where a run could not begin in a folder; for scripts that compute something long before they train.

    Args:
        folder: of the run; plan: its Plan; score: the metric that it goes by, which a run that is resumed must share.
    Returns:
        the content of the last.pt that is resumed, for `fit`'s `last`; None where there is none.
    """
    with run_folder.claimed(folder):
        checkpoint.require_writable(folder)
        last = Path(folder) / "last.pt"
        if not (plan.resume and last.is_file()):
            return None
        content = checkpoint.load(last)
        if not is_last(content):
            raise _not_ours(last, plan)
        _require_score(content, score, last, plan)
        return content


def _not_ours(last, plan):
    return UserError(f"{last.as_posix()} is not a last.pt of this project, or damaged: move it away, or start anew "
                     f"without {plan.resume_hint}")


def _require_score(content, score, last, plan):
    if content.get("score", score) != score:
        raise UserError(f"{last.as_posix()} was scored by {content['score']}, now it would be by {score}: it is "
                        "another script's run, or had other constants; resume with those, or start anew without "
                        f"{plan.resume_hint}")


def set_aside(folder, names, resume_hint="RESUME = True"):
    """Move an earlier run's files into folder/previous_<n>, so that a new start loses nothing: those of every run, what
    the folder's run says that it wrote, and `names`."""
    target = checkpoint.keep_earlier(folder, (*OWN_FILES, *names, *_products(folder)), "run")
    if target is None:
        return
    print(f"{folder.as_posix()} held an earlier run: moved to {target.as_posix()} (to go on with it, move these files "
          f"back and set {resume_hint})")


def _products(folder):
    """-> what the run in a folder wrote beside its own files, as its metrics.json says: perhaps another script's. That
    of an earlier version does not say it: all that such runs wrote."""
    try:
        content = system.read_json(folder / "metrics.json")
        names = content.get("files", UNLISTED if "history" in content else ())
        return [name for name in names if Path(name).name == name and not name.startswith(".")]
    except (OSError, ValueError, AttributeError, TypeError):
        return []
