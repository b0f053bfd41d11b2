"""Compare de-rainers, published and own, on test pairs, on real rain, and by what a detector finds after each.

    python Eval_derain_baselines.py --demo              # after python train_unet_derain.py --demo
    python Eval_derain_baselines.py --demo --study      # also a page that asks people
    python Eval_derain_baselines.py --TEST_SETS ./data/Rain100L/test --MODELS "{'PReNet': ('prenet', 'PReNet.pth')}"

Per test set and method: PSNR and SSIM by three protocols, LPIPS, their 95% bootstrap intervals over images; per method
milliseconds, parameters, multiply-adds and memory; with LABELED_RAIN_DIR the detector's mAP behind each de-rainer,
because the better picture is not always the one that is better to detect on. Whatever has no weights is a row that says
so.

Writes OUTPUT_DIR/results.json, results.csv, results.md, crops.png (where the methods differ most), real_rain.png,
latency_quality.png and, with a detector, map_quality.png; with --study also study.html, a page in which people
say blindly which of two results they prefer (python -m tools.study_results reads what they save).
docs/derain_baselines.md has the layouts and protocols.
"""

from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from torch.utils.flop_counter import FlopCounterMode

from utils import config, memory, processes, report, system, transfer
from utils.datasets import derain_sets, image_check, windshield_pairs
from utils.datasets.samples import evenly, images_below, images_by_name, read_image
from utils.demo.coco import ensure_demo
from utils.demo.windshield import ensure_windshield_demo
from utils.evaluation import behind_derainer, derain_report, image_quality, latency, study
from utils.images import to_floats
from utils.networks import derainers
from utils.networks.refiner import read_settings
from utils.networks.rtdetr import require_size
from utils.networks.tiling import require_tiles, restore

# --- data ---------------------------------------------------------------------------------------------------------
TEST_SETS = ("./data/Rain100L/test",)   # folders of test pairs, known by their layout (docs/derain_baselines.md)
SPLITS_FILE: str | None = ""            # splits.json of train_unet_derain.py: of its pairs only the test part; "" all
REAL_DIR: str | None = ""               # photographs of real rain without ground truth, only looked at; "" for none
LABELED_RAIN_DIR: str | None = ""       # COCO-layout root of rainy images with boxes (its val split); "" for no mAP
MAX_IMAGES = 0                          # of each test set, evenly chosen; 0 for all

# --- methods ------------------------------------------------------------------------------------------------------
MODELS = {                              # {row: (network of utils/networks/derainers.py, weights)}; absent ones say so
    "U-Net": ("unet", "./outputs_unet/best.pt"), "NAFNet": ("nafnet", "./outputs_nafnet/best.pt"),
    "U-Net + refiner": ("refiner", "./outputs_refiner/refiner"),
    "SPDNet": ("spdnet", "./model_spa.pt"), "DerainNet": ("derainnet", "./weights/derainnet.pth"),
    "DDN": ("ddn", "./weights/ddn.pth"), "RESCAN": ("rescan", "./weights/rescan.pth"),
    "PReNet": ("prenet", "./weights/prenet.pth"), "MPRNet": ("mprnet", "./weights/model_deraining.pth"),
    "Restormer": ("restormer", "./weights/deraining.pth"),
}
RESULTS_DIRS = ()                       # "NAME=FOLDER": images that other code wrote, with the rainy files' names
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # detects in LABELED_RAIN_DIR
LPIPS_WEIGHTS: str | None = ""          # AlexNet: "imagenet" (233 MB, once), a local file of torchvision's, or ""

# --- evaluation ---------------------------------------------------------------------------------------------------
TILE = 1024                             # larger images are restored in tiles: bounded memory; 0 for whole images
OVERLAP = 128                           # pixels that neighbouring tiles share
LATENCY_SIZE = 256                      # side of the square that is timed, batch 1
IMAGE_SIZE = 640                        # RT-DETR's square input, which the de-rainer sees
UNKNOWN_CATEGORIES = "ignore"           # "error" refuses labels that RT-DETR does not know
EVAL_BATCH_SIZE = 4                     # for RT-DETR
DATALOADER_WORKERS = 4                  # processes that load images; at most the number of cores is used
PICTURES = 4                            # rows of each sheet
CROP = 96                               # side of the zoomed crops
OUTPUT_DIR = "./outputs_derain_baselines"

