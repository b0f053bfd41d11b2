"""Train SPDNet and the rain detector together, through a frozen RT-DETR: its loss decides what counts as rain.

A hard gate (rainy or not) has no gradient. With GATE = "soft" a training step shows the detector the mixture
p * de-rained + (1 - p) * image, so that the loss reaches the rain detector's probability p as well as SPDNet; at
inference the gate is hard. GATE = "hard" trains SPDNet alone, behind a fixed gate, for comparison.

    python Training_Conditional.py --demo
    python Training_Conditional.py

Start from the results of Training_RainDetector.py and Training_SPDNet_Adaptation.py. Writes OUTPUT_DIR/pipeline/ (the
best epoch, everything that detect.py and Eval_conditional.py need), last.pt, best.pt, metrics.json, curves.png, tb/.
"""

from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F

import Eval_conditional
from utils import checkpoint, conditional_model, config, datasets, freeze, integrated_model, losses, processes
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import drawn_by, fresh_rain
from utils.demo.coco import ensure_demo
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.coco import detection_scores, ground_truth
from utils.networks.rtdetr import id2label_of, require_queries, require_size
from utils.next_command import command
from utils.training import engine, model_card, run_state
from utils.training.plan import Plan
from utils.transfer import sent

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR: str | None = "./dataset/coco_rain"  # the same file names in rain; make_rain.py writes it
PERCENT_DATASET: float = 10             # seeded subset in percent
COCO_RATIO = 0.5                        # share of clean images: the gate has to see both
RAIN_RATIO = 0.5                        # share of rainy images
RAIN = "files"                          # files: COCO_RAIN_DIR's training images; fresh: drawn anew in every epoch (the
                                        # validation stays COCO_RAIN_DIR's; where that is "" it is drawn, once)
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
IMAGE_SIZE = 640                        # side of the square input, a multiple of 32
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- models -------------------------------------------------------------------------------------------------------
SPDNET_MODEL_PATH = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # start weights
RAIN_DETECTOR_PATH = "./rain_detector_pretrained/rain_detector_best.pt"  # start weights
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id or folder; stays frozen
DERAIN_SCALE = 1.0                      # as in the training of SPDNET_MODEL_PATH
ACTIVATION_CHECKPOINTING = True         # a step takes 2.6 GB per image; False: 14, for 1.4 times the speed
RAIN_THRESHOLD: float | None = 0.5      # of the hard gate, in validation and afterwards; None: the rain detector's own
GATE = "soft"                           # soft: the loss trains the gate as well; hard: the gate stays as it is

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 5                          # both parts are trained already
BATCH_SIZE = 2                          # per GPU; with a soft gate every image passes SPDNet; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 8         # effective batch 16
LEARNING_RATE = 5e-5                    # SPDNet's
RAIN_DETECTOR_LEARNING_RATE = 1e-5      # the gate's: it is good already
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
PRECISION = "float32"                   # "bf16" (GPUs from Ampere on): faster, half the memory; "auto": if it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EARLY_STOPPING_PATIENCE = 3             # epochs without a better score; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
SEED = 0                                # subset, order, augmentation

# --- loss weights (0 switches a term off) ---------------------------------------------------------------------------
DETECTION_WEIGHT = 1.0                  # RT-DETR's loss on what the gate lets it see
FEATURE_WEIGHT = 5.0                    # its features against those of the clean twin, relative squared error
GATE_WEIGHT = 0.1                       # cross-entropy of the gate's probability: keeps "rainy" meaning rainy
RAIN_SCORE_WEIGHT = 0.5                 # best epoch: this share of the rainy mAP, the rest of the clean mAP

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_conditional"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 50                   # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
EVAL_BATCH_SIZE = 4                     # validation batch

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "PERCENT_DATASET": 30, "IMAGE_SIZE": 160,
    "SPDNET_MODEL_PATH": "./assets/demo/spdnet_adapted.pt", "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt",
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "OUTPUT_DIR": "./demo/outputs_conditional", "DERAIN_SCALE": 0.5,
    "ACTIVATION_CHECKPOINTING": False, "NUM_EPOCHS": 2, "BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 1,
    "LEARNING_RATE": 1e-4, "WARMUP_STEPS": 20, "DATALOADER_WORKERS": 0, "EVAL_BATCH_SIZE": 8,
}


