"""Stage 2 of RF-DETR segmentation: train a mask head on the frozen detector of stage 1.

The detector is frozen for good (eval mode, no graph, 300 queries), so its boxes are the same before and after. Only the
mask head trains: every pixel of a map at a quarter of the image's resolution and every query get a vector, and a mask
is their dot product.

    python train_seg_stage2.py --demo
    python train_seg_stage2.py --size nano --stage1_run runs/detector_nano_384_1 --epochs 1 --batch 4 --accum 2
        --checkpoint runs/detector_nano_384_1/checkpoint_mydata.pth --workers 2 --multi_scale 0 --run_test 0

Writes runs/segmentation_<size>_<resolution>_<n>/: best.pt (detector and mask head), last.pt (--resume goes on from it),
stage2_config.json, metrics.json, results.json, curves.png, predictions.png and tb/.
"""

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr import criterion, features, masks, run_report
from rfdetr import main as training
from rfdetr.start import frozen_detector_with_masks, stage1_checkpoint
from utils import config, freeze, processes, report
from utils.demo.roboflow import ensure_dataset
from utils.training import engine

# --- model --------------------------------------------------------------------------------------------------------
SIZE = "nano"                           # as in stage 1
RESOLUTION = 0                          # side of the square input; 0 takes the one of stage 1
STAGE1_RUN = ""                         # folder of the stage-1 run
CHECKPOINT = ""                         # detector to freeze, from shrink_head.py; "" takes STAGE1_RUN's best.pt

# --- data ---------------------------------------------------------------------------------------------------------
DATASET_DIR = "./dataset"               # Roboflow's layout, or see docs/data.md; masks are needed (polygons or RLE)
MULTI_SCALE = True                      # every batch at another size around RESOLUTION
EXPANDED_SCALES = False                 # a wider range of sizes
AUGMENTATION = "full"                   # full: colour, crop, mirror; mirror: only that (short runs, plenty of data)
CACHE_FEATURES = False                  # compute the detector's features once: many times faster epochs, mirror only
CACHE_DIR: str | None = ""              # where they are kept, 1.5 MB an image at 384; "" is RUNS_DIR/feature_cache
WORKERS = 2                             # processes that load images; 0 avoids trouble with spawn in notebooks

# --- training -----------------------------------------------------------------------------------------------------
EPOCHS = 50                             # a few are enough to see masks
BATCH = 4                               # per GPU; 0: as many as fit
ACCUM = 2                               # batches per optimizer step
SEG_LR = 1e-4                           # only the mask head trains; it stands 10 times as much when in a hurry
WEIGHT_DECAY = 1e-4                     # not on biases and normalisation
MASK_LOSS_COEF = 1.0                    # weight of the pixels' binary cross-entropy
DICE_LOSS_COEF = 1.0                    # weight of the dice loss
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; a cosine follows
NO_AMP = False                          # True: float32; else bf16, or fp16 on GPUs without bf16 (a CPU always float32)
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
PATIENCE = 10                           # epochs without a better mask mAP before the run stops; 0: never
SEED = 0                                # order, augmentation, new weights

# --- output -------------------------------------------------------------------------------------------------------
RUNS_DIR = "./runs"                     # every run gets a folder of its own in it
RUN_TEST = False                        # True: evaluate the best epoch on test/ as well
RESUME = ""                             # a run's folder, or "last": go on with that run and its constants
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none

DEMO = {
    "SIZE": "tiny", "DATASET_DIR": "./demo/dataset", "RUNS_DIR": "./demo/runs", "MULTI_SCALE": False,
    "AUGMENTATION": "mirror",
    "CHECKPOINT": "./assets/demo/rfdetr_tiny.pth", "EPOCHS": 6, "BATCH": 8, "ACCUM": 1, "SEG_LR": 5e-3,
    "WORKERS": 0, "CACHE_FEATURES": True,
}
_CONFIG_FILE = "stage2_config.json"


def compute_losses(model, batch):
    """{"loss_mask", "loss_dice"} at the queries that the detector's boxes and classes match with the objects."""
    labels = batch["labels"]
    if labels[0].get("features") is not None:
        outputs = model(batch["images"], cached=features.stacked(labels))
        indices = [(torch.arange(len(one["boxes"])),) * 2 for one in labels]  # the cache holds the matched queries only
    else:
        outputs = model(batch["images"])
        indices = criterion.match(outputs["logits"], outputs["boxes"], labels)
    return masks.mask_losses(outputs, labels, indices)


def main(**overrides):
    """Train. -> {"run_dir", "history", "best_epoch", "best_score", "stopped", "test"}"""
    cfg, last = training.resolve(globals(), overrides, "segmentation")
    plan = training.build_plan(cfg, ("--seg_lr",), {"loss_mask": "--mask_loss_coef", "loss_dice": "--dice_loss_coef"})
    source = stage1_checkpoint(cfg)
    if cfg.demo:
        ensure_dataset(cfg.DATASET_DIR)
    class_names = training.class_names(cfg)
    engine.seed_everything(cfg.SEED)
    start = frozen_detector_with_masks(cfg, last, source, class_names)
    model, resolution = start.model, start.resolution
    folder = training.begin(cfg, "STAGE 2: SEGMENTATION HEAD TRAINING", "segmentation", resolution,
                            {"Stage-1 Checkpoint": source})
    processes.say(f"[ok] Found Stage-1 checkpoint: {source}")
    data = training.open_splits(cfg, start.class_rows, resolution, with_masks=True, augment=not cfg.CACHE_FEATURES)
    processes.say(run_report.masks_seen(data["train"]))
    processes.say(f"[ok] Detector frozen: {freeze.count_parameters(model.detector)[0]:,} parameters\n"
                  f"[ok] Segmentation head trainable: {freeze.count_parameters(model.mask_head)[1]:,} parameters "
                  f"({type(model.mask_head).__name__})")
    if cfg.CACHE_FEATURES:
        loader = training.cached_loader(cfg, model, data["train"], resolution)
    else:
        loader = training.training_loader(cfg, data["train"], cfg.SIZE, resolution)
    if processes.is_main():
        report.write_json(folder / _CONFIG_FILE, cfg.as_dict() | {
            "STAGE1_CHECKPOINT": str(source), "MODEL": model.model_args, "CLASS_NAMES": class_names})
    return training.train(
        cfg, plan, start, folder, data, loader, compute_losses,
        parameters=training.parameter_groups(model, cfg.SEG_LR, cfg.SEG_LR, 1.0, cfg.WEIGHT_DECAY),
        config_file=_CONFIG_FILE, remember=cfg.CACHE_FEATURES)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main(**config.from_command_line(globals()))
