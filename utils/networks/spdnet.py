"""SPDNet: de-raining that preserves structure, guided by the residue channel prior.

Source: Yi, Li, Dai, Fang, Zhang, Zeng, "Structure-Preserving Deraining with Residue Channel Prior Guidance",
ICCV 2021. Written from the paper and from a description of the published checkpoints (tensor names, shapes, data
flow); the published state dicts load here with strict=True and ours load in the published code. Deviations, none of
which changes a result beyond float32 rounding: it runs in channels_last on the CPU; concatenations before a convolution
are sums of convolutions; the Haar transform before a convolution is folded into its weights; a channel that is
repeated three times is convolved once with the summed weights; and of the transposed convolutions only the quarter
that the nearest-neighbour resize keeps is computed.

Images are RGB in [0, 255] here; the conversion from the [0, 1] of the rest of the project is done by the wrapper that
owns the network (DESIGN rule 7). Letters in shape comments: B batch, C channels, H W image, h w feature map.
"""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from utils import checkpoint
from utils.networks.conv3x3 import Conv3x3, conv3x3
from utils.networks.spdnet_plain import PlainSPDNet

TAP = 0.5 ** 0.5   # the one tap of the orthonormal Haar filters
MIN_SIZE = 5       # level 3 is a quarter of the image, rounded up, and reflection padding by 1 needs two pixels there

# modules of each `subK` that the published network declares and never runs
UNUSED = ("branch1_1_d", "branch1_2_d", "branch2_1_u", "branch2_1_d", "branch2_2_u", "branch2_2_d", "branch3_1_u",
          "branch3_2_u", "down2", "down3", "fuse12.conv", "fuse23.conv")

# A Haar sub-band (row) from the four pixels of a 2x2 square (column: top left, top right, bottom left, bottom right).
# Rows in the order of the forward transform's channel blocks, [yh0 | yh1 | yh2 | yl].
HAAR = ((0.5, 0.5, -0.5, -0.5), (0.5, -0.5, 0.5, -0.5), (0.5, -0.5, -0.5, 0.5), (0.5, 0.5, 0.5, 0.5))


def reflect(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h + 2, w + 2), mirrored at the border pixel."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


