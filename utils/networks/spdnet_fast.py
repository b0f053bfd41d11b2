"""SPDNet in another order of operations: the function of utils/networks/spdnet.py to float32 rounding, in less time.

Each function here is named after the module of spdnet.py that it takes and computes what that module's forward does.
The differences: channels_last on the CPU; concatenations before a convolution are sums of convolutions; the Haar
transform before or after a convolution is folded into its weights; a channel that is repeated three times is convolved
once with the summed weights; of the transposed convolutions only the quarter that the nearest-neighbour resize keeps
is computed; convolutions with two or three output channels are matrix products; the 3x3 convolutions have the weight
gradient of utils/networks/conv3x3.py. `restore` can also recompute activations in the backward pass, which takes a
fraction of the memory. benchmarks/spdnet.py measures both orders, tests/test_spdnet.py holds them equal.

Letters in shape comments: B batch, C channels, H W image, h w feature map.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from utils.networks.conv3x3 import conv3x3

# A Haar sub-band (row) from the four pixels of a 2x2 square (column: top left, top right, bottom left, bottom right).
# Rows in the order of the forward transform's channel blocks, [yh0 | yh1 | yh2 | yl].
HAAR = ((0.5, 0.5, -0.5, -0.5), (0.5, -0.5, 0.5, -0.5), (0.5, -0.5, -0.5, 0.5), (0.5, 0.5, 0.5, 0.5))


# --- the network --------------------------------------------------------------------------------------------------


def restore(net: nn.Module, x: Tensor) -> list[Tensor]:
    """SPDNet.restore(x): (B, 3, H, W) in [0, 255] -> [out3, out2, out1], each like x.

    With `net.activation_checkpointing` and gradients enabled, the backward pass computes most activations again.
    """
    run = call_and_recompute if net.activation_checkpointing and torch.is_grad_enabled() else call
    x = x.contiguous(memory_format=torch.channels_last)
    x_init = convd(net.conv_init2, convd(net.conv_init1, x))                             # (B, C, H, W), like x1..x3
    x1 = sub_network(net.sub1, x_init, run(prior_branch, net.res_extra1, residue_channel(x)), run)
    out1 = thin_conv(net.output1, x1)                                                    # (B, 3, H, W)
    x2 = sub_network(net.sub2, convd(net.ag1, x1, x_init), run(prior_branch, net.res_extra2, residue_channel(out1)),
                     run)
    out2 = thin_conv(net.output2, run(convd, net.ag2_en, x2, x1))
    x3 = sub_network(net.sub3, convd(net.ag2, x2, x1, x_init),
                     run(prior_branch, net.res_extra3, residue_channel(out2)), run)
    out3 = thin_conv(net.output3, run(convd, net.ag_en, x3, x2, x1))
    return [image.contiguous() for image in (out3, out2, out1)]


def call(function, *inputs):
    return function(*inputs)


def call_and_recompute(function, *inputs):
    """Call without keeping what the backward pass needs; it calls again. Same values, same gradients."""
    return recompute(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def sub_network(sub: nn.Module, x: Tensor, prior: Tensor, run=call) -> Tensor:
    """One stage: features and prior, both (B, C, H, W), -> (B, C, H, W).

    run(function, *inputs) runs one part of it: `call` or `call_and_recompute`.
    """
    level1 = run(guided, sub, x, prior)
    level2 = run(haar_conv, sub.DWT_2, sub.DWT.matrix, level1)
    level3 = run(haar_conv, sub.DWT_3, sub.DWT.matrix, level2)
    for group in (sub.branch1_1, sub.branch1_2, sub.branch1_3):
        level1 = run(residual_group, group, level1)
    for group in (sub.branch2_1, sub.branch2_2, sub.branch2_3):
        level2 = run(residual_group, group, level2)
    for group in (sub.branch3_1, sub.branch3_2, sub.branch3_3):
        level3 = run(residual_group, group, level3)
    level2 = run(merge, sub.IDWT_3, sub.fuse23, level3, level2)
    return run(merge, sub.IDWT_2, sub.fuse12, level2, level1)


def guided(sub: nn.Module, x: Tensor, prior: Tensor) -> Tensor:
    return convd(sub.fuse_res, *interactive_fusion(sub.prior, x, prior))


def merge(inverse: nn.Module, fusion: nn.Module, coarse: Tensor, fine: Tensor) -> Tensor:
    return fuse(fusion, conv_haar_inverse(inverse, coarse), fine)


def residue_channel(image: Tensor) -> Tensor:
    """Largest minus smallest of R, G and B: (B, 3, H, W) -> (B, 1, H, W), in the image's range."""
    return image.amax(1, keepdim=True) - image.amin(1, keepdim=True)


