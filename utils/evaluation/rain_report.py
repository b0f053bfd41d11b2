"""What a rain detector does on images whose weather is known: scores, table, ROC picture, the worst mistakes."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object

from utils import datasets, report, visualize
from utils.config import UserError
from utils.datasets import image_check, loaders, rain_or_clean
from utils.datasets.samples import images_below
from utils.evaluation import classification
from utils.networks.rain_detector import SIDE


class Logits(NamedTuple):
    """What a rain detector says about N images, and what they are."""

    logits: torch.Tensor   # (N,) on the CPU
    targets: torch.Tensor  # (N,) of 0. and 1. for rainy
    paths: list            # N, in the same order


@torch.no_grad()
def logits_of(rain_detector, loader, device, name="rain detector"):
    """Run over a loader of single-domain or mixed samples. -> Logits, of all ranks."""
    def answers(batch):
        batch = datasets.to_device(batch, device)
        logits = rain_detector(batch["images"]).float().cpu().tolist()
        if not np.isfinite(logits).all():
            raise UserError("the rain detector's outputs are not finite: its weights are damaged, or the training has "
                            "diverged; lower LEARNING_RATE or raise WARMUP_STEPS, or look at the weight file")
        return [(logit, float(domain == "rainy"), path) for logit, domain, path in
                zip(logits, batch["domains"], batch["paths"], strict=True)]
    found = gather_object([one for several in loaders.each(answers, loader, name) for one in several])
    return Logits(torch.tensor([f[0] for f in found]), torch.tensor([f[1] for f in found]), [f[2] for f in found])


def test_sets(clean_dirs, rainy_dirs, prefixes, constants=("TEST_CLEAN_DIRS", "TEST_RAINY_DIRS", "TEST_PREFIXES")):
    """Image sets of known weather, one per folder, or one per file-name prefix where a folder has such files, and the
    others of it.

    Returns:
        {name: (paths, "clean" or "rainy")}.
    """
    sets, used, owner = {}, set(), {}
    for folder in clean_dirs:
        datasets.require_no_rain(folder, constants)
    for folders, domain, constant in zip((clean_dirs, rainy_dirs), ("clean", "rainy"), constants, strict=False):
        for folder in folders:
            paths = images_below([folder], constant)
            image_check.check_images(paths, f"{constant} ({folder})")
            for path in paths:
                if owner.setdefault(path.resolve(), domain) != domain:
                    raise UserError(f"{path.as_posix()} is in {constants[0]} and in {constants[1]}: it cannot be both")
            name = "/".join(Path(folder).resolve().parts[-2:])
            if any(known == name or known.startswith(f"{name}: ") for known in sets):
                name = Path(folder).resolve().as_posix()
            for prefix in prefixes:
                own = [path for path in paths if path.name.startswith(prefix)]
                if own:
                    used.add(prefix)
                    sets[f"{name}: {prefix}*"] = (own, domain)
                    paths = [path for path in paths if not path.name.startswith(prefix)]
            if paths:
                in_parts = any(known.startswith(f"{name}: ") for known in sets)
                sets[f"{name}: others" if in_parts else name] = (paths, domain)
    if unused := [prefix for prefix in prefixes if prefix not in used]:
        raise UserError(f"{constants[2]}: no file name begins with {', '.join(map(repr, unused))}")
    return sets


def predict_sets(rain_detector, sets, device, batch_size, workers):
    """-> {name: {"domain", "paths", "probabilities": (N,) array}} of every set of `test_sets`."""
    predicted = {}
    for name, (paths, domain) in sets.items():
        loader = loaders.validation_loader(rain_or_clean.ImageFolderDataset(paths, domain, SIDE), batch_size,
                                            workers)
        found = logits_of(rain_detector, loader, device, name)
        probabilities = torch.sigmoid(found.logits / rain_detector.temperature.cpu()).numpy()
        predicted[name] = {"domain": domain, "paths": found.paths, "probabilities": probabilities}
    return predicted


def summarise(predicted, threshold):
    """Counts of all sets together, and a table row per set.

    Args:
        predicted: from `predict_sets`; threshold: rainy from this probability on.
    Returns:
        {"threshold", "auroc", "calibration_error", confusion counts as in classification.counts, "sets": [{"images",
        "weather", "n", "called_rainy", "mean_probability"}, ...]}.
    """
    scores = np.concatenate([one["probabilities"] for one in predicted.values()])
    targets = np.concatenate([np.full(len(one["paths"]), one["domain"] == "rainy") for one in predicted.values()])
    rows = [{"images": name, "weather": one["domain"], "n": len(one["paths"]),
             "called_rainy": float((one["probabilities"] >= threshold).mean()),
             "mean_probability": float(one["probabilities"].mean())} for name, one in predicted.items()]
    return {"threshold": threshold, "auroc": classification.auroc(scores, targets),
            "calibration_error": classification.calibration_error(scores, targets),
            **classification.counts(scores, targets, threshold), "sets": rows}


def describe(summary):
    """The summary as text: a row per set, then the counts."""
    def percent(value):
        return "-" if value is None else f"{100 * value:.1f}%"
    rows = [row | {"called_rainy": percent(row["called_rainy"])} for row in summary["sets"]]
    table = report.table(rows, {"images": "images", "weather": "weather", "n": "n", "called_rainy": "called rainy",
                                "mean_probability": "mean probability"})
    return (f"{table}\n\nat threshold {summary['threshold']:.3f}: accuracy {percent(summary['accuracy'])}, precision "
            f"{percent(summary['precision'])}, recall {percent(summary['recall'])}, F1 {percent(summary['f1'])}, false "
            f"alarms {percent(summary['false_alarm_rate'])}; AUROC {summary['auroc']:.4f}, calibration error "
            f"{summary['calibration_error']:.3f}\n"
            f"{'':<15}called rainy  called clean\n"
            f"rainy images   {summary['true_positive']:>12}  {summary['false_negative']:>12}\n"
            f"clean images   {summary['false_positive']:>12}  {summary['true_negative']:>12}")


def write_pictures(predicted, threshold, folder, count=12):
    """folder/rain_roc.png, and folder/rain_mistakes.png with the most confident mistakes (none: no file)."""
    folder = Path(folder)
    scores = np.concatenate([one["probabilities"] for one in predicted.values()])
    domains = np.concatenate([np.full(len(one["paths"]), one["domain"] == "rainy") for one in predicted.values()])
    paths = [path for one in predicted.values() for path in one["paths"]]
    curve = classification.roc_curve(scores, domains)
    chosen = classification.counts(scores, domains, threshold)
    operating_point = chosen["false_alarm_rate"], chosen["recall"]
    visualize.roc(curve.false_alarms, curve.recall, operating_point, f"threshold {threshold:.3f}",
                  f"AUROC {classification.auroc(scores, domains):.4f}", folder / "rain_roc.png")
    wrong = np.flatnonzero((scores >= threshold) != domains)
    wrong = wrong[np.argsort(-np.abs(scores[wrong] - threshold), kind="stable")][:count]
    (folder / "rain_mistakes.png").unlink(missing_ok=True)
    if not len(wrong):
        return
    cells = []
    for i in wrong:
        picture = visualize.to_pil(datasets.read_image(paths[i]))
        picture.thumbnail((220, 220))
        cells.append(visualize.captioned(picture, f"{'rainy' if domains[i] else 'clean'}, p = {scores[i]:.2f}"))
    rows = [cells[i:i + 4] + [None] * (4 - len(cells[i:i + 4])) for i in range(0, len(cells), 4)]
    visualize.grid(rows, ["most confident mistakes: truth, answer", "", "", ""], folder / "rain_mistakes.png")
