"""Make assets/demo/: the small trained weights that every --demo starts from.

    python -m tools.train_demo_assets            # about five hours on two CPU cores, minutes on a GPU

    rtdetr/            the detector, trained on clean scenes             Training_RTDETR.py
    spdnet.pt          SPDNet, trained on rainy/clean pairs              Training_SPDNet.py
    spdnet_adapted.pt  that SPDNet, adapted to the detector              Training_SPDNet_Adaptation.py, fresh rain
    nafnet.pt          NAFNet, trained on rainy/clean pairs              train_unet_derain.py
    nafnet_adapted.pt  that NAFNet, adapted to the detector              Training_SPDNet_Adaptation.py, fresh rain
    rtdetr_rain/       the detector, fine-tuned on rain                  Training_FeatureDerain.py, no module
    rtdetr_specialist/ the detector for rain alone, behind the gate      Training_RTDETR.py, fresh rain
    rain_detector.pt   is it raining?                                    Training_RainDetector.py
    rfdetr_tiny.pth    the RF-DETR of the stage-1 and stage-2 demos      train_detector_stage1.py

All come from this repository's own scripts on procedural scenes (utils/demo/coco.py): up to 10,000 training scenes that
contain the demo's own 1,200 (rtdetr_rain and rain_detector see only those), validation on the demo's
200, which no network is trained on. The detector is trained in two runs, the second at three times the rate of the
first on twice the scenes: the demos must start from one that has learnt what clean scenes can teach, or any further
training would look like de-raining. Prints the detectors' scores: RT-DETR must be good on clean scenes (mAP at least
0.5) and suffer in rain (lose at least a third), RF-DETR must reach 0.4.
"""

import os
import shutil
from pathlib import Path

import train_detector_stage1
import train_unet_derain
import Training_FeatureDerain
import Training_RainDetector
import Training_RTDETR
import Training_SPDNet
import Training_SPDNet_Adaptation
from rfdetr import evaluate, weights
from rfdetr.datasets import batches, roboflow
from utils import config, datasets, integrated_model, processes
from utils.datasets import loaders, presets
from utils.demo.coco import ensure_demo
from utils.demo.roboflow import ensure_dataset
from utils.evaluation.coco import detection_scores
from utils.networks.derainers import load_trained
from utils.networks.rtdetr import id2label_of, load_rtdetr

_ROOT = Path(__file__).resolve().parent.parent

SCENES = 10000                          # training scenes; more than the demo has, so that nothing is learnt by heart
WORK_DIR = "./demo/assets"              # data and runs; may be deleted afterwards
ASSETS_DIR = "./assets/demo"            # what is committed
STAGES = ("rtdetr", "spdnet", "spdnet_adapted", "nafnet", "nafnet_adapted", "rtdetr_rain", "rtdetr_specialist",
          "rain_detector", "rfdetr")    # later ones use earlier
MEGABYTES = 36                          # limit of that folder
RESUME = False                          # True goes on from interrupted runs in WORK_DIR

_HALF = 50  # percent of the scenes that the first detector, SPDNet and RF-DETR see
_RTDETR_START = {"NUM_EPOCHS": 15, "BATCH_SIZE": 8, "CLIP_NORM": 1.0, "LEARNING_RATE": 5e-4,
                 "BACKBONE_LEARNING_RATE": 5e-4, "WARMUP_STEPS": 100, "EMA_DECAY": 0.0, "PERCENT_DATASET": _HALF}
_RTDETR = {"NUM_EPOCHS": 5, "BATCH_SIZE": 8, "CLIP_NORM": 1.0, "LEARNING_RATE": 1.5e-3,
           "BACKBONE_LEARNING_RATE": 1.5e-3, "WARMUP_STEPS": 200, "EMA_DECAY": 0.998}
_SPDNET = {"NUM_EPOCHS": 4, "PERCENT_DATASET": _HALF, "LEARNING_RATE": 2e-4, "WARMUP_STEPS": 200, "BATCH_SIZE": 8,
           "IMAGE_SCALE": 0.5, "PATCH_SIZE": 80, "VAL_IMAGES": 100}  # whole scenes at half size
_ADAPTED = {"RAIN": "fresh", "PERCENT_DATASET": 100, "PRECISION": "bf16", "FAST": ("channels_last",), "BATCH_SIZE": 8,
            "LEARNING_RATE": 8e-4, "WARMUP_STEPS": 100, "EMA_DECAY": 0.998}
