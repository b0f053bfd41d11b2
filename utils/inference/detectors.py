"""The models of detect.py: which of its constants each of them needs, how it is built from them, and from which
scores on its classes count.

`cfg` is the namespace of that script's constants everywhere.
"""

from pathlib import Path

import torch

from utils import checkpoint, config, processes, system
from utils.conditional_model import ConditionalRainRobustRTDETR, load_rainy_detector, require_threshold
from utils.feature_derain import FeatureDerainRTDETR
from utils.integrated_model import RainRobustRTDETR, require_trained_scale
from utils.networks.adapter import is_adapter
from utils.networks.derainers import load_derainer, require_arch
from utils.networks.rain_detector import load_rain_detector
from utils.networks.rtdetr import id2label_of, load_rtdetr, rtdetr_of
from utils.networks.spdnet import load_spdnet

_MODEL_CONSTANTS = ("WEIGHTS", "RAINY_BRANCH", "RTDETR_MODEL_NAME", "DERAIN", "SPDNET_MODEL_PATH", "DERAIN_MODEL_PATH",
                    "REFINER_DIR", "RAIN_DETECTOR_PATH", "FEATURE_MODEL_DIR", "RAIN_THRESHOLD", "DERAIN_SCALE")
# {DERAIN: (name for load_derainer, the constant that says where)}
DERAINERS = {"spdnet": (None, "SPDNET_MODEL_PATH"), "unet": ("unet", "DERAIN_MODEL_PATH"),
              "nafnet": ("nafnet", "DERAIN_MODEL_PATH"), "unet+refiner": ("refiner", "REFINER_DIR"),
              "nafnet+refiner": ("refiner", "REFINER_DIR")}
BUILT = ("conditional", "spdnet", "feature", "vanilla")  # values of MODEL that `build_model` knows
OF_WEIGHTS = ("rfdetr", "exported")  # and those that are what WEIGHTS holds
_MADE_BY = {"SPDNET_MODEL_PATH": "Training_SPDNet_Adaptation.py", "DERAIN_MODEL_PATH": "train_unet_derain.py",
            "REFINER_DIR": "train_diffusion_refiner.py", "RAIN_DETECTOR_PATH": "Training_RainDetector.py",
            "FEATURE_MODEL_DIR": "Training_FeatureDerain.py", "WEIGHTS": "the RF-DETR scripts or export.py"}


def used_constants(cfg):
    """-> names of the _MODEL_CONSTANTS that MODEL, PIPELINE_DIR and COMPARE let decide anything."""
    derainer = {"DERAIN", DERAINERS[cfg.DERAIN][1], "DERAIN_SCALE"}
    if cfg.MODEL in OF_WEIGHTS:
        return {"WEIGHTS"} | ({"RAIN_THRESHOLD"} if is_manifest(cfg) else set())
    if cfg.MODEL == "vanilla":
        return {"RTDETR_MODEL_NAME"}
    if cfg.MODEL == "spdnet":
        return {"RTDETR_MODEL_NAME"} | derainer
    if cfg.MODEL == "feature":
        return {"FEATURE_MODEL_DIR"} | ({"RTDETR_MODEL_NAME"} if cfg.COMPARE else set())
    if cfg.PIPELINE_DIR:  # holds its own detector, threshold and scale
        return set()
    branch = derainer if cfg.RAINY_BRANCH == "spdnet" else set()
    return {"RTDETR_MODEL_NAME", "RAIN_DETECTOR_PATH", "RAIN_THRESHOLD", "RAINY_BRANCH"} | branch


def note_without_effect(cfg, given):
    """Say which constants of models decide nothing in this run; given: names that the user set."""
    used = used_constants(cfg)
    if idle := [name for name in _MODEL_CONSTANTS if name in given and name not in used]:
        chosen = (f"PIPELINE_DIR = '{cfg.PIPELINE_DIR}'" if cfg.PIPELINE_DIR else f"MODEL = '{cfg.MODEL}'"
                  if cfg.MODEL != "conditional" else f"RAINY_BRANCH = '{cfg.RAINY_BRANCH}'")
        paths = {constant for _, constant in DERAINERS.values()} if "DERAIN" in used else set()
        for reason, names in ((f"DERAIN = '{cfg.DERAIN}'", [name for name in idle if name in paths]),
                              (chosen, [name for name in idle if name not in paths])):
            if names:
                processes.say(f"note: without effect with {reason}: {', '.join(names)}")


