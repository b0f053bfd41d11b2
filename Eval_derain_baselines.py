"""Compare de-rainers, published and own, on test pairs, on real rain, and by what a detector finds after each.

    python Eval_derain_baselines.py --demo      (after python train_unet_derain.py --demo)
    python Eval_derain_baselines.py --demo --study      (also a page that asks people)
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

import csv
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from utils import config, datasets, processes, report, system, visualize
from utils.datasets import derain_sets, image_check, loaders, presets, windshield_pairs
from utils.datasets.samples import evenly, images_below, images_by_name, read_image
from utils.demo.coco import ensure_demo
from utils.demo.windshield import ensure_windshield_demo
from utils.evaluation import comparison, image_quality, latency, memory, study
from utils.evaluation.coco import detection_scores
from utils.images import to_floats
from utils.networks import derainers
from utils.networks.rtdetr import id2label_of, load_rtdetr, require_size, trained_size
from utils.networks.tiling import require_tiles, restore
from utils.weather import windshield

# --- data ---------------------------------------------------------------------------------------------------------
TEST_SETS = ("./data/Rain100L/test",)   # folders of test pairs, known by their layout (docs/derain_baselines.md)
SPLITS_FILE: str | None = ""            # splits.json of train_unet_derain.py: of its pairs only the test part; "" all
REAL_DIR: str | None = ""               # photographs of real rain without ground truth, only looked at; "" for none
LABELED_RAIN_DIR: str | None = ""       # COCO-layout root of rainy images with boxes (its val split); "" for no mAP
MAX_IMAGES = 0                          # of each test set, evenly chosen; 0 for all

# --- methods ------------------------------------------------------------------------------------------------------
MODELS = {                              # {row: (network of utils/networks/derainers.py, weights)}; absent ones say so
    "U-Net": ("unet", "./outputs_unet/best.pt"), "NAFNet": ("nafnet", "./outputs_nafnet/best.pt"),
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
    "MODELS": {"U-Net": ("unet", "./demo/outputs_unet/best.pt"), "SPDNet": ("spdnet", "./assets/demo/spdnet.pt"),
               "PReNet": ("prenet", "./weights/prenet.pth")},
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "IMAGE_SIZE": 160, "EVAL_BATCH_SIZE": 8, "DATALOADER_WORKERS": 0,
    "LATENCY_SIZE": 160, "CROP": 32, "OUTPUT_DIR": "./demo/outputs_derain_baselines",
}
_RAINY = "rainy input"
_FILES = ("results.json", "results.csv", "results.md", "crops.png", "real_rain.png", "latency_quality.png",
          "map_quality.png", "study.html")
_IDENTICAL = 100.0  # dB: no method is that good
_METRICS = {"psnr_y": "PSNR Y", "ssim_y": "SSIM Y", "psnr_y8": "PSNR Y8", "ssim_y8": "SSIM Y8", "psnr": "PSNR RGB",
            "ssim": "SSIM RGB", "lpips": "LPIPS"}
# Published PSNR / SSIM: {method: {part of the set's name: (figure, protocol, source)}}; other training data, other code
_PUBLISHED = {
    "prenet": {"rain100l": ("37.48 / 0.979", "Y, its weights are trained on the set", "Ren et al. 2019"),
               "rain100h": ("29.46 / 0.899", "Y", "Ren et al. 2019"),
               "rain1400": ("32.60 / 0.946", "Y", "Ren et al. 2019")},
    "rescan": {"rain100h": ("28.88 / 0.866", "Y, trained again", "Ren et al. 2019")},
    "ddn_port": {"rain100l": ("33.58 / -", "RGB", "the port's README")},
    "mprnet": {"rain100l": ("36.40 / 0.965", "Y8, Rain13K", "Zamir et al. 2021"),
               "rain100h": ("30.41 / 0.890", "Y8, Rain13K", "Zamir et al. 2021")},
    "restormer": {"rain100l": ("38.99 / 0.978", "Y8, Rain13K", "Zamir et al. 2022"),
                  "rain100h": ("31.46 / 0.904", "Y8, Rain13K", "Zamir et al. 2022")},
}


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
        if entry[0] != "unet" and entry[0] not in derainers.NETWORKS:
            raise config.UserError(f"MODELS['{row}']: no de-rainer is called {entry[0]!r}; choose one of unet, "
                                   f"{', '.join(derainers.NETWORKS)}")
    for text in cfg.RESULTS_DIRS:
        row, _, folder = text.partition("=")
        if not row.strip() or not folder.strip():
            raise config.UserError(f"RESULTS_DIRS holds {text!r}: write NAME=FOLDER, such as "
                                   "'DRSformer=./results/drsformer'")
    titles = [_RAINY, *cfg.MODELS, *(text.partition("=")[0] for text in cfg.RESULTS_DIRS)]
    if len(set(titles)) < len(titles):
        raise config.UserError(f"MODELS and RESULTS_DIRS: a name is there twice ({', '.join(titles)})")
    report.require_apart("OUTPUT_DIR", cfg.OUTPUT_DIR, [
        ("TEST_SETS", folder) for folder in cfg.TEST_SETS] + [("REAL_DIR", cfg.REAL_DIR)])


# ---- methods ---------------------------------------------------------------------------------------------------

def load_models(cfg, device):
    """-> {row: network in eval mode}, {row: why it is absent}."""
    models, absent = {}, {}
    for row, (name, weights) in cfg.MODELS.items():
        if problem := system.absent(weights):
            absent[row] = f"{weights} {problem}; {derainers.source_of(name).get}"
        else:
            models[row] = derainers.load_derainer(name, weights, device, f"MODELS['{row}']")
    return models, absent


def note_trained_on(cfg, sets, models):
    """A line for each network that was trained on pairs of a test set, as the splits.json beside its weights says."""
    for row in models:
        for name, pairs in sets.items():
            rainy = next(iter(pairs.values())).rainy.parent
            if seen := windshield_pairs.trained_on(cfg.MODELS[row][1], rainy, pairs):
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


def score_set(cfg, models, name, pairs, others, device, lpips_model):
    """-> {row: {metric: [value per image]}} of one test set, one image at a time; others: of `result_files`."""
    found = {}
    for pair, files in processes.progress(list(pairs.items()), name):
        rainy, clean = (to_floats(image[None], device) for image in files.read())
        images = {_RAINY: rainy} | {row: restore(model, rainy, cfg.TILE, cfg.OVERLAP) for row, model in models.items()}
        for row, paths in others.items():
            images[row] = to_floats(read_image(paths[pair])[None], device)
        for row, image in images.items():
            values = image_quality.quality_by_protocol(image, clean)
            if lpips_model is not None:
                values["lpips"] = lpips_model(image.float(), clean.float(), normalize=True).flatten()
            for metric, value in values.items():
                found.setdefault(row, {}).setdefault(metric, []).append(float(value))
    return found


def rows_of(name, scores, models_of, absent):
    """-> [{"set", "method", "count", metric: mean, metric_low, metric_high, "published"}, ...] of one test set."""
    rows = []
    for row, metrics in scores.items():
        values = {}
        for metric, found in metrics.items():
            low, high = image_quality.bootstrap_interval(found)
            values |= {metric: float(np.mean(found)), f"{metric}_low": low, f"{metric}_high": high}
        rows.append({"set": name, "method": row, "count": len(next(iter(metrics.values())))} | values
                    | {"published": published(models_of.get(row), name)})
    return rows + [{"set": name, "method": row, "count": 0, "published": f"absent: {why}"} for row, why in
                   absent.items()]


def note_oddities(rows):
    """A line for each row whose figures say that something else was measured than its name."""
    rainy = {row["set"]: row["psnr_y"] for row in rows if row["method"] == _RAINY}
    for row in rows:
        if row["count"] and row["method"] != _RAINY and row["psnr_y"] < rainy[row["set"]]:
            processes.say(f"note: {row['set']}: '{row['method']}' is further from the clean images than the rainy "
                          "input is; weights of another form of the network (ddn, ddn_matlab, ddn_port; rescan, "
                          "rescan_add) or made for other rain do that")
        if row["count"] and row["psnr_y"] > _IDENTICAL:
            processes.say(f"note: {row['set']}: '{row['method']}' equals the clean images")


def rows_by_intensity(sets, scores):
    """-> [{"set", "method", "light", "medium", "heavy": mean PSNR Y}, ...] of windshield pairs whose rain is known."""
    rows = []
    for name, pairs in sets.items():
        rainy = next(iter(pairs.values())).rainy.parent
        known = windshield_pairs.intensities(rainy, {pair: (files.rainy, files.clean) for pair, files in pairs.items()})
        for method, metrics in scores[name].items() if len(set(known.values())) > 1 else ():
            values = {}
            for pair, value in zip(pairs, metrics["psnr_y"], strict=True):
                values.setdefault(known[pair], []).append(value)
            rows.append({"set": name, "method": method} | {word: float(np.mean(found))
                                                           for word, found in values.items()})
    return rows


def published(network, name):
    """-> the published figure of a network on a set of this name, with protocol and source, or None."""
    for part, words in _PUBLISHED.get(network, {}).items():
        if part in name.lower():
            return "{} ({}; {})".format(*words)
    return None


# ---- detection -------------------------------------------------------------------------------------------------

def load_detection(cfg, device):
    """-> RT-DETR, loader of the labelled rainy images; None, None without LABELED_RAIN_DIR."""
    if not cfg.LABELED_RAIN_DIR:
        return None, None
    rtdetr = load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device).eval()
    comparison.note_other_sizes({"RTDETR_MODEL_NAME": trained_size(cfg.RTDETR_MODEL_NAME)}, cfg.IMAGE_SIZE)
    data = datasets.CocoDetectionDataset(
        cfg.LABELED_RAIN_DIR, "val", id2label_of(rtdetr), presets.evaluation(cfg.IMAGE_SIZE),
        constant="LABELED_RAIN_DIR", domain="rainy", unknown=cfg.UNKNOWN_CATEGORIES)
    return rtdetr, loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)


def detection_rows(models, rtdetr, loader, device):
    """-> [{"method", "count", "mAP", ...}]: RT-DETR behind every de-rainer, on the labelled rainy images."""
    if rtdetr is None:
        return []
    calls = {_RAINY: lambda images: rtdetr(pixel_values=images)} | {
        row: (lambda images, model=model: rtdetr(pixel_values=model(images))) for row, model in models.items()}
    return [{"method": row, "count": len(loader.dataset)} | detection_scores(call, loader, device, name=row)[0]
            for row, call in calls.items()]


# ---- pictures and report ---------------------------------------------------------------------------------------

def draw_crops(cfg, models, pairs, device, path):
    """Page: of evenly chosen pairs the square where the methods differ most, rainy | each method | clean."""
    rows, scale = [], visualize.enlargement(cfg.CROP)
    for pair in evenly(list(pairs.values()), cfg.PICTURES):
        rainy, clean = (to_floats(image[None], device) for image in pair.read())
        images = [rainy, *(restore(model, rainy, cfg.TILE, cfg.OVERLAP) for model in models.values()), clean]
        side = min(cfg.CROP, *rainy.shape[-2:])
        spread = torch.stack(images[1:-1] if len(models) > 1 else images).std(0).mean(1, keepdim=True)  # (1, 1, H, W)
        at = torch.nn.functional.avg_pool2d(spread, side, 1).flatten().argmax().item()
        top, left = divmod(at, rainy.shape[-1] - side + 1)
        cells = [visualize.to_pil(image[0, :, top:top + side, left:left + side]) for image in images]
        rows.append([cell.resize((side * scale, side * scale)) for cell in cells])
    visualize.grid(rows, [_RAINY, *models, "clean"], path)


def real_photographs(cfg):
    """-> up to PICTURES paths of REAL_DIR, evenly chosen; [] without it."""
    chosen = evenly(images_below([cfg.REAL_DIR], "REAL_DIR"), cfg.PICTURES) if cfg.REAL_DIR else []
    image_check.check_images(chosen, "REAL_DIR")
    return chosen


def draw_real(cfg, models, photographs, path):
    """Page: photographs of real rain | each method."""
    rows = []
    for photograph in photographs:
        image = to_floats(read_image(photograph)[None])
        cells = [visualize.to_pil(picture[0]) for picture in
                 (image, *(restore(model, image, cfg.TILE, cfg.OVERLAP) for model in models.values()))]
        width = min(320, cells[0].width)
        size = (width, max(1, round(cells[0].height * width / cells[0].width)))
        rows.append([cell.resize(size) for cell in cells])
    visualize.grid(rows, ["real rain", *models], path)


def study_scenes(cfg, models, name, pairs, device):
    """-> {image: {row: small PIL image}} for the user study: of one test set, of REAL_DIR where there is none."""
    if not name:
        name = name_of(cfg.REAL_DIR)
        pairs = {row: derain_sets.Pair(path, path) for row, path in
                 images_by_name(cfg.REAL_DIR, "REAL_DIR", "Set it to a folder of images.").items()}
    pairs, found = dict(evenly(list(pairs.items()), cfg.STUDY_SCENES)), {}
    others = result_files(cfg, pairs, name)
    for pair, files in processes.progress(list(pairs.items()), "user study"):
        rainy = to_floats(files.read()[0][None], device)
        images = {_RAINY: rainy} | {row: restore(model, rainy, cfg.TILE, cfg.OVERLAP) for row, model in models.items()}
        for row, paths in others.items():
            images[row] = to_floats(read_image(paths[pair])[None])
        found[pair] = {row: study.small(image[0], cfg.STUDY_SIDE) for row, image in images.items()}
    return found


def write_study(cfg, models, name, pairs, device, path):
    """The page of the user study; -> what it holds."""
    held = study.write_page(path, study_scenes(cfg, models, name, pairs, device), _RAINY, cfg.STUDY_PAIRS)
    print(f"user study: {path.as_posix()}, {held['comparisons']} comparisons of {held['methods']} methods on "
          f"{held['scenes']} images, {held['bytes'] / 1e6:.1f} MB")
    return held


def shown(rows, cost):
    """-> the same rows for a table: "mean (low to high)" where there is an interval, and what each method costs."""
    found = []
    for row in rows:
        one = {"set": row["set"], "method": row["method"], "n": row["count"]}
        for metric in _METRICS:
            if metric in row:
                digits = 2 if metric.startswith("psnr") else 4
                interval = (f" ({row[f'{metric}_low']:.{digits}f} to {row[f'{metric}_high']:.{digits}f})"
                            if row[f"{metric}_low"] is not None and metric in ("psnr_y", "ssim_y") else "")
                one[metric] = f"{row[metric]:.{digits}f}{interval}"
        if spent := cost.get(row["method"]):
            one |= {"ms": f"{spent['ms']:.1f}", "parameters": f"{spent['parameters'] / 1e6:.2f} M",
                    "GMAC": f"{spent['GMAC']:.1f}", "GB": f"{spent['GB']:.3f}"}
        found.append(one | {"published": row["published"]})
    return found


def markdown(rows, columns):
    """-> a Markdown table of {key: text} rows."""
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(key) if row.get(key) is not None else "-") for key in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write(cfg, results, folder):
    """The tables on the console, results.md with the same, results.csv with the numbers, results.json, the plots."""
    rows = results["pairs"]
    columns = {"set": "set", "method": "method", "n": "n"} | {
        metric: title for metric, title in _METRICS.items() if rows and metric in rows[0]} | {
        "ms": f"ms, {cfg.LATENCY_SIZE}", "parameters": "parameters", "GMAC": "GMAC", "GB": "GB",
        "published": "published"}
    tables = [(shown(rows, results["costs"]), columns),
              (results["intensities"], {"set": "set", "method": "PSNR Y in rain that is"} | {
                  word: word for word in windshield.INTENSITIES}),
              (results["detection"], {"method": "detector behind", "count": "n", "mAP": "mAP", "AP50": "AP50"})]
    for table, titles in tables:
        if table:
            print("\n" + report.table(table, titles))
    with system.written(folder / "results.md") as temporary:
        temporary.write_text("\n".join(markdown(*table) for table in tables if table[0]), encoding="utf-8")
    with system.written(folder / "results.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    report.write_results(folder / "results.json", cfg.as_dict(), results)
    draw_plots(cfg, rows, results["costs"], results["detection"], folder)


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
        study.require_pairs([_RAINY, *models, *cfg.RESULTS_DIRS], cfg.STUDY_PAIRS)
    rtdetr, labelled = load_detection(cfg, device)
    lpips_model = image_quality.load_lpips(cfg.LPIPS_WEIGHTS, device) if cfg.LPIPS_WEIGHTS else None
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # everything that a user can mistake is found by now
    models_of = {row: entry[0] for row, entry in cfg.MODELS.items()}
    cost = costs(cfg, models, device)
    scores = {name: score_set(cfg, models, name, pairs, others[name], device, lpips_model)
              for name, pairs in sets.items()}
    rows = [row for name in sets for row in rows_of(name, scores[name], models_of, absent)]
    results = {"pairs": rows, "costs": cost, "detection": detection_rows(models, rtdetr, labelled, device),
               "intensities": rows_by_intensity(sets, scores), "absent": absent, "images": scores}
    first = next(iter(sets), "")
    if first:
        draw_crops(cfg, models, sets[first], device, folder / "crops.png")
    if photographs:
        draw_real(cfg, models, photographs, folder / "real_rain.png")
    results["study"] = (write_study(cfg, models, first, sets.get(first, {}), device, folder / "study.html")
                        if cfg.STUDY else None)
    write(cfg, results, folder)
    note_oddities(rows)
    print(f"\nwritten: {(folder / _FILES[0]).as_posix()}, results.csv, results.md and pictures beside them")
    return results


def draw_plots(cfg, rows, cost, detection, folder):
    """Latency against PSNR, and the detector's mAP against PSNR, of the first test set."""
    first = {row["method"]: row["psnr_y"] for row in rows if row["count"] and row["set"] == rows[0]["set"]}
    if points := {name: (cost[name]["ms"], value) for name, value in first.items() if name in cost}:
        visualize.cost_against_accuracy(points, folder / "latency_quality.png",
                                        f"ms, {cfg.LATENCY_SIZE} x {cfg.LATENCY_SIZE}", f"PSNR (Y), {rows[0]['set']}")
    scores = {row["method"]: row["mAP"] for row in detection}
    if points := {name: (value, scores[name]) for name, value in first.items() if name in scores}:
        visualize.cost_against_accuracy(points, folder / "map_quality.png", f"PSNR (Y), {rows[0]['set']}",
                                        "mAP behind the de-rainer")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
