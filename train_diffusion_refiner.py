"""Train a refiner behind a de-rainer: InstructPix2Pix with LoRA, from de-rained to clear images.

    python train_diffusion_refiner.py --demo          # after python train_unet_derain.py --demo
    python train_diffusion_refiner.py --dry_run       # what it needs and would download; loads nothing
    python train_diffusion_refiner.py                 # pip install -r requirements-diffusion.txt

MODE says how: "one_step" (one deterministic step, a loss of pixels), "sample" (as diffusion models are trained and
sampled), "pixel" (the control without diffusion). utils/networks/refiner.py explains them, docs/refiner.md what each
won. The refiner learns from outputs that the de-rainer makes of images that it was not trained on (FOLDS), and how much
of its correction is used is chosen on validation pairs: none where it does not help.

Writes OUTPUT_DIR/refiner/ (the LoRA file for any diffusers user, refiner.safetensors, refiner.json), results.json and
refined.png (test pairs), last.pt, best.pt, metrics.json, curves.png, tb/, derained/ and folds/.
"""

import math
from functools import cache, partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch

import train_unet_derain
from utils import checkpoint, config, datasets, freeze, losses, memory, processes, report, system, transfer, visualize
from utils.datasets import derained, loaders, presets, windshield_pairs
from utils.datasets.samples import evenly
from utils.demo.windshield import ensure_windshield_demo
from utils.evaluation import behind_derainer, image_quality
from utils.networks import diffusion_base
from utils.networks import refiner as refiners
from utils.networks.derainers import load_trained
from utils.networks.rtdetr import require_size
from utils.networks.tiling import require_tiles, restore, usual_overlap
from utils.training import engine, run_state
from utils.training.plan import Plan, not_negative, whole

# --- data ---------------------------------------------------------------------------------------------------------
CLEAR_DIR = "./data/clear"              # as in train_unet_derain.py
RAINY_DIR = "./data/windshield_rainy_v40"  # the same names in rain
SPLITS_FILE: str | None = ""            # parts of the pairs; "": splits.json beside DERAIN_MODEL_PATH
DERAIN_MODEL_PATH = "./outputs_unet/best.pt"  # U-Net or NAFNet of train_unet_derain.py, whose outputs are refined
FOLDS = 0                               # 0: learn from the de-rainer's validation part; 2 or more: from its training
                                        # part, each fold de-rained by a network trained on the others
IMAGE_SIZE = 256                        # side of the random squares that are trained on, at the images' own scale
PAIRS_PER_EPOCH = 0                     # 0: all; fewer: each epoch goes on where the one before ended
FLIP = 0.5                              # probability of mirroring
CACHE_DIR: str | None = ""              # where de-rained images and folds are kept, for several runs; "": OUTPUT_DIR
VAL_IMAGES = 100                        # validation pairs at most, evenly chosen
VAL_LIMIT = 512                         # of larger ones the middle
TILE = 1024                             # larger images are de-rained in tiles

# --- refiner ------------------------------------------------------------------------------------------------------
MODE = "one_step"                       # one_step, sample or pixel
BASE_MODEL = "timbrooks/instruct-pix2pix"     # hub id or folder of a pipeline: 4.3 GB, downloaded once
PROMPT = "remove rain artifacts, enhance image quality"  # the same for all images, encoded once
TIME = 250                              # one_step: the time (0 to 999) of its one step
STRENGTH = 0.3                          # sample: how much noise it starts from, 0 (none) to 1
STEPS = 2                               # sample: steps from there
SKIPS = True                            # one_step: convolutions from encoder to decoder carry detail past the latents
LOCK_SIGMA = 0.0                        # pixels: keep the de-rainer's colours above this Gaussian, such as 4; 0: off
LORA_RANK = 8                           # all layers: 8.4M parameters, 34 MB
LORA_ALPHA = 8                          # LoRA's scale is LORA_ALPHA / LORA_RANK
LORA_TARGETS = refiners.ALL_LAYERS      # ends of the names of the layers; refiners.ATTENTION: 1.6M parameters

