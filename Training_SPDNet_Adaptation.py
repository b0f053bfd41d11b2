"""Train SPDNet through a frozen RT-DETR, so that de-rained images are good to detect on, not only good to look at.

Rainy image -> SPDNet (trains) -> RT-DETR (frozen) -> detection loss -> gradient back into SPDNet. Because every rainy
image has a clean twin, the detector's features of the de-rained image can also be pulled towards those of the twin
(FEATURE_WEIGHT), which needs no labels: with DETECTION_WEIGHT = 0 plain folders of images will do, see
docs/spdnet_adaptation.md. SPDNet: Yi et al., ICCV 2021; RT-DETR: Zhao et al., CVPR 2024.

    python Training_SPDNet_Adaptation.py --demo
    python Training_SPDNet_Adaptation.py

Writes OUTPUT_DIR/spdnet_adapted.pt (a plain SPDNet state dict, the best epoch by rainy validation mAP), last.pt (to
resume), best.pt, metrics.json, curves.png, tb/ and before_after.png: what the detector finds without and with the
adapted SPDNet. Afterwards: python Eval_SPDNet_Adaptation.py
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import utils.threads  # noqa: F401 (before torch)

import torch

import Eval_SPDNet_Adaptation
from utils import checkpoint, config, datasets, freeze, integrated_model, losses, processes, visualize
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import drawn_by, fresh_rain
from utils.demo.coco import ensure_demo
from utils.evaluation import before_after
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.agreement import agreement
from utils.evaluation.coco import detection_scores, ground_truth
from utils.networks import distillation
from utils.networks.rtdetr import id2label_of, require_feature_level, require_queries, require_size
from utils.next_command import command
from utils.training import engine, run_folder
from utils.training.plan import Plan

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR: str | None = "./dataset/coco_rain"  # the same file names in rain; make_rain.py writes it
PERCENT_DATASET: float = 10             # seeded subset in percent, equal on every machine: 10% of COCO is 11,800 images
COCO_RATIO = 0.0                        # share of clean images: the detector is frozen, SPDNet only needs rain
RAIN_RATIO = 1.0                        # share of rainy images
RAIN = "files"                          # files: COCO_RAIN_DIR's training images; fresh: drawn anew in every epoch;
                                        # auto: fresh if make_rain.py drew those; validation: COCO_RAIN_DIR, "": drawn
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
IMAGE_SIZE = 640                        # side of the square input, a multiple of 32
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- models -------------------------------------------------------------------------------------------------------
DERAINER = "spdnet"                     # what is adapted: spdnet, or unet, nafnet of DERAIN_MODEL_PATH
SPDNET_MODEL_PATH = "./model_spa.pt"    # start weights: the published ones, or Training_SPDNet.py's spdnet_best.pt
DERAIN_MODEL_PATH = "./outputs_unet/best.pt"  # start weights of DERAINER unet and nafnet, from train_unet_derain.py
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id, or a folder written by save_pretrained
DERAIN_SCALE = 1.0                      # 0.5: SPDNet sees half the size, a quarter of the cost; see docs/lab_notes.md
ACTIVATION_CHECKPOINTING = True         # a step takes 2.6 GB per image; False: 14, for 1.4 times the speed

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 10                         # the best one is usually among epochs 3 to 5
BATCH_SIZE = 2                          # per GPU; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 8         # effective batch 16
LEARNING_RATE = 1e-4                    # only SPDNet trains, so higher than for fine-tuning a detector
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; 500 if the loss explodes
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
FP16 = False                            # must stay False: SPDNet overflows in half precision
PRECISION = "float32"                   # "bf16" (GPUs from Ampere on): faster, half the memory; "auto": if it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EMA_DECAY = 0.999                       # moving average of the weights, which is evaluated and kept; 0: without
EARLY_STOPPING_PATIENCE = 5             # epochs without a better rainy validation mAP; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
SEED = 0                                # subset, order, augmentation

# --- loss weights (0 switches a term off; plain detection loss: 1, 0, 0, 0) ---------------------------------------
DETECTION_WEIGHT = 1.0                  # RT-DETR's loss on the de-rained image
FEATURE_WEIGHT = 5.0                    # its features against those of the clean twin, relative squared error
FEATURE_LEVEL = "backbone"              # which features: backbone, encoder or both
QUERIES_WEIGHT = 0.0                    # its answers to the queries of the clean twin, see docs/conditional.md
POSITIONS_WEIGHT = 0.0                  # its scores and boxes by which queries are chosen, against those there
RECONSTRUCTION_WEIGHT = 0.0             # L1 between de-rained image and clean twin
IDENTITY_WEIGHT = 0.0                   # L1 between de-rained clean twin and itself: clean images stay as they are

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_spdnet_adaptation"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 50                   # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
EVAL_BATCH_SIZE = 4                     # validation batch
BASELINES = True                        # score vanilla and original SPDNet first: two more validation passes
PICTURES = 4                            # scenes in before_after.png

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "PERCENT_DATASET": 70, "IMAGE_SIZE": 160,
    "SPDNET_MODEL_PATH": "./assets/demo/spdnet.pt", "DERAIN_MODEL_PATH": "./assets/demo/nafnet.pt",
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr",
    "OUTPUT_DIR": "./demo/outputs_spdnet_adaptation", "DERAIN_SCALE": 0.5,
    "ACTIVATION_CHECKPOINTING": False, "NUM_EPOCHS": 1, "BATCH_SIZE": 4,
    "GRADIENT_ACCUMULATION_STEPS": 1, "LEARNING_RATE": 4e-4, "WARMUP_STEPS": 20, "EMA_DECAY": 0.99,
    "DATALOADER_WORKERS": 0, "EVAL_BATCH_SIZE": 8,
}
_OUTPUTS, _PICTURE_FILE = ("derainer_adapted.pt", "spdnet_adapted.pt"), "before_after.png"  # in OUTPUT_DIR
_TEACHER_TERMS = {"queries": "QUERIES_WEIGHT", "positions": "POSITIONS_WEIGHT"}  # features: as FEATURE_WEIGHT says
_UNLABELLED = {"features": "FEATURE_WEIGHT"} | _TEACHER_TERMS  # what can be learnt from, and validated, without labels


def build_model(cfg, device):
    """De-rainer (trainable) in front of RT-DETR (frozen); prints the parameter counts."""
    constant, path = integrated_model.weights_of(cfg)
    model = integrated_model.load_integrated_model(
        path, cfg.RTDETR_MODEL_NAME, num_labels=None, device=device, freeze_detection=True,
        derain_scale=cfg.DERAIN_SCALE, derainer=cfg.DERAINER, constant=constant)
    processes.say(freeze.describe({integrated_model.DERAINERS[cfg.DERAINER]: model.derain_module,
                                   "RT-DETR": model.detection_module}))
    if cfg.DERAINER != "spdnet":
        return model
    model.derain_module.activation_checkpointing = cfg.ACTIVATION_CHECKPOINTING
    if note := integrated_model.pretraining_note(path, cfg.DERAIN_SCALE):
        processes.say(f"note: {note}")
    return model


class Data(NamedTuple):
    """What is trained and validated on."""

    train: torch.utils.data.Dataset  # with clean twins, where a loss needs them
    val: torch.utils.data.Dataset  # rainy images
    labelled: bool  # False: pairs of images without annotations


def build_data(cfg, id2label):
    """-> Data"""
    train_transform, val_transform = presets.adaptation(cfg.IMAGE_SIZE), presets.evaluation(cfg.IMAGE_SIZE)
    if datasets.is_unlabelled(cfg):
        if not any(getattr(cfg, constant) for constant in _UNLABELLED.values()):
            raise config.UserError(f"without annotations one of {', '.join(_UNLABELLED.values())} must be above 0: it "
                                   "is what is validated")
        processes.say("no annotations: adapting by the clean twins alone, 10% of the pairs kept for validation")
        train, val = datasets.unlabelled_pairs(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, train_transform, val_transform,
                                               percent=cfg.PERCENT_DATASET, seed=cfg.SEED, fresh_rain=fresh_rain(cfg))
        return Data(train, val, labelled=False)
    needs_twins = any(getattr(cfg, constant) for constant in (*_UNLABELLED.values(), "RECONSTRUCTION_WEIGHT",
                                                              "IDENTITY_WEIGHT"))
    rain = fresh_rain(cfg)
    train = datasets.clean_rainy_mixture(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, train_transform, coco_ratio=cfg.COCO_RATIO,
        rain_ratio=cfg.RAIN_RATIO, percent=cfg.PERCENT_DATASET, seed=cfg.SEED, twins=needs_twins,
        unknown=cfg.UNKNOWN_CATEGORIES, fresh_rain=rain)
    datasets.say_notes(train)
    val = datasets.clean_rainy_validation(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, val_transform, domains=("rainy",),
                                          unknown=cfg.UNKNOWN_CATEGORIES, train=train, fresh_rain=rain)
    return Data(train, val["rainy"], labelled=True)


def build_plan(cfg):
    """-> Plan; UserError for settings that cannot be."""
    return Plan.of(cfg, loss_weights={"detection": "DETECTION_WEIGHT"} | _UNLABELLED | {
        "reconstruction": "RECONSTRUCTION_WEIGHT", "identity": "IDENTITY_WEIGHT"})


def teacher_of(detector, weights):
    """-> distillation.Teacher of the frozen detector where one of its terms is wanted, else None."""
    return distillation.Teacher(detector) if weights.keys() & _TEACHER_TERMS.keys() else None


def compute_losses(model, batch, weights, clean_features, feature_level, teacher=None, over_ranks=True):
    """Named losses of one batch, scalars: those in `weights`, and "clamped", the share of values cut by the clamp.

    Args:
        model: RainRobustRTDETR or its distributed wrapper; batch: see datasets.to_device, with "twins" where needed.
        clean_features: RainRobustRTDETR.clean_features, which makes the targets of the feature term.
        teacher: see `teacher_of`; over_ranks: see distillation.compared.
    """
    outputs = model(batch["images"], labels=batch["labels"] if "detection" in weights else None,
                    clean=batch["twins"] if "identity" in weights else None,
                    feature_level=feature_level if "features" in weights else None,
                    answer=teacher(batch["twins"]) if teacher else None,
                    terms=[name for name in _TEACHER_TERMS if name in weights], over_ranks=over_ranks)
    terms = {"clamped": outputs.clamped} | (outputs.taught or {})
    if "detection" in weights:
        terms["detection"] = outputs.loss
    if "features" in weights:
        terms["features"] = losses.feature_consistency(outputs.features,
                                                       clean_features(batch["twins"], feature_level))
    if "reconstruction" in weights:
        terms["reconstruction"] = losses.pixel_l1(outputs.derained, batch["twins"])
    if "identity" in weights:
        terms["identity"] = losses.pixel_l1(outputs.derained_clean, batch["twins"])
    return terms


def evaluate(model, loader, device, truth, weights, cfg, teacher):
    """-> {"rain/mAP", "rain/AP50", ...} on the rainy validation images; without labels {"rain/consistency": minus the
    feature loss}, with a teacher what `agreement` says."""
    if truth is not None:
        scores, _ = detection_scores(model, loader, device, truth, name="rainy validation")
        return {f"rain/{name}": scores[name] for name in coco_evaluation.METRICS}
    if teacher:
        weights = {name: weight for name, weight in weights.items() if name in _UNLABELLED}
        return agreement(partial(compute_losses, model, weights=weights, clean_features=model.clean_features,
                                 feature_level=cfg.FEATURE_LEVEL, teacher=teacher, over_ranks=False),
                         loader, device, weights)

    def consistency(batch):
        batch = datasets.to_device(batch, device)
        terms = compute_losses(model, batch, weights, model.clean_features, cfg.FEATURE_LEVEL)
        return [{"rain/consistency": -terms["features"].item()}] * len(batch["images"])
    return processes.mean_over_ranks([one for several in loaders.each(consistency, loader) for one in several])


def sample_images(model, dataset, device, id2label):
    """-> {tag: picture}: rainy with vanilla detections | de-rained with the model's detections."""
    batch = datasets.to_device(datasets.collate([dataset[i] for i in range(min(3, len(dataset)))]), device)
    outputs = model(batch["images"])
    rows = [visualize.draw_detections(batch["images"], model.detection_module(pixel_values=batch["images"]), id2label),
            visualize.draw_detections(outputs.derained, outputs, id2label)]
    return {"rainy above, de-rained below": visualize.as_tensor(visualize.grid(rows, [""] * len(rows[0])))}


