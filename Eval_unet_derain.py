"""Evaluate the windshield U-Net: on the test pairs it never saw, and on photographs of real rain without ground truth.

    python Eval_unet_derain.py --demo      # after python train_unet_derain.py --demo
    python Eval_unet_derain.py

Pairs: PSNR, SSIM, MSE and LPIPS before and after, at the images' own resolution and at the one of the training, per
intensity where make_rain.py drew the rain. Real rain: restored files and a sheet to look at; as far as numbers go
without ground truth, what the rain detector says before and after, and RT-DETR's mAP where there are labels.

Writes OUTPUT_DIR/results.json, pairs.png, real_rain.png and restored/ (REAL_DIR's names, PNG).
"""

from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from PIL import Image
from torchvision.transforms import v2

from utils import config, datasets, processes, report, system, transfer, visualize
from utils.datasets import image_check, presets, windshield_pairs
from utils.datasets.samples import evenly, images_below
from utils.demo.windshield import ensure_windshield_demo
from utils.evaluation import behind_derainer, image_quality
from utils.evaluation import coco as coco_evaluation
from utils.evaluation.comparison import note_other_sizes
from utils.images import to_bytes, to_floats
from utils.networks.derainers import load_trained, other_derainer
from utils.networks.rain_detector import SIDE as _SIDE
from utils.networks.rain_detector import load_rain_detector
from utils.networks.refiner import RefinedDerainer, load_refiner
from utils.networks.rtdetr import require_size
from utils.networks.tiling import require_tiles, restore

# --- data ---------------------------------------------------------------------------------------------------------
CLEAR_DIR = "./data/clear"              # as in train_unet_derain.py
RAINY_DIR: str | None = "./data/windshield_rainy_v40"  # the same names in rain; "" leaves the pairs out
SPLITS_FILE: str | None = "./outputs_unet/splits.json"  # which are test pairs; "" takes all (of another source)
REAL_DIR: str | None = "./data/real_rainy"  # photographs of real rain; "" leaves them out
LABELED_RAIN_DIR: str | None = ""       # COCO-layout root of real rain with boxes (its val split), for RT-DETR; "" none

# --- models -------------------------------------------------------------------------------------------------------
UNET_PATH = "./outputs_unet/best.pt"    # from train_unet_derain.py
REFINER_DIR: str | None = ""            # ./outputs_refiner/refiner of train_diffusion_refiner.py; "" for none
RAIN_DETECTOR_PATH: str | None = ""     # from Training_RainDetector.py; "" leaves its probabilities out
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # detects in LABELED_RAIN_DIR
LPIPS_WEIGHTS: str | None = "imagenet"  # AlexNet: downloaded once (233 MB), a local file of torchvision's, or ""

# --- evaluation ---------------------------------------------------------------------------------------------------
IMAGE_SIZE = 256                        # side of the square of the training, for the rows "as trained"
TILE = 1024                             # larger images are restored in tiles: bounded memory; 0 for whole images
OVERLAP = 128                           # pixels that neighbouring tiles share
DETECTOR_SIZE = 640                     # RT-DETR's square input
UNKNOWN_CATEGORIES = "ignore"           # "error" refuses labels that RT-DETR does not know
EVAL_BATCH_SIZE = 4                     # for RT-DETR
DATALOADER_WORKERS = 4                  # processes that load images; at most the number of cores is used
PICTURES = 6                            # rows of each sheet
OUTPUT_DIR = "./outputs_unet/eval"

DEMO = {
    "CLEAR_DIR": "./demo/windshield/clear", "RAINY_DIR": "./demo/windshield/windshield_rainy_v40",
    "REAL_DIR": "./demo/windshield/real_rainy", "LABELED_RAIN_DIR": "./demo/coco_rain",
    "SPLITS_FILE": "./demo/outputs_unet/splits.json", "UNET_PATH": "./demo/outputs_unet/best.pt",
    "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt", "RTDETR_MODEL_NAME": "./assets/demo/rtdetr",
    "LPIPS_WEIGHTS": "", "IMAGE_SIZE": 64, "DETECTOR_SIZE": 160, "EVAL_BATCH_SIZE": 8, "DATALOADER_WORKERS": 0,
    "OUTPUT_DIR": "./demo/outputs_unet/eval",
}
_FILES = ("results.json", "pairs.png", "real_rain.png", "restored")
_SHOWN = 480  # width of a picture on the sheets


