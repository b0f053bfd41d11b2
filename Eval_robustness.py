"""How well do detectors bear weather? mAP in rain, mist and drops, dark, blur, noise and JPEG, three strengths each.

    python Eval_robustness.py --demo
    python Eval_robustness.py

After Michaelis et al., "Benchmarking Robustness in Object Detection", arXiv 1907.07484: mPC is the mean mAP over
weathers and strengths, rPC its share of the mAP on clean images. Intervals are 95% bootstrap intervals over images; the
one of a difference to the first model is taken on the same images. Writes OUTPUT_DIR/results.json, report.html (curves,
confusions, calibration, the worst mistakes), robustness.md, heat_map.png and examples.png.
"""

import copy

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch

from utils import config, datasets, freeze, integrated_model, processes, report, visualize
from utils.conditional_model import ConditionalRainRobustRTDETR, learnt_size, learnt_sizes
from utils.datasets import loaders, presets
from utils.datasets.fresh_rain import SteadyWeather
from utils.datasets.samples import evenly
from utils.demo.coco import ensure_demo
from utils.evaluation import comparison, intervals, report_page, robustness
from utils.evaluation.coco import detect, entries, ground_truth
from utils.feature_derain import FeatureDerainRTDETR
from utils.networks import adapter, derainers
from utils.networks.rtdetr import load_rtdetr, require_queries, require_size, rtdetr_of
from utils.training.plan import whole
from utils.weather import severity

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
PERCENT_DATASET: float = 10             # seeded subset of the validation images, in percent; 3 passes per weather
IMAGE_SIZE = 640                        # side of the square input, as in training
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know
WEATHER = ("rain", "mist", "drops", "dark", "blur", "noise", "jpeg")  # drawn on the images; also "fog"

# --- models -------------------------------------------------------------------------------------------------------
# {row: (kind, folder, file or hub id)}; the first is what the others are compared with. Kinds: rtdetr (a detector),
# feature (Training_FeatureDerain.py), conditional (pipeline/ of Training_Conditional.py), adapter (rain.safetensors of
# Training_WeatherAdapter.py, folded into RTDETR_MODEL_NAME), or a de-rainer in front of RTDETR_MODEL_NAME: spdnet,
# unet, nafnet, refiner, prenet, ...
MODELS = {
    "Vanilla RT-DETR": ("rtdetr", "PekingU/rtdetr_r18vd"),
    "Adapted SPDNet + RT-DETR": ("spdnet", "./outputs_spdnet_adaptation/spdnet_adapted.pt"),
    "Features de-rained": ("feature", "./outputs_feature_derain/model"),
}
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # the detector behind de-rainers, and that of adapters
DERAIN_SCALE = 1.0                      # 0.5: SPDNet sees half the size, as in its training

# --- evaluation ---------------------------------------------------------------------------------------------------
RESAMPLES = 300                         # of the bootstrap; 0 leaves the intervals out
EVAL_BATCH_SIZE = 8                     # validation batch
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
PICTURES = 2                            # scenes on the page of examples
SEED = 0                                # of the subset, the weather and the resamples
OUTPUT_DIR = "./outputs_robustness"

DEMO = {
    "COCO_DIR": "./demo/coco", "PERCENT_DATASET": 20, "IMAGE_SIZE": 160, "RTDETR_MODEL_NAME": "./assets/demo/rtdetr",
    "MODELS": {"Vanilla RT-DETR": ("rtdetr", "./assets/demo/rtdetr"),
               "Adapted SPDNet + RT-DETR": ("spdnet", "./assets/demo/spdnet_adapted.pt"),
               "Fine-tuned RT-DETR": ("rtdetr", "./assets/demo/rtdetr_rain")},
    "DERAIN_SCALE": 0.5, "RESAMPLES": 100, "DATALOADER_WORKERS": 0, "OUTPUT_DIR": "./demo/outputs_robustness",
}
_FILES = ("results.json", "report.html", "robustness.md", "heat_map.png", "examples.png")
_KINDS = ("rtdetr", "feature", "conditional", "adapter", *derainers.OTHERS, *derainers.NETWORKS)


