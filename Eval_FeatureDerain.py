"""Compare feature-level de-raining with the plain detector, with SPDNet and with plain fine-tuning on rain.

    python Eval_FeatureDerain.py --demo
    python Eval_FeatureDerain.py
    python Eval_FeatureDerain.py --DATASET mixedrain --MIXEDRAIN_DIR ./dataset/MixedRain

Prints COCO scores, cost and a comparison table; writes OUTPUT_DIR/results.json (with constants, commit,
versions), report.html (curves, confusions, calibration, the worst mistakes), latency_map.png and masks.png (detections,
and where each scale sees rain). Models whose constant is "" or
whose file is not there are left out with a note; the vanilla detector must be there, and the multiscale model unless
its constant is "".
"""

from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

from utils import checkpoint, config, datasets, feature_derain, freeze, integrated_model, processes, report, visualize
from utils.conditional_model import learnt_sizes
from utils.datasets import loaders, mixedrain, presets
from utils.datasets.samples import evenly
from utils.demo.coco import ensure_demo
from utils.evaluation import coco as coco_evaluation
from utils.evaluation import comparison, report_page
from utils.networks.rtdetr import id2label_of, load_rtdetr, require_queries, require_size
from utils.networks.spdnet import load_spdnet

# --- data ---------------------------------------------------------------------------------------------------------
DATASET = "coco_rain"                   # coco_rain (rainy and clean images), or mixedrain (by kind of weather)
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR = "./dataset/coco_rain"   # rainy images in the same layout: the twin, or real rain with its own labels
MIXEDRAIN_DIR = "./dataset/MixedRain"   # images/ and labels.txt, see utils/datasets/mixedrain.py
PERCENT_DATASET: float = 100            # seeded subset of the validation images, in percent
IMAGE_SIZE = 640                        # side of the square input, as in training
PREFIXES = ()                           # also score rainy images by file-name prefix, e.g. ("rain_", "mist_", "fog_")
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- models -------------------------------------------------------------------------------------------------------
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # vanilla: the detector that the training runs started from
MULTISCALE_MODEL_NAME: str | None = "./outputs_feature_derain/model"  # from Training_FeatureDerain.py; "" leaves it out
LIGHTWEIGHT_MODEL_NAME: str | None = "./outputs_feature_derain_lightweight/model"  # of DERAIN_TYPE = "lightweight"
FINETUNED_MODEL_NAME = ""               # the baseline to beat: detector/ of Training_RTDETR.py on the same rainy mix
SPDNET_MODEL_PATH: str | None = "./model_spa.pt"  # the original SPDNet
ADAPTED_MODEL_PATH: str | None = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # from Training_SPDNet_Adaptation.py
DERAIN_SCALE = 1.0                      # of both SPDNets, as they were trained

# --- evaluation ---------------------------------------------------------------------------------------------------
EVAL_BATCH_SIZE = 24                    # validation batch, and the batch N of the latencies
NUM_WORKERS = 4                         # processes that load images; at most the number of cores is used
COMPILE = False                         # True: torch.compile every model first (minutes; on Windows: triton-windows)
PICTURES = 6                            # images on the page of masks
SCORE_THRESHOLD = 0.4                   # boxes drawn on it
SEED = 0                                # of the subset
OUTPUT_DIR = "./outputs_feature_derain/eval"

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "IMAGE_SIZE": 160,
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "MULTISCALE_MODEL_NAME": "./demo/outputs_feature_derain/model",
    "LIGHTWEIGHT_MODEL_NAME": "./demo/outputs_feature_derain_lightweight/model",
    "SPDNET_MODEL_PATH": "./assets/demo/spdnet.pt",
    "ADAPTED_MODEL_PATH": "./assets/demo/spdnet_adapted.pt", "FINETUNED_MODEL_NAME": "./assets/demo/rtdetr_rain",
    "DERAIN_SCALE": 0.5,
    "OUTPUT_DIR": "./demo/outputs_feature_derain/eval", "EVAL_BATCH_SIZE": 8, "NUM_WORKERS": 0,
}
_DATASETS = ("coco_rain", "mixedrain")
_FILES = ("results.json", "report.html", "masks.png", "latency_map.png")
_VANILLA, _MULTISCALE, _LIGHTWEIGHT = "Vanilla RT-DETR", "Feature-Level (Multiscale)", "Feature-Level (Lightweight)"
_ORIGINAL, _ADAPTED, _FINETUNED = "Original SPDNet + RT-DETR", "Adapted SPDNet + RT-DETR", "Fine-tuned RT-DETR"


