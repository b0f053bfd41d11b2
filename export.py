"""Export what the trainings wrote: ONNX (float32, float16, INT8), OpenVINO and torch.export files, each checked.

    python export.py --demo
    python export.py --COCO_DIR ./dataset/coco --FORMATS onnx onnx-int8 --RAIN_DETECTOR_PATH rain_detector_best.pt

A model is written for every constant of a model that is not "". Every file answers real images as PyTorch does, or it
is refused; with COCO_DIR it also has to keep its share of the mAP. Writes OUTPUT_DIR/<model>.onnx, <model>_fp16.onnx,
<model>_int8.onnx, <model>.xml and .bin, <model>.pt2, and manifest.json: what goes in and comes out of each, and how
rain detector, rainy and clean detector make a pipeline. docs/export.md: how to run them without this project.
"""

import math
import shutil
import tempfile
from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

from rfdetr import detr, weights
from utils import config, datasets, feature_derain, processes, report, system
from utils.conditional_model import ConditionalRainRobustRTDETR, learnt_sizes, require_same_outputs
from utils.datasets import loaders, presets
from utils.datasets.annotations import read_annotations
from utils.datasets.layouts import find_split
from utils.datasets.samples import evenly, images_below, images_by_name
from utils.demo.coco import ensure_demo
from utils.evaluation import comparison
from utils.evaluation.coco import detection_scores
from utils.evaluation.image_quality import psnr
from utils.inference import deployable, exported, formats
from utils.integrated_model import RainRobustRTDETR, require_scale, require_trained_scale, trained_scale
from utils.networks import adapter, onnx_file
from utils.networks.rain_detector import load_rain_detector
from utils.networks.rtdetr import load_rtdetr, require_size
from utils.networks.spdnet import load_spdnet
from utils.training.plan import not_negative

# --- models: "" leaves one out -------------------------------------------------------------------------------------
RTDETR_MODEL_NAME: str | None = "PekingU/rtdetr_r18vd"  # the plain detector: hub id or folder
MODEL_NAME: str | None = "./outputs_feature_derain/model"  # from Training_FeatureDerain.py
SPDNET_MODEL_PATH: str | None = ""      # in front of RTDETR_MODEL_NAME, from Training_SPDNet_Adaptation.py
DERAIN_SCALE = 1.0                      # of an SPDNet in front of the detector, as in its training
ADAPTER_PATH: str | None = ""           # rain.safetensors of Training_WeatherAdapter.py, folded into RTDETR_MODEL_NAME
RAINY_DETECTOR_NAME: str | None = ""    # an RT-DETR fine-tuned on rain or fog by Training_RTDETR.py: hub id or folder
RAIN_DETECTOR_PATH: str | None = ""     # from Training_RainDetector.py
RAIN_THRESHOLD: float | None = None     # an image is rainy from this probability on; None: the rain detector's own
RAINY_MODEL: str | None = ""            # of manifest.json's pipeline: specialist (RAINY_DETECTOR_NAME), adapter,
                                        # spdnet_rtdetr or feature_derain, "": the first of them that is written; or
                                        # derainer_rtdetr: DERAIN_MODEL_PATH in front of RTDETR_MODEL_NAME
PIPELINE_DIR: str | None = ""           # folder pipeline/ of Training_Conditional.py: three files of its own
RFDETR_PATH: str | None = ""            # checkpoint of the RF-DETR scripts, with its mask head where it has one
DERAIN = "unet"                         # what DERAIN_MODEL_PATH holds: spdnet, unet, nafnet
DERAIN_MODEL_PATH: str | None = ""      # a de-rainer alone, for images of any size
REFINER_DIR: str | None = ""            # refiner/ of train_diffusion_refiner.py, with its de-rainer in one file
BASE_LICENCE: str | None = ""           # of the weights of REFINER_DIR's base, where its folder's README.md states none

# --- files ---------------------------------------------------------------------------------------------------------
IMAGE_SIZE = 640                        # side of the square input, fixed in the files; RF-DETR has its own, and a
                                        # de-rainer's file takes any: it is checked on so much of an image