# --- blend: how much of the correction is used --------------------------------------------------------------------
LABELED_RAIN_DIR: str | None = ""       # COCO-layout root of rainy images with boxes: the share of the correction is
                                        # lowered until RT-DETR finds no less in its train split than behind the
                                        # de-rainer alone; "": chosen by PSNR, SSIM and LPIPS alone
PERCENT_DATASET: float = 10             # of that split, in percent
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # detects in LABELED_RAIN_DIR
DETECTOR_SIZE = 640                     # RT-DETR's square input
UNKNOWN_CATEGORIES = "ignore"           # "error" refuses labels that RT-DETR does not know
EVAL_BATCH_SIZE = 4                     # for RT-DETR

# --- loss: one_step and pixel (sample has the noise's error) ------------------------------------------------------
L1_WEIGHT = 1.0                         # pixels
PSNR_WEIGHT = 0.0                       # minus the PSNR in dB; 0.1 in the place of L1_WEIGHT
LPIPS_WEIGHT = 0.0                      # perceptual distance, such as 0.1
LPIPS_WEIGHTS: str | None = ""          # AlexNet: "imagenet" (233 MB, once), a local file of torchvision's, or ""

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 30                         # 20 to 50 are usual
BATCH_SIZE = 2                          # 2 at 256 x 256 needs 6.9 GB in float32; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 8         # batches per optimizer step
LEARNING_RATE = 1e-4                    # of LoRA and SKIPS, and of the network of mode "pixel"
GAIN_LEARNING_RATE = 1e-3               # one_step: of the gain, four numbers that start at zero
SCHEDULE = "cosine"                     # constant, cosine or step
DECAY_AT = (0.5, 0.75, 0.9)             # step: the rate is halved at these shares of the run
WARMUP_STEPS = 20                       # optimizer steps of linear warm-up
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
EMA_DECAY = 0.995                       # moving average of the trained weights; it is what is saved; 0: none
PRECISION = "float32"                   # bf16 (from Ampere on), fp16 (T4): half the memory, base as well; auto: either
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
GRADIENT_CHECKPOINTING = True           # a third more time for a fifth of the activations' memory
EARLY_STOPPING_PATIENCE = 10            # epochs without a better validation PSNR; 0: never stop early
DATALOADER_WORKERS = 4                  # processes that load images; at most the number of cores is used
SEED = 0                                # crops, initial weights, noise

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./outputs_refiner"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
PICTURES = 4                            # rows of refined.png
DRY_RUN = False                         # --dry_run: print what the run would need, and end

DEMO = {
    "CLEAR_DIR": "./demo/windshield/clear", "RAINY_DIR": "./demo/windshield/windshield_rainy_v40",
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "DETECTOR_SIZE": 160, "EVAL_BATCH_SIZE": 8,
    "DERAIN_MODEL_PATH": "./demo/outputs_unet/best.pt", "IMAGE_SIZE": 96,
    "BASE_MODEL": "./assets/demo/instruct_pix2pix_tiny", "NUM_EPOCHS": 10, "BATCH_SIZE": 8,
    "GRADIENT_ACCUMULATION_STEPS": 1, "L1_WEIGHT": 0.0, "PSNR_WEIGHT": 0.1, "LEARNING_RATE": 1.5e-3,
    "GAIN_LEARNING_RATE": 1e-2, "EMA_DECAY": 0.9, "GRADIENT_CHECKPOINTING": False, "DATALOADER_WORKERS": 0,
    "OUTPUT_DIR": "./demo/outputs_refiner",
}
_NETWORK = "content of DERAIN_MODEL_PATH"  # among the constants in last.pt: a de-rainer that was trained again
_SPLIT = ("TRAIN_PAIRS", "VAL_PAIRS", "TEST_PAIRS", "SEQUENCE_SEPARATOR")  # of a de-rainer: its folds have SPLITS_FILE
_OWN_FOLDERS = ("refiner", "tb")  # of OUTPUT_DIR, replaced or moved aside as a whole
_HEADINGS = ("de-rained", "refined", "clear")  # of refined.png
_BLENDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the correction that are tried on the validation pairs


