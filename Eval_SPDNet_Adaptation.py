"""Compare vanilla RT-DETR, original SPDNet + RT-DETR and adapted SPDNet + RT-DETR on rainy and on clean images.

    python Eval_SPDNet_Adaptation.py --demo
    python Eval_SPDNet_Adaptation.py

Prints COCO scores, the share of the rain gap that is won back, the cost on clean images, and latencies; writes
OUTPUT_DIR/results.json (with constants, commit, versions), report.html (curves, confusions, calibration, the worst
mistakes), detections.png and latency_map.png.
"""

from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

from utils import config, datasets, freeze, integrated_model, processes, report, visualize
from utils.datasets import loaders, presets
from utils.datasets.samples import evenly
from utils.demo.coco import ensure_demo
from utils.evaluation import before_after, comparison, report_page
from utils.evaluation import coco as coco_evaluation
from utils.networks.rtdetr import id2label_of, require_queries, require_size, trained_size

# --- data ---------------------------------------------------------------------------------------------------------
COCO_DIR = "./dataset/coco"             # clean images: COCO, YOLO or Pascal VOC, see docs/data.md
COCO_RAIN_DIR = "./dataset/coco_rain"   # rainy images in the same layout: the twin, or real rain with its own labels
PERCENT_DATASET: float = 100            # seeded subset of the validation images, in percent
IMAGE_SIZE = 640                        # side of the square input, as in training
PREFIXES = ()                           # also score rainy images by file-name prefix, e.g. ("rain_", "mist_", "fog_")
UNKNOWN_CATEGORIES = "error"            # "ignore" leaves categories out that the detector does not know

# --- models -------------------------------------------------------------------------------------------------------
DERAINER = "spdnet"                     # what was adapted: spdnet, or unet, nafnet
SPDNET_MODEL_PATH = "./model_spa.pt"    # the original SPDNet, before adaptation
DERAIN_MODEL_PATH = "./outputs_unet/best.pt"  # the original of DERAINER unet and nafnet
ADAPTED_MODEL_PATH = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # from Training_SPDNet_Adaptation.py
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # the detector of the training run
DERAIN_SCALE = 1.0                      # 0.5: SPDNet sees half the size, a quarter of the cost

# --- evaluation ---------------------------------------------------------------------------------------------------
EVAL_BATCH_SIZE = 4                     # validation batch, and the batch N of the latencies
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
PICTURES = 6                            # images on the page of detections
SCORE_THRESHOLD = 0.4                   # boxes drawn on it
SEED = 0                                # of the subset
OUTPUT_DIR = "./outputs_spdnet_adaptation/eval"

DEMO = {
    "COCO_DIR": "./demo/coco", "COCO_RAIN_DIR": "./demo/coco_rain", "IMAGE_SIZE": 160,
    "SPDNET_MODEL_PATH": "./assets/demo/spdnet.pt", "DERAIN_MODEL_PATH": "./assets/demo/nafnet.pt",
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr",
    "ADAPTED_MODEL_PATH": "./demo/outputs_spdnet_adaptation/spdnet_adapted.pt",
    "OUTPUT_DIR": "./demo/outputs_spdnet_adaptation/eval", "DERAIN_SCALE": 0.5, "EVAL_BATCH_SIZE": 8,
    "DATALOADER_WORKERS": 0,
}
_FILES = ("results.json", "report.html", "detections.png", "latency_map.png")
_VANILLA = before_after.VANILLA


def build_models(cfg, device):
    """-> {name: model}, each (images in [0, 1]) -> outputs with logits and pred_boxes; one frozen detector for all."""
    if not Path(cfg.ADAPTED_MODEL_PATH).is_file():
        raise config.UserError(f"ADAPTED_MODEL_PATH = '{cfg.ADAPTED_MODEL_PATH}' is no file: run python "
                               f"Training_SPDNet_Adaptation.py{' --demo' if cfg.demo else ''} first")
    integrated_model.require_trained_scale(cfg.ADAPTED_MODEL_PATH, cfg.DERAIN_SCALE)
    constant, path = integrated_model.weights_of(cfg)
    original = integrated_model.load_integrated_model(
        path, cfg.RTDETR_MODEL_NAME, num_labels=None, device=device, freeze_derain=True,
        freeze_detection=True, derain_scale=cfg.DERAIN_SCALE, derainer=cfg.DERAINER, constant=constant)
    adapted = integrated_model.RainRobustRTDETR(
        freeze.freeze(integrated_model.read_derainer(cfg.DERAINER, cfg.ADAPTED_MODEL_PATH, "ADAPTED_MODEL_PATH")),
        original.detection_module, derain_scale=cfg.DERAIN_SCALE).to(device)
    rows = before_after.labels(integrated_model.DERAINERS[cfg.DERAINER])
    return {_VANILLA: original.detection_module.eval(), rows[0]: original.eval(), rows[1]: adapted.eval()}


def build_loaders(cfg, id2label):
    """-> {"rainy", "clean": validation loader}."""
    datasets.require_clean_and_rainy(cfg.COCO_DIR, cfg.COCO_RAIN_DIR)
    found = datasets.clean_rainy_validation(
        cfg.COCO_DIR, cfg.COCO_RAIN_DIR, id2label, presets.evaluation(cfg.IMAGE_SIZE), domains=("rainy", "clean"),
        percent=cfg.PERCENT_DATASET, seed=cfg.SEED, unknown=cfg.UNKNOWN_CATEGORIES)
    return {domain: loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
            for domain, data in found.items()}