FORMATS = ("onnx", "onnx-fp16", "onnx-int8", "openvino", "openvino-int8", "torch.export")  # which files to write
INT8_KEPT = ()                          # modules that INT8 leaves in float32 where it loses too much: ("backbone",)
OPSET = 18                              # of ONNX; 18 or newer
OUTPUT_DIR = "./outputs_export"

# --- checks --------------------------------------------------------------------------------------------------------
CALIBRATION_DIR: str | None = ""        # images like yours, for INT8 and the comparison; "": COCO_DIR's training images
CALIBRATION_IMAGES = 64                 # how many of them, spread evenly
CLEAN_DIR: str | None = ""              # CALIBRATION_DIR without rain, equal names: what a de-rainer's file loses in dB
TOLERANCE = 1e-3                        # largest difference from PyTorch's outputs that a float32 file may have
COCO_DIR: str | None = ""               # labelled images (COCO, YOLO or VOC); "": mAP is not measured
PERCENT_DATASET: float = 100            # seeded subset of the validation images, in percent
EVAL_BATCH_SIZE = 4                     # validation batch
LEAST_MAP = 0.97                        # share of PyTorch's mAP that a file must keep; 0 accepts all
LEAST_MAP_RFDETR = 0.99                 # the same of RF-DETR
LEAST_PSNR: float = 45                  # dB between what a de-rainer restores in INT8 and in PyTorch; 0 accepts all

DEMO = {
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "MODEL_NAME": "./demo/outputs_feature_derain/model",
    "ADAPTER_PATH": "./demo/outputs_adapter/rain.safetensors", "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt",
    "RAINY_DETECTOR_NAME": "./assets/demo/rtdetr_specialist",
    "RFDETR_PATH": "./assets/demo/rfdetr_tiny.pth", "IMAGE_SIZE": 160, "COCO_DIR": "./demo/coco",
    "PERCENT_DATASET": 25, "OUTPUT_DIR": "./demo/outputs_export",
}


_RAINY = {  # RAINY_MODEL, and the constant that it comes from
    "specialist": "RAINY_DETECTOR_NAME", "adapter": "ADAPTER_PATH", "spdnet_rtdetr": "SPDNET_MODEL_PATH",
    "feature_derain": "MODEL_NAME", "derainer_rtdetr": "DERAIN_MODEL_PATH",
}
_REDUCED_TOLERANCE = 0.02     # of a rain probability, or of a pixel in [0, 1], in float16
_LEARNT = 0.01                # mAP below which a detector is called untrained
_LEAST_AGREEMENT = 0.8        # of detections, where no COCO_DIR tells the mAP
_JUDGED = 4                   # one of so many images is not calibrated on: a de-rainer's INT8 is judged on these


# --- models --------------------------------------------------------------------------------------------------------

def rfdetr_detector(cfg):
    """-> formats.Model of RFDETR_PATH."""
    model, info = weights.load_detector(cfg.RFDETR_PATH)
    outputs = ["logits", "pred_boxes"] + ["mask_logits"] * (model.mask_head is not None)
    about = {"kind": "detector", "outputs": outputs, "image_size": info["args"]["resolution"],
             "classes": {str(row): name for name, row in info["class_rows"].items()}}
    return formats.Model(detr.Deployable(model), about, {}, cfg.LEAST_MAP_RFDETR,
                         formats.Int8(("Conv", "MatMul"), ("backbone",)))


