"""SPDNet: de-raining that preserves structure, guided by the residue channel prior.

Source: Yi, Li, Dai, Fang, Zhang, Zeng, "Structure-Preserving Deraining with Residue Channel Prior Guidance",
ICCV 2021. Written from the paper and from a description of the published checkpoints (tensor names, shapes, data
flow); the published state dicts load here with strict=True and ours load in the published code.

Read it from top to bottom: convolution, residual block and group, the wavelet, the fusion of features and prior, one
stage, the three stages. Every module's forward is the definition, in the published order of operations.
utils/networks/spdnet_fast.py computes the same function faster on the same modules; SPDNet.forward chooses between
the two. Images are RGB in [0, 255] here; the wrapper that owns the network converts from the [0, 1] of the rest of
the project. Letters in shape comments: B batch, C channels, H W image, h w feature map.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from utils import checkpoint, system
from utils.networks import spdnet_fast

TAP = 0.5 ** 0.5   # the one tap of the orthonormal Haar filters
MIN_SIZE = 5       # level 3 is a quarter of the image, rounded up, and reflection padding by 1 needs two pixels there

# modules of each `subK` that the published network declares and never runs
UNUSED = ("branch1_1_d", "branch1_2_d", "branch2_1_u", "branch2_1_d", "branch2_2_u", "branch2_2_d", "branch3_1_u",
          "branch3_2_u", "down2", "down3", "fuse12.conv", "fuse23.conv")


class Stages(NamedTuple):
    """The images of the three stages, (B, 3, H, W) each, RGB in about [0, 255], not clamped; out3 is the result."""

    out3: Tensor
    out2: Tensor
    out1: Tensor


# --- building blocks ----------------------------------------------------------------------------------------------


def reflect(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, h + 2, w + 2), mirrored at the border pixel."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


class ConvD(nn.Module):
    """Reflection pad 1, 3x3 convolution, ReLU: (B, in, h, w) -> (B, out, h, w).

    `ins` never enters the forward pass: the published network declares an instance norm and skips it. It is here only
    so that state dicts match.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        self.ins = nn.InstanceNorm2d(out_channels, affine=True)  # unused

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(reflect(x)))


class SqueezeExcitation(nn.Module):
    """Channel attention with reduction 1: (B, C, h, w) -> (B, C, 1, 1), a weight in (0, 1) for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.ReLU(),
                                nn.Linear(channels, channels, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 1).flatten(1)   # (B, C)
        return self.fc(mean)[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two (3x3 convolution, ReLU), squeeze-excitation, plus the input: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.module_body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
                                         nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.se = SqueezeExcitation(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module_body(x)
        return y * self.se(y) + x


class ResidualGroup(nn.Module):
    """`n_resblocks` residual blocks, a 3x3 convolution, plus the input, ReLU: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, n_resblocks: int):
        super().__init__()
        self.module_body = nn.Sequential(*[ResidualBlock(channels) for _ in range(n_resblocks)],
                                         nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.module_body(x) + x)


