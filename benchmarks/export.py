"""What export.py's files gain over PyTorch on a CPU: goals 1.6x in float32, 3x at 97% of the mAP in INT8 or bfloat16.

    python -m benchmarks.export                                       # R18 at 640, random weights: times alone
    python -m benchmarks.export --RTDETR_MODEL_NAME ./assets/demo/rtdetr --IMAGE_SIZE 160 --COCO_DIR ./demo/coco
    python -m benchmarks.export --ARCHITECTURE None --RFDETR_PATH ./assets/demo/rfdetr_tiny.pth --COCO_DIR ./demo/coco
    python -m benchmarks.export --EXPORTED_DIR ./demo/outputs_export --IMAGE_SIZE 160  # files of export.py

Every file of a model takes turns with PyTorch float32, all with the same number of threads, so that the ratios survive
a noisy machine. bfloat16 is OpenVINO's, asked for when the same file is opened.
"""

import tempfile
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from PIL import Image

import export
from utils import config, processes, report
from utils.evaluation import latency
from utils.inference import deployable, exported, formats
from utils.networks import onnx_file
from utils.networks.rtdetr import new_rtdetr

RTDETR_MODEL_NAME: str | None = ""      # folder of a trained RT-DETR; "": ARCHITECTURE with random weights
ARCHITECTURE: str | None = "r18"        # of the random one: r18, r34, r50 or tiny; "": none
RFDETR_PATH: str | None = ""            # checkpoint of an RF-DETR
IMAGE_SIZE = 640                        # side of RT-DETR's square
COCO_DIR: str | None = ""               # also measure the mAP on its validation images
PERCENT_DATASET: float = 100            # of them, in percent
CALIBRATION_DIR: str | None = ""        # images for INT8; "": COCO_DIR's training images, or noise
EXPORTED_DIR: str | None = ""           # OUTPUT_DIR of export.py: the times of all its files, and nothing else
BATCH = 1                               # images per call
ROUNDS = 9                              # measurements per file, after two of warm-up
ROWS = ("onnx", "onnx-int8", "openvino", "openvino bfloat16", "openvino-int8", "openvino-int8 bfloat16",
        "torch.export")                 # of FORMATS of export.py, with OpenVINO's precision


def models_of(cfg, export_cfg):
    """-> {name: formats.Model}."""
    found = export.build_models(export_cfg) if cfg.RTDETR_MODEL_NAME or cfg.RFDETR_PATH else {}
    if cfg.ARCHITECTURE and not cfg.RTDETR_MODEL_NAME:
        torch.manual_seed(0)
        random = new_rtdetr(cfg.ARCHITECTURE, {i: str(i) for i in range(80)}, train_backbone_norms=False).eval()
        name = f"{cfg.ARCHITECTURE}_random"
        found[name] = deployable.detector(random, export_cfg.IMAGE_SIZE, export_cfg.LEAST_MAP)
        found[name].about.update(model=name, input="pixel_values")
    return found


def noise(folder, side):
    """-> paths of a few images to calibrate random weights on."""
    generator, paths = np.random.default_rng(0), [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return paths


@torch.no_grad()
def measure(model, folder, paths, cfg, export_cfg):
    """-> {row: {"ms", "speed": times as fast as PyTorch, "MB", "mAP" or None}} of a model; PyTorch float32 first."""
    side = model.about["image_size"]
    write = formats.writers(model, folder, paths, export_cfg.OPSET)
    calls, sizes, scores, cache = {"PyTorch float32": model.module}, {}, {}, {}
    for row in cfg.ROWS:
        kind, _, precision = row.partition(" ")
        path = folder / f"{model.about['model']}{formats.FORMATS[kind].ending}"
        if not path.exists():
            write[kind](path)
        calls[row] = exported.load_exported(path, torch.get_num_threads(), precision or "float32")
        sizes[row] = sum(part.stat().st_size for part in formats.parts_of(path)) / 2**20
    for row, call in calls.items():
        predict = call if row in sizes else lambda images: formats.answers(model, images)
        random = model.about["model"].endswith("_random")
        scores[row] = None if random else export.coco_map(export_cfg, model, predict, cache)
    times = latency.latencies(calls, torch.rand(cfg.BATCH, 3, side, side), repeats=cfg.ROUNDS)
    return {row: {"ms": times[row], "speed": times["PyTorch float32"] / times[row], "MB": sizes.get(row),
                  "mAP": scores[row]} for row in calls}


@torch.no_grad()
def times_of_files(cfg):
    """-> {file of EXPORTED_DIR: ms per batch}; all files of a model take turns. De-rainers see IMAGE_SIZE."""
    folder = Path(cfg.EXPORTED_DIR)
    names = sorted(path.name for path in folder.glob("*") if path.suffix in {".onnx", ".xml", ".pt2"})
    if not names:
        raise config.UserError(f"EXPORTED_DIR = '{cfg.EXPORTED_DIR}' holds no file of export.py")
    times = {}
    for model in dict.fromkeys(Path(name).stem.removesuffix("_fp16").removesuffix("_int8") for name in names):
        calls = {name: exported.load_exported(folder / name, torch.get_num_threads()) for name in names
                 if Path(name).stem in (model, f"{model}_fp16", f"{model}_int8")}
        side = next(iter(calls.values())).about.get("image_size") or cfg.IMAGE_SIZE
        times |= latency.latencies(calls, torch.rand(cfg.BATCH, 3, side, side), repeats=cfg.ROUNDS)
    processes.say(f"{torch.get_num_threads()} thread(s), batch {cfg.BATCH}, median of {cfg.ROUNDS}")
    print(report.table([{"file": name, "ms": f"{value:.1f}"} for name, value in times.items()],
                       {"file": "file", "ms": "ms"}))
    return times


def main(**overrides):
    """-> {model: {row: numbers of `measure`}}, or with EXPORTED_DIR what `times_of_files` gives."""
    cfg = config.resolve(globals(), overrides)
    onnx_file.require_packages("this benchmark", names=("onnx", "onnxscript", "onnxruntime", "openvino"))
    if cfg.EXPORTED_DIR:
        return times_of_files(cfg)
    shared = {name: getattr(cfg, name) for name in ("RTDETR_MODEL_NAME", "RFDETR_PATH", "IMAGE_SIZE", "COCO_DIR",
                                                    "PERCENT_DATASET", "CALIBRATION_DIR")}
    export_cfg = config.resolve(vars(export), shared | {"MODEL_NAME": ""})
    results = {}
    for name, model in models_of(cfg, export_cfg).items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            paths = export.image_paths(export_cfg) or noise(Path(folder), model.about["image_size"])
            results[name] = measure(model, Path(folder), paths, cfg, export_cfg)
        side = model.about["image_size"]
        processes.say(f"{name}: {torch.get_num_threads()} thread(s), batch {cfg.BATCH}, {side} x {side}, median of "
                      f"{cfg.ROUNDS}")
        best = results[name]["PyTorch float32"]["mAP"]
        rows = [{"row": row, "ms": f"{one['ms']:.1f}", "speed": f"{one['speed']:.2f}", "mAP": one["mAP"],
                 "kept": f"{100 * one['mAP'] / best:.1f}%" if best else None,
                 "MB": one["MB"] and f"{one['MB']:.1f}"} for row, one in results[name].items()]
        print(report.table(rows, {"row": "", "ms": "ms", "speed": "times PyTorch's speed", "MB": "MB", "mAP": "mAP",
                                  "kept": "kept"}))
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