def build_models(cfg):
    """-> {name: formats.Model} of the constants that are not empty."""
    found, scale = {}, cfg.DERAIN_SCALE
    detector = partial(deployable.detector, image_size=cfg.IMAGE_SIZE, least_map=cfg.LEAST_MAP)
    rain_detector = partial(deployable.rain_detector, image_size=cfg.IMAGE_SIZE)
    base = load_rtdetr(cfg.RTDETR_MODEL_NAME) if cfg.RTDETR_MODEL_NAME else None
    if base:
        found["vanilla"] = detector(base)
    if cfg.MODEL_NAME:
        found["feature_derain"] = detector(feature_derain.FeatureDerainRTDETR.from_pretrained(
            cfg.MODEL_NAME, constant="MODEL_NAME"))
    behind = ["SPDNET_MODEL_PATH", "ADAPTER_PATH"] + ["DERAIN_MODEL_PATH"] * (cfg.RAINY_MODEL == "derainer_rtdetr")
    for constant in behind:
        if getattr(cfg, constant) and not base:
            raise config.UserError(f"{constant} needs the detector that it was trained for: set RTDETR_MODEL_NAME")
    if cfg.SPDNET_MODEL_PATH:
        require_trained_scale(cfg.SPDNET_MODEL_PATH, scale)
        spdnet = load_spdnet(cfg.SPDNET_MODEL_PATH, constant="SPDNET_MODEL_PATH")
        found["spdnet_rtdetr"] = detector(RainRobustRTDETR(spdnet, base, derain_scale=scale), spdnet=True)
    if cfg.ADAPTER_PATH:
        found["adapter"] = detector(adapter.fold(base, cfg.ADAPTER_PATH, "ADAPTER_PATH"))
    if cfg.RAINY_DETECTOR_NAME:
        specialist = load_rtdetr(cfg.RAINY_DETECTOR_NAME, constant="RAINY_DETECTOR_NAME")
        if base:  # the pipeline's clean part
            require_same_outputs(base, specialist, "RAINY_DETECTOR_NAME")
        found["specialist"] = detector(specialist)
    if cfg.RAIN_DETECTOR_PATH:
        found["rain_detector"] = rain_detector(load_rain_detector(cfg.RAIN_DETECTOR_PATH),
                                               threshold=cfg.RAIN_THRESHOLD)
    if cfg.PIPELINE_DIR:
        whole = ConditionalRainRobustRTDETR.from_pretrained(cfg.PIPELINE_DIR, constant="PIPELINE_DIR")
        rainy = whole.rainy_detector or RainRobustRTDETR(whole.derain_module, whole.detection_module,
                                                         derain_scale=whole.derain_scale)
        found |= {"pipeline_gate": rain_detector(whole.rain_detector, threshold=whole.rain_threshold),
                  "pipeline_rainy": detector(rainy, spdnet=whole.rainy_detector is None),
                  "pipeline_clean": detector(whole.detection_module)}
    if cfg.RFDETR_PATH:
        found["rfdetr"] = rfdetr_detector(cfg)
    if cfg.DERAIN_MODEL_PATH:
        found["derainer"] = deployable.derainer(cfg.DERAIN, cfg.DERAIN_MODEL_PATH)
        if cfg.RAINY_MODEL == "derainer_rtdetr":
            scale = trained_scale(cfg.DERAIN_MODEL_PATH)
            if cfg.DERAIN == "spdnet":
                require_trained_scale(cfg.DERAIN_MODEL_PATH, cfg.DERAIN_SCALE)
                scale = cfg.DERAIN_SCALE
            found["derainer_rtdetr"] = detector(
                RainRobustRTDETR(found["derainer"].module, base, derain_scale=scale), spdnet=cfg.DERAIN == "spdnet")
    if cfg.REFINER_DIR:
        found["refiner"] = deployable.refiner(cfg.REFINER_DIR, cfg.BASE_LICENCE)
    if not found:
        raise config.UserError("every constant of a model (RTDETR_MODEL_NAME, MODEL_NAME, ...) is empty: nothing to "
                               "export")
    comparison.note_other_sizes(
        learnt_sizes(cfg, ("RTDETR_MODEL_NAME", "MODEL_NAME", "RAINY_DETECTOR_NAME", "ADAPTER_PATH")), cfg.IMAGE_SIZE)
    for name, model in found.items():
        model.module.eval()
        model.about.update(model=name, input="pixel_values")
    return found


# --- real images ---------------------------------------------------------------------------------------------------

def image_paths(cfg):
    """-> paths of the images to calibrate on and to compare with, [] where no constant names any."""
    if cfg.CALIBRATION_DIR:
        paths = images_below([cfg.CALIBRATION_DIR], "CALIBRATION_DIR")
    elif cfg.COCO_DIR:
        split = find_split(cfg.COCO_DIR, "train", "COCO_DIR")
        paths = [split.folder / image["file_name"] for image in read_annotations(split, masks=False)["images"]]
    else:
        return []
    return evenly(paths, min(cfg.CALIBRATION_IMAGES, len(paths)))


