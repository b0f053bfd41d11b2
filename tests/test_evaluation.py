"""Scores against independent implementations."""

import gc
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from transformers import RTDetrImageProcessor

from utils import datasets, report
from utils.boxes import decode
from utils.datasets import loaders, presets
from utils.evaluation import coco as coco_evaluation
from utils.evaluation import image_quality

NAMES = {0: "person", 1: "car"}


def truth_and_data(coco):
    data = datasets.CocoDetectionDataset(coco / "coco", "val", NAMES, presets.evaluation(96), constant="COCO_DIR",
                                         domain="clean")
    return coco_evaluation.ground_truth(data.annotations), data


def test_decoding_equals_transformers(small_detector):
    torch.manual_seed(1)
    outputs = small_detector(pixel_values=torch.rand(2, 3, 96, 96))
    sizes = [(50, 80), (70, 60)]
    ours = decode(outputs.logits, outputs.pred_boxes, sizes, top=40)
    theirs = RTDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"])
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"])


def test_perfect_missing_and_shifted_detections(coco):
    truth, data = truth_and_data(coco)
    label_of = data.label_of
    perfect = [{"image_id": a["image_id"], "label": label_of[a["category_id"]], "bbox": a["bbox"], "score": 0.9}
               for a in truth.dataset["annotations"]]
    scores = coco_evaluation.coco_scores(truth, perfect, data.category_of, data.image_ids)
    assert scores["mAP"] == pytest.approx(1.0) and scores["per_class"] == {"person": pytest.approx(1.0),
                                                                           "car": pytest.approx(1.0)}
    assert coco_evaluation.coco_scores(truth, [], data.category_of, data.image_ids)["mAP"] == 0.0
    # IoU of a box moved by a tenth of its width is 9/11 = 0.818: found at the 7 thresholds 0.50 .. 0.80
    moved = [d | {"bbox": [d["bbox"][0] + d["bbox"][2] / 10, *d["bbox"][1:]]} for d in perfect]
    scores = coco_evaluation.coco_scores(truth, moved, data.category_of, data.image_ids)
    assert scores["mAP"] == pytest.approx(0.7, abs=1e-3)


def test_only_the_named_images_count(coco):
    truth, data = truth_and_data(coco)
    half = data.image_ids[:4]
    perfect = [{"image_id": a["image_id"], "label": data.label_of[a["category_id"]], "bbox": a["bbox"], "score": 0.9}
               for a in truth.dataset["annotations"] if a["image_id"] in half]
    assert coco_evaluation.coco_scores(truth, perfect, data.category_of, half)["mAP"] == pytest.approx(1.0)
    assert coco_evaluation.coco_scores(truth, perfect, data.category_of, data.image_ids)["mAP"] < 0.7


@pytest.mark.parametrize("image_id", [5, 10**16])
@pytest.mark.parametrize("ids", [(0, 1), ("a", "b"), (3, 3), (2**64, 2**65)])
def test_no_object_is_lost_by_its_id_or_by_null_fields(tmp_path, ids, image_id):
    """Ids from 0 on (Roboflow), words, the same one twice (files put together), more than a double holds."""
    notes = [{"id": ids[i], "image_id": image_id, "category_id": 1, "bbox": [30 * i, 4, 20, 20], "iscrowd": None,
              "area": None} for i in (0, 1)]
    content = {"images": [{"id": image_id, "file_name": "a.png", "width": 64, "height": 64}], "annotations": notes,
               "categories": [{"id": 1, "name": "car"}]}
    (tmp_path / "zero.json").write_text(json.dumps(content), encoding="utf-8")
    truth = coco_evaluation.ground_truth(tmp_path / "zero.json")
    found = [{"image_id": image_id, "label": 0, "bbox": note["bbox"], "score": 0.9} for note in notes]
    scores = coco_evaluation.coco_scores(truth, found, {0: 1}, [image_id])
    assert scores["mAP"] == scores["AP_small"] == pytest.approx(1.0) and scores["AP_large"] == -1


