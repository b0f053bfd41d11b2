"""The gate of a video: the branch changes when the weather has changed, and not with every frame near the threshold."""

import torch

from utils.config import UserError


class WeatherGate:
    """Decide frame after frame whether it rains, with two thresholds and patience.

    A frame says "rain" from the upper threshold on, "dry" below the lower one, and nothing in between. The decision
    changes when `frames` in a row have said the other weather. The first frame goes by `threshold` alone.

    Args:
        threshold: probability in [0, 1]; frames: 1 and margin 0 decide every frame by itself.
        margin: share of the way from the threshold to certainty at which the two thresholds lie: 0.4 makes 0.3 and 0.7
            of 0.5.
    """

    def __init__(self, threshold, frames, margin):
        self.threshold, self.frames = threshold, frames
        self.upper, self.lower = threshold + margin * (1 - threshold), threshold * (1 - margin)
        self.rainy, self.against = None, 0

    def __call__(self, scores):
        """(B,) probabilities of consecutive frames -> (B,) bool on their device: is it raining?"""
        return torch.tensor([self.next(score) for score in scores.tolist()], dtype=torch.bool, device=scores.device)

    def next(self, score):
        """-> whether it rains in the next frame, whose probability of rain is `score`."""
        if self.rainy is None:
            self.rainy = score >= self.threshold
        says = True if score >= self.upper else False if score < self.lower else None
        self.against = self.against + 1 if says is not None and says != self.rainy else 0
        if self.against >= self.frames:
            self.rainy, self.against = not self.rainy, 0
        return self.rainy


def require(frames, margin):
    """UserError unless RAIN_FRAMES and RAIN_MARGIN are possible."""
    if frames < 1 or not 0 <= margin < 1:
        raise UserError(f"RAIN_FRAMES = {frames} must be at least 1, RAIN_MARGIN = {margin} in [0, 1)")


def gate_of(cfg, models, source):
    """-> the WeatherGate of a video's model that has a gate, else None."""
    threshold = getattr(models[cfg.MODEL], "rain_threshold", None)
    if threshold is None or not source.fps or cfg.RAIN_FRAMES == 1 and not cfg.RAIN_MARGIN:
        return None
    return WeatherGate(threshold, cfg.RAIN_FRAMES, cfg.RAIN_MARGIN)