def check(cfg):
    """UserError for constants that do not go together; Plan and the refiner check the others."""
    if cfg.MODE not in refiners.MODES:
        raise config.UserError(f"MODE = {cfg.MODE!r}: choose one of {', '.join(refiners.MODES)}")
    if cfg.FOLDS == 1 or cfg.FOLDS < 0:
        raise config.UserError(f"FOLDS = {cfg.FOLDS}: choose 2 or more, or 0 to learn from the validation part alone")
    if cfg.IMAGE_SIZE < 32 or cfg.IMAGE_SIZE % 32:
        raise config.UserError(f"IMAGE_SIZE = {cfg.IMAGE_SIZE}: choose a multiple of 32, such as 256 or 512")
    for name in ("FLIP", "STRENGTH"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise config.UserError(f"{name} = {getattr(cfg, name)}: choose a number from 0 to 1")
    for name, least in (("VAL_IMAGES", 1), ("VAL_LIMIT", 32), ("STEPS", 1), ("LORA_RANK", 1), ("LORA_ALPHA", 1),
                        ("PICTURES", 1), ("TIME", 0), ("PAIRS_PER_EPOCH", 0)):
        whole(least)(name, getattr(cfg, name))
    not_negative("LPIPS_WEIGHT", cfg.LPIPS_WEIGHT)
    if cfg.LOCK_SIGMA and not 0.5 <= cfg.LOCK_SIGMA <= cfg.IMAGE_SIZE / 4:  # less keeps nothing, more is one colour
        raise config.UserError(f"LOCK_SIGMA = {cfg.LOCK_SIGMA}: choose 0 (off), or 0.5 to {cfg.IMAGE_SIZE / 4:g} "
                               "pixels, a quarter of IMAGE_SIZE")
    if cfg.LABELED_RAIN_DIR:
        require_size(cfg.DETECTOR_SIZE, "DETECTOR_SIZE")
    if not cfg.LORA_TARGETS:
        raise config.UserError("LORA_TARGETS is empty: nothing would train")
    if cfg.LPIPS_WEIGHT and not cfg.LPIPS_WEIGHTS:
        raise config.UserError("LPIPS_WEIGHT needs LPIPS_WEIGHTS: \"imagenet\", or a file of torchvision's alexnet")
    require_tiles(cfg.TILE, usual_overlap(cfg.TILE))
    for name in ("OUTPUT_DIR", "CACHE_DIR"):
        if folder := getattr(cfg, name):
            report.require_apart(name, folder, [("CLEAR_DIR", cfg.CLEAR_DIR), ("RAINY_DIR", cfg.RAINY_DIR)])
    report.require_apart("CACHE_DIR", cfg.CACHE_DIR or cfg.OUTPUT_DIR, [
        (f"OUTPUT_DIR/{name}", Path(cfg.OUTPUT_DIR) / name) for name in _OWN_FOLDERS])
    if Path(cfg.DERAIN_MODEL_PATH).resolve().parent == Path(cfg.OUTPUT_DIR).resolve():
        raise config.UserError(f"OUTPUT_DIR = '{cfg.OUTPUT_DIR}' is the folder of DERAIN_MODEL_PATH, whose files this "
                               "run would move aside: choose another")


def build_plan(cfg):
    """-> Plan; UserError for settings that cannot be."""
    weights = {"noise": 1.0} if cfg.MODE == "sample" else {"l1": "L1_WEIGHT", "psnr_loss": "PSNR_WEIGHT",
                                                            "lpips": "LPIPS_WEIGHT"}
    rates = ("LEARNING_RATE", "GAIN_LEARNING_RATE") if cfg.MODE == "one_step" else ("LEARNING_RATE",)
    return Plan.of(cfg, learning_rates=rates, loss_weights=weights, schedule="SCHEDULE",
                   given={"precisions": ("float32", "bf16", "fp16")})


# ---- data ------------------------------------------------------------------------------------------------------

def cache_of(cfg):
    """-> Path of the folder that keeps de-rained images and the folds' networks."""
    return Path(cfg.CACHE_DIR or cfg.OUTPUT_DIR)


def fold_networks(cfg, parts, content, digest):
    """Train a de-rainer for every fold of the training part, on the others, as DERAIN_MODEL_PATH was trained.

    Args:
        parts: of `derained.parts_of`; content: of DERAIN_MODEL_PATH; digest: of that file. A finished fold is not
            repeated.
    Returns:
        [(path of its weights, names that it has not seen), ...].
    """
    if not (trained := content.get("constants")):
        raise config.UserError(f"FOLDS = {cfg.FOLDS}: DERAIN_MODEL_PATH = '{cfg.DERAIN_MODEL_PATH}' does not hold the "
                               "constants that it was trained with: give the best.pt of that run, or FOLDS = 0")
    constants = {name: value for name, value in trained.items()
                 if hasattr(train_unet_derain, name) and name not in _SPLIT}
    folds = derained.in_folds(parts["train"], cfg.FOLDS, trained.get("SEQUENCE_SEPARATOR", ""))
    if not all(folds):
        raise config.UserError(f"FOLDS = {cfg.FOLDS}: the training part has too few pairs (or sequences) for it")
    networks = []
    for number, names in enumerate(folds):
        others = sorted(set(parts["train"]) - set(names))
        # as test pairs MORE_PAIRS leaves them out as well
        split = {"train": others, "val": parts["val"], "test": sorted([*names, *parts["test"]])}
        folder = cache_of(cfg) / "folds" / derained.fold_name(digest, split)
        splits = folder.with_suffix(".json")
        processes.main_first(partial(report.write_json, splits, split), "the folds")
        processes.say(f"fold {number + 1} of {len(folds)}: a de-rainer is trained on {len(others)} pairs, for "
                      f"{len(names)}")
        train_unet_derain.main(**constants | {
            "CLEAR_DIR": cfg.CLEAR_DIR, "RAINY_DIR": cfg.RAINY_DIR, "REAL_DIR": "", "SPLITS_FILE": splits.as_posix(),
            "CHECKPOINT_DIR": folder.as_posix(), "RESUME": True, "CHECKPOINT_EVERY": 0, "SAMPLE_EVERY": 0})
        networks.append((folder / "best.pt", names))
    return networks


def build_data(cfg, device):
    """-> {"train", "val", "test": WindshieldPairs of (de-rained, clear)}; the test part may be empty."""
    found, notes = windshield_pairs.find_pairs(cfg.RAINY_DIR, cfg.CLEAR_DIR)
    for note in notes:
        processes.say(f"note: {note}")
    content = load_content(cfg)

    @cache  # several parts have the same one
    def network(path):
        derain = partial(restore, load_trained(path, device, "DERAIN_MODEL_PATH"), tile=cfg.TILE,
                         overlap=usual_overlap(cfg.TILE))
        return derain, checkpoint.file_digest(path)
    digest = network(cfg.DERAIN_MODEL_PATH)[1]
    parts = derained.parts_of(cfg.DERAIN_MODEL_PATH, found, cfg.SPLITS_FILE, cfg.RAINY_DIR, cfg.CLEAR_DIR)
    if cfg.FOLDS:
        sources = {"train": fold_networks(cfg, parts, content, digest), "val": [(cfg.DERAIN_MODEL_PATH, parts["val"])]}
        said = f"{len(parts['train'])} training pairs, each de-rained by a network that was not trained on it"
    else:
        own = derained.shared_out(parts["val"], (content.get("constants") or {}).get("SEQUENCE_SEPARATOR", ""),
                                  cfg.DERAIN_MODEL_PATH)
        sources = {part: [(cfg.DERAIN_MODEL_PATH, own[part])] for part in ("train", "val")}
        said = (f"{len(own['train'])} training and {len(own['val'])} validation pairs, all of the de-rainer's "
                "validation part")
    sources["test"] = [(cfg.DERAIN_MODEL_PATH, parts["test"])]
    processes.say(f"refiner: {said}; {len(parts['test'])} test pairs")
    still, data = presets.scaled(1.0, cfg.VAL_LIMIT), {}
    for part, networks in sources.items():
        pairs = {}
        for path, names in networks:
            derain, digest = network(path)
            pairs |= derained.derained_pairs(derain, found, names, cache_of(cfg) / "derained" / digest)
        names = sorted(pairs) if part != "val" else evenly(sorted(pairs), cfg.VAL_IMAGES)
        data[part] = windshield_pairs.WindshieldPairs(
            pairs, names, presets.crops(cfg.IMAGE_SIZE, cfg.FLIP) if part == "train" else still, cfg.SEED)
    if 0 < cfg.PAIRS_PER_EPOCH < len(data["train"]):
        data["train"] = windshield_pairs.Walk(data["train"], cfg.PAIRS_PER_EPOCH)
    return data


def load_content(cfg):
    """-> content of DERAIN_MODEL_PATH; UserError where it is not there."""
    if problem := system.absent(cfg.DERAIN_MODEL_PATH):
        demo = " --demo" if cfg.demo else ""
        raise config.UserError(f"DERAIN_MODEL_PATH = '{cfg.DERAIN_MODEL_PATH}' {problem}: train a de-rainer first, "
                               f"python train_unet_derain.py{demo}")
    return checkpoint.load(cfg.DERAIN_MODEL_PATH)


# ---- refiner and loss ------------------------------------------------------------------------------------------

def diffusion_refiner(cfg, base, mode):
    """-> DiffusionRefiner with the constants' settings, on the device of its base."""
    return refiners.DiffusionRefiner(
        base, mode, cfg.TIME, cfg.STRENGTH, cfg.STEPS, cfg.LORA_RANK, cfg.LORA_ALPHA, cfg.LORA_TARGETS, cfg.SKIPS,
        cfg.SEED, cfg.LOCK_SIGMA, cfg.GRADIENT_CHECKPOINTING)


def outline(cfg):
    """-> the refiner of MODE "one_step" or "sample" without numbers ("meta"): its sizes, before anything is loaded."""
    mode = "one_step" if cfg.MODE == "pixel" else cfg.MODE
    base = diffusion_base.random_base(*diffusion_base.settings_of(cfg.BASE_MODEL), diffusion_base.DTYPES[cfg.PRECISION],
                                      "meta")
    return diffusion_refiner(cfg, base, mode)


def say_needs(cfg):
    """Sizes, memory and downloads of a run, in lines; nothing is loaded for them."""
    model = outline(cfg).train()
    batch = cfg.BATCH_SIZE or cfg.usual_batch["BATCH_SIZE"]
    images = torch.empty(batch, 3, cfg.IMAGE_SIZE, cfg.IMAGE_SIZE, device="meta")

    def step():
        (model(images, images) if cfg.MODE == "sample" else model(images).mean()).backward()
    trained, needs = freeze.count_parameters(model)[1], memory.training_gigabytes(model, step)
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters() if not p.requires_grad)
              for name in ("unet", "vae")}
    size = f"{cfg.IMAGE_SIZE} x {cfg.IMAGE_SIZE}"
    processes.say(f"U-Net {counts['unet']:,} and autoencoder {counts['vae']:,} parameters; {trained:,} train "
                  f"({4 * trained / 1e6:.1f} MB)\n"
                  f"memory of a step, BATCH_SIZE = {batch} at {size}, {cfg.PRECISION}: "
                  f"{', '.join(f'{what} {size:.2f} GB' for what, size in needs.items())}, in all "
                  f"{sum(needs.values()):.2f} GB, and what CUDA takes for itself")
    for line in diffusion_base.downloads(cfg.BASE_MODEL):
        processes.say(line)


