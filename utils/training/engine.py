"""The one training loop: every script calls `fit`, two phases are two calls.

It runs on Hugging Face Accelerate, so `torchrun script.py` and `accelerate launch script.py` make the same script
multi-GPU. What a run needs in order to go on after a kill is in OUTPUT_DIR/last.pt, see utils/training/run_state.py.
"""

import math
import random
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils import checkpoint, datasets, fast, processes, system, transfer
from utils.config import UserError
from utils.training import batch_trial, needs, run_folder
from utils.training.plan import AUTOCAST, usable_seed
from utils.training.run_state import Run, is_last


def seed_everything(seed):
    """Seed Python, numpy and torch (initial weights, dropout); data has its own seeds."""
    usable_seed("SEED", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---- the loop --------------------------------------------------------------------------------------------------

def fit(model, loader, compute_losses, plan, *, output_dir, parameters, optimizer=torch.optim.AdamW, evaluate=None,
        score=None, on_best=None, on_epoch=None, stop=None, sample_images=None, constants=None, extras=None,
        own_files=(), lasting_files=(), last=None, written_before=(), fixed=(), validated_on=None,
        validated_images=()):
    """Train `model` and keep the best epoch.

    Scripts hand over their own functions with `functools.partial`, which binds what else these need.

    Args:
        model: nn.Module; frozen parts went through `freeze.freeze` and are checked to come out bit-identical.
        loader: from `loaders.training_loader`.
        compute_losses: (model, batch) -> {name: scalar Tensor}, see Plan.loss_weights. Under torchrun `model` is the
            distributed wrapper: call it, do not reach inside for a trainable part.
        plan: Plan, the settings.
        parameters: groups for the optimizer, [{"params": [...], "lr": float, "weight_decay": float}, ...].
        optimizer: (groups, weight_decay=0.0) -> torch optimizer.
        evaluate: (plain model in eval mode) -> {name: float}; called after every epoch on every rank.
        score: the metric that "best" and early stopping go by (higher is better); None keeps the last epoch.
        on_best: (plain model) -> None, writes the script's own output; main process only.
        on_epoch: (plain model in eval mode, history) -> None, called when the epoch is saved; every rank.
        stop: (history) -> why the run should end, or None; asked before every epoch, after a resume as well.
        sample_images: (plain model) -> {tag: (3, H, W) float image in [0, 1]} for TensorBoard.
        constants: {name: value}, stored in checkpoints; a resumed run reports those that differ.
        extras: {key: tensors, numbers, strings}, further entries of last.pt and best.pt.
        last: content of output_dir/last.pt where the script has read it already; emptied once it is restored, so that
            the caller's reference does not keep the optimizer's state in memory a second time.
        fixed: names of the constants that decide what the network computes, what the score measures or what the
            optimizer keeps: no run goes on with others.
        validated_on: what tells the validation data from others (anything JSON; see evaluation.coco.identity): no run
            goes on with others, because its best score could not be compared with new ones.
        validated_images: paths of the validation images: no run goes on with others either (names and sizes tell).
        own_files: names that the script writes into output_dir; a new start moves them aside with the rest.
        lasting_files: such names that a run which writes others leaves where they are, so that several can be made.
        written_before: those of them that are there already, of this run.
    Returns:
        {"history": [{"epoch": 1, ...}, ...], "best_epoch": int, "best_score": float or None, "stopped": str}, and
        "chosen": {constant: number} where Plan.batch_size was 0.
    Raises:
        UserError: nothing to train, a loss that is not finite, a folder that is unwritable or another run's.
        RuntimeError: a frozen module has changed (a bug in a script, never the user's mistake).
    """
    chosen, constants = {}, constants or {}
    if not plan.batch_size:
        last = last or last_of(output_dir, plan)
        earlier = (last or {}).get("constants") or {}
        plan = batch_trial.settled(model, loader, compute_losses, plan, parameters, optimizer, earlier)
        constants = constants | (chosen := batch_trial.numbers(plan, constants))
    run = Run(model, loader, plan, parameters, optimizer, Path(output_dir), score, constants, extras or {},
              own_files, fixed, validated_on, validated_images, written_before, lasting_files)
    say_notes(run)
    if run.main and run.accelerator.device.type == "cuda":
        run.needs = needs.said_before(model, loader, compute_losses, plan, parameters, optimizer)
    fast.switch_on(plan.fast, run.accelerator.device, model)
    with run_folder.claimed(run.folder):
        run.prepare(last)
        try:
            with _Interrupts() as run.interrupts:
                while not (stopped := reason_to_stop(run, stop)):
                    record = train_one_epoch(run, compute_losses)
                    if record is None:
                        stopped = "interrupted"
                        break
                    finish_epoch(run, record, evaluate, sample_images, on_best, on_epoch)
        finally:
            run.draw_curves()  # also where a loss that is not finite ends the run
            run.trackers.close()
        run.close(stopped)
    return {"history": run.history, "best_epoch": run.best_epoch, "best_score": run.best_score, "stopped": stopped} | (
        {"chosen": chosen} if chosen else {})


def last_of(output_dir, plan):
    """-> content of the last.pt that will be resumed, None for a new run; what is wrong with it, Run.prepare says."""
    last = Path(output_dir) / "last.pt"
    content = checkpoint.load(last) if plan.resume and last.is_file() else None
    return content if is_last(content) else None


def say_notes(run):
    """Settings that are allowed and yet hardly meant."""
    plan = run.plan
    if plan.precision == "bf16" and processes.bf16_is_emulated(run.accelerator.device):
        processes.say(f"note: {plan.name_of('precision')} = 'bf16': this CPU has no instructions for it and will be "
                      "about ten times slower than with float32")
    if plan.warmup_steps > run.total_steps / 3:
        processes.say(f"note: {plan.name_of('warmup_steps')} = {plan.warmup_steps} of {run.total_steps} steps in all: "
                      "the learning rate reaches its full height late or never")


def reason_to_stop(run, stop):
    """-> why no further epoch should begin, in words, or None. stop: of `fit`."""
    if run.epoch >= run.plan.epochs:
        return "all epochs done"
    if run.plan.patience and run.bad_epochs >= run.plan.patience:
        return f"no better {run.score} in {run.plan.patience} epochs"
    return stop(run.history) if stop and run.history else None


def finish_epoch(run, record, evaluate, sample_images, on_best, on_epoch):
    """Evaluate, save and report a trained epoch. record: of `train_one_epoch`; the functions: of `fit`."""
    plain = run.accelerator.unwrap_model(run.model)
    plain.eval()
    processes.same_buffers(plain)  # BatchNorm statistics are each rank's own, and rank 0's are saved
    try:
        with run.average.applied() if run.average else nullcontext():
            if run.average:
                processes.same_buffers(plain)  # now the average's
            with torch.no_grad():
                record.update(evaluate(plain) if evaluate else {})
                pictures = sample_images(plain) if sample_images and run.main else {}
            better = run.count_epoch(record, plain, on_best)
    except UserError:
        run.save_last()  # with the epoch's last batch done: a resumed run begins with this validation
        raise
    run.save_last()
    run.report_epoch(record, better, pictures)
    run.accelerator.wait_for_everyone()
    if on_epoch:
        with torch.no_grad():
            on_epoch(plain, run.history)


def train_one_epoch(run, compute_losses):
    """One pass over the loader, or the rest of one after a resume. -> the epoch's record, None after Ctrl+C."""
    model, accelerator, clock, plan = run.model, run.accelerator, run.clock, run.plan
    low_precision = plan.precision != "float32"
    model.train()
    run.loader.batch_sampler.start_at(run.epoch, run.batch)
    bar = tqdm(total=len(run.loader.batch_sampler), initial=run.batch, desc=f"epoch {run.epoch + 1}/{plan.epochs}",
               ascii=True, dynamic_ncols=True, disable=None if run.main else True, leave=False)
    clock.start()
    for batch in run.loader:
        if accelerator.process_index:  # rank 0's stream is saved and restored; the others' follow from where they are
            torch.manual_seed(run.seed + (accelerator.process_index << 40) + (run.epoch << 24) + run.batch)
        batch = datasets.to_device(batch, accelerator.device)
        clock.lap("data")
        first = run.batch - run.batch % plan.accumulate
        group = min(plan.accumulate, len(run.loader.batch_sampler) - first)  # the last group may be smaller
        last_of_group = run.batch + 1 == first + group

        with nullcontext() if last_of_group else accelerator.no_sync(model):
            with torch.autocast(accelerator.device.type, AUTOCAST[plan.precision], enabled=low_precision):
                losses = compute_losses(model, batch)
            total = sum(weight * losses[name].float() for name, weight in plan.loss_weights.items())
            clock.lap("forward")
            accelerator.backward(run.scaler.scale(total / group))
            values = transfer.numbers(losses | {"loss": total})  # here, where a GPU has its backward pass to do
            require_finite(values, run, batch)
            clock.lap("backward")

        if last_of_group:
            run.scaler.unscale_(run.optimizer)
            if plan.clip_norm:
                accelerator.clip_grad_norm_(run.trainable, plan.clip_norm)
            rate = run.set_learning_rates()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            if run.average:
                run.average.update(run.step)
            clock.lap("step")

        run.batch += 1
        run.add_up(values, len(batch["images"]))
        if last_of_group:
            run.log_step(bar, rate)
            interrupted = processes.any_of(run.interrupts.asked)  # all ranks stop at the same step
            if interrupted or run.step % plan.checkpoint_steps == 0:
                run.save_last()
                clock.lap("save")
            if interrupted:
                bar.close()
                return None
        bar.update()
    bar.close()
    return run.epoch_record()


def require_finite(values, run, batch):
    """Stop at the first loss that is not finite, before the weights take a step; values: {name: float}, and "loss"."""
    if math.isfinite(values["loss"]):
        return
    terms = ", ".join(f"{name}={value:.4g}" for name, value in values.items() if name != "loss")
    raise run.diverged(f"the loss is not finite in epoch {run.epoch + 1}, batch {run.batch + 1} ({terms}; images "
                       f"{system.listed(batch['paths'], 4)})")


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
