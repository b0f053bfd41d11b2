"""Train a small module that suppresses rain in RT-DETR's features, between the backbone and the hybrid encoder.

Phase 1: the detector is frozen, the module learns from the detection loss, and (as every rainy image has a clean twin)
from the distance between its features and the pretrained detector's features of the twin; its masks learn where rain
has changed the picture. The pretrained detector's answers about the twin can be learnt as well. Phase 2: module and
detector train together, the detector slowly. A fresh module is the identity, so both start at the pretrained detector's
mAP. CBAM: Woo et al., ECCV 2018; RT-DETR: Zhao et al., CVPR 2024.

    python Training_FeatureDerain.py --demo
    python Training_FeatureDerain.py

Writes OUTPUT_DIR/model/ (the best epoch of both phases), and in OUTPUT_DIR/phase1 and phase2 last.pt (to resume),
best.pt, metrics.json, curves.png and tb/. Afterwards: python Eval_FeatureDerain.py
"""

import copy
import math
from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

import Eval_FeatureDerain
from utils import checkpoint, config, datasets, feature_derain, freeze, losses, processes, report, visualize
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import drawn_by, fresh_rain
from utils.demo.coco import ensure_demo
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.agreement import agreement
from utils.evaluation.coco import detection_scores, ground_truth
from utils.networks import distillation
from utils.networks.rtdetr import id2label_of, require_feature_level, require_queries, require_size
from utils.next_command import command
from utils.training import ema, engine, model_card, run_folder, run_state
from utils.training.plan import Plan, not_negative, whole
from utils.transfer import sent

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR: str | None = "./dataset/coco_rain"  # the same file names in rain; make_rain.py writes it
PERCENT_DATASET: float = 10             # seeded subset in percent, equal on every machine: 10% of COCO is 11,800 images
COCO_RATIO = 0.3                        # share of clean images, so that these are not over-processed
RAIN_RATIO = 0.7                        # share of rainy images
RAIN = "files"                          # files: COCO_RAIN_DIR's training images; fresh: drawn anew in every epoch;
                                        # auto: fresh if make_rain.py drew those; validation: COCO_RAIN_DIR, "": drawn
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
IMAGE_SIZE = 640                        # side of the square input, a multiple of 32
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- model --------------------------------------------------------------------------------------------------------
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id, or a folder written by save_pretrained
DERAIN_TYPE = "multiscale"              # multiscale, lightweight (63 parameters), none (plain fine-tuning: a baseline)
NUM_RESIDUAL_BLOCKS = 2                 # corrections per scale, multiscale only
REFINE_WIDTH = 0.375                    # their width: 1.46M parameters on R18; 0.125: 0.34M
FREEZE_BACKBONE = False                 # True keeps the backbone in phase 2 as it is
TEACHER_CACHE_GB = 0.0                  # memory for the teacher's answers, where images are few; 0: asked every time

# --- training -----------------------------------------------------------------------------------------------------
PHASE1_EPOCHS = 5                       # module alone; 0 leaves the phase out
PHASE2_EPOCHS = 10                      # module and detector; 0 leaves the phase out
PHASE1_LR = 5e-4                        # the module is new, so higher than for fine-tuning
PHASE2_DERAIN_LR = 1e-4                 # module
PHASE2_DETECTOR_LR = 1e-5               # detector, ten times lower; far more where it still learns, see docs
PRETRAINED_SHARE = 0.0                  # of the detector's weights after phase 2; 0.5: rain given up for clean images
FREEZE_BATCH_NORM = True                # phase 2: BatchNorm stays as pretrained; small rainy batches would spoil it
BATCH_SIZE = 16                         # per GPU; 11 on 8 GB; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 1         # batches per optimizer step
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up, in each phase
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
PRECISION = "float32"                   # bf16: faster on GPUs from Ampere on; auto: where it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EMA_DECAY = 0.999                       # moving average of the weights, which is evaluated and kept; 0: without
EARLY_STOPPING_PATIENCE = 5             # epochs without a better score, in each phase; 0: never stop early
NUM_WORKERS = 4                         # processes that load images; at most the number of cores is used
SEED = 0                                # subset, order, augmentation, initial weights