# ---- pairs -----------------------------------------------------------------------------------------------------

def test_pairs(cfg):
    """-> {name: (rainy path, clear path)} of the test part, {name: intensity} (empty where it is not known)."""
    found, notes = windshield_pairs.find_pairs(cfg.RAINY_DIR, cfg.CLEAR_DIR)
    for note in notes:
        processes.say(f"note: {note}")
    names = list(found)
    if cfg.SPLITS_FILE:
        names = windshield_pairs.read_splits(cfg.SPLITS_FILE, found)["test"]
        if not names:
            raise config.UserError(f"SPLITS_FILE = '{cfg.SPLITS_FILE}' has no test pairs: train with TEST_PAIRS above "
                                   "0, or set SPLITS_FILE = \"\" for pairs that were not trained on")
    chosen = {name: found[name] for name in names}
    window = image_check.SSIM_WINDOW
    if small := image_check.smaller_than([rainy for rainy, _ in chosen.values()], window):
        raise config.UserError(f"RAINY_DIR: {system.listed(small, 3)}: sides of at least {window} pixels are needed, "
                               "the window of SSIM")
    if seen := windshield_pairs.trained_on(cfg.UNET_PATH, cfg.RAINY_DIR, names):
        processes.say(f"note: {len(seen)} of {len(names)} pairs were trained or validated on by UNET_PATH = "
                      f"'{cfg.UNET_PATH}' (splits.json beside it): their scores say little; set SPLITS_FILE to "
                      "that file")
    return chosen, windshield_pairs.intensities(cfg.RAINY_DIR, chosen)


def score_pairs(cfg, networks, chosen, transform, device, lpips_model, title):
    """-> {name: {"rainy input": metrics, network: metrics, ...}}, one image at a time: their sizes differ."""
    data, found = windshield_pairs.WindshieldPairs(chosen, chosen, transform), {}
    for i, name in enumerate(processes.progress(data.names, title)):
        batch = datasets.to_device(datasets.collate([data[i]]), device)
        images = {"rainy input": batch["images"]} | {
            row: restore(model, batch["images"], cfg.TILE, cfg.OVERLAP) for row, model in networks.items()}
        scores = {row: image_quality.full_quality(image, batch["twins"], lpips_model) for row, image in images.items()}
        values, = transfer.rows({(row, key): value for row, own in scores.items() for key, value in own.items()})
        found[name] = {row: {key: values[row, key] for key in own} for row, own in scores.items()}
    return found


def rows_of(scores, groups, size):
    """Means over images, of the rainy input and behind each network, per group.

    Args:
        scores: from `score_pairs`; groups: {title: names}; size: title of the resolution.
    Returns:
        [{"images", "size", "count", "network", metric: mean}, ...].
    """
    rows = []
    for title, names in groups.items():
        for network in next(iter(scores.values())):
            values = [scores[name][network] for name in names]
            rows.append({"images": title, "size": size, "count": len(names), "network": network}
                        | {key: sum(value[key] for value in values) / len(values) for key in values[0]})
    return rows


def evaluate_pairs(cfg, networks, chosen, intensity, device, lpips_model):
    """-> rows of `rows_of`, native first; networks: {row: network}; chosen, intensity: from `test_pairs`."""
    groups = {"all": list(chosen)}
    for kind in windshield_pairs.INTENSITIES:
        if names := [name for name in chosen if intensity.get(name) == kind]:
            groups[kind] = names
    rows, trained = [], networks["U-Net"].image_size in (None, cfg.IMAGE_SIZE)
    for title, transform in (("native", presets.scaled(1.0)),
                             (f"{cfg.IMAGE_SIZE}{', as trained' if trained else ''}",
                              presets.evaluation(cfg.IMAGE_SIZE))):
        scores = score_pairs(cfg, networks, chosen, transform, device, lpips_model, f"pairs, {title}")
        rows += rows_of(scores, groups, title)
    return rows


# ---- real rain -------------------------------------------------------------------------------------------------

