"""Train an RT-DETR, RT-DETRv2 or D-FINE on your own data, from published weights; an RT-DETR also from scratch.

The other experiments need a detector that knows the classes of your data: this makes one (and the one of the demo).
RT-DETR: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024.

    python Training_RTDETR.py --demo
    python Training_RTDETR.py --COCO_DIR ./dataset/coco --NUM_EPOCHS 12

Writes OUTPUT_DIR/detector/ (best epoch, Hugging Face layout, with a model card: set RTDETR_MODEL_NAME to it), last.pt,
best.pt, metrics.json, curves.png and tb/.
"""

from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from transformers import RTDetrImageProcessor

from utils import checkpoint, config, datasets, freeze, processes, report, visualize
from utils.datasets import loaders, presets
from utils.datasets.annotations import label_table, read_annotations
from utils.datasets.fresh_rain import drawn_by, fresh_rain
from utils.datasets.layouts import find_split
from utils.datasets.mosaic import with_mosaics
from utils.demo.coco import ensure_demo
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.agreement import agreement
from utils.evaluation.coco import detection_scores, ground_truth
from utils.networks import distillation
from utils.networks.rtdetr import (
    freeze_first_stages,
    id2label_of,
    load_rtdetr,
    name_of,
    new_rtdetr,
    require_queries,
    require_size,
    rtdetr_of,
)
from utils.training import engine, model_card
from utils.training.plan import Plan

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR: str | None = "./dataset/coco_rain"  # rainy twins, read where RAIN_RATIO > 0; "": see docs/conditional.md
COCO_RATIO = 1.0                        # share of clean training images
RAIN_RATIO = 0.0                        # share of rainy training images; 0.5 makes a detector that knows rain
RAIN = "auto"                           # files: COCO_RAIN_DIR's training images; fresh: drawn anew in every epoch;
                                        # auto: fresh if make_rain.py drew those; validation: COCO_RAIN_DIR, "": drawn
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
PERCENT_DATASET: float = 100            # seeded subset of the training images, in percent
IMAGE_SIZE = 640                        # side of the square input, a multiple of 32
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that only the validation files have
AUGMENTATION = "full"                   # full: colour, zoom out, IoU crop, mirror; mirror: only that (plenty of data)
MOSAIC_RATIO = 0.0                      # share of training images that are four in one; for new heads and few images
CLOSE_MOSAIC = 3                        # last epochs without: whole images, as at inference

# --- model --------------------------------------------------------------------------------------------------------
RTDETR_MODEL_NAME: str | None = "PekingU/rtdetr_r18vd"  # hub id or folder to start from; "" starts from scratch
ARCHITECTURE = "r18"                    # r18, r34, r50 or tiny; only used from scratch
TEACHER_NAME: str | None = ""           # frozen detector that sees each rainy image's clean twin; "": RTDETR_MODEL_NAME
TEACHER_CACHE_GB = 0.0                  # memory for the teacher's answers, where images are few; 0: asked every time

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 12                         # enough for fine-tuning; from scratch 72 and more
BATCH_SIZE = 16                         # per GPU; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 1         # batches per optimizer step
LEARNING_RATE = 1e-4                    # encoder, decoder and heads
BACKBONE_LEARNING_RATE = 1e-5           # a pretrained backbone moves slowly, 0 freezes it; from scratch LEARNING_RATE
FREEZE_AT = 0                           # 1 freezes the backbone's stem, 2 its first stage as well, ...: faster
WEIGHT_DECAY = 1e-4                     # not on biases and normalisation layers
CLIP_NORM = 0.1                         # limit of the gradient's norm, RT-DETR's own; 0: none
WARMUP_STEPS = 500                      # optimizer steps of linear warm-up
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
EMA_DECAY = 0.999                       # moving average of the weights, which is evaluated and kept; 0: without
PRECISION = "float32"                   # bf16: faster on GPUs from Ampere on; auto: where it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EARLY_STOPPING_PATIENCE = 10            # epochs without a better validation score; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
SEED = 0                                # subset, order, augmentation, initial weights

