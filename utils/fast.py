"""What makes a GPU faster at the price of rounding or of minutes at the start; off until it is asked for.

What pays depends on GPU and network: tools/gpu_report.py measures each on yours.
"""

import torch

from utils import processes
from utils.config import UserError

TRAINING = {
    "tf32": "matrix products of float32 with 10 bits of mantissa (GPUs from Ampere on)",
    "channels_last": "memory format of convolutions that tensor cores like",
}
INFERENCE = TRAINING | {
    "compile": "torch.compile: minutes at the first image (on Windows it needs triton-windows)",
    "cuda_graphs": "torch.compile that records all launches once and plays them back, for images of one size",
}


def require(name, value, known):
    """UserError unless a constant holds some of `known`, TRAINING or INFERENCE."""
    if not isinstance(value, (tuple, list)) or not all(one in known for one in value):
        raise UserError(f"{name} = {value!r}: choose some of {', '.join(known)}, such as {name} = ('tf32',), or () for "
                        "none")


def switch_on(chosen, device, *models):
    """Make networks faster, in place; their classes, their weights' names and what they compute stay.

    Args:
        chosen: names of INFERENCE; models: nn.Modules on `device`.
    """
    if idle := [name for name in ("tf32", "cuda_graphs") if name in chosen and device.type != "cuda"]:
        processes.say(f"note: FAST: {', '.join(idle)} without effect, as this is no GPU")
    if "tf32" in chosen and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    for model in models:
        if "channels_last" in chosen:
            model.to(memory_format=torch.channels_last)
        if "cuda_graphs" in chosen and device.type == "cuda":
            model.compile(mode="reduce-overhead")
        elif "compile" in chosen:
            model.compile()
