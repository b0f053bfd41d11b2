"""3x3 convolutions with a weight gradient that does not stall CPUs without AVX-512.

On an AVX2 processor oneDNN's weight gradient of a channels_last map reaches half of its speed in NCHW or less, while
forward pass and input gradient are faster in channels_last (docs/lab_notes.md). So that gradient is taken in NCHW,
which pays for the two conversions on large maps. GPUs, AVX-512, autocast and smaller maps take PyTorch's own way.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_VALUES = 1 << 19  # of one image's map (32 channels of 128 x 128); smaller ones gain nothing


@functools.cache
def slow_weight_gradient() -> bool:
    """Whether this CPU is one of those (measured on AVX2 and AVX-512; others are left to PyTorch)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """F.conv2d(x, weight, bias, padding=padding) with stride 1: (B, in, h, w) -> (B, out, h', w').

    Args:
        weight: (out, in, 3, 3); padding: 0 or 1.
    """
    if (weight.requires_grad and torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == weight.dtype
            and x[0].numel() >= MIN_VALUES and x.shape[1] >= 8 and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling() and slow_weight_gradient()):
        return _Conv3x3.apply(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, padding=padding)


class _Conv3x3(torch.autograd.Function):
    """F.conv2d whose backward pass takes the weight gradient in NCHW."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors

        def gradients(gradient, x, *wanted):  # of x, of the weights, of the bias
            return torch.ops.aten.convolution_backward(gradient, x, weight, [weight.shape[0]], [1, 1],
                                                       [ctx.padding] * 2, [1, 1], False, [0, 0], 1, wanted)

        for_x = gradients(gradient, x, True, False, False)[0] if ctx.needs_input_grad[0] else None
        _, for_weight, for_bias = gradients(gradient.contiguous(), x.contiguous(), False, True, ctx.needs_input_grad[2])
        return for_x, for_weight, for_bias, None  # one per input of forward, as PyTorch asks
