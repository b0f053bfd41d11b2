"""DerainNet: three wide convolutions that predict the clean detail of an image.

Source: Fu, Huang, Ding, Liao, Paisley, "Clearing the Skies: A Deep Network Architecture for Single-Image Rain Removal",
IEEE TIP 2017, in the form of the authors' TensorFlow code; written from a description. Images are RGB in [0, 1].

512 maps at full size: 2 KB per pixel and map set in float32, so large images go through utils/networks/tiling.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.networks.guided_filter import base_layer

FEATURES = 512
PADDING = 10  # pixels that are added on each side
_CUT = 6      # of the network's output on each side: 20 - 15 + 7 = 12 pixels more than the image


class DerainNet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, H, W), not clamped: the base of the image and the predicted detail."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, FEATURES, 16)
        self.conv2 = nn.Conv2d(FEATURES, FEATURES, 1)
        self.conv3 = nn.ConvTranspose2d(FEATURES, 3, 8)
        for module in (self.conv1, self.conv2, self.conv3):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, images):
        padded = _with_edges_repeated(images, PADDING)
        base = base_layer(padded)
        detail = self.conv3(F.relu(self.conv2(F.relu(self.conv1(padded - base)))))  # (B, 3, H + 12, W + 12)
        return base[..., PADDING:-PADDING, PADDING:-PADDING] + detail[..., _CUT:-_CUT, _CUT:-_CUT]


def _with_edges_repeated(images, amount):
    """Mirrored at the border with the edge pixel twice: (B, 3, H, W) -> (B, 3, H + 2 amount, W + 2 amount)."""
    for dim in (-1, -2):
        size = images.shape[dim]
        at = torch.arange(-amount, size + amount, device=images.device) % (2 * size)  # there and back again
        images = images.index_select(dim, torch.minimum(at, 2 * size - 1 - at))
    return images
