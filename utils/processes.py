"""One process or many: the same script under python, torchrun and accelerate launch."""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs


def accelerator():
    """-> this process's Accelerator; every caller gets the same settings, as accelerate demands.

    Precision is the engine's business, whatever an `accelerate config` says. NCCL does not exist on Windows.
    """
    # find_unused_parameters: published SPDNet weights hold tensors that its forward never touches
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if sys.platform == "win32" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    # without a GPU torchrun's processes only find each other when they are told that it is a CPU run
    many_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    return Accelerator(mixed_precision="no", kwargs_handlers=handlers, cpu=many_on_cpu)


def device():
    """-> this process's device: its GPU under torchrun, the first GPU, or the CPU."""
    return accelerator().device


def announced_device():
    """`device()`, said aloud: a run on the CPU by mistake takes weeks."""
    chosen = device()
    if chosen.type == "cuda":
        memory = torch.cuda.get_device_properties(chosen).total_memory / 2**30
        text = f"{torch.cuda.get_device_name(chosen)}, {memory:.0f} GB, {accelerator().num_processes} process(es)"
    elif torch.version.cuda is None and torch.version.hip is None:
        text = f"CPU, as torch {torch.__version__} is built without CUDA (README: install torch from PyTorch's index)"
    else:
        text = "CPU, as torch finds no usable GPU (nvidia-smi shows driver and GPU)"
    say(f"device: {text}")
    return chosen


def bf16_is_emulated(device):
    """Whether `device` is a CPU without instructions for bf16, where it is about ten times slower than float32."""
    if device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def same_buffers(model):
    """Give every process the main one's buffers (BatchNorm statistics); every process must call it."""
    if accelerator().num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def is_main():
    """-> True on the one process that prints and writes."""
    return accelerator().is_main_process


def say(text):
    """Print once, however many processes there are."""
    if is_main():
        print(text, flush=True)


def any_of(flag):
    """-> True everywhere if `flag` is true on any process; every process must call it."""
    if accelerator().num_processes == 1:
        return flag
    value = torch.tensor(int(flag), device=device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value.item())