def is_manifest(cfg):
    """-> whether WEIGHTS is the pipeline that export.py's manifest.json tells of."""
    return cfg.MODEL == "exported" and str(cfg.WEIGHTS).endswith(".json")


def given_threshold(cfg):
    """-> RAIN_THRESHOLD for an exported pipeline: None, which is the manifest's own, unless the user gave another."""
    if "RAIN_THRESHOLD" not in cfg.given:  # the script's default is nobody's wish
        return None
    require_threshold(cfg.RAIN_THRESHOLD)
    return cfg.RAIN_THRESHOLD


def say_threshold(cfg, model):
    """Say from which probability on a model's gate calls an image rainy, and who says so; nothing without a gate."""
    threshold = getattr(model, "rain_threshold", None)
    if threshold is None:
        return
    if is_manifest(cfg):
        whose = "RAIN_THRESHOLD" if given_threshold(cfg) is not None else (
            f"{Path(cfg.WEIGHTS).name}'s own; the flag --RAIN_THRESHOLD replaces it")
    elif cfg.PIPELINE_DIR:
        whose = "PIPELINE_DIR's own"
    else:
        whose = "the rain detector's own" if cfg.RAIN_THRESHOLD is None else "RAIN_THRESHOLD"
    processes.say(f"gate: an image is rainy from a probability of {threshold:.4g} on ({whose})")


def empty_panels(cfg):
    """-> {COMPARE, SHOW_DERAINED: why}, those of them that have nothing to show with the constants' model."""
    if cfg.MODEL in ("vanilla", *OF_WEIGHTS):
        return dict.fromkeys(("COMPARE", "SHOW_DERAINED"), f"MODEL = '{cfg.MODEL}' has nothing that COMPARE or "
                             "SHOW_DERAINED could show: choose another MODEL, or leave them out")
    if cfg.MODEL == "feature":
        return {"SHOW_DERAINED": "SHOW_DERAINED: MODEL = 'feature' de-rains features, there is no image to show"}
    if cfg.MODEL == "conditional" and not cfg.PIPELINE_DIR and cfg.RAINY_BRANCH != "spdnet":
        return {"SHOW_DERAINED": f"SHOW_DERAINED: RAINY_BRANCH = '{cfg.RAINY_BRANCH}' is a detector that knows rain, "
                                 "there is no image to show"}
    return {}


def require(cfg):
    """UserError for constants that name no model, or one that has nothing to show."""
    gate = cfg.MODEL == "conditional" and not cfg.PIPELINE_DIR
    a_folder = not is_adapter(cfg.RAINY_BRANCH)
    if gate and cfg.RAINY_BRANCH != "spdnet" and "/" not in cfg.RAINY_BRANCH and (  # a hub id has a slash
            problem := system.absent(cfg.RAINY_BRANCH, folder=a_folder)):
        raise config.UserError(f"RAINY_BRANCH = '{cfg.RAINY_BRANCH}' {problem}: choose spdnet, a detector's folder or "
                               "hub id, or an adapter's file")
    for name, why in empty_panels(cfg).items():
        if getattr(cfg, name):
            raise config.UserError(why)
    if cfg.MODEL not in (*BUILT, *OF_WEIGHTS):
        raise config.UserError(f"MODEL = {cfg.MODEL!r}: choose one of {', '.join((*BUILT, *OF_WEIGHTS))}")
    if cfg.PIPELINE_DIR and cfg.MODEL != "conditional":
        raise config.UserError(f"PIPELINE_DIR holds a conditional pipeline, but MODEL = {cfg.MODEL!r}: leave one out")


