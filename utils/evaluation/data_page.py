"""report.html of validate_setup.py: a data set as a person sees it, what looks odd first. One file, no network.

It uses the template and the tables of report_page.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import datasets, report, visualize
from utils.config import UserError, writing
from utils.datasets.samples import evenly
from utils.evaluation import report_page
from utils.evaluation.report_page import escaped
from utils.evaluation.study import data_uri

THUMBNAIL = 320   # pixels, the longer side
SHOWN = 24        # odd images of a split, and half as many of the others
CLASSES = 40      # bars of a histogram at most
EDGES = (8, 16, 32, 64, 128, 256)  # pixels between the bars of the box sizes


def write(folder, title, findings, audits, pairs, constants):
    """Write the page into a folder, which is made.

    Args:
        findings: [(kind, text), ...] of kinds "ok", "warn" and "FAIL", in order; audits: [audit.Audit, ...];
        pairs: {title: [(rainy path, clear path), ...]}; constants: {name: value}.
    Returns:
        Path of the page.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    serious = [one for one in findings if one[0] != "ok"]
    lines = "".join(f"<li><b>{escaped(kind)}</b> {escaped(text)}</li>" for kind, text in serious)
    parts = [report_page.environment_line(report.environment()),
             f"<ul>{lines}</ul>" if lines else "<p>Nothing was found that would stop or spoil a training.</p>"]
    parts += [_section(audit) for audit in audits]
    parts += [f"<h2>{escaped(name)}</h2><p class=\"quiet\">{len(found)} pairs; rainy, clear</p>"
              + report_page.figure_grid(_pair(*one) for one in evenly(found, SHOWN // 2))
              for name, found in pairs.items()]
    parts.append("<details><summary>Everything that was looked at, and the constants</summary><ul>"
                 + "".join(f"<li>{escaped(text)}</li>" for kind, text in findings if kind == "ok") + "</ul>"
                 + report_page.constants_table(constants) + "</details>")
    report_page.write_page(folder / report_page.NAME, title, parts)
    return folder / report_page.NAME


def _section(audit):
    """-> HTML of one split."""
    odd = audit.odd
    usual = evenly([image for image in audit.images if not image.reasons], SHOWN // 2)
    classes = sorted(audit.counts.items(), key=lambda item: -item[1])
    more = f" (the {CLASSES} most frequent of {len(classes)})" if len(classes) > CLASSES else ""
    counts = np.histogram(audit.sizes, (0, *EDGES, np.inf))[0].tolist()
    labels = [f"below {EDGES[0]}", *(f"{a} to {b}" for a, b in zip(EDGES, EDGES[1:], strict=False)),
              f"{EDGES[-1]} and more"]
    return (f"<h2>{escaped(audit.title)}</h2><p class=\"quiet\">{len(audit.images)} images, {audit.empty} without "
            f"objects; {len(audit.sizes)} objects</p><div class=\"grid\">"
            f"<figure>{_bars(classes[:CLASSES])}<figcaption>objects per class{more}</figcaption></figure>"
            f"<figure>{_bars(list(zip(labels, counts, strict=True)))}<figcaption>objects by size: side of a square of "
            "the box's area, pixels at the training's size</figcaption></figure></div>"
            f"<h3>Worth a look: {len(odd)} images{f', of which {SHOWN}' if len(odd) > SHOWN else ''}</h3>"
            + report_page.figure_grid(_figure(image, audit) for image in odd[:SHOWN])
            + "<h3>Some of the others</h3>" + report_page.figure_grid(_figure(image, audit) for image in usual))


def _bars(rows):
    """-> HTML of horizontal bars, [(label, count), ...], each with its number."""
    most = max((count for _, count in rows), default=0) or 1
    parts = []
    for i, (label, count) in enumerate(rows):
        y, width = 18 * i, 120 * count / most
        parts.append(f'<rect class="bar" x="100" y="{y + 3}" width="{width:.1f}" height="13"/><text x="96" '
                     f'y="{y + 14}" text-anchor="end">{escaped(str(label)[:18])}</text><text x="{104 + width:.1f}" '
                     f'y="{y + 14}">{count}</text>')
    return f'<svg viewBox="0 0 270 {max(18, 18 * len(rows))}" role="img" aria-label="counts">{"".join(parts)}</svg>'


def _figure(image, audit):
    """-> HTML of an image with its boxes, small."""
    caption = f"{image.path.name}: {'; '.join(image.reasons) or f'{len(image.boxes)} objects'}"
    try:
        small, scale = _thumbnail(image.path)
    except UserError:
        return f"<figure><figcaption>{escaped(caption)} (cannot be read)</figcaption></figure>"
    picture = visualize.draw_boxes(small, torch.from_numpy(image.boxes * scale), torch.from_numpy(image.labels),
                                   dict(enumerate(audit.names)))
    return _shown(picture, caption)


def _pair(rainy, clear):
    """-> HTML of the two images beside each other."""
    try:
        pictures = [visualize.to_pil(_thumbnail(path)[0]) for path in (rainy, clear)]
    except UserError as error:
        return f"<figure><figcaption>{escaped(error)}</figcaption></figure>"
    both = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)))
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (pictures[0].width, 0))
    return _shown(both, rainy.name)


def _shown(picture, caption):
    uri = data_uri(picture, report_page.QUALITY)
    return f'<figure><img alt="{escaped(caption)}" src="{uri}"><figcaption>{escaped(caption)}</figcaption></figure>'


def _thumbnail(path):
    """-> (3, h, w) uint8, and its scale."""
    picture = visualize.to_pil(datasets.read_image(path))
    scale = min(1.0, THUMBNAIL / max(picture.size))
    size = [max(1, round(side * scale)) for side in picture.size]
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).copy()
    return torch.from_numpy(small).permute(2, 0, 1), scale
