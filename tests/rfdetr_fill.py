"""RF-DETR weights and inputs for tests/data/rfdetr/reference_nano.npz: each tensor is a function of its name.

This project's own conformance file (../shared/conformance/rfdetr); the reference outputs were made by the published
package with these weights, so nothing here may change. Requires no weight file.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data" / "rfdetr"


def fill_tensor(name, shape):
    """The float32 tensor of one entry of the published state dict."""
    values = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(tuple(shape))
    heads_aside = name.replace("class_embed", "").replace("bbox_embed", "")
    if name.endswith("weight") and len(shape) > 1 and "embed.weight" not in heads_aside:
        values *= 0.7 / np.sqrt(np.prod(shape[1:]))
    elif "refpoint_embed" in name:
        values *= 0.1
    elif "query_feat" in name:
        values *= 0.5
    elif name.endswith("weight") or "lambda1" in name:  # norms and layer scale
        values = 1.0 + 0.1 * values
    else:  # biases, position embeddings, class and mask tokens
        values *= 0.05
    return torch.from_numpy(values.astype(np.float32))


def fill_input(batch, resolution):
    """(batch, 3, resolution, resolution) float32, already ImageNet-normalised."""
    rng = np.random.RandomState(batch * 100003 + resolution)
    coarse = torch.from_numpy(rng.standard_normal((batch, 3, 12, 12)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(resolution, resolution), mode="bicubic",
                                             align_corners=False)
    return smooth + 0.1 * torch.from_numpy(rng.standard_normal((batch, 3, resolution, resolution)).astype(np.float32))
