"""A clamp to [0, 1] that training gets through."""

import torch


class _ClampWithReturn(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient still pulls values back that have left the range.

    A plain clamp has no gradient outside [0, 1]: a pixel that SPDNet pushed out would stay there for ever. Here the
    gradient passes where a descent step moves the value towards the range, and is zero where it would push it further.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        outwards = ((x < 0) & (gradient > 0)) | ((x > 1) & (gradient < 0))
        return gradient.masked_fill(outwards, 0)


def clamp_with_return(images):
    """clamp(images, 0, 1) with the gradient of `_ClampWithReturn`."""
    return _ClampWithReturn.apply(images)


def cut_share(images):
    """Share of values that a clamp to [0, 1] cuts: scalar Tensor without gradient; 0 for no images at all."""
    return ((images < 0) | (images > 1)).float().sum().detach() / max(images.numel(), 1)
