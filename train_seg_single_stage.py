"""RF-DETR segmentation in a single stage: detector and mask head train together.

The alternative to train_detector_stage1.py, shrink_head.py and train_seg_stage2.py: one run, every weight learns from
boxes, classes and masks. It costs the detector's whole backward in every step and starts from detector weights (COCO's
or a stage-1 checkpoint).

    python train_seg_single_stage.py --demo
    python train_seg_single_stage.py --size nano --epochs 50 --batch 4 --accum 4

Writes runs/single_stage_<size>_<resolution>_<n>/: best.pt, last.pt, metrics.json, results.json, curves.png,
predictions.png and tb/.
"""

from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr import criterion, masks, run_report, weights
from rfdetr import main as training
from utils import config, freeze, processes
from utils.demo.roboflow import ensure_dataset
from utils.training import engine

# --- model --------------------------------------------------------------------------------------------------------
SIZE = "nano"                           # nano, small, medium, base, large (560, deprecated by its authors), large_2026
RESOLUTION = 0                          # side of the square input; 0 takes the size's own (nano 384, small 512, ...)
PRETRAIN_WEIGHTS = "coco"               # coco: published weights, downloaded once; a checkpoint; none: from scratch
PRETRAIN_EXCLUDE_KEYS = ()              # patterns of weights that are not loaded, such as "backbone.0.projector.*"

# --- data ---------------------------------------------------------------------------------------------------------
DATASET_DIR = "./dataset"               # Roboflow layout; annotations need masks (polygons or RLE)
MULTI_SCALE = True                      # every batch at another size around RESOLUTION
EXPANDED_SCALES = False                 # a wider range of sizes
AUGMENTATION = "full"                   # full: colour, crop, mirror; mirror: only that (short runs, plenty of data)
WORKERS = 2                             # processes that load images; 0 avoids trouble with spawn in notebooks

# --- training -----------------------------------------------------------------------------------------------------
EPOCHS = 50                             # fine-tuning COCO weights
BATCH = 4                               # per GPU
ACCUM = 4                               # batches per optimizer step
LR = 1e-4                               # projector, decoder, heads
SEG_LR = 1e-3                           # the mask head, which starts from nothing
BACKBONE_LR = 1.5e-4                    # the ViT's last block
LAYER_DECAY = 0.8                       # every block further down trains so much slower (1: all alike)
WEIGHT_DECAY = 1e-4                     # not on biases, normalisation, embeddings
MASK_LOSS_COEF = 1.0                    # weight of the pixels' binary cross-entropy
DICE_LOSS_COEF = 1.0                    # weight of the dice loss
CLIP_NORM = 0.1                         # limit of the gradient's norm; 0: none
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; a cosine follows
EMA = True                              # evaluate and keep a moving average of the weights
EMA_DECAY = 0.993                       # of that average, after a warm-up of 100 steps
NO_AMP = False                          # True: float32; else bf16, or fp16 on GPUs without bf16 (a CPU always float32)
PATIENCE = 10                           # epochs without a better mask mAP before the run stops
SEED = 0                                # order, augmentation, new weights

# --- output -------------------------------------------------------------------------------------------------------
RUNS_DIR = "./runs"                     # every run gets a folder of its own in it
RUN_TEST = False                        # True: evaluate the best epoch on test/ as well
RESUME = ""                             # a run's folder, or "last": go on with that run and its constants
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch

DEMO = {
    "SIZE": "tiny", "DATASET_DIR": "./demo/dataset", "RUNS_DIR": "./demo/runs", "MULTI_SCALE": False,
    "AUGMENTATION": "mirror",
    "PRETRAIN_WEIGHTS": "./assets/demo/rfdetr_tiny.pth", "EPOCHS": 2, "BATCH": 8, "ACCUM": 1, "LR": 1e-4,
    "BACKBONE_LR": 1e-4, "LAYER_DECAY": 1.0, "SEG_LR": 5e-3, "CLIP_NORM": 1.0, "WORKERS": 0,
}


def compute_losses(model, batch):
    """The detector's losses of stage 1, and {"loss_mask", "loss_dice"} at the matched queries of the first group."""
    outputs, labels = model(batch["images"]), batch["labels"]
    queries = outputs["queries"].shape[1]
    losses = criterion.summed_up(criterion.detection_losses(outputs, labels, outputs["logits"].shape[1] // queries))
    indices = criterion.match(outputs["logits"][:, :queries], outputs["boxes"][:, :queries], labels)
    return losses | masks.mask_losses(outputs, labels, indices)


def main(**overrides):
    """Train. -> {"run_dir", "history", "best_epoch", "best_score", "stopped", "test"}"""
    cfg = config.resolve(globals(), training.resumed(globals(), overrides, "single_stage"))
    training.check_numbers(cfg)
    resolution = training.resolution_of(cfg)
    folder = training.folder_of(cfg, f"single_stage_{cfg.SIZE}_{resolution}")
    if cfg.demo:
        ensure_dataset(cfg.DATASET_DIR)
    processes.say(run_report.banner("SINGLE STAGE: DETECTOR AND SEGMENTATION HEAD", {
        "Model Size": cfg.SIZE, "Resolution": resolution, "Epochs": cfg.EPOCHS,
        "Batch": f"{cfg.BATCH} x {cfg.ACCUM} (accumulation)", "Device": training.device_name(),
        "Dataset": Path(cfg.DATASET_DIR).resolve(), "Output": folder.resolve()}))
    engine.seed_everything(cfg.SEED)
    names = training.class_names(cfg.DATASET_DIR)
    model, class_rows = training.new_detector(cfg, names, resolution, with_masks=True)
    data = training.open_splits(cfg, class_rows, resolution, with_masks=True)
    processes.say(run_report.masks_seen(data["train"]))
    train_loader = training.training_loader(cfg, data["train"], cfg.SIZE, resolution)
    splits = training.evaluation_splits(cfg, data, resolution)
    processes.say(freeze.describe({"RF-DETR": model.detector, "Mask head": model.mask_head}))
    extras = weights.description(model, names, class_rows)

    result = engine.fit(
        model, train_loader, compute_losses, output_dir=folder, epochs=cfg.EPOCHS,
        parameters=training.parameter_groups(model, cfg.LR, cfg.BACKBONE_LR, cfg.LAYER_DECAY, cfg.WEIGHT_DECAY,
                                             mask_head_lr=cfg.SEG_LR),
        loss_weights=criterion.SUMMED_WEIGHTS | {
            "loss_mask": cfg.MASK_LOSS_COEF, "loss_dice": cfg.DICE_LOSS_COEF},
        evaluate=lambda model: run_report.scores(model, *splits["valid"], with_masks=True), score="mask/mAP",
        sample_images=lambda model: run_report.sample_images(model, splits["valid"][0], class_rows),
        accumulate=cfg.ACCUM, clip_norm=cfg.CLIP_NORM, warmup_steps=cfg.WARMUP_STEPS,
        precision=training.amp_precision(cfg.NO_AMP), precisions=("float32", "bf16", "fp16"), patience=cfg.PATIENCE,
        ema=cfg.EMA_DECAY if cfg.EMA else 0.0, constants=cfg.as_dict(), extras=extras,
        resume=bool(cfg.RESUME), resume_hint=f"--resume {folder.as_posix()}",
        checkpoint_steps=cfg.CHECKPOINT_STEPS)
    return result | run_report.final(model, cfg, folder, splits, class_rows, with_masks=True)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main(**config.from_command_line(globals()))
