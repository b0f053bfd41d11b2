"""What a training run of RF-DETR shows and leaves behind: banner, scores, pictures, results.json, the next command."""

from pathlib import Path

import torch

from rfdetr import evaluate
from utils import checkpoint, processes, report, visualize
from utils.boxes import pixel_corners
from utils.evaluation import report_page
from utils.evaluation.coco import METRICS
from utils.images import to_floats
from utils.next_command import folder_flag, pasted, quoted

LINE = "=" * 80
PICTURES = 4      # images on predictions.png
THRESHOLD = 0.4   # score from which a detection is drawn


def banner(title, rows):
    """The block at the start of a run: a title and {label: value}."""
    width = max(len(label) for label in rows) + 2
    body = [f"{label + ':':<{width}} {value}" for label, value in rows.items()]
    return "\n".join([LINE, title, LINE, *body, LINE])


def masks_seen(data):
    """-> the line on how many of the first annotations have masks; data: RoboflowDataset with masks."""
    return "[ok] Validated: {}/{} sample annotations contain segmentation masks".format(*data.sample_with_masks)


def scores(model, loader, truth, with_masks=False, remembered=None):
    """-> {"box/mAP", "box/AP50", "box/AP75", with masks the same of "mask/"} of a model in eval mode, every epoch.

    remembered: features.Remembered of that model, to run its frozen detector once and not in every epoch.
    """
    device = next(model.parameters()).device
    metrics = evaluate.evaluate(remembered or model, loader, device, with_masks, truth, "validation").metrics
    return {name: value for name, value in metrics.items() if name.split("/")[1] in METRICS[:3]}


def pictures(model, loader, class_rows):
    """Detections (with masks, where the model has them) beside the ground truth. -> [[PIL image, PIL image], ...]"""
    data, device = loader.dataset, next(model.parameters()).device
    names = {row: name for name, row in class_rows.items()}
    chosen = sorted(range(len(data)), key=lambda i: -int(data.ends[i + 1] - data.ends[i]))[:PICTURES]
    batch = loader.collate_fn([data[i] for i in sorted(chosen)])
    images = to_floats(batch["images"])  # pictures are drawn on the CPU
    side = images.shape[-1]
    scale = max(1, 320 // side)
    rows = []
    found = evaluate.predict_batch(model, images.to(device), [(side, side)] * len(images), rows=list(names))
    for image, label, one in zip(images, batch["labels"], found, strict=True):
        keep = one["scores"] >= THRESHOLD
        boxes, labels, confidence = one["boxes"][keep], one["labels"][keep], one["scores"][keep]
        corners = pixel_corners(label["boxes"], side, side)
        drawn = visualize.draw_boxes(image, boxes, labels, names, confidence, scale)
        if "mask_logits" in one:
            masks = evaluate.full_masks(one["mask_logits"][keep], (side, side))
            drawn = visualize.draw_masks(image, boxes, labels, names, masks, confidence, scale)
        if "masks" in label:
            expected = visualize.draw_masks(image, corners, label["class_labels"], names, label["masks"], scale=scale)
        else:
            expected = visualize.draw_boxes(image, corners, label["class_labels"], names, scale=scale)
        rows.append([drawn, expected])
    return rows


def sample_images(model, loader, class_rows):
    """-> {tag: picture} for TensorBoard."""
    return {"detections": visualize.as_tensor(visualize.grid(pictures(model, loader, class_rows),
                                                             ["prediction", "ground truth"]))}


def final(model, cfg, folder, splits, class_rows, with_masks, result):
    """Evaluate the best epoch, print the tables, write results.json, report.html and predictions.png.

    Args:
        model: of the run; gets best.pt's weights. folder: of the run. splits: of main.evaluation_splits.
        result: of engine.fit.
    Returns:
        {"run_dir": str, "valid": {metric: value}, "test": the same or None}.
    """
    folder = Path(folder)
    if not (folder / "best.pt").is_file():  # interrupted in the first epoch
        return {"run_dir": str(folder), "valid": None, "test": None}
    best = checkpoint.load(folder / "best.pt")
    checkpoint.load_into(model, checkpoint.state_of(best, folder / "best.pt"), (folder / "best.pt").as_posix())
    score = "mask/mAP" if with_masks else "box/mAP"
    held = best.get("epoch"), (best.get("metrics") or {}).get(score)
    if result["history"] and held != (result["best_epoch"], result["best_score"]):
        processes.say(f"note: {(folder / 'best.pt').as_posix()} is not this run's epoch {result['best_epoch']} "
                      f"({score} {result['best_score']:.4f}) but another file: the results are that one's")
    device = processes.device()
    model.to(device).eval()
    found, page = {}, report_page.Page(f"RF-DETR: {folder.name}")
    for split, (loader, truth) in splits.items():
        scored = evaluate.evaluate(model, loader, device, with_masks, truth, split)
        metrics = scored.metrics
        found[split] = metrics | {"per_class": scored.per_class}
        kinds = ["box", "mask"] if with_masks else ["box"]
        columns = {"class": f"{split}: AP per class"} | {kind: kind for kind in kinds}
        everything = {"class": "all"} | {kind: metrics[f"{kind}/mAP"] for kind in kinds}
        processes.say(report.table([everything, *scored.per_class], columns))
        for kind in kinds:
            own = {name: metrics[f"{kind}/{name}"] for name in METRICS}
            processes.say(f"{split} {kind}: " + "  ".join(f"{name} {value:.4f}" for name, value in own.items()))
            page.add(f"RF-DETR, {kind}", loader.dataset, own, scored.detections, truth=truth,
                     iou_type=evaluate.KINDS[kind], images=split)
    if processes.is_main():
        report.write_results(folder / "results.json", cfg.as_dict(), found | {"details": page.numbers})
        page.write(folder, cfg.as_dict())
        with torch.no_grad():
            visualize.grid(pictures(model, splits["valid"].loader, class_rows), ["prediction", "ground truth"],
                           folder / "predictions.png")
        names = ("results.json", report_page.NAME, "predictions.png")
        processes.say(f"results: {', '.join((folder / name).as_posix() for name in names)}")
    return {"run_dir": str(folder), "valid": found.get("valid"), "test": found.get("test")}


def shrink_command(source, names):
    """-> the command line that cuts the head of the checkpoint `source` (Path) to these classes, beside it."""
    return (f"python shrink_head.py --in_ckpt {pasted(source)} --out_ckpt "
            f"{pasted(source.parent / 'checkpoint_mydata.pth')} --keep {quoted(names)}")


def next_command(cfg, folder, names, rows):
    """-> the lines that say how to go on after stage 1, ready to be pasted."""
    folder = Path(folder)
    best = folder / "checkpoint_best_regular.pth"
    runs = folder_flag("runs_dir", cfg.RUNS_DIR, "./runs")

    def stage2(checkpoint_file):
        return (f"python train_seg_stage2.py --size {cfg.SIZE} --stage1_run {pasted(folder)} "
                f"--checkpoint {pasted(checkpoint_file)} --dataset_dir {pasted(Path(cfg.DATASET_DIR))}{runs} "
                "--epochs 50 --batch 4 --accum 2 --workers 2")

    if rows == len(names) + 1:
        return (f"next: the head has {rows} rows, one per class and the background, so stage 2 can start:\n"
                f"  {stage2(best)}")
    return (f"next: cut the class head from {rows} rows to {len(names)} + 1, then train masks:\n"
            f"  {shrink_command(best, names)}\n"
            f"  {stage2(folder / 'checkpoint_mydata.pth')}")