# --- loss weights (0 switches a term off; a teacher's terms need no labels) ------------------------------------------
DETECTION_WEIGHT = 1.0                  # RT-DETR's own loss, with the labels; 0 learns from the teacher alone
QUERIES_WEIGHT = 0.0                    # classes and boxes of the teacher's queries, see utils/networks/distillation.py
POSITIONS_WEIGHT = 0.0                  # scores and boxes by which queries are chosen
FEATURES_WEIGHT = 0.0                   # features where the teacher sees objects

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_rtdetr"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
EVAL_BATCH_SIZE = 16                    # validation batch

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "OUTPUT_DIR": "./demo/outputs_rtdetr",
    "RTDETR_MODEL_NAME": "", "ARCHITECTURE": "tiny", "IMAGE_SIZE": 160, "AUGMENTATION": "mirror", "NUM_EPOCHS": 5,
    "LEARNING_RATE": 1e-3, "BACKBONE_LEARNING_RATE": 1e-3, "WARMUP_STEPS": 50, "EMA_DECAY": 0.99,
    "DATALOADER_WORKERS": 0, "TEACHER_CACHE_GB": 2.0,
}
_TEACHER_TERMS = {"queries": "QUERIES_WEIGHT", "positions": "POSITIONS_WEIGHT", "features": "FEATURES_WEIGHT"}
_LOAD = """
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection, RTDetrImageProcessor

name = "path/of/this/folder"  # or its hub id
model = AutoModelForObjectDetection.from_pretrained(name).eval()
processor = RTDetrImageProcessor.from_pretrained(name)  # sizes the image; its values stay in [0, 1]
image = Image.open("street.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[image.size[::-1]])[0]
for label, score, box in zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist()):
    print(model.config.id2label[label], score, box)
"""


def loss_constants():
    """-> {loss: name of the constant with its weight}, of whatever trains with `compute_losses`."""
    return {"detection": "DETECTION_WEIGHT"} | _TEACHER_TERMS


def is_taught(cfg):
    """-> whether a term of distillation.TERMS has a weight."""
    return any(getattr(cfg, constant) for constant in _TEACHER_TERMS.values())


def unlabelled_data(cfg, train_transform):
    """-> rainy images with their clean twins to train on, a tenth of them to validate on, see `unlabelled_pairs`."""
    processes.say("no annotations: learning from the teacher alone, 10% of the pairs kept for validation")
    return datasets.unlabelled_pairs(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, train_transform, presets.evaluation(cfg.IMAGE_SIZE),
        percent=cfg.PERCENT_DATASET, seed=cfg.SEED, fresh_rain=fresh_rain(cfg))


def scored_without_labels(val):
    """-> names of the constants that decide what `agreement_without_labels` means on such validation data."""
    return (*_TEACHER_TERMS.values(), *drawn_by(val))


def collate_of(cfg):
    """-> what makes training batches: with digests of the clean twins only where the teacher's answers are kept."""
    return datasets.collate_with_digests if is_taught(cfg) and cfg.TEACHER_CACHE_GB else datasets.collate