def build_models(cfg, device):
    """-> {name: model}, each (images in [0, 1]) -> outputs with logits and pred_boxes, in the order of the table."""
    vanilla = freeze.freeze(load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device))
    models = {_VANILLA: vanilla}
    for name, constant in ((_ORIGINAL, "SPDNET_MODEL_PATH"), (_ADAPTED, "ADAPTED_MODEL_PATH")):
        if is_there(cfg, constant, name):
            if name == _ADAPTED:
                integrated_model.require_trained_scale(cfg.ADAPTED_MODEL_PATH, cfg.DERAIN_SCALE)
            spdnet = freeze.freeze(load_spdnet(getattr(cfg, constant), device=device, constant=constant))
            models[name] = integrated_model.RainRobustRTDETR(spdnet, vanilla, derain_scale=cfg.DERAIN_SCALE).to(device)
    for name, kind in ((_MULTISCALE, "multiscale"), (_LIGHTWEIGHT, "lightweight")):
        constant = f"{kind.upper()}_MODEL_NAME"
        if name == _MULTISCALE and getattr(cfg, constant) or is_there(cfg, constant, name):
            models[name] = feature_derain.FeatureDerainRTDETR.from_pretrained(getattr(cfg, constant), device, constant,
                                                                              derain_type=kind)
            require_classes(models[name].rtdetr, vanilla, constant)
    if is_there(cfg, "FINETUNED_MODEL_NAME", _FINETUNED):
        models[_FINETUNED] = load_rtdetr(cfg.FINETUNED_MODEL_NAME, device=device,
                                         constant="FINETUNED_MODEL_NAME")
        require_classes(models[_FINETUNED], vanilla, "FINETUNED_MODEL_NAME")
    return {name: model.eval() for name, model in models.items()}


def note_other_sizes(cfg):
    """Say which of the models that are compared were trained at another IMAGE_SIZE."""
    trained = learnt_sizes(cfg, ("RTDETR_MODEL_NAME", "MULTISCALE_MODEL_NAME", "LIGHTWEIGHT_MODEL_NAME",
                                 "FINETUNED_MODEL_NAME"))
    if cfg.ADAPTED_MODEL_PATH:
        trained["ADAPTED_MODEL_PATH"] = integrated_model.trained_size(cfg.ADAPTED_MODEL_PATH)
    comparison.note_other_sizes(trained, cfg.IMAGE_SIZE)


def is_there(cfg, constant, name):
    """-> whether an optional model can be loaded; says which row is left out otherwise."""
    path = getattr(cfg, constant)
    if path and Path(path).exists():
        return True
    reason = f"'{path}' does not exist" if path else "is empty"
    processes.say(f"note: {constant} {reason}: no row '{name}'")
    return False


def require_classes(rtdetr, vanilla, constant):
    """UserError where a detector's labels mean something else than vanilla's."""
    if id2label_of(rtdetr) != id2label_of(vanilla):
        raise config.UserError(f"{constant}: this detector has other classes than RTDETR_MODEL_NAME; compare detectors "
                               "that were trained on the same classes")