def check(cfg):
    """UserError for constants that cannot be."""
    require_size(cfg.IMAGE_SIZE)
    integrated_model.require_scale(cfg.DERAIN_SCALE)
    for name, least in (("RESAMPLES", 0), ("PICTURES", 1)):
        whole(least)(name, getattr(cfg, name))
    if not cfg.WEATHER or not set(cfg.WEATHER) <= severity.WEATHERS.keys() or len(set(cfg.WEATHER)) < len(cfg.WEATHER):
        raise config.UserError(f"WEATHER = {cfg.WEATHER!r}: choose some of {', '.join(severity.WEATHERS)}, each once")
    if not cfg.MODELS:
        raise config.UserError("MODELS is empty: name at least one")
    for row, value in cfg.MODELS.items():
        if not isinstance(value, (tuple, list)) or len(value) != 2 or value[0] not in _KINDS:
            raise config.UserError(f"MODELS: {row!r} must be (kind, path), the kind one of {', '.join(_KINDS)}; it is "
                                   f"{value!r}")
        if not all(isinstance(text, str) and text.strip() for text in (row, value[1])):
            raise config.UserError(f"MODELS: {row!r}: {value!r}: the row's name and the path must be text that is not "
                                   "empty")


def build_model(cfg, row, device):
    """-> a model of MODELS in eval mode: (images in [0, 1]) -> outputs with logits and pred_boxes."""
    kind, path = cfg.MODELS[row]
    where = f"MODELS: {row!r}"
    if kind == "rtdetr":
        return freeze.freeze(load_rtdetr(path, device=device, constant=where))
    if kind == "feature":
        return freeze.freeze(FeatureDerainRTDETR.from_pretrained(path, device, where))
    if kind == "conditional":
        return ConditionalRainRobustRTDETR.from_pretrained(path, device, constant=where)
    if kind == "adapter":
        return adapter.fold(load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device), path, where)
    if kind == "spdnet":
        integrated_model.require_trained_scale(path, cfg.DERAIN_SCALE)
    derainer = integrated_model.read_derainer(kind, path, where)
    return integrated_model.RainRobustRTDETR(derainer, load_rtdetr(cfg.RTDETR_MODEL_NAME), True, True,
                                             cfg.DERAIN_SCALE).to(device).eval()


def sizes_of_models(cfg):
    """-> {constant or row of MODELS: side of the images that it has learnt from, None where nothing says it}."""
    behind = {kind for kind, _ in cfg.MODELS.values()} - {"rtdetr", "feature", "conditional"}
    sizes = learnt_sizes(cfg, ("RTDETR_MODEL_NAME",) if behind else ())
    for row, (kind, path) in cfg.MODELS.items():
        where = f"MODELS: {row!r}"
        if kind in ("rtdetr", "feature", "adapter"):
            sizes[where] = learnt_size(path, where)
        elif kind == "spdnet":
            sizes[where] = integrated_model.trained_size(path)
    return sizes


def open_data(cfg, id2label):
    """-> clean validation images."""
    data = datasets.CocoDetectionDataset(
        cfg.COCO_DIR, "val", id2label, presets.evaluation(cfg.IMAGE_SIZE), constant="COCO_DIR", domain="clean",
        percent=cfg.PERCENT_DATASET, seed=cfg.SEED, unknown=cfg.UNKNOWN_CATEGORIES)
    datasets.say_notes(data)
    return data


def in_weather(cfg, data, weather, level):
    """-> the images of `open_data` in one of `conditions`; nothing is read again."""
    if not weather:
        return data
    drawn = copy.copy(data)
    drawn.domain, drawn.fresh_rain = "rainy", SteadyWeather(weather, level, cfg.SEED, cfg.IMAGE_SIZE)
    return drawn