_SPDNET_ADAPTED = _ADAPTED | {"NUM_EPOCHS": 3}
_NAFNET = {"ARCH": "nafnet", "NAFNET_WIDTH": 24, "EPOCHS": 4, "BATCH_SIZE": 8, "LEARNING_RATE": 2e-3,
           "EMA_DECAY": 0.998, "PRECISION": "bf16", "IMAGE_SIZE": 160, "CROP_SIZES": (), "CROPS_PER_PAIR": 1,
           "VAL_PAIRS": 100, "TEST_PAIRS": 100, "CACHE_GB": 2.0, "DATALOADER_WORKERS": 0, "REAL_DIR": ""}
_NAFNET_ADAPTED = _ADAPTED | {"DERAINER": "nafnet", "DERAIN_SCALE": 1.0, "NUM_EPOCHS": 4}
_RTDETR_RAIN = {"DERAIN_TYPE": "none", "PHASE1_EPOCHS": 0, "PHASE2_EPOCHS": 6, "CONSISTENCY_WEIGHT": 0.0,
                "IDENTITY_WEIGHT": 0.0}  # the baseline of Eval_FeatureDerain.py --demo: as Training_FeatureDerain.py
                                            # --demo --PHASE2_EPOCHS 5, six epochs of the same images
_SPECIALIST = {"COCO_RATIO": 0.0, "RAIN_RATIO": 1.0, "RAIN": "fresh", "NUM_EPOCHS": 6, "BATCH_SIZE": 8,
               "CLIP_NORM": 1.0, "LEARNING_RATE": 1.5e-3, "BACKBONE_LEARNING_RATE": 1.5e-3, "WARMUP_STEPS": 200,
               "EMA_DECAY": 0.998}
_RAIN_DETECTOR = {"NUM_EPOCHS": 14}
_RFDETR = {"SIZE": "tiny", "MULTI_SCALE": False, "AUGMENTATION": "mirror", "PRETRAIN_WEIGHTS": "none", "EPOCHS": 6,
           "BATCH": 8, "ACCUM": 1, "LR": 5e-4, "BACKBONE_LR": 5e-4, "LAYER_DECAY": 1.0, "CLIP_NORM": 1.0,
           "WARMUP_STEPS": 200, "WORKERS": 0}


def rain_gap(folder, work):
    """-> mAP of the detector in `folder` on the demo's clean and rainy validation scenes."""
    model = load_rtdetr(folder, device=processes.device())
    scores = []
    for root, domain in (("coco", "clean"), ("coco_rain", "rainy")):
        data = datasets.CocoDetectionDataset(work / root, "val", id2label_of(model),
                                             presets.evaluation(160), constant="WORK_DIR", domain=domain)
        loader = loaders.validation_loader(data, 8, 0)
        found, _ = detection_scores(lambda x: model(pixel_values=x), loader, processes.device())
        scores.append(found["mAP"])
    return scores


def rfdetr_score(path):
    """-> box mAP of the RF-DETR in `path` on the demo's validation scenes."""
    model, found = weights.load_detector(path, processes.device())
    root = ensure_dataset()
    data = roboflow.RoboflowDataset(root, "valid", found["class_rows"], 160, train=False, flag="WORK_DIR")
    loader = loaders.validation_loader(data, 8, 0, collate=batches.Collate(160))
    return evaluate.evaluate(model, loader, processes.device())[0]["box/mAP"]