def photographs_of(cfg):
    """-> paths of REAL_DIR's photographs, all of them readable."""
    paths = images_below([cfg.REAL_DIR], "REAL_DIR")
    image_check.check_images(paths, "REAL_DIR")
    return paths


def restore_files(cfg, model, paths, folder, rain_detector, device):
    """Restore the photographs of REAL_DIR, `paths`, into `folder`.

    Returns:
        [{"file", "rain before", "rain after": probability or None}, ...], the (photograph, restored) path pairs.
    """
    base, rows, written = Path(cfg.REAL_DIR).resolve(), [], []
    for path in processes.progress(paths, "real rain"):
        image = to_floats(datasets.read_image(path)[None])
        restored = restore(model, image, cfg.TILE, cfg.OVERLAP)
        relative = path.resolve().relative_to(base)
        target = folder / relative.with_suffix(".png")
        if target in (done for _, done in written):  # a.jpg and a.png
            target = folder / relative.with_name(f"{relative.name}.png")
        with config.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            visualize.to_pil(restored[0]).save(target)
        written.append((path, target))
        rows.append({"file": relative.as_posix(), "rain before": rain_probability(rain_detector, image, device),
                     "rain after": rain_probability(rain_detector, restored, device)})
    return rows, written


@torch.no_grad()
def rain_probability(rain_detector, image, device):
    """-> the rain detector's probability for an image (1, 3, H, W) in [0, 1], None without a detector."""
    if rain_detector is None:
        return None
    small = v2.functional.resize(to_bytes(image), [_SIDE, _SIDE])  # both as a file would hold them
    return rain_detector.probability(to_floats(small, device)).item()


def require_apart(cfg):
    """UserError where restored pictures would take the place of photographs, or be taken for some the next time."""
    if cfg.REAL_DIR:
        real, output = Path(cfg.REAL_DIR).resolve(), Path(cfg.OUTPUT_DIR).resolve()
        if output.is_relative_to(real) or real.is_relative_to(output / "restored"):
            raise config.UserError(f"OUTPUT_DIR = '{cfg.OUTPUT_DIR}' and REAL_DIR = '{cfg.REAL_DIR}' lie within each "
                                   "other: the restored pictures would get among the photographs. Choose another "
                                   "OUTPUT_DIR")


# ---- pictures and report ---------------------------------------------------------------------------------------

def sheet(rows, headings, path):
    """Page of pictures, each row (PIL images) shrunk to a common width."""
    def shrunk(picture):
        share = min(1.0, _SHOWN / picture.width)
        return picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))),
                              Image.Resampling.LANCZOS)
    visualize.grid([[shrunk(cell) for cell in row] for row in rows], headings, path)


def draw_pairs(cfg, model, chosen, path):
    """Sheet rainy | derained | ground truth of test pairs, at their own resolution."""
    rows = []
    for rainy, clear in evenly(list(chosen.values()), cfg.PICTURES):
        image = to_floats(datasets.read_image(rainy)[None])
        rows.append([visualize.to_pil(image[0]), visualize.to_pil(restore(model, image, cfg.TILE, cfg.OVERLAP)[0]),
                     visualize.to_pil(datasets.read_image(clear))])
    sheet(rows, ["rainy", "derained", "ground truth"], path)


def draw_real(cfg, written, rows, path):
    """Sheet photograph | restored, with the rain detector's word below each where there is one."""
    cells = []
    for (source, target), row in evenly(list(zip(written, rows, strict=True)), cfg.PICTURES):
        line = []
        for file, when in ((source, "rain before"), (target, "rain after")):
            picture = visualize.to_pil(datasets.read_image(file))
            text = f"rain {row[when]:.2f}" if row[when] is not None else source.name
            share = min(1.0, _SHOWN / picture.width)
            small = picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))))
            line.append(visualize.captioned(small, text))
        cells.append(line)
    visualize.grid(cells, ["real rain", "derained"], path)


