"""3x3 convolutions with a weight gradient that does not stall CPUs without AVX-512.

For channels_last maps that leave the third-level cache (32 channels of 256 x 256) oneDNN's weight gradient reaches half
of its usual speed or less on an AVX2 processor, so that training in channels_last would be no faster than in NCHW there
(docs/results.md). The same gradient is nine matrix products, one per tap, of the output's gradient with the shifted
input. Forward pass and input gradient stay oneDNN's. GPUs, AVX-512, autocast and smaller maps take PyTorch's own way.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024          # pixels per matrix product: input and gradient of a chunk fit the second-level cache
MIN_VALUES = 1 << 20  # of one image's map; smaller ones fit the third-level cache, where oneDNN is as fast


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


class Conv3x3(torch.nn.Conv2d):
    """nn.Conv2d with kernel 3 and stride 1 by way of `conv3x3`; the same names and shapes in state dicts."""

    def __init__(self, in_channels: int, out_channels: int, padding: int = 0):
        super().__init__(in_channels, out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias, self.padding[0])


class _Conv3x3(torch.autograd.Function):
    """F.conv2d whose backward pass takes the weight gradient from `weight_gradient`."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])[0]
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2, 3))
        return for_x, weight_gradient(x, gradient, ctx.padding), for_bias, None


def weight_gradient(x: Tensor, gradient: Tensor, padding: int) -> Tensor:
    """Gradient of a 3x3 convolution's weights.

    All images are written one after the other as rows of pixels, the output's gradient with zeros where the (padded)
    input has pixels and the output has none. Then each tap is a shift of the whole list, and what a shift drags across
    the border of a row or an image meets a zero.

    Args:
        x: (B, in, h, w) input; gradient: (B, out, h', w') of the output.
    Returns:
        (out, in, 3, 3).
    """
    batch, inputs, height, width = x.shape
    height, width, outputs = height + 2 * padding, width + 2 * padding, gradient.shape[1]
    pixels = batch * height * width
    chunks = -(-pixels // CHUNK)
    listed = x.new_empty(chunks * CHUNK + 2 * width + 2, inputs)                          # (pixels, in)
    listed[pixels:] = 0
    image = listed[:pixels].view(batch, height, width, inputs)
    if padding:
        image[:, 0] = image[:, -1] = 0
        image[:, :, 0] = image[:, :, -1] = 0
        image = image[:, 1:-1, 1:-1]
    image.copy_(x.permute(0, 2, 3, 1))
    wanted = gradient.new_zeros(chunks * CHUNK, outputs)                                  # (pixels, out)
    wanted[:pixels].view(batch, height, width, outputs)[:, :-2, :-2] = gradient.permute(0, 2, 3, 1)
    wanted = wanted.view(chunks, CHUNK, outputs).transpose(1, 2)
    taps = [torch.bmm(wanted, listed.as_strided((chunks, CHUNK, inputs), (CHUNK * inputs, inputs, 1),
                                                (row * width + column) * inputs)).sum(0)
            for row in range(3) for column in range(3)]                                  # 9 x (out, in)
    return torch.stack(taps, 2).view(outputs, inputs, 3, 3)
