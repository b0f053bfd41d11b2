"""How much memory one call of a model needs, the same figure on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Within, counts the bytes of the tensors that operations make and that are still in use; `peak` is the most."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()  # views share what they look at, it is counted once
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        self.known.discard(key)
        self.bytes -= size


@torch.no_grad()
def peak_gigabytes(model, images):
    """-> GB that a model's weights and the tensors of one call take at most.

    On a GPU what torch allocated. On a CPU the tensors that are in use at the same time, without the buffers that a
    convolution library takes for itself: a process shows more, by an amount that differs between machines.

    Args:
        model: module, in eval mode; images: (B, 3, H, W) on its device.
    """
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if images.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images)
        return (own + torch.cuda.max_memory_allocated() - before) / 1e9
    return (own + peak_bytes(lambda: model(images))) / 1e9


def training_gigabytes(model, step):
    """-> {"weights", "optimizer", "activations and gradients": GB} of a training step with Adam; on "meta" nothing is
    made.

    Args:
        model: its float32 parameters that train have two numbers each in the optimizer; step: () -> None, forward and
            backward pass.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"weights": sum(p.nbytes for p in model.parameters()) / 1e9, "optimizer": 8 * trained / 1e9,
            "activations and gradients": peak_bytes(step) / 1e9}


def peak_bytes(work):
    """-> bytes of the tensors that `work()` makes, most at any moment; tensors on "meta" count as if they were there,
    so that the memory of a training step is known before the network is."""
    with LiveTensors() as live:
        work()
    return live.peak
