"""Weights, inputs and published outputs of the de-rainers for tests/data/derainers.npz: weights are functions of names.

The reference outputs (../shared/conformance) were made with these weights by the published code, or where none runs by
a reference implementation of its description; nothing here may change. The file holds every third pixel of them.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data" / "derainers.npz"
STEP = 3  # of the pixels that the file holds
GAINS = {"prenet": 0.8, "prn": 0.8, "rescan": 4.0, "ddn": 0.65, "derainnet": 0.65, "mprnet": 0.65, "restormer": 0.65}


def fill_tensor(name, shape, gain):
    """The tensor of one state dict entry."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if tuple(shape) == (1,):  # a shared PReLU slope appears under many names
        return torch.full((1,), 0.2)
    values = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        values = 1 + 0.1 * np.abs(values)
    elif len(shape) > 1:
        values *= gain / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".weight"):  # scale of a normalisation layer
        values = 1 + 0.05 * values
    else:
        values *= 0.05
    return torch.from_numpy(values.astype(np.float32))


def fill(arch, net):
    """Fill a network in place. -> the network in eval mode"""
    gain = GAINS[arch.split("_")[0]]
    net.load_state_dict({name: fill_tensor(name, value.shape, gain) for name, value in net.state_dict().items()})
    return net.eval()


def fill_input(height, width):
    """(1, 3, height, width) float32 in [0, 1]."""
    values = np.random.RandomState(height * 10007 + width).uniform(0, 1, (1, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))


def references():
    """{"prenet_out_61x83": every third pixel, ..., "prenet_out_61x83_std": () of the whole array, ...}."""
    with np.load(DATA) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
