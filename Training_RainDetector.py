"""Train the rain detector: is there rain, mist or water on the lens in this image? One probability per image.

MobileNetV3-Small on clean images, their rainy twins from disk, and weather that is rendered anew in every epoch (light
to heavy streaks, mist without streaks, drops on the lens). Both classes get the same JPEG artefacts, resize kernels,
blur, noise and brightness, so that none of these tells them apart; see docs/rain_detector.md.

    python Training_RainDetector.py --demo
    python Training_RainDetector.py --TEST_CLEAN_DIRS "('./photos_dry',)" --TEST_RAINY_DIRS "('./photos_rain',)"

Writes OUTPUT_DIR/rain_detector_best.pt (best epoch by likelihood on the validation part; calibrated, with the threshold
for FALSE_ALARM_RATE), test.json, rain_roc.png, rain_mistakes.png, last.pt, best.pt, metrics.json, curves.png and tb/.
"""

from functools import partial
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F

from utils import config, datasets, freeze, processes, report, visualize
from utils.datasets import image_check, loaders, rain_or_clean
from utils.datasets.samples import images_below
from utils.demo.coco import ensure_demo
from utils.evaluation import classification, rain_report
from utils.networks.rain_detector import SIDE as _SIDE
from utils.networks.rain_detector import load_rain_detector, new_rain_detector, save_rain_detector
from utils.training import engine, run_folder
from utils.training.plan import Plan
from utils.transfer import sent
from utils.weather import kinds

# --- data ---------------------------------------------------------------------------------------------------------
CLEAN_DIRS = ("./dataset/coco/train2017",)  # clean images, searched recursively
RAINY_DIRS = ("./dataset/coco_rain/train2017",)  # rainy images, twins of the clean ones or not; () renders all rain
RENDERED_SHARE = 0.5                    # share of the rainy samples that are rendered anew, the others come from disk
RAIN_KINDS = {                          # shares of these; also fog, for a gate to a specialist for it
    "light": 0.25, "medium": 0.15, "heavy": 0.1, "mist": 0.2, "drops": 0.15, "drops and rain": 0.15}
PERCENT_DATASET: float = 10             # seeded subset of both in percent
VALIDATION_SHARE = 0.1                  # part that is kept for validation; a clean image and its twin go together
TEST_CLEAN_DIRS = ()                    # folders that are only scored at the end, best real photographs: dry ...
TEST_RAINY_DIRS = ()                    # ... and wet
TEST_PREFIXES = ()                      # score files of these prefixes separately: ("rain_", "mist_")

# --- model --------------------------------------------------------------------------------------------------------
BACKBONE_WEIGHTS: str | None = "imagenet"  # imagenet (torchvision loads 10 MB), a file of it, or "" for random
FALSE_ALARM_RATE = 0.01                 # share of clean validation images that the stored threshold may call rainy

# --- training -----------------------------------------------------------------------------------------------------
NUM_EPOCHS = 10                         # the weather of every epoch is new
BATCH_SIZE = 64                         # half of them rainy on average; 0: as many as fit
LEARNING_RATE = 3e-4                    # from ImageNet weights; 1e-3 from random ones
WEIGHT_DECAY = 1e-2                     # not on biases and normalisation layers
WARMUP_STEPS = 50                       # optimizer steps of linear warm-up
SCHEDULE = "cosine"                     # constant, cosine or step (halved at 1/2, 3/4 and 9/10 of the run)
CLIP_NORM = 5.0                         # limit of the gradient's norm; 0: none
PRECISION = "float32"                   # bf16 is faster on GPUs from Ampere on; auto: where it is there
FAST = ()                               # for GPUs: "tf32", "channels_last", see docs/gpu.md; () changes nothing
EARLY_STOPPING_PATIENCE = 5             # epochs without a better validation likelihood; 0: never stop early
DATALOADER_WORKERS = 8                  # processes that render; at most the number of cores is used
SEED = 0                                # subset, order, weather, augmentation

# --- output -------------------------------------------------------------------------------------------------------
OUTPUT_DIR = "./rain_detector_pretrained"
RESUME = False                          # True goes on from OUTPUT_DIR/last.pt
CHECKPOINT_STEPS = 200                  # optimizer steps between two writes of last.pt within an epoch
TRACKERS = ("tensorboard",)             # curves in tb/; also "wandb", "mlflow", "trackio"; () for none
EVAL_BATCH_SIZE = 64                    # validation batch

DEMO = {
    "CLEAN_DIRS": ("./demo/coco/train2017",), "RAINY_DIRS": ("./demo/coco_rain/train2017",), "PERCENT_DATASET": 100,
    "TEST_CLEAN_DIRS": ("./demo/coco/val2017",), "TEST_RAINY_DIRS": ("./demo/coco_rain/val2017",),
    "BACKBONE_WEIGHTS": "", "LEARNING_RATE": 1e-3, "NUM_EPOCHS": 4, "BATCH_SIZE": 32, "DATALOADER_WORKERS": 0,
    "OUTPUT_DIR": "./demo/rain_detector_pretrained",
}
_TEST_FILES = ("test.json", "rain_roc.png", "rain_mistakes.png")