def keep(source, target):
    """Copy a trained file or folder into the assets, in place of an older one."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def main(**overrides):
    """Draw, train, copy the best epochs into ASSETS_DIR."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(_ROOT)
    if unknown := [stage for stage in cfg.STAGES if stage not in STAGES]:
        raise config.UserError(f"STAGES: {', '.join(map(repr, unknown))} is not one of {', '.join(STAGES)}")
    work, assets = Path(cfg.WORK_DIR), Path(cfg.ASSETS_DIR)
    ensure_demo(work, num_train=cfg.SCENES)
    clean, rainy = f"{cfg.WORK_DIR}/coco", f"{cfg.WORK_DIR}/coco_rain"
    for stage in cfg.STAGES:
        common = {"demo": True, "RESUME": cfg.RESUME, "OUTPUT_DIR": str(work / stage)}
        if stage == "rtdetr":
            start = {"OUTPUT_DIR": str(work / "rtdetr_start"), "RTDETR_MODEL_NAME": ""}
            Training_RTDETR.main(**common | start, COCO_DIR=clean, **_RTDETR_START)
            Training_RTDETR.main(**common, COCO_DIR=clean, **_RTDETR,
                                 RTDETR_MODEL_NAME=str(work / "rtdetr_start" / "detector"))
            keep(work / stage / "detector", assets / "rtdetr")
        elif stage == "spdnet":
            Training_SPDNet.main(**common, RAINY_DIR=f"{rainy}/train2017", CLEAN_DIR=f"{clean}/train2017", **_SPDNET)
            keep(work / stage / "spdnet_best.pt", assets / "spdnet.pt")
        elif stage == "spdnet_adapted":
            Training_SPDNet_Adaptation.main(**common, COCO_DIR=clean, COCO_RAIN_DIR=rainy, RTDETR_MODEL_NAME=str(
                assets / "rtdetr"), SPDNET_MODEL_PATH=str(assets / "spdnet.pt"), **_SPDNET_ADAPTED)
            keep(work / stage / "spdnet_adapted.pt", assets / "spdnet_adapted.pt")
        elif stage == "nafnet":
            train_unet_derain.main(CLEAR_DIR=f"{clean}/train2017", RAINY_DIR=f"{rainy}/train2017",
                                   TRAIN_PAIRS=cfg.SCENES - _NAFNET["VAL_PAIRS"] - _NAFNET["TEST_PAIRS"], **_NAFNET,
                                   CHECKPOINT_DIR=str(work / stage), RESUME=cfg.RESUME)
            integrated_model.write_derainer(load_trained(work / stage / "best.pt"), assets / "nafnet.pt")
        elif stage == "nafnet_adapted":
            Training_SPDNet_Adaptation.main(**common, COCO_DIR=clean, COCO_RAIN_DIR=rainy, **_NAFNET_ADAPTED,
                                            DERAIN_MODEL_PATH=str(assets / "nafnet.pt"),
                                            RTDETR_MODEL_NAME=str(assets / "rtdetr"))
            keep(work / stage / "derainer_adapted.pt", assets / "nafnet_adapted.pt")
        elif stage == "rtdetr_rain":
            Training_FeatureDerain.main(**common, RTDETR_MODEL_NAME=str(assets / "rtdetr"), **_RTDETR_RAIN)
            keep(work / stage / "model" / "rtdetr", assets / "rtdetr_rain")
        elif stage == "rtdetr_specialist":
            Training_RTDETR.main(**common, COCO_DIR=clean, COCO_RAIN_DIR=rainy, **_SPECIALIST,
                                 RTDETR_MODEL_NAME=str(assets / "rtdetr"))
            keep(work / stage / "detector", assets / "rtdetr_specialist")
        elif stage == "rain_detector":
            Training_RainDetector.main(**common, **_RAIN_DETECTOR)
            keep(work / stage / "rain_detector_best.pt", assets / "rain_detector.pt")
        else:
            scenes = cfg.SCENES * _HALF // 100
            ensure_dataset(work / "dataset", work / "rfdetr_scenes", num_train=scenes)
            going_on = cfg.RESUME and any((work / stage).glob("*/last.pt"))
            result = train_detector_stage1.main(
                **_RFDETR, DATASET_DIR=str(work / "dataset"), RUNS_DIR=str(work / stage),
                RESUME="last" if going_on else "")
            keep(Path(result["checkpoint"]), assets / "rfdetr_tiny.pth")
    size = sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 2**20
    clean, rainy = rain_gap(str(assets / "rtdetr"), work)
    boxes = rfdetr_score(assets / "rfdetr_tiny.pth")
    print(f"{assets.as_posix()}: {size:.1f} MB; RT-DETR mAP {clean:.4f} clean, {rainy:.4f} in rain "
          f"({100 * (1 - rainy / clean):.0f}% lost); RF-DETR mAP {boxes:.4f}")
    if size > cfg.MEGABYTES or clean < 0.5 or rainy > clean * 2 / 3 or boxes < 0.4:
        raise config.UserError(f"the assets miss their goals: at most {cfg.MEGABYTES} MB, RT-DETR's clean mAP at least "
                               "0.5 and a third of it lost in rain, RF-DETR's mAP at least 0.4")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