def build_model(cfg, device):
    """The conditional model: SPDNet and (with a soft gate) the rain detector train, RT-DETR is frozen."""
    model = conditional_model.load_conditional_model(
        cfg.RAIN_DETECTOR_PATH, cfg.RTDETR_MODEL_NAME, spdnet_path=cfg.SPDNET_MODEL_PATH, device=device,
        rain_threshold=cfg.RAIN_THRESHOLD, gate=cfg.GATE, derain_scale=cfg.DERAIN_SCALE)
    model.derain_module.activation_checkpointing = cfg.ACTIVATION_CHECKPOINTING
    if cfg.GATE == "hard":
        freeze.freeze(model.rain_detector)
    processes.say(freeze.describe({"SPDNet": model.derain_module, "rain detector": model.rain_detector,
                                   "RT-DETR": model.detection_module}))
    return model


def build_loaders(cfg, id2label):
    """-> training loader of the clean/rainy mix, {"clean" or "rainy": validation loader}."""
    rain = fresh_rain(cfg)
    train = datasets.clean_rainy_mixture(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.adaptation(cfg.IMAGE_SIZE), coco_ratio=cfg.COCO_RATIO,
        rain_ratio=cfg.RAIN_RATIO, percent=cfg.PERCENT_DATASET, seed=cfg.SEED, twins=bool(cfg.FEATURE_WEIGHT),
        unknown=cfg.UNKNOWN_CATEGORIES, fresh_rain=rain)
    datasets.say_notes(train)
    val = datasets.clean_rainy_validation(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.evaluation(cfg.IMAGE_SIZE),
                                          unknown=cfg.UNKNOWN_CATEGORIES, train=train, fresh_rain=rain)
    return (loaders.training_loader(train, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED),
            {domain: loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
             for domain, data in val.items()})


def build_plan(cfg):
    """-> Plan; UserError for settings that cannot be. A hard gate has neither a loss nor a learning rate."""
    rates, losses_of = ("LEARNING_RATE",), {"detection": "DETECTION_WEIGHT", "features": "FEATURE_WEIGHT"}
    if cfg.GATE == "soft":
        rates, losses_of = (*rates, "RAIN_DETECTOR_LEARNING_RATE"), losses_of | {"gate": "GATE_WEIGHT"}
    return Plan.of(cfg, learning_rates=rates, loss_weights=losses_of)


def compute_losses(model, batch, weights, clean_features):
    """Named losses of one batch, scalars: those in `weights`; "gate_right", the share of images that the gate tells
    right, is only reported.

    Args:
        model: ConditionalRainRobustRTDETR or its distributed wrapper; batch: see datasets.to_device, with "twins" where
            the feature term is on; clean_features: ConditionalRainRobustRTDETR.clean_features.
    """
    outputs = model(batch["images"], labels=batch["labels"] if "detection" in weights else None,
                    feature_level="backbone" if "features" in weights else None)
    logits = outputs.rain_stats["logits"]
    rainy = sent(torch.tensor([domain == "rainy" for domain in batch["domains"]]), logits.device)
    terms = {}
    if "detection" in weights:
        terms["detection"] = outputs.loss
    if "features" in weights:
        terms["features"] = losses.feature_consistency(outputs.features, clean_features(batch["twins"], "backbone"))
    if "gate" in weights:
        terms["gate"] = F.binary_cross_entropy_with_logits(logits, rainy.float())
    terms["gate_right"] = (outputs.rain_stats["mask"] == rainy).float().mean()
    return terms


def evaluate(model, val_loaders, truths, device, rain_weight):
    """-> {"score", "clean/mAP", "clean/derained" (share of images that the gate sent to SPDNet), "rainy/..."}, the gate
    hard."""
    found = {}
    for domain, loader in val_loaders.items():
        gated = []

        def predict(images, gated=gated):
            outputs = model(images)
            gated += [{"derained": outputs.rain_stats["num_rainy"] / len(images)}] * len(images)
            return outputs
        scores, _ = detection_scores(predict, loader, device, truths[domain], f"{domain} validation")
        found |= {f"{domain}/mAP": scores["mAP"], f"{domain}/derained": processes.mean_over_ranks(gated)["derained"]}
    return {"score": rain_weight * found["rainy/mAP"] + (1 - rain_weight) * found["clean/mAP"]} | found