def build_data(cfg):
    """-> training data, validation data; no file name is in both."""
    shares = kinds.require_shares(cfg.RAIN_KINDS)
    if not 0 < cfg.VALIDATION_SHARE < 1:
        raise config.UserError(f"VALIDATION_SHARE = {cfg.VALIDATION_SHARE}: choose a share in (0, 1), such as 0.1")
    for folder in cfg.CLEAN_DIRS:
        datasets.require_no_rain(folder, ("CLEAN_DIRS", "RAINY_DIRS"))
    parts = {"train": [], "val": []}
    for folders, constant in ((cfg.CLEAN_DIRS, "CLEAN_DIRS"), (cfg.RAINY_DIRS, "RAINY_DIRS")):
        paths = images_below(folders, constant)
        chosen = datasets.seeded_subset([path.stem for path in paths], cfg.PERCENT_DATASET, cfg.SEED)
        paths = [paths[i] for i in chosen]
        image_check.check_images(paths, constant)
        for part, held_out in (("train", False), ("val", True)):
            parts[part].append([p for p in paths if rain_or_clean.in_validation(p, cfg.VALIDATION_SHARE) == held_out])
    if {path.resolve() for path in parts["train"][0]} & {path.resolve() for path in parts["train"][1]}:
        raise config.UserError("CLEAN_DIRS and RAINY_DIRS share images: an image cannot be both")
    counts = [len(parts[part][0]) for part in ("train", "val")]
    if not all(counts):
        raise config.UserError(f"VALIDATION_SHARE = {cfg.VALIDATION_SHARE} makes {counts[0]} training and {counts[1]} "
                               f"validation images of the {sum(counts)} of CLEAN_DIRS: choose another share, or give "
                               "more images")
    trained = {path.resolve() for paths in parts["train"] for path in paths}
    for constant in ("TEST_CLEAN_DIRS", "TEST_RAINY_DIRS"):
        tested = images_below(getattr(cfg, constant), constant) if getattr(cfg, constant) else []
        if both := sum(path.resolve() in trained for path in tested):
            processes.say(f"note: {both} of {len(tested)} images of {constant} are trained on as well: their scores "
                          "say little")
    return [rain_or_clean.RainClassificationDataset(*parts[part], cfg.RENDERED_SHARE, shares, part == "train", cfg.SEED,
                                                    _SIDE) for part in ("train", "val")]


def parameter_groups(model, cfg):
    """Biases and normalisation layers without weight decay."""
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    return [{"params": groups[is_matrix], "lr": cfg.LEARNING_RATE,
             "weight_decay": cfg.WEIGHT_DECAY if is_matrix else 0.0} for is_matrix in (True, False)]


def compute_losses(model, batch):
    """{"bce": binary cross-entropy of the logit; "accuracy": share of right answers at 0.5, only reported}."""
    logits = model(batch["images"])
    targets = sent(torch.tensor([float(domain == "rainy") for domain in batch["domains"]]), logits.device)
    return {"bce": F.binary_cross_entropy_with_logits(logits.float(), targets),
            "accuracy": ((logits > 0) == (targets > 0.5)).float().mean().detach()}


def evaluate(model, loader, device, false_alarm_rate):
    """Calibrate on the validation images (temperature and threshold are set in the model), then score.

    Returns:
        {"val/likelihood": mean log-likelihood, calibrated, "val/auroc", "val/recall" and "val/false_alarms" at the
        chosen threshold, "val/threshold", "val/temperature"}.
    """
    logits, targets, _ = rain_report.logits_of(model, loader, device)
    temperature = classification.fit_temperature(logits, targets)
    probabilities = torch.sigmoid(logits / temperature).numpy()
    threshold = classification.threshold_for_false_alarms(probabilities, targets.numpy(), false_alarm_rate)
    model.temperature.fill_(temperature)
    model.operating_threshold.fill_(threshold)
    counts = classification.counts(probabilities, targets.numpy(), threshold)
    return {"val/auroc": classification.auroc(logits.numpy(), targets.numpy()),
            "val/likelihood": -F.binary_cross_entropy_with_logits(logits / temperature, targets).item(),
            "val/recall": counts["recall"], "val/false_alarms": counts["false_alarm_rate"],
            "val/threshold": threshold, "val/temperature": temperature}