def build_refiner(cfg, device):
    """The refiner, on the device."""
    if cfg.MODE == "pixel":
        model = refiners.PixelRefiner(freeze.count_parameters(outline(cfg))[1], cfg.LOCK_SIGMA)
    else:
        base = diffusion_base.load_base(cfg.BASE_MODEL, cfg.PROMPT, diffusion_base.DTYPES[cfg.PRECISION])
        model = diffusion_refiner(cfg, base, cfg.MODE)
    processes.say(freeze.describe({f"refiner ({cfg.MODE})": model}))
    return model.to(device)


def parameter_groups(cfg, model):
    """-> groups for the optimizer: LoRA and convolutions, or the network, and the gain."""
    gain = [p for name, p in model.named_parameters() if name == "gain"]
    others = [p for name, p in model.named_parameters() if p.requires_grad and name != "gain"]
    groups = [{"params": others, "lr": cfg.LEARNING_RATE, "weight_decay": 0.0}]
    return groups + ([{"params": gain, "lr": cfg.GAIN_LEARNING_RATE, "weight_decay": 0.0}] if gain else [])


def compute_losses(model, batch, weights, lpips_model=None):
    """Named losses of one batch: {"noise"}, or those of {"l1", "psnr_loss", "lpips"} that have a weight."""
    if "noise" in weights:
        return {"noise": model(batch["images"], batch["twins"])}
    refined = model(batch["images"])
    found = train_unet_derain.losses_of(refined, batch["twins"], [name for name in weights if name != "lpips"])
    if "lpips" in weights:
        with losses.float32(refined.device.type):
            found["lpips"] = lpips_model(refined.float(), batch["twins"], normalize=True).mean()
    return found


