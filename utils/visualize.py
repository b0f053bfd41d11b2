"""Pictures: boxes on images, grids with captions, training curves, cost against accuracy. Nothing needs a display."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from utils import system
from utils.boxes import decode, pixel_corners
from utils.config import writing
from utils.images import to_bytes, to_floats

PALETTE = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
INK, PAPER = "#202020", "#ffffff"


def to_pil(image):
    """(3, H, W) Tensor, float in [0, 1] (values outside are cut) or uint8 -> PIL image."""
    image = image if image.dtype == torch.uint8 else to_bytes(image)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def enlargement(size):
    """-> the whole number that makes a square image of `size` pixels at least 240, so that labels and headings fit."""
    return max(1, -(-240 // size))


@lru_cache(maxsize=32)
def font_of(size):
    """-> Pillow's own font in a size; opening it takes longer than drawing a box."""
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=2048)
def lettering(text, size, ink, paper, margin=1):
    """A text on a strip of its own, to paste: frame after frame shows the same words, and setting type costs the most.

    Args:
        size: of the letters, in pixels; ink, paper: colours; margin: pixels around the letters.
    Returns:
        PIL image, not to be changed; (x, y) of its corner from the point that Pillow would write the text at.
    """
    font = font_of(size)
    left, top, right, bottom = map(round, font.getbbox(text))
    strip = Image.new("RGB", (right - left + 2 * margin + 1, bottom - top + 2 * margin + 1), paper)
    ImageDraw.Draw(strip).text((margin - left, margin - top), text, fill=ink, font=font)
    return strip, (left - margin, top - margin)


def draw_boxes(image, boxes, labels, names, scores=None, scale=1, notes=None):
    """Draw boxes with class names on a copy of the image.

    Args:
        image: (3, H, W) float in [0, 1] or uint8; boxes: (N, 4) xyxy pixels; labels: (N,); names: {label: name};
        scores: (N,) or None; scale: enlarge the picture so that small images stay readable.
        notes: N texts behind the class names, or None.
    Returns:
        PIL image of scale times the size.
    """
    picture = to_pil(image)
    if scale != 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    size = max(11, picture.height // 50)
    pen = ImageDraw.Draw(picture)
    for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        colour = PALETTE[label % len(PALETTE)]
        box = [value * scale for value in box]
        box = [box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)]
        pen.rectangle(box, outline=colour, width=max(2, picture.height // 300))
        text = names[label] + (notes[i] if notes else "") + (f" {scores[i]:.2f}" if scores is not None else "")
        strip, (x, y) = lettering(text, size, INK, colour)
        picture.paste(strip, (round(box[0] + 2 + x), round(max(box[1] - size - 2, 0) + y)))
    return picture


def draw_masks(image, boxes, labels, names, masks, scores=None, scale=1, by_class=False, opacity=0.45, notes=None):
    """Draw translucent masks with an outline below the boxes and class names of `draw_boxes`.

    Args:
        masks: (N, H, W) bool, of the image's size; later ones lie above earlier ones.
        by_class: masks in their class's colour, else one colour per object, so that neighbours stay apart.
        opacity: of a mask's inside, in [0, 1]. The others: see draw_boxes.
    Returns:
        PIL image of scale times the size.
    """
    picture = torch.from_numpy(np.asarray(to_pil(image)).copy()).permute(2, 0, 1).float()  # (3, H, W) in 0..255
    for i, (mask, label) in enumerate(zip(masks.cpu().bool(), labels.tolist(), strict=True)):
        hexadecimal = PALETTE[(label if by_class else i) % len(PALETTE)]
        colour = torch.tensor([int(hexadecimal[j:j + 2], 16) for j in (1, 3, 5)], dtype=torch.float32)[:, None]
        window = _window_of(mask)
        if window is None:
            continue
        mask, part = mask[window], picture[(slice(None), *window)]  # a view: the picture is painted
        part[:, mask] = (1 - opacity) * part[:, mask] + opacity * colour
        outside = torch.nn.functional.max_pool2d((~mask)[None].float(), 3, 1, 1)[0] > 0
        part[:, mask & outside] = colour
    return draw_boxes(picture.round().byte(), boxes, labels, names, scores, scale, notes)


def _window_of(mask):
    """-> (slice, slice) around a mask (H, W), a pixel more where the image has one; None for an empty mask."""
    slices = []
    for axis, length in enumerate(mask.shape):
        hit = mask.any(dim=1 - axis).nonzero()
        if not len(hit):
            return None
        slices.append(slice(max(int(hit[0]) - 1, 0), min(int(hit[-1]) + 2, length)))
    return tuple(slices)


def draw_detections(images, outputs, id2label, threshold=0.4, scale=1):
    """Draw a detector's answer on its input images.

    Args:
        images: (B, 3, S, S) in [0, 1]; outputs: with `logits` and `pred_boxes` of these images.
        threshold: boxes from this score on; scale: see draw_boxes.
    Returns:
        [PIL image, ...].
    """
    size = tuple(images.shape[-2:])
    pictures = []
    for image, found in zip(images, decode(outputs.logits, outputs.pred_boxes, [size] * len(images)),
                            strict=True):
        keep = found["scores"] >= threshold
        pictures.append(draw_boxes(image, found["boxes"][keep], found["labels"][keep], id2label, found["scores"][keep],
                                   scale))
    return pictures


def draw_truth(image, sample, id2label, scale=1):
    """Draw the annotated boxes of a data set's sample (normalised cxcywh) on an image (3, H, W). -> PIL image"""
    return draw_boxes(image, pixel_corners(sample["boxes"], *image.shape[-2:]), sample["labels"], id2label, scale=scale)


def grid(rows, headings, path=None):
    """A page of pictures with a heading over every column.

    Args:
        rows: [[PIL image or (3, H, W) float Tensor, ...], ...], each row as long as `headings`; None leaves a gap.
    Returns:
        PIL image, also written to `path` when given.
    """
    rows = [[to_pil(cell) if torch.is_tensor(cell) else cell for cell in row] for row in rows]
    widths = [max((row[i].width for row in rows if row[i]), default=1) for i in range(len(headings))]
    heights = [max(cell.height for cell in row if cell) for row in rows]
    gap, head = 4, 20
    page = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1) + head), PAPER)
    pen, font = ImageDraw.Draw(page), font_of(13)
    lefts = [gap + sum(widths[:i]) + gap * i for i in range(len(widths))]
    for left, text in zip(lefts, headings, strict=True):
        pen.text((left, 3), text, fill=INK, font=font)
    top = head + gap
    for row, height in zip(rows, heights, strict=True):
        for left, cell in zip(lefts, row, strict=True):
            if cell:
                page.paste(cell, (left, top))
        top += height + gap
    if path:
        with writing(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            page.save(path)
    return page


def captioned(picture, text):
    """PIL image with a line of text below it."""
    page = Image.new("RGB", (picture.width, picture.height + 16), PAPER)
    page.paste(picture)
    ImageDraw.Draw(page).text((3, picture.height + 1), text, fill=INK, font=font_of(11))
    return page


def as_tensor(picture):
    """PIL image -> (3, H, W) float in [0, 1], for TensorBoard."""
    return to_floats(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1))