def card_of(cfg, images, id2label):
    """-> model_card.Card; images: how many the pipeline learns from."""
    return model_card.Card(
        f"RT-DETR behind a rain gate, {len(id2label)} classes",
        f"A rain detector decides per image whether SPDNet takes the rain away before RT-DETR looks at it; gate and "
        f"de-rainer were trained together (gate: {cfg.GATE}), RT-DETR was frozen.",
        library="rainsight", base=cfg.RTDETR_MODEL_NAME, constants=cfg.as_dict(),
        load=model_card.loading(conditional_model.ConditionalRainRobustRTDETR, 'outputs.rain_stats["scores"], '),
        data=[f"{images} training images, {100 * cfg.COCO_RATIO:.0f}% clean and "
              f"{100 * cfg.RAIN_RATIO:.0f}% rainy", f"classes: {', '.join(id2label.values())}"])


def save_pipeline(model, folder, card):
    """Write the three networks, their settings and the card (model_card.Card)."""
    def write(fresh):
        model.save_pretrained(fresh)
        card.write(fresh)
    checkpoint.replace_folder(write, folder)


def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit."""
    cfg = config.resolve(globals(), overrides)
    require_size(cfg.IMAGE_SIZE)
    if not 0 <= cfg.RAIN_SCORE_WEIGHT <= 1:
        raise config.UserError(f"RAIN_SCORE_WEIGHT = {cfg.RAIN_SCORE_WEIGHT}: choose a share in [0, 1]")
    plan = build_plan(cfg)
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    last = run_state.require_free(cfg.OUTPUT_DIR, plan, "score")
    if cfg.GATE == "soft" and min(cfg.COCO_RATIO, cfg.RAIN_RATIO) == 0:
        processes.say(f"note: COCO_RATIO = {cfg.COCO_RATIO}, RAIN_RATIO = {cfg.RAIN_RATIO}: a soft gate that sees one "
                      "kind of image alone learns to say always the same")
    integrated_model.require_trained_scale(cfg.SPDNET_MODEL_PATH, cfg.DERAIN_SCALE)
    model = build_model(cfg, device)
    require_queries(model.detection_module, cfg.IMAGE_SIZE)
    train_loader, val_loaders = build_loaders(cfg, id2label_of(model.detection_module))
    truths = {domain: ground_truth(loader.dataset.annotations)
              for domain, loader in val_loaders.items()}
    groups = [{"params": list(model.derain_module.parameters()), "lr": cfg.LEARNING_RATE}]
    if cfg.GATE == "soft":
        groups.append({"params": list(model.rain_detector.parameters()), "lr": cfg.RAIN_DETECTOR_LEARNING_RATE})
    pipeline = Path(cfg.OUTPUT_DIR) / "pipeline"
    card = card_of(cfg, len(train_loader.dataset), id2label_of(model.detection_module))
    validate = card.remembering(partial(evaluate, val_loaders=val_loaders, truths=truths, device=device,
                                        rain_weight=cfg.RAIN_SCORE_WEIGHT))
    with torch.no_grad():
        start = validate(model.eval())
    processes.say("before: " + "  ".join(f"{name} {value:.4f}" for name, value in start.items()))
    result = engine.fit(
        model, train_loader,
        partial(compute_losses, weights=plan.loss_weights, clean_features=model.clean_features),
        plan, output_dir=cfg.OUTPUT_DIR, parameters=groups, evaluate=validate, score="score",
        on_best=partial(save_pipeline, folder=pipeline, card=card), constants=cfg.as_dict(), last=last,
        own_files=(pipeline.name,),
        fixed=("IMAGE_SIZE", "RAIN_SCORE_WEIGHT", "GATE", "RAIN_THRESHOLD", "DERAIN_SCALE",
               *drawn_by(val_loaders["rainy"].dataset)),
        validated_on={domain: coco_evaluation.identity(truth) for domain, truth in truths.items()},
        validated_images=loaders.image_paths(val_loaders.values()))
    if result["history"]:
        own = {"HARD_PIPELINE_DIR" if cfg.GATE == "hard" else "SOFT_PIPELINE_DIR": pipeline.as_posix()}
        processes.say(f"pipeline: {pipeline.as_posix()}\nnext: {command(Eval_conditional, cfg, **own)}")
    return result | {"before": start}


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
