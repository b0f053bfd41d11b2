"""What does a teacher that sees the clean twin teach a specialist or an adapter? Over several seeds on the demo world.

    python -m tools.ablation_teacher
    python -m tools.ablation_teacher --SEEDS "(0,)" --VARIANTS "('fresh rain', 'no labels')"

Runs Training_RTDETR.py on rain alone, drawn anew in every epoch, or Training_WeatherAdapter.py with the demo's data and
the terms of utils/networks/distillation.py. Variants with a teacher have fewer epochs, so that all take about the same
time, which the table shows. Finished runs are kept in OUTPUT_DIR and not repeated.
"""

import os
import time
from functools import partial
from pathlib import Path

import Eval_SPDNet_Adaptation as Eval
import Training_RTDETR
import Training_WeatherAdapter
from tools.ablation_spdnet_adaptation import (
    all_runs,
    demo_constants,
    once,
    require_known,
    rows_of,
    score,
    scores_of,
)
from utils import config, report
from utils.demo.coco import ensure_demo
from utils.networks import adapter
from utils.networks.rtdetr import load_rtdetr

_ROOT = Path(__file__).resolve().parent.parent

SEEDS = (0, 1, 2)                       # each run is repeated with these
VARIANTS = ("fresh rain", "queries", "positions", "features", "all three", "better teacher", "no labels",
            "no labels, better teacher", "fresh rain, high rate", "all three, high rate",
            "better teacher, high rate", "no labels, high rate", "no labels, better teacher, high rate",
            "adapter", "adapter, queries", "adapter, positions", "adapter, features", "adapter, all three",
            "adapter, no labels", "adapter from specialist",
            "adapter from specialist, better teacher")  # of _VARIANTS below
PERCENT_DATASET: float = 100            # of the demo's 1,200 training images
EPOCHS = 0                              # of every run; 0: those of _VARIANTS
OUTPUT_DIR = "./demo/ablation_teacher"  # a folder per run, and results.json

_SPECIALIST = {  # the demo's detector goes on, on rain alone
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "COCO_RATIO": 0.0, "RAIN_RATIO": 1.0, "RAIN": "fresh",
    "BATCH_SIZE": 8, "CLIP_NORM": 1.0, "QUERIES_WEIGHT": 0.0, "POSITIONS_WEIGHT": 0.0, "FEATURES_WEIGHT": 0.0}
_ADAPTER = {"QUERIES_WEIGHT": 0.0, "POSITIONS_WEIGHT": 0.0, "FEATURES_WEIGHT": 0.0}
_TEACHER = {"QUERIES_WEIGHT": 1.0, "POSITIONS_WEIGHT": 1.0, "FEATURES_WEIGHT": 1.0}
_STRONG = {"QUERIES_WEIGHT": 3.0, "POSITIONS_WEIGHT": 3.0, "FEATURES_WEIGHT": 3.0}
_HIGH_RATE = _STRONG | {  # for a teacher; labels alone are best at 2e-3 of 1e-3, 2e-3 and 3e-3
    "LEARNING_RATE": 3e-3, "BACKBONE_LEARNING_RATE": 3e-3}