# ---- validation ------------------------------------------------------------------------------------------------

def quality(images, targets, lpips_model=None):
    """-> image_quality.full_quality, and "texture": image_quality.texture_similarity; (B,) each."""
    return image_quality.full_quality(images, targets, lpips_model) | {
        "texture": image_quality.texture_similarity(images, targets)}


@torch.no_grad()
def evaluate(model, loader, device, lpips_model=None):
    """Score the validation pairs at every share of _BLENDS, and keep the best share as `model.blend`.

    The best has the highest PSNR of those that lose neither SSIM nor texture nor LPIPS against the de-rained images;
    share 0 always qualifies. -> {"val/psnr", "val/ssim", "val/texture", perhaps "val/lpips": means, "val/blend"}
    """
    found = []
    for batch in loader:
        batch = datasets.to_device(batch, device)
        correction = model.correction(batch["images"])
        scores = {share: quality((batch["images"] + share * correction).clamp(0, 1), batch["twins"], lpips_model)
                  for share in _BLENDS}
        found += transfer.rows({f"{share}/{name}": values for share, own in scores.items()
                                for name, values in own.items()})
    means = processes.mean_over_ranks(found)

    def loses(share):
        return (any(means[f"{share}/{name}"] < means[f"{_BLENDS[0]}/{name}"] for name in ("ssim", "texture"))
                or means.get(f"{share}/lpips", 0.0) > means.get(f"{_BLENDS[0]}/lpips", 0.0))
    best = max((share for share in _BLENDS if not loses(share)), key=lambda share: means[f"{share}/psnr"])
    if any(map(math.isnan, means.values())):  # an overflow, which as "does not help" would go unseen; fit stops at it
        best = _BLENDS[-1]
    model.blend = best
    names = [name for name in ("psnr", "ssim", "texture", "lpips") if f"{best}/{name}" in means]
    return {f"val/{name}": means[f"{best}/{name}"] for name in names} | {"val/blend": best}


