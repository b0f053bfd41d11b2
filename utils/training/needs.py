"""How much memory a training needs, known before it begins.

One step of the real model with the real losses is done on tensors that have a shape, a type and a GPU as their device,
but no content: FakeTensors, which torch.compile is built on. It takes seconds and no GPU memory.
"""

import copy
import sys
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from utils import datasets, memory, processes
from utils.training.plan import AUTOCAST

GPU = torch.device("cuda", 0)
LOOKED_AT = 8      # samples, of which the one with the most objects fills the batch
CUDA_ITSELF = 0.7  # GB that driver and libraries take beside torch's tensors; differs between GPUs and versions


class Needs(NamedTuple):
    """GB of one step's tensors, at the moment when they are most."""

    weights: float      # of all networks, the frozen ones included
    optimizer: float    # its state, and the moving average of the weights
    gradients: float
    activations: float  # and whatever else a step makes
    images: int         # in the batch

    @property
    def total(self):
        return self.weights + self.optimizer + self.gradients + self.activations

    def batch_for(self, gigabytes):
        """-> images per batch that a GPU of so many GB holds, 0 where not even one fits."""
        return max(0, int((gigabytes - CUDA_ITSELF - self.total + self.activations) / (self.activations / self.images)))

    def __str__(self):
        return (f"weights {self.weights:.2f} GB, optimizer {self.optimizer:.2f} GB, gradients {self.gradients:.2f} GB, "
                f"activations {self.activations:.2f} GB ({self.activations / self.images:.3f} GB per image)")


def said_before(model, loader, compute_losses, plan, parameters, optimizer):
    """Print what a training on this process's GPU needs, and what would fit where that is too much.

    Args:
        all: of engine.fit, before the model is wrapped.
    Returns:
        Needs, or None where the GPU-less step cannot be done: a network of your own may ask for a number that decides
        what it does, and the training itself is none the worse for it.
    """
    try:
        needs = of_training(model, loader, compute_losses, plan, parameters, optimizer)
    except Exception as error:  # whatever a model does on tensors without content
        processes.say(f"memory of a step: not estimated ({type(error).__name__})")
        return None
    there = torch.cuda.get_device_properties(processes.device()).total_memory / 1e9
    processes.say(f"memory of a step: {needs}, in all {needs.total:.1f} GB, and about {CUDA_ITSELF} GB for CUDA itself")
    if needs.total + CUDA_ITSELF > there:
        name, fits = plan.name_of("batch_size"), needs.batch_for(there)
        setting = f"{name} {fits}" if name.startswith("--") else f"{name} = {fits}"
        advice = f"{setting} fits" if fits else "one image is too much: smaller images or a smaller model fit"
        processes.say(f"note: this GPU has {there:.1f} GB: {advice}; {plan.name_of('accumulate')} keeps the effective "
                      "batch")
    return needs


def said_after(needs, device):
    """Print what was really needed; needs: of `said_before`."""
    found = torch.cuda.max_memory_allocated(device) / 1e9
    processes.say(f"memory of a step: {found:.1f} GB were in use at most, {needs.total:.1f} GB were estimated")


