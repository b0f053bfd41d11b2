"""RF-DETR segmentation in a single stage: detector and mask head train together.

The alternative to train_detector_stage1.py, shrink_head.py and train_seg_stage2.py: one run, every weight learns from
boxes, classes and masks. It costs the detector's whole backward in every step and starts from detector weights (COCO's
or a stage-1 checkpoint).

    python train_seg_single_stage.py --demo
    python train_seg_single_stage.py --size nano --epochs 50 --batch 4 --accum 4
    python train_seg_single_stage.py --size seg_nano --seg_head official --seg_lr 1e-4 --epochs 50 --batch 4 --accum 4

Writes runs/single_stage_<size>_<resolution>_<n>/: best.pt, last.pt, metrics.json, results.json, curves.png,
predictions.png and tb/.
"""

from functools import partial

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr import criterion, masks, run_report
from rfdetr import main as training
from rfdetr.start import new_detector
from utils import config, freeze, processes
from utils.demo.roboflow import ensure_dataset
from utils.training import engine

# --- model --------------------------------------------------------------------------------------------------------
SIZE = "nano"                           # nano, small, medium, base, large (old), large_2026; seg_nano to seg_2xlarge
RESOLUTION = 0                          # side of the square input; 0 takes the size's own (nano 384, small 512, ...)
SEG_HEAD = "ours"                       # ours; official: of the form of Roboflow's RF-DETR-Seg, for SIZE seg_nano, ...
PRETRAIN_WEIGHTS = "coco"               # coco: published weights, downloaded once; a checkpoint; none: from scratch
PRETRAIN_EXCLUDE_KEYS = ()              # patterns of weights that are not loaded, such as "backbone.0.projector.*"

# --- data ---------------------------------------------------------------------------------------------------------
DATASET_DIR = "./dataset"               # Roboflow's layout, or see docs/data.md; masks are needed (polygons or RLE)
MULTI_SCALE = True                      # every batch at another size around RESOLUTION
EXPANDED_SCALES = False                 # a wider range of sizes
AUGMENTATION = "full"                   # full: colour, crop, mirror; mirror: only that (short runs, plenty of data)
WORKERS = 2                             # processes that load images; 0 avoids trouble with spawn in notebooks

# --- training -----------------------------------------------------------------------------------------------------
EPOCHS = 50                             # fine-tuning COCO weights
BATCH = 4                               # per GPU; 0: as many as fit
ACCUM = 4                               # batches per optimizer step
LR = 1e-4                               # projector, decoder, heads
SEG_LR = 1e-3                           # the mask head, which starts from nothing
BACKBONE_LR = 1.5e-4                    # the ViT's last block
LAYER_DECAY = 0.8                       # every block further down trains so much slower (1: all alike)
FREEZE_BACKBONE = False                 # True: the ViT stays as it is; projector, decoder and heads train
WEIGHT_DECAY = 1e-4                     # not on biases, normalisation, embeddings
MASK_LOSS_COEF = 1.0                    # weight of the pixels' binary cross-entropy
DICE_LOSS_COEF = 1.0                    # weight of the dice loss
MASK_CROP = False                       # True: mask losses inside the target's box alone, divided by its area
MASK_COST = 0.0                         # weight of the masks' BCE and dice in the matching; 0: boxes and classes alone
CLIP_NORM = 0.1                         # limit of the gradient's norm; 0: none
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; a cosine follows
EMA = True                              # evaluate and keep a moving average of the weights
EMA_DECAY = 0.993                       # of that average, after a warm-up of 100 steps
NO_AMP = False                          # True: float32; else bf16, or fp16 on GPUs without bf16 (a CPU always float32)
GRADIENT_CHECKPOINTING = False          # True: the ViT's blocks compute twice and keep little, see docs/rfdetr.md
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
    "PRETRAIN_WEIGHTS": "./assets/demo/rfdetr_tiny.pth", "EPOCHS": 2, "BATCH": 8, "ACCUM": 1, "LR": 1e-4,
    "BACKBONE_LR": 1e-4, "LAYER_DECAY": 1.0, "SEG_LR": 5e-3, "CLIP_NORM": 1.0, "WORKERS": 0,
}


def compute_losses(model, batch, crop=False, mask_cost=0.0):
    """The detector's losses of stage 1, and {"loss_mask", "loss_dice"} at the matched queries of the first group.

    crop: MASK_CROP; mask_cost: MASK_COST, for the queries that have masks: the last layer's, of the first group.
    """
    outputs, labels = model(batch["images"]), batch["labels"]
    queries = outputs["queries"].shape[1]
    further = mask_cost * masks.matching_costs(outputs, labels, crop) if mask_cost else None
    losses = criterion.summed_up(criterion.detection_losses(
        outputs, labels, outputs["logits"].shape[1] // queries, further))
    indices = criterion.match(outputs["logits"][:, :queries], outputs["boxes"][:, :queries], labels, further=further)
    return losses | masks.mask_losses(outputs, labels, indices, crop=crop)


def main(**overrides):
    """Train. -> {"run_dir", "history", "best_epoch", "best_score", "stopped", "test"}"""
    cfg, last = training.resolve(globals(), overrides, "single_stage")
    plan = training.build_plan(cfg, ("--lr", "--backbone_lr", "--seg_lr"), criterion.SUMMED_WEIGHTS | {
        "loss_mask": "--mask_loss_coef", "loss_dice": "--dice_loss_coef"})
    resolution = training.resolution_of(cfg)
    if cfg.demo:
        ensure_dataset(cfg.DATASET_DIR)
    folder = training.begin(cfg, "SINGLE STAGE: DETECTOR AND SEGMENTATION HEAD", "single_stage", resolution)
    engine.seed_everything(cfg.SEED)
    start = new_detector(cfg, last, training.class_names(cfg), resolution, cfg.SEG_HEAD)
    data = training.open_splits(cfg, start.class_rows, resolution, with_masks=True)
    processes.say(run_report.masks_seen(data["train"]))
    processes.say(freeze.describe({"RF-DETR": start.model.detector, "Mask head": start.model.mask_head}))
    return training.train(
        cfg, plan, start, folder, data, training.training_loader(cfg, data["train"], cfg.SIZE, resolution),
        partial(compute_losses, crop=cfg.MASK_CROP, mask_cost=cfg.MASK_COST), parameters=training.parameter_groups(
            start.model, cfg.LR, cfg.BACKBONE_LR, cfg.LAYER_DECAY, cfg.WEIGHT_DECAY, mask_head_lr=cfg.SEG_LR))


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main(**config.from_command_line(globals()))