# --- loss weights (0 switches a term off; plain detection loss: 1, 0, 0, 0) ---------------------------------------
DETECTION_WEIGHT = 1.0                  # RT-DETR's loss; 0 trains without labels, phase 2 only with QUERIES_WEIGHT
CONSISTENCY_WEIGHT = 10.0               # rainy images: features against the pretrained ones of the clean twin
IDENTITY_WEIGHT = 1.0                   # clean images: features against their own pretrained ones
FEATURE_LEVEL = "both"                  # which features these two compare: backbone, encoder or both
MASK_WEIGHT = 1.0                       # masks against what rain really changed (the clean twin tells): they show it
QUERIES_WEIGHT = 0.0                    # classes and boxes of the teacher's queries, see utils/networks/distillation.py
POSITIONS_WEIGHT = 0.0                  # scores and boxes by which queries are chosen

# --- validation ---------------------------------------------------------------------------------------------------
RAIN_SCORE_WEIGHT = 0.5                 # "best" goes by this times the rainy mAP ...
CLEAN_SCORE_WEIGHT = 0.5                # ... plus this times the clean mAP: neither can be sold for the other
EVAL_BATCH_SIZE = 24                    # validation batch

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_feature_derain"
RESUME = False                          # True goes on where the run stopped, in whichever phase
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "PERCENT_DATASET": 100, "IMAGE_SIZE": 160,
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "REFINE_WIDTH": 1.0, "OUTPUT_DIR": "./demo/outputs_feature_derain",
    "PHASE1_EPOCHS": 1, "PHASE2_EPOCHS": 2, "PHASE1_LR": 2e-3, "PHASE2_DERAIN_LR": 2e-3, "PHASE2_DETECTOR_LR": 1e-3,
    "PRETRAINED_SHARE": 0.5, "BATCH_SIZE": 8, "WARMUP_STEPS": 20, "EMA_DECAY": 0.99, "NUM_WORKERS": 0,
    "TEACHER_CACHE_GB": 2.0,
}
_TEACHER_TERMS = {"queries": "QUERIES_WEIGHT", "positions": "POSITIONS_WEIGHT"}  # features: as CONSISTENCY_WEIGHT says
_FEATURE_TERMS = {"consistency": "rainy", "identity": "clean"}  # the terms that compare features: of which domain


def build_model(cfg, device):
    """A pretrained detector with a fresh module, and the block of parameter counts of both phases."""
    model = feature_derain.create_feature_derain_rtdetr(
        cfg.RTDETR_MODEL_NAME, cfg.DERAIN_TYPE, cfg.NUM_RESIDUAL_BLOCKS, cfg.FREEZE_BACKBONE, device, cfg.REFINE_WIDTH)
    if cfg.DERAIN_TYPE == "lightweight":
        processes.say("warning: lightweight has 63 parameters, which learn little (its loss hardly falls); "
                      "DERAIN_TYPE = 'multiscale' is the one to use where accuracy counts")
    return model