def test_rows(model, data, device, lpips_model):
    """-> [{"images", "count", metric: mean, metric_low, metric_high}, ...] of the test pairs, de-rained and refined."""
    found = {"de-rained": [], "refined": []}
    with torch.no_grad():
        for i in range(len(data)):
            batch = datasets.to_device(datasets.collate([data[i]]), device)
            for row, images in (("de-rained", batch["images"]), ("refined", model(batch["images"]))):
                found[row] += transfer.rows(quality(images, batch["twins"], lpips_model))
    return [{"images": row, "count": len(scores)} | image_quality.means_and_intervals(
        {name: [score[name] for score in scores] for name in scores[0]}) for row, scores in found.items()]


# ---- pictures and report ---------------------------------------------------------------------------------------

def sample_images(model, data, device):
    """-> {tag: picture} for TensorBoard."""
    page = train_unet_derain.pair_sheet(model, data, device, 3, _HEADINGS)
    return {", ".join(_HEADINGS): visualize.as_tensor(page)}


def write_refiner(model, cfg, digest):
    """OUTPUT_DIR/refiner, which load_refiner reads; digest: of the file DERAIN_MODEL_PATH."""
    refiners.save_refiner(model, Path(cfg.OUTPUT_DIR) / "refiner", base=cfg.BASE_MODEL, prompt=cfg.PROMPT,
                          derainer=Path(cfg.DERAIN_MODEL_PATH).as_posix(), derainer_digest=digest)