class UpConv(nn.Module):
    """Reflection pad 1, transposed 3x3 convolution with stride 2, ReLU, nearest-neighbour resize to `size`.

    (B, C, h, w) -> (B, C, *size). The transposed convolution yields (2h + 5, 2w + 5) pixels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv2d = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(F.relu(self.conv2d(reflect(x)), inplace=True), size, mode="nearest")


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
        return F.relu(self.rb(self.up(x, y.shape[2:]) + y))


# --- the Haar wavelet ---------------------------------------------------------------------------------------------


class HaarFilters(nn.Module):
    """The low-pass and high-pass taps along columns and rows, as buffers: constants that the state dicts carry."""

    def __init__(self, prefix: str):
        super().__init__()
        for axis, shape in (("col", (1, 1, 2, 1)), ("row", (1, 1, 1, 2))):
            self.register_buffer(f"{prefix}0_{axis}", torch.tensor((TAP, TAP)).reshape(shape))
            self.register_buffer(f"{prefix}1_{axis}", torch.tensor((TAP, -TAP)).reshape(shape))


class HaarTransform(HaarFilters):
    """(B, C, H, W) -> (B, 4 C, ceil(H/2), ceil(W/2)); an odd H or W gets a row or column of zeros first.

    The output's channel blocks are the sub-bands [yh0 | yh1 | yh2 | yl], C channels each.
    """

    def __init__(self):
        super().__init__("h")
        self.register_buffer("matrix", torch.tensor(spdnet_fast.HAAR), persistent=False)  # the fast form's

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = F.conv2d(x, torch.cat([self.h0_row, self.h1_row] * c), stride=(1, 2), groups=c)            # (B, 2 C, H, w)
        x = F.conv2d(x, torch.cat([self.h0_col, self.h1_col] * (2 * c)), stride=(2, 1), groups=2 * c)  # (B, 4 C, h, w)
        yl, yh0, yh1, yh2 = x.reshape(x.shape[0], c, 4, *x.shape[2:]).unbind(2)                        # (B, C, h, w)
        return torch.cat((yh0, yh1, yh2, yl), 1)


class InverseHaarTransform(HaarFilters):
    """(B, 4 C, h, w) -> (B, C, 2h, 2w); the input's channels are C groups of four, [yl, yh0, yh1, yh2] each."""

    def __init__(self):
        super().__init__("g")

    def forward(self, bands: Tensor) -> Tensor:
        b, c, h, w = bands.shape[0], bands.shape[1] // 4, *bands.shape[2:]
        yl, yh0, yh1, yh2 = bands.reshape(b, c, 4, h, w).unbind(2)                                     # (B, C, h, w)
        low = self.merged(yl, yh0, self.g0_col, self.g1_col, (2, 1))                                   # (B, C, 2h, w)
        high = self.merged(yh1, yh2, self.g0_col, self.g1_col, (2, 1))
        return self.merged(low, high, self.g0_row, self.g1_row, (1, 2))                                # (B, C, 2h, 2w)

    @staticmethod
    def merged(low: Tensor, high: Tensor, low_taps: Tensor, high_taps: Tensor, stride: tuple[int, int]) -> Tensor:
        """Two half-size maps (B, C, ., .) along one axis -> the whole one, channel by channel."""
        c = low.shape[1]
        return (F.conv_transpose2d(low, low_taps.repeat(c, 1, 1, 1), stride=stride, groups=c)
                + F.conv_transpose2d(high, high_taps.repeat(c, 1, 1, 1), stride=stride, groups=c))


# --- one stage ----------------------------------------------------------------------------------------------------