def print_report(results):
    """The tables, and what is left out."""
    if results["pairs"]:
        columns = {"images": "test pairs", "size": "size", "count": "n", "network": "", "psnr": "PSNR (RGB)",
                   "ssim": "SSIM (RGB)", "psnr_y": "PSNR (Y)", "ssim_y": "SSIM (Y)", "mse": "MSE"}
        if "lpips" in results["pairs"][0]:
            columns["lpips"] = "LPIPS"
        print("\n" + report.table(results["pairs"], columns))
    scored = [row for row in results["real"] if row["rain before"] is not None]
    if scored:
        before, after = (sum(row[when] for row in scored) / len(scored) for when in ("rain before", "rain after"))
        print(f"\nreal rain, {len(scored)} photographs: mean probability of rain, by the rain detector, {before:.3f} "
              f"before and {after:.3f} after")
    if results["detection"]:
        print("\n" + report.table(results["detection"], {"network": "labelled rain", "count": "n"}
                                  | {name: name for name in coco_evaluation.METRICS}))


def lpips_or_note(cfg, device):
    """-> the LPIPS network, or None with a line that says why."""
    if not cfg.LPIPS_WEIGHTS:
        processes.say("note: LPIPS is left out (LPIPS_WEIGHTS is empty)")
        return None
    try:
        return image_quality.load_lpips(cfg.LPIPS_WEIGHTS, device)
    except config.UserError as error:
        if cfg.LPIPS_WEIGHTS != "imagenet":
            raise  # a file that the user named and that does not work
        processes.say(f"note: LPIPS is left out. {error}")
        return None


def main(**overrides):
    """Evaluate; -> {"pairs": rows, "real": rows, "detection": rows}."""
    cfg = config.resolve(globals(), overrides)
    require_tiles(cfg.TILE, cfg.OVERLAP)
    if cfg.IMAGE_SIZE < 16 or cfg.PICTURES < 1:
        raise config.UserError(f"IMAGE_SIZE = {cfg.IMAGE_SIZE} must be at least 16, PICTURES = {cfg.PICTURES} at least "
                               "1")
    if not (cfg.RAINY_DIR or cfg.REAL_DIR or cfg.LABELED_RAIN_DIR):
        raise config.UserError("RAINY_DIR, REAL_DIR and LABELED_RAIN_DIR are all empty: there is nothing to evaluate")
    if cfg.demo:
        ensure_windshield_demo()
    if cfg.LABELED_RAIN_DIR:
        require_size(cfg.DETECTOR_SIZE, "DETECTOR_SIZE")
    require_apart(cfg)
    device = processes.announced_device()
    model = load_trained(cfg.UNET_PATH, device)
    networks = {"U-Net": model}
    if cfg.REFINER_DIR:
        networks["U-Net + refiner"] = RefinedDerainer(model, load_refiner(cfg.REFINER_DIR, device)).eval()
        if note := other_derainer(cfg.REFINER_DIR, cfg.UNET_PATH):
            processes.say(note)
    rain_detector = load_rain_detector(cfg.RAIN_DETECTOR_PATH, device) if cfg.RAIN_DETECTOR_PATH else None
    # all that is needed, before any of it is scored for minutes
    photographs = photographs_of(cfg) if cfg.REAL_DIR else []
    labelled = behind_derainer.labelled_rain(cfg, "DETECTOR_SIZE", device) if cfg.LABELED_RAIN_DIR else None
    if cfg.RAINY_DIR:
        note_other_sizes({"UNET_PATH": model.image_size}, cfg.IMAGE_SIZE)
        chosen, intensity = test_pairs(cfg)
        lpips_model = lpips_or_note(cfg, device)
    folder = report.output_folder(cfg.OUTPUT_DIR, _FILES)  # once all else is found: a typo moves no earlier results
    results = {"pairs": [], "real": [], "detection": []}
    if cfg.RAINY_DIR:
        results["pairs"] = evaluate_pairs(cfg, networks, chosen, intensity, device, lpips_model)
        draw_pairs(cfg, model, chosen, folder / "pairs.png")
    if photographs:
        results["real"], written = restore_files(cfg, model, photographs, folder / "restored", rain_detector, device)
        draw_real(cfg, written, results["real"], folder / "real_rain.png")
    if labelled:
        results["detection"] = behind_derainer.rows_behind(
            {"RT-DETR": None} | {f"{row} + RT-DETR": network for row, network in networks.items()}, *labelled, device,
            "network")
    print_report(results)
    report.write_results(folder / "results.json", cfg.as_dict(), results)
    print(f"\nwritten: {(folder / 'results.json').as_posix()} and pictures beside it")
    return results


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