@torch.no_grad()
def draw_page(cfg, models, dataset, device, id2label, path):
    """Page: rainy with vanilla | original's image | adapted's image, each with its detections | ground truth."""
    scale = visualize.enlargement(cfg.IMAGE_SIZE)
    rows = []
    for sample in evenly(dataset, cfg.PICTURES):
        batch = datasets.to_device(datasets.collate([sample]), device)
        cells = []
        for name, model in models.items():
            outputs = model(pixel_values=batch["images"])
            images = batch["images"] if name == _VANILLA else outputs.derained
            cells += visualize.draw_detections(images, outputs, id2label, cfg.SCORE_THRESHOLD, scale)
        cells.append(visualize.draw_truth(batch["images"][0], sample, id2label, scale))
        rows.append(cells)
    visualize.grid(rows, [*models, "ground truth"], path)


def print_summary(rows, latency, twins):
    """Three lines of scores, the table, the gap, the cost on clean images."""
    score = {(row["model"], row["images"]): row["mAP"] for row in rows}
    derained = [name for name in latency if name != _VANILLA]
    vanilla = score[_VANILLA, "rainy"]
    print("\nRainy images:")
    print(f"{_VANILLA + ' mAP:':<28}{vanilla:.4f}")
    for name in derained:
        change = before_after.gain(score[name, "rainy"], vanilla)
        print(f"{name + ':':<28}{score[name, 'rainy']:.4f}  {f'({change})' if change else ''}")
    headings = {"model": "model", "images": "images", "count": "n"} | {name: name for name in coco_evaluation.METRICS}
    print("\n" + report.table(rows, headings))
    for name in derained:
        share = comparison.gap_won_back(rows, name, _VANILLA, twins)
        won = (f"{100 * share:.1f}% of the rain gap won back" if share is not None else
               "rain costs vanilla nothing here (is COCO_RAIN_DIR the rainy one?)" if twins else
               "no rain gap, the clean images are other ones")
        cost = score[name, "clean"] - score[_VANILLA, "clean"]
        print(f"{name}: {won}; clean images that pass through it: {cost:+.4f} mAP")
    print("\n" + report.table([{"model": name} | values for name, values in latency.items()],
                              {"model": "ms per image"} | {key: key for key in latency[_VANILLA]}))


def main(**overrides):
    """Evaluate; -> {"scores": rows, "gap_won_back": {model: share}, "milliseconds_per_image": {...},
    "details": of report_page}."""
    cfg = config.resolve(globals(), overrides)
    require_size(cfg.IMAGE_SIZE)
    comparison.require_page(cfg)
    integrated_model.require_scale(cfg.DERAIN_SCALE)
    integrated_model.require_derainer(cfg.DERAINER)
    if cfg.demo:
        ensure_demo()
    comparison.note_same(cfg, (integrated_model.weights_of(cfg)[0], "ADAPTED_MODEL_PATH"))
    device = processes.announced_device()
    models = build_models(cfg, device)
    comparison.note_other_sizes({"RTDETR_MODEL_NAME": trained_size(cfg.RTDETR_MODEL_NAME),
                                 "ADAPTED_MODEL_PATH": integrated_model.trained_size(cfg.ADAPTED_MODEL_PATH)},
                                cfg.IMAGE_SIZE)
    id2label = id2label_of(models[_VANILLA])
    require_queries(models[_VANILLA], cfg.IMAGE_SIZE)
    found = build_loaders(cfg, id2label)
    rainy, clean = found["rainy"].dataset, found["clean"].dataset
    parts = comparison.ids_by_prefix(rainy, cfg.PREFIXES)
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # once all else is found: a typo moves no earlier results
    page = report_page.Page("SPDNet adaptation")
    rows = (comparison.evaluate_models(models, found["rainy"], device, parts, page)
            + comparison.evaluate_models(models, found["clean"], device, {}, page))
    twins = comparison.are_twins(rainy, clean)
    latency = comparison.milliseconds_per_image(models, cfg.IMAGE_SIZE, (1, cfg.EVAL_BATCH_SIZE), device)
    won_back = {name: comparison.gap_won_back(rows, name, _VANILLA, twins) for name in models if name != _VANILLA}
    results = {"scores": rows, "gap_won_back": won_back, "milliseconds_per_image": latency, "details": page.numbers}
    if processes.is_main():
        print_summary(rows, latency, twins)
        report.write_results(folder / "results.json", cfg.as_dict(), results)
        draw_page(cfg, models, rainy, device, id2label, folder / "detections.png")
        page.add_sliders(models, rainy, device, id2label, cfg.SCORE_THRESHOLD)
        page.write(folder, cfg.as_dict())
        on_rain = {row["model"]: row["mAP"] for row in rows if row["images"] == "rainy"}
        visualize.cost_against_accuracy({name: (latency[name]["batch 1"], on_rain[name]) for name in models},
                                        folder / "latency_map.png", "ms per image, batch 1", "mAP on rainy images")
        print(f"\nwritten: {', '.join([(folder / _FILES[0]).as_posix(), *_FILES[1:]])}")
    return results


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
