"""Stage 1 of RF-DETR segmentation: train the detector (boxes and classes) on a Roboflow-layout data set.

RF-DETR: Robinson et al., arXiv 2511.09554. The data set is dataset/{train,valid,test}/_annotations.coco.json beside the
images. The class head keeps its 91 COCO rows when COCO weights are loaded: a class that COCO knows by name goes on
training its COCO row, others take free rows (class_rows in the checkpoint); shrink_head.py cuts the head afterwards.

    python train_detector_stage1.py --demo
    python train_detector_stage1.py --size nano --epochs 1 --batch 1 --accum 4 --workers 0 --multi_scale 0

Writes runs/detector_<size>_<resolution>_<n>/: checkpoint_best_regular.pth (best epoch, weights and class names only),
best.pt, last.pt (--resume goes on from it), checkpoint.pt (latest epoch), metrics.json, results.json, curves.png,
predictions.png and tb/.
"""

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr import criterion, run_report
from rfdetr import main as training
from rfdetr.start import new_detector
from utils import config, freeze, processes
from utils.demo.roboflow import ensure_dataset
from utils.training import engine

# --- model --------------------------------------------------------------------------------------------------------
SIZE = "nano"                           # nano, small, medium, base, large (old), large_2026; seg_nano to seg_2xlarge
RESOLUTION = 0                          # side of the square input; 0 takes the size's own (nano 384, small 512, ...)
PRETRAIN_WEIGHTS = "coco"               # coco: published weights, downloaded once; a checkpoint; none: from scratch
PRETRAIN_EXCLUDE_KEYS = ()              # patterns of weights that are not loaded, such as "backbone.0.projector.*"

# --- data ---------------------------------------------------------------------------------------------------------
DATASET_DIR = "./dataset"               # Roboflow's layout, COCO's, YOLO's or Pascal VOC's, see docs/data.md
MULTI_SCALE = True                      # every batch at another size around RESOLUTION
EXPANDED_SCALES = False                 # a wider range of sizes
AUGMENTATION = "full"                   # full: colour, crop, mirror; mirror: only that (short runs, plenty of data)
WORKERS = 2                             # processes that load images; 0 avoids trouble with spawn in notebooks

# --- training -----------------------------------------------------------------------------------------------------
EPOCHS = 50                             # fine-tuning COCO weights; from scratch many more
BATCH = 4                               # per GPU; 16 with ACCUM is what the published models used; 0: as many as fit
ACCUM = 4                               # batches per optimizer step
LR = 1e-4                               # projector, decoder, heads
BACKBONE_LR = 1.5e-4                    # the ViT's last block
LAYER_DECAY = 0.8                       # every block further down trains so much slower (1: all alike)
FREEZE_BACKBONE = False                 # True: the ViT stays as it is; projector, decoder and heads train
WEIGHT_DECAY = 1e-4                     # not on biases, normalisation, embeddings
CLIP_NORM = 0.1                         # limit of the gradient's norm; 0: none
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; a cosine follows
EMA = True                              # evaluate and keep a moving average of the weights
EMA_DECAY = 0.993                       # of that average, after a warm-up of 100 steps
NO_AMP = False                          # True: float32; else bf16, or fp16 on GPUs without bf16 (a CPU always float32)
GRADIENT_CHECKPOINTING = False          # True: the ViT's blocks compute twice and keep little, see docs/rfdetr.md
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
PATIENCE = 10                           # epochs without a better box mAP before the run stops; 0: never
SEED = 0                                # order, augmentation, new weights

# --- output -------------------------------------------------------------------------------------------------------
RUNS_DIR = "./runs"                     # every run gets a folder of its own in it
RUN_TEST = False                        # True: evaluate the best epoch on test/ as well
RESUME = ""                             # a run's folder, or "last": go on with that run and its constants
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none

# Pretrained on street scenes, but its class heads start anew: what fine-tuning on classes of one's own looks like.
DEMO = {
    "SIZE": "tiny", "DATASET_DIR": "./demo/dataset", "RUNS_DIR": "./demo/runs", "MULTI_SCALE": False,
    "AUGMENTATION": "mirror", "PRETRAIN_WEIGHTS": "./assets/demo/rfdetr_tiny.pth", "EPOCHS": 2,
    "PRETRAIN_EXCLUDE_KEYS": ("class_embed.*", "transformer.enc_out_class_embed.*"), "BATCH": 8, "ACCUM": 1, "LR": 2e-4,
    "BACKBONE_LR": 2e-4, "LAYER_DECAY": 1.0, "CLIP_NORM": 1.0, "WORKERS": 0,
}


def compute_losses(model, batch):
    """{"loss_ce", "loss_bbox", "loss_giou"} of the last decoder layer, "loss_aux" of the others and of the proposals,
    and "class_error" (percent), which is only reported."""
    outputs = model(batch["images"])
    groups = outputs["logits"].shape[1] // outputs["queries"].shape[1]  # group DETR: sets of queries in training
    return criterion.summed_up(criterion.detection_losses(outputs, batch["labels"], groups))


def main(**overrides):
    """Train. -> {"run_dir", "checkpoint", "history", "best_epoch", "best_score", "stopped", "test"}"""
    cfg, last = training.resolve(globals(), overrides, "detector")
    plan = training.build_plan(cfg, ("--lr", "--backbone_lr"), criterion.SUMMED_WEIGHTS)
    resolution = training.resolution_of(cfg)
    if cfg.demo:
        ensure_dataset(cfg.DATASET_DIR)
    folder = training.begin(cfg, "STAGE 1: DETECTOR TRAINING", "detector", resolution)
    engine.seed_everything(cfg.SEED)
    start = new_detector(cfg, last, training.class_names(cfg), resolution)
    data = training.open_splits(cfg, start.class_rows, resolution)
    processes.say(freeze.describe({"RF-DETR": start.model}))
    result = training.train(
        cfg, plan, start, folder, data, training.training_loader(cfg, data["train"], cfg.SIZE, resolution),
        compute_losses, parameters=training.parameter_groups(
            start.model, cfg.LR, cfg.BACKBONE_LR, cfg.LAYER_DECAY, cfg.WEIGHT_DECAY),
        best_file="checkpoint_best_regular.pth", epoch_file="checkpoint.pt")
    result["checkpoint"] = str(folder / "checkpoint_best_regular.pth")
    if result["valid"]:
        processes.say(run_report.next_command(cfg, folder, start.class_names, start.model.model_args["num_rows"]))
    return result


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main(**config.from_command_line(globals()))