def build_loaders(cfg, id2label):
    """-> {images: validation loader}: "rainy" and "clean", or "mixedrain"."""
    transform = presets.evaluation(cfg.IMAGE_SIZE)
    common = {"percent": cfg.PERCENT_DATASET, "seed": cfg.SEED, "unknown": cfg.UNKNOWN_CATEGORIES}
    if cfg.DATASET == "mixedrain":
        data = mixedrain.MixedRainDataset(cfg.MIXEDRAIN_DIR, id2label, transform, Path(cfg.OUTPUT_DIR) / "mixedrain",
                                          **common)
        datasets.say_notes(data)
        found = {data.domain: data}
    else:
        datasets.require_clean_and_rainy(cfg.COCO_DIR, cfg.COCO_RAIN_DIR)
        found = datasets.clean_rainy_validation(cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, transform,
                                                domains=("rainy", "clean"), **common)
    return {domain: loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.NUM_WORKERS)
            for domain, data in found.items()}


def parts_of(cfg, data):
    """-> {kind of weather: [image id, ...]} of the images to score apart as well."""
    if isinstance(data, mixedrain.MixedRainDataset):
        return data.kinds()
    return comparison.ids_by_prefix(data, cfg.PREFIXES if data.domain == "rainy" else ())


@torch.no_grad()
def measure_cost(cfg, models, latency, device):
    """-> {model: {"parameters", "fps" at batch 1, "memory_mb": peak of a forward at batch N, None without a GPU}}."""
    cost = {}
    for name, model in models.items():
        memory = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            model(torch.rand(cfg.EVAL_BATCH_SIZE, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, device=device))
            own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
            memory = (torch.cuda.max_memory_allocated() - start + own) / 2**20
        cost[name] = {"parameters": freeze.count_parameters(model)[0], "fps": 1000 / latency[name]["batch 1"],
                      "memory_mb": memory}
    return cost


@torch.no_grad()
def draw_page(cfg, models, dataset, device, id2label, path):
    """Page: detections of vanilla and of the feature models, where each scale of the latter sees rain, ground truth."""
    scale = visualize.enlargement(cfg.IMAGE_SIZE)
    features = {name: model for name, model in models.items() if name in (_MULTISCALE, _LIGHTWEIGHT)}
    rows, headings = [], []
    for sample in evenly(dataset, cfg.PICTURES):
        batch = datasets.to_device(datasets.collate([sample]), device)
        side = cfg.IMAGE_SIZE * scale
        cells = {name: visualize.draw_detections(batch["images"], model(batch["images"]), id2label,
                                                 cfg.SCORE_THRESHOLD, scale)[0]
                 for name, model in ({_VANILLA: models[_VANILLA]} | features).items()}
        for name, model in features.items():
            for block, mask in zip(model.derain_module.blocks, model.rain_masks(batch["images"]), strict=True):
                overlay = visualize.to_pil(feature_derain.mask_overlay(batch["images"][0], mask[0]))
                title = f"{name.split('(')[1][:-1].lower()} mask {mask.shape[-1]}x{mask.shape[-1]}"
                cells[f"{title}, blend {block.blend.item():.2f}"] = overlay.resize((side, side))
        cells["ground truth"] = visualize.draw_truth(batch["images"][0], sample, id2label, scale)
        rows.append(list(cells.values()))
        headings = list(cells)
    visualize.grid(rows, headings, path)


def print_summary(rows, latency, cost, won_back, main_images):
    """COCO scores, cost, and the comparison table."""
    headings = {"model": "model", "images": "images", "count": "n"} | {name: name for name in coco_evaluation.METRICS}
    print("\n" + report.table(rows, headings))
    table = [{"model": name} | {key: f"{value:.1f}" for key, value in latency[name].items()}
             | {"fps": f"{values['fps']:.1f}", "parameters": f"{values['parameters']:,}",
                "memory": None if values["memory_mb"] is None else f"{values['memory_mb']:.0f}",
                "gap": None if won_back.get(name) is None else f"{100 * won_back[name]:.1f}%"}
             for name, values in cost.items()]
    print("\n" + report.table(table, {"model": "model"} | {key: f"ms, {key}" for key in latency[_VANILLA]}
                              | {"fps": "FPS", "parameters": "parameters", "memory": "MB (GPU)",
                                 "gap": "rain gap won back"}))
    score = {row["model"]: row["mAP"] for row in rows if row["images"] == main_images}
    base, vanilla = latency[_VANILLA]["batch 1"], score[_VANILLA]
    table = [{"approach": "No De-rain" if name == _VANILLA else name,
              "derain": f"{latency[name]['batch 1'] - base:.1f} ms", "total": f"{latency[name]['batch 1']:.1f} ms",
              "fps": f"{cost[name]['fps']:.1f}",
              "impact": "Baseline" if name == _VANILLA else f"{score[name] - vanilla:+.4f}"
                        + (f" ({100 * (score[name] / vanilla - 1):+.1f}%)" if vanilla > 0 else "")}
             for name in latency]
    print(f"\nPerformance comparison, {main_images} images, batch 1\n" + report.table(
        table, {"approach": "Approach", "derain": "De-rain Time", "total": "Total Time", "fps": "FPS",
                "impact": "mAP Impact"}))


