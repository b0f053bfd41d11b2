"""What does each ingredient of a de-rainer's training bring? Alone and together, at equal CPU time, over several seeds.

    python -m tools.ablation_unet_derain --CLEAR_DIR ./data/Rain100L/train/clean --RAINY_DIR ./data/Rain100L/train/rainy

Runs train_unet_derain.py with the constants of each variant. How long a step takes is measured first, and as many are
taken as fit into BUDGET, so that a slow network or loss takes fewer. Scored on whole images that were not trained on.
Finished runs are kept in OUTPUT_DIR and not repeated; the table covers all that are there. A short budget favours
what learns fast: it says little about EMA or long schedules.
"""

import gc
import os
import time
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch

import train_unet_derain as Training
from tools.ablation_spdnet_adaptation import cpu_seconds, once, place_of, require_known, spread
from utils import config, datasets, processes, report
from utils.datasets import windshield_pairs
from utils.evaluation import image_quality
from utils.images import to_floats
from utils.networks.derainers import load_trained
from utils.networks.tiling import restore

_ROOT = Path(__file__).resolve().parent.parent

CLEAR_DIR = "./data/Rain100L/train/clean"
RAINY_DIR = "./data/Rain100L/train/rainy"
TRAIN_PAIRS = 160                       # with VAL_PAIRS all pairs of Rain100L's training part
VAL_PAIRS = 40                          # scored as whole images after the training
SEQUENCE_SEPARATOR = ""                 # "_" for the demo's windshield pairs: a scene's two panes stay in one part
BUDGET = 100.0                          # seconds of CPU time of a training's steps
SEEDS = (0, 1, 2)                       # each run is repeated with these
VARIANTS = ("as it was", "crops", "cosine", "moving average", "Charbonnier", "PSNR loss", "FFT loss", "NAFNet",
            "together", "together, U-Net", "together, resnet34", "together, progressive crops",
            "together, FFT loss")  # of _VARIANTS below
OUTPUT_DIR = "./demo/ablation_unet_derain"  # a folder per run, and results.json

_EPOCHS = 3  # as many as there are progressive crop sizes; the validation at each one's end costs time too
# VGG's loss is left out everywhere: its weights cannot be downloaded on every machine
_BASE = {"ARCH": "unet", "BASE_WIDTH": 16, "DROPOUT": 0.0, "IMAGE_SIZE": 256, "BATCH_SIZE": 4, "LEARNING_RATE": 1e-3,
         "OPTIMIZER": "adam", "SCHEDULER": "plateau", "L1_WEIGHT": 1.0, "SSIM_WEIGHT": 0.2, "PERCEPTUAL_WEIGHT": 0.0,
         "COLOR_JITTER": 0.1, "PSNR_WEIGHT": 0.0, "CROP_SIZES": (), "BETAS": (0.9, 0.999), "WARMUP_STEPS": 0}
_CROPS = {"CROP_SIZES": (64,), "BATCH_SIZE": 16}
_COSINE = {"OPTIMIZER": "adamw", "BETAS": (0.9, 0.9), "SCHEDULER": "cosine", "WARMUP_STEPS": 20, "LEARNING_RATE": 2e-3}
_NAFNET = {"ARCH": "nafnet", "NAFNET_WIDTH": 24, "NAFNET_ENCODER": (1, 1, 1), "NAFNET_MIDDLE": 3,
           "NAFNET_DECODER": (1, 1, 1), "NAFNET_PATCH": 1}
_PSNR = {"L1_WEIGHT": 0.0, "SSIM_WEIGHT": 0.0, "PSNR_WEIGHT": 1.0}
_TOGETHER = _BASE | _CROPS | _COSINE | _NAFNET | _PSNR | {"COLOR_JITTER": 0.0, "LEARNING_RATE": 4e-3}
_VARIANTS = {
    "as it was": _BASE,
    "crops": _BASE | _CROPS,
    "cosine": _BASE | _COSINE,  # with AdamW and a warm-up
    "moving average": _BASE | {"EMA_DECAY": 0.99},
    "Charbonnier": _BASE | {"L1_WEIGHT": 0.0, "CHARBONNIER_WEIGHT": 1.0},
    "PSNR loss": _BASE | _PSNR,
    "FFT loss": _BASE | {"FFT_WEIGHT": 0.05},
    "NAFNet": _BASE | _NAFNET,
    "together": _TOGETHER,
    "together, U-Net": _TOGETHER | {"ARCH": "unet", "LEARNING_RATE": 2e-3},
    "together, resnet34": _TOGETHER | {"ARCH": "resnet34", "ENCODER_WEIGHTS": "", "LEARNING_RATE": 2e-3},
    "together, progressive crops": _TOGETHER | {"CROP_SIZES": (48, 64, 96)},
    "together, FFT loss": _TOGETHER | {"FFT_WEIGHT": 0.05},
}


