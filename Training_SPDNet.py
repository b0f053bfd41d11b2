"""Train SPDNet itself on rainy/clean pairs: the visually good de-rainer that the adaptation starts from.

Yi et al., "Structure-Preserving Deraining with Residue Channel Prior Guidance", ICCV 2021. The defaults are the
published command's: patches of 128, batches of 16, Adam at 5e-4, 300 epochs, mean squared error. Not published, ours:
the decay steps, the equal supervision of all three stages, and an initialisation near the identity (INITIALISATION).
The published weights (model_spa.pt) need no training: set SPDNET_MODEL_PATH of the other scripts to them.

    python Training_SPDNet.py --demo
    python Training_SPDNet.py --NUM_EPOCHS 3   # all of COCO, see NUM_EPOCHS

Writes OUTPUT_DIR/spdnet_best.pt (a plain state dict that the published code loads as well), last.pt, best.pt,
metrics.json, curves.png and tb/.
"""

from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

from utils import checkpoint, config, datasets, freeze, losses, processes, report, system, transfer, visualize
from utils.datasets import image_check, loaders, presets
from utils.datasets.fresh_rain import fresh_rain
from utils.datasets.samples import evenly
from utils.demo.coco import ensure_demo
from utils.evaluation import image_quality
from utils.networks.spdnet import SPDNet, load_spdnet
from utils.networks.spdnet_init import init_near_identity
from utils.training import engine, run_state
from utils.training.plan import Plan

# --- data ---------------------------------------------------------------------------------------------------------
RAINY_DIR = "./dataset/coco_rain/train2017"  # rainy images, searched recursively
CLEAN_DIR = "./dataset/coco/train2017"       # their clean partners, same relative names
VAL_RAINY_DIR = "./dataset/coco_rain/val2017"  # pairs for validation
VAL_CLEAN_DIR = "./dataset/coco/val2017"     # their clean partners
RAIN = "files"                          # files: RAINY_DIR's images; fresh: drawn on CLEAN_DIR's anew in every epoch
RAIN_KINDS = {"light": 1.0, "medium": 1.0, "heavy": 1.0}  # of fresh rain, shares; also mist, fog, drops, drops and rain
PERCENT_DATASET: float = 100            # seeded subset of the training pairs, in percent
VAL_IMAGES = 100                         # validation pairs, a seeded subset; whole images, so they take time
VAL_LIMIT = 1024                        # of larger ones the middle; a million pixels take 2.4 GB
PATCH_SIZE = 128                        # side of the random training patch
IMAGE_SCALE = 1.0                       # 0.5 for an SPDNet that will run at DERAIN_SCALE = 0.5: it sees finer rain

# --- model --------------------------------------------------------------------------------------------------------
SPDNET_N_FEATS = 32                     # width; 32 is the published size
SPDNET_N_RESBLOCKS = 3                  # residual blocks per group; 3 is the published size
SPDNET_MODEL_PATH: str | None = ""      # weights to go on from; "" starts new
INITIALISATION = "identity"             # identity: out = in at the start (SPDNet has no skip connection); or default
ACTIVATION_CHECKPOINTING = False        # 8 GB per batch of 16 patches; True: about 1.1, for 1.4 times the time

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 300                        # published; with all of COCO 3 epochs see as many patches
BATCH_SIZE = 16                         # published; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 1         # batches per optimizer step
LEARNING_RATE = 5e-4                    # published, for Adam; short runs from the identity learn more at 1e-4
SCHEDULE = "step"                       # constant, cosine or step
DECAY_AT = (0.25, 0.5, 0.75, 0.9)       # step: the rate is halved at these shares of the run
WARMUP_STEPS = 100                      # optimizer steps; without, the first ones break the identity
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
PRECISION = "float32"                   # "bf16" (GPUs from Ampere on) is faster; "auto": where it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EARLY_STOPPING_PATIENCE = 50            # epochs without a better validation PSNR; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that load images; at most the number of cores is used
SEED = 0                                # order, patches, initial weights

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_spdnet"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 500                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none

