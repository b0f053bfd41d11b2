"""DDN, the deep detail network: finds the rain in what a smoothing filter leaves of the image.

Source: Fu, Huang, Zeng, Huang, Ding, Paisley, "Removing Rain from Single Images via a Deep Detail Network", CVPR 2017.
Written from a description of the published weights. Three sets of weights are about, and they belong to three forward
passes of the same shapes, see `FORMS`. Images are RGB in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.networks.guided_filter import base_layer

FEATURES, LAYERS = 16, 26
# Which weights a form belongs to. tensorflow: the authors' code to train it again; matlab: their first model
# (network.mat); port: HanshuYAN's in PyTorch, which has one shortcut around all of the blocks.
FORMS = ("tensorflow", "matlab", "port")
_CAFFE_FILTER, _CAFFE_EPS = {"radius": 16, "subsampling": 4}, 1e-5  # matlab: its filter, BatchNorm's epsilon in Caffe
_EPS = 1e-3                           # BatchNorm's epsilon in the others


def _norm(channels, form):
    return nn.BatchNorm2d(channels, eps=_CAFFE_EPS if form == "matlab" else _EPS, momentum=0.01)


class DDN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, H, W), not clamped: the forms "tensorflow" and "matlab".

    Layers are conv1, bn1, ..., conv26, bn26.
    """

    def __init__(self, form="tensorflow"):
        super().__init__()
        self.form = form
        for i in range(1, LAYERS + 1):
            inputs, outputs = 3 if i == 1 else FEATURES, 3 if i == LAYERS else FEATURES
            setattr(self, f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1))
            setattr(self, f"bn{i}", _norm(outputs, form))

    def forward(self, images):
        if self.form == "matlab":
            return images + self.preactivated(255 * (images - base_layer(images, **_CAFFE_FILTER))) / 255
        return images + self.postactivated(images - base_layer(images))

    def layer(self, i):
        return getattr(self, f"conv{i}"), getattr(self, f"bn{i}")

    def postactivated(self, detail):
        """detail (B, 3, H, W) -> negative rain (B, 3, H, W): convolution, BatchNorm, ReLU."""
        def activated(x, i):
            conv, norm = self.layer(i)
            return F.relu(norm(conv(x)))
        x = activated(detail, 1)
        for i in range(2, LAYERS, 2):
            x = x + activated(activated(x, i), i + 1)
        conv, norm = self.layer(LAYERS)
        return norm(conv(x))

    def preactivated(self, detail):
        """The same in the order of the first model: BatchNorm and ReLU before the convolution."""
        conv, norm = self.layer(1)
        x = F.relu(norm(conv(detail)))
        for i in range(2, LAYERS, 2):
            y = x
            for j in (i, i + 1):
                conv, norm = self.layer(j)
                y = conv(F.relu(norm(y)))
            x = x + y
        conv, norm = self.layer(LAYERS)
        return norm(conv(x))


class PortedDDN(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, H, W), not clamped: the form "port", with b1, b2, b3 as its files name them."""

    def __init__(self):
        super().__init__()

        def layers(count):
            return [part for _ in range(count)
                    for part in (nn.Conv2d(FEATURES, FEATURES, 3, padding=1), _norm(FEATURES, "port"), nn.ReLU())]
        self.b1 = nn.Sequential(nn.Conv2d(3, FEATURES, 3, padding=1), _norm(FEATURES, "port"), nn.ReLU())
        self.b2 = nn.Sequential(*layers(LAYERS - 2))
        self.b3 = nn.Sequential(nn.Conv2d(FEATURES, 3, 3, padding=1), _norm(3, "port"))

    def forward(self, images):
        x = self.b1(images - base_layer(images))
        return images + self.b3(self.b2(x) + x)


def new_ddn(form="tensorflow"):
    """-> DDN of one of FORMS, to be trained."""
    net = PortedDDN() if form == "port" else DDN(form)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # as published
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return net
