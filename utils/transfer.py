"""Between CPU and GPU with as few waits as possible.

A GPU works through a queue that the CPU fills. Reading one number back empties that queue, and the GPU idles until the
CPU has caught up: numbers are therefore read together, and what the CPU sends leaves pinned memory without a wait.
"""

import torch


def sent(tensor, device):
    """A tensor of the CPU -> the same on `device`, without waiting for a GPU."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers(values):
    """{name: scalar Tensor}, all on one device -> {name: float}, in one transfer."""
    return rows({name: value[None] for name, value in values.items()})[0]


def rows(values):
    """{name: (n,) Tensor}, all on one device -> n dicts {name: float}, in one transfer."""
    together = torch.stack([value.detach().double() for value in values.values()], 1)  # (n, names)
    return [dict(zip(values, row, strict=True)) for row in together.tolist()]