def conditions(cfg):
    """-> [(weather, level), ...], the clean images first."""
    return [robustness.CLEAN] + [(weather, level) for weather in cfg.WEATHER for level in range(len(severity.LEVELS))]


def measure(cfg, models, data, device, page):
    """-> {model: {condition: [intervals.Category, ...]}}; data: of `open_data`; page: report_page.Page."""
    found, truth = {row: {} for row in models}, ground_truth(data.annotations)
    for condition in conditions(cfg):
        drawn = in_weather(cfg, data, *condition)
        loader = loaders.validation_loader(drawn, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
        for row, model in models.items():
            detections = detect(model, loader, device, f"{row}, {robustness.name_of(*condition)}")
            if condition in shown(cfg):
                page.add(row, drawn, None, entries(detections), truth=truth, images=robustness.name_of(*condition))
            found[row][condition] = intervals.matches_of(truth, entries(detections), data.category_of, data.image_ids)
    return found


def shown(cfg):
    """-> the conditions that pages show: clean images, and every weather at its medium strength."""
    return [robustness.CLEAN] + [(weather, 1) for weather in cfg.WEATHER]


@torch.no_grad()
def draw_examples(cfg, data, id2label, path):
    """Page: some scenes in the conditions that are `shown`."""
    sets = [in_weather(cfg, data, *condition) for condition in shown(cfg)]
    scale = visualize.enlargement(cfg.IMAGE_SIZE)
    rows = []
    for index in evenly(range(len(data)), cfg.PICTURES):
        samples = [one[index] for one in sets]
        rows.append([visualize.draw_truth(datasets.to_device(datasets.collate([sample]), "cpu")["images"][0], sample,
                                          id2label, scale) for sample in samples])
    visualize.grid(rows, ["clean", *cfg.WEATHER], path)


def main(**overrides):
    """Evaluate; -> {"table": rows, "scores": {model: {condition: mAP}}, "details": of report_page}."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    if cfg.demo:
        ensure_demo()
    datasets.require_no_rain(cfg.COCO_DIR, ("COCO_DIR", "COCO_RAIN_DIR"))
    device = processes.announced_device()
    models = {row: build_model(cfg, row, device) for row in cfg.MODELS}
    comparison.note_other_sizes(sizes_of_models(cfg), cfg.IMAGE_SIZE)
    id2label = robustness.common_classes(models)
    for model in models.values():
        require_queries(rtdetr_of(model), cfg.IMAGE_SIZE)
    data = open_data(cfg, id2label)
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # once all else is found: a typo moves no earlier results
    page = report_page.Page("Robustness", pictures=2)  # of each kind of mistake: there are many conditions
    matches, images = measure(cfg, models, data, device, page), len(data)
    scores = {row: {condition: intervals.weighted_map(own, np.ones(images)) for condition, own in found.items()}
              for row, found in matches.items()}
    rows = robustness.table(scores, robustness.resampled(matches, images, cfg.RESAMPLES, cfg.SEED))
    result = {"table": rows, "images": images, "scores": {
        row: {robustness.name_of(*condition): value for condition, value in found.items()}
        for row, found in scores.items()}, "details": page.numbers}
    if processes.is_main():
        processes.say("\n" + robustness.shown(rows))
        report.write_results(folder / "results.json", cfg.as_dict(), result)
        robustness.write_markdown(rows, scores, folder / "robustness.md")
        robustness.heat_map(scores, folder / "heat_map.png")
        draw_examples(cfg, data, id2label, folder / "examples.png")
        page.add_sliders(models, in_weather(cfg, data, *shown(cfg)[1]), device, id2label)
        page.write(folder, cfg.as_dict())
        print(f"\nwritten: {', '.join([(folder / _FILES[0]).as_posix(), *_FILES[1:]])}")
    return result


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
