"""SPDNet weights and inputs for tests/data/spdnet/reference.npz: each tensor is a function of its name.

This project's own conformance file; the reference outputs were made by the published code with these weights, so
nothing here may change. Requires no weight file.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data" / "spdnet"
HAAR = 0.7071067811865476


def shapes() -> dict[str, list[int]]:
    """Names and shapes of the 930 entries of the published state dict (n_feats=32, n_resblocks=3)."""
    return json.loads((DATA / "state_dict.json").read_text())


def fill_tensor(name: str, shape) -> torch.Tensor:
    """The float32 tensor of one state dict entry."""
    leaf = name.rsplit(".", 1)[-1]
    if "DWT." in name:  # the two-tap Haar filters h0, g0 (low) and h1, g1 (high)
        return torch.tensor((HAAR, HAAR if leaf[1] == "0" else -HAAR)).reshape(tuple(shape))
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if ".gamma" in name:  # gates multiply features with features: small
        values *= 0.002
    elif len(shape) > 1:
        values *= 0.65 / np.sqrt(np.prod(shape[1:]))
    else:
        values *= 0.05
    return torch.from_numpy(values.astype(np.float32))


def fill_state(entries: dict) -> dict[str, torch.Tensor]:
    """A whole state dict from {name: shape}."""
    return {name: fill_tensor(name, shape) for name, shape in entries.items()}


def fill_input(height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) float32 in [0, 255]."""
    values = np.random.RandomState(height * 10007 + width).uniform(0, 255, (1, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))


def reference() -> dict[str, torch.Tensor]:
    """The published code's out1, out2, out3 and dx (gradient of mean(out3**2)): {"out3_64x96": (1, 3, 64, 96), ...}."""
    with np.load(DATA / "reference.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
