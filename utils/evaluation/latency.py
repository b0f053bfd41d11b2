"""Latencies, measured so that models can be compared."""

import time

import numpy as np
import torch

from utils.config import UserError


@torch.no_grad()
def latencies(models, images, warmup=2, repeats=7):
    """Median milliseconds per call of several models, taken in turns in one run so that they share the machine's mood.

    Args:
        models: {name: callable of images}; images: (B, 3, H, W) on the device.
    Returns:
        {name: milliseconds per batch}.
    """
    if repeats < 1:
        raise UserError(f"{repeats} repetitions have no median: set 1 or more")

    def clock():
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
    times = {name: [] for name in models}
    for turn in range(warmup + repeats):
        for name, model in models.items():
            begin = clock()
            model(images)
            if turn >= warmup:
                times[name].append(1000 * (clock() - begin))
    return {name: float(np.median(values)) for name, values in times.items()}
