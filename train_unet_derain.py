"""Train a U-Net that takes rain off a windshield: pairs of clear images and the same through wet glass.

The loss is minus the PSNR, or the plan's L1 + perceptual (VGG16) + SSIM; "best" goes by the PSNR of the validation
pairs. What the rain looks like decides what is learnt: make_rain.py --kind windshield draws pairs over any clear
photographs (docs/windshield.md). "The plan" is the recipe that this U-Net was specified with (docs/unet_derain.md).

    python train_unet_derain.py --demo
    python make_rain.py --kind windshield --clear ./data/clear --out ./data/windshield_rainy_v40
    python train_unet_derain.py

Writes CHECKPOINT_DIR/best.pt (for Eval_unet_derain.py), last.pt, checkpoints/epoch_*.pt (complete, RESUME takes a copy
of one as last.pt), samples/ and real_rain/ (pictures), splits.json, metrics.json, curves.png and tb/.
train_unet_derain.ipynb calls the same functions, for Colab. docs/unet_derain.md has the details.
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from PIL import Image

from utils import config, datasets, freeze, losses, processes, report, system, transfer, visualize
from utils.datasets import image_check, loaders, presets, windshield_pairs
from utils.datasets.samples import evenly, images_below
from utils.demo.windshield import ensure_windshield_demo
from utils.evaluation import image_quality
from utils.images import to_floats
from utils.networks import derainers, nafnet
from utils.networks.tiling import require_tiles, restore, usual_overlap
from utils.networks.unet import new_unet, require_arch
from utils.training import engine
from utils.training.plan import Plan, not_negative, whole

# --- data ---------------------------------------------------------------------------------------------------------
CLEAR_DIR = "./data/clear"              # clear images, searched recursively
RAINY_DIR = "./data/windshield_rainy_v40"  # the same names through a wet windshield
REAL_DIR: str | None = "./data/real_rainy"  # photographs of real rain without ground truth, only looked at; "" for none
MORE_PAIRS = ()                         # further pairs to train on: (("CLEAR", "RAINY", 0.3), ...), folders and their
                                        # share of each epoch; they are not validated on
TRAIN_PAIRS = 1200                      # the plan's split of 1550 pairs; fewer are shared out in proportion
VAL_PAIRS = 150                         # for "best", early stopping and the learning rate
TEST_PAIRS = 200                        # kept for Eval_unet_derain.py
SPLITS_FILE: str | None = ""            # a splits.json {"train": [names], "val": [...], "test": [...]} instead
SEQUENCE_SEPARATOR = ""                 # "_" keeps drive07_0001, drive07_0002, ... in one part; "" splits freely
IMAGE_SIZE = 256                        # with CROP_SIZES: validation sees the middle of larger images; else the side of
                                        # the square that is trained on, 512 for quality
RANDOM_CROP = False                     # CROP_SIZES = (): True cuts a random square, shrunk; False stretches
FLIP = 0.5                              # probability of mirroring
CROP_SIZES = (128,)                     # sides of squares cut at the images' own scale, so that rain keeps its width;
                                        # several share the run out, such as (64, 96, 128); the plan's: () stretches
CROP_ZOOM = 1.0                         # crops are enlarged by up to this factor: 3 teaches drops of many sizes
CROPS_PER_PAIR = 4                      # random squares of each pair in an epoch; 1 with CROP_SIZES = ()
KEEP_TONE = False                       # True leaves veil and contrast as they are: drops and streaks alone are learnt
COLOR_JITTER = 0.0                      # brightness, contrast, saturation, the same on both images; the plan's: 0.1
CACHE_GB = 0.0                          # decoded pairs that every loading process keeps in memory; 0 reads files anew

# --- model --------------------------------------------------------------------------------------------------------
ARCH = "unet"                           # the plan's own; "resnet34" or another encoder of segmentation_models_pytorch,
                                        # "nafnet" for long runs, or prenet, rescan, ddn, derainnet, spdnet
ENCODER_WEIGHTS: str | None = "imagenet"  # downloaded once; a local file of torchvision's; "" starts from random
BASE_WIDTH = 64                         # "unet": channels of the first level
DROPOUT = 0.2                           # share of channels dropped at the deepest levels, against overfitting
RESIDUAL = True                         # predict the correction of the input; False: the image itself
NAFNET_WIDTH = 48                       # "nafnet": channels of the first level, twice as many at each further one
NAFNET_ENCODER = (2, 2)                 # blocks of each level on the way down ...
NAFNET_MIDDLE = 4                       # ... of the deepest level ...
NAFNET_DECODER = (2, 2)                 # ... and on the way up
NAFNET_PATCH = 2                        # side of the squares that it works on: 1 in the paper, 2 is three times as fast
NAFNET_WINDOW = nafnet.WINDOW           # pixels that its channel attention averages over: about the training crop
NAFNET_RAIN_CHANNELS = 3                # 1 where the rain is grey (added streaks): one correction for all colours

# --- loss ---------------------------------------------------------------------------------------------------------
PSNR_WEIGHT = 1.0                       # 10 log10 of the mean squared error, in dB
L1_WEIGHT = 0.0                         # pixels; the plan's: 1.0 with PSNR_WEIGHT = 0
PERCEPTUAL_WEIGHT = 0.0                 # VGG16 features; the plan's: 0.1 to 0.5; 0 leaves VGG out
PERCEPTUAL_WEIGHTS = "imagenet"         # VGG16: downloaded once (528 MB), or a local file of torchvision's
SSIM_WEIGHT = 0.0                       # 1 - SSIM; the plan's: 0.1 to 0.3
CHARBONNIER_WEIGHT = 0.0                # a smooth L1, sqrt(error^2 + 0.001^2); 1 in the place of L1_WEIGHT
FFT_WEIGHT = 0.0                        # L1 of the Fourier spectra; 0.05 beside one of the others
EARLY_STAGES_WEIGHT = 0.0               # of the losses of earlier stages, where there are; 1 for rescan and spdnet

# --- training -----------------------------------------------------------------------------------------------------
EPOCHS = 100                            # the plan's; most runs stop before
BATCH_SIZE = 16                         # the plan's: 8, 16 if the GPU's memory allows; 0: as many as fit
GRADIENT_ACCUMULATION_STEPS = 1         # batches per optimizer step
LEARNING_RATE = 1e-3                    # the plan's: 1e-4 with OPTIMIZER = "adam"
OPTIMIZER = "adamw"                     # adam, adamw (weight decay 0.01) or sgd (momentum 0.9)
SCHEDULER = "cosine"                    # plateau (the plan's), cosine, step or constant
PLATEAU_FACTOR = 0.5                    # plateau: the rate is multiplied by this ...
PLATEAU_PATIENCE = 5                    # ... after so many epochs without a lower validation loss
DECAY_AT = (0.5, 0.75, 0.9)             # step: the rate is halved at these shares of the run
WARMUP_STEPS = 100                      # optimizer steps of linear warm-up; the plan's: 0
BETAS = (0.9, 0.9)                      # of adam and adamw, as in NAFNet's recipe; the plan's: (0.9, 0.999)
CLIP_NORM = 1.0                         # limit of the gradient's norm; 0: none
EMA_DECAY = 0.0                         # moving average of the weights, such as 0.999; it is then what best.pt holds
PRECISION = "float32"                   # bf16 (from Ampere on) or fp16 (T4, with a scaled loss): faster; auto: either
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
CHANNELS_LAST = True                    # memory format of the convolutions, see benchmarks/unet.py
TARGET_PSNR = 0.0                       # stop when both targets are reached on the validation pairs, such as the plan's
TARGET_SSIM = 0.0                       # 28 dB and 0.85; 0 and 0 never stop a run that still gets better
EARLY_STOPPING_PATIENCE = 15            # epochs without a lower validation loss; 0: never stop early
DATALOADER_WORKERS = 4                  # processes that load images; at most the number of cores is used
SEED = 0                                # split, order, augmentation, initial weights

# --- output -------------------------------------------------------------------------------------------------------
CHECKPOINT_DIR = "./outputs_unet"       # on Colab a mounted Drive: /content/drive/MyDrive/DriveDeRain/checkpoints
RESUME = False                          # True goes on from CHECKPOINT_DIR/last.pt
CHECKPOINT_EVERY = 10                   # epochs between two kept checkpoints; 0 for none
SAMPLE_EVERY = 5                        # epochs between two sheets of validation pairs; 0 for none
REAL_EVERY = 10                         # epochs between two sheets of real rain; 0 for none
CHECKPOINT_STEPS = 500                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
TILE = 1024                             # real photographs larger than this are restored in tiles

DEMO = {
    "CLEAR_DIR": "./demo/windshield/clear", "RAINY_DIR": "./demo/windshield/windshield_rainy_v40",
    "REAL_DIR": "./demo/windshield/real_rainy", "CHECKPOINT_DIR": "./demo/outputs_unet", "IMAGE_SIZE": 64,
    "TRAIN_PAIRS": 2050, "SEQUENCE_SEPARATOR": "_",  # each scene is there behind two panes
    "BASE_WIDTH": 16, "DROPOUT": 0.0, "CROP_SIZES": (), "CROPS_PER_PAIR": 1, "L1_WEIGHT": 1.0, "PSNR_WEIGHT": 0.0,
    "SSIM_WEIGHT": 0.1, "EPOCHS": 4, "BATCH_SIZE": 8, "LEARNING_RATE": 2e-3, "WARMUP_STEPS": 0, "OPTIMIZER": "adam",
    "BETAS": (0.9, 0.999),
    "DATALOADER_WORKERS": 0,
}
_OPTIMIZERS = {"adam": 0.0, "adamw": 0.01, "sgd": 0.0}  # weight decay
_OVERFITTING_WINDOW = 5  # epochs that are compared with as many before
_SHOWN, _SMALL = 480, 192  # widths of a photograph and, about, of a small image on the sheets
_MULTIPLE = 32  # IMAGE_SIZE: nothing is padded in training
_SMALLEST_CROP = 16  # of CROP_SIZES: SSIM takes 11 pixels


def check(cfg):
    """UserError for constants that cannot be or do not go together; Plan checks the others."""
    if cfg.IMAGE_SIZE < 1 or cfg.IMAGE_SIZE % _MULTIPLE:
        raise config.UserError(f"IMAGE_SIZE = {cfg.IMAGE_SIZE}: choose a multiple of {_MULTIPLE}, such as 256 or 512")
    if cfg.OPTIMIZER not in _OPTIMIZERS:
        raise config.UserError(f"OPTIMIZER = {cfg.OPTIMIZER!r}: choose one of {', '.join(_OPTIMIZERS)}")
    if len(cfg.BETAS) != 2 or not all(0 <= beta < 1 for beta in cfg.BETAS):
        raise config.UserError(f"BETAS = {cfg.BETAS}: choose two numbers in [0, 1), such as (0.9, 0.999)")
    if cfg.ARCH not in derainers.TRAINABLE:
        require_arch(cfg.ARCH, derainers.TRAINABLE)
    with torch.device("meta"):  # without numbers, for its sizes
        new_network(cfg)
    for size in cfg.CROP_SIZES:
        if size < _SMALLEST_CROP:
            raise config.UserError(f"CROP_SIZES = {cfg.CROP_SIZES}: choose whole numbers of at least {_SMALLEST_CROP}, "
                                   "such as (64,) or (64, 96, 128)")
    if len(cfg.CROP_SIZES) > cfg.EPOCHS:
        raise config.UserError(f"CROP_SIZES = {cfg.CROP_SIZES}: {len(cfg.CROP_SIZES)} sizes need as many EPOCHS at "
                               f"least, not {cfg.EPOCHS}")
    whole(1)("CROPS_PER_PAIR", cfg.CROPS_PER_PAIR)
    if not 1 <= cfg.CROP_ZOOM <= 16:
        raise config.UserError(f"CROP_ZOOM = {cfg.CROP_ZOOM}: choose 1 (off) or a factor up to 16")
    for entry in cfg.MORE_PAIRS:
        if [type(part) for part in entry] != [str, str, float] or not 0 < entry[2] < 1:
            raise config.UserError(f"MORE_PAIRS holds {entry!r}: write (\"clear folder\", \"rainy folder\", share), "
                                   "with a share between 0 and 1, and a comma after a single one: ((...),)")
    if (total := sum(entry[2] for entry in cfg.MORE_PAIRS)) >= 1:
        raise config.UserError(f"MORE_PAIRS: the shares add up to {total:g}, which leaves nothing of RAINY_DIR's own "
                               "pairs; they must stay below 1")
    for name in ("CACHE_GB", "EARLY_STAGES_WEIGHT"):
        not_negative(name, getattr(cfg, name))
    if not (0 <= cfg.FLIP <= 1 and cfg.COLOR_JITTER >= 0):
        raise config.UserError(f"FLIP = {cfg.FLIP} must be in [0, 1], COLOR_JITTER = {cfg.COLOR_JITTER} at least 0")
    for name in ("CHECKPOINT_EVERY", "SAMPLE_EVERY", "REAL_EVERY"):
        whole(0, "never")(name, getattr(cfg, name))
    for name in ("TARGET_PSNR", "TARGET_SSIM"):
        not_negative(name, getattr(cfg, name))
    if cfg.TARGET_SSIM >= 1:
        raise config.UserError(f"TARGET_SSIM = {cfg.TARGET_SSIM}: choose a number below 1, such as 0.85, or 0 for none")
    report.require_apart("CHECKPOINT_DIR", cfg.CHECKPOINT_DIR, [
        (name, getattr(cfg, name)) for name in ("CLEAR_DIR", "RAINY_DIR", "REAL_DIR")] + [
        ("MORE_PAIRS", folder) for entry in cfg.MORE_PAIRS for folder in entry[:2]])
    require_tiles(cfg.TILE, usual_overlap(cfg.TILE))


def without_effect(cfg):
    """-> {constant: what keeps it from having any effect, such as "ARCH = 'resnet34'"} of constants that do
    nothing with the others as they are."""
    arch, plain, own = f"ARCH = {cfg.ARCH!r}", cfg.ARCH == "unet", cfg.ARCH in derainers.TRAINABLE
    unused = [
        (not plain, arch, ("BASE_WIDTH",)), (plain or own, arch, ("ENCODER_WEIGHTS",)),
        (own, arch, ("DROPOUT", "RESIDUAL")),
        (cfg.ARCH != "nafnet", arch, ("NAFNET_WIDTH", "NAFNET_ENCODER", "NAFNET_MIDDLE", "NAFNET_DECODER",
                                      "NAFNET_PATCH", "NAFNET_WINDOW", "NAFNET_RAIN_CHANNELS")),
        (not cfg.PERCEPTUAL_WEIGHT, "PERCEPTUAL_WEIGHT = 0", ("PERCEPTUAL_WEIGHTS",)),
        (cfg.SCHEDULER != "plateau", f"SCHEDULER = {cfg.SCHEDULER!r}", ("PLATEAU_FACTOR", "PLATEAU_PATIENCE")),
        (cfg.SCHEDULER != "step", f"SCHEDULER = {cfg.SCHEDULER!r}", ("DECAY_AT",)),
        (cfg.OPTIMIZER == "sgd", "OPTIMIZER = 'sgd'", ("BETAS",)),
        (bool(cfg.CROP_SIZES), f"CROP_SIZES = {cfg.CROP_SIZES}", ("RANDOM_CROP",)),
        (not cfg.CROP_SIZES, "CROP_SIZES = ()", ("CROP_ZOOM",)),
        (cfg.ARCH not in derainers.STAGED, arch, ("EARLY_STAGES_WEIGHT",)),
        (bool(cfg.SPLITS_FILE), f"SPLITS_FILE = '{cfg.SPLITS_FILE}'", ("TRAIN_PAIRS", "VAL_PAIRS", "TEST_PAIRS",
                                                                       "SEQUENCE_SEPARATOR")),
    ]
    return {name: reason for holds, reason, names in unused if holds for name in names}


def build_plan(cfg):
    """-> Plan; UserError for settings that cannot be."""
    plan = Plan.of(cfg, epochs="EPOCHS", schedule="SCHEDULER",
                   loss_weights={"l1": "L1_WEIGHT", "perceptual": "PERCEPTUAL_WEIGHT", "ssim_loss": "SSIM_WEIGHT",
                                 "charbonnier": "CHARBONNIER_WEIGHT", "psnr_loss": "PSNR_WEIGHT", "fft": "FFT_WEIGHT"},
                   given={"plateau_metric": "val/loss", "precisions": ("float32", "bf16", "fp16")})
    return dataclasses.replace(plan, patience=0)  # of the score; here the loss stops a run early, see stop_reason


# ---- data ------------------------------------------------------------------------------------------------------

def build_data(cfg):
    """-> {"train", "val", "test": WindshieldPairs}; the test part may be empty."""
    found, notes = windshield_pairs.find_pairs(cfg.RAINY_DIR, cfg.CLEAR_DIR)
    kept = Path(cfg.CHECKPOINT_DIR) / "splits.json"
    file = cfg.SPLITS_FILE or (kept.as_posix() if cfg.RESUME and kept.is_file() else "")
    if file:
        names = windshield_pairs.read_splits(file, found, "SPLITS_FILE" if cfg.SPLITS_FILE else "RESUME = True")
        if not cfg.SPLITS_FILE:
            notes.append(f"the pairs are split as {kept.as_posix()} says, whatever TRAIN_PAIRS, VAL_PAIRS, TEST_PAIRS "
                         "and SEQUENCE_SEPARATOR are now")
    else:
        names, note = windshield_pairs.split_names(found, (cfg.TRAIN_PAIRS, cfg.VAL_PAIRS, cfg.TEST_PAIRS), cfg.SEED,
                                                   cfg.SEQUENCE_SEPARATOR)
        notes += [note] if note else []
    for note in notes:
        processes.say(f"note: {note}")
    if cfg.CROP_SIZES:
        train = [presets.crops(size, cfg.FLIP, cfg.COLOR_JITTER, cfg.CROP_ZOOM) for size in cfg.CROP_SIZES]
        still = presets.scaled(1.0, cfg.IMAGE_SIZE)
    else:
        train = [presets.unet_training(cfg.IMAGE_SIZE, cfg.RANDOM_CROP, cfg.FLIP, cfg.COLOR_JITTER)]
        still = presets.unet_evaluation(cfg.IMAGE_SIZE, cfg.RANDOM_CROP)
    if cfg.KEEP_TONE:
        train, still = [presets.keep_tone(preset) for preset in train], presets.keep_tone(still)
    train = presets.over_epochs(train, cfg.EPOCHS) if len(train) > 1 else train[0]
    data = {part: windshield_pairs.WindshieldPairs(
        found, names[part], train if part == "train" else still, cfg.SEED,
        crops=cfg.CROPS_PER_PAIR if part == "train" else 1, cache_gb=0 if part == "test" else cfg.CACHE_GB)
        for part in windshield_pairs.PARTS}
    if small := image_check.smaller_than([path for path, _ in evenly(data["train"].pairs, 50)],
                                         max(cfg.CROP_SIZES, default=0)):
        processes.say(f"note: CROP_SIZES = {cfg.CROP_SIZES} is more than the side of some images "
                      f"({system.listed(small, 2)}), which are mirrored to that size")
    data["train"] = with_more_pairs(cfg, data["train"], data["val"].pairs + data["test"].pairs)
    return data


def with_more_pairs(cfg, own, held_out):
    """-> the training pairs with those of MORE_PAIRS mixed in; `own` where there are none.

    held_out: pairs that are validated or tested on and that MORE_PAIRS may hold as well: they are left out there.
    """
    kept = {path.resolve() for pair in held_out for path in pair}
    parts, shares = [own], [1 - sum(share for *_, share in cfg.MORE_PAIRS)]
    for clear, rainy, share in cfg.MORE_PAIRS:
        found, notes = windshield_pairs.find_pairs(rainy, clear, ("MORE_PAIRS (rainy)", "MORE_PAIRS (clear)"))
        for note in notes:
            processes.say(f"note: MORE_PAIRS: {rainy}: {note}")
        left = {name: pair for name, pair in found.items() if not kept & {path.resolve() for path in pair}}
        if len(left) < len(found):
            processes.say(f"note: MORE_PAIRS: {len(found) - len(left)} of {len(found)} pairs of {rainy} are "
                          "validation or test pairs of RAINY_DIR and are left out")
        if not left:
            raise config.UserError(f"MORE_PAIRS: all pairs of {rainy} are validation or test pairs of RAINY_DIR")
        found = left
        parts.append(windshield_pairs.WindshieldPairs(found, sorted(found), own.transform, cfg.SEED,
                                                      cache_gb=cfg.CACHE_GB))
        shares.append(share)
        processes.say(f"MORE_PAIRS: {len(found)} pairs of {rainy} are {share:.0%} of each epoch")
    return windshield_pairs.PairMixture(parts, shares) if cfg.MORE_PAIRS else own


def build_loaders(cfg, data):
    """-> loader of the training pairs, loader of the validation pairs."""
    still = 1 if cfg.CROP_SIZES else cfg.BATCH_SIZE or cfg.usual_batch["BATCH_SIZE"]
    return (loaders.training_loader(data["train"], cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED),
            loaders.validation_loader(data["val"], still, cfg.DATALOADER_WORKERS))


def real_photographs(cfg, count=6):
    """-> up to `count` paths of REAL_DIR, evenly chosen; [] where there is none."""
    if not cfg.REAL_DIR or not cfg.REAL_EVERY:
        return []
    if problem := system.absent(cfg.REAL_DIR, folder=True):
        processes.say(f"note: REAL_DIR = '{cfg.REAL_DIR}' {problem}, so no real rain is looked at during training")
        return []
    chosen = evenly(images_below([cfg.REAL_DIR], "REAL_DIR"), count)
    image_check.check_images(chosen, "REAL_DIR")  # now, not in the epoch that draws them
    return chosen


# ---- model and loss --------------------------------------------------------------------------------------------

def new_network(cfg, encoder_weights=""):
    """-> the network of ARCH; UserError for sizes that cannot be."""
    if cfg.ARCH == "nafnet":
        return derainers.Derainer("nafnet", width=cfg.NAFNET_WIDTH, encoder=list(cfg.NAFNET_ENCODER),
                                  middle=cfg.NAFNET_MIDDLE, decoder=list(cfg.NAFNET_DECODER), patch=cfg.NAFNET_PATCH,
                                  window=cfg.NAFNET_WINDOW, rain_channels=cfg.NAFNET_RAIN_CHANNELS)
    if cfg.ARCH in derainers.TRAINABLE:
        return derainers.Derainer(cfg.ARCH)
    return new_unet(cfg.ARCH, cfg.BASE_WIDTH, cfg.DROPOUT, cfg.RESIDUAL, encoder_weights)


def build_model(cfg, device):
    """The network, on the device."""
    model = new_network(cfg, cfg.ENCODER_WEIGHTS)
    processes.say(freeze.describe({cfg.ARCH if cfg.ARCH in derainers.TRAINABLE else f"U-Net ({cfg.ARCH})": model}))
    return model.to(device, memory_format=torch.channels_last if cfg.CHANNELS_LAST else torch.preserve_format)


def build_perceptual(cfg, device):
    """-> PerceptualLoss, or None where PERCEPTUAL_WEIGHT is 0."""
    return losses.PerceptualLoss(cfg.PERCEPTUAL_WEIGHTS).to(device) if cfg.PERCEPTUAL_WEIGHT else None


def losses_of(restored, targets, weights, perceptual=None):
    """Named losses of restored images, (B, 3, H, W) in [0, 1] as the targets are: those that `weights` names."""
    terms = {"l1": losses.pixel_l1, "perceptual": perceptual, "ssim_loss": losses.ssim_loss,
             "charbonnier": losses.charbonnier, "psnr_loss": losses.psnr_loss, "fft": losses.fft_l1}
    return {name: terms[name](restored, targets) for name in weights}


def compute_losses(model, batch, weights, perceptual=None, early=0.0):
    """Named losses of one batch, see `losses_of`; of a network with stages the earlier ones' losses times `early` are
    added."""
    if not early:
        return losses_of(model(batch["images"]), batch["twins"], weights, perceptual)
    *others, last = (losses_of(restored, batch["twins"], weights, perceptual)
                     for restored in model(batch["images"], every_stage=True))
    return {name: value + early * sum(other[name] for other in others) for name, value in last.items()}


def build_optimizer(cfg, model):
    """-> what engine.fit takes as `optimizer`, parameter groups."""
    make = (partial(torch.optim.SGD, momentum=0.9) if cfg.OPTIMIZER == "sgd" else
            partial(torch.optim.AdamW, betas=tuple(cfg.BETAS)))
    return make, [{"params": list(model.parameters()), "lr": cfg.LEARNING_RATE,
                   "weight_decay": _OPTIMIZERS[cfg.OPTIMIZER]}]


# ---- validation ------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, loader, device, weights, perceptual=None):
    """-> {"val/loss", "val/psnr", "val/ssim", "val/psnr_y", "val/ssim_y"}: means over images."""
    def scores(batch):
        batch = datasets.to_device(batch, device)
        restored = model(batch["images"])
        terms = losses_of(restored, batch["twins"], weights, perceptual)
        quality = image_quality.image_quality(restored, batch["twins"])
        return transfer.rows({f"loss {name}": term.expand(len(restored)) for name, term in terms.items()} | quality)
    means = processes.mean_over_ranks([one for several in loaders.each(scores, loader) for one in several])
    loss = sum(weights[name] * means.pop(f"loss {name}") for name in weights)
    return {"val/loss": loss} | {f"val/{name}": value for name, value in means.items()}


def stop_reason(history, cfg):
    """Why training should end after these epochs, or None: the targets are reached, or the validation loss has found
    no new minimum for EARLY_STOPPING_PATIENCE epochs."""
    last = history[-1]
    if (cfg.TARGET_PSNR or cfg.TARGET_SSIM) and (last["val/psnr"] > cfg.TARGET_PSNR
                                                 and last["val/ssim"] > cfg.TARGET_SSIM):
        return f"target reached: PSNR {last['val/psnr']:.2f} dB, SSIM {last['val/ssim']:.4f}"
    values = [record["val/loss"] for record in history]
    if cfg.EARLY_STOPPING_PATIENCE and len(values) - 1 - values.index(min(values)) >= cfg.EARLY_STOPPING_PATIENCE:
        return f"no lower val/loss in {cfg.EARLY_STOPPING_PATIENCE} epochs"
    return None


def is_overfitting(history, window=_OVERFITTING_WINDOW):
    """Whether the validation loss rises while the training loss falls: means of the last `window` epochs against those
    of as many before."""
    if len(history) < 2 * window:
        return False

    def rise(name):
        values = [record[name] for record in history[-2 * window:]]
        return sum(values[window:]) - sum(values[:window])
    return rise("val/loss") > 0 and rise("loss") < 0


# ---- pictures --------------------------------------------------------------------------------------------------

@torch.no_grad()
def pair_sheet(model, dataset, device, count=4, headings=("rainy", "derained", "ground truth"), path=None):
    """-> PIL page of image | the network's | truth, evenly chosen pairs; also written to `path` where one is given."""
    rows = []
    for sample in evenly(dataset, count):
        batch = datasets.to_device(datasets.collate([sample]), device)
        cells = [visualize.to_pil(images[0]) for images in (batch["images"], model(batch["images"]), batch["twins"])]
        scale = max(1, round(_SMALL / cells[0].width))  # small images are enlarged
        rows.append([cell.resize((cell.width * scale, cell.height * scale), Image.Resampling.BICUBIC)
                     for cell in cells])
    return visualize.grid(rows, headings, path)