DEMO = {
    "RAINY_DIR": "./demo/coco_rain/train2017", "CLEAN_DIR": "./demo/coco/train2017",
    "VAL_RAINY_DIR": "./demo/coco_rain/val2017", "VAL_CLEAN_DIR": "./demo/coco/val2017",
    "OUTPUT_DIR": "./demo/outputs_spdnet", "SPDNET_N_FEATS": 16, "SPDNET_N_RESBLOCKS": 1, "PATCH_SIZE": 64,
    "NUM_EPOCHS": 2, "PERCENT_DATASET": 50, "LEARNING_RATE": 1e-4, "SCHEDULE": "cosine", "WARMUP_STEPS": 20,
    "VAL_IMAGES": 40, "DATALOADER_WORKERS": 0,
}


class Derainer(torch.nn.Module):
    """SPDNet in this project's units: (B, 3, H, W) in [0, 1] -> the three stages' images (out3, out2, out1)."""

    def __init__(self, spdnet):
        super().__init__()
        self.spdnet = spdnet

    @property
    def model_args(self):
        """What is needed to build this module again."""
        return {"n_feats": self.spdnet.n_feats, "n_resblocks": self.spdnet.n_resblocks}

    def forward(self, images):
        return tuple(stage / 255 for stage in self.spdnet(images * 255))


def build_model(cfg, device):
    """A new SPDNet, or the one in SPDNET_MODEL_PATH."""
    if cfg.INITIALISATION not in ("identity", "default"):
        raise config.UserError(f"INITIALISATION = {cfg.INITIALISATION!r}: choose identity or default")
    if cfg.SPDNET_MODEL_PATH:
        spdnet = load_spdnet(cfg.SPDNET_MODEL_PATH, constant="SPDNET_MODEL_PATH")
        if (spdnet.n_feats, spdnet.n_resblocks) != (cfg.SPDNET_N_FEATS, cfg.SPDNET_N_RESBLOCKS):
            processes.say(f"note: SPDNET_MODEL_PATH holds an SPDNet with SPDNET_N_FEATS = {spdnet.n_feats} and "
                          f"SPDNET_N_RESBLOCKS = {spdnet.n_resblocks}, which is trained on, whatever the constants say")
    else:
        spdnet = SPDNet(cfg.SPDNET_N_FEATS, cfg.SPDNET_N_RESBLOCKS)
        if cfg.INITIALISATION == "identity":
            init_near_identity(spdnet)
    spdnet.activation_checkpointing = cfg.ACTIVATION_CHECKPOINTING
    processes.say(freeze.describe({"SPDNet": spdnet}))
    return Derainer(spdnet).to(device)


def build_loaders(cfg):
    """-> loader of random patches, loader of whole validation pairs (one by one: their sizes differ)."""
    patches = presets.paired_patches(cfg.PATCH_SIZE, cfg.IMAGE_SCALE)
    train = datasets.PairedRainDataset(cfg.RAINY_DIR, cfg.CLEAN_DIR, patches, percent=cfg.PERCENT_DATASET,
                                       seed=cfg.SEED, fresh_rain=fresh_rain(cfg, side=0))
    whole = presets.scaled(cfg.IMAGE_SCALE, cfg.VAL_LIMIT)
    val = datasets.PairedRainDataset(cfg.VAL_RAINY_DIR, cfg.VAL_CLEAN_DIR, whole, limit=cfg.VAL_IMAGES, seed=cfg.SEED,
                                     constants=("VAL_RAINY_DIR", "VAL_CLEAN_DIR"))
    if small := image_check.smaller_than([path for path, _ in evenly(train.pairs, 50)],
                                         cfg.PATCH_SIZE / cfg.IMAGE_SCALE):
        processes.say(f"note: PATCH_SIZE = {cfg.PATCH_SIZE} is more than the side of some images "
                      f"({system.listed(small, 2)}{f', scaled by {cfg.IMAGE_SCALE}' if cfg.IMAGE_SCALE < 1 else ''}), "
                      "which are mirrored to that size: a smaller one trains faster")
    trained = {path.absolute() for path in train.image_paths()}  # of fresh rain the clean ones alone
    if both := sum(any(path.absolute() in trained for path in pair) for pair in val.pairs):
        processes.say(f"note: {both} of {len(val)} validation pairs are trained on as well (does RAINY_DIR hold "
                      "VAL_RAINY_DIR, or CLEAN_DIR VAL_CLEAN_DIR?): their scores say little")
    return (loaders.training_loader(train, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED),
            loaders.validation_loader(val, 1, cfg.DATALOADER_WORKERS))


def compute_losses(model, batch):
    """{"mse": squared error of the three stages' images, summed}."""
    return {"mse": losses.staged_mse(model(batch["images"]), batch["twins"])}


