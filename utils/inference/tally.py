"""What a run of detect.py counts, and the lines that it ends with."""

from dataclasses import dataclass, field

from accelerate.utils import gather_object
from tqdm import tqdm

from utils import processes

_SHOWN = 20  # problems and switches that are listed on the console; images.json has them all


@dataclass
class Tally:
    """What the summary says. Lists end at _SHOWN entries: a camera may run for days."""

    images: int = 0
    objects: int = 0
    derained: int | None = None  # in the rain branch; None: a model without gate and de-rainer
    fallbacks: int = 0
    stopped: bool = False
    seconds: float = 0.0
    model_seconds: float = 0.0   # of them in the models
    problem_count: int = 0
    problems: list = field(default_factory=list)
    switch_count: int = 0
    switches: list = field(default_factory=list)
    branch: str | None = None
    flicker: float = 0.0  # of consecutive de-rained frames, summed: mean change after de-raining minus that before
    flicker_count: int = 0
    before: tuple | None = None  # the frame before as it was given and de-rained

    def report(self, problem):
        """Say a problem at once, and keep it for the end."""
        self.problem_count += 1
        if self.problem_count <= _SHOWN:
            self.problems.append(problem)
            tqdm.write(f"problem: {problem}")

    def count(self, frame, one):
        """Count one frame; `one` is its result, None where it has no image."""
        if frame.problem:
            self.report(frame.problem)
            self.before = None  # the frames around it are not consecutive
        if one is None:
            return
        self.images += 1
        self.objects += len(one["boxes"])
        if one["seen"] is not None or one["branch"] is not None:  # an exported pipeline shows no de-rained image
            self.derained = (self.derained or 0) + (one["branch"] != "clean")
        if frame.number is not None:
            self.count_flicker(one)
        if frame.number is not None and one["branch"] != self.branch:
            self.switch_count += 1
            if self.switch_count <= _SHOWN:
                self.switches.append({"frame": frame.number, "seconds": frame.seconds, "branch": one["branch"],
                                      "rain_probability": one["rain"]})
            self.branch = one["branch"]

    def count_flicker(self, one):
        """Compare a frame of a video with the one before it, where both were de-rained."""
        now = None if one["seen"] is None or one["branch"] == "clean" else (one["given"], one["seen"])
        if now and self.before:
            given, seen = ((new - old).abs().mean().item() for new, old in zip(now, self.before, strict=True))
            self.flicker += seen - given
            self.flicker_count += 1
        self.before = now


def together(tally):
    """-> the Tally of all processes; each must call it."""
    processes.wait_for_all()
    every = gather_object([tally])
    tally = every[0]
    for other in every[1:]:
        for name in ("images", "objects", "fallbacks", "problem_count"):
            setattr(tally, name, getattr(tally, name) + getattr(other, name))
        if other.derained is not None:
            tally.derained = (tally.derained or 0) + other.derained
        tally.problems = [*tally.problems, *other.problems][:_SHOWN]
        tally.stopped |= other.stopped
        tally.seconds = max(tally.seconds, other.seconds)
        tally.model_seconds = max(tally.model_seconds, other.model_seconds)
    return tally


def print_summary(cfg, tally, source, folder):
    """Images, objects, what the gate did, speed, where the results are."""
    derained = "" if tally.derained is None else f", {tally.derained} of them in the rain branch"
    lines = [f"\n{cfg.SOURCE} -> {folder.as_posix()}{' (stopped)' if tally.stopped else ''}",
             f"  images   {tally.images}{derained}",
             f"  objects  {tally.objects} with a score of {cfg.THRESHOLD:g} or more"
             + (f" ({', '.join(cfg.CLASS_THRESHOLDS)})" if cfg.CLASS_THRESHOLDS else ""),
             f"  time     {tally.seconds:.1f} s, {tally.images / max(tally.seconds, 1e-9):.1f} images/s; "
             f"{tally.model_seconds:.1f} s of it in the model"]
    if tally.flicker_count:
        more = 255 * tally.flicker / tally.flicker_count
        lines.append(f"  flicker  {more:+.2f} levels: consecutive frames differ by so much more after de-raining")
    if tally.fallbacks:
        lines.append(f"  note     {tally.fallbacks} image(s) were detected on as they were: the de-rainer's answer was "
                     "not finite")
    for switch in tally.switches:
        lines.append(f"  gate     {switch['branch']} branch from frame {switch['frame']} ({switch['seconds']:.2f} s), "
                     f"rain probability {switch['rain_probability']:.2f}")
    if tally.switch_count > len(tally.switches):
        lines.append(f"  gate     {tally.switch_count - len(tally.switches)} more changes, see images.json")
    lines.append(f"  written  {'video' if source.fps else 'pictures'}, detections.json, images.json")
    print("\n".join(lines), flush=True)
