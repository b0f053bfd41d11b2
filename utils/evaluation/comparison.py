"""What the evaluation scripts share when they set several detectors against each other."""

import filecmp
import importlib.util
import shutil
import sys
from pathlib import Path

import torch

from utils import processes, system
from utils.config import UserError
from utils.datasets.samples import evenly
from utils.evaluation import latency
from utils.evaluation.coco import coco_scores, detection_scores, entries, ground_truth


def evaluate_models(models, loader, device, parts, page=None):
    """COCO scores of several detectors on one validation set.

    Args:
        models: {name: model}, each (images in [0, 1]) -> outputs with logits and pred_boxes.
        parts: {part's name: [image id, ...]} of images that are also scored apart.
        page: report_page.Page that is to show each model on the whole set, or None.
    Returns:
        [{"model", "images": the data set's domain or a part's name, "count", "mAP", "AP50", ...}, ...]: a row per
        model, then one per part and model.
    """
    data = loader.dataset
    truth = ground_truth(data.annotations)
    rows, by_part = [], {part: [] for part in parts}
    for name, model in models.items():
        scores, found = detection_scores(model, loader, device, truth, f"{name}, {data.domain}")
        rows.append({"model": name, "images": data.domain, "count": len(data)} | scores)
        if page:
            page.add(name, data, scores, entries(found), truth=truth)
        for part, ids in parts.items():
            chosen = entries({image_id: found[image_id] for image_id in ids})
            by_part[part].append({"model": name, "images": part, "count": len(ids)}
                                 | coco_scores(truth, chosen, data.category_of, ids))
    return rows + [row for part in by_part.values() for row in part]


def require_compiler(device, setting="COMPILE = True", off="COMPILE = False"):
    """UserError where torch.compile has nothing to compile with, known before anything is loaded.

    setting, off: what asks for it in the script, and what does without.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(f"{setting} needs Triton: pip install triton-windows (on Linux it comes with torch), or {off}")
    if device.type == "cpu" and sys.platform == "win32" and not shutil.which("cl"):
        raise UserError(f"{setting} needs Microsoft's C++ compiler (cl) on a CPU: start from its developer prompt, or "
                        f"{off}")


def note_other_sizes(trained, image_size, constant="IMAGE_SIZE"):
    """Say which models know images of another size; trained: {the script's constant of a model: side, None where
    unknown}, constant: the script's for the size."""
    for model, size in trained.items():
        if size not in (None, image_size):
            processes.say(f"note: {model} was trained at IMAGE_SIZE = {size}, {constant} is {image_size}: its scores "
                          "suffer")


def leave_out_missing(cfg, demo, names):
    """Empty the constants of a demo that name what other demos make and have not made yet. -> their names

    Args:
        demo: DEMO of the script; names: of those constants.
    """
    missing = [name for name in names if getattr(cfg, name) == demo[name] and not Path(demo[name]).exists()]
    for name in missing:
        setattr(cfg, name, "")
    return missing


def note_same(cfg, *pairs):
    """Say where two constants, whose models are to be compared, name the same file or folder."""
    for first, second in pairs:
        one, other = getattr(cfg, first), getattr(cfg, second)
        if one and other and Path(one).resolve() == Path(other).resolve():
            processes.say(f"note: {first} and {second} are the same, '{one}': their rows will be equal")


def require_page(cfg):
    """UserError unless PICTURES and SCORE_THRESHOLD are a number of pictures and a probability."""
    if cfg.PICTURES < 1:
        raise UserError(f"PICTURES = {cfg.PICTURES}: choose 1 or more")
    if not 0 <= cfg.SCORE_THRESHOLD <= 1:
        raise UserError(f"SCORE_THRESHOLD = {cfg.SCORE_THRESHOLD}: choose a number from 0 to 1, such as 0.4")


def are_twins(rainy, clean):
    """-> whether two data sets hold the same files; says so where their objects are not the same nevertheless, or where
    the rainy images are the clean ones over again."""
    if rainy.files != clean.files:
        return False
    if all(filecmp.cmp(*pair, shallow=False) for pair in zip(
            evenly(rainy.image_paths(), 20), evenly(clean.image_paths(), 20), strict=True)):
        processes.say(f"note: the rainy images in {rainy.folder.as_posix()} are the clean ones over again, there is no "
                      "rain in them")

    def objects(data):
        truth = ground_truth(data.annotations)
        return [sorted((truth.cats[one["category_id"]]["name"], *map(round, one["bbox"]))
                       for one in truth.imgToAnns.get(image_id, ())) for image_id in data.image_ids]

    pairs = list(zip(rainy.files, objects(rainy), objects(clean), strict=True))
    if other := [str(name) for name, one, two in pairs if one != two]:
        processes.say(f"note: {len(other)} of {len(pairs)} rainy images have other boxes than the clean images of the "
                      f"same name ({system.listed(other, 3)}): scores on rainy and clean images cannot be compared")
    return True


def ids_by_prefix(dataset, prefixes, constant="PREFIXES"):
    """-> {"rain_*": [image id, ...], ...} of the files whose names begin so; UserError where none does."""
    if isinstance(prefixes, str):
        raise UserError(f"{constant} = '{prefixes}' is one text, not several: write ('{prefixes}',) with the comma")
    found = {f"{prefix}*": [i for i, file in zip(dataset.image_ids, dataset.files, strict=True)
                            if Path(file).name.startswith(prefix)] for prefix in prefixes}
    for part, ids in found.items():
        if not ids:
            raise UserError(f"{constant}: no image in {dataset.folder.as_posix()} starts with {part[:-1]!r}")
    return found


def gap_won_back(rows, name, baseline, twins):
    """Share of the baseline's loss in rain that a model wins back.

    Args:
        rows: [{"model", "images": "rainy" or "clean", "mAP", ...}, ...]; name, baseline: models in them.
        twins: whether the clean images are the rainy ones' twins; otherwise there is no such gap.
    Returns:
        float, or None where there is no gap (other images, or rain costs the baseline nothing).
    """
    if not twins:
        return None
    score = {(row["model"], row["images"]): row["mAP"] for row in rows}
    gap = score[baseline, "clean"] - score[baseline, "rainy"]
    return (score[name, "rainy"] - score[baseline, "rainy"]) / gap if gap > 0 else None


def milliseconds_per_image(models, image_size, batches, device):
    """Latencies of several models, measured in turns on random images.

    Args:
        models: {name: model}, called as model(pixel_values=(B, 3, S, S)); batches: batch sizes.
    Returns:
        {name: {"batch 1": ms per image, ...}}.
    """
    calls = {name: (lambda x, model=model: model(pixel_values=x)) for name, model in models.items()}
    result = {name: {} for name in models}
    for batch in sorted(set(batches)):
        images = torch.rand(batch, 3, image_size, image_size, device=device)
        for name, milliseconds in latency.latencies(calls, images).items():
            result[name][f"batch {batch}"] = milliseconds / batch
    return result
