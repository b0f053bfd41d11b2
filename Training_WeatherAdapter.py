"""Teach a frozen detector one weather with a megabyte beside it: low-rank adapters and a few thin layers.

The detector's own weights stay as they are, bit for bit; what trains is a low-rank change of its layers (Hu et al.,
"LoRA", ICLR 2022). Behind the rain detector the adapter is folded into a second set of weights: rainy images cost what
clean ones cost, clean images never meet it. One detector can have several: rain, mist, windshield drops.

    python Training_WeatherAdapter.py --demo
    python Training_WeatherAdapter.py --ADAPTER_NAME mist --RAIN_KINDS "{'mist': 1.0}"

Writes OUTPUT_DIR/<ADAPTER_NAME>.safetensors (best epoch) and its model card (.md), which stay when another weather is
trained there, last.pt, best.pt, metrics.json, curves.png and tb/. Needs peft (requirements-diffusion.txt); what uses
the file does not.
"""

from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

import detect
import Eval_conditional
import Training_RTDETR
from utils import config, datasets, freeze, processes, report
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import drawn_by, fresh_rain
from utils.demo.coco import ensure_demo
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.coco import detection_scores, ground_truth
from utils.networks import adapter, distillation
from utils.networks.rtdetr import id2label_of, load_rtdetr, require_queries, require_size, rtdetr_of
from utils.next_command import command
from utils.training import engine, model_card
from utils.training.plan import Plan, whole

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR: str | None = "./dataset/coco_rain"  # to validate on ("": drawn, once), and to train on with "files"
PERCENT_DATASET: float = 100            # seeded subset of the training images, in percent
RAIN = "fresh"                          # fresh: drawn on COCO_DIR's images anew in every epoch; files: COCO_RAIN_DIR's
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
IMAGE_SIZE = 640                        # side of the square input, a multiple of 32
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- model --------------------------------------------------------------------------------------------------------
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id or folder; stays frozen
START_NAME: str | None = ""             # adapter or specialist to come as close to as the rank allows; "": a new one
ADAPTER_NAME = "rain"                   # the weather: OUTPUT_DIR/rain.safetensors
LORA_RANK = 4                           # of the changes: 1.6 MB for an R18, 0.9 with 2
LORA_ALPHA = 4                          # the changes count alpha / rank
LORA_TARGETS = ("attention", "feed_forward", "convolutions")  # which layers are changed
THIN_LAYERS = True                      # also the normalisations' scales and shifts and the first convolution, in full
TEACHER_NAME: str | None = ""           # frozen detector that sees each image's clean twin; "": RTDETR_MODEL_NAME
TEACHER_CACHE_GB = 0.0                  # memory for the teacher's answers, where images are few; 0: asked every time

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 12                         # passes over the training images
BATCH_SIZE = 16                         # per GPU; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 1         # batches per optimizer step
LEARNING_RATE = 1e-3                    # of low-rank changes: ten times that of fine-tuning
CLIP_NORM = 0.1                         # limit of the gradient's norm, RT-DETR's own; 0: none
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
EMA_DECAY = 0.999                       # moving average of the weights, which is evaluated and kept; 0: without
PRECISION = "float32"                   # bf16: faster on GPUs from Ampere on; auto: where it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EARLY_STOPPING_PATIENCE = 10            # epochs without a better validation score; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
SEED = 0                                # subset, order, weather, initial changes

# --- loss weights (0 switches a term off; a teacher's terms need no labels) ------------------------------------------
DETECTION_WEIGHT = 1.0                  # RT-DETR's own loss, with the labels; 0 learns from the teacher alone
QUERIES_WEIGHT = 0.0                    # classes and boxes of the teacher's queries, see utils/networks/distillation.py
POSITIONS_WEIGHT = 0.0                  # scores and boxes by which queries are chosen
FEATURES_WEIGHT = 0.0                   # features where the teacher sees objects

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_adapter"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
EVAL_BATCH_SIZE = 16                    # validation batch

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "OUTPUT_DIR": "./demo/outputs_adapter",
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "IMAGE_SIZE": 160, "NUM_EPOCHS": 4, "BATCH_SIZE": 8, "LORA_RANK": 16,
    "LORA_ALPHA": 16, "LEARNING_RATE": 2e-3, "CLIP_NORM": 1.0, "WARMUP_STEPS": 20, "EMA_DECAY": 0.99,
    "DATALOADER_WORKERS": 0, "TEACHER_CACHE_GB": 2.0,
}


_LOAD = """
# in a checkout of RainSight; the adapter fits only the detector that it was trained for
import torch
from utils import datasets
from utils.boxes import decode
from utils.images import to_floats
from utils.networks import adapter
from utils.networks.rtdetr import load_rtdetr

detector, file, side = "path/or/hub-id of the detector", "path/of/the/adapter.safetensors", 640  # side: IMAGE_SIZE
model = adapter.fold(load_rtdetr(detector), file, "file")
image = datasets.read_image("street.jpg")
pixels = torch.nn.functional.interpolate(to_floats(image)[None], (side, side), mode="bilinear", antialias=True)
with torch.no_grad():
    outputs = model(pixel_values=pixels)
print(decode(outputs.logits, outputs.pred_boxes, [tuple(image.shape[-2:])])[0])
"""