def output_file(cfg):
    """-> Path of the adapted weights: SPDNet's as a plain state dict, others as train_unet_derain.py writes them."""
    return Path(cfg.OUTPUT_DIR) / _OUTPUTS[cfg.DERAINER == "spdnet"]


def save_derainer(model, path):
    """Write the adapted de-rainer."""
    integrated_model.write_derainer(model.derain_module, path)


def baselines_before_training(model, loader, device, truth, cfg):
    """-> {model: COCO scores} of vanilla and original de-rainer, printed, as what an epoch's score is to be read by.

    That the run's folder can be written is found before these passes, not after them.
    """
    if processes.is_main():
        checkpoint.require_writable(cfg.OUTPUT_DIR)
    original, _ = before_after.labels(integrated_model.DERAINERS[cfg.DERAINER])
    scores = before_after.baseline_scores(model, loader, device, truth, original)
    found = ", ".join(f"{name} {values['mAP']:.4f}" for name, values in scores.items())
    processes.say(f"before training, rain/mAP: {found}")
    return scores


def show_result(model, dataset, baselines, best_epoch, device, cfg):
    """The table of all models, where there are baselines, and before_after.png with the best epoch's de-rainer."""
    folder = Path(cfg.OUTPUT_DIR)
    if baselines:
        _, adapted = before_after.labels(integrated_model.DERAINERS[cfg.DERAINER])
        scores = {name: best_epoch[f"rain/{name}"] for name in coco_evaluation.METRICS}
        processes.say("\n" + before_after.table(baselines | {adapted: scores}))
    if processes.is_main() and cfg.PICTURES > 0:
        derainer = integrated_model.read_derainer(cfg.DERAINER, output_file(cfg), "OUTPUT_DIR").to(device)
        best = integrated_model.RainRobustRTDETR(freeze.freeze(derainer), model.detection_module,
                                                 derain_scale=cfg.DERAIN_SCALE)
        before_after.draw(model.detection_module, best.eval(), dataset, before_after.scenes(dataset, cfg.PICTURES),
                          device, id2label_of(model.detection_module), folder / _PICTURE_FILE)
        processes.say(f"picture: {(folder / _PICTURE_FILE).as_posix()} (scenes {before_after.SCENES_RULE})")


