"""COCO's detection scores; the ground truth is the annotation file itself."""

import contextlib
import gc
import io

import torch
from accelerate.utils import gather_object
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.boxes import corner_and_extent, decode
from utils.datasets import loaders
from utils.datasets.annotations import read_annotations, usable_boxes
from utils.images import to_floats

try:  # the same numbers (tests hold them against each other) in a sixth of the time: benchmarks/scoring.py
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

METRICS = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # order of COCOeval.stats
LARGEST_ID = 2**53  # faster-coco-eval keeps ids as doubles


@torch.no_grad()
def detect(predict, loader, device, name="evaluating"):
    """Run a detector over a validation loader.

    Args:
        predict: (images (B, 3, H, W) float in [0, 1]) -> outputs with `logits` and `pred_boxes`.
        loader: from loaders.validation_loader; under torchrun every rank sees its share, all get the whole result.
    Returns:
        {image id: (n, 6) float64 [x, y, w, h (pixels), score, label], best first}: as dicts, the detections of COCO's
        validation images would take gigabytes. See `entries`.
    """
    def answers(batch):
        outputs = predict(to_floats(batch["images"], device))
        detections = decode(outputs.logits, outputs.pred_boxes, batch["sizes"])
        return [(image_id, torch.cat([corner_and_extent(result["boxes"]), result["scores"].double()[:, None],
                                      result["labels"].double()[:, None]], 1).numpy())
                for image_id, result in zip(batch["image_ids"], detections, strict=True)]
    found = [one for several in loaders.each(answers, loader, name) for one in several]
    return dict(gather_object(found))


def entries(found):
    """Detections from `detect` -> iterator of {"image_id", "label", "bbox", "score"}."""
    for image_id, rows in found.items():
        for *box, score, label in rows.tolist():
            yield {"image_id": image_id, "label": int(label), "bbox": box, "score": score}


def ground_truth(annotations):
    """-> pycocotools COCO of what `read_annotations` takes (a data set's `annotations`, or a file), without its console
    output; missing iscrowd and area are filled in."""
    return _indexed(_without_thin_boxes(read_annotations(annotations)))


def identity(truth, masks=False):
    """-> what tells a ground truth from others, as plain data, whichever file it was read from; masks: their part of it
    as well."""
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd") + (("segmentation",) if masks else ())
    content = truth.dataset
    return [sorted(str([image[key] for key in ("id", "file_name", "width", "height")]) for image in content["images"]),
            sorted(str([category["id"], category["name"]]) for category in content["categories"]),
            sorted(str([note.get(key) for key in keys]) for note in content["annotations"])]


def merged_ground_truth(sources, new_ids, categories):
    """-> pycocotools COCO of chosen images of several sources.

    Args:
        sources: {name: what `read_annotations` takes}.
        new_ids: {(name, image id in that source): image id in the result}.
        categories: {name: {category id in that source: id in the result}}, without those that count neither way.
    """
    merged = {"images": [], "annotations": [], "categories": {}}
    for name, source in sources.items():
        content = read_annotations(source)
        number = categories[name]
        merged["categories"] |= {number[one["id"]]: one | {"id": number[one["id"]]}
                                 for one in content["categories"] if one["id"] in number}
        merged["images"] += [image | {"id": new_ids[name, image["id"]]} for image in content["images"]
                             if (name, image["id"]) in new_ids]
        merged["annotations"] += [
            note | {"image_id": new_ids[name, note["image_id"]], "category_id": number[note["category_id"]]}
            for note in content["annotations"]
            if (name, note["image_id"]) in new_ids and note["category_id"] in number]
    notes = [note | {"id": number} for number, note in enumerate(merged["annotations"], 1)]
    return _indexed(_without_thin_boxes(
        merged | {"annotations": notes, "categories": list(merged["categories"].values())}))


def _without_thin_boxes(content):
    """Leave out the objects that training leaves out, see `usable_boxes`: nobody is to find them. pycocotools itself
    would count them as missed."""
    notes = content["annotations"]
    kept = usable_boxes(notes, content["images"], None).kept
    return content | {"annotations": [note for note, good in zip(notes, kept, strict=True)
                                      if good or note.get("iscrowd")]}