def build_data(cfg, id2label, weights):
    """-> training data (with clean twins where a loss needs them), {domain: validation data}; the latter is {"rainy"}
    alone, without labels, where there are no annotations."""
    train_transform, val_transform = presets.adaptation(cfg.IMAGE_SIZE), presets.evaluation(cfg.IMAGE_SIZE)
    if datasets.is_unlabelled(cfg):
        processes.say("no annotations: training by the clean twins alone, 10% of the pairs kept for validation")
        if cfg.COCO_RATIO and cfg.IDENTITY_WEIGHT:
            processes.say("note: IDENTITY_WEIGHT is left out, as pairs hold no clean samples")
        train, val = datasets.unlabelled_pairs(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, train_transform, val_transform,
                                               percent=cfg.PERCENT_DATASET, seed=cfg.SEED, fresh_rain=fresh_rain(cfg))
        return train, {"rainy": val}
    rain = fresh_rain(cfg)
    train = datasets.clean_rainy_mixture(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, train_transform, coco_ratio=cfg.COCO_RATIO,
        rain_ratio=cfg.RAIN_RATIO, percent=cfg.PERCENT_DATASET, seed=cfg.SEED, twins=needs_twins(weights),
        unknown=cfg.UNKNOWN_CATEGORIES, fresh_rain=rain)
    datasets.say_notes(train)
    return train, datasets.clean_rainy_validation(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, val_transform,
                                                  domains=("rainy", "clean"), unknown=cfg.UNKNOWN_CATEGORIES,
                                                  train=train, fresh_rain=rain)


def loss_constants(cfg):
    """-> {term: constant of its weight} of the terms that have images (identity: clean ones) and a part to train."""
    terms = {"detection": "DETECTION_WEIGHT", "consistency": "CONSISTENCY_WEIGHT"} | _TEACHER_TERMS
    if cfg.COCO_RATIO and not datasets.is_unlabelled(cfg):
        terms["identity"] = "IDENTITY_WEIGHT"
    if cfg.DERAIN_TYPE != "none":
        terms["mask"] = "MASK_WEIGHT"
    return terms


def needs_twins(weights):
    """-> True where a loss compares an image or its features with its clean twin."""
    return "mask" in weights or is_taught(weights) or bool(weights.keys() & _FEATURE_TERMS.keys())


def is_taught(weights):
    """-> whether one of the losses is a comparison with a teacher's answers."""
    return bool(weights.keys() & _TEACHER_TERMS.keys())


def compute_losses(model, batch, weights, teacher, feature_level, answers=None, over_ranks=True):
    """Named losses of one batch, scalars: those in `weights`.

    Args:
        model: FeatureDerainRTDETR or its distributed wrapper; batch: see datasets.to_device, with "twins" where needed.
        teacher: the pretrained model, frozen, which makes the targets of both feature terms; None without them.
        feature_level: of those terms, see detector.FEATURE_LEVELS.
        answers: distillation.Teacher around the pretrained detector; None without its terms.
        over_ranks: see distillation.compared.
    """
    labelled = "detection" in weights
    answer = answers(batch["twins"], batch.get("twin_digests")) if answers else None
    outputs = model(batch["images"], labels=batch["labels"] if labelled else None, detect=labelled,
                    feature_level=feature_level, masks="mask" in weights, answer=answer,
                    terms=[name for name in _TEACHER_TERMS if name in weights], over_ranks=over_ranks)
    terms = ({"detection": outputs.loss} if labelled else {}) | (outputs.taught or {})
    if "mask" in weights:
        terms["mask"] = losses.rain_mask_loss(outputs.masks, batch["images"], batch["twins"])
    if teacher is not None:
        features, targets = outputs.features, teacher.clean_features(batch["twins"], feature_level)
        for name, domain in _FEATURE_TERMS.items():
            if name in weights:
                terms[name] = domain_consistency(features, targets, batch["domains"], domain)
    return terms


def domain_consistency(features, targets, domains, domain):
    """Relative feature error (see losses.feature_consistency), summed over the batch's images of one domain, divided
    by the whole batch: every image weighs the same, however the domains fall into batches."""
    chosen = [i for i, name in enumerate(domains) if name == domain]
    if not chosen:
        return sum(level.sum() for level in features) * 0.0
    index = sent(torch.tensor(chosen), features[0].device)
    error = losses.feature_consistency([level[index] for level in features], [level[index] for level in targets])
    return error * (len(chosen) / len(domains))