def lower_blend(cfg, model, labelled, device):
    """Lower the refiner's blend until the detector finds no less behind it than behind the de-rainer alone.

    Args:
        model: refiner, whose blend was chosen by image quality; labelled: of behind_derainer.labelled_rain.
    """
    both = refiners.RefinedDerainer(load_trained(cfg.DERAIN_MODEL_PATH, device, "DERAIN_MODEL_PATH"), model).eval()

    def found(share):
        model.blend = share
        return behind_derainer.rows_behind({f"blend {share}": both}, *labelled, device, "row")[0]["mAP"]
    chosen, alone = model.blend, found(0.0)
    if alone < 0:  # COCO's word for "no such objects"
        processes.say("note: LABELED_RAIN_DIR: the chosen images have no boxes, so the detector has no say")
        model.blend = chosen
        return
    for share in (share for share in reversed(_BLENDS) if share <= chosen):
        model.blend = share
        if not share or (score := found(share)) >= alone:
            break
        processes.say(f"blend {share}: the detector's mAP is {score:.4f} on {len(labelled[1].dataset)} images, "
                      f"{alone:.4f} behind the de-rainer alone: less is used")


def best_refiner(cfg, labelled, device, digest):
    """-> the refiner of the best epoch, its blend lowered by a detector if that was asked for; every rank calls it."""
    folder = Path(cfg.OUTPUT_DIR) / "refiner"
    if problem := system.absent(folder, folder=True):
        raise config.UserError(f"OUTPUT_DIR: {folder.as_posix()} {problem}, which this run wrote after its best epoch: "
                               "put it back, or start anew without RESUME = True")
    model = refiners.load_refiner(folder, device, constant="OUTPUT_DIR")
    if labelled and model.blend:
        lower_blend(cfg, model, labelled, device)
        if processes.is_main():
            write_refiner(model, cfg, digest)
    return model