def sample_images(model, dataset, device):
    """-> {tag: picture} for TensorBoard, see `pair_sheet`."""
    return {"rainy, derained, truth": visualize.as_tensor(pair_sheet(model, dataset, device))}


def real_sheet(model, paths, tile):
    """-> PIL page of photograph | restored, shrunk to a common width."""
    rows = []
    for path in paths:
        image = to_floats(datasets.read_image(path)[None])
        cells = [visualize.to_pil(picture[0]) for picture in
                 (image, restore(model, image, tile, usual_overlap(tile)))]
        size = (min(_SHOWN, cells[0].width), max(1, round(cells[0].height * min(1, _SHOWN / cells[0].width))))
        rows.append([cell.resize(size, Image.Resampling.LANCZOS) for cell in cells])
    return visualize.grid(rows, ["real rain", "derained"])


def after_epoch(model, history, cfg, data, photographs, device):
    """What is written beside the engine's own files when an epoch is saved; a warning where the network overfits."""
    epoch, folder = len(history), Path(cfg.CHECKPOINT_DIR)

    def due(every):
        return every and (epoch % every == 0 or epoch == cfg.EPOCHS)
    if not processes.is_main():
        return
    if not (folder / "splits.json").is_file():
        report.write_json(folder / "splits.json", {part: found.names for part, found in data.items()} | {
            "rainy_dir": Path(cfg.RAINY_DIR).resolve().as_posix()})
    if due(cfg.SAMPLE_EVERY):
        save_page(pair_sheet(model, data["val"], device), folder / "samples" / f"epoch_{epoch:04d}.png")
    if photographs and due(cfg.REAL_EVERY):
        save_page(real_sheet(model, photographs, cfg.TILE), folder / "real_rain" / f"epoch_{epoch:04d}.png")
    if cfg.CHECKPOINT_EVERY and epoch % cfg.CHECKPOINT_EVERY == 0:
        copy_file(folder / "last.pt", folder / "checkpoints" / f"epoch_{epoch:04d}.pt")
    if is_overfitting(history):
        processes.say("warning: the validation loss rises while the training loss falls, the network begins to learn "
                      "its pairs by heart; more pairs, DROPOUT, COLOR_JITTER or RANDOM_CROP help")


