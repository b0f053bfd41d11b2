"""How long the phases of a training step take, so that a data bottleneck is visible."""

import time

import torch


class Clock:
    """Seconds per phase of the training step, with CUDA events where the device is a GPU (no synchronisation)."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.start()

    def start(self):
        self.marks, self.begin, self.images = [("", self._now())], time.perf_counter(), 0
        self.seconds = {}

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase):
        self.marks.append((phase, self._now()))
        if len(self.marks) > 512:
            self._collect()

    def _collect(self):
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            spent = before.elapsed_time(after) / 1000 if self.cuda else after - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.marks = self.marks[-1:]

    def rate(self):
        return self.images / max(time.perf_counter() - self.begin, 1e-9)

    def summary(self):
        """-> (seconds since start, {phase: share of the summed phases})."""
        self._collect()
        total = sum(self.seconds.values()) or 1.0
        return time.perf_counter() - self.begin, {name: value / total for name, value in self.seconds.items()}
