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
        parameters: tensors that train, on their device; only these are averaged (buffers stay the live ones).
        decay: in (0, 1); warmup: steps after which the decay has reached 63% of its value.
    """

    def __init__(self, parameters, decay, warmup=WARMUP_STEPS):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.decay, self.warmup = decay, warmup
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after optimizer step `step` (counted from 1)."""
        decay = self.decay * (1 - math.exp(-step / self.warmup))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextmanager
    def applied(self):
        """Within, the model's weights are the average; afterwards they are what they were, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def load(self, values):
        """Take a saved average (the list `values`) back."""
        for own, saved in zip(self.values, values, strict=True):
            own.copy_(saved)