def evaluate(model, val_loaders, truths, device, cfg, agreed=None):
    """-> {"score", "rain/mAP", "clean/mAP", "rain/AP50", "clean/AP50"}; without labels {"score": minus the feature
    error}, or what `agreed` says, see `agreement_without_labels`."""
    if not truths:
        return agreed(model) if agreed else {
            "score": -feature_error(model, val_loaders["rainy"], device, cfg.FEATURE_LEVEL)}
    scores = {domain: detection_scores(model, loader, device, truths[domain], f"{domain} validation")[0]
              for domain, loader in val_loaders.items()}
    total = (cfg.RAIN_SCORE_WEIGHT * scores["rainy"]["mAP"] + cfg.CLEAN_SCORE_WEIGHT * scores["clean"]["mAP"])
    return {"score": total} | {f"{prefix}/{name}": scores[domain][name] for name in ("mAP", "AP50")
                               for prefix, domain in (("rain", "rainy"), ("clean", "clean"))}


def feature_error(model, loader, device, feature_level):
    """-> mean relative error of the de-rained features against those of the clean twin."""
    def errors(batch):
        batch = datasets.to_device(batch, device)
        outputs = model(batch["images"], detect=False, feature_level=feature_level)
        error = losses.feature_consistency(outputs.features, model.clean_features(batch["twins"], feature_level)).item()
        return [{"error": error}] * len(batch["images"])
    found = [one for several in loaders.each(errors, loader) for one in several]
    return processes.mean_over_ranks(found)["error"]


def agreement_without_labels(model, loader, device, weights, teacher, answers, feature_level):
    """-> {"score": minus the weighted sum of the terms by which rainy images are learnt (masks aside), "rain/<term>"}.

    Args:
        loader: of pairs; weights: of the training; the others: see `compute_losses`.
    """
    weights = {name: weight for name, weight in weights.items() if name in ("consistency", *_TEACHER_TERMS)}
    found = agreement(partial(compute_losses, model, weights=weights, teacher=teacher, feature_level=feature_level,
                              answers=answers, over_ranks=False), loader, device, weights)
    return {"score": found.pop("rain/agreement")} | found


def sample_images(model, dataset, device, id2label):
    """-> {tag: picture}: rainy images with detections, below them the finest scale's rain mask."""
    batch = datasets.to_device(datasets.collate([dataset[i] for i in range(min(3, len(dataset)))]), device)
    rows = [visualize.draw_detections(batch["images"], model(batch["images"]), id2label)]
    if masks := model.rain_masks(batch["images"]):
        rows.append([feature_derain.mask_overlay(image, mask)
                     for image, mask in zip(batch["images"], masks[0], strict=True)])
    return {"detections above, rain mask below": visualize.as_tensor(visualize.grid(rows, [""] * len(rows[0])))}


def build_plans(cfg):
    """-> {phase: Plan} of the phases to run; UserError where the constants leave nothing, or what cannot be done."""
    for name in ("PHASE1_EPOCHS", "PHASE2_EPOCHS"):
        whole(0, "leaves the phase out")(name, getattr(cfg, name))
    for name in ("PHASE1_LR", "PHASE2_DERAIN_LR", "PHASE2_DETECTOR_LR"):  # also of a phase that is left out
        not_negative(name, getattr(cfg, name))
    terms = loss_constants(cfg)
    rates = {1: ("PHASE1_LR",), 2: ("PHASE2_DERAIN_LR", "PHASE2_DETECTOR_LR")}
    phases = {1: cfg.PHASE1_EPOCHS, 2: cfg.PHASE2_EPOCHS}
    if phases[1] and cfg.DERAIN_TYPE == "none":
        processes.say("note: DERAIN_TYPE = 'none' has no module to train: phase 1 is left out")
        phases[1] = 0
    if phases[2] and not (cfg.DETECTION_WEIGHT or cfg.QUERIES_WEIGHT):
        processes.say("note: DETECTION_WEIGHT = 0: phase 2 needs the detection loss or QUERIES_WEIGHT and is left out")
        phases[2] = 0
    if not any(phases.values()):
        raise config.UserError("nothing to train: PHASE1_EPOCHS and PHASE2_EPOCHS leave no epoch (with DERAIN_TYPE = "
                               "'none' only phase 2 exists, with DETECTION_WEIGHT and QUERIES_WEIGHT = 0 only phase 1)")
    return {phase: Plan.of(cfg, epochs=f"PHASE{phase}_EPOCHS", learning_rates=rates[phase], loss_weights=terms,
                           workers="NUM_WORKERS")
            for phase, epochs in phases.items() if epochs}


