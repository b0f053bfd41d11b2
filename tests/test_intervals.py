"""Bootstrap intervals of mAP: COCO's own number for equal weights, the merged data set's for others, coverage."""

import copy

import numpy as np
import pytest

from utils.evaluation import coco, intervals

CATEGORY_OF = {0: 3, 1: 7, 2: 9}


def scene(images=12, seed=0, moved=3.0, kept=0.8):
    """-> (ground truth, detections): boxes that were moved, left out, doubled and made up."""
    rng = np.random.default_rng(seed)
    notes, found = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 5)):
            category, (x, y) = int(rng.choice([3, 7])), rng.uniform(0, 60, 2)
            w, h = rng.uniform(8, 40, 2)
            notes.append({"id": len(notes) + 1, "image_id": image, "category_id": category, "bbox": [x, y, w, h],
                          "area": w * h, "iscrowd": int(rng.random() < 0.1), "segmentation": []})
            label = {3: 0, 7: 1}[category]
            for _ in range(int(rng.random() < kept) + int(rng.random() < 0.2)):
                dx, dy = rng.normal(0, moved, 2)
                found.append({"image_id": image, "label": label, "bbox": [x + dx, y + dy, w, h],
                              "score": round(float(rng.random()), 1)})
        found.append({"image_id": image, "label": 2, "bbox": [5.0, 5.0, 20.0, 20.0], "score": 0.5})
    listed = [{"id": i, "width": 120, "height": 120, "file_name": f"{i}.jpg"} for i in range(1, images + 1)]
    content = {"images": listed, "annotations": notes, "categories": [{"id": i, "name": str(i)} for i in (3, 7, 9)]}
    return content, found


def test_equal_weights_give_cocos_own_number():
    for seed in range(4):
        content, found = scene(seed=seed)
        truth = coco._indexed(content)
        ids = [image["id"] for image in content["images"]]
        expected = coco.coco_scores(truth, found, CATEGORY_OF, ids)["mAP"]
        categories = intervals.matches_of(truth, found, CATEGORY_OF, ids)
        assert intervals.weighted_map(categories, np.ones(len(ids))) == pytest.approx(expected, abs=1e-9)
        assert 0 < expected < 1


def test_a_class_that_is_never_detected_counts_like_the_others():
    content, found = scene()
    truth, ids = coco._indexed(content), [image["id"] for image in content["images"]]
    found = [one for one in found if one["label"] == 0]
    categories = intervals.matches_of(truth, found, CATEGORY_OF, ids)
    expected = coco.coco_scores(truth, found, CATEGORY_OF, ids)["mAP"]
    assert 0 < intervals.weighted_map(categories, np.ones(len(ids))) == pytest.approx(expected, abs=1e-9)


def test_weights_stand_for_copies_of_images():
    content, found = scene(seed=5)
    for detection, noise in zip(found, np.random.default_rng(0).random(len(found)), strict=True):
        detection["score"] += 1e-4 * noise  # equal scores would be ordered by the copies' places
    weights = np.array([2, 0, 1, 3, 0, 1, 1, 0, 2, 1, 1, 0])
    copies, images, notes = [], [], []
    for i, times in enumerate(weights, start=1):
        for _ in range(times):
            new = len(images) + 1
            images.append({"id": new, "width": 120, "height": 120, "file_name": f"{new}.jpg"})
            notes += [copy.deepcopy(n) | {"image_id": new} for n in content["annotations"] if n["image_id"] == i]
            copies += [one | {"image_id": new} for one in found if one["image_id"] == i]
    notes = [note | {"id": number} for number, note in enumerate(notes, 1)]
    merged = coco._indexed(content | {"images": images, "annotations": notes})
    expected = coco.coco_scores(merged, copies, CATEGORY_OF, [image["id"] for image in images])["mAP"]
    own = intervals.matches_of(coco._indexed(content), found, CATEGORY_OF, range(1, 13))
    assert intervals.weighted_map(own, weights.astype(float)) == pytest.approx(expected, abs=0.01)


def test_the_interval_is_narrower_for_a_difference_on_the_same_images():
    content, found = scene(40, seed=1)
    truth, ids = coco._indexed(content), range(1, 41)
    worse = [one | {"bbox": [one["bbox"][0] + 5, *one["bbox"][1:]]} for one in found]
    models = {name: intervals.matches_of(truth, own, CATEGORY_OF, ids) for name, own in
              (("good", found), ("worse", worse), ("none", []))}
    maps = intervals.resampled_maps(models, 40, resamples=200)
    again = intervals.resampled_maps(models, 40, resamples=200)
    assert all(np.array_equal(maps[name], again[name]) for name in models) and (maps["none"] == 0).all()
    whole = intervals.weighted_map(models["good"], np.ones(40))
    low, high = intervals.interval(maps["good"])
    assert low < whole < high
    both = maps["good"], maps["worse"], maps["good"] - maps["worse"]
    good, worse, difference = (np.ptp(intervals.interval(values)) for values in both)
    assert intervals.interval(both[2])[0] > 0 and difference < np.hypot(good, worse)


def test_without_objects_there_is_no_number():
    content, found = scene(3)
    truth = coco._indexed(content | {"annotations": []})
    assert intervals.matches_of(truth, found, CATEGORY_OF, [1, 2, 3]) == []
    assert np.isnan(intervals.weighted_map([], np.ones(3)))
