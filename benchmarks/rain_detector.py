"""What the rain detector costs: its time per image against RT-DETR's (goal: at most 2% at 640 x 640).

    python -m benchmarks.rain_detector

Random weights: they do not change the time. All models take turns in one run.
"""


import torch

from utils import config, processes, report
from utils.evaluation import latency
from utils.networks.rain_detector import RainDetector
from utils.networks.rtdetr import new_rtdetr, require_queries

IMAGE_SIZE = 640        # side of the square image that both get
BATCHES = (1, 4)        # batch sizes
REPEATS = 7             # timed calls per model, after two for warm-up
ARCHITECTURE = "r18"    # r18, r34 or r50


def main(**overrides):
    """Measure; -> {batch: {"RT-DETR", "rain detector", "without its resize": ms per image}}."""
    cfg = config.resolve(globals(), overrides)
    device = processes.device()
    rain_detector = RainDetector().eval().to(device)
    rtdetr = new_rtdetr(cfg.ARCHITECTURE, {i: str(i) for i in range(80)}).eval().to(device)
    require_queries(rtdetr, cfg.IMAGE_SIZE)
    results, rows = {}, []
    for batch in cfg.BATCHES:
        images = torch.rand(batch, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, device=device)
        small = torch.rand(batch, 3, 224, 224, device=device)
        models = {"RT-DETR": lambda x: rtdetr(pixel_values=x), "rain detector": rain_detector.predict,
                  "without its resize": lambda x, small=small: rain_detector.predict(small)}
        found = latency.latencies(models, images, repeats=cfg.REPEATS)
        results[batch] = {name: ms / batch for name, ms in found.items()}
        rows += [{"batch": batch, "model": name, "ms": f"{ms:.2f}",
                  "share": f"{100 * ms / results[batch]['RT-DETR']:.2f}%"} for name, ms in results[batch].items()]
    print(f"{report.environment()['device']}, {cfg.IMAGE_SIZE} x {cfg.IMAGE_SIZE}, RT-DETR {cfg.ARCHITECTURE}")
    print(report.table(rows, {"batch": "batch", "model": "model", "ms": "ms per image", "share": "of RT-DETR"}))
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
