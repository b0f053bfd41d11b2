"""What the comparison of de-rainers says: rows of numbers, their tables and files, plots, crops where methods differ.

Rows are {"set", "method", "count", metric: mean, metric_low, metric_high, "published"}, a metric's name as in
image_quality.quality_by_protocol. The script is Eval_derain_baselines.py.
"""

import csv

import numpy as np
import torch

from utils import processes, report, system, visualize
from utils.datasets import windshield_pairs
from utils.datasets.samples import evenly, read_image
from utils.evaluation import image_quality
from utils.images import to_floats
from utils.networks.tiling import restore

RAINY = "rainy input"  # the row of the images as they are
IDENTICAL = 100.0  # dB: no method is that good
METRICS = {"psnr_y": "PSNR Y", "ssim_y": "SSIM Y", "psnr_y8": "PSNR Y8", "ssim_y8": "SSIM Y8", "psnr": "PSNR RGB",
            "ssim": "SSIM RGB", "lpips": "LPIPS"}
# Published PSNR / SSIM: {method: {part of the set's name: (figure, protocol, source)}}; other training data, other code
PUBLISHED = {
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


# ---- numbers ---------------------------------------------------------------------------------------------------

def rows_of(name, scores, models_of, absent):
    """-> [{"set", "method", "count", metric: mean, metric_low, metric_high, "published"}, ...] of one test set."""
    rows = []
    for row, metrics in scores.items():
        rows.append({"set": name, "method": row, "count": len(next(iter(metrics.values())))}
                    | image_quality.means_and_intervals(metrics) | {"published": published(models_of.get(row), name)})
    return rows + [{"set": name, "method": row, "count": 0, "published": f"absent: {why}"} for row, why in
                   absent.items()]


def note_oddities(rows):
    """A line for each row whose figures say that something else was measured than its name."""
    rainy = {row["set"]: row["psnr_y"] for row in rows if row["method"] == RAINY}
    for row in rows:
        if row["count"] and row["method"] != RAINY and row["psnr_y"] < rainy[row["set"]]:
            processes.say(f"note: {row['set']}: '{row['method']}' is further from the clean images than the rainy "
                          "input is; weights of another form of the network (ddn, ddn_matlab, ddn_port; rescan, "
                          "rescan_add) or made for other rain do that")
        if row["count"] and row["psnr_y"] > IDENTICAL:
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
    for part, words in PUBLISHED.get(network, {}).items():
        if part in name.lower():
            return "{} ({}; {})".format(*words)
    return None


# ---- tables ----------------------------------------------------------------------------------------------------

def shown(rows, cost):
    """-> the same rows for a table: "mean (low to high)" where there is an interval, and what each method costs."""
    found = []
    for row in rows:
        one = {"set": row["set"], "method": row["method"], "n": row["count"]}
        for metric in METRICS:
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


def write(cfg, results, folder):
    """The tables on the console, results.md with the same, results.csv with the numbers, results.json, the plots."""
    rows = results["pairs"]
    columns = {"set": "set", "method": "method", "n": "n"} | {
        metric: title for metric, title in METRICS.items() if rows and metric in rows[0]} | {
        "ms": f"ms, {cfg.LATENCY_SIZE}", "parameters": "parameters", "GMAC": "GMAC", "GB": "GB",
        "published": "published"}
    tables = [(shown(rows, results["costs"]), columns),
              (results["intensities"], {"set": "set", "method": "PSNR Y in rain that is"} | {
                  word: word for word in windshield_pairs.INTENSITIES}),
              (results["detection"], {"method": "detector behind", "count": "n", "mAP": "mAP", "AP50": "AP50"})]
    for table, titles in tables:
        if table:
            print("\n" + report.table(table, titles))
    with system.written(folder / "results.md") as temporary:
        temporary.write_text("\n".join(report.markdown(*table) for table in tables if table[0]), encoding="utf-8")
    with system.written(folder / "results.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    report.write_results(folder / "results.json", cfg.as_dict(), results)
    draw_plots(cfg, rows, results["costs"], results["detection"], folder)


# ---- pictures --------------------------------------------------------------------------------------------------

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
    visualize.grid(rows, [RAINY, *models, "clean"], path)


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
