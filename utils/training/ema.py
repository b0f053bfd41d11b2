"""Exponential moving average of the weights that train: smoother than the last step's, and usually better.

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; with the warm-up of the decay that
detectors use, because an average over steps from before the learning would only hold the start back.
"""

import math
from contextlib import contextmanager

import torch

WARMUP_STEPS = 100.0


class WeightAverage:
    """average <- d * average + (1 - d) * weights after every step, d = decay * (1 - exp(-step / warmup)).

    Args:
        tensors: what is averaged, on its device: the parameters that train, and BatchNorm's running statistics, since
            averaged weights make other activations than the last step's do.
        decay: in (0, 1); warmup: steps after which the decay has reached 63% of its value.
    """

    def __init__(self, tensors, decay, warmup=WARMUP_STEPS):
        self.tensors = list(tensors)
        self.decay, self.warmup = decay, warmup
        self.values = [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after optimizer step `step` (counted from 1)."""
        decay = self.decay * (1 - math.exp(-step / self.warmup))
        torch._foreach_lerp_(self.values, self.tensors, 1 - decay)

    def applied(self):
        """Within, the model's weights are the average; afterwards they are what they were, bit for bit."""
        return swapped(self.tensors, self.values)

    @torch.no_grad()
    def load(self, values):
        """Take a saved average (the list `values`) back; what it does not hold starts at the present values."""
        for own, saved in zip(self.values, values, strict=False):  # checkpoints of before hold no running statistics
            own.copy_(saved)


@contextmanager
def swapped(tensors, values):
    """Within, tensors and values have changed places; afterwards each is what it was, bit for bit."""
    def swap():
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                kept = tensor.detach().clone()
                tensor.copy_(value)
                value.copy_(kept)
    swap()
    try:
        yield
    finally:
        swap()


def mixed(tensors, others, share):
    """Within, each tensor is (1 - share) * itself + share * its counterpart; afterwards what it was, bit for bit.

    Between a pretrained network and its fine-tuned version lie networks that have most of what was learnt and forget
    little: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022.

    Args:
        tensors: parameters and buffers that a network uses; others: as many, of the same shapes.
        share: 0 to 1.
    """
    return swapped(tensors, [torch.lerp(own.detach(), other.detach(), share)
                             for own, other in zip(tensors, others, strict=True)])
