"""Make assets/demo/: the small RT-DETR and the small SPDNet that every --demo starts from.

    python tools/train_demo_assets.py            # about an hour on two CPU cores, minutes on a GPU

Both come from this repository's own scripts on procedural scenes (utils/demo.py): 5,000 training scenes that contain
the demo's own 1,200, validation on the demo's 200, which neither network sees in training. Prints the detector's
scores on clean and on rainy scenes: it must be good (mAP at least 0.5) and must suffer (lose at least a third).
"""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import Training_RTDETR  # noqa: E402
import Training_SPDNet  # noqa: E402
from utils import config, datasets, demo, detector, evaluation, loaders, presets, processes  # noqa: E402

SCENES = 5000                           # training scenes; more than the demo has, so that nothing is learnt by heart
WORK_DIR = "./demo/assets"              # data and runs; may be deleted afterwards
ASSETS_DIR = "./assets/demo"            # what is committed
MEGABYTES = 12                          # limit of that folder
RESUME = False                          # True goes on from interrupted runs in WORK_DIR

_DETECTOR = {"NUM_EPOCHS": 15, "BATCH_SIZE": 8, "CLIP_NORM": 1.0, "LEARNING_RATE": 5e-4,
            "BACKBONE_LEARNING_RATE": 5e-4, "WARMUP_STEPS": 100}
_DERAINER = {"NUM_EPOCHS": 2, "PERCENT_DATASET": 100, "LEARNING_RATE": 1e-4, "WARMUP_STEPS": 50}


def rain_gap(folder, work):
    """-> mAP of the detector in `folder` on the demo's clean and rainy validation scenes."""
    model = detector.load_rtdetr(folder, device=processes.device())
    scores = []
    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")):
        data = datasets.CocoDetectionDataset(work / root, "val", detector.id2label_of(model),
                                             presets.evaluation(160), constant="WORK_DIR", domain=domain)
        loader = loaders.validation_loader(data, 8, 0)
        found, _ = evaluation.detection_scores(lambda x: model(pixel_values=x), loader, processes.device())
        scores.append(found["mAP"])
    return scores


def main(**overrides):
    """Draw, train both, copy the best epochs into ASSETS_DIR."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(ROOT)
    demo.ensure_demo(cfg.WORK_DIR, num_train=cfg.SCENES)
    work, assets = Path(cfg.WORK_DIR), Path(cfg.ASSETS_DIR)
    Training_RTDETR.main(demo=True, COCO_DIR=f"{cfg.WORK_DIR}/coco", OUTPUT_DIR=str(work / "rtdetr"),
                         RESUME=cfg.RESUME, **_DETECTOR)
    Training_SPDNet.main(demo=True, RAINY_DIR=f"{cfg.WORK_DIR}/coco_rain/train2017",
                         CLEAN_DIR=f"{cfg.WORK_DIR}/coco/train2017", OUTPUT_DIR=str(work / "spdnet"),
                         RESUME=cfg.RESUME, **_DERAINER)
    shutil.rmtree(assets / "rtdetr", ignore_errors=True)
    shutil.copytree(work / "rtdetr" / "detector", assets / "rtdetr")
    shutil.copy2(work / "spdnet" / "spdnet_best.pt", assets / "spdnet.pt")
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 2**20
    clean, rainy = rain_gap(str(assets / "rtdetr"), work)
    print(f"{assets.as_posix()}: {size:.1f} MB; detector mAP {clean:.4f} clean, {rainy:.4f} in rain "
          f"({100 * (1 - rainy / clean):.0f}% lost)")
    if size > cfg.MEGABYTES or clean < 0.5 or rainy > clean * 2 / 3:
        raise config.UserError(f"the assets miss their goals: at most {cfg.MEGABYTES} MB, clean mAP at least 0.5, at "
                               "least a third of it lost in rain")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