def prior_branch(branch: nn.Module, residue: Tensor) -> Tensor:
    """Features of a residue channel: (B, 1, H, W) -> (B, C, H, W)."""
    first = branch.conv_init1.conv  # of three equal channels: the sum of its weights, applied to one
    features = F.conv2d(reflect(residue), first.weight.sum(1, keepdim=True), first.bias).relu_()
    return residual_group(branch.extra, convd(branch.conv_init2, features))


def interactive_fusion(fusion: nn.Module, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Features and prior gate each other: two (B, C, h, w) -> two (B, C, h, w)."""
    attention = torch.sigmoid(padded_conv(fusion.query_conv, x) * padded_conv(fusion.key_conv, prior))
    return gate(x, attention, fusion.gamma1), gate(prior, attention, fusion.gamma2)


def gate(feature: Tensor, attention: Tensor, gamma: nn.Conv2d) -> Tensor:
    gated = feature * attention
    maps = thin_conv(gamma, feature, gated)                                              # (B, 2, h, w)
    return (feature * maps[:, :1]).add_(gated * maps[:, 1:])


# --- residual blocks ----------------------------------------------------------------------------------------------


def residual_group(group: nn.Module, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h, w)."""
    *blocks, last = group.module_body
    y = x
    for block in blocks:
        y = residual_block(block, y)
    return padded_conv(last, y).add_(x).relu_()


def residual_block(block: nn.Module, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h, w)."""
    first, _, second, _ = block.module_body
    y = padded_conv(second, padded_conv(first, x).relu_()).relu_()
    mean = y.sum((2, 3)) / (y.shape[2] * y.shape[3])  # (B, C); the gradient of mean() would fill a whole map
    return (y * block.se.fc(mean)[:, :, None, None]).add_(x)


def fuse(fusion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Coarse x (B, C, h', w') onto fine y (B, C, h, w) -> (B, C, h, w)."""
    return residual_block(fusion.rb, up_conv(fusion.up, x, y.shape[2:]) + y).relu_()


# --- convolutions -------------------------------------------------------------------------------------------------


def reflect(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h + 2, w + 2), mirrored at the border pixel."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def padded_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """3x3 convolution, zero pad 1: (B, in, h, w) -> (B, out, h, w)."""
    return conv3x3(x, conv.weight, conv.bias, 1)


def convd(module: nn.Module, *maps: Tensor) -> Tensor:
    """ConvD of maps that count as their concatenation along the channels: (B, in, h, w) -> (B, out, h, w)."""
    # concatenating costs a copy; the sum of the maps' own convolutions is the same
    weights = module.conv.weight.split([x.shape[1] for x in maps], 1)
    y = conv3x3(reflect(maps[0]), weights[0], module.conv.bias)
    for x, weight in zip(maps[1:], weights[1:], strict=True):
        y = y.add_(conv3x3(reflect(x), weight))
    return y.relu_()


def thin_conv(conv: nn.Conv2d, *maps: Tensor) -> Tensor:
    """3x3 convolution, zero pad 1, of maps that count as their concatenation: (B, in, h, w) -> (B, out, h, w).

    For very few output channels, where convolution kernels leave most of their vector lanes empty: each tap becomes
    an output channel of a matrix product, and `fold` adds the nine results at their places.
    """
    weights = conv.weight.flip(2, 3).flatten(2).transpose(1, 2).flatten(0, 1)            # (out * 9, in)
    taps = sum(weight.expand(x.shape[0], -1, -1) @ x.flatten(2)                          # (B, out * 9, h * w)
               for x, weight in zip(maps, weights.split([x.shape[1] for x in maps], 1), strict=True))
    return F.fold(taps, maps[0].shape[2:], 3, padding=1) + conv.bias[:, None, None]


def haar_conv(module: nn.Module, haar: Tensor, x: Tensor) -> Tensor:
    """ConvD of the Haar transform of x: (B, C, H, W) -> (B, out, ceil(H/2), ceil(W/2)).

    Odd sizes get a zero row or column. Transform and convolution are linear, so the transform is applied to the
    weights (4 C small kernels) and not to the map.
    """
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    b, c, h, w = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    x = x.permute(0, 2, 3, 1).reshape(b, h, 2, w, 2, c).transpose(2, 3)                  # (B, h, w, 2, 2, C)
    pixels = x.reshape(b, h, w, 4 * c).permute(0, 3, 1, 2)                               # channel blocks: 4 pixels
    bands = module.conv.weight.unflatten(1, (4, c))                                      # (out, 4, C, 3, 3)
    weight = torch.einsum("sp,oscij->opcij", haar.to(bands.dtype), bands).flatten(1, 2)
    return conv3x3(reflect(pixels), weight, module.conv.bias).relu_()


def conv_haar_inverse(module: nn.Module, x: Tensor) -> Tensor:
    """Inverse Haar transform of ConvD(x): (B, C, h, w) -> (B, C, 2h, 2w).

    Its output channels are (C, 4) groups [yl, yh0, yh1, yh2]; permuting its weights brings them in blocks, and
    halving them does the transform's factor (a ReLU passes both).
    """
    c = module.conv.out_channels // 4
    weight = module.conv.weight.unflatten(0, (c, 4)).transpose(0, 1).flatten(0, 1) * 0.5
    bias = module.conv.bias.unflatten(0, (c, 4)).transpose(0, 1).flatten() * 0.5
    bands = conv3x3(reflect(x), weight, bias).relu_().permute(0, 2, 3, 1)               # (B, h, w, 4 C)
    yl, yh0, yh1, yh2 = bands.unflatten(3, (4, c)).unbind(3)                             # (B, h, w, C) each
    top, bottom, top_step, bottom_step = yl + yh0, yl - yh0, yh1 + yh2, yh1 - yh2
    top = torch.stack((top + top_step, top - top_step), 3)                               # (B, h, w, 2, C)
    bottom = torch.stack((bottom + bottom_step, bottom - bottom_step), 3)
    return torch.stack((top, bottom), 2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def up_conv(up: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """UpConv: (B, C, h, w) -> (B, C, *size), computing only the pixels that the resize keeps."""
    # many small kernels are slower than the wasted work there; in an exported file they would be thousands of nodes
    if x.is_cuda or torch.compiler.is_exporting():
        return up(x, size)
    x = F.pad(reflect(x), (1, 1, 1, 1))
    weight, bias = up.conv2d.weight.transpose(0, 1), up.conv2d.bias                      # (out, in, 3, 3)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # bf16 is resized in float32
    column_runs = kept_runs(2 * x.shape[3] - 3, size[1], dtype)
    rows = []
    for row in kept_runs(2 * x.shape[2] - 3, size[0], dtype):
        strip, row_weight = x[:, :, row.start:row.stop], weight[:, :, row.taps]
        rows.append(torch.cat([F.conv2d(strip[:, :, :, column.start:column.stop],
                                        row_weight[:, :, :, column.taps], bias) for column in column_runs], 3))
    return torch.cat(rows, 2).relu_()


class KeptRun(NamedTuple):
    """Kept pixels of a transposed convolution, two apart along one axis, as an ordinary convolution."""

    taps: list[int]  # of the kernel's three
    start: int       # the padded input's [start:stop]
    stop: int


@lru_cache(256)
def kept_runs(length: int, kept: int, dtype: torch.dtype) -> tuple[KeptRun, ...]:
    """Which pixels of a transposed convolution a nearest-neighbour resize keeps, along one axis, as convolutions.

    length: pixels of the transposed convolution (kernel 3, stride 2); kept: pixels after the resize, fewer than those;
    dtype: in which the resize works out where they are: at some sizes float32 rounds to another pixel than float64.
    -> each run of kept pixels two apart: it is the ordinary convolution of the input's [start:stop], padded by one
    zero at either end, with those taps. An even output pixel p sees the inputs p/2 - 1 and p/2 (taps 2 and 0), an odd
    one sees only (p - 1)/2 (tap 1).
    """
    pixels = F.interpolate(torch.arange(length, dtype=dtype)[None, None], kept)[0, 0].long().tolist()
    runs, first = [], 0
    for i in range(1, kept + 1):
        if i == kept or pixels[i] != pixels[i - 1] + 2:
            start, count, odd = pixels[first] // 2, i - first, pixels[first] % 2
            taps, start = ([1], start + 1) if odd else ([2, 0], start)
            runs.append(KeptRun(taps, start, start + count + len(taps) - 1))
            first = i
    return tuple(runs)