def judged_pairs(cfg, paths):
    """-> (paths to calibrate a de-rainer on, {path that its INT8 is judged on: its clean twin's or None}).

    One image in four is judged alone; where there are fewer, all serve both ends.
    """
    judged = paths[_JUDGED - 1::_JUDGED] or paths
    others = [path for path in paths if path not in judged] or paths
    if not cfg.CLEAN_DIR:
        return others, dict.fromkeys(judged)
    clean = images_by_name(cfg.CLEAN_DIR, "CLEAN_DIR", "It holds the images of CALIBRATION_DIR without rain.")
    names = {path: path.relative_to(cfg.CALIBRATION_DIR).with_suffix("").as_posix() for path in judged}
    if alone := [path for path, name in names.items() if name not in clean]:
        raise config.UserError(f"CLEAN_DIR = '{cfg.CLEAN_DIR}' has no image of the name of {alone[0].as_posix()} and "
                               f"{len(alone) - 1} more of CALIBRATION_DIR: add them, or leave CLEAN_DIR empty")
    return others, {path: clean[name] for path, name in names.items()}


def derainer_pairs(cfg, models, paths):
    """-> `judged_pairs`; ((), {}) where no model is a de-rainer.

    Raises:
        UserError: a CLEAN_DIR that does not fit, before anything is written.
    """
    if not any(model.about["kind"] == "derainer" for model in models.values()):
        if cfg.CLEAN_DIR:
            processes.say("note: CLEAN_DIR has no effect without a de-rainer (DERAIN_MODEL_PATH, REFINER_DIR)")
        return (), {}
    calibrate, judged = judged_pairs(cfg, paths)
    for path, clean in judged.items():
        if clean and datasets.read_image(path).shape != datasets.read_image(clean).shape:
            raise config.UserError(f"CLEAN_DIR: {clean.as_posix()} has another size than {path.as_posix()}")
    return calibrate, judged


def coco_map(cfg, model, predict, cache):
    """-> mAP of a detector on COCO_DIR's validation images, None for other kinds and without COCO_DIR; cache: {size and
    classes: loader}."""
    if not cfg.COCO_DIR or model.about["kind"] != "detector":
        return None
    key = (model.about["image_size"], str(model.about["classes"]))
    if key not in cache:
        labels = {int(label): name for label, name in model.about["classes"].items()}
        data = datasets.CocoDetectionDataset(cfg.COCO_DIR, "val", labels, presets.evaluation(key[0]), domain="clean",
                                             constant="COCO_DIR", percent=cfg.PERCENT_DATASET, unknown="ignore")
        cache[key] = loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, 0)
    return detection_scores(predict, cache[key], torch.device("cpu"), name=model.about["model"])[0]["mAP"]


# --- one file ------------------------------------------------------------------------------------------------------

def restored_quality(cfg, model, run, pairs, cache):
    """What a de-rainer's file does to real images, at their own scale.

    Args:
        run: the file; pairs: {path: clean twin's or None}, of `judged_pairs`; cache: keeps what PyTorch restores.
    Returns:
        {"PSNR": mean dB between the file's and PyTorch's restored images, and with CLEAN_DIR "lost": mean dB against
        the clean twins that the file has less than PyTorch}; {} without images.
    """
    found = []
    for path, clean in pairs.items():
        if path not in cache:
            image = next(formats.unscaled_images([path], cfg.IMAGE_SIZE))
            twin = next(formats.unscaled_images([clean], cfg.IMAGE_SIZE)) if clean else None
            cache[path] = image, formats.answers(model, image).restored, twin
        image, expected, twin = cache[path]
        restored = run(image).restored
        found.append([psnr(restored, expected, 1.0).item()] +
                     ([(psnr(expected, twin, 1.0) - psnr(restored, twin, 1.0)).item()] if clean else []))
    means = torch.tensor(found).mean(0).tolist() if found else []
    return dict(zip(("PSNR", "lost"), means, strict=False))