def sample_images(model, dataset, device):
    """-> {tag: picture}: what the network saw and what it said, clean above, rainy below."""
    half = len(dataset) // 2
    count = min(6, half)
    rows = []
    for start in (0, half):
        samples = [dataset[start + i * half // count] for i in range(count)]
        batch = datasets.to_device(datasets.collate(samples), device)
        rows.append([visualize.captioned(visualize.to_pil(image), f"p = {p:.2f}")
                     for image, p in zip(batch["images"], model.probability(batch["images"]).tolist(), strict=True)])
    return {"clean above, rainy below": visualize.as_tensor(visualize.grid(rows, [""] * count))}


def test(cfg, path, device):
    """Score the TEST_* folders with the trained detector: table, test.json, pictures."""
    sets = rain_report.test_sets(cfg.TEST_CLEAN_DIRS, cfg.TEST_RAINY_DIRS, cfg.TEST_PREFIXES)
    rain_detector = load_rain_detector(path, device)
    predicted = rain_report.predict_sets(rain_detector, sets, device, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
    summary = rain_report.summarise(predicted, rain_detector.operating_threshold.item())
    if processes.is_main():
        print("\n" + rain_report.describe(summary))
        report.write_results(Path(cfg.OUTPUT_DIR) / "test.json", cfg.as_dict(), summary)
        rain_report.write_pictures(predicted, summary["threshold"], cfg.OUTPUT_DIR)
    return summary


def note_weak(best):
    """Say where the best epoch's metrics are those of no useful gate."""
    if best["val/recall"] < 0.5:
        processes.say(f"note: at its threshold it calls {best['val/recall']:.0%} of the rainy validation images rainy, "
                      "the others would never be de-rained: give it more images (PERCENT_DATASET), more epochs "
                      "(NUM_EPOCHS), or BACKBONE_WEIGHTS = 'imagenet'; from random weights a LEARNING_RATE of 1e-3")


def train_and_test(cfg, plan, model, train_loader, val, device):
    """The run in its folder. -> the result of engine.fit, and {"test": summary} where there are TEST_* folders"""
    val_loader = loaders.validation_loader(val, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)
    output = Path(cfg.OUTPUT_DIR) / "rain_detector_best.pt"
    result = engine.fit(
        model, train_loader, compute_losses, plan, output_dir=cfg.OUTPUT_DIR, parameters=parameter_groups(model, cfg),
        evaluate=partial(evaluate, loader=val_loader, device=device, false_alarm_rate=cfg.FALSE_ALARM_RATE),
        score="val/likelihood",
        on_best=partial(save_rain_detector, path=output),
        sample_images=partial(sample_images, dataset=val, device=device), constants=cfg.as_dict(),
        fixed=("VALIDATION_SHARE", "FALSE_ALARM_RATE", "RENDERED_SHARE", "RAIN_KINDS", "SEED"),  # validation too
        validated_on=[len(val.clean), len(val.rainy)], validated_images=val.image_paths(),
        own_files=(output.name, *_TEST_FILES))
    if not output.is_file():
        return result
    if cfg.TEST_CLEAN_DIRS:
        if cfg.RESUME:  # the folder may hold the test of another length of the run, or of other images
            report.output_folder(cfg.OUTPUT_DIR, _TEST_FILES)
        result["test"] = test(cfg, output, device)
    processes.say(f"\nrain detector: {output.as_posix()}")
    note_weak(result["history"][result["best_epoch"] - 1])
    return result


def main(**overrides):
    """Train and test; -> {"history", "best_epoch", "best_score", "stopped", "test"}."""
    cfg = config.resolve(globals(), overrides)
    classification.require_rate(cfg.FALSE_ALARM_RATE)
    if bool(cfg.TEST_CLEAN_DIRS) != bool(cfg.TEST_RAINY_DIRS):
        raise config.UserError("TEST_CLEAN_DIRS and TEST_RAINY_DIRS belong together: set both or neither")
    report.require_apart("OUTPUT_DIR", cfg.OUTPUT_DIR, [
        (name, folder) for name in ("CLEAN_DIRS", "RAINY_DIRS", "TEST_CLEAN_DIRS", "TEST_RAINY_DIRS")
        for folder in getattr(cfg, name)])
    plan = Plan.of(cfg, loss_weights={"bce": 1.0})
    if cfg.demo:
        ensure_demo()
    engine.seed_everything(cfg.SEED)
    device = processes.announced_device()
    model = new_rain_detector(cfg.BACKBONE_WEIGHTS).to(device)
    processes.say(freeze.describe({"rain detector": model}))
    train, val = build_data(cfg)
    if cfg.TEST_CLEAN_DIRS:  # a wrong folder is found now, not after the training
        rain_report.test_sets(cfg.TEST_CLEAN_DIRS, cfg.TEST_RAINY_DIRS, cfg.TEST_PREFIXES)
    train_loader = loaders.training_loader(train, cfg.BATCH_SIZE, cfg.DATALOADER_WORKERS, cfg.SEED)
    with run_folder.claimed(cfg.OUTPUT_DIR):
        return train_and_test(cfg, plan, model, train_loader, val, device)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # one input size: let cuDNN pick the fastest kernels
    main(**config.from_command_line(globals()))