def save_page(page, path):
    """Write a picture, its folder included."""
    with config.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)


def copy_file(source, target):
    """Copy a file, complete or not at all."""
    with config.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with system.written(target) as temporary:
            shutil.copyfile(source, temporary)


# ---- the run ---------------------------------------------------------------------------------------------------

def main(**overrides):
    """Train; -> {"history", "best_epoch", "best_score", "stopped"} of engine.fit, and {"rainy_input": the validation
    metrics of the images as they are}."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    plan = build_plan(cfg)
    for name, reason in without_effect(cfg).items():
        if name in overrides and overrides[name] != globals()[name]:  # asked for, so it was meant to change something
            processes.say(f"note: {name} has no effect with {reason}")
    if cfg.demo:
        ensure_windshield_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    data = build_data(cfg)  # first: a wrong folder is found before weights are downloaded
    train_loader, val_loader = build_loaders(cfg, data)
    photographs = real_photographs(cfg)
    model = build_model(cfg, device)
    perceptual = build_perceptual(cfg, device)
    weights = plan.loss_weights
    untouched = evaluate(lambda images: images, val_loader, device, weights, perceptual)
    processes.say(f"rainy input: {untouched['val/psnr']:.2f} dB, SSIM {untouched['val/ssim']:.4f} (validation pairs)")
    optimizer, groups = build_optimizer(cfg, model)

    result = engine.fit(
        model, train_loader, partial(compute_losses, weights=weights, perceptual=perceptual,
                                     early=cfg.EARLY_STAGES_WEIGHT), plan,
        output_dir=cfg.CHECKPOINT_DIR, parameters=groups, optimizer=optimizer,
        evaluate=partial(evaluate, loader=val_loader, device=device, weights=weights, perceptual=perceptual),
        score="val/psnr", sample_images=partial(sample_images, dataset=data["val"], device=device),
        on_epoch=partial(after_epoch, cfg=cfg, data=data, photographs=photographs, device=device),
        stop=partial(stop_reason, cfg=cfg), constants=cfg.as_dict(),
        fixed=("IMAGE_SIZE", "RANDOM_CROP", "CROP_SIZES", "KEEP_TONE", "RESIDUAL", "NAFNET_WINDOW", "OPTIMIZER"),
        validated_on=[data["val"].names, data["test"].names], validated_images=data["val"].image_paths(),
        own_files=("checkpoints", "samples", "real_rain", "splits.json", "eval"))
    if result["history"]:
        best = result["history"][result["best_epoch"] - 1]
        columns = {"images": "validation pairs", "val/psnr": "PSNR (RGB)", "val/ssim": "SSIM (RGB)",
                   "val/psnr_y": "PSNR (Y)", "val/ssim_y": "SSIM (Y)"}
        processes.say(report.table([{"images": "rainy input"} | untouched, {"images": "derained"} | best], columns))
        processes.say(f"gain: {best['val/psnr'] - untouched['val/psnr']:+.2f} dB\n"
                      f"network: {(Path(cfg.CHECKPOINT_DIR) / 'best.pt').as_posix()}")
    return result | {"rainy_input": untouched}


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
