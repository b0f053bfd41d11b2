"""What a detector finds behind a de-rainer, on labelled images of rain."""

from utils.datasets import loaders, presets
from utils.datasets.coco import CocoDetectionDataset
from utils.evaluation.coco import detection_scores
from utils.evaluation.comparison import note_other_sizes
from utils.networks.rtdetr import id2label_of, load_rtdetr, trained_size


def labelled_rain(cfg, size, device, split="val", percent=100):
    """-> RT-DETR, the loader of LABELED_RAIN_DIR's images, those of validation where nothing else is said.

    Args:
        cfg: constants LABELED_RAIN_DIR, RTDETR_MODEL_NAME, UNKNOWN_CATEGORIES, EVAL_BATCH_SIZE, DATALOADER_WORKERS.
        size: name of the constant that holds the side of RT-DETR's square input.
        split, percent: "train" and how much of it, where something is chosen by the score.
    """
    rtdetr = load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device).eval()
    data = CocoDetectionDataset(
        cfg.LABELED_RAIN_DIR, split, id2label_of(rtdetr), presets.evaluation(getattr(cfg, size)),
        constant="LABELED_RAIN_DIR", domain="rainy", unknown=cfg.UNKNOWN_CATEGORIES, percent=percent)
    note_other_sizes({"RTDETR_MODEL_NAME": trained_size(cfg.RTDETR_MODEL_NAME)}, getattr(cfg, size), size)
    return rtdetr, loaders.validation_loader(data, cfg.EVAL_BATCH_SIZE, cfg.DATALOADER_WORKERS)


def rows_behind(derainers, rtdetr, loader, device, key):
    """-> [{key: row, "count", "mAP", ...}, ...], RT-DETR's COCO scores behind each de-rainer.

    Args:
        derainers: {row: de-rainer, or None for the images as they are}; rtdetr, loader: of `labelled_rain`.
    """
    def behind(derainer):
        return lambda images: rtdetr(pixel_values=images if derainer is None else derainer(images))
    return [{key: row, "count": len(loader.dataset)} | detection_scores(behind(derainer), loader, device, name=row)[0]
            for row, derainer in derainers.items()]