_BETTER = {"TEACHER_NAME": "./assets/demo/rtdetr_specialist"}  # on clean images too: it has seen 10,000 scenes
_FROM_SPECIALIST = _ADAPTER | {"START_NAME": "./assets/demo/rtdetr_specialist"}
_VARIANTS = {  # script, epochs, constants
    "fresh rain": (Training_RTDETR, 6, _SPECIALIST),
    "queries": (Training_RTDETR, 5, _SPECIALIST | {"QUERIES_WEIGHT": 1.0}),
    "positions": (Training_RTDETR, 5, _SPECIALIST | {"POSITIONS_WEIGHT": 1.0}),
    "features": (Training_RTDETR, 5, _SPECIALIST | {"FEATURES_WEIGHT": 1.0}),
    "all three": (Training_RTDETR, 5, _SPECIALIST | _TEACHER),
    "better teacher": (Training_RTDETR, 5, _SPECIALIST | _TEACHER | _BETTER),
    "no labels, better teacher": (Training_RTDETR, 6, _SPECIALIST | _TEACHER | _BETTER | {"DETECTION_WEIGHT": 0.0}),
    "no labels": (Training_RTDETR, 6, _SPECIALIST | _TEACHER | {"DETECTION_WEIGHT": 0.0}),
    "fresh rain, high rate": (Training_RTDETR, 6,
                              _SPECIALIST | {"LEARNING_RATE": 2e-3, "BACKBONE_LEARNING_RATE": 2e-3}),
    "all three, high rate": (Training_RTDETR, 5, _SPECIALIST | _HIGH_RATE),
    "better teacher, high rate": (Training_RTDETR, 5, _SPECIALIST | _HIGH_RATE | _BETTER),
    "no labels, high rate": (Training_RTDETR, 6, _SPECIALIST | _HIGH_RATE | {"DETECTION_WEIGHT": 0.0}),
    "no labels, better teacher, high rate": (Training_RTDETR, 6,
                                             _SPECIALIST | _HIGH_RATE | _BETTER | {"DETECTION_WEIGHT": 0.0}),
    "adapter": (Training_WeatherAdapter, 5, _ADAPTER),
    "adapter, queries": (Training_WeatherAdapter, 4, _ADAPTER | {"QUERIES_WEIGHT": 1.0}),
    "adapter, positions": (Training_WeatherAdapter, 4, _ADAPTER | {"POSITIONS_WEIGHT": 1.0}),
    "adapter, features": (Training_WeatherAdapter, 4, _ADAPTER | {"FEATURES_WEIGHT": 1.0}),
    "adapter, all three": (Training_WeatherAdapter, 4, _TEACHER),
    "adapter, no labels": (Training_WeatherAdapter, 5, _TEACHER | {"DETECTION_WEIGHT": 0.0}),
    "adapter from specialist": (Training_WeatherAdapter, 5, _FROM_SPECIALIST),
    "adapter from specialist, better teacher": (Training_WeatherAdapter, 4, _FROM_SPECIALIST | _BETTER | _STRONG),
}


def run(variant, seed, folder, cfg):
    """Train one variant. -> {"variant", "seed", "rainy", "clean": mAP of its best epoch, "seconds": of CPU time}"""
    script, epochs, constants = _VARIANTS[variant]
    begin = time.process_time()
    script.main(demo=True, SEED=seed, OUTPUT_DIR=str(folder), PERCENT_DATASET=cfg.PERCENT_DATASET,
                NUM_EPOCHS=cfg.EPOCHS or epochs, **constants)
    seconds = time.process_time() - begin
    if script is Training_WeatherAdapter:
        base = load_rtdetr(_SPECIALIST["RTDETR_MODEL_NAME"])
        detector = adapter.fold(base, folder / "rain.safetensors", "OUTPUT_DIR")
    else:
        detector = load_rtdetr(str(folder / "detector"), constant="OUTPUT_DIR")
    scores = scores_of(detector, config.resolve(vars(Eval), {"demo": True}))
    return {"variant": variant, "seed": seed, "seconds": seconds} | scores


def settings_of(cfg, variant):
    """-> {name: value} that the scores of a variant hang on."""
    script, epochs, constants = _VARIANTS[variant]
    return demo_constants(script) | constants | {"NUM_EPOCHS": cfg.EPOCHS or epochs,
                                                 "PERCENT_DATASET": cfg.PERCENT_DATASET}


def main(**overrides):
    """Run what is missing, then print mean and spread over seeds of every variant."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(_ROOT)
    require_known(cfg.VARIANTS, _VARIANTS)
    ensure_demo()
    folder = Path(cfg.OUTPUT_DIR)
    vanilla = once(folder / "vanilla.json", {}, lambda: score(None))
    runs = all_runs(cfg, partial(settings_of, cfg), run)
    rows = rows_of(cfg.VARIANTS, runs, vanilla)
    print("\n" + report.table(rows, {"variant": "variant", "rainy": "mAP in rain", "gap": "rain gap won back",
                                     "clean": "mAP on clean images", "seconds": "CPU time"}))
    report.write_results(folder / "results.json", cfg.as_dict(), {"vanilla": vanilla, "runs": runs})


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