def parameter_groups(model, phase, cfg):
    """Freeze for the phase and say what trains. -> parameter groups with their learning rates."""
    if phase == 1:
        model.freeze_detector()
        rates = [(cfg.PHASE1_LR, model.derain_module)]
    else:
        model.unfreeze_detector(cfg.FREEZE_BATCH_NORM)
        rates = [(cfg.PHASE2_DERAIN_LR, model.derain_module), (cfg.PHASE2_DETECTOR_LR, model.rtdetr)]
    parts = {"De-rain module": model.derain_module, "RT-DETR": model.rtdetr}
    processes.say(f"\nphase {phase}\n" + freeze.describe({label: part for label, part in parts.items()
                                                          if freeze.count_parameters(part)[0]}))
    groups = [{"params": [p for p in module.parameters() if p.requires_grad], "lr": rate} for rate, module in rates]
    return [group for group in groups if group["params"]]  # "none" has no parameters


class BestModel:
    """Validates, and keeps OUTPUT_DIR/model: the best epoch of all phases.

    What is validated and written is the trained model with PRETRAINED_SHARE of the detector's pretrained weights.

    Args:
        model: FeatureDerainRTDETR that trains; pretrained: its frozen copy from before the training.
        val_loaders, truths, device, cfg, agreed: of `evaluate`; card: model_card.Card that is written with it.
    """

    def __init__(self, model, pretrained, val_loaders, truths, device, cfg, card, agreed=None):
        self.own, self.others = (
            [*part.rtdetr.parameters(), *(b for b in part.rtdetr.buffers() if b.is_floating_point())]
            for part in (model, pretrained))
        self.val_loaders, self.truths, self.device, self.cfg, self.card = val_loaders, truths, device, cfg, card
        self.agreed, self.teacher = agreed, None if truths else freeze.fingerprint(pretrained.rtdetr)
        self.score = -math.inf  # the best one of the phases that are over
        self.latest = {}

    def _mixed(self):
        return ema.mixed(self.own, self.others, self.cfg.PRETRAINED_SHARE)

    def validate(self, model):
        """-> metrics, see `evaluate`."""
        with self._mixed():
            self.latest = evaluate(model, self.val_loaders, self.truths, self.device, self.cfg, self.agreed)
        return self.latest

    def keep(self, model):
        """Write the phase's best epoch so far, where it is better than those of the phases before."""
        if self.latest["score"] > self.score:
            with self._mixed():
                checkpoint.replace_folder(partial(self._write, model), Path(self.cfg.OUTPUT_DIR) / "model")

    def _write(self, model, folder):
        model.save_pretrained(folder, image_size=self.cfg.IMAGE_SIZE)
        self.card.metrics = self.latest
        self.card.write(folder)


def card_of(cfg, images, id2label):
    """-> model_card.Card; images: how many the model learns from."""
    return model_card.Card(
        f"RT-DETR that de-rains features, {len(id2label)} classes",
        f"An RT-DETR object detector with a de-raining module ({cfg.DERAIN_TYPE}) between backbone and encoder.",
        library="rainsight", base=cfg.RTDETR_MODEL_NAME, constants=cfg.as_dict(),
        load=model_card.loading(feature_derain.FeatureDerainRTDETR),
        data=[f"{images} training images, clean and rainy",
              f"classes: {', '.join(id2label.values())}"])