def check(path, kind, model, inputs, cfg, whole_map, cache, judged=()):
    """Run a file that was written; judged: pairs of `judged_pairs`, for a de-rainer. -> its row of the table; "refused"
    in it says why it must not stay."""
    run = exported.load_exported(path)
    pairs = [(run(one), formats.answers(model, one)) for one in inputs]
    row = {"difference": onnx_file.largest(formats.largest_difference(*pair, model.about) for pair in pairs),
           "refused": ""}
    if not math.isfinite(row["difference"]):  # there are no detections to compare
        return row | {"refused": "answers real images with NaN or infinity: leave the format out"}
    is_detector, reduced = model.about["kind"] == "detector", formats.FORMATS[kind].reduced
    if is_detector:
        row["agreement"] = formats.agreement(*pairs[0])
    row["mAP"] = coco_map(cfg, model, run, cache)
    if model.about["kind"] == "derainer" and reduced and judged:
        row |= restored_quality(cfg, model, run, judged, cache)
    if kind.endswith("int8") and not is_detector:  # single pixels may be far off, a picture must not
        if not row["PSNR"] >= cfg.LEAST_PSNR:
            row["refused"] = (f"restores images {row['PSNR']:.1f} dB from PyTorch's, less than LEAST_PSNR = "
                              f"{cfg.LEAST_PSNR}: leave the format out, or lower LEAST_PSNR")
    elif not reduced or not is_detector:
        limit, name = (_REDUCED_TOLERANCE, "") if reduced else (cfg.TOLERANCE, "TOLERANCE = ")
        if not row["difference"] <= limit:
            row["refused"] = f"differs from PyTorch by {row['difference']:.1e}, more than {name}{limit}"
    elif row["mAP"] is None and row["agreement"] < _LEAST_AGREEMENT:
        row["refused"] = (f"finds {100 * row['agreement']:.0f}% of what PyTorch finds: calibrate on more images like "
                          "yours (CALIBRATION_DIR), or leave the format out")
    if row["mAP"] is not None and row["mAP"] < model.least_map * whole_map:
        constant = "LEAST_MAP_RFDETR" if model.about["model"] == "rfdetr" else "LEAST_MAP"
        keep = ", keep parts of it in float32 (INT8_KEPT)" if kind.endswith("int8") else ""
        remedy = (f"leave the format out{keep}, or lower {constant}" if whole_map >= _LEARNT else
                  "PyTorch's own finds next to nothing in COCO_DIR's validation images, so train the detector first")
        row["refused"] = (f"keeps {row['mAP']:.4f} of {whole_map:.4f} mAP ({100 * row['mAP'] / whole_map:.1f}%), less "
                          f"than {constant} = {model.least_map}: {remedy}")
    return row


@torch.no_grad()
def export(model, name, cfg, paths=(), derained=((), {})):
    """Write one model in every format that suits it.

    Args:
        paths: real images, to calibrate on and to compare with; derained: of these, `derainer_pairs`.
    Returns:
        {format: {"file", "MB", "difference", "agreement" and "mAP" of detectors, "PSNR" and with CLEAN_DIR "lost" of
        de-rainers in float16 and INT8, "refused": "" or why it was deleted}}.
    """
    cache, rows = {}, {}
    whole_map = coco_map(cfg, model, lambda images_: formats.answers(model, images_), cache)
    inputs = formats.batches(model, paths, cfg.IMAGE_SIZE)
    calibrate, judged = derained if model.about["kind"] == "derainer" else (paths, {})
    with config.writing(cfg.OUTPUT_DIR), tempfile.TemporaryDirectory(
            dir=cfg.OUTPUT_DIR, prefix=".", ignore_cleanup_errors=True) as folder:
        write = formats.writers(model, Path(folder), calibrate, cfg.OPSET, cfg.IMAGE_SIZE)
        for kind in cfg.FORMATS:
            path = Path(folder) / f"{name}{formats.FORMATS[kind].ending}"
            if kind in model.without:
                processes.say(f"note: no {path.name}: {model.without[kind]}")
                continue
            with config.writing(Path(cfg.OUTPUT_DIR) / path.name):
                if not path.exists():  # written on the way to another one
                    write[kind](path)
            rows[kind] = check(path, kind, model, inputs, cfg, whole_map, cache, judged)
            parts = formats.parts_of(path)
            rows[kind] |= {"file": path.name, "MB": sum(part.stat().st_size for part in parts) / 2**20,
                           "PyTorch's mAP": whole_map}
            if not rows[kind]["refused"]:
                for part in parts:  # a copy: other formats start from this one
                    with system.written(Path(cfg.OUTPUT_DIR) / part.name, part.suffix) as temporary:
                        shutil.copyfile(part, temporary)
    return rows