def build_model(cfg):
    """The detector to train: loaded (with new class heads where it does not know the data's classes), or new."""
    if datasets.is_unlabelled(cfg):
        if not cfg.RTDETR_MODEL_NAME:
            raise config.UserError("RTDETR_MODEL_NAME is empty, and without annotations nothing says which classes a "
                                   "new detector should know: give a detector")
        return load_rtdetr(cfg.RTDETR_MODEL_NAME)
    train = find_split(cfg.COCO_DIR, "train", "COCO_DIR")
    categories = read_annotations(train, masks=False)["categories"]
    names = [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
    if not names:
        raise config.UserError(f"COCO_DIR = '{cfg.COCO_DIR}': the training annotations list no categories")
    if not cfg.RTDETR_MODEL_NAME:
        if cfg.BACKBONE_LEARNING_RATE < cfg.LEARNING_RATE:
            processes.say(f"note: BACKBONE_LEARNING_RATE = {cfg.BACKBONE_LEARNING_RATE} is for a pretrained backbone; "
                          f"this one is new, LEARNING_RATE = {cfg.LEARNING_RATE} suits it better")
        if cfg.FREEZE_AT > 0:
            raise config.UserError(f"FREEZE_AT = {cfg.FREEZE_AT}: RTDETR_MODEL_NAME is empty, so the backbone is new "
                                   "and what is frozen would stay random: set FREEZE_AT to 0, or give a detector")
        return new_rtdetr(cfg.ARCHITECTURE, dict(enumerate(names)))
    model = load_rtdetr(cfg.RTDETR_MODEL_NAME)
    known = label_table(categories, id2label_of(model), "", unknown=None)
    if len(known) < len(categories):
        processes.say(f"{cfg.RTDETR_MODEL_NAME} does not know all classes of the data: new class heads for "
                      f"{', '.join(names)}")
        model = load_rtdetr(cfg.RTDETR_MODEL_NAME, new_classes=dict(enumerate(names)))
    return model


def build_loaders(cfg, id2label):
    """-> training loader (augmented), {"clean" or "rainy": validation loader} of the domains that are trained on; the
    latter is {"rainy"} alone, of images with twins and without labels, where there are no annotations."""
    augmentations = {"full": presets.detection, "mirror": presets.adaptation}
    if cfg.AUGMENTATION not in augmentations:
        raise config.UserError(f"AUGMENTATION = {cfg.AUGMENTATION!r}: choose {' or '.join(augmentations)}")
    augmentation = augmentations[cfg.AUGMENTATION](cfg.IMAGE_SIZE)
    ratios = {"clean": cfg.COCO_RATIO, "rainy": cfg.RAIN_RATIO}
    if datasets.is_unlabelled(cfg):
        if ratios != {"clean": 0, "rainy": 1}:
            raise config.UserError(f"COCO_RATIO = {cfg.COCO_RATIO}: without annotations all training images are the "
                                   "rainy ones of pairs: set COCO_RATIO = 0 and RAIN_RATIO = 1")
        train, pairs = unlabelled_data(cfg, presets.without_objects(augmentation))
        val = {"rainy": pairs}
    else:
        rain = fresh_rain(cfg)
        train = datasets.clean_rainy_mixture(
            cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, augmentation, coco_ratio=cfg.COCO_RATIO,
            rain_ratio=cfg.RAIN_RATIO, percent=cfg.PERCENT_DATASET, seed=cfg.SEED, twins=is_taught(cfg),
            unknown=cfg.UNKNOWN_CATEGORIES, fresh_rain=rain, labelled=cfg.DETECTION_WEIGHT > 0)
        datasets.say_notes(train)
        val = datasets.clean_rainy_validation(
            cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.evaluation(cfg.IMAGE_SIZE),
            unknown=cfg.UNKNOWN_CATEGORIES, domains=[domain for domain, ratio in ratios.items() if ratio > 0],
            train=train, fresh_rain=rain)
    mixed, collate = with_mosaics(train, cfg), collate_of(cfg)
    if collate is not datasets.collate and (cfg.MOSAIC_RATIO or cfg.AUGMENTATION == "full"):
        # answers would fill the memory, and the teacher would be asked image by image for nothing
        beside = "MOSAIC_RATIO" if cfg.MOSAIC_RATIO else "AUGMENTATION = 'full'"
        processes.say(f"note: TEACHER_CACHE_GB has no effect beside {beside}: hardly an image comes a second time")
        collate = datasets.collate
    return (loaders.training_loader(mixed, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED, collate),
            {domain: validation_loader(data, cfg) for domain, data in val.items()})


def validation_loader(val, cfg):
    """-> loader of a validation set; pairs without labels come as the teacher wants them."""
    return loaders.validation_loader(val, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS,
                                     collate_of(cfg) if datasets.is_unlabelled(cfg) else datasets.collate)


def parameter_groups(model, cfg):
    """Backbone and the rest at their own rates; biases and normalisation layers without weight decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("model.backbone"), parameter.ndim > 1), []).append(parameter)
    return [{"params": parameters, "lr": cfg.BACKBONE_LEARNING_RATE if in_backbone else cfg.LEARNING_RATE,
             "weight_decay": cfg.WEIGHT_DECAY if is_matrix else 0.0}
            for (in_backbone, is_matrix), parameters in sorted(groups.items())]


def build_teacher(cfg, model):
    """-> distillation.Teacher where one of its terms is wanted, else None."""
    if not is_taught(cfg):
        if cfg.TEACHER_NAME:
            processes.say(f"note: TEACHER_NAME has no effect while {', '.join(_TEACHER_TERMS.values())} are 0")
        return None
    if not (cfg.TEACHER_NAME or cfg.RTDETR_MODEL_NAME):
        raise config.UserError("TEACHER_NAME is empty, and a detector from scratch has nobody to learn from: give a "
                               f"detector, or set {', '.join(_TEACHER_TERMS.values())} to 0")
    constant = "TEACHER_NAME" if cfg.TEACHER_NAME else "RTDETR_MODEL_NAME"
    teacher = load_rtdetr(getattr(cfg, constant), device=processes.device(), constant=constant)
    distillation.require_same_form(teacher, model, constant)
    return distillation.Teacher(teacher, cfg.TEACHER_CACHE_GB)


def compute_losses(model, batch, teacher=None, weights=("detection",), over_ranks=True):
    """Named losses of one batch, scalars: {"detection": RT-DETR's whole loss, with denoising queries; "vfl", "bbox",
    "giou": its last layer's terms}, and with a teacher those of distillation.TERMS.

    Args:
        model: the detector, or with a teacher distillation.Student, or their distributed wrapper; batch: see
            datasets.to_device; teacher: None or distillation.Teacher; weights: names of the wanted losses.
        over_ranks: see distillation.compared.
    """
    labels, terms = batch["labels"] if "detection" in weights else None, {}
    if teacher is None:
        outputs = model(pixel_values=batch["images"], labels=labels)
    else:
        outputs, terms = model(batch["images"], labels, teacher(batch["twins"], batch.get("twin_digests")),
                               [term for term in distillation.TERMS if term in weights], over_ranks)
    if labels is not None:
        terms |= {"detection": outputs.loss} | {name: outputs.loss_dict[f"loss_{name}"]
                                                for name in ("vfl", "bbox", "giou")}
    return terms


def evaluate(model, val_loaders, truths, shares):
    """-> {"val/mAP", "val/AP50", ...}: the mean of the domains' scores weighted with their training shares,
    and {"clean/mAP", "rainy/mAP"} apart where both were trained on."""
    model = rtdetr_of(model)
    device = next(model.parameters()).device
    found = {domain: detection_scores(lambda images: model(pixel_values=images), loader, device,
                                      truths[domain], f"{domain} validation")[0]
             for domain, loader in val_loaders.items()}
    scores = {f"val/{name}": sum(shares[domain] * found[domain][name] for domain in found)
              for name in coco_evaluation.METRICS}
    return scores | ({f"{domain}/mAP": found[domain]["mAP"] for domain in found} if len(found) > 1 else {})


def agreement_without_labels(student, loader, device, teacher, weights):
    """-> {"rain/agreement": minus the weighted sum of the teacher's terms, "rain/<term>"} on pairs.

    Args:
        student: distillation.Student; teacher: distillation.Teacher; weights: {term: weight}.
    """
    compute = partial(compute_losses, student, teacher=teacher, weights=tuple(weights), over_ranks=False)
    return agreement(compute, loader, device, weights)


def sample_images(model, loader, id2label):
    """-> {tag: picture} of the first validation images with detections above 0.4."""
    model = rtdetr_of(model)
    device = next(model.parameters()).device
    samples = [loader.dataset[i] for i in range(min(4, len(loader.dataset)))]
    batch = datasets.to_device(datasets.collate(samples), device)
    outputs = model(pixel_values=batch["images"])
    row = visualize.draw_detections(batch["images"], outputs, id2label)
    return {"detections": visualize.as_tensor(visualize.grid([row], [""] * len(row)))}


def card_of(cfg, images, detector):
    """-> model_card.Card of a detector; images: how many it learns from."""
    id2label = id2label_of(detector)
    kinds = " and ".join([kind for kind, share in (("clean", cfg.COCO_RATIO), ("rainy", cfg.RAIN_RATIO)) if share])
    return model_card.Card(
        f"Detector for {len(id2label)} classes",
        f"An object detector, {name_of(detector)}, trained on {kinds} images.",
        library="transformers", base=cfg.RTDETR_MODEL_NAME, constants=cfg.as_dict(), load=_LOAD,
        data=[f"{images} training images, {100 * cfg.COCO_RATIO:.0f}% clean and "
              f"{100 * cfg.RAIN_RATIO:.0f}% rainy", f"classes: {', '.join(id2label.values())}"])


def save_detector(model, folder, image_size, card):
    """Write detector, image processor and card (model_card.Card), Hugging Face layout."""
    checkpoint.replace_folder(partial(_write_detector, model, image_size, card), folder)


def _write_detector(model, image_size, card, folder):
    rtdetr_of(model).save_pretrained(folder)
    card.write(folder)
    size = {"height": image_size, "width": image_size}
    RTDetrImageProcessor(size=size, do_normalize=False).save_pretrained(folder)


def scoring(cfg, plan, val_loaders, teacher):
    """What engine.fit needs for its score: {"evaluate", "score", "fixed", "validated_on"}."""
    if datasets.is_unlabelled(cfg):
        loader = val_loaders["rainy"]
        return {"score": "rain/agreement", "fixed": (*scored_without_labels(loader.dataset), "teacher"),
                "validated_on": None,
                "evaluate": partial(agreement_without_labels, loader=loader, device=processes.device(),
                                    teacher=teacher, weights=plan.loss_weights)}
    truths = {domain: ground_truth(loader.dataset.annotations) for domain, loader in val_loaders.items()}
    shares = {"clean": cfg.COCO_RATIO, "rainy": cfg.RAIN_RATIO}
    fixed = {name for loader in val_loaders.values() for name in drawn_by(loader.dataset)}
    return {"score": "val/mAP", "fixed": sorted(fixed),
            "validated_on": {domain: coco_evaluation.identity(truth) for domain, truth in truths.items()},
            "evaluate": partial(evaluate, val_loaders=val_loaders, truths=truths, shares=shares)}


def say_result(best, score, folder):
    """The best epoch's scores, and where the detector lies."""
    names = {f"val/{name}": name for name in coco_evaluation.METRICS}
    if score not in names:
        names = {name: name for name in best if name.startswith("rain/")}
    processes.say(f"{report.table([best], names)}\ndetector: {folder.as_posix()}")


def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit."""
    cfg = config.resolve(globals(), overrides)
    require_size(cfg.IMAGE_SIZE)
    plan = Plan.of(cfg, learning_rates=("LEARNING_RATE", "BACKBONE_LEARNING_RATE"),
                   loss_weights=loss_constants())
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    processes.announced_device()
    model = build_model(cfg)
    if not cfg.BACKBONE_LEARNING_RATE:
        freeze.freeze(model.model.backbone)  # its backward pass, half of a step, falls away as well
    freeze_first_stages(model, cfg.FREEZE_AT)
    teacher = build_teacher(cfg, model)
    id2label = id2label_of(model)
    require_queries(model, cfg.IMAGE_SIZE)
    train_loader, val_loaders = build_loaders(cfg, id2label)
    scored = scoring(cfg, plan, val_loaders, teacher)
    processes.say(freeze.describe({name_of(model): model}))
    folder = Path(cfg.OUTPUT_DIR) / "detector"
    card = card_of(cfg, len(train_loader.dataset), model)
    constants = cfg.as_dict() | {"classes": list(id2label.values()), "taught": teacher is not None}
    if "teacher" in scored["fixed"]:
        constants["teacher"] = freeze.fingerprint(teacher)  # it decides on the score
    result = engine.fit(
        model if teacher is None else distillation.Student(model), train_loader,
        partial(compute_losses, teacher=teacher, weights=tuple(plan.loss_weights)), plan,
        output_dir=cfg.OUTPUT_DIR, parameters=parameter_groups(model, cfg),
        evaluate=card.remembering(scored["evaluate"]), score=scored["score"],
        on_best=partial(save_detector, folder=folder, image_size=cfg.IMAGE_SIZE, card=card),
        sample_images=partial(sample_images, loader=list(val_loaders.values())[-1], id2label=id2label),
        constants=constants, own_files=(folder.name,),
        # the ratios weight the score as well
        fixed=("IMAGE_SIZE", "FREEZE_AT", "COCO_RATIO", "RAIN_RATIO", "classes", "taught", *scored["fixed"]),
        validated_on=scored["validated_on"], validated_images=loaders.image_paths(val_loaders.values()))
    if result["history"]:
        say_result(result["history"][result["best_epoch"] - 1], scored["score"], folder)
    return result


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