def check(cfg):
    """UserError for constants that cannot be; Plan checks the others."""
    require_size(cfg.IMAGE_SIZE)
    for name in ("LORA_RANK", "LORA_ALPHA"):
        whole(1)(name, getattr(cfg, name))
    if not cfg.LORA_TARGETS or not set(cfg.LORA_TARGETS) <= set(adapter.TARGETS):
        raise config.UserError(f"LORA_TARGETS = {cfg.LORA_TARGETS!r}: choose some of {', '.join(adapter.TARGETS)}")
    if Path(cfg.ADAPTER_NAME).name != cfg.ADAPTER_NAME or cfg.ADAPTER_NAME in ("", ".", ".."):
        raise config.UserError(f"ADAPTER_NAME = '{cfg.ADAPTER_NAME}': choose a file's name without a folder, such as "
                               "rain")
    if adapter.is_adapter(cfg.ADAPTER_NAME):
        raise config.UserError(f"ADAPTER_NAME = '{cfg.ADAPTER_NAME}': leave {adapter.SUFFIX} out, the file gets it")
    if adapter.is_adapter(cfg.TEACHER_NAME):
        raise config.UserError(f"TEACHER_NAME = '{cfg.TEACHER_NAME}' is an adapter, and a teacher is a detector: "
                               "START_NAME takes adapters")


def build_data(cfg, id2label, twins):
    """-> training images in the weather (with their clean twins), validation images of COCO_RAIN_DIR or in drawn
    weather; both are pairs without labels where there are no annotations."""
    if datasets.is_unlabelled(cfg):
        return Training_RTDETR.unlabelled_data(cfg, presets.adaptation(cfg.IMAGE_SIZE))
    rain = fresh_rain(cfg)
    train = datasets.clean_rainy_mixture(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.adaptation(cfg.IMAGE_SIZE), coco_ratio=0.0, rain_ratio=1.0,
        percent=cfg.PERCENT_DATASET, seed=cfg.SEED, twins=twins, unknown=cfg.UNKNOWN_CATEGORIES,
        fresh_rain=rain, labelled=cfg.DETECTION_WEIGHT > 0)
    datasets.say_notes(train)
    val = datasets.clean_rainy_validation(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.evaluation(cfg.IMAGE_SIZE), domains=("rainy",),
        unknown=cfg.UNKNOWN_CATEGORIES, train=train, fresh_rain=rain)
    return train, val["rainy"]


def evaluate(model, loader, device, truth):
    """-> {"rain/mAP", "rain/AP50", ...} on the validation images in the weather."""
    model = rtdetr_of(model)
    scores = detection_scores(lambda images: model(pixel_values=images), loader, device, truth, "rainy validation")[0]
    return {f"rain/{name}": scores[name] for name in coco_evaluation.METRICS}


def card_of(cfg, images, id2label):
    """-> model_card.Card; images: how many the adapter learns from."""
    return model_card.Card(
        f"Weather adapter '{cfg.ADAPTER_NAME}' for RT-DETR",
        f"Low-rank changes (rank {cfg.LORA_RANK}) of an RT-DETR's weights for bad weather.", library="rainsight",
        base=cfg.RTDETR_MODEL_NAME, constants=cfg.as_dict(), load=_LOAD,
        data=[f"{images} training images, in the weather",
              f"classes: {', '.join(id2label.values())}"])


def save_adapter(model, path, card, **settings):
    """Write the adapter (settings: of adapter.write) and, beside it, its card (model_card.Card)."""
    adapter.write(model, path, **settings)
    card.write(path.with_suffix(".md"))


def build_adapter(cfg, base):
    """-> a copy of the frozen detector `base` in which only the adapter trains, see adapter.inject."""
    model = adapter.inject(base, cfg.LORA_RANK, cfg.LORA_ALPHA, cfg.LORA_TARGETS, cfg.THIN_LAYERS)
    if cfg.START_NAME and not (cfg.RESUME and (Path(cfg.OUTPUT_DIR) / "last.pt").is_file()):  # which holds the weights
        target = (adapter.fold(base, cfg.START_NAME, "START_NAME") if adapter.is_adapter(cfg.START_NAME) else
                  load_rtdetr(cfg.START_NAME, device=processes.device(), constant="START_NAME"))
        share = adapter.approximate(model, target, "START_NAME")
        processes.say(f"starts as close to {cfg.START_NAME} as rank {cfg.LORA_RANK} allows: {share:.1%} of what it "
                      "changed in these layers")
    return model