def missing(cfg):
    """-> why MODEL cannot be built, in a line without an end, "" where its files are there. Nothing is loaded; a hub id
    counts as there, and `build_model` says when it is not to be had."""
    try:
        require(cfg)
    except config.UserError as error:
        return str(error)
    used = used_constants(cfg) or {"PIPELINE_DIR"}
    for name, adapter in (("RTDETR_MODEL_NAME", False), ("RAINY_BRANCH", is_adapter(cfg.RAINY_BRANCH))):
        value = getattr(cfg, name)
        if name in used and value != "spdnet" and (adapter or checkpoint.is_local(value)) and (
                problem := system.absent(value, folder=not adapter)):
            return f"{name} = '{value}' {problem}"
    for name in ("PIPELINE_DIR", *_MADE_BY):
        if name in used and (problem := system.absent(getattr(cfg, name), folder=name.endswith("_DIR"))):
            source = f": it comes from {_MADE_BY[name]}" if name in _MADE_BY else ""
            return f"{name} = '{getattr(cfg, name)}' {problem}{source}"
    return ""


def classes_of(model):
    """-> {label: class name} of anything that detect.build_models returns."""
    return model.classes if hasattr(model, "classes") else id2label_of(rtdetr_of(model))


def score_thresholds(cfg, classes):
    """-> (largest label + 1,) scores from which on a class counts: THRESHOLD, or its own of CLASS_THRESHOLDS."""
    found = torch.full((max(classes) + 1,), float(cfg.THRESHOLD))
    labels, seen = {name: label for label, name in classes.items()}, set()
    for text in cfg.CLASS_THRESHOLDS:
        name, _, value = (part.strip() for part in text.rpartition("="))
        try:
            score = float(value)
        except ValueError:
            score = -1.0
        if not name or not 0 <= score <= 1:
            raise config.UserError(f"CLASS_THRESHOLDS holds {text!r}: write class=score, with a score in [0, 1], such "
                                   "as car=0.3")
        if name not in labels:
            several = "" if "=" not in name else ": give each class a word (or an element) of its own"
            raise config.UserError(f"CLASS_THRESHOLDS holds {text!r}, but the model has no class {name!r}"
                                   f"{several or f': it has {system.listed(labels, 20)}'}")
        if name in seen:
            raise config.UserError(f"CLASS_THRESHOLDS names {name!r} twice: leave one of them out")
        seen.add(name)
        found[labels[name]] = score
    return found


def build_model(cfg, device):
    """-> MODEL in eval mode, but for those OF_WEIGHTS: (pixel_values (B, 3, H, W) in [0, 1]) -> transformers' outputs,
    plus `derained` where it has a de-rainer and `rain_stats` where it has a gate. `require` has seen cfg."""
    def vanilla():
        return load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device)

    def derainer():
        name, constant = DERAINERS[cfg.DERAIN]
        if name:
            model, kind = load_derainer(name, getattr(cfg, constant), constant=constant), cfg.DERAIN.partition("+")[0]
            if name != kind:
                require_arch(model.derainer, kind, f"DERAIN = '{cfg.DERAIN}': the de-rainer of {constant} = "
                                                   f"'{cfg.REFINER_DIR}'")
            return model
        require_trained_scale(cfg.SPDNET_MODEL_PATH, cfg.DERAIN_SCALE)
        return load_spdnet(cfg.SPDNET_MODEL_PATH, constant=constant)

    def spdnet():
        return RainRobustRTDETR(derainer(), load_rtdetr(cfg.RTDETR_MODEL_NAME), derain_scale=cfg.DERAIN_SCALE
                                ).to(device)

    def conditional():
        if cfg.PIPELINE_DIR:
            return ConditionalRainRobustRTDETR.from_pretrained(cfg.PIPELINE_DIR, device, constant="PIPELINE_DIR")
        rain_detector, rtdetr = load_rain_detector(cfg.RAIN_DETECTOR_PATH), load_rtdetr(cfg.RTDETR_MODEL_NAME)
        spdnet, rainy = ((derainer(), None) if cfg.RAINY_BRANCH == "spdnet" else
                         (None, load_rainy_detector(cfg.RAINY_BRANCH, base=rtdetr)))
        return ConditionalRainRobustRTDETR(rain_detector, spdnet, rtdetr, cfg.RAIN_THRESHOLD, "hard",
                                           cfg.DERAIN_SCALE, rainy).to(device)

    def feature():
        return FeatureDerainRTDETR.from_pretrained(cfg.FEATURE_MODEL_DIR, device, "FEATURE_MODEL_DIR")

    builders = {"conditional": conditional, "spdnet": spdnet, "feature": feature, "vanilla": vanilla}
    return builders[cfg.MODEL]().eval()
