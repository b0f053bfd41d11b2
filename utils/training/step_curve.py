"""The losses of every optimizer step of a run, for curves.png."""


import math


class StepCurve:
    """Losses per optimizer step in bounded memory: whenever `limit` points are reached, neighbours become their mean.

    `points` is {name: [float, ...]}, each value the mean over `every` steps, with "step" the last of these steps.
    """

    def __init__(self, limit=2000):
        self.limit, self.every = limit, 1
        self.points, self.sums, self.batches, self.steps = {"step": []}, {}, 0, 0  # sums: since the last point

    def add(self, losses):
        """The losses of one batch, {name: float}."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.batches += 1

    def end_step(self, step):
        """An optimizer step with this number is done, after one batch or, with accumulation, several."""
        self.steps += 1
        if self.steps < self.every:
            return
        self.points["step"].append(step)
        for name in self.sums:  # a resumed run may have other losses, in the same order otherwise: gaps are nan
            self.points.setdefault(name, [math.nan] * (len(self.points["step"]) - 1))
        for name, values in self.points.items():
            if name != "step":
                values.append(self.sums[name] / self.batches if name in self.sums else math.nan)
        self.sums, self.batches, self.steps = {}, 0, 0
        if len(self.points["step"]) >= self.limit:
            self._thin_out()

    def _thin_out(self):
        self.every *= 2
        for name, values in self.points.items():
            pairs = zip(values[::2], values[1::2], strict=False)
            self.points[name] = [b if name == "step" else (a + b) / 2 for a, b in pairs]

    def state(self):
        """-> what `load` takes, plain data for a checkpoint."""
        return {"every": self.every, "points": self.points, "sums": self.sums, "batches": self.batches,
                "steps": self.steps}

    def load(self, state):
        """Go on from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        length = len(self.points["step"])
        for name, values in self.points.items():  # of a file that was written with gaps
            self.points[name] = [math.nan] * (length - len(values)) + values