def train_and_show(cfg, plan, model, data, device):
    """The run in its folder: baselines, training, table and picture. -> the result of engine.fit"""
    train, val, labelled = data
    train_loader = loaders.training_loader(train, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED)
    val_loader = loaders.validation_loader(val, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
    truth = ground_truth(val.annotations) if labelled else None
    output, baselines, teacher = output_file(cfg), {}, teacher_of(model.detection_module, plan.loss_weights)
    without = {"score": "rain/agreement" if teacher else "rain/consistency",
               "fixed": ("FEATURE_LEVEL", *(_UNLABELLED.values() if teacher else ()))}  # what is scored without labels
    if labelled and cfg.BASELINES:
        baselines = baselines_before_training(model, val_loader, device, truth, cfg)

    result = engine.fit(
        model, train_loader,
        partial(compute_losses, weights=plan.loss_weights, clean_features=model.clean_features,
                feature_level=cfg.FEATURE_LEVEL, teacher=teacher),
        plan, output_dir=cfg.OUTPUT_DIR,
        parameters=[{"params": [p for p in model.derain_module.parameters() if p.requires_grad],
                     "lr": cfg.LEARNING_RATE}],
        evaluate=partial(evaluate, loader=val_loader, device=device, truth=truth, weights=plan.loss_weights, cfg=cfg,
                         teacher=teacher),
        score="rain/mAP" if labelled else without["score"],
        on_best=partial(save_derainer, path=output),
        sample_images=partial(sample_images, dataset=val, device=device,
                              id2label=id2label_of(model.detection_module)),
        constants=cfg.as_dict(), own_files=(*_OUTPUTS, _PICTURE_FILE),
        fixed=("IMAGE_SIZE", "DERAIN_SCALE", "DERAINER",
               *(() if labelled else without["fixed"]),
               *drawn_by(val)),
        validated_on=coco_evaluation.identity(truth) if labelled else None, validated_images=val.image_paths())
    if result["history"]:
        if labelled:
            show_result(model, val, baselines, result["history"][result["best_epoch"] - 1], device, cfg)
        processes.say(f"adapted {integrated_model.DERAINERS[cfg.DERAINER]}: {output.as_posix()}\n"
                      "next: " + command(Eval_SPDNet_Adaptation, cfg, labelled=labelled,
                                         ADAPTED_MODEL_PATH=output.as_posix()))
    return result


def check(cfg):
    """UserError for constants that cannot be; Plan checks the others."""
    require_size(cfg.IMAGE_SIZE)
    if cfg.FP16:
        raise config.UserError("FP16 = True: SPDNet sees values up to 255 and multiplies features with features, which "
                               "overflows float16 (65504) and ends in NaN. Use PRECISION = 'bf16', which has the "
                               "range of float32, or ACTIVATION_CHECKPOINTING = True to save memory.")
    require_feature_level(cfg.FEATURE_LEVEL)
    integrated_model.require_derainer(cfg.DERAINER)
    integrated_model.require_scale(cfg.DERAIN_SCALE)


def main(**overrides):
    """Adapt; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    plan = build_plan(cfg)
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    model = build_model(cfg, device)
    require_queries(model.detection_module, cfg.IMAGE_SIZE)
    data = build_data(cfg, id2label_of(model.detection_module))
    with run_folder.claimed(cfg.OUTPUT_DIR):
        return train_and_show(cfg, plan, model, data, device)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
