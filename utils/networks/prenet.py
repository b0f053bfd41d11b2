"""PReNet: a small residual network that is run several times, with a memory between the passes.

Source: Ren, Zuo, Hu, Zhu, Meng, "Progressive Image Deraining Networks: A Better and Simpler Baseline", CVPR 2019.
Written from a description of the published checkpoints (tensor names, shapes, data flow); the published state dicts
load with strict=True. The four published kinds are two switches: PRN has no memory, PReNet_r and PRN_r use one residual
block five times. Images are RGB in [0, 1].

Different from the published code, without another result: the four gates of the memory are one convolution, and the
input's part of the first convolution, which is the same in every pass, is computed once.
"""

import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 32
BLOCKS = 5
STAGES = 6  # an argument of the forward pass, not a weight


def conv(inputs, outputs, *more):
    """A 3x3 convolution and what follows it, in a Sequential as the published names have it."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), *more)


class PReNet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> the images after every pass, a list of (B, 3, H, W), unclamped: the last is the result.

    Args:
        memory: True for PReNet, False for PRN; shared: True for the kinds with the ending _r.
    """

    def __init__(self, memory=True, shared=False):
        super().__init__()
        self.conv0 = conv(6, FEATURES, nn.ReLU())
        if memory:
            self.conv_i, self.conv_f, self.conv_o = (conv(2 * FEATURES, FEATURES, nn.Sigmoid()) for _ in range(3))
            self.conv_g = conv(2 * FEATURES, FEATURES, nn.Tanh())
        for i in range(1 if shared else BLOCKS):
            setattr(self, f"res_conv{i + 1}", conv(FEATURES, FEATURES, nn.ReLU(), *conv(FEATURES, FEATURES, nn.ReLU())))
        self.conv = conv(FEATURES, 3)
        self.memory, self.shared = memory, shared

    def forward(self, images, stages=STAGES):
        of_input = F.conv2d(images, self.conv0[0].weight[:, :3], self.conv0[0].bias, padding=1)
        blocks = [getattr(self, f"res_conv{1 if self.shared else i + 1}") for i in range(BLOCKS)]
        x, state, found = images, None, []
        for _ in range(stages):
            y = F.relu(of_input + F.conv2d(x, self.conv0[0].weight[:, 3:], padding=1))  # (B, 32, H, W)
            if self.memory:
                y, state = self.remembered(y, state)
            for block in blocks:
                y = F.relu(block(y) + y)
            x = self.conv(y) + images
            found.append(x)
        return found

    def remembered(self, y, state):
        """The LSTM: y (B, 32, H, W), state (h, c) of the previous pass or None -> h, (h, c)."""
        gates = [self.conv_i[0], self.conv_f[0], self.conv_o[0], self.conv_g[0]]
        weight, bias = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
        if state is None:  # zeros: h adds nothing to the convolution, and there is no cell to forget
            total = F.conv2d(y, weight[:, :FEATURES], bias, padding=1)
        else:
            total = F.conv2d(torch.cat([y, state[0]], 1), weight, bias, padding=1)
        keep, forget, out, new = total.chunk(4, 1)
        cell = torch.sigmoid(keep) * torch.tanh(new)
        if state is not None:
            cell = torch.sigmoid(forget) * state[1] + cell
        hidden = torch.sigmoid(out) * torch.tanh(cell)
        return hidden, (hidden, cell)
