"""One process or many: the same script under python, torchrun and accelerate launch."""

import os
import platform
import sys
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from tqdm import tqdm

from utils.config import UserError

LONGEST = timedelta(days=1)  # that processes wait for what the main one does alone: a download, a look at every image


def accelerator():
    """-> this process's Accelerator; every caller gets the same settings, as accelerate demands.

    Precision is the engine's business, whatever an `accelerate config` says. NCCL does not exist on Windows.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"the environment variable {name} = '{os.environ[name]}' must be a whole number; torchrun "
                            "sets it, without torchrun remove it")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 and name not in os.environ]
    if missing or rank >= max(world, 1):
        raise UserError(f"the environment variables WORLD_SIZE = {world} and RANK = {rank} do not go together"
                        + (f", {', '.join(missing)} not being set" if missing else "")
                        + ": torchrun sets them, without torchrun remove them")
    # find_unused_parameters: published SPDNet weights hold tensors that its forward never touches
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if sys.platform == "win32" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    # without a GPU torchrun's processes only find each other when they are told that it is a CPU run
    many_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    return Accelerator(mixed_precision="no", kwargs_handlers=handlers, cpu=many_on_cpu)


def require_one(script):
    """UserError where torchrun has started several processes of a script that does its work in one."""
    if accelerator().num_processes > 1:
        raise UserError(f"{script} runs in one process: start it with python instead of torchrun")


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
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    # oneDNN also says yes where AVX-512 has to imitate it
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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


def progress(items, name, total=None, unit="it", shown=None):
    """-> items behind a progress bar that goes when it is done; the main process shows it for all.

    Args:
        items: iterable; name: beside the bar; total: their number, where len(items) does not tell.
        shown: None to show it on consoles alone, False not to show it.
    """
    return tqdm(items, name, total, ascii=True, leave=False, unit=unit, dynamic_ncols=True,
                disable=None if shown is not False and is_main() else True)


def main_first(work, what):
    """Run `work()` on the main process while the others wait, for hours if need be; every process must call it.

    Args:
        work: callable that may raise UserError; what: in words, for the message of the others.
    Raises:
        UserError: on every process, if it was raised on the main one.
    """
    if accelerator().num_processes == 1:
        work()
        return
    # gloo has no watchdog: a collective of NCCL that waits that long is ended, and the run with it, after minutes
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST)
    error = None
    if is_main():
        try:
            work()
        except UserError as problem:
            error = problem
    failed = torch.tensor(int(error is not None))
    torch.distributed.broadcast(failed, 0, group=group)  # an end of the main process ends this as well
    torch.distributed.destroy_process_group(group)
    if failed:
        raise error or UserError(f"{what}: the main process failed, see its message")


def wait_for_all():
    """Wait until every process is here, for hours if need be."""
    if accelerator().num_processes > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=LONGEST)  # NCCL would give up after minutes
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)


def any_of(flag):
    """-> True everywhere if `flag` is true on any process; every process must call it."""
    if accelerator().num_processes == 1:
        return flag
    value = torch.tensor(int(flag), device=device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return bool(value.item())


def least_of(number):
    """-> the smallest of every process's whole number; every process must call it."""
    if accelerator().num_processes == 1:
        return number
    value = torch.tensor(number, device=device())
    torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return int(value.item())


def mean_over_ranks(records):
    """[{name: number}, ...] of this rank's images -> {name: mean over every rank's images}."""
    everyone = gather_object(records)
    return {name: float(np.mean([record[name] for record in everyone])) for name in everyone[0]}