# --- all of them ---------------------------------------------------------------------------------------------------

def manifest(models, results, cfg):
    """-> the content of manifest.json: what every file takes and answers, and how the pipeline is put together."""
    files = {row["file"]: models[name].about | {"format": kind, "mAP": row.get("mAP"), "PSNR": row.get("PSNR")}
             for name, rows in results.items() for kind, row in rows.items() if not row["refused"]}
    names = {about["model"] for about in files.values()}
    rainy = cfg.RAINY_MODEL or next((name for name in _RAINY if name in names), "")
    parts = {"gate": "pipeline_gate", "rainy": "pipeline_rainy", "clean": "pipeline_clean"}
    if "pipeline_gate" not in names:
        parts = {"gate": "rain_detector", "rainy": rainy, "clean": "vanilla"}
    content = {"images": "RGB in [0, 1], (B, 3, H, W), stretched to image_size", "files": files}
    if set(parts.values()) <= names:
        content["pipeline"] = parts | {
            "rain_threshold": models[parts["gate"]].about["rain_threshold"],
            "rule": "an image goes to `rainy` where the gate's probability is at least rain_threshold and the answer "
                    "is finite, else to `clean`"}
    return content


def say_gates(cfg, models, content):
    """Say from which probability on the exported rain detectors call an image rainy, and what is in the pipeline of
    `manifest`'s content."""
    for name, model in models.items():
        if model.about["kind"] == "rain detector":
            whose = ("PIPELINE_DIR's" if name == "pipeline_gate" else
                     "the rain detector's own" if cfg.RAIN_THRESHOLD is None else "RAIN_THRESHOLD")
            processes.say(f"{name}: an image is rainy from a probability of {model.about['rain_threshold']:.4g} on "
                          f"({whose})")
    if pipeline := content.get("pipeline"):
        processes.say("manifest.json's pipeline: " + ", ".join(f"{part} {pipeline[part]}" for part in
                                                               ("gate", "rainy", "clean")))


def require_usable(cfg):
    """UserError for constants with which nothing could be written; takes formats out that are named twice, and in the
    demo those whose packages are missing."""
    require_size(cfg.IMAGE_SIZE)
    require_scale(cfg.DERAIN_SCALE)
    for constant in ("TOLERANCE", "LEAST_MAP", "LEAST_MAP_RFDETR", "LEAST_PSNR"):
        not_negative(constant, getattr(cfg, constant))
    if cfg.CALIBRATION_IMAGES < 1:
        raise config.UserError(f"CALIBRATION_IMAGES = {cfg.CALIBRATION_IMAGES}: choose 1 or more, such as 64")
    if cfg.DERAIN == "refiner":
        raise config.UserError("DERAIN = 'refiner': give the refiner's folder as REFINER_DIR, and another DERAIN")
    if cfg.CLEAN_DIR and not cfg.CALIBRATION_DIR:
        raise config.UserError("CLEAN_DIR holds the images of CALIBRATION_DIR without rain, and CALIBRATION_DIR is "
                               "empty: give both, or neither")
    if cfg.RAINY_MODEL and cfg.RAINY_MODEL not in _RAINY:
        raise config.UserError(f"RAINY_MODEL = {cfg.RAINY_MODEL!r}: choose {', '.join(_RAINY)}")
    if not cfg.FORMATS or set(cfg.FORMATS) - formats.FORMATS.keys():
        raise config.UserError(f"FORMATS = {cfg.FORMATS!r}: choose from {', '.join(formats.FORMATS)}")
    cfg.FORMATS = tuple(dict.fromkeys(cfg.FORMATS))
    if any(formats.FORMATS[kind].packages for kind in cfg.FORMATS):
        onnx_file.require_opset(cfg.OPSET, "OPSET")
    missing = {}
    for kind in cfg.FORMATS:
        try:
            onnx_file.require_packages(f"the format '{kind}'", ", or leave it out of FORMATS",
                                       formats.FORMATS[kind].packages)
        except config.UserError as error:
            if not cfg.demo:
                raise
            missing[kind] = str(error).partition(" needs ")[2].partition(",")[0]
    for reason in dict.fromkeys(missing.values()):
        left_out = [kind for kind in missing if missing[kind] == reason]
        processes.say(f"note: no {', '.join(left_out)}, which needs {reason}")
    cfg.FORMATS = tuple(kind for kind in cfg.FORMATS if kind not in missing)
    int8 = [kind for kind in cfg.FORMATS if kind.endswith("int8")]
    if cfg.INT8_KEPT and not int8:
        processes.say("note: INT8_KEPT has no effect without an INT8 format in FORMATS")
    if int8 and not cfg.CALIBRATION_DIR and not cfg.COCO_DIR:
        raise config.UserError(f"CALIBRATION_DIR is empty, and {' and '.join(int8)} {'need' if int8[1:] else 'needs'} "
                               "a folder of images like yours: set it (or COCO_DIR), or leave INT8 out of FORMATS")