# --- user study: study.html ---------------------------------------------------------------------------------------
STUDY = False                           # --study: also write the page in which people compare the results, blindly
STUDY_PAIRS = 60                        # comparisons at most that a participant is asked for; a few seconds each
STUDY_SCENES = 12                       # images at most of the first test set (else of REAL_DIR) that it shows
STUDY_SIDE = 640                        # pixels at most of an image's longer side in it: about 0.1 MB an image

DEMO = {
    "TEST_SETS": ("./demo/windshield",), "SPLITS_FILE": "./demo/outputs_unet/splits.json", "MAX_IMAGES": 60,
    "LABELED_RAIN_DIR": "./demo/coco_rain",
    "MODELS": {"U-Net": ("unet", "./demo/outputs_unet/best.pt"),
               "U-Net + refiner": ("refiner", "./demo/outputs_refiner/refiner"),
               "SPDNet": ("spdnet", "./assets/demo/spdnet.pt"), "PReNet": ("prenet", "./weights/prenet.pth")},
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "IMAGE_SIZE": 160, "EVAL_BATCH_SIZE": 8, "DATALOADER_WORKERS": 0,
    "LATENCY_SIZE": 160, "CROP": 32, "OUTPUT_DIR": "./demo/outputs_derain_baselines",
}
_FILES = ("results.json", "results.csv", "results.md", "crops.png", "real_rain.png", "latency_quality.png",
          "map_quality.png", "study.html")


def check(cfg):
    """UserError for constants that cannot be, before anything is loaded."""
    require_tiles(cfg.TILE, cfg.OVERLAP)
    for name, least in (("MAX_IMAGES", 0), ("PICTURES", 1), ("CROP", 8), ("LATENCY_SIZE", 16), ("STUDY_PAIRS", 1),
                        ("STUDY_SCENES", 1), ("STUDY_SIDE", 32)):
        if getattr(cfg, name) < least:
            raise config.UserError(f"{name} = {getattr(cfg, name)}: choose {least} or more")
    if not cfg.TEST_SETS and not cfg.REAL_DIR and not cfg.LABELED_RAIN_DIR:
        raise config.UserError("TEST_SETS, REAL_DIR and LABELED_RAIN_DIR are all empty: there is nothing to compare on")
    if cfg.STUDY and not cfg.TEST_SETS and not cfg.REAL_DIR:
        raise config.UserError("STUDY shows images of TEST_SETS or of REAL_DIR, and both are empty")
    for row, entry in cfg.MODELS.items():
        if not isinstance(row, str) or not row.strip():
            raise config.UserError(f"MODELS: {row!r} is no name of a row, write text such as 'PReNet'")
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and all(isinstance(text, str) for text in entry)):
            raise config.UserError(f"MODELS['{row}'] = {entry!r}: give a network and its weights, such as "
                                   "('prenet', './weights/prenet.pth')")
        derainers.require_name(entry[0], f"MODELS['{row}']")
    for text in cfg.RESULTS_DIRS:
        row, _, folder = text.partition("=")
        if not row.strip() or not folder.strip():
            raise config.UserError(f"RESULTS_DIRS holds {text!r}: write NAME=FOLDER, such as "
                                   "'DRSformer=./results/drsformer'")
    titles = [derain_report.RAINY, *cfg.MODELS, *(text.partition("=")[0] for text in cfg.RESULTS_DIRS)]
    if len(set(titles)) < len(titles):
        raise config.UserError(f"MODELS and RESULTS_DIRS: a name is there twice ({', '.join(titles)})")
    report.require_apart("OUTPUT_DIR", cfg.OUTPUT_DIR, [
        ("TEST_SETS", folder) for folder in cfg.TEST_SETS] + [("REAL_DIR", cfg.REAL_DIR)])