def of_training(model, loader, compute_losses, plan, parameters, optimizer):
    """Needs of a training on one GPU, which need not be there.

    Args:
        all: of engine.fit, before the model is wrapped. Reads up to LOOKED_AT samples; nothing is changed, and no
            randomness is used up.
    """
    with ExitStack() as stack:
        # losses that are normalised over ranks would wait for the others, which are not here
        stack.enter_context(mock.patch.object(torch.distributed, "is_initialized", lambda: False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        batch = fullest_batch(loader, plan)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        live = stack.enter_context(_OnNoGpu())
        own = _without_content([model, *_modules_of(compute_losses)])
        weights = live.bytes
        model, compute_losses = copy.deepcopy((model, compute_losses), own)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [group | {"params": [own[id(p)] for p in group["params"]]} for group in parameters]
        average = [torch.empty_like(p) for p in trained] if plan.ema else []
        optimize = _with_state(optimizer(groups, weight_decay=0.0), trained)
        kept = live.bytes
        model.train()
        _step(model, compute_losses, datasets.to_device(batch, GPU), plan)
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        del average, optimize
    return Needs(weights / 1e9, (kept - weights) / 1e9, gradients / 1e9, (live.peak - kept - gradients) / 1e9,
                 plan.batch_size)


def fullest_batch(loader, plan):
    """-> a batch on the CPU: again and again the one sample with the most objects among the first few, as large as
    batches get."""
    data = loader.dataset
    # where crops grow during a run, those of the last epoch are the largest; where mosaics end before it, the first's
    epoch = getattr(data, "fullest_epoch", plan.epochs - 1)
    samples = [data[epoch, i] for i in range(min(len(data), LOOKED_AT))]
    collate = getattr(loader.collate_fn, "at_largest", loader.collate_fn)
    return collate([max(samples, key=lambda sample: len(sample.get("boxes", ())))] * plan.batch_size)


def _step(model, compute_losses, batch, plan):
    with torch.autocast(GPU.type, AUTOCAST[plan.precision], enabled=plan.precision != "float32"):
        losses = compute_losses(model, batch)
    total = sum(weight * losses[name].float() for name, weight in plan.loss_weights.items())
    with torch.autograd.set_multithreading_enabled(False):  # the modes hold in this thread
        total.backward()


def _with_state(optimizer, trained):
    """-> the optimizer after a step: before it, it has no state."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _modules_of(function):
    """-> the networks that a functools.partial holds as arguments, or as the owners of methods."""
    values = (*function.args, *function.keywords.values()) if isinstance(function, partial) else ()
    owners = (getattr(value, "__self__", value) for value in values)
    return [owner for owner in owners if isinstance(owner, torch.nn.Module)]


def _without_content(modules):
    """-> a memo for copy.deepcopy: {id of a parameter or buffer: its counterpart on the GPU}."""
    own = {}
    for module in modules:
        for tensor in module.parameters():
            if id(tensor) not in own:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                own[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad)
        for tensor in module.buffers():
            own.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU))
    return own


class _OnNoGpu(memory.LiveTensors):
    """Counts the bytes of fake tensors on the GPU. What is on the CPU is really computed; what is fetched from the GPU
    is 0, or 1 and True where it is one number, so that Hungarian matching and "is all finite?" go on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and not torch.cuda.is_available() and _asked_by_autograd():
            return torch.device("cpu")  # of a GPU's tensor it would want streams
        kwargs = kwargs or {}
        name, device = function.overloadpacket.__name__, kwargs.get("device")
        fakes = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        to_gpu = device is not None and torch.device(device).type == GPU.type
        if not fakes and name in ("_pin_memory", "pin_memory"):
            return args[0]
        if not fakes and not to_gpu:
            return _really(function, *args, **kwargs)
        if name == "_local_scalar_dense":
            return _really(lambda: torch.ones((), dtype=args[0].dtype).item())
        if name == "_to_copy" and device is not None and not to_gpu:
            return _really(torch.zeros, args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "nonzero":  # RT-DETR asks which of its denoising queries are positive: half of them
            found = torch.empty(args[0].numel() // 2, args[0].dim(), dtype=torch.int64, device=GPU)
        else:
            found = function(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, FakeTensor) and leaf.device.type == GPU.type:
                self.count(leaf.untyped_storage())
        return found


def _asked_by_autograd():
    """Whether the caller's caller is C++ code of a backward pass, with no Python between."""
    frame = sys._getframe(1).f_back
    while frame and frame.f_code.co_name in ("_fn", "inner"):  # torch wraps every __torch_dispatch__ in these
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def _really(function, *args, **kwargs):
    with torch._C._DisableTorchDispatch():
        return function(*args, **kwargs)
