"""RESCAN: recurrent units of dilated convolutions and squeeze-excitation, run over the image stage by stage.

Source: Li, Wu, Lin, Liu, Zha, "Recurrent Squeeze-and-Excitation Context Aggregation Net for Single Image Deraining",
ECCV 2018. Written from a description of the published checkpoints; the published state dicts load with strict=True.
Images are [0, 1], in BGR where the published weights are used; utils/networks/derainers.py turns the colours.
"""

import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 24
DEPTH = 7      # layers: five recurrent units and two of the decoder
STAGES = 4
SLOPE = 0.2    # of the leaky ReLUs


class SqueezeExcitation(nn.Module):
    """Weighs the channels by their means: (B, 24, h, w) -> the same."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(FEATURES, FEATURES // 4), nn.ReLU(), nn.Linear(FEATURES // 4, FEATURES),
                                nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class _Unit(nn.Module):
    """What both recurrent units are made of: for each gate a dilated convolution of the input and a plain one of the
    state, squeeze-excitation and leaky ReLU on the new state."""

    gates = ""

    def __init__(self, inputs, dilation):
        super().__init__()
        for gate in self.gates:
            setattr(self, f"conv_x{gate}", nn.Conv2d(inputs, FEATURES, 3, padding=dilation, dilation=dilation))
            setattr(self, f"conv_h{gate}", nn.Conv2d(FEATURES, FEATURES, 3, padding=1))
        self.se = SqueezeExcitation()

    def of_input(self, gate, x):
        return getattr(self, f"conv_x{gate}")(x)

    def of_state(self, gate, h):
        return getattr(self, f"conv_h{gate}")(h)

    def activated(self, h):
        return F.leaky_relu(self.se(h), SLOPE)


class GRU(_Unit):
    """Gated recurrent unit: x (B, inputs, h, w), state (B, 24, h, w) or None -> output, state: the same tensor."""

    gates = "zrn"

    def forward(self, x, h):
        if h is None:
            new = torch.sigmoid(self.of_input("z", x)) * torch.tanh(self.of_input("n", x))
        else:
            z = torch.sigmoid(self.of_input("z", x) + self.of_state("z", h))
            r = torch.sigmoid(self.of_input("r", x) + self.of_state("r", h))
            n = torch.tanh(self.of_input("n", x) + self.of_state("n", r * h))
            new = (1 - z) * h + z * n
        new = self.activated(new)
        return new, new


class LSTM(_Unit):
    """Long short-term memory: x (B, inputs, h, w), state (h, c) or None -> output h, state (h, c)."""

    gates = "fioj"

    def forward(self, x, state):
        if state is None:
            i, o, j = (self.of_input(gate, x) for gate in "ioj")
            c = torch.sigmoid(i) * torch.tanh(j)
            h = torch.sigmoid(o) * c  # no tanh in the first stage
        else:
            h, c = state
            f, i, o, j = (self.of_input(gate, x) + self.of_state(gate, h) for gate in "fioj")
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(j)
            h = torch.sigmoid(o) * torch.tanh(c)
        h = self.activated(h)
        return h, (h, c)


class RESCAN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> the rain of every stage, a list of (B, 3, H, W); the result is input minus the last.

    Args:
        unit: GRU (published tables) or LSTM.
        additive: False ("Full"): every stage finds all of the rain; True ("Add"): what is left of it.
    """

    def __init__(self, unit=GRU, additive=False):
        super().__init__()
        self.additive = additive
        self.rnns = nn.ModuleList([unit(3, 1)] + [unit(FEATURES, 2**i) for i in range(DEPTH - 3)])
        self.dec = nn.Sequential(nn.Conv2d(FEATURES, FEATURES, 3, padding=1), SqueezeExcitation(), nn.LeakyReLU(SLOPE),
                                 nn.Conv2d(FEATURES, 3, 1))

    def forward(self, images, stages=STAGES):
        states, x, found = [None] * len(self.rnns), images, []
        for _ in range(stages):
            for i, unit in enumerate(self.rnns):
                x, states[i] = unit(x, states[i])
            rain = self.dec(x)
            if self.additive and found:
                rain = rain + found[-1].detach()
            found.append(rain)
            x = images - rain
        return found