def main(**overrides):
    """Evaluate; -> {"scores": rows, "gap_won_back": {model: share}, "milliseconds_per_image": {...}, "cost": {...},
    "details": of report_page}."""
    cfg = config.resolve(globals(), overrides)
    require_size(cfg.IMAGE_SIZE)
    if cfg.DATASET not in _DATASETS:
        raise config.UserError(f"DATASET = {cfg.DATASET!r}: choose {' or '.join(_DATASETS)}")
    if cfg.NUM_WORKERS < 0:
        raise config.UserError(f"NUM_WORKERS = {cfg.NUM_WORKERS}: choose 0 or more")
    comparison.require_page(cfg)
    integrated_model.require_scale(cfg.DERAIN_SCALE)
    if cfg.demo:
        ensure_demo()
    comparison.note_same(cfg, ("SPDNET_MODEL_PATH", "ADAPTED_MODEL_PATH"),
                         ("RTDETR_MODEL_NAME", "FINETUNED_MODEL_NAME"))
    device = processes.announced_device()
    checkpoint.require_writable(cfg.OUTPUT_DIR)
    if cfg.COMPILE:
        comparison.require_compiler(device)
    models = build_models(cfg, device)
    note_other_sizes(cfg)
    id2label = id2label_of(models[_VANILLA])
    require_queries(models[_VANILLA], cfg.IMAGE_SIZE)
    found = build_loaders(cfg, id2label)
    first = next(iter(found))  # rainy or mixedrain: what latencies and pictures are set against
    parts = {images: parts_of(cfg, loader.dataset) for images, loader in found.items()}
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # once all else is found: a typo moves no earlier results
    fast = {name: torch.compile(model) if cfg.COMPILE else model for name, model in models.items()}
    page = report_page.Page("Feature-level de-raining")
    rows = [row for images, loader in found.items()
            for row in comparison.evaluate_models(fast, loader, device, parts[images], page)]
    twins = "clean" in found and comparison.are_twins(found["rainy"].dataset, found["clean"].dataset)
    latency = comparison.milliseconds_per_image(fast, cfg.IMAGE_SIZE, (1, cfg.EVAL_BATCH_SIZE), device)
    cost = measure_cost(cfg, models, latency, device)
    won_back = {name: comparison.gap_won_back(rows, name, _VANILLA, twins) for name in models if name != _VANILLA}
    results = {"scores": rows, "gap_won_back": won_back, "milliseconds_per_image": latency, "cost": cost,
               "details": page.numbers}
    if processes.is_main():
        print_summary(rows, latency, cost, won_back, first)
        report.write_results(folder / "results.json", cfg.as_dict(), results)
        draw_page(cfg, models, found[first].dataset, device, id2label, folder / "masks.png")
        page.add_sliders(models, found[first].dataset, device, id2label, cfg.SCORE_THRESHOLD)
        page.write(folder, cfg.as_dict())
        score = {row["model"]: row["mAP"] for row in rows if row["images"] == first}
        visualize.cost_against_accuracy({name: (latency[name]["batch 1"], score[name]) for name in models},
                                        folder / "latency_map.png", "ms per image, batch 1", f"mAP on {first} images")
        print(f"\nwritten: {', '.join([(folder / _FILES[0]).as_posix(), *_FILES[1:]])}")
    return results


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