def _indexed(content):
    ids = [note["id"] for note in content["annotations"]]
    if not all(isinstance(i, int) and 0 < i < LARGEST_ID for i in ids) or len(set(ids)) < len(ids):
        # COCO looks objects up by id, so that of two with one id (files put together) one is lost; COCOeval's table of
        # matches says 0 for "none", so that an object with id 0 (Roboflow's first) is never found
        content = content | {"annotations": [note | {"id": n} for n, note in enumerate(content["annotations"], 1)]}
    for note in content["annotations"]:
        if note.get("iscrowd") is None:
            note["iscrowd"] = 0
        if note.get("area") is None:
            note["area"] = note["bbox"][2] * note["bbox"][3]
    truth = COCO()
    truth.dataset = {"info": {}} | content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def with_masks_only(truth):
    """-> `truth` for scoring masks. An object that was annotated without a mask, or with one that covers no pixel,
    counts neither way, as a crowd does: its box becomes a crowd region. Returns `truth` itself where every object has
    a mask."""
    notes = []
    for note in truth.dataset["annotations"]:
        shape = note.get("segmentation")
        if isinstance(shape, list) and any(len(polygon) < 6 for polygon in shape):  # two points are no area
            shape = [polygon for polygon in shape if len(polygon) >= 6]
            note = note | {"segmentation": shape}
        image = truth.imgs[note["image_id"]]
        if not _covers(shape, image["height"], image["width"]):
            x, y, w, h = note["bbox"]
            note = note | {"iscrowd": 1, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
        notes.append(note)
    if all(new is old for new, old in zip(notes, truth.dataset["annotations"], strict=True)):
        return truth
    return _indexed(truth.dataset | {"annotations": notes})


def _covers(shape, height, width):
    """-> whether polygons or an RLE have a pixel in a (height, width) image."""
    if not shape:
        return False
    if isinstance(shape, list):
        return any(rle.area(one) > 0 for one in rle.frPyObjects(shape, height, width))
    counts = shape.get("counts") or ()
    return sum(counts[1::2]) > 0 if isinstance(counts, (list, tuple)) else bool(rle.area(shape) > 0)


@contextlib.contextmanager
def _without_collection():
    """Python's search for cyclic garbage rests: over the many small objects of results it would walk through all that
    the program holds again and again, and there is none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_without_collection()
def coco_scores(truth, detections, category_of, image_ids, iou_type="bbox"):
    """COCO's metrics with the original ids, areas and crowd flags.

    Args:
        truth: from `ground_truth`; detections: iterable of dicts, see `entries`.
        category_of: {label: category id}, classes outside of it count neither way.
        image_ids: the images that were looked at.
        iou_type: "bbox", or "segm" for masks: detections then carry "segmentation", an RLE of pycocotools.
    Returns:
        {"mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large": float in [0, 1], or -1 where there is no such
        object, "per_class": {category name: AP}}.
    """
    if iou_type == "segm":
        truth = with_masks_only(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO()
        found.dataset = truth.dataset | {"annotations": results_of(detections, category_of, iou_type)}
        found.createIndex()
        numbered = all(isinstance(i, int) and abs(i) < LARGEST_ID
                       for i in (*image_ids, *category_of.values()))  # words are ids as well
        evaluator = (COCOeval_faster if COCOeval_faster and numbered else COCOeval)(truth, found, iou_type)
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.params.catIds = sorted(category_of.values())
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, 2]  # (IoU, recall, class), all areas, 100 detections
    per_class = {}
    for k, category in enumerate(evaluator.params.catIds):
        valid = precision[:, :, k][precision[:, :, k] > -1]
        per_class[truth.cats[category]["name"]] = float(valid.mean()) if valid.size else -1.0
    return dict(zip(METRICS, map(float, evaluator.stats[:6]), strict=True)) | {"per_class": per_class}


def results_of(detections, category_of, iou_type):
    """-> annotations of COCOeval's second side: what COCO.loadRes makes of results, without a polygon for every box."""
    results = []
    for number, one in enumerate((d for d in detections if d["label"] in category_of), 1):
        result = {"id": number, "image_id": one["image_id"], "category_id": category_of[one["label"]],
                  "score": one["score"], "iscrowd": 0}
        if iou_type == "segm":  # the mask's area, also where a box stands beside it
            shape = {"segmentation": one["segmentation"], "area": float(rle.area(one["segmentation"]))}
        else:
            shape = {"bbox": one["bbox"], "area": one["bbox"][2] * one["bbox"][3]}
        results.append(result | shape)
    return results


def detection_scores(predict, loader, device, truth=None, name="evaluating"):
    """`detect` and `coco_scores` of one CocoDetectionDataset's loader. -> (scores, detections)"""
    data = loader.dataset
    found = detect(predict, loader, device, name)
    truth = truth or ground_truth(data.annotations)
    return coco_scores(truth, entries(found), data.category_of, data.image_ids), found