def test_detect_uses_original_sizes_and_ids(coco, small_detector):
    _, data = truth_and_data(coco)
    loader = loaders.validation_loader(data, 3, 0)
    found = coco_evaluation.detect(lambda x: small_detector(pixel_values=x), loader, "cpu")
    assert list(found) == data.image_ids and all(rows.shape == (80, 6) for rows in found.values())
    sample = datasets.to_device(datasets.collate([data[2]]), "cpu")
    alone = small_detector(pixel_values=sample["images"])
    expected = decode(alone.logits, alone.pred_boxes, [(96, 96)])[0]
    best = next(coco_evaluation.entries({data.image_ids[2]: found[data.image_ids[2]]}))
    x1, y1, x2, y2 = expected["boxes"][0].tolist()
    assert best == {"image_id": data.image_ids[2], "label": expected["labels"][0].item(),
                    "score": pytest.approx(expected["scores"][0].item(), abs=1e-5),
                    "bbox": pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_fast_scores_are_pycocotools_scores(iou_type, monkeypatch):
    """Crowds, objects of all sizes, empty images, ties, more detections than count, and a class without objects."""
    random = np.random.default_rng(0)
    images = [{"id": i, "width": 400, "height": 300} for i in range(1, 31)]
    notes, found = [], []
    for image in images[:-2]:
        for _ in range(random.integers(0, 12)):
            x, y, w, h = (random.uniform(0, (1, 1, 0.6, 0.6)) * (200, 150, 200, 150)).tolist()
            notes.append({"id": len(notes) + 1, "image_id": image["id"], "category_id": int(random.integers(1, 4)),
                          "bbox": [x, y, w, h], "area": 0.6 * w * h, "iscrowd": int(random.random() < 0.1),
                          "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
            for _ in range(random.integers(0, 25)):
                box = np.maximum(np.array([x, y, w, h]) + random.normal(0, 0.1, 4) * (w, h, w, h), 1).tolist()
                found.append({"image_id": image["id"], "label": int(random.integers(0, 4)), "bbox": box,
                              "score": round(random.random(), 2)})
    for one in found:
        x, y, w, h = one["bbox"]
        one["segmentation"] = rle.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], 300, 400)[0]
    truth = coco_evaluation._indexed({"images": images, "annotations": notes,
                                      "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 5)]})
    category_of, ids = {0: 1, 1: 2, 2: 3, 3: 4}, [image["id"] for image in images]
    with monkeypatch.context() as patch:
        patch.setattr(coco_evaluation, "COCOeval", None)  # so that it is not what answers
        fast = coco_evaluation.coco_scores(truth, found, category_of, ids, iou_type)
    monkeypatch.setattr(coco_evaluation, "COCOeval_faster", None)
    reference = coco_evaluation.coco_scores(truth, found, category_of, ids, iou_type)
    assert 0.05 < fast["mAP"] < 0.9 and fast["AP_small"] > 0 and fast["per_class"]["class 4"] == -1
    assert fast.pop("per_class") == pytest.approx(reference.pop("per_class"), abs=1e-12)
    assert fast == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize("on", [True, False])
def test_scoring_leaves_the_garbage_collector_as_it_was(coco, on):
    truth, data = truth_and_data(coco)
    seen = []

    def entries():
        seen.append(gc.isenabled())
        yield from ()
    try:
        (gc.enable if on else gc.disable)()
        coco_evaluation.coco_scores(truth, entries(), data.category_of, data.image_ids)
        with pytest.raises(TypeError):
            coco_evaluation.coco_scores(truth, None, data.category_of, data.image_ids)
        assert seen == [False] and gc.isenabled() is on
    finally:
        gc.enable()


def test_texture_similarity_falls_with_blur_and_with_detail_that_is_not_there():
    generator = torch.Generator().manual_seed(0)
    clean = F.interpolate(torch.rand(2, 3, 13, 17, generator=generator), scale_factor=4, mode="bicubic").clamp(0, 1)

    def blurred(times):
        return F.avg_pool2d(F.pad(blurred(times - 1), (1, 1, 1, 1), "reflect"), 3, 1) if times else clean
    values = [image_quality.texture_similarity(blurred(times), clean) for times in (0, 1, 3)]
    torch.testing.assert_close(values[0], torch.ones(2, dtype=torch.float64))
    assert (values[1] < 0.999).all() and (values[2] < values[1]).all()
    noise = 0.1 * torch.randn(clean.shape, generator=generator)
    assert (image_quality.texture_similarity(clean + noise, clean) < 0.9).all()
    turned = image_quality.texture_similarity(clean.flip(3), clean)  # as strong, elsewhere: structure alone falls
    assert ((0.4 < turned) & (turned < 0.8)).all()
    tiny = torch.rand(1, 3, 2, 2, generator=generator)
    torch.testing.assert_close(image_quality.texture_similarity(tiny, tiny), torch.ones(1, dtype=torch.float64))


def test_image_quality_matches_scikit_image():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 64, 48, generator=generator)
    noisy = (clean + 0.1 * torch.randn(2, 3, 64, 48, generator=generator)).clamp(0, 1)
    ours = image_quality.image_quality(noisy, clean)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(2):
        a, b = (x[i].permute(1, 2, 0).double().numpy() for x in (clean, noisy))
        assert ours["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-6)
        ya, yb = (x @ np.array([65.481, 128.553, 24.966]) + 16 for x in (a, b))
        assert ours["psnr_y"][i].item() == pytest.approx(peak_signal_noise_ratio(ya, yb, data_range=255), abs=1e-6)
        # scikit-image averages over a border-cropped map of a same-size filter, pytorch-msssim over the valid part
        assert ours["ssim"][i].item() == pytest.approx(
            structural_similarity(a, b, data_range=1.0, channel_axis=2, **settings), abs=2e-4)
        assert ours["ssim_y"][i].item() == pytest.approx(
            structural_similarity(ya, yb, data_range=255, **settings), abs=2e-4)
    same = image_quality.image_quality(clean, clean)
    assert same["ssim"].min() == pytest.approx(1.0) and same["psnr"].min() > 100


def test_luma_is_matlabs():
    white, black = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    assert image_quality.luma(white).item() == pytest.approx(235.0) and image_quality.luma(black).item() == 16.0


def test_results_hold_constants_and_versions(tmp_path):
    report.write_results(tmp_path / "results.json", {"SEED": 1}, {"mAP": 0.5})
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["results"] == {"mAP": 0.5} and content["constants"] == {"SEED": 1}
    assert content["environment"]["torch"] == torch.__version__ and "commit" in content["environment"]
    text = report.table([{"a": "x", "b": 0.12345}, {"a": "longer", "b": None}], {"a": "name", "b": "value"})
    assert text.splitlines()[2:] == ["x       0.1235", "longer       -"] and text.isascii()