# ---- methods ---------------------------------------------------------------------------------------------------

def load_models(cfg, device):
    """-> {row: network in eval mode}, {row: why it is absent}."""
    models, absent = {}, {}
    for row, (name, weights) in cfg.MODELS.items():
        if problem := system.absent(weights, folder=name == "refiner"):
            absent[row] = f"{weights} {problem}; {derainers.source_of(name).get}"
        else:
            models[row] = derainers.load_derainer(name, weights, device, f"MODELS['{row}']")
    return models, absent


def note_trained_on(cfg, sets, models):
    """A line for each network that was trained on pairs of a test set, as the splits.json beside its weights says."""
    for row in models:
        kind, weights = cfg.MODELS[row]
        if kind == "refiner":  # learns from its de-rainer's pairs
            weights = read_settings(weights, f"MODELS['{row}']")["derainer"]
        for name, pairs in sets.items():
            rainy = next(iter(pairs.values())).rainy.parent
            if seen := windshield_pairs.trained_on(weights, rainy, pairs):
                processes.say(f"note: {name}: '{row}' was trained or validated on {len(seen)} of {len(pairs)} pairs "
                              "(splits.json beside its weights): set SPLITS_FILE to that file to leave them out")


def result_files(cfg, pairs, name):
    """-> {row: {pair: path}} of RESULTS_DIRS for one test set: FOLDER/<set>/ where that is there, else FOLDER.

    Raises:
        UserError: a missing, unreadable or differently sized image, or a test set's own images; names RESULTS_DIRS.
    """
    own = {path.resolve() for pair in pairs.values() for path in (pair.rainy, pair.clean)}
    plain = [Path(pair).name for pair in pairs]
    found = {}
    for text in cfg.RESULTS_DIRS:
        row, _, folder = text.partition("=")
        folder = Path(folder) / name if (Path(folder) / name).is_dir() else Path(folder)
        files = images_by_name(folder, "RESULTS_DIRS", "Set the constant to a folder of images.")
        # the file's name alone will do where no other pair has it
        paths = {pair: files.get(pair) or (files.get(last) if plain.count(last) == 1 else None)
                 for pair, last in zip(pairs, plain, strict=True)}
        if missing := [pair for pair, path in paths.items() if path is None]:
            raise config.UserError(f"RESULTS_DIRS: '{text}' has no image for {system.listed(missing, 3)} of {name}")
        if same := [path.as_posix() for path in paths.values() if path.resolve() in own]:
            raise config.UserError(f"RESULTS_DIRS: '{text}' holds images of the test set {name} itself, such as "
                                   f"{same[0]}, and no method's results")
        image_check.check_images(list(paths.values()), "RESULTS_DIRS")
        for pair, path in paths.items():
            if image_check.size_of(path) != pairs[pair].size():
                raise config.UserError(f"RESULTS_DIRS: {path.as_posix()} has another size than the clean image")
        found[row] = paths
    return found


def costs(cfg, models, device):
    """-> {row: {"ms", "parameters", "GMAC", "GB"}} at LATENCY_SIZE, batch 1; timed in turns."""
    images = torch.rand(1, 3, cfg.LATENCY_SIZE, cfg.LATENCY_SIZE, device=device)
    found = {}
    for row, milliseconds in latency.latencies(models, images, warmup=1, repeats=5).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            models[row](images)
        found[row] = {"ms": milliseconds, "parameters": sum(p.numel() for p in models[row].parameters()),
                      "GMAC": counter.get_total_flops() / 2e9, "GB": memory.peak_gigabytes(models[row], images)}
    return found


# ---- test pairs ------------------------------------------------------------------------------------------------

def name_of(root):
    """-> what a test set is called: its folder's name, of Rain100L/test the folder's above."""
    root = Path(root).resolve()
    return root.parent.name if root.name in ("test", "val") else root.name


