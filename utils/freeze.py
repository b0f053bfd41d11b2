"""Frozen means frozen: no gradients, no train mode, and a fingerprint that proves that nothing has moved.

`requires_grad_(False)` alone is not enough: RT-DETR's encoder and input projections hold 46 BatchNorm layers that go
on updating their running statistics as soon as a parent's `train()` is called.
"""

import hashlib

import torch
from torch import nn


class _StayInEval:
    """Stands in for a module's `train` method: a parent's train() leaves the module in eval mode.

    A class rather than a closure so that deepcopy and pickle carry it over to the copy.
    """

    def __init__(self, module):
        self.module = module

    def __call__(self, mode=True):
        return nn.Module.train(self.module, False)


class _Frozen(_StayInEval):
    """The same, of a module that went through `freeze`."""


def pin_to_eval(module):
    """Keep `module` in eval mode whatever its parents do; its parameters may train. -> module"""
    module.eval()
    object.__setattr__(module, "train", _StayInEval(module))
    return module


def freeze(module):
    """Take gradients from every parameter of `module` and pin it to eval mode. -> module"""
    module.requires_grad_(False)
    module.eval()
    object.__setattr__(module, "train", _Frozen(module))
    return module


def unfreeze(module):
    """Undo `freeze` (the module is left in eval mode until the next train()). -> module"""
    module.requires_grad_(True)
    module.__dict__.pop("train", None)
    return module


def is_frozen(module):
    """True for a module that went through `freeze`."""
    return isinstance(module.__dict__.get("train"), _Frozen)


def frozen_modules(model):
    """-> {name: module} of the frozen modules inside `model` (itself included), outermost only."""
    found = {}
    for name, module in model.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}.") or outer == "" for outer in found)
        if is_frozen(module) and not inside:
            found[name] = module
    return found


def running_statistics(model):
    """-> [running means and variances of the BatchNorm layers outside frozen modules]."""
    frozen = {id(inner) for module in frozen_modules(model).values() for inner in module.modules()}
    return [buffer for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and id(module) not in frozen
            for buffer in (module.running_mean, module.running_var) if buffer is not None]


@torch.no_grad()
def fingerprint(module):
    """-> hex digest over every parameter and buffer (names, shapes, bytes), buffers outside the state dict included."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = list(module.named_parameters()) + list(module.named_buffers())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_parameters(module):
    """-> (all, trainable) numbers of parameters."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trainable in counts if trainable)


def describe(parts):
    """The block of parameter counts at the start of a training.

    Args:
        parts: {label: module}, for example {"SPDNet": model.derain_module, "RT-DETR": model.detection_module}.
    Returns:
        str of len(parts) + 2 lines.
    """
    lines, total, trainable = [], 0, 0
    for label, module in parts.items():
        own, learns = count_parameters(module)
        total, trainable = total + own, trainable + learns
        share = "0% - FROZEN" if not learns else f"{100 * learns / own:.1f}%".replace("100.0%", "100%")
        lines.append(f"{label}: {learns:,} trainable parameters ({share})")
    lines.append(f"Total parameters: {total:,}")
    lines.append(f"Trainable parameters: {trainable:,} ({100 * trainable / max(total, 1):.1f}%)")
    return "\n".join(lines)
