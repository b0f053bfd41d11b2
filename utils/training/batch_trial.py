"""BATCH_SIZE = 0: the most images per batch that fit, found by trial before a training begins.

On a GPU real steps are done at the largest size that batches get, from the estimate of training/needs.py upwards or
downwards in powers of two. Weights, statistics and randomness are afterwards what they were. A CPU takes a few images,
as more gain nothing there. Gradients are accumulated so that an optimizer step still sees as many images as the
script's other settings, its learning rate above all, were made for.
"""

import dataclasses
import gc
from contextlib import ExitStack
from unittest import mock

import torch

from utils import datasets, processes
from utils.config import UserError
from utils.training import needs
from utils.training.plan import AUTOCAST

ON_CPU = 4        # images per batch at most
IN_USE = 0.95     # share of the free memory that a trial may take: later steps differ a little


def settled(model, loader, compute_losses, plan, parameters, optimizer, earlier):
    """-> the plan with numbers for `batch_size` and `accumulate`; the loader is set to them.

    Args:
        all but the last: of engine.fit, before the model is wrapped.
        earlier: {name: value} of the constants of the run that is resumed, whose numbers are kept; {} for a new one.
    Raises:
        UserError: not even one image fits.
    """
    if plan.batch_size:
        return plan
    names = [_constant(plan, field) for field in ("batch_size", "accumulate")]
    kept = [earlier.get(name) for name in names]
    if all(isinstance(number, int) and number > 0 for number in kept):
        size, steps, why = *kept, "as the run began"
    else:
        effective = plan.usual_batch * plan.accumulate
        size, why = _chosen(model, loader, compute_losses, plan, parameters, optimizer, powers(effective))
        steps = effective // size
    loader.batch_sampler.batch_size = size
    processes.say(f"{names[0]} = {size}, {names[1]} = {steps}: {why}; {size * steps} images per optimizer step"
                  + (" and process" if processes.accelerator().num_processes > 1 else ""))
    return dataclasses.replace(plan, batch_size=size, accumulate=steps)


def numbers(plan, constants):
    """-> those of a script's constants that hold what `settled` has chosen: {name: value}."""
    found = {_constant(plan, field): getattr(plan, field) for field in ("batch_size", "accumulate")}
    return {name: value for name, value in found.items() if name in constants}


def powers(effective):
    """-> the powers of two that a number of images can be shared out in evenly, ascending: 24 -> [1, 2, 4, 8]."""
    return [2**i for i in range(effective.bit_length()) if effective % 2**i == 0]


def largest(sizes, guess, fits):
    """-> the largest of ascending sizes that `fits(size)`, 0 if none; as few calls as a good guess allows."""
    at = max((i for i, size in enumerate(sizes) if size <= guess), default=0)
    if fits(sizes[at]):
        while at + 1 < len(sizes) and fits(sizes[at + 1]):
            at += 1
        return sizes[at]
    return next((size for size in reversed(sizes[:at]) if fits(size)), 0)


def _constant(plan, field):
    return plan.name_of(field).removeprefix("--").upper()


def _chosen(model, loader, compute_losses, plan, parameters, optimizer, sizes):
    """-> images per batch, and why, in words."""
    device = processes.device()
    if device.type != "cuda":
        size = max(size for size in sizes if size <= min(ON_CPU, plan.usual_batch))
        return size, "a CPU gains nothing from larger batches"
    usual = dataclasses.replace(plan, batch_size=plan.usual_batch)
    free = free_gigabytes(device)
    try:
        guess = needs.of_training(model, loader, compute_losses, usual, parameters, optimizer).batch_for(free)
    except Exception:  # whatever a model does on tensors without content; see needs.said_before
        guess = plan.usual_batch
    model.to(device)

    def fits(size):
        return bool(processes.least_of(int(step_fits(model, loader, compute_losses, dataclasses.replace(
            plan, batch_size=size), device, free))))
    if not (size := largest(sizes, guess, fits)):
        raise UserError(f"{_constant(plan, 'batch_size')} = 0: not even one image fits into the {free:.1f} GB that are "
                        "free on this GPU: choose smaller images or a smaller model, or close what else runs on it")
    return size, f"the most that fit into the {free:.1f} GB free on this GPU" if size < sizes[-1] else (
        "all images of an optimizer step fit")


def free_gigabytes(device):
    """-> GB that torch can still have on a GPU, with what it holds and does not use."""
    gc.collect()
    torch.cuda.empty_cache()
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)) / 1e9


def step_fits(model, loader, compute_losses, plan, device, free):
    """-> whether one training step of plan.batch_size images fits into the GPU, with what the optimizer will keep.

    Parameters, buffers, gradients, modes and randomness are left as they were.

    Args:
        free: GB, of `free_gigabytes` before the first trial.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with ExitStack() as stack:
            # losses that are normalised over ranks would wait for those whose step did not fit
            stack.enter_context(mock.patch.object(torch.distributed, "is_initialized", lambda: False))
            stack.enter_context(torch.random.fork_rng(devices=[device]))
            model.train()
            _step(model, loader, compute_losses, plan, device, trained)
        return torch.cuda.max_memory_reserved(device) / 1e9 <= IN_USE * free
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:  # what cuDNN and cuBLAS say then
        if "ALLOC_FAILED" not in str(error):
            raise
        return False
    finally:
        for parameter in trained:
            parameter.grad = None
        for buffer, before in buffers:
            buffer.data.copy_(before)
        for module, mode in modes:
            module.training = mode
        gc.collect()
        torch.cuda.empty_cache()


def _step(model, loader, compute_losses, plan, device, trained):
    kept = [torch.empty_like(p) for p in trained for _ in range(3 if plan.ema else 2)]  # Adam's moments, the average
    batch = datasets.to_device(needs.fullest_batch(loader, plan), device)
    with torch.autocast(device.type, AUTOCAST[plan.precision], enabled=plan.precision != "float32"):
        losses = compute_losses(model, batch)
    sum(weight * losses[name].float() for name, weight in plan.loss_weights.items()).backward()
    torch.cuda.synchronize(device)
    del kept
