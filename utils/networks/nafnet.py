"""NAFNet: a U-shaped network of gated convolution blocks, without activation functions and without BatchNorm.

Source: Chen, Chu, Zhang, Sun, "Simple Baselines for Image Restoration", ECCV 2022; written from the paper. A product of
two halves of the channels (the simple gate) takes the place of every activation, a LayerNorm over channels that of
BatchNorm, and a channel attention of one product and one 1x1 convolution is all the attention there is.

Different from the paper:
- `patch`: the network works on squares of patch x patch pixels (a pixel-unshuffle in front, a pixel-shuffle behind).
  With 2 it sees every pixel still, in a quarter of the positions: about three times as fast on a CPU for the same
  number of blocks.
- The channel attention looks at the surroundings of a position, `window` pixels wide, instead of at the whole image:
  trained on crops, the paper's network meets other statistics on whole images (Chu et al., "Improving Image Restoration
  by Revisiting Global Information Aggregation", ECCV 2022), and tiles would differ from the whole image.
- `rain_channels=1`: one correction for all three colours, where the rain is known to be grey, as added streaks are.
- The last convolution starts at zero, so that the network starts as the identity.

Letters in shape comments: B batch, C channels, H W image, h w feature map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.config import UserError

WINDOW = 80  # pixels that the channel attention averages over, a little more than the usual training crop of 64
_CELLS = 5   # the window is so many cells wide: means of cells are taken once, and of 5 x 5 cells after that


class LayerNorm(nn.Module):
    """Normalises the channels of every position: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (B, h, w, C), which in channels_last is the order in memory
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


def gate(x):
    """The simple gate: the product of the two halves of the channels, (B, 2C, h, w) -> (B, C, h, w)."""
    first, second = x.chunk(2, 1)
    return first * second


def surroundings(x, cell):
    """Means over a window of 5 x 5 cells around each cell, at the border over what there is of it.

    Args:
        x: (B, C, h, w); cell: side of a cell in positions.
    Returns:
        (B, C, ceil(h / cell), ceil(w / cell)).
    """
    means = F.avg_pool2d(x, cell, ceil_mode=True) if cell > 1 else x
    return F.avg_pool2d(means, _CELLS, 1, _CELLS // 2, count_include_pad=False)


class Attention(nn.Module):
    """Simplified channel attention: x times a 1x1 convolution of its surroundings' means; (B, C, h, w) both."""

    def __init__(self, channels, cell):
        super().__init__()
        self.cell = cell
        self.weights = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        weights = self.weights(surroundings(x, self.cell))
        if min(weights.shape[-2:]) > 1 or max(weights.shape[-2:]) > 1:
            weights = F.interpolate(weights, scale_factor=float(self.cell), mode="bilinear", align_corners=False)
            weights = weights[..., :x.shape[-2], :x.shape[-1]]
        return x * weights


class Block(nn.Module):
    """Two residual halves, (B, C, h, w) -> (B, C, h, w): spatial (1x1, depthwise 3x3, gate, attention, 1x1), then per
    position (1x1, gate, 1x1). Both begin with a LayerNorm and end with a scale per channel that starts at zero."""

    def __init__(self, channels, cell):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = Attention(channels, cell)
        self.project = nn.Conv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.scale1 = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale2 = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        y = gate(self.depthwise(self.expand(self.norm1(x))))
        x = x + self.scale1 * self.project(self.attention(y))
        return x + self.scale2 * self.narrow(gate(self.widen(self.norm2(x))))


class NAFNet(nn.Module):
    """Rainy images in, (B, 3, H, W) RGB in [0, 1]; the same without rain out, not clamped. Sides: see `multiple`.

    Args:
        width: channels of the first level; each further level has twice as many at half the side.
        encoder, decoder: blocks of each level on the way down and on the way up, first level first.
        middle: blocks of the deepest level.
        patch: side of the squares of pixels that one position of the first level stands for; 1 in the paper.
        window: pixels that the channel attention averages over, about the side of the training crops.
        rain_channels: 3, or 1 where the rain is the same in all colours.
    """

    def __init__(self, width=32, encoder=(2, 2), middle=4, decoder=(2, 2), patch=2, window=WINDOW, rain_channels=3):
        super().__init__()
        encoder, decoder = tuple(encoder), tuple(decoder)
        if width < 1 or middle < 0 or patch < 1 or len(encoder) != len(decoder) or min(encoder + decoder + (0,)) < 0:
            raise UserError(f"NAFNET_WIDTH = {width} and NAFNET_PATCH = {patch} must be at least 1, NAFNET_ENCODER = "
                            f"{encoder} and NAFNET_DECODER = {decoder} as long as each other, and no number of blocks "
                            f"(NAFNET_MIDDLE = {middle}) negative")
        if rain_channels not in (1, 3):
            raise UserError(f"NAFNET_RAIN_CHANNELS = {rain_channels}: choose 3, or 1 for rain that is grey")
        if window < _CELLS:
            raise UserError(f"NAFNET_WINDOW = {window}: choose about the side of the training crops, such as {WINDOW}")
        self.patch, levels = patch, len(encoder)
        self.multiple = patch * 2**levels

        def blocks(level, count):
            cell = max(1, round(window / (_CELLS * patch * 2**level)))
            return nn.Sequential(*(Block(width * 2**level, cell) for _ in range(count)))

        self.first = nn.Conv2d(3 * patch**2, width, 3, padding=1)
        self.encoder = nn.ModuleList(blocks(level, count) for level, count in enumerate(encoder))
        self.down = nn.ModuleList(nn.Conv2d(width * 2**i, width * 2**(i + 1), 2, 2) for i in range(levels))
        self.middle = blocks(levels, middle)
        self.up = nn.ModuleList(nn.Conv2d(width * 2**(i + 1), width * 2**(i + 2), 1, bias=False) for i in range(levels))
        self.decoder = nn.ModuleList(blocks(level, count) for level, count in enumerate(decoder))
        self.last = nn.Conv2d(width, rain_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images):
        x = self.first(F.pixel_unshuffle(images, self.patch))  # (B, width, H / patch, W / patch)
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)  # (B, 2C, h / 2, w / 2)
        x = self.middle(x)
        for blocks, up, skip in reversed(list(zip(self.decoder, self.up, skips, strict=True))):
            x = blocks(F.pixel_shuffle(up(x), 2) + skip)
        return images + F.pixel_shuffle(self.last(x), self.patch)  # a single correction is added to all three colours