class ConvD(nn.Module):
    """Reflection pad 1, 3x3 convolution, ReLU: (B, in, h, w) -> (B, out, h, w).

    Several maps count as their concatenation along the channels. `ins` never enters the forward pass: the published
    network declares an instance norm and skips it. It is here only so that state dicts match.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        self.ins = nn.InstanceNorm2d(out_channels, affine=True)  # unused

    def forward(self, *maps: Tensor) -> Tensor:
        # concatenating costs a copy; the sum of the maps' own convolutions is the same
        weights = self.conv.weight.split([x.shape[1] for x in maps], 1)
        y = conv3x3(reflect(maps[0]), weights[0], self.conv.bias)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            y = y.add_(conv3x3(reflect(x), weight))
        return y.relu_()

    def of_repeated(self, x: Tensor) -> Tensor:
        """The same for a one-channel map (B, 1, h, w) that is repeated to fill the input channels."""
        return F.conv2d(reflect(x), self.conv.weight.sum(1, keepdim=True), self.conv.bias).relu_()


class SqueezeExcitation(nn.Module):
    """Channel attention with reduction 1: (B, C, h, w) -> (B, C, 1, 1), a weight in (0, 1) for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.ReLU(),
                                nn.Linear(channels, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        mean = x.sum((2, 3)) / (x.shape[2] * x.shape[3])  # (B, C); the gradient of mean() would fill a whole map
        return self.fc(mean)[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two (3x3 convolution, ReLU), squeeze-excitation, plus the input: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.module_body = nn.Sequential(Conv3x3(channels, channels, padding=1), nn.ReLU(inplace=True),
                                         Conv3x3(channels, channels, padding=1), nn.ReLU(inplace=True))
        self.se = SqueezeExcitation(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module_body(x)
        return (y * self.se(y)).add_(x)


class ResidualGroup(nn.Module):
    """`n_resblocks` residual blocks, a 3x3 convolution, plus the input, ReLU: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, n_resblocks: int):
        super().__init__()
        self.module_body = nn.Sequential(*[ResidualBlock(channels) for _ in range(n_resblocks)],
                                         Conv3x3(channels, channels, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.module_body(x).add_(x).relu_()


class UpConv(nn.Module):
    """Reflection pad 1, transposed 3x3 convolution with stride 2, ReLU, nearest-neighbour resize to `size`.

    (B, C, h, w) -> (B, C, *size). The transposed convolution yields (2h + 5, 2w + 5) pixels for a size of about (h, w):
    three quarters of them are thrown away by the resize.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv2d = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if x.is_cuda:  # many small kernels are slower than the wasted work there
            return self.direct(x, size)
        x = F.pad(reflect(x), (1, 1, 1, 1))
        weight, bias = self.conv2d.weight.transpose(0, 1), self.conv2d.bias              # (out, in, 3, 3)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # bf16 is resized in float32
        column_runs = kept_runs(2 * x.shape[3] - 3, size[1], dtype)
        rows = []
        for row_taps, top, bottom in kept_runs(2 * x.shape[2] - 3, size[0], dtype):
            strip, row_weight = x[:, :, top:bottom], weight[:, :, row_taps]
            rows.append(torch.cat([F.conv2d(strip[:, :, :, left:right], row_weight[:, :, :, taps], bias)
                                   for taps, left, right in column_runs], 3))
        return torch.cat(rows, 2).relu_()

    def direct(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The definition, operation by operation."""
        return F.interpolate(F.relu_(self.conv2d(reflect(x))), size)


@lru_cache(256)
def kept_runs(length: int, kept: int, dtype: torch.dtype) -> tuple[tuple[list[int], int, int], ...]:
    """Which pixels of a transposed convolution a nearest-neighbour resize keeps, along one axis, as convolutions.

    length: pixels of the transposed convolution (kernel 3, stride 2); kept: pixels after the resize, fewer than those;
    dtype: in which the resize works out where they are: at some sizes float32 rounds to another pixel than float64.
    -> (kernel taps, start, stop) of each run of kept pixels two apart: such a run is the ordinary convolution of the
    input's [start:stop], padded by one zero at either end, with those taps. An even output pixel p sees the inputs
    p/2 - 1 and p/2 (taps 2 and 0), an odd one sees only (p - 1)/2 (tap 1).
    """
    pixels = F.interpolate(torch.arange(length, dtype=dtype)[None, None], kept)[0, 0].long().tolist()
    runs, first = [], 0
    for i in range(1, kept + 1):
        if i == kept or pixels[i] != pixels[i - 1] + 2:
            start, count, odd = pixels[first] // 2, i - first, pixels[first] % 2
            runs.append(([1], start + 1, start + 1 + count) if odd else ([2, 0], start, start + count + 1))
            first = i
    return tuple(runs)


class Fuse(nn.Module):
    """Coarse x (B, C, h', w') onto fine y (B, C, h, w): relu(rb(up(x) + y)), (B, C, h, w).

    `conv` never enters the forward pass; it is here only so that state dicts match.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.up = UpConv(channels)
        self.conv = ConvD(channels, channels)  # unused
        self.rb = ResidualBlock(channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rb(self.up(x, y.shape[2:]) + y).relu_()


class InteractiveFusion(nn.Module):
    """Features and prior gate each other: two (B, C, h, w) -> two (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = Conv3x3(channels, channels, padding=1)
        self.key_conv = Conv3x3(channels, channels, padding=1)
        self.gamma1 = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.gamma2 = nn.Conv2d(2 * channels, 2, 3, padding=1)

    def forward(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        attention = torch.sigmoid(self.query_conv(x) * self.key_conv(prior))
        return self.gate(x, attention, self.gamma1), self.gate(prior, attention, self.gamma2)

    @staticmethod
    def gate(feature: Tensor, attention: Tensor, gamma: nn.Conv2d) -> Tensor:
        gated = feature * attention
        maps = thin_conv((feature, gated), gamma)                       # (B, 2, h, w)
        return (feature * maps[:, :1]).add_(gated * maps[:, 1:])


def thin_conv(maps: tuple[Tensor, ...], conv: nn.Conv2d) -> Tensor:
    """3x3 convolution, zero pad 1, of maps that count as their concatenation: (B, in, h, w) -> (B, out, h, w).

    For very few output channels, where convolution kernels leave most of their vector lanes empty: each tap becomes
    an output channel of a matrix product, and `fold` adds the nine results at their places.
    """
    weights = conv.weight.flip(2, 3).flatten(2).transpose(1, 2).flatten(0, 1)            # (out * 9, in)
    taps = sum(weight.expand(len(x), -1, -1) @ x.flatten(2)                              # (B, out * 9, h * w)
               for x, weight in zip(maps, weights.split([x.shape[1] for x in maps], 1), strict=True))
    return F.fold(taps, maps[0].shape[2:], 3, padding=1) + conv.bias[:, None, None]


class HaarFilters(nn.Module):
    """The Haar filter taps that the published state dicts carry as buffers; constants, never read by the forward."""

    def __init__(self, prefix: str):
        super().__init__()
        for axis, shape in (("col", (1, 1, 2, 1)), ("row", (1, 1, 1, 2))):
            self.register_buffer(f"{prefix}0_{axis}", torch.tensor((TAP, TAP)).reshape(shape))
            self.register_buffer(f"{prefix}1_{axis}", torch.tensor((TAP, -TAP)).reshape(shape))


def haar_conv(x: Tensor, convd: ConvD) -> Tensor:
    """convd(Haar transform of x): (B, C, H, W) -> (B, out, ceil(H/2), ceil(W/2)); odd sizes get a zero row or column.

    Both are linear, so the transform is applied to the weights (4 C small kernels) and not to the map.
    """
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    b, c, h, w = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    x = x.permute(0, 2, 3, 1).reshape(b, h, 2, w, 2, c).transpose(2, 3)                  # (B, h, w, 2, 2, C)
    pixels = x.reshape(b, h, w, 4 * c).permute(0, 3, 1, 2)                               # channel blocks: 4 pixels
    bands = convd.conv.weight.unflatten(1, (4, c))                                       # (out, 4, C, 3, 3)
    weight = torch.einsum("sp,oscij->opcij", bands.new_tensor(HAAR), bands).flatten(1, 2)
    return conv3x3(reflect(pixels), weight, convd.conv.bias).relu_()


def conv_haar_inverse(x: Tensor, convd: ConvD) -> Tensor:
    """Inverse Haar transform of convd(x): (B, C, h, w) -> (B, C, 2h, 2w).

    convd's output channels are (C, 4) groups [yl, yh0, yh1, yh2]; permuting its weights brings them in blocks, and
    halving them does the transform's factor (a ReLU passes both).
    """
    c = convd.conv.out_channels // 4
    weight = convd.conv.weight.unflatten(0, (c, 4)).transpose(0, 1).flatten(0, 1) * 0.5
    bias = convd.conv.bias.unflatten(0, (c, 4)).transpose(0, 1).flatten() * 0.5
    bands = conv3x3(reflect(x), weight, bias).relu_().permute(0, 2, 3, 1)               # (B, h, w, 4 C)
    yl, yh0, yh1, yh2 = bands.unflatten(3, (4, c)).unbind(3)                             # (B, h, w, C) each
    top, bottom, top_step, bottom_step = yl + yh0, yl - yh0, yh1 + yh2, yh1 - yh2
    top = torch.stack((top + top_step, top - top_step), 3)                               # (B, h, w, 2, C)
    bottom = torch.stack((bottom + bottom_step, bottom - bottom_step), 3)
    return torch.stack((top, bottom), 2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class SubNetwork(nn.Module):
    """One stage's wavelet pyramid: features and prior, both (B, C, H, W), -> (B, C, H, W)."""

    def __init__(self, channels: int, n_resblocks: int):
        super().__init__()

        def group():
            return ResidualGroup(channels, n_resblocks)

        def unused_conv():  # never enters the forward pass; only so that state dicts match
            return ConvD(channels, channels)

        def unused_up():    # likewise
            return UpConv(channels)

        self.DWT = HaarFilters("h")
        self.IDWT = HaarFilters("g")
        self.DWT_2 = ConvD(4 * channels, channels)
        self.DWT_3 = ConvD(4 * channels, channels)
        self.IDWT_2 = ConvD(channels, 4 * channels)
        self.IDWT_3 = ConvD(channels, 4 * channels)
        self.prior = InteractiveFusion(channels)
        self.fuse_res = ConvD(2 * channels, channels)
        self.branch1_1, self.branch1_1_d = group(), unused_conv()
        self.branch1_2, self.branch1_2_d = group(), unused_conv()
        self.branch1_3 = group()
        self.down2 = unused_conv()
        self.branch2_1, self.branch2_1_u, self.branch2_1_d = group(), unused_up(), unused_conv()
        self.branch2_2, self.branch2_2_u, self.branch2_2_d = group(), unused_up(), unused_conv()
        self.branch2_3 = group()
        self.down3 = unused_conv()
        self.branch3_1, self.branch3_1_u = group(), unused_up()
        self.branch3_2, self.branch3_2_u = group(), unused_up()
        self.branch3_3 = group()
        self.fuse12 = Fuse(channels)
        self.fuse23 = Fuse(channels)

    def forward(self, x: Tensor, prior: Tensor, segment=None) -> Tensor:
        """`segment(function, *inputs)` runs one part of the network; None calls it."""
        run = segment or call
        level1 = run(self.guided, x, prior)
        level2 = run(haar_conv, level1, self.DWT_2)
        level3 = run(haar_conv, level2, self.DWT_3)
        for group in (self.branch1_1, self.branch1_2, self.branch1_3):
            level1 = run(group, level1)
        for group in (self.branch2_1, self.branch2_2, self.branch2_3):
            level2 = run(group, level2)
        for group in (self.branch3_1, self.branch3_2, self.branch3_3):
            level3 = run(group, level3)
        level2 = run(self.merge, level3, level2, self.IDWT_3, self.fuse23)
        return run(self.merge, level2, level1, self.IDWT_2, self.fuse12)

    def guided(self, x: Tensor, prior: Tensor) -> Tensor:
        return self.fuse_res(*self.prior(x, prior))

    @staticmethod
    def merge(coarse: Tensor, fine: Tensor, convd: ConvD, fuse: Fuse) -> Tensor:
        return fuse(conv_haar_inverse(coarse, convd), fine)


def call(function, *inputs):
    return function(*inputs)


def call_and_recompute(function, *inputs):
    """Call without keeping what the backward pass needs; it calls again. Same values, same gradients."""
    return recompute(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class PriorBranch(nn.Module):
    """Features of a residue channel: (B, 1, H, W), repeated three times, -> (B, C, H, W)."""

    def __init__(self, channels: int, n_resblocks: int):
        super().__init__()
        self.conv_init1 = ConvD(3, channels // 2)
        self.conv_init2 = ConvD(channels // 2, channels)
        self.extra = ResidualGroup(channels, n_resblocks)

    def forward(self, residue: Tensor) -> Tensor:
        return self.extra(self.conv_init2(self.conv_init1.of_repeated(residue)))


def residue_channel(image: Tensor) -> Tensor:
    """Largest minus smallest of R, G and B: (B, 3, H, W) -> (B, 1, H, W), in the image's range."""
    return image.amax(1, keepdim=True) - image.amin(1, keepdim=True)


class SPDNet(nn.Module):
    """The three-stage network; n_feats=32, n_resblocks=3 is the published size (3,318,741 parameters).

    Set `activation_checkpointing = True` to train with a fraction of the memory and a second forward pass.
    """

    def __init__(self, n_feats: int = 32, n_resblocks: int = 3):
        super().__init__()
        self.n_feats, self.n_resblocks = n_feats, n_resblocks
        self.activation_checkpointing = False
        self.conv_init1 = ConvD(3, n_feats // 2)
        self.conv_init2 = ConvD(n_feats // 2, n_feats)
        self.res_extra1 = PriorBranch(n_feats, n_resblocks)
        self.sub1 = SubNetwork(n_feats, n_resblocks)
        self.res_extra2 = PriorBranch(n_feats, n_resblocks)
        self.sub2 = SubNetwork(n_feats, n_resblocks)
        self.res_extra3 = PriorBranch(n_feats, n_resblocks)
        self.sub3 = SubNetwork(n_feats, n_resblocks)
        self.ag1 = ConvD(2 * n_feats, n_feats)
        self.ag2 = ConvD(3 * n_feats, n_feats)
        self.ag2_en = ConvD(2 * n_feats, n_feats)
        self.ag_en = ConvD(3 * n_feats, n_feats)
        self.output1 = nn.Conv2d(n_feats, 3, 3, padding=1)
        self.output2 = nn.Conv2d(n_feats, 3, 3, padding=1)
        self.output3 = nn.Conv2d(n_feats, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """De-rain: x float RGB in [0, 255], (B, 3, H, W), H and W at least 5 -> (out3, out2, out1), each like x.

        out3 is the result; none is clamped. Yi et al., ICCV 2021. Under float16 autocast it runs in float32:
        values up to 255 are multiplied with each other and overflow float16. An x that requires a gradient gets the
        published order of operations, see utils/networks/spdnet_plain.py.
        """
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f"SPDNet needs (B, 3, H, W) with H and W at least {MIN_SIZE}, got {tuple(x.shape)}")
        if torch.float16 in (x.dtype, self.output1.weight.dtype):
            raise ValueError("SPDNet overflows in float16: keep its weights and its input in float32")
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            with torch.autocast(device, enabled=False):
                return self.restore(x)
        if x.requires_grad and torch.is_grad_enabled() and not self.activation_checkpointing:
            return PlainSPDNet(self)(x)
        return self.restore(x)

    def unused_parameters(self) -> list[str]:
        """Names of the parameters that exist only so that state dicts match: they never get a gradient.

        174 of them in the published network. (For DistributedDataParallel's check, weight decay, parameter counts.)
        """
        names = [name for name, _ in self.named_parameters()]
        return [name for name in names if ".ins." in name or name.split(".")[1] in UNUSED
                or ".".join(name.split(".")[1:3]) in UNUSED]

    def restore(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fast order of operations."""
        run = call_and_recompute if self.activation_checkpointing and torch.is_grad_enabled() else call
        x = x.contiguous(memory_format=torch.channels_last)
        x_init = self.conv_init2(self.conv_init1(x))
        x1 = self.sub1(x_init, run(self.res_extra1, residue_channel(x)), run)
        out1 = thin_conv((x1,), self.output1)
        x2 = self.sub2(self.ag1(x1, x_init), run(self.res_extra2, residue_channel(out1)), run)
        out2 = thin_conv((run(self.ag2_en, x2, x1),), self.output2)
        x3 = self.sub3(self.ag2(x2, x1, x_init), run(self.res_extra3, residue_channel(out2)), run)
        out3 = thin_conv((run(self.ag_en, x3, x2, x1),), self.output3)
        return out3.contiguous(), out2.contiguous(), out1.contiguous()


def load_spdnet(path, n_feats: int | None = None, n_resblocks: int | None = None, device="cpu",
                constant: str | None = None) -> SPDNet:
    """The network in a weight file (published or ours), on `device`; its size is read from the shapes when not given.

    Raises checkpoint.CheckpointError with one line when the file is missing (`constant` is the script's constant that
    holds the path) or not a SPDNet's state dict.
    """
    name = f"{constant} = '{Path(path).as_posix()}'" if constant else str(path)
    if constant and not Path(path).is_file():
        raise checkpoint.CheckpointError(
            f"{name} {'is a folder' if Path(path).is_dir() else 'does not exist'}. Train one with Training_SPDNet.py, "
            "take the published model_spa.pt (github.com/Joyies/SPDNet), or try --demo.")
    state = checkpoint.load_state(path)
    if n_feats is None:
        if "output1.weight" not in state or state["output1.weight"].dim() != 4:
            raise checkpoint.CheckpointError(f"{name} is not a SPDNet state dict: it has no output1.weight "
                                             "(Training_SPDNet.py writes spdnet_best.pt, the adaptation "
                                             "spdnet_adapted.pt)")
        n_feats = state["output1.weight"].shape[1]
    if n_resblocks is None:
        start = "res_extra1.extra.module_body."
        numbers = {name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)}
        n_resblocks = max(len(numbers) - 1, 0)  # the last one is the group's convolution
    model = SPDNet(n_feats, n_resblocks)
    checkpoint.load_into(model, state, name)
    return model.to(device)