def curves(history, path, steps=None):
    """Training curves into a PNG: losses per optimizer step above, what an epoch is scored by below.

    Args:
        history: of a fit, [{"epoch", "step": the last of the epoch, name: number, ...}, ...].
        steps: {"step": [int, ...], loss: [float, ...]}; a loss without it is drawn per epoch. Light: as it is; dark:
            its moving average; dashed: where an epoch ends.
    """
    steps = steps or {"step": []}
    losses = [name for name in steps if name != "step"]
    names = [name for name, value in {**history[0], **history[-1]}.items()  # a resumed run may have other losses
             if isinstance(value, (int, float)) and name not in ("epoch", "step", *losses)]
    columns = min(3, max(len(losses), len(names)))
    lines = [-(-len(group) // columns) for group in (losses, names)]
    figure, panels = _panels(sum(lines), columns)
    above, below = panels[:lines[0]].flat, panels[lines[0]:].flat
    for panel, name in zip(above, losses, strict=False):
        _step_panel(panel, steps["step"], steps[name], [record["step"] for record in history])
        panel.set_title(name, fontsize=10)
    epochs = [record["epoch"] for record in history]
    for panel, name in zip(below, names, strict=False):
        panel.plot(epochs, [record.get(name, float("nan")) for record in history], marker="o", markersize=4)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("epoch", fontsize=8)
        panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)  # whole epochs on the axis, also where there is only one
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
    for panel in (*above[len(losses):], *below[len(names):]):
        panel.axis("off")
    _save(figure, path)


def _panels(rows, columns, width=4.2, height=2.8, left=0.65, right=0.15, bottom=0.55, top=0.35):
    """-> figure, (rows, columns) array of its panels, sizes and margins in inches; fixed margins, as fitting them to
    the texts takes as long as the drawing."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, gridspec_kw={
        "left": left / (width * columns), "right": 1 - right / (width * columns),
        "bottom": bottom / (height * rows), "top": 1 - top / (height * rows),
        "wspace": (left + right) / (width - left - right), "hspace": (bottom + top) / (height - bottom - top)})


def _step_panel(panel, steps, values, epoch_ends):
    """One loss over the optimizer steps."""
    panel.plot(steps, values, color=PALETTE[3], alpha=0.3, linewidth=0.8)
    panel.plot(steps, smoothed(values), color=PALETTE[3], linewidth=1.6)
    for end in epoch_ends:
        panel.axvline(end, color="#888888", linewidth=0.8, linestyle="--")
    finite = [value for value in values if np.isfinite(value)]
    if finite:
        low, high = np.quantile(finite, (0.0, 0.99))  # single spikes would press the rest flat
        panel.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    panel.set_xlabel("optimizer step (dashed: an epoch ends)", fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)


def smoothed(values, share=0.05):
    """Centred moving average over `share` of the points, fewer at both ends and without those that are not finite.

    [float, ...] -> (N,) array
    """
    values = np.asarray(values, dtype=float)
    counted = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(counted, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(counted)])
    middle, half = np.arange(len(values)), int(len(values) * share / 2)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def cost_against_accuracy(points, path, x_label, y_label):
    """Scatter of named points {"name": (cost, accuracy)}, for example milliseconds against mAP, into a PNG."""
    figure, panel = plt.subplots(figsize=(6, 4))
    costs = [cost for cost, _ in points.values()]
    middle = (min(costs) + max(costs)) / 2
    for i, (name, (cost, accuracy)) in enumerate(points.items()):
        panel.scatter(cost, accuracy, color=PALETTE[i % len(PALETTE)], zorder=3)
        shift, side = ((-6, 4), "right") if cost > middle else ((6, 4), "left")  # names stay inside the panel
        panel.annotate(name, (cost, accuracy), xytext=shift, textcoords="offset points", fontsize=9, ha=side)
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.margins(0.2)
    panel.grid(alpha=0.3)
    _finish(figure, path)


def heat_map(values, rows, columns, path, label):
    """A PNG of numbers in [0, 1]: values [row][column], names of rows and columns; label: what is counted."""
    figure, panel = plt.subplots(figsize=(2.6 + 0.5 * len(columns), 1.9 + 0.5 * len(rows)))
    panel.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=9)
    panel.set_yticks(range(len(rows)), rows, fontsize=9)
    for y, numbers in enumerate(values):
        for x, value in enumerate(numbers):
            panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                       color="black" if value > 0.6 else "white")
    panel.set_title(f"{label}, in percent", fontsize=10)
    _finish(figure, path)


def bars(values, path, x_label):
    """Horizontal bars of {name: number}, first on top, into a PNG; the axis begins near the smallest."""
    figure, panel = plt.subplots(figsize=(7, 1.2 + 0.3 * len(values)))
    low, high = min(values.values()), max(values.values())
    panel.barh(list(values), list(values.values()), color=PALETTE[3])
    panel.set_xlim(low - 0.2 * max(high - low, 0.1), high + 0.1 * max(high - low, 0.1))
    panel.invert_yaxis()
    panel.set_xlabel(x_label)
    panel.grid(alpha=0.3, axis="x")
    _finish(figure, path)


def roc(false_alarms, recall, chosen, chosen_text, title, path):
    """ROC curve with the operating point `chosen` = (false alarm rate, recall), None where one of them does not exist,
    into a PNG."""
    figure, panel = plt.subplots(figsize=(4.6, 4.4))
    panel.plot(false_alarms, recall, color=PALETTE[3], drawstyle="steps-post")
    panel.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
    if None not in chosen:
        panel.scatter(*chosen, color=PALETTE[0], zorder=3, label=chosen_text)
        panel.legend(loc="lower right")
    panel.set_xlabel("false alarms: clean images called rainy")
    panel.set_ylabel("recall: rainy images called rainy")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    _finish(figure, path)


def threshold_sweep(rows, chosen, path):
    """mAP, share of images that take the rainy branch and ms per image against the gate's threshold, into a PNG.

    Args:
        rows: [{"threshold", "derained", "mAP", "ms"}, ...]; chosen: the threshold in use, marked.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4))
    x = [row["threshold"] for row in rows]
    for panel, (key, title) in zip(panels, (("mAP", "mAP on the mix"), ("derained", "share of images to the branch"),
                                            ("ms", "ms per image, mean over the mix")), strict=True):
        panel.plot(x, [row[key] for row in rows], marker="o", markersize=3, color=PALETTE[3])
        panel.axvline(chosen, color=PALETTE[0], linewidth=1, linestyle="--")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("threshold of the rain detector", fontsize=9)
        panel.grid(alpha=0.3)
    _finish(figure, path)


def _finish(figure, path):
    """Fit the margins to the texts and save."""
    figure.tight_layout()
    _save(figure, path)


def _save(figure, path):
    """Write a PNG, complete or not at all; UserError where that cannot be."""
    try:
        with writing(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with system.written(path) as temporary:
                figure.savefig(temporary, dpi=110, format="png")
    finally:
        plt.close(figure)
