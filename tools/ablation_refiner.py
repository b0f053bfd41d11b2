"""What does a refiner win, and was diffusion needed for it? Modes and settings at equal CPU time, over several seeds.

    python train_unet_derain.py --demo
    python -m tools.ablation_refiner

Runs train_diffusion_refiner.py --demo with the constants of each variant, on the de-rainer's validation part or, with
FOLDS, on its training part (the folds' networks are trained once). How long a step takes is measured first, and as many
are taken as fit into BUDGET. Scored on the de-rainer's test pairs, which chose nothing, and by what the demo's detector
finds behind each in rain. Finished runs are kept in OUTPUT_DIR.
"""

import gc
import os
import time
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch

import train_diffusion_refiner as Training
from tools.ablation_spdnet_adaptation import cpu_seconds, once, place_of, require_known, spread
from utils import config, processes, report
from utils.demo.coco import ensure_demo
from utils.evaluation import behind_derainer
from utils.networks import derainers

_ROOT = Path(__file__).resolve().parent.parent

FOLDS = 0                               # as in train_diffusion_refiner.py
BUDGET = 200.0                          # seconds of CPU time of a training's steps
SEEDS = (0, 1, 2)                       # each run is repeated with these
VARIANTS = ("one_step", "one_step, no skips", "sample", "pixel", "one_step, locked", "one_step, attention")
LABELED_RAIN_DIR = "./demo/coco_rain"   # its validation images are detected on behind de-rainer and refiner
RTDETR_MODEL_NAME = "./assets/demo/rtdetr"
IMAGE_SIZE = 160                        # RT-DETR's square input
OUTPUT_DIR = "./demo/ablation_refiner"  # a folder per run, and results.json

_EPOCHS = 3  # the validation at each one's end costs time too
_VARIANTS = {
    "one_step": {},
    "one_step, no skips": {"SKIPS": False},
    "one_step, attention": {"LORA_TARGETS": Training.refiners.ATTENTION},
    "one_step, locked": {"LOCK_SIGMA": 4.0},
    "sample": {"MODE": "sample"},
    "pixel": {"MODE": "pixel"},
}


def seconds_per_batch(cfg, device):
    """-> seconds of CPU time of one training step."""
    model = Training.build_refiner(cfg, device).train()
    weights = Training.build_plan(cfg).loss_weights
    shape = (cfg.BATCH_SIZE, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE)
    batch = {"images": torch.rand(shape, device=device), "twins": torch.rand(shape, device=device)}

    def step():
        losses = Training.compute_losses(model, batch, weights)
        sum(weights[name] * value for name, value in losses.items()).backward()
    return cpu_seconds(step)


def run(variant, seed, folder, cfg, device):
    """Train one variant. -> {"variant", "seed", "derained", "refined": scores on test pairs, "blend", "map", "steps"}.
    """
    settings = _VARIANTS[variant] | {
        "demo": True, "SEED": seed, "OUTPUT_DIR": (folder / "run").as_posix(), "FOLDS": cfg.FOLDS,
        "NUM_EPOCHS": _EPOCHS, "CACHE_DIR": (Path(cfg.OUTPUT_DIR) / "data").as_posix(), "EARLY_STOPPING_PATIENCE": 0}
    resolved = config.resolve(vars(Training), settings)
    pairs = len(Training.build_data(resolved, device)["train"])  # makes what is missing, outside of the measured time
    steps = round(cfg.BUDGET / seconds_per_batch(resolved, device))
    epochs = max(_EPOCHS, round(steps * resolved.BATCH_SIZE / pairs))
    begin = time.process_time()
    result = Training.main(**settings | {"NUM_EPOCHS": epochs, "PAIRS_PER_EPOCH": min(
        pairs, max(1, steps // epochs) * resolved.BATCH_SIZE)})
    seconds = time.process_time() - begin
    gc.collect()
    model = derainers.load_derainer("refiner", folder / "run" / "refiner", device)
    detector = detector_of(cfg, device)
    scores = {row["images"]: {name: row[name] for name in ("psnr", "ssim", "psnr_y", "ssim_y", "texture")}
              for row in result["test"]}
    return {"variant": variant, "seed": seed, "blend": model.refiner.blend, "steps": steps, "seconds": seconds,
            "map": behind_derainer.rows_behind({"refined": model}, *detector, device, "row")[0]["mAP"]} | {
                name.replace("-", ""): values for name, values in scores.items()}


def detector_of(cfg, device):
    """-> RT-DETR and the loader of its rainy images."""
    rest = {"UNKNOWN_CATEGORIES": "ignore", "EVAL_BATCH_SIZE": 8, "DATALOADER_WORKERS": 0}
    return behind_derainer.labelled_rain(config.Config(**cfg.as_dict() | rest), "IMAGE_SIZE", device)


def main(**overrides):
    """Run what is missing, then print mean and spread over seeds of every variant."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(_ROOT)
    require_known(cfg.VARIANTS, _VARIANTS)
    device, folder, runs = processes.announced_device(), Path(cfg.OUTPUT_DIR), []
    ensure_demo()
    for seed in cfg.SEEDS:
        for variant in cfg.VARIANTS:
            place = place_of(folder, variant, seed)
            settings = _VARIANTS[variant] | {"BUDGET": cfg.BUDGET, "FOLDS": cfg.FOLDS}
            runs.append(once(place / "scores.json", settings,
                             lambda v=variant, s=seed, p=place: run(v, s, p, cfg, device)))
    network = Training.DEMO["DERAIN_MODEL_PATH"]
    alone = once(folder / "derainer.json", {"network": network}, lambda: behind_derainer.rows_behind(
        {"derained": derainers.load_trained(network, device)}, *detector_of(cfg, device), device, "row")[0])
    rows = [{"variant": "de-rainer alone", "map": round(alone["mAP"], 4)}
            | {metric: round(runs[0]["derained"][metric], 4) for metric in ("psnr", "ssim", "texture")}]
    for variant in cfg.VARIANTS:
        mine = [r for r in runs if r["variant"] == variant]
        gains = [r["refined"]["psnr"] - r["derained"]["psnr"] for r in mine]
        rows.append({"variant": variant, "gain": spread(gains), "map": spread([r["map"] for r in mine]),
                     "blend": f"{np.mean([r['blend'] for r in mine]):.2f}",
                     "steps": round(np.mean([r["steps"] for r in mine]).item())}
                    | {metric: spread([r["refined"][metric] for r in mine]) for metric in ("psnr", "ssim", "texture")})
    print("\n" + report.table(rows, {"variant": "variant", "psnr": "PSNR (RGB)", "gain": "gain", "ssim": "SSIM (RGB)",
                                     "texture": "texture", "map": "mAP in rain", "blend": "blend", "steps": "steps"}))
    report.write_results(folder / "results.json", cfg.as_dict(), {"runs": runs})


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