def scored_by(best):
    """-> names of the constants that decide what the score means: with others no run goes on."""
    names = ["RAIN_SCORE_WEIGHT", "CLEAN_SCORE_WEIGHT", "PRETRAINED_SHARE"]
    if not best.truths:  # the score is the features' error, or the terms' weighted sum
        names += ["FEATURE_LEVEL", "taught", "teacher"]
        names += ["CONSISTENCY_WEIGHT", *_TEACHER_TERMS.values()] if best.agreed else []
    return [*names, *drawn_by(best.val_loaders["rainy"].dataset)]


def train_phase(phase, plan, model, train_loader, teacher, answers, best, cfg):
    """One phase; the model comes out with its best epoch's weights, from which the next one starts.

    Args:
        phase: 1 or 2; plan: its Plan; teacher, answers: of `compute_losses`; best: BestModel.
    Returns:
        the result of engine.fit.
    """
    groups = parameter_groups(model, phase, cfg)
    engine.seed_everything(cfg.SEED + phase)  # of the denoising queries, wherever the run was resumed
    folder = Path(cfg.OUTPUT_DIR) / f"phase{phase}"
    rainy = best.val_loaders["rainy"].dataset
    result = engine.fit(
        model, train_loader,
        partial(compute_losses, weights=plan.loss_weights, teacher=teacher, feature_level=cfg.FEATURE_LEVEL,
                answers=answers),
        plan, output_dir=folder, parameters=groups, evaluate=best.validate, score="score", on_best=best.keep,
        sample_images=partial(sample_images, dataset=rainy, device=best.device, id2label=id2label_of(model.rtdetr)),
        constants=cfg.as_dict() | ({} if best.truths else {
            "taught": best.agreed is not None, "teacher": best.teacher}),
        fixed=("IMAGE_SIZE", *scored_by(best)),
        validated_on={domain: coco_evaluation.identity(truth) for domain, truth in best.truths.items()},
        validated_images=loaders.image_paths(best.val_loaders.values()))
    if result["stopped"] != "interrupted":
        best.score = max(best.score, result["best_score"])
        checkpoint.load_into(model, checkpoint.load_state(folder / "best.pt"), (folder / "best.pt").as_posix())
    return result


def check(cfg):
    """UserError for constants that cannot be or do not go together; Plan checks the others."""
    require_size(cfg.IMAGE_SIZE)
    require_feature_level(cfg.FEATURE_LEVEL)
    feature_derain.create_derain_module(cfg.DERAIN_TYPE, (8, 8, 8), cfg.NUM_RESIDUAL_BLOCKS, cfg.REFINE_WIDTH)
    learning = ("DETECTION_WEIGHT", "CONSISTENCY_WEIGHT", *_TEACHER_TERMS.values())
    if not any(getattr(cfg, name) for name in learning):
        raise config.UserError(f"{' and '.join(learning)} are all 0: nothing to learn from rain")
    for name in ("RAIN_SCORE_WEIGHT", "CLEAN_SCORE_WEIGHT"):
        not_negative(name, getattr(cfg, name))
    if cfg.RAIN_SCORE_WEIGHT + cfg.CLEAN_SCORE_WEIGHT == 0:
        raise config.UserError("RAIN_SCORE_WEIGHT and CLEAN_SCORE_WEIGHT are both 0: no epoch would be better than "
                               "another")
    if not 0 <= cfg.PRETRAINED_SHARE < 1:
        raise config.UserError(f"PRETRAINED_SHARE = {cfg.PRETRAINED_SHARE}: choose 0 (off) or a number below 1")