def load_sets(cfg):
    """-> {set: {name: Pair}}: the pairs of TEST_SETS that nothing was trained on, at most MAX_IMAGES of each."""
    sets = {}
    for root in cfg.TEST_SETS:
        if name_of(root) in sets:
            raise config.UserError(f"TEST_SETS = {cfg.TEST_SETS}: two of them have the same name, rename a folder")
        sets[name_of(root)], notes = derain_sets.find_pairs(root)
        for note in notes:
            processes.say(f"note: {note}")
    sets = unseen(cfg, sets)
    return {name: dict(evenly(list(pairs.items()), cfg.MAX_IMAGES or len(pairs))) for name, pairs in sets.items()}


def unseen(cfg, sets):
    """-> {set: {name: Pair}} without the pairs that SPLITS_FILE names as training or validation pairs."""
    if not cfg.SPLITS_FILE:
        return sets
    if problem := system.absent(cfg.SPLITS_FILE):
        raise config.UserError(f"SPLITS_FILE = '{cfg.SPLITS_FILE}' {problem}: run python train_unet_derain.py"
                               f"{' --demo' if cfg.demo else ''} first, or set it to \"\" for pairs that nothing was "
                               "trained on")
    parts, kept, known = windshield_pairs.splits_of(cfg.SPLITS_FILE), {}, False
    for name, pairs in sets.items():
        used, test = ({windshield_pairs.name_of_entry(entry, pairs) for part in names for entry in parts[part]}
                      & set(pairs) for names in (("train", "val"), ("test",)))
        kept[name] = {pair: files for pair, files in pairs.items() if pair not in used}
        known |= bool(used or test)
        if used:
            processes.say(f"note: {name}: {len(used)} of {len(pairs)} pairs were trained on, as SPLITS_FILE says, and "
                          "are left out")
        if not kept[name]:
            raise config.UserError(f"SPLITS_FILE = '{cfg.SPLITS_FILE}': all pairs of the test set {name} were trained "
                                   "on")
    if not known:
        raise config.UserError(f"SPLITS_FILE = '{cfg.SPLITS_FILE}' names no pair of TEST_SETS = {cfg.TEST_SETS}: it "
                               "belongs to other data; set it to \"\" for pairs that nothing was trained on")
    return kept


def images_of(cfg, models, others, pair, rainy):
    """-> {row: (1, 3, H, W)} of one pair: the rainy image, what each network and each of RESULTS_DIRS makes of it.

    others: of `result_files`; rainy: (1, 3, H, W) in [0, 1].
    """
    images = {derain_report.RAINY: rainy}
    images |= {row: restore(model, rainy, cfg.TILE, cfg.OVERLAP) for row, model in models.items()}
    return images | {row: to_floats(read_image(paths[pair])[None], rainy.device) for row, paths in others.items()}


def score_set(cfg, models, name, pairs, others, device, lpips_model):
    """-> {row: {metric: [value per image]}} of one test set, one image at a time; others: of `result_files`."""
    found = {}
    for pair, files in processes.progress(list(pairs.items()), name):
        rainy, clean = (to_floats(image[None], device) for image in files.read())
        values = {}
        for row, image in images_of(cfg, models, others, pair, rainy).items():
            own = image_quality.quality_by_protocol(image, clean)
            if lpips_model is not None:
                own["lpips"] = lpips_model(image.float(), clean.float(), normalize=True).flatten()
            values |= {(row, metric): value for metric, value in own.items()}
        for (row, metric), value in transfer.rows(values)[0].items():
            found.setdefault(row, {}).setdefault(metric, []).append(value)
    return found


# ---- pictures ------------------------------------------------------------------------------------------------

def real_photographs(cfg):
    """-> up to PICTURES paths of REAL_DIR, evenly chosen; [] without it."""
    chosen = evenly(images_below([cfg.REAL_DIR], "REAL_DIR"), cfg.PICTURES) if cfg.REAL_DIR else []
    image_check.check_images(chosen, "REAL_DIR")
    return chosen


