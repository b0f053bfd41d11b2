"""report.html: what a person looks at after an evaluation. One file with everything in it: no network, no server.

A script makes a `Page`, hands it each detector's answers with `add` (`comparison.evaluate_models` does), and lets it
`write`. The numbers behind the page, `Page.numbers`, go into results.json as "details".
"""

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from utils import datasets, processes, report, system, visualize
from utils.config import writing
from utils.datasets.samples import evenly
from utils.evaluation import detection_details
from utils.evaluation.coco import coco_scores, ground_truth
from utils.evaluation.intervals import RECALLS
from utils.evaluation.study import data_uri

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
WRONG = 6            # pictures of false positives, and as many of misses, per detector and set of images
SLIDERS = 6          # pictures before and after de-raining, at most
SIDE, SLIDER_SIDE = 168, 480  # pixels, the longer side of a mistake's picture, and of a slider's
QUALITY = 80         # of the JPEGs: a page of many is to stay below 3 MB
MATRIX = 20          # classes up to which the confusion matrix is shown, and not only its largest entries
COLOURS = 8          # of lines, see the template
HEADINGS = {"model": "model", "mAP": "mAP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium",
            "AP_large": "large", "threshold": "best threshold", "F1": "F1", "precision": "precision",
            "recall": "recall", "calibration_error": "calibration error"}
CLASS_HEADINGS = {"class": "class", "objects": "objects", "detections": "detections", "AP50": "AP50",
                  "threshold": "best threshold", "F1": "F1", "precision": "precision", "recall": "recall",
                  "calibration_error": "calibration error"}


class Entry(NamedTuple):
    """One detector on one set of images."""

    model: str
    images: str
    details: detection_details.Details  # without its matching: that of COCO's validation images is large
    numbers: dict
    wrong: str    # HTML of the most confident false positives
    missed: str   # HTML of the largest misses


class Page:
    """Collects what detectors found; on other ranks than the first it does nothing.

    Args:
        title: of the page; pictures: of each kind of mistake, per detector and set of images.
    """

    def __init__(self, title, pictures=WRONG):
        self.title, self.pictures, self.entries, self.sliders = title, pictures, [], []

    def add(self, model, data, scores, detections, *, truth=None, iou_type="bbox", images=None):
        """One detector's answers.

        Args:
            model: how the tables call it; data: the data set; scores: of coco_scores, None to compute them;
            detections: iterable of dicts, see coco.entries;
            truth: None to read it; iou_type: "segm" for masks; images: the set's name, None for its domain.
        """
        if not processes.is_main():
            return
        given = (truth or ground_truth(data.annotations), list(detections), data.category_of, data.image_ids,
                 iou_type)
        one, scores = detection_details.details(*given), scores or coco_scores(*given)
        pictures = _Pictures(data, one.matching)
        self.entries.append(Entry(
            model, images or data.domain, one._replace(matching=None), detection_details.numbers(one, scores),
            figure_grid(pictures.detection(i, fault) for i, fault in detection_details.false_positives(
                one, self.pictures)),
            figure_grid(pictures.object(i, score) for i, score in detection_details.misses(one, self.pictures))))

    @property
    def numbers(self):
        """{set of images: {model: numbers of detection_details}}, for results.json."""
        found = {}
        for one in self.entries:
            found.setdefault(one.images, {})[one.model] = one.numbers
        return found

    @torch.no_grad()
    def add_sliders(self, models, dataset, device, id2label, threshold=0.4, count=3):
        """What came in, with the first model's detections, against what a de-rainer made of it, with those of the
        detector behind it; models without a de-rainer are left out.

        Args:
            models: {name: model}; dataset: CocoDetectionDataset; count: images; threshold: of the boxes drawn.
        """
        if not processes.is_main():
            return
        for sample in evenly(dataset, count):
            batch = datasets.to_device(datasets.collate([sample]), device)["images"]
            scale, before = visualize.enlargement(batch.shape[-1]), None
            for name, model in models.items():
                outputs = model(pixel_values=batch)
                derained = getattr(outputs, "derained", None)
                images = batch if derained is None else derained
                picture = visualize.draw_detections(images, outputs, id2label, threshold, scale)[0]
                before = before or picture
                if derained is not None and len(self.sliders) < SLIDERS:
                    self.sliders.append(_slider(f"{Path(sample['path']).name}: {name}", before, picture))

    def write(self, folder, constants):
        """Write NAME into the folder; constants: {name: value} of the script."""
        parts = [environment_line(report.environment())]
        for images in self.numbers:
            own = [one for one in self.entries if one.images == images]
            parts += [f"<h2>On {escaped(images)} images</h2>", _overview(own), *map(_section, own)]
        if self.sliders:
            parts += ["<h2>Before and after de-raining</h2><p class=\"quiet\">Left of the line: what came in, with the "
                      "first model's detections. Right: what the detector sees behind the de-rainer. Move the slider."
                      "</p>", f'<div class="grid">{"".join(self.sliders)}</div>']
        write_page(Path(folder) / NAME, self.title, [*parts, _constants(constants)])