def seconds_per_pair(settings, device):
    """-> seconds of CPU time that a pair costs in training, averaged over the crop sizes."""
    cfg = config.resolve(vars(Training), settings)
    model = Training.build_model(cfg, device).train()
    make, groups = Training.build_optimizer(cfg, model)
    optimizer, weights = make(groups), Training.build_plan(cfg).loss_weights
    spent = []
    for side in cfg.CROP_SIZES or (cfg.IMAGE_SIZE,):
        shape = (cfg.BATCH_SIZE, 3, side, side)
        batch = {"images": torch.rand(shape, device=device), "twins": torch.rand(shape, device=device)}

        def step(batch=batch):
            losses = Training.compute_losses(model, batch, weights)
            sum(weights[name] * value for name, value in losses.items()).backward()
            optimizer.step()
            optimizer.zero_grad()
        spent.append(cpu_seconds(step) / cfg.BATCH_SIZE)
    return float(np.mean(spent))


def score(path, names, pairs, device):
    """-> mean PSNR and SSIM on Y of whole images, as PReNet measures them."""
    model, found = load_trained(path, device), []
    for name in names:
        rainy, clean = (to_floats(datasets.read_image(file)[None], device) for file in pairs[name])
        quality = image_quality.quality_by_protocol(restore(model, rainy), clean)
        found.append([quality[metric].item() for metric in ("psnr_y", "ssim_y")])
    return np.mean(found, 0)


def run(variant, seed, folder, cfg, device):
    """Train one variant. -> {"variant", "seed", "psnr", "ssim", "steps", "seconds": of CPU time in all}."""
    pairs, _ = windshield_pairs.find_pairs(cfg.RAINY_DIR, cfg.CLEAR_DIR)
    names, _ = windshield_pairs.split_names(pairs, (cfg.TRAIN_PAIRS, cfg.VAL_PAIRS, 0), 0, cfg.SEQUENCE_SEPARATOR)
    held = names["val"]
    # a few of the held-out pairs choose the best epoch, the schedule's last one nearly always
    report.write_json(folder / "splits.json", {"train": names["train"], "val": held[:2], "test": held[2:]})
    settings = _VARIANTS[variant] | {
        "RAINY_DIR": cfg.RAINY_DIR, "CLEAR_DIR": cfg.CLEAR_DIR, "SPLITS_FILE": (folder / "splits.json").as_posix(),
        "SEED": seed, "CHECKPOINT_DIR": (folder / "run").as_posix(), "REAL_DIR": "", "CACHE_GB": 2.0,
        "TARGET_PSNR": 0.0, "TARGET_SSIM": 0.0, "EARLY_STOPPING_PATIENCE": 0, "CHECKPOINT_EVERY": 0, "SAMPLE_EVERY": 0,
        "DATALOADER_WORKERS": 0}
    each = cfg.BUDGET / len(names["train"]) / seconds_per_pair(settings, device)  # how often a pair can be looked at
    settings |= {"EPOCHS": _EPOCHS, "CROPS_PER_PAIR": max(1, round(each / _EPOCHS))}
    if each < 2 * _EPOCHS and len(settings.get("CROP_SIZES", ())) < 2:
        settings |= {"EPOCHS": max(1, round(each)), "CROPS_PER_PAIR": 1}
    begin = time.process_time()
    Training.main(**settings)
    seconds = time.process_time() - begin
    gc.collect()
    psnr, ssim = score(folder / "run" / "best.pt", held, pairs, device)
    return {"variant": variant, "seed": seed, "psnr": float(psnr), "ssim": float(ssim), "seconds": seconds,
            "steps": settings["EPOCHS"] * settings["CROPS_PER_PAIR"] * len(names["train"]) // settings["BATCH_SIZE"]}


def main(**overrides):
    """Run what is missing, then print mean and spread over seeds of every variant."""
    cfg = config.resolve(globals(), overrides)
    os.chdir(_ROOT)
    require_known(cfg.VARIANTS, _VARIANTS)
    device, folder = processes.announced_device(), Path(cfg.OUTPUT_DIR)
    runs = []
    for seed in cfg.SEEDS:
        for variant in cfg.VARIANTS:
            place = place_of(folder, variant, seed)
            settings = _VARIANTS[variant] | {name: getattr(cfg, name) for name in (
                "CLEAR_DIR", "RAINY_DIR", "TRAIN_PAIRS", "VAL_PAIRS", "BUDGET")}
            runs.append(once(place / "scores.json", settings,
                             lambda v=variant, s=seed, p=place: run(v, s, p, cfg, device)))
    rows = []
    for variant in cfg.VARIANTS:
        mine = [r for r in runs if r["variant"] == variant]
        rows.append({"variant": variant} | {name: round(np.mean([r[name] for r in mine]).item()) for name in (
            "steps", "seconds")} | {metric: spread([r[metric] for r in mine]) for metric in ("psnr", "ssim")})
    print("\n" + report.table(rows, {"variant": "variant", "psnr": "PSNR (Y)", "ssim": "SSIM (Y)", "steps": "steps",
                                     "seconds": "s of CPU"}))
    report.write_results(folder / "results.json", cfg.as_dict(), {"runs": runs})


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