class InteractiveFusion(nn.Module):
    """Features and prior gate each other: two (B, C, h, w) -> two (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.key_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gamma1 = nn.Conv2d(2 * channels, 2, 3, padding=1)
        self.gamma2 = nn.Conv2d(2 * channels, 2, 3, padding=1)

    def forward(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        attention = torch.sigmoid(self.query_conv(x) * self.key_conv(prior))                     # (B, C, h, w)
        return self.gate(x, attention, self.gamma1), self.gate(prior, attention, self.gamma2)

    @staticmethod
    def gate(feature: Tensor, attention: Tensor, gamma: nn.Conv2d) -> Tensor:
        gated = feature * attention
        maps = gamma(torch.cat((feature, gated), 1))                                             # (B, 2, h, w)
        return feature * maps[:, :1] + gated * maps[:, 1:]


class PriorBranch(nn.Module):
    """Features of an image's residue channel: (B, 3, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, n_resblocks: int):
        super().__init__()
        self.conv_init1 = ConvD(3, channels // 2)
        self.conv_init2 = ConvD(channels // 2, channels)
        self.extra = ResidualGroup(channels, n_resblocks)

    def forward(self, image: Tensor) -> Tensor:
        residue = image.max(1, keepdim=True).values - image.min(1, keepdim=True).values          # (B, 1, H, W)
        return self.extra(self.conv_init2(self.conv_init1(torch.cat((residue, residue, residue), 1))))


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

        self.DWT = HaarTransform()
        self.IDWT = InverseHaarTransform()
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

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        level1 = self.fuse_res(torch.cat(self.prior(x, prior), 1))         # (B, C, H, W)
        level2 = self.DWT_2(self.DWT(level1))                              # (B, C, H/2, W/2), rounded up
        level3 = self.DWT_3(self.DWT(level2))                              # (B, C, H/4, W/4), rounded up
        level1 = self.branch1_3(self.branch1_2(self.branch1_1(level1)))
        level2 = self.branch2_3(self.branch2_2(self.branch2_1(level2)))
        level3 = self.branch3_3(self.branch3_2(self.branch3_1(level3)))
        level2 = self.fuse23(self.IDWT(self.IDWT_3(level3)), level2)
        return self.fuse12(self.IDWT(self.IDWT_2(level2)), level1)


# --- the network --------------------------------------------------------------------------------------------------


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

    def forward(self, x: Tensor) -> Stages:
        """De-rain: x float RGB in [0, 255], (B, 3, H, W), H and W at least 5 -> the three stages' images, each like x.

        Yi et al., ICCV 2021. It runs in the fast order of operations, equal to float32 rounding. Only where a gradient
        with respect to the image is asked for (analyses) it runs in the published order: rounding switches a few dozen
        of the network's 20 million ReLUs, and each of them moves that gradient nearby by up to 0.05 standard
        deviations. Under float16 autocast it runs in float32: values up to 255 are multiplied with each other and
        overflow float16.
        """
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f"SPDNet needs (B, 3, H, W) with H and W at least {MIN_SIZE}, got {tuple(x.shape)}")
        if torch.float16 in (x.dtype, self.output1.weight.dtype):
            raise ValueError("SPDNet overflows in float16: keep its weights and its input in float32")
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            with torch.autocast(device, enabled=False):
                return Stages(*spdnet_fast.restore(self, x))
        if x.requires_grad and torch.is_grad_enabled() and not self.activation_checkpointing:
            return self.restore(x)
        return Stages(*spdnet_fast.restore(self, x))

    def restore(self, x: Tensor) -> Stages:
        """The definition: three stages, each with the residue channel of the image before it as its prior."""
        x_init = self.conv_init2(self.conv_init1(x))                                     # (B, C, H, W), like x1..x3
        x1 = self.sub1(x_init, self.res_extra1(x))
        out1 = self.output1(x1)                                                          # (B, 3, H, W)
        x2 = self.sub2(self.ag1(torch.cat((x1, x_init), 1)), self.res_extra2(out1))
        out2 = self.output2(self.ag2_en(torch.cat((x2, x1), 1)))
        x3 = self.sub3(self.ag2(torch.cat((x2, x1, x_init), 1)), self.res_extra3(out2))
        out3 = self.output3(self.ag_en(torch.cat((x3, x2, x1), 1)))
        return Stages(out3, out2, out1)

    def unused_parameters(self) -> list[str]:
        """Names of the parameters that exist only so that state dicts match: they never get a gradient.

        174 of them in the published network. (For DistributedDataParallel's check, weight decay, parameter counts.)
        """
        names = [name for name, _ in self.named_parameters()]
        return [name for name in names if ".ins." in name or name.split(".")[1] in UNUSED
                or ".".join(name.split(".")[1:3]) in UNUSED]


def load_spdnet(path, n_feats: int | None = None, n_resblocks: int | None = None, device="cpu",
                constant: str | None = None) -> SPDNet:
    """The network in a weight file (published or ours), on `device`; its size is read from the shapes when not given.

    Raises checkpoint.CheckpointError with one line when the file is missing (`constant` is the script's constant that
    holds the path) or not a SPDNet's state dict.
    """
    name = f"{constant} = '{Path(path).as_posix()}'" if constant else str(path)
    if constant and (problem := system.absent(path)):
        raise checkpoint.CheckpointError(
            f"{name} {problem}. Train one with Training_SPDNet.py, "
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
