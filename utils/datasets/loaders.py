"""DataLoaders whose order and randomness survive a resume and do not depend on workers or ranks."""

import math
import multiprocessing
import signal

import numpy as np
import torch

from utils import processes, system
from utils.config import UserError
from utils.datasets import samples

# Processes of a validation loader on Windows, where each takes half a gigabyte and seconds of imports, anew in every
# pass, while those of the training loader stay.
SPAWNED = 4


class EpochBatches(torch.utils.data.Sampler):
    """Batches of (epoch, index) keys: shuffled by (seed, epoch), shared out over ranks, able to start in the middle."""

    def __init__(self, length, batch_size, shuffle, seed, rank, world):
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    def start_at(self, epoch, first_batch=0):
        self.epoch, self.first = epoch, first_batch

    def __len__(self):
        return math.ceil(self.length / (self.batch_size * self.world))

    def __iter__(self):
        order = np.arange(self.length)
        if self.shuffle:
            # torch's permutation, because numpy does not promise the same stream in every release
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + 7919 * self.epoch))
        order = [int(i) for i in order]
        order += order[:-self.length % self.world]  # every rank gets as many samples
        for batch in range(self.first, len(self)):
            whole = order[batch * self.batch_size * self.world:(batch + 1) * self.batch_size * self.world]
            share = len(whole) // self.world
            yield [(self.epoch, i) for i in whole[self.rank * share:(self.rank + 1) * share]]


def training_loader(dataset, batch_size, workers, seed, collate=samples.collate):
    """DataLoader for `fit`: shuffled, resumable, `batch_size` samples on every rank; 0: `fit` finds how many, and sets
    the batch sampler's `batch_size`."""
    if not isinstance(batch_size, int) or batch_size < 0:
        raise UserError(f"BATCH_SIZE = {batch_size}: choose a whole number, 1 or more, or 0 for the most that fit")
    accelerator = processes.accelerator()
    batches = EpochBatches(len(dataset), batch_size or 1, True, seed, accelerator.process_index,
                           accelerator.num_processes)
    return _loader(dataset, workers, collate, batch_sampler=batches, persistent_workers=workers > 0)


def validation_loader(dataset, batch_size, workers, collate=samples.collate):
    """DataLoader over each sample once, in order; under torchrun every rank gets its own share."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"EVAL_BATCH_SIZE = {batch_size}: choose a whole number, 1 or more")
    accelerator = processes.accelerator()
    mine = list(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    if multiprocessing.get_start_method() == "spawn":
        workers = min(workers, SPAWNED)
    return _loader(dataset, workers, collate, batch_size=batch_size, sampler=mine)


def each(work, loader, name=""):
    """Iterate work(batch) over a validation loader. Where a GPU's memory is too small for a batch, this one and all
    after it, also in later passes over the loader, are worked on in halves, or halves of these; said once.

    Args:
        work: (batch, on the CPU) -> what of it is wanted; called without gradients.
        name: beside a progress bar; "" for none.
    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    for batch in processes.progress(loader, name) if name else loader:
        waiting = samples.parts(batch, getattr(loader, "most_at_once", None))
        while waiting:
            try:
                with torch.no_grad():
                    found = work(waiting[0])
            except torch.OutOfMemoryError:
                if (size := len(waiting[0]["images"])) == 1:
                    raise
                found = None
            if found is not None:
                yield found
                del waiting[0]
                continue
            torch.cuda.empty_cache()  # here, where the exception no longer holds the failed call's tensors
            if not hasattr(loader, "most_at_once"):
                processes.say(f"note: a validation batch of {size} images is too much for the GPU's memory: halved")
            loader.most_at_once = size // 2
            waiting = [part for one in waiting for part in samples.parts(one, size // 2)]


def image_paths(loaders):
    """-> paths of the image files behind several loaders."""
    return [path for loader in loaders for path in loader.dataset.image_paths()]


def _loader(dataset, workers, collate, **kwargs):
    if workers < 0:
        raise UserError(f"DATALOADER_WORKERS = {workers}: choose 0 or more")
    share = max(1, system.available_cores() // processes.accelerator().num_processes)  # of the cores, for this rank
    workers = min(workers, share)
    return torch.utils.data.DataLoader(  # an own generator: else every pass would draw from the model's randomness
        dataset, num_workers=workers, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts, generator=torch.Generator(), **kwargs)


def _ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C belongs to the main process, which saves first
    torch.set_num_threads(1)
