"""How much longer a video takes detect.py than its models alone: goal, at most 1.3 times as long.

    python -m benchmarks.detect_video
    python -m benchmarks.detect_video --MODEL rfdetr --WEIGHTS ./assets/demo/rfdetr_tiny.pth

The models alone: the same frames, decoded before, in the same batches, nothing drawn or written. Threads: reading ahead
and writing behind, as detect.py does. One after the other: the same without threads. All take turns.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import utils.threads  # noqa: F401 (before torch)

import torch

import detect
from utils import config, processes, report
from utils.demo.clip import ensure_clip
from utils.inference import overlap, video, weather_gate

SOURCE: str = "./demo/rain_begins.mp4"  # the video; the demo's is drawn where it is missing
MODEL = "conditional"                   # of detect.py, with the weights of its demo
WEIGHTS: str | None = ""                # of MODEL rfdetr and exported
IMAGE_SIZE = 160                        # side of the square that RT-DETR sees
BATCH_SIZE = 4                          # images per forward
PANELS = False                          # also draw what COMPARE and SHOW_DERAINED show, and run vanilla RT-DETR
ROUNDS = 5                              # measurements of each, after one of warm-up


class Behind(contextlib.nullcontext):
    """overlap.Behind without a thread."""

    def __init__(self, work, size):
        super().__init__(self)
        self.put = work


def main(**overrides):
    """-> {"models alone", "threads", "one after the other": seconds}."""
    cfg = config.resolve(globals(), overrides)
    if cfg.SOURCE == "./demo/rain_begins.mp4":
        ensure_clip(cfg.SOURCE, video.VideoWriter)
    settings = {name: getattr(cfg, name) for name in ("SOURCE", "MODEL", "IMAGE_SIZE", "BATCH_SIZE")} | {
        "COMPARE": cfg.PANELS, "SHOW_DERAINED": cfg.PANELS, "demo": True} | ({"WEIGHTS": cfg.WEIGHTS} if cfg.WEIGHTS
                                                                             else {})
    own = config.resolve(vars(detect), settings)
    device = processes.device()
    models = detect.build_models(own, device)
    with contextlib.closing(video.open_source(cfg.SOURCE)) as source:
        frames = list(source)
        gate = weather_gate.gate_of(own, models, source)

    def alone():
        begin = time.perf_counter()
        for batch in detect.batches(iter(frames), cfg.BATCH_SIZE, 0):
            detect.detect_frames(own, models, batch, device, gate)
        return time.perf_counter() - begin

    def whole(folder):
        with contextlib.closing(video.open_source(cfg.SOURCE)) as again:
            return detect.run(own, models, again, folder, device).seconds

    def in_turn(folder):
        with mock.patch.object(overlap, "Behind", Behind), mock.patch.object(overlap, "ahead", lambda items: items):
            return whole(folder)
    times = {"models alone": [], "threads": [], "one after the other": []}
    for _ in range(cfg.ROUNDS + 1):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            times["models alone"].append(alone())
            for name, call in (("threads", whole), ("one after the other", in_turn)):
                place = Path(folder) / name
                place.mkdir()
                times[name].append(call(place))
    found = {name: median(values[1:]) for name, values in times.items()}
    processes.say(f"{len(frames)} frames, MODEL {cfg.MODEL}, {torch.get_num_threads()} thread(s) of torch, median of "
                  f"{cfg.ROUNDS}")
    rows = [{"what": name, "seconds": f"{value:.2f}", "times": f"{value / found['models alone']:.2f}"}
            for name, value in found.items()]
    print(report.table(rows, {"what": "", "seconds": "s", "times": "of the models alone"}))
    return found


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
