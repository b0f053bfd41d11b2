"""What feature-level de-raining adds to RT-DETR's own time: goals 10% (multiscale) and 3% (lightweight) at 640x640.

    python -m benchmarks.feature_derain
    python -m benchmarks.feature_derain --COMPILE True

RT-DETR R18 with random weights: the time does not depend on them. The models share one detector and run in turns, so
that the ratios survive a noisy machine.
"""


import torch

from utils import config, feature_derain, freeze, processes, report
from utils.evaluation import latency
from utils.networks.rtdetr import backbone_features, new_rtdetr, require_queries

ARCHITECTURE = "r18"                    # r18, r34, r50 or tiny
IMAGE_SIZE = 640                        # height and width of the image
BATCH = 1                               # images per call
ROUNDS = 7                              # measurements per variant, after two of warm-up
COMPILE = False                         # also torch.compile of vanilla and multiscale, which takes minutes
CLASSES = 80                            # as in COCO

_VARIANTS = {
    "multiscale": {"derain_type": "multiscale"},
    "multiscale, width 0.125": {"derain_type": "multiscale", "width": 0.125},
    "lightweight": {"derain_type": "lightweight"},
}


def main(**overrides):
    """-> {name: milliseconds per call}, "<name>, module" for the module alone."""
    cfg = config.resolve(globals(), overrides)
    device = processes.device()
    torch.manual_seed(0)
    rtdetr = new_rtdetr(cfg.ARCHITECTURE, {i: str(i) for i in range(cfg.CLASSES)}).to(device).eval()
    require_queries(rtdetr, cfg.IMAGE_SIZE)
    models = {"vanilla": rtdetr} | {name: feature_derain.FeatureDerainRTDETR(rtdetr, **settings).to(device).eval()
                                    for name, settings in _VARIANTS.items()}
    if cfg.COMPILE:
        models |= {f"{name}, compiled": torch.compile(models[name]) for name in ("vanilla", "multiscale")}
    images = torch.rand(cfg.BATCH, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, device=device)
    with torch.no_grad():
        features = backbone_features(rtdetr, images)
    calls = {name: (lambda x, model=model: model(pixel_values=x)) for name, model in models.items()}
    calls |= {f"{name}, module": (lambda x, model=models[name]: model.derain_module(features)) for name in _VARIANTS}
    times = latency.latencies(calls, images, repeats=cfg.ROUNDS)
    print(f"{device}, {torch.get_num_threads()} threads, RT-DETR {cfg.ARCHITECTURE}, batch {cfg.BATCH}, "
          f"{cfg.IMAGE_SIZE} x {cfg.IMAGE_SIZE}, median of {cfg.ROUNDS}")
    rows = [{"model": name, "ms": f"{times[name]:.1f}"} for name in models]
    for row in rows:
        if row["model"] in _VARIANTS:  # the module's own time: on a noisy machine a difference of totals says little
            module = times[f"{row['model']}, module"]
            row |= {"module": f"{module:.1f}", "share": f"{100 * module / times['vanilla']:.1f}%",
                    "parameters": f"{freeze.count_parameters(models[row['model']].derain_module)[0]:,}"}
    print(report.table(rows, {"model": "", "ms": "ms", "module": "module alone", "share": "of vanilla's time",
                              "parameters": "added parameters"}))
    return times


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