def study_scenes(cfg, models, name, pairs, others, device):
    """-> {image: {row: small PIL image}} for the user study: of one test set, of REAL_DIR where there is none; others:
    of `result_files` for that set."""
    if not name:
        name = name_of(cfg.REAL_DIR)
        pairs = {row: derain_sets.Pair(path, path) for row, path in
                 images_by_name(cfg.REAL_DIR, "REAL_DIR", "Set it to a folder of images.").items()}
        pairs = dict(evenly(list(pairs.items()), cfg.STUDY_SCENES))
        others = result_files(cfg, pairs, name)
    pairs, found = dict(evenly(list(pairs.items()), cfg.STUDY_SCENES)), {}
    for pair, files in processes.progress(list(pairs.items()), "user study"):
        rainy = to_floats(files.read()[0][None], device)
        found[pair] = {row: study.small(image[0], cfg.STUDY_SIDE)
                       for row, image in images_of(cfg, models, others, pair, rainy).items()}
    return found


def write_study(cfg, models, name, pairs, others, device, path):
    """The page of the user study; -> what it holds."""
    scenes = study_scenes(cfg, models, name, pairs, others, device)
    held = study.write_page(path, scenes, derain_report.RAINY, cfg.STUDY_PAIRS)
    print(f"user study: {path.as_posix()}, {held['comparisons']} comparisons of {held['methods']} methods on "
          f"{held['scenes']} images, {held['bytes'] / 1e6:.1f} MB")
    return held


def main(**overrides):
    """Compare; -> {"pairs": rows, "costs": {row: ...}, "detection": rows, "intensities": rows, "absent": {row: why},
    "images": {set: {row: {metric: values}}}, "study": what it holds or None}."""
    cfg = config.resolve(globals(), overrides)
    check(cfg)
    processes.require_one("Eval_derain_baselines.py")
    if cfg.LABELED_RAIN_DIR:
        require_size(cfg.IMAGE_SIZE)
    if cfg.demo:
        ensure_windshield_demo()
        ensure_demo()
    device = processes.announced_device()
    sets = load_sets(cfg)
    others = {name: result_files(cfg, pairs, name) for name, pairs in sets.items()}
    photographs = real_photographs(cfg)
    models, absent = load_models(cfg, device)
    note_trained_on(cfg, sets, models)
    for row, why in absent.items():
        processes.say(f"note: no row '{row}': {why}")
    if not models and not cfg.RESULTS_DIRS:
        raise config.UserError("MODELS: none of the weights is there, and RESULTS_DIRS is empty: nothing to compare")
    if cfg.STUDY:
        study.require_pairs([derain_report.RAINY, *models, *cfg.RESULTS_DIRS], cfg.STUDY_PAIRS)
    labelled = behind_derainer.labelled_rain(cfg, "IMAGE_SIZE", device) if cfg.LABELED_RAIN_DIR else None
    lpips_model = image_quality.load_lpips(cfg.LPIPS_WEIGHTS, device) if cfg.LPIPS_WEIGHTS else None
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # everything that a user can mistake is found by now
    models_of = {row: entry[0] for row, entry in cfg.MODELS.items()}
    cost = costs(cfg, models, device)
    scores = {name: score_set(cfg, models, name, pairs, others[name], device, lpips_model)
              for name, pairs in sets.items()}
    rows = [row for name in sets for row in derain_report.rows_of(name, scores[name], models_of, absent)]
    detection = behind_derainer.rows_behind({derain_report.RAINY: None} | models, *labelled, device,
                                            "method") if labelled else []
    results = {"pairs": rows, "costs": cost, "detection": detection,
               "intensities": derain_report.rows_by_intensity(sets, scores), "absent": absent, "images": scores}
    first = next(iter(sets), "")
    if first:
        derain_report.draw_crops(cfg, models, sets[first], device, folder / "crops.png")
    if photographs:
        derain_report.draw_real(cfg, models, photographs, folder / "real_rain.png")
    results["study"] = (write_study(cfg, models, first, sets.get(first), others.get(first), device,
                                    folder / "study.html") if cfg.STUDY else None)
    derain_report.write(cfg, results, folder)
    derain_report.note_oddities(rows)
    print(f"\nwritten: {(folder / _FILES[0]).as_posix()}, results.csv, results.md and pictures beside them")
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