def build_teacher(cfg, base):
    """-> distillation.Teacher where one of its terms is wanted, else None; base: the frozen detector, which is the
    teacher where no other is named."""
    if cfg.TEACHER_NAME or not Training_RTDETR.is_taught(cfg):
        return Training_RTDETR.build_teacher(cfg, base)
    return distillation.Teacher(base, cfg.TEACHER_CACHE_GB)


def scoring(cfg, plan, val_loader, device, teacher):
    """How the adapter is scored: {"evaluate": model -> metrics, "fixed", "validated_on" of engine.fit}, its first
    metric being the score."""
    if datasets.is_unlabelled(cfg):
        return {"evaluate": partial(Training_RTDETR.agreement_without_labels, loader=val_loader, device=device,
                                    teacher=teacher, weights=plan.loss_weights),
                "fixed": (*Training_RTDETR.scored_without_labels(val_loader.dataset), "teacher"), "validated_on": None}
    truth = ground_truth(val_loader.dataset.annotations)
    return {"evaluate": partial(evaluate, loader=val_loader, device=device, truth=truth),
            "fixed": drawn_by(val_loader.dataset), "validated_on": coco_evaluation.identity(truth)}


def say_result(cfg, base, best, path):
    """The table of the detector without and with the best epoch's adapter, and what to do next."""
    rows = [{"model": name} | {metric.removeprefix("rain/"): values[metric] for metric in base}
            for name, values in (("RT-DETR", base), (f"with {path.name}", best))]
    processes.say(report.table(rows, {"model": "in the weather"} | {name: name for name in list(rows[0])[1:]}))
    alone, shown = {"ORIGINAL_SPDNET_PATH": "", "SPDNET_MODEL_PATH": ""}, {"SOURCE": "./photos"}
    if cfg.demo:  # it has those SPDNets; an adapter de-rains no image that could be shown
        alone, shown = {}, {"SHOW_DERAINED": False}
    file, labelled = path.as_posix(), not datasets.is_unlabelled(cfg)
    processes.say(f"adapter: {file}, {path.stat().st_size / 1e6:.2f} MB\n"
                  f"next: {command(Eval_conditional, cfg, labelled=labelled, ADAPTER_PATH=file, **alone)}\n"
                  f"      {command(detect, cfg, RAINY_BRANCH=file, **shown)}")


def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    plan, taught = Plan.of(cfg, loss_weights=Training_RTDETR.loss_constants()), Training_RTDETR.is_taught(cfg)
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    base = freeze.freeze(load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device))
    require_queries(base, cfg.IMAGE_SIZE)
    digest = freeze.fingerprint(base)
    model = build_adapter(cfg, base)
    processes.say(freeze.describe({"RT-DETR with its adapter": model}))
    train, val = build_data(cfg, id2label_of(base), twins=taught)
    teacher = build_teacher(cfg, base)
    val_loader = Training_RTDETR.validation_loader(val, cfg)
    scored, path = (scoring(cfg, plan, val_loader, device, teacher),
                    Path(cfg.OUTPUT_DIR) / f"{cfg.ADAPTER_NAME}{adapter.SUFFIX}")
    before, card = (scored["evaluate"](distillation.Student(base) if taught else base),
                    card_of(cfg, len(train), id2label_of(base)))
    score = next(iter(before))
    processes.say(f"without an adapter: {score} {before[score]:.4f}")
    constants = cfg.as_dict() | {"base": digest, "taught": taught}
    if "teacher" in scored["fixed"]:
        constants["teacher"] = freeze.fingerprint(teacher)  # it decides on the score
    result = engine.fit(
        distillation.Student(model) if taught else model,
        loaders.training_loader(train, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED,
                                Training_RTDETR.collate_of(cfg)),
        partial(Training_RTDETR.compute_losses, teacher=teacher, weights=tuple(plan.loss_weights)), plan,
        output_dir=cfg.OUTPUT_DIR,
        parameters=[{"params": [p for p in model.parameters() if p.requires_grad], "lr": cfg.LEARNING_RATE}],
        evaluate=card.remembering(scored["evaluate"]), score=score,
        on_best=partial(save_adapter, path=path, card=card, base=digest, rank=cfg.LORA_RANK, alpha=cfg.LORA_ALPHA,
                        weather=cfg.ADAPTER_NAME, image_size=cfg.IMAGE_SIZE),
        sample_images=partial(Training_RTDETR.sample_images, loader=val_loader, id2label=id2label_of(base)),
        constants=constants, lasting_files=(path.name, path.with_suffix(".md").name),
        fixed=("IMAGE_SIZE", "LORA_RANK", "LORA_ALPHA", "LORA_TARGETS", "THIN_LAYERS", "ADAPTER_NAME", "base",
               "taught", *scored["fixed"]),
        validated_on=scored["validated_on"], validated_images=val.image_paths())
    if freeze.fingerprint(base) != digest:
        raise RuntimeError("the detector has changed, which nothing here may do")
    if result["history"] and processes.is_main():
        say_result(cfg, before, result["history"][result["best_epoch"] - 1], path)
    return result


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