def evaluate(model, loader, device):
    """-> {"val/psnr_y", "val/ssim_y", "val/psnr", "val/ssim"}: means over images, Y as MATLAB computes it."""
    found = []
    for batch in loader:
        batch = datasets.to_device(batch, device)
        found += transfer.rows(image_quality.image_quality(model(batch["images"])[0], batch["twins"]))
    return {f"val/{name}": value for name, value in processes.mean_over_ranks(found).items()}


def sample_images(model, dataset, device):
    """-> {tag: rainy | de-rained | clean} of the first validation pairs."""
    rows = []
    for i in range(min(3, len(dataset))):
        batch = datasets.to_device(datasets.collate([dataset[i]]), device)
        rows.append([batch["images"][0], model(batch["images"])[0][0], batch["twins"][0]])
    return {"rainy, de-rained, clean": visualize.as_tensor(visualize.grid(rows, ["rainy", "de-rained", "clean"]))}


def save_spdnet(model, path):
    """Write SPDNet as a plain state dict."""
    checkpoint.save(model.spdnet.state_dict(), path)


def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit."""
    cfg = config.resolve(globals(), overrides)
    if cfg.VAL_IMAGES < 1 or min(cfg.PATCH_SIZE, cfg.VAL_LIMIT) < 16:
        raise config.UserError(f"VAL_IMAGES = {cfg.VAL_IMAGES} must be 1 or more, PATCH_SIZE = {cfg.PATCH_SIZE} and "
                               f"VAL_LIMIT = {cfg.VAL_LIMIT} at least 16")
    if cfg.SPDNET_N_FEATS < 6 or cfg.SPDNET_N_FEATS % 2 or cfg.SPDNET_N_RESBLOCKS < 1:
        raise config.UserError(f"SPDNET_N_FEATS = {cfg.SPDNET_N_FEATS} must be an even number from 6 on, "
                               f"SPDNET_N_RESBLOCKS = {cfg.SPDNET_N_RESBLOCKS} 1 or more")
    if not 0 < cfg.IMAGE_SCALE <= 1:
        raise config.UserError(f"IMAGE_SCALE = {cfg.IMAGE_SCALE}: choose a number in (0, 1], such as 1.0 or 0.5")
    report.require_apart("OUTPUT_DIR", cfg.OUTPUT_DIR, [
        (name, getattr(cfg, name)) for name in ("RAINY_DIR", "CLEAN_DIR", "VAL_RAINY_DIR", "VAL_CLEAN_DIR")])
    plan = Plan.of(cfg, loss_weights={"mse": 1.0})
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    last = run_state.require_free(cfg.OUTPUT_DIR, plan, "val/psnr_y")
    model = build_model(cfg, device)
    train_loader, val_loader = build_loaders(cfg)
    output = Path(cfg.OUTPUT_DIR) / "spdnet_best.pt"
    untouched = evaluate(lambda images: (images,), val_loader, device)
    processes.say(f"rainy input: {untouched['val/psnr_y']:.2f} dB, SSIM {untouched['val/ssim_y']:.4f} on Y; "
                  f"{untouched['val/psnr']:.2f} dB, SSIM {untouched['val/ssim']:.4f} on RGB")
    result = engine.fit(
        model, train_loader, compute_losses, plan, output_dir=cfg.OUTPUT_DIR,
        parameters=[{"params": list(model.parameters()), "lr": cfg.LEARNING_RATE}],
        evaluate=partial(evaluate, loader=val_loader, device=device), score="val/psnr_y",
        on_best=partial(save_spdnet, path=output),
        sample_images=partial(sample_images, dataset=val_loader.dataset, device=device),
        constants=cfg.as_dict(), last=last, own_files=(output.name,),
        fixed=("VAL_RAINY_DIR", "VAL_CLEAN_DIR", "VAL_IMAGES", "VAL_LIMIT", "IMAGE_SCALE"),
        validated_images=val_loader.dataset.image_paths())
    if result["history"]:
        rows = [{"images": "rainy input"} | untouched,
                {"images": "de-rained"} | result["history"][result["best_epoch"] - 1]]
        processes.say(report.table(rows, {"images": "images", "val/psnr_y": "PSNR (Y)", "val/ssim_y": "SSIM (Y)",
                                          "val/psnr": "PSNR (RGB)", "val/ssim": "SSIM (RGB)"}))
        processes.say(f"SPDNet: {output.as_posix()}")
    return result


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