def main(**overrides):
    """Train; -> {phase number: {"history", "best_epoch", "best_score", "stopped"} of engine.fit}."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    plans = build_plans(cfg)
    weights = next(iter(plans.values())).loss_weights  # the same in both phases
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    model = build_model(cfg, device)
    require_queries(model.rtdetr, cfg.IMAGE_SIZE)
    train, val = build_data(cfg, id2label_of(model.rtdetr), weights)
    taught = is_taught(weights)
    collate = datasets.collate_with_digests if taught and cfg.TEACHER_CACHE_GB else datasets.collate
    train_loader = loaders.training_loader(train, cfg.BATCH_SIZE, cfg.NUM_WORKERS, cfg.SEED, collate)
    val_loaders = {domain: loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.NUM_WORKERS,
                                                     datasets.collate if "clean" in val else collate)
                   for domain, data in val.items()}
    truths = {domain: ground_truth(data.annotations) for domain, data in val.items()} if (
        "clean" in val) else {}
    pretrained = freeze.freeze(copy.deepcopy(model))
    teacher = pretrained if weights.keys() & _FEATURE_TERMS.keys() else None
    answers = distillation.Teacher(pretrained.rtdetr, cfg.TEACHER_CACHE_GB) if taught else None
    agreed = None if truths or not taught else partial(
        agreement_without_labels, loader=val_loaders["rainy"], device=device, weights=weights, teacher=teacher,
        answers=answers, feature_level=cfg.FEATURE_LEVEL)
    best = BestModel(model, pretrained, val_loaders, truths, device, cfg,
                     card_of(cfg, len(train), id2label_of(model.rtdetr)), agreed)
    results = {}
    with run_folder.claimed(cfg.OUTPUT_DIR):
        require_same_first_phase(cfg)
        if processes.is_main() and not cfg.RESUME:  # as a whole: no old phase 2 may be resumed after a new phase 1
            run_state.set_aside(Path(cfg.OUTPUT_DIR), ("phase1", "phase2", "model"))
        for phase, plan in plans.items():
            results[phase] = train_phase(phase, plan, model, train_loader, teacher, answers, best, cfg)
            if results[phase]["stopped"] == "interrupted":
                return results
    print_summary(results, cfg)
    return results


def require_same_first_phase(cfg):
    """UserError where a resumed run would train phase 1 on, although phase 2 has begun from its earlier end."""
    first, second = (Path(cfg.OUTPUT_DIR) / phase / "last.pt" for phase in ("phase1", "phase2"))
    if cfg.RESUME and first.is_file() and second.is_file():
        before = (checkpoint.load(first).get("constants") or {}).get("PHASE1_EPOCHS", cfg.PHASE1_EPOCHS)
        if before != cfg.PHASE1_EPOCHS:
            raise config.UserError(f"PHASE1_EPOCHS = {cfg.PHASE1_EPOCHS}, but {second.as_posix()} went on from a phase "
                                   f"1 with {before}: set it back, or move {second.parent.as_posix()} away to train "
                                   "phase 2 anew")


def print_summary(results, cfg):
    """The best epoch of each phase, and what to do next."""
    rows = [{"phase": f"phase {phase}"} | result["history"][result["best_epoch"] - 1]
            for phase, result in results.items()]
    names = [name for name in ("epoch", "score", "rain/mAP", "clean/mAP", "rain/AP50", "clean/AP50") if name in rows[0]]
    processes.say("\nbest epochs\n" + report.table(rows, {"phase": ""} | {name: name for name in names}))
    model = (Path(cfg.OUTPUT_DIR) / "model").as_posix()
    own = {"multiscale": {"MULTISCALE_MODEL_NAME": model}, "lightweight": {"LIGHTWEIGHT_MODEL_NAME": model},
           "none": {"FINETUNED_MODEL_NAME": f"{model}/rtdetr"}}[cfg.DERAIN_TYPE]
    line = command(Eval_FeatureDerain, cfg, labelled=not datasets.is_unlabelled(cfg), **own)
    processes.say(f"model: {model}\nnext: {line}")


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
