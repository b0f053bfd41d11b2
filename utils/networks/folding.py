"""Fewer layers, the same answers: what a trained detector can do without once nothing trains any more.

A BatchNorm behind a convolution is a scale and a shift, which the convolution's weights take in; the two branches of
RT-DETR's RepVGG blocks (3x3 and 1x1; Ding et al., "RepVGG", CVPR 2021) are one 3x3 convolution. Exported files run
faster for it, and their convolutions can be quantised together with what follows them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.models.d_fine.modeling_d_fine import DFineFrozenBatchNorm2d, DFineRepVggBlock
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d, RTDetrRepVggBlock
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2FrozenBatchNorm2d, RTDetrV2RepVggBlock

_FROZEN = (RTDetrFrozenBatchNorm2d, RTDetrV2FrozenBatchNorm2d, DFineFrozenBatchNorm2d)
_NORMS = (nn.BatchNorm2d, *_FROZEN)
_REPVGG = (RTDetrRepVggBlock, RTDetrV2RepVggBlock, DFineRepVggBlock)
_FROZEN_EPS = 1e-5  # of _FROZEN, which have no attribute for it
_PAIRS = (("conv", "norm"), ("convolution", "normalization"))  # how transformers' RT-DETR names them


class _Merged(nn.Module):
    """A RepVGG block as one convolution: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, conv, activation):
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x):
        return self.activation(self.conv(x))


@torch.no_grad()
def folded(model):
    """-> a copy of a module in eval mode whose convolutions hold the BatchNorms behind them, and whose RepVGG blocks
    are one convolution each; equal to rounding. The original stays as it is."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
        for conv, norm in _PAIRS:
            first, second = getattr(module, conv, None), getattr(module, norm, None)
            if isinstance(first, nn.Conv2d) and isinstance(second, _NORMS):
                setattr(module, conv, _conv_with(first, second))
                setattr(module, norm, nn.Identity())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _REPVGG):
                setattr(module, name, _one_convolution(child))
    return model


def _fold_sequence(layers):
    """A Sequential's BatchNorms go into the convolutions in front of them, in place."""
    for i in range(len(layers) - 1):
        if isinstance(layers[i], nn.Conv2d) and isinstance(layers[i + 1], _NORMS):
            layers[i], layers[i + 1] = _conv_with(layers[i], layers[i + 1]), nn.Identity()


def _conv_with(conv, norm):
    """-> a convolution that answers as `norm` behind `conv` does."""
    fused = copy.deepcopy(conv)
    fused.weight, fused.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var,
                                                    getattr(norm, "eps", _FROZEN_EPS), norm.weight, norm.bias)
    return fused


def _one_convolution(block):
    """A RepVGG block without BatchNorm -> _Merged: the 1x1 kernel is the middle of a 3x3 one."""
    wide, narrow = block.conv1.conv, block.conv2.conv
    merged = copy.deepcopy(wide)
    merged.weight = nn.Parameter(wide.weight + F.pad(narrow.weight, (1, 1, 1, 1)))
    merged.bias = nn.Parameter(wide.bias + narrow.bias)
    return _Merged(merged, block.activation)
