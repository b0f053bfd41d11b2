"""Which losses and phases should feature de-raining train with? Every variant over several seeds on the demo world.

    python -m tools.ablation_feature_derain
    python -m tools.ablation_feature_derain --SEEDS "(0,)" --PERCENT_DATASET 5 --EPOCHS 2 --OUTPUT_DIR ./demo/try

Runs Training_FeatureDerain.py --demo with the constants of each variant, all with the same images and the same number
of epochs. Finished runs are kept in OUTPUT_DIR and not repeated; the table covers all that are there.
"""

import os
import time
from functools import partial
from pathlib import Path

import Training_FeatureDerain as Training
from tools.ablation_spdnet_adaptation import all_runs, demo_constants, once, require_known, rows_of, score
from utils import config, report
from utils.demo.coco import ensure_demo

_ROOT = Path(__file__).resolve().parent.parent

SEEDS = (0, 1, 2)                       # each run is repeated with these
VARIANTS = ("both phases", "fine-tuning", "detection", "consistency", "detection+consistency+identity",
            "joint from the start", "both phases, detection", "lightweight")  # names of _VARIANTS below
EPOCHS = 6                              # of every run; "both phases" spends the first on phase 1
PERCENT_DATASET: float = 100            # of the demo's 1,200 training images
OUTPUT_DIR = "./demo/ablation_feature_derain"  # a folder per run, and results.json

_DETECTION = {"DETECTION_WEIGHT": 1.0, "CONSISTENCY_WEIGHT": 0.0, "IDENTITY_WEIGHT": 0.0, "MASK_WEIGHT": 0.0}
_ALL = {"DETECTION_WEIGHT": 1.0, "CONSISTENCY_WEIGHT": 10.0, "IDENTITY_WEIGHT": 1.0, "MASK_WEIGHT": 1.0}
_SPECIALIST = _DETECTION | {"DERAIN_TYPE": "none", "COCO_RATIO": 0.0, "RAIN_RATIO": 1.0, "PRETRAINED_SHARE": 0.0,
                            "RAIN_SCORE_WEIGHT": 1.0, "CLEAN_SCORE_WEIGHT": 0.0}
_VARIANTS = {  # share of the epochs in phase 1, constants
    "detection": (1.0, _DETECTION),
    "detection+consistency": (1.0, _ALL | {"IDENTITY_WEIGHT": 0.0}),
    "detection+consistency+identity": (1.0, _ALL),
    "consistency": (1.0, _ALL | {"DETECTION_WEIGHT": 0.0}),  # no labels
    "lightweight": (1.0, _ALL | {"DERAIN_TYPE": "lightweight"}),
    "both phases": (0.1, _ALL),
    "both phases, detection": (0.1, _DETECTION),
    "both phases, masks left alone": (0.1, _ALL | {"MASK_WEIGHT": 0.0}),
    "both phases, backbone features": (0.1, _ALL | {"FEATURE_LEVEL": "backbone"}),
    "both phases, strong identity": (0.1, _ALL | {"IDENTITY_WEIGHT": 30.0}),
    "both phases, BatchNorm alive": (0.1, _ALL | {"FREEZE_BATCH_NORM": False}),
    "joint from the start": (0.0, _ALL),
    # the baseline: no module, the detection loss alone; the demo's rate is at least as good as 3e-4 (docs/lab_notes.md)
    "fine-tuning": (0.0, _DETECTION | {"DERAIN_TYPE": "none"}),
    "fine-tuning+consistency": (0.0, _ALL | {"DERAIN_TYPE": "none"}),
    # a specialist behind the gate, which no clean image reaches
    "rain alone": (0.0, _SPECIALIST), "rain alone, fresh": (0.0, _SPECIALIST | {"RAIN": "fresh"}),
    "both phases, fresh": (0.1, _ALL | {"RAIN": "fresh"}),
    # what a teacher that sees the clean twin adds; the consistency is its term for features
    "both phases, fresh, no teacher": (0.2, _ALL | {"RAIN": "fresh", "CONSISTENCY_WEIGHT": 0.0}),
    "both phases, fresh, queries": (0.2, _ALL | {"RAIN": "fresh", "CONSISTENCY_WEIGHT": 0.0, "QUERIES_WEIGHT": 1.0}),
    "both phases, fresh, positions": (0.2,
                                      _ALL | {"RAIN": "fresh", "CONSISTENCY_WEIGHT": 0.0, "POSITIONS_WEIGHT": 1.0}),
    "both phases, fresh, teacher": (0.2, _ALL | {"RAIN": "fresh", "QUERIES_WEIGHT": 1.0, "POSITIONS_WEIGHT": 1.0}),
    "fine-tuning, fresh": (0.0, _DETECTION | {"DERAIN_TYPE": "none", "RAIN": "fresh"}),
}


def run(variant, seed, folder, cfg):
    """Train one variant. -> {"variant", "seed", "rainy", "clean": mAP of its best epoch, "phase": where that was,
    "seconds": of the processor}."""
    share, constants = _VARIANTS[variant]
    first, begin = round(share * cfg.EPOCHS), time.process_time()
    results = Training.main(demo=True, SEED=seed, OUTPUT_DIR=str(folder), PERCENT_DATASET=cfg.PERCENT_DATASET,
                            PHASE1_EPOCHS=first, PHASE2_EPOCHS=cfg.EPOCHS - first, **constants)
    phase, best = max(((phase, record) for phase, result in results.items() for record in result["history"]),
                      key=lambda item: item[1]["score"])
    return {"variant": variant, "seed": seed, "phase": phase, "rainy": best["rain/mAP"], "clean": best["clean/mAP"],
            "seconds": time.process_time() - begin}


def settings_of(cfg, variant):
    """-> {name: value} that the scores of a variant hang on."""
    share, constants = _VARIANTS[variant]
    return demo_constants(Training) | constants | {"share of phase 1": share, "EPOCHS": cfg.EPOCHS,
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