def print_table(results, folder):
    """One row per file."""
    rows = []
    for row in (one for kinds in results.values() for one in kinds.values()):
        whole = row["PyTorch's mAP"]
        kept = row["mAP"] / whole if whole and row.get("mAP") else None
        rows.append({"file": row["file"], "difference": f"{row['difference']:.1e}", "MB": f"{row['MB']:.1f}",
                     "agreement": f"{100 * row['agreement']:.0f}%" if "agreement" in row else None,
                     "mAP": row.get("mAP"), "kept": f"{100 * kept:.1f}%" if kept else None,
                     "PSNR": f"{row['PSNR']:.1f}" if "PSNR" in row else None,
                     "lost": f"{row['lost']:.2f}" if "lost" in row else None,
                     "refused": "refused" if row["refused"] else "written"})
    processes.say(report.table(rows, {
        "file": f"in {Path(folder).as_posix()}", "MB": "MB", "difference": "largest difference",
        "agreement": "same boxes", "mAP": "mAP", "kept": "of PyTorch's",
        "PSNR": "dB from PyTorch's", "lost": "dB lost", "refused": ""}))


def main(**overrides):
    """Export; -> {model: {format: row of `export`}}.

    Raises:
        UserError: what cannot start; and at the end, after everything else was written, where files were refused.
    """
    cfg = config.resolve(globals(), overrides)
    processes.require_one("export.py")
    require_usable(cfg)
    if cfg.demo:
        for constant in comparison.leave_out_missing(cfg, DEMO, ("MODEL_NAME", "ADAPTER_PATH")):
            processes.say(f"note: {constant} = '{DEMO[constant]}' is left out: its training's --demo writes it")
    models = deployable.keep_in_float32(build_models(cfg), cfg.INT8_KEPT)
    if cfg.RAINY_MODEL and cfg.RAINY_MODEL not in models:
        raise config.UserError(f"RAINY_MODEL = '{cfg.RAINY_MODEL}' needs {_RAINY[cfg.RAINY_MODEL]}, which is empty; "
                               f"written are {', '.join(models)}")
    if cfg.demo and cfg.COCO_DIR == DEMO["COCO_DIR"]:
        ensure_demo()
    paths = image_paths(cfg)
    if not paths:
        processes.say("note: no CALIBRATION_DIR and no COCO_DIR: files are compared with PyTorch on noise alone")
    names = [f"{name}{formats.FORMATS[kind].ending}" for name in models for kind in cfg.FORMATS]
    beside = [Path(name).with_suffix(".bin").name if name.endswith(".xml") else f"{name}.data" for name in names
              if name.endswith((".xml", ".onnx"))]
    derained = derainer_pairs(cfg, models, paths)
    report.output_folder(cfg.OUTPUT_DIR, [*names, *beside, "manifest.json"])
    results = {}
    for name, model in models.items():
        processes.say(f"{name} ...")
        results[name] = export(model, name, cfg, paths, derained)
    print_table(results, cfg.OUTPUT_DIR)
    content = manifest(models, results, cfg)
    report.write_json(Path(cfg.OUTPUT_DIR) / "manifest.json", content)
    say_gates(cfg, models, content)
    rows = [row for kinds in results.values() for row in kinds.values()]
    refused = [f"{row['file']} {row['refused']}" for row in rows if row["refused"]]
    if refused:
        raise config.UserError(f"{len(refused)} file(s) refused and deleted: {system.listed(refused, 5, '; ')}")
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