def write_report(cfg, model, data, device, lpips_model):
    """Score the best refiner on the test pairs: table, results.json, refined.png. -> rows, [] without test pairs."""
    folder = Path(cfg.OUTPUT_DIR)
    if not len(data["test"]):
        processes.say("note: there are no test pairs, so nothing is measured on images that chose nothing")
        return []
    rows = test_rows(model, data["test"], device, lpips_model)
    columns = {"images": "test pairs", "count": "n", "psnr": "PSNR (RGB)", "ssim": "SSIM (RGB)", "psnr_y": "PSNR (Y)",
               "ssim_y": "SSIM (Y)", "texture": "texture"} | ({"lpips": "LPIPS"} if lpips_model is not None else {})
    print("\n" + report.table(rows, columns))
    print(f"gain: {rows[1]['psnr'] - rows[0]['psnr']:+.2f} dB with blend {model.blend}"
          + (" (none of the correction helps)" if not model.blend else ""))
    report.write_results(folder / "results.json", cfg.as_dict(), {"test": rows, "blend": model.blend})
    train_unet_derain.pair_sheet(model, data["test"], device, cfg.PICTURES, _HEADINGS, folder / "refined.png")
    print(f"refiner: {(folder / 'refiner').as_posix()}")
    return rows


def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit and {"test": rows}; None after
    --dry_run."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    plan = build_plan(cfg)
    diffusion_base.diffusers_and_peft()  # also for "pixel", which has the size of LoRA in BASE_MODEL
    diffusion_base.settings_of(cfg.BASE_MODEL)
    if cfg.MODE != "pixel":
        say_needs(cfg)
    elif cfg.DRY_RUN:
        processes.say(f"MODE = 'pixel': a NAFNet of about {freeze.count_parameters(outline(cfg))[1]:,} parameters, as "
                      "many as LoRA has; nothing is downloaded")
    if cfg.DRY_RUN:
        return None
    if cfg.demo:
        ensure_windshield_demo()
    last = run_state.require_free(Path(cfg.OUTPUT_DIR), plan, "val/psnr")
    engine.seed_everything(cfg.SEED)
    checkpoint.require_writable(cache_of(cfg))
    device = processes.announced_device()
    # before the folds' trainings, which may take a day
    lpips_model = image_quality.load_lpips(cfg.LPIPS_WEIGHTS, device) if cfg.LPIPS_WEIGHTS else None
    labelled = (behind_derainer.labelled_rain(cfg, "DETECTOR_SIZE", device, "train", cfg.PERCENT_DATASET)
                if cfg.LABELED_RAIN_DIR else None)
    data = build_data(cfg, device)
    digest = checkpoint.file_digest(cfg.DERAIN_MODEL_PATH)
    engine.seed_everything(cfg.SEED)  # the folds' trainings have used it
    model = build_refiner(cfg, device)
    val_loader = loaders.validation_loader(data["val"], 1, cfg.DATALOADER_WORKERS)  # sizes differ
    result = engine.fit(
        model, loaders.training_loader(data["train"], cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED),
        partial(compute_losses, weights=plan.loss_weights, lpips_model=lpips_model), plan, output_dir=cfg.OUTPUT_DIR,
        parameters=parameter_groups(cfg, model), evaluate=partial(evaluate, loader=val_loader, device=device,
                                                                  lpips_model=lpips_model),
        score="val/psnr", sample_images=partial(sample_images, data=data["val"], device=device),
        on_best=partial(write_refiner, cfg=cfg, digest=digest), last=last,
        constants=cfg.as_dict() | {_NETWORK: digest},
        fixed=("MODE", "BASE_MODEL", "PROMPT", "TIME", "STRENGTH", "STEPS", "SKIPS", "LOCK_SIGMA", "LORA_RANK",
               "LORA_ALPHA", "LORA_TARGETS", "DERAIN_MODEL_PATH", _NETWORK, "FOLDS", "VAL_IMAGES", "VAL_LIMIT",
               "LPIPS_WEIGHTS"),
        validated_on=data["val"].names,
        own_files=("refiner", "results.json", "refined.png"))
    if not result["history"]:
        return result | {"test": []}
    best = best_refiner(cfg, labelled, device, digest)
    return result | {"test": write_report(cfg, best, data, device, lpips_model) if processes.is_main() else []}


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
