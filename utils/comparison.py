"""What the evaluation scripts share when they set several detectors against each other."""

import torch

from utils import evaluation


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
        for name, milliseconds in evaluation.latencies(calls, images).items():
            result[name][f"batch {batch}"] = milliseconds / batch
    return result
