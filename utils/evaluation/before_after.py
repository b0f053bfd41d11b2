"""What an adaptation changed: vanilla detector, original and adapted SPDNet, as a table and as a page of pictures."""

import numpy as np
import torch

from utils import datasets, report, visualize
from utils.datasets.samples import evenly
from utils.evaluation.coco import detection_scores

VANILLA = "Vanilla RT-DETR"
FEW, MANY = 3, 10  # objects of a scene that is good to look at
SCENES_RULE = f"evenly spaced among the validation images with {FEW} to {MANY} objects, or among all if none has"


def labels(derainer="SPDNet"):
    """-> how tables call the detector behind a de-rainer of that name, as it was and adapted."""
    return tuple(f"{state} {derainer} + RT-DETR" for state in ("Original", "Adapted"))


ORIGINAL, ADAPTED = labels()


@torch.no_grad()
def baseline_scores(model, loader, device, truth, original=ORIGINAL):
    """COCO scores before any training; the model's mode and the random numbers to come stay as they are.

    Args:
        model: RainRobustRTDETR with the original de-rainer; loader: rainy validation images; truth: from
            `ground_truth`; original: the model's row, of `labels`.
    Returns:
        {VANILLA: scores, original: scores}, see coco_scores; every rank must call.
    """
    training = model.training
    model.eval()
    scores = {name: detection_scores(detector, loader, device, truth, name)[0]
              for name, detector in ((VANILLA, model.detection_module), (original, model))}
    model.train(training)
    return scores


def gain(score, baseline):
    """-> the change against the baseline in percent, as text such as "+12.6%"; "" where the baseline is 0."""
    return f"{100 * (score / baseline - 1):+.1f}%" if baseline > 0 else ""


def table(scores):
    """{model: {"mAP", "AP50", ...}}, the baseline first -> text table with the gain in mAP over it."""
    baseline = next(iter(scores.values()))["mAP"]
    rows = [{"model": name, "mAP": found["mAP"], "AP50": found["AP50"],
             "gain": gain(found["mAP"], baseline) if number else ""}
            for number, (name, found) in enumerate(scores.items())]
    return report.table(rows, {"model": "on rainy validation images", "mAP": "mAP", "AP50": "AP50", "gain": "gain"})


def scenes(dataset, count):
    """-> indices of `count` images by SCENES_RULE.

    Args:
        dataset: CocoDetectionDataset.
    """
    objects = np.diff(dataset.ends)
    chosen = np.flatnonzero((objects >= FEW) & (objects <= MANY))
    if not len(chosen):
        chosen = np.arange(len(dataset))
    return [int(i) for i in evenly(chosen, count)]


@torch.no_grad()
def draw(detector, model, dataset, indices, device, id2label, path):
    """Write a page: rainy | de-rained | detections on the rainy | on the de-rained image | ground truth.

    Args:
        detector: RT-DETR; model: RainRobustRTDETR in front of it, both in eval mode; dataset: CocoDetectionDataset.
        indices: its images, one row each.
    """
    rows = []
    for index in indices:
        sample = dataset[index]
        rainy = datasets.to_device(datasets.collate([sample]), device)["images"]
        scale = visualize.enlargement(rainy.shape[-1])
        before, after = detector(pixel_values=rainy), model(rainy)
        plain = [visualize.draw_boxes(image[0], torch.zeros(0, 4), torch.zeros(0), {}, scale=scale)
                 for image in (rainy, after.derained)]
        rows.append([*plain, *visualize.draw_detections(rainy, before, id2label, scale=scale),
                     *visualize.draw_detections(after.derained, after, id2label, scale=scale),
                     visualize.draw_truth(rainy[0], sample, id2label, scale)])
    visualize.grid(rows, ["rainy", "de-rained: what the detector sees", "before: detected in the rainy image",
                          "after: detected in the de-rained image", "ground truth"], path)
