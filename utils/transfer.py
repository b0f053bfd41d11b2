"""Between CPU and GPU with as few waits as possible.

A GPU works through a queue that the CPU fills. Reading one number back empties that queue, after which the GPU idles until
the CPU has caught up: numbers are therefore read together, and what the CPU sends goes out of pinned memory, for which
nobody waits.
"""

import torch


def sent(tensor, device):
    """A tensor of the CPU -> the same on `device`, without waiting for a GPU."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers(values):
    """{name: scalar Tensor}, all on one device -> {name: float}, in one transfer."""
    together = torch.stack([value.detach().float() for value in values.values()])  # (n,)
    return dict(zip(values, together.tolist(), strict=True))