def write_page(path, title, parts):
    """Write a page of TEMPLATE; parts: its HTML, piece by piece."""
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, value in (("title", escaped(title)), ("body", "\n".join(parts))):
        page = page.replace("{{" + name + "}}", value)
    with writing(path), system.written(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


# ---- pictures ------------------------------------------------------------------------------------------------------

class _Pictures:
    """The surroundings of boxes, out of the images as the data set gives them to a detector, in their own aspect."""

    def __init__(self, data, matching):
        self.data, self.matching = data, matching
        self.index = {image_id: i for i, image_id in enumerate(data.image_ids)}
        self.last = None, None

    def detection(self, i, fault):
        """-> HTML of a false positive."""
        found = self.matching
        masks = found.masks[i] if found.masks else None
        return self._figure(found.image[i], found.box[i], masks, "#ff3b30",
                            f"{found.names[found.label[i]]} {found.score[i]:.2f}: {fault}")

    def object(self, i, score):
        """-> HTML of an object that was missed."""
        found = self.matching
        masks = found.object_masks[i] if found.object_masks else None
        width, height = found.object_box[i][2:]
        below = "not found at any score" if score is None else f"found at {score:.2f}"
        return self._figure(found.object_image[i], found.object_box[i], masks, "#34c759",
                            f"{found.names[found.object_label[i]]}, {width:.0f} x {height:.0f} pixels: {below}")

    def _figure(self, image_id, box, mask, colour, caption):
        index = self.index[image_id.item() if isinstance(image_id, np.generic) else image_id]
        if self.last[0] != index:
            self.last = index, self.data[index]
        sample = self.last[1]
        picture = data_uri(_cut(sample["image"], tuple(sample["size"]), box, mask, colour), QUALITY)
        caption = escaped(f"{caption} ({self.data.files[index]})")
        return f'<figure><img alt="{caption}" src="{picture}"><figcaption>{caption}</figcaption></figure>'


def _cut(image, size, box, mask, colour):
    """-> PIL image of a box and as much around it.

    Args:
        image: (3, h, w) uint8, the whole picture at any size; size: its original (H, W); box: [x, y, w, h] in pixels of
        that; mask: RLE of that size or None; colour: of box and mask.
    """
    x, y, width, height = box
    reach = max(width, height, 32)
    left, top = max(0.0, x - reach / 2), max(0.0, y - reach / 2)
    right, bottom = min(size[1], x + width + reach / 2), min(size[0], y + height + reach / 2)
    if right - left < 1 or bottom - top < 1:  # a detection may lie outside of its image
        left, top, right, bottom = 0.0, 0.0, float(size[1]), float(size[0])
    scale = SIDE / max(right - left, bottom - top)
    whole, across, down = visualize.to_pil(image), image.shape[2] / size[1], image.shape[1] / size[0]
    picture = whole.resize((max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))),
                           Image.Resampling.BICUBIC, box=(left * across, top * down, right * across, bottom * down))
    if mask is not None:
        inside = Image.fromarray(rle.decode(mask) * np.uint8(110)).resize(
            picture.size, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        picture.paste(Image.new("RGB", picture.size, colour), mask=inside)
    corners = [(x - left) * scale, (y - top) * scale, (x + width - left) * scale, (y + height - top) * scale]
    ImageDraw.Draw(picture).rectangle([*corners[:2], max(corners[0], corners[2]), max(corners[1], corners[3])],
                                      outline=colour, width=2)
    return picture


def _slider(caption, before, after):
    """-> HTML of two PIL images, one over the other."""
    pictures = [before.copy(), after.copy()]
    for picture in pictures:
        picture.thumbnail((SLIDER_SIDE, SLIDER_SIDE))
    first, second = (data_uri(picture, QUALITY) for picture in pictures)
    return (f'<figure class="slider"><div class="pair"><img alt="after" src="{second}"><img class="over" alt="before" '
            f'src="{first}"></div><input type="range" min="0" max="100" value="50" aria-label="before and after: '
            f'{escaped(caption)}"><figcaption>{escaped(caption)}</figcaption></figure>')


def figure_grid(figures):
    """-> HTML of several in a grid, or that there are none."""
    found = "".join(figures)
    return f'<div class="grid tight">{found}</div>' if found else "<p>None.</p>"


# ---- tables and curves ---------------------------------------------------------------------------------------------

def escaped(value):
    return html.escape(str(value))


def _number(value):
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def table(rows, headings, kind=""):
    """-> HTML of [{key: number, text or None}, ...]."""
    head = "".join(f"<th>{escaped(heading)}</th>" for heading in headings.values())
    body = "".join("<tr>" + "".join(f"<td>{escaped(_number(row.get(key)))}</td>" for key in headings) + "</tr>"
                   for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(lines, across, up, bars=()):
    """-> HTML of a square with both axes from 0 to 1.

    Args:
        lines: [(number of the colour, x (n,), y (n,)), ...]; across, up: what the axes are;
        bars: [(left, width, height), ...] behind the lines.
    """
    def point(x, y):
        return f"{34 + 200 * x:.1f},{10 + 160 * (1 - y):.1f}"
    parts = [f'<rect class="bar" x="{34 + 200 * left:.1f}" y="{10 + 160 * (1 - height):.1f}" width="{200 * width:.1f}" '
             f'height="{160 * height:.1f}"/>' for left, width, height in bars]
    for value in (0, 0.5, 1):
        x, y = point(value, value).split(",")
        parts.append(f'<path class="axis" d="M34,{y}H234M{x},10V170"/><text x="{x}" y="184" text-anchor="middle">'
                     f'{value}</text><text x="30" y="{y}" dy="4" text-anchor="end">{value}</text>')
    for colour, x, y in lines:
        dashes = ";stroke-dasharray:5 3" if colour >= COLOURS else ""
        points = " ".join(point(float(a), float(b)) for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline class="line" style="stroke:var(--c{colour % COLOURS}){dashes}" points="{points}"/>')
    return (f'<svg viewBox="0 0 240 204" role="img" aria-label="{escaped(up)} over {escaped(across)}">{"".join(parts)}'
            f'<text x="134" y="200" text-anchor="middle">{escaped(across)}</text><text transform="translate(9 90) '
            f'rotate(-90)" text-anchor="middle">{escaped(up)}</text></svg>')


def _overview(entries):
    """-> HTML of a set of images: the table of all detectors, and their curves in one chart."""
    rows = [{"model": one.model} | one.numbers for one in entries]
    first = entries[0].numbers
    keys = "".join(f'<span class="key" style="--k:var(--c{i % COLOURS})">{escaped(one.model)}</span>'
                   for i, one in enumerate(entries))
    curves = [(i, RECALLS, one.details.precision) for i, one in enumerate(entries) if one.details.precision is not None]
    f1 = [(i, detection_details.SCORES, one.details.pooled.f1_from(detection_details.SCORES))
          for i, one in enumerate(entries) if one.details.pooled.objects]
    return (f'<p class="quiet">{first["images"]} images, {first["objects"]} objects. F1, precision and recall at the '
            f"threshold where F1 over all classes is highest, for a detection that covers its object with IoU "
            f"{detection_details.IOU}. Small, medium, large: AP of objects below 32&sup2;, up to 96&sup2;, above."
            f"</p>{table(rows, HEADINGS)}<p>{keys}</p>"
            f'<div class="grid"><figure>{_chart(curves, "recall", "precision, mean of classes")}</figure>'
            f'<figure>{_chart(f1, "score from which a box is kept", "F1, all classes together")}</figure></div>')


def _section(entry):
    """-> HTML of one detector, folded up."""
    one = entry.details
    bars = [(row.low, 0.1, row.frequency) for row in one.reliability]
    diagram = _chart([(7, (0, 1), (0, 1))], "score", "share that is right", bars)
    counts = [{"score": f"{row.low:.1f} to {row.low + 0.1:.1f}", "count": row.count, "confidence": row.confidence,
               "frequency": row.frequency} for row in one.reliability]
    classes = "".join(_class_figure(name, own, precision) for name, own, precision in
                      zip(one.names, one.curves, one.precisions, strict=True) if own.objects)
    return (f"<details><summary>{escaped(entry.model)} on {escaped(entry.images)} images: classes, confusions, "
            f"calibration, mistakes</summary><h3>Classes, each at its own best threshold</h3>"
            f"{table(entry.numbers['classes'], CLASS_HEADINGS)}"
            '<p class="quiet"><span class="key" style="--k:var(--c0)">precision over recall</span><span class="key" '
            f'style="--k:var(--c1)">F1 over the score</span></p><div class="grid tight">{classes}</div>'
            f"<h3>Confusions{_at(one.threshold)}</h3>{_confusion(one)}"
            "<h3>Calibration</h3><p class=\"quiet\">Of the detections with a score, how many are right; on the "
            f'diagonal a score is a probability.</p><div class="grid"><figure>{diagram}</figure>'
            + table(counts, {"score": "score", "count": "detections", "confidence": "mean score",
                              "frequency": "share right"})
            + f"</div><h3>Most confident false positives</h3>{entry.wrong}"
            f"<h3>Largest misses{_at(one.threshold)}</h3>{entry.missed}</details>")


def _at(threshold):
    return " (no detection is right at any score)" if threshold is None else f" (scores from {threshold:.3f} on)"


def _class_figure(name, own, precision):
    """-> HTML of a class that has objects."""
    lines = [(0, RECALLS, precision), (1, detection_details.SCORES, own.f1_from(detection_details.SCORES))]
    return f"<figure>{_chart(lines, 'recall, score', 'precision, F1')}<figcaption>{escaped(name)}</figcaption></figure>"


def _confusion(one):
    """-> HTML of the matrix, or of its largest entries off the diagonal where there are many classes."""
    if one.confusion is None:
        return "<p>-</p>"
    names, counts = [*one.names, detection_details.BACKGROUND], one.confusion
    if len(one.names) > MATRIX:
        pairs = sorted(((int(counts[i, j]), i, j) for i, j in np.argwhere(counts) if i != j), reverse=True)[:40]
        return table([{"object": names[i], "detected": names[j], "count": count} for count, i, j in pairs],
                      {"object": "object", "detected": "detected as", "count": "times"})
    head = "".join(f"<th>{escaped(name)}</th>" for name in names)
    body = ""
    for i, name in enumerate(names):
        total = counts[i].sum()
        cells = "".join(f'<td style="--v:{counts[i, j] / total if total else 0:.2f}">'
                        f'{"" if i == j == len(names) - 1 else counts[i, j]}</td>' for j in range(len(names)))
        body += f"<tr><td>{escaped(name)}</td>{cells}</tr>"
    return ('<p class="quiet">Row: the object (background: there was none). Column: what was detected (background: '
            f'missed).</p><div class="wide"><table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{body}'
            "</tbody></table></div>")


def environment_line(values):
    """-> HTML of one line."""
    return (f'<p class="quiet">{escaped(values["date"])}, commit {escaped(values["commit"] or "-")}, '
            f'{escaped(values["device"])}, torch {escaped(values["torch"])}</p>')


def constants_table(constants):
    """-> HTML of a script's constants, {name: value}."""
    rows = [{"name": name, "value": repr(value)} for name, value in constants.items()]
    return table(rows, {"name": "constant", "value": "value"}, "constants")


def _constants(constants):
    return ("<h2>Constants</h2><details><summary>What this run was started with</summary>"
            + constants_table(constants) + "</details>")
