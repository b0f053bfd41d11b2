"""What stands behind an AP: by hand on toys, and against COCOeval on random ones."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle
from test_evaluation import truth_and_data

from utils.evaluation import classification, detection_details
from utils.evaluation.coco import coco_scores, entries, ground_truth

NAMES = {1: "cat", 2: "dog", 3: "cow"}
LABELS = {0: 1, 1: 2, 2: 3}  # label -> category id


def truth_of(path, objects, images=2, names=NAMES):
    """-> pycocotools COCO of [(image, category, box, crowd), ...] in images of 100 x 100."""
    notes = [{"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
              "iscrowd": crowd, "segmentation": polygon(box)}
             for i, (image, category, box, crowd) in enumerate(objects, 1)]
    for note in notes:
        if note["iscrowd"]:
            note["segmentation"] = rle.frPyObjects(polygon(note["bbox"]), 100, 100)[0]
            note["segmentation"]["counts"] = note["segmentation"]["counts"].decode()
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100}
                          for i in range(1, images + 1)],
               "annotations": notes, "categories": [{"id": i, "name": name} for i, name in names.items()]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return ground_truth(path)


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def found(image, label, box, score):
    return {"image_id": image, "label": label, "bbox": box, "score": score}


@pytest.fixture
def toy(tmp_path):
    """Three cats, one of them missed and one found twice; a dog taken for a cat; a crowd of dogs."""
    truth = truth_of(tmp_path / "toy.json", [
        (1, 1, [0, 0, 20, 20], 0), (1, 1, [50, 50, 40, 40], 0), (2, 1, [0, 0, 10, 10], 0), (2, 2, [60, 60, 20, 20], 0),
        (2, 2, [0, 40, 50, 50], 1)])
    answers = [found(1, 0, [0, 0, 20, 20], 0.9), found(1, 0, [0, 0, 20, 18], 0.8),   # right; the same once more
               found(2, 0, [0, 0, 10, 10], 0.5), found(2, 0, [60, 60, 20, 20], 0.7),  # right; a dog
               found(2, 1, [5, 45, 10, 10], 0.6), found(2, 1, [80, 0, 10, 10], 0.3)]  # in the crowd; nothing there
    return truth, answers


def test_a_toy_by_hand(toy):
    """Cats by falling score: right, wrong (twice), wrong (a dog), right; three cats are to be found."""
    truth, answers = toy
    one = detection_details.details(truth, answers, LABELS, [1, 2])
    cats, dogs, cows = one.curves
    assert cats.score.tolist() == [0.9, 0.8, 0.7, 0.5] and cats.right.tolist() == [1, 1, 1, 2]
    assert cats.kept.tolist() == [1, 2, 3, 4] and cats.objects == 3
    assert cats.f1 == pytest.approx([2 / 4, 2 / 5, 2 / 6, 4 / 7])
    assert cats.best() == pytest.approx({"threshold": 0.5, "F1": 4 / 7, "precision": 1 / 2, "recall": 2 / 3})
    # precision 1 up to recall 1/3 (34 of 101 points), 1/2 up to 2/3 (33 points), then 0
    assert one.precisions[0].mean() == pytest.approx((34 + 33 / 2) / 101)
    assert dogs.score.tolist() == [0.3] and dogs.objects == 1  # what lies in the crowd counts neither way
    assert dogs.best() == {"threshold": None, "F1": 0.0, "precision": 0.0, "recall": 0.0}
    assert one.precisions[2] is None and set(cows.best().values()) == {None}
    # all together, 4 objects: F1 from 0.9 on 2/5, 0.8 2/6, 0.7 2/7, 0.5 4/8, 0.3 4/9
    assert one.threshold == 0.5 and one.pooled.f1 == pytest.approx([2 / 5, 2 / 6, 2 / 7, 4 / 8, 4 / 9])
    assert one.confusion.tolist() == [[2, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert [(one.matching.score[i], fault) for i, fault in detection_details.false_positives(one, 9)] == [
        (0.8, "found twice"), (0.7, "is dog"), (0.3, "nothing there")]
    assert [(one.matching.object_area[i], score) for i, score in detection_details.misses(one, 9)] == [
        (1600, None), (400, None)]


def test_numbers_are_plain_and_undefined_ones_are_none(toy):
    truth, answers = toy
    one = detection_details.details(truth, answers, LABELS, [1, 2])
    numbers = json.loads(json.dumps(detection_details.numbers(one, coco_scores(truth, answers, LABELS, [1, 2]))))
    assert numbers["confusion"] == {"cat": {"cat": 2, "background": 1}, "dog": {"cat": 1}, "background": {"cat": 1}}
    assert numbers["detections"] == 5 and numbers["objects"] == 4 and numbers["AP_large"] is None
    assert numbers["classes"][2] == {"class": "cow", "objects": 0, "detections": 0, "AP50": None, "threshold": None,
                                     "F1": None, "precision": None, "recall": None, "calibration_error": None}
    # 0.9, 0.5 right, 0.8, 0.7, 0.3 wrong: each in a bin of its own
    assert numbers["calibration_error"] == pytest.approx((0.1 + 0.5 + 0.8 + 0.7 + 0.3) / 5)
    assert one.pooled.f1_from([0.95, 0.9, 0.55, 0.5, 0]) == pytest.approx([0, 2 / 5, 2 / 7, 4 / 8, 4 / 9])


def test_equal_scores_share_a_threshold():
    """Two of three with the score 0.5 are right: no threshold keeps only those."""
    curve = detection_details.curve(np.array([0.5, 0.9, 0.5, 0.5]), np.array([True, False, False, True]), 2)
    assert curve.score.tolist() == [0.9, 0.5] and curve.right.tolist() == [0, 2] and curve.kept.tolist() == [1, 4]


def test_a_box_beside_its_object_is_badly_placed(tmp_path):
    truth = truth_of(tmp_path / "a.json", [(1, 1, [0, 0, 20, 20], 0)])
    one = detection_details.details(truth, [found(1, 0, [10, 0, 20, 20], 0.9)], LABELS, [1, 2])
    assert detection_details.false_positives(one, 1) == [(0, "badly placed, IoU 0.33")]
    assert one.threshold is None and one.confusion is None and one.pooled.best()["F1"] == 0.0
    assert detection_details.misses(one, 1) == [(0, None)]


@pytest.mark.parametrize("objects, answers", [
    ([(1, 1, [0, 0, 20, 20], 0)], []), ([(1, 1, [0, 0, 20, 20], 1)], [found(1, 0, [2, 2, 5, 5], 0.5)]), ([], [])])
def test_nothing_found_or_nothing_to_find(tmp_path, objects, answers):
    truth = truth_of(tmp_path / "a.json", objects)
    one = detection_details.details(truth, answers, LABELS, [1, 2])
    numbers = detection_details.numbers(one, coco_scores(truth, answers, LABELS, [1, 2]))
    assert numbers["threshold"] is numbers["precision"] is numbers["calibration_error"] is numbers["confusion"] is None
    assert numbers["reliability"] == [] and numbers["detections"] == 0
    there = bool(objects) and not objects[0][3]
    assert numbers["F1"] == (0.0 if there else None) and (numbers["precision_at_recall"] is None) != there


def random_case(path, seed, kind):
    """Objects (some are crowds) in images, and detections around them, with many equal scores."""
    rng = np.random.default_rng(seed)
    objects, answers = [], []
    for image in range(1, 21):
        for _ in range(rng.integers(0, 6)):
            category = int(rng.integers(1, 3))
            box = [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(8, 40, 2).tolist()]
            objects.append((image, category, box, int(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 4)):
                moved = np.clip(np.array(box) + rng.normal(0, 3, 4), 1, 60).tolist()
                label = category - 1 if rng.random() < 0.8 else int(rng.integers(3))
                answers.append(found(image, label, moved, round(float(rng.random()), 1)))
    truth = truth_of(path, objects, 20)
    if kind == "segm":
        for one in answers:
            one["segmentation"] = rle.frPyObjects(polygon(one["bbox"]), 100, 100)[0]
    return truth, answers


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_the_curves_are_cocos(tmp_path, seed, kind):
    """The mean of a curve is AP50 as COCOeval has it, per class and over all; a confusion matrix adds up."""
    truth, answers = random_case(tmp_path / "a.json", seed, kind)
    ids = list(range(1, 20))  # one image is not looked at
    one = detection_details.details(truth, answers, LABELS, ids, kind)
    scores = coco_scores(truth, answers, LABELS, ids, kind)
    assert 0.05 < scores["AP50"] < 0.95
    assert one.precision.mean() == pytest.approx(scores["AP50"], abs=1e-12)
    for k, label in enumerate((0, 1)):
        own = coco_scores(truth, answers, {label: LABELS[label]}, ids, kind)
        assert one.precisions[k].mean() == pytest.approx(own["AP50"], abs=1e-12)
    at = one.pooled.score.tolist().index(one.threshold)
    assert one.confusion.trace() == one.pooled.right[at] and one.confusion[:, :-1].sum() == one.pooled.kept[at]
    assert one.confusion[:-1].sum(1).tolist() == [curve.objects for curve in one.curves]
    assert one.precisions[2] is None and sum(row.count for row in one.reliability) == len(one.matching.score)


def test_detections_may_be_a_generator_and_images_without_any_count(tmp_path):
    truth = truth_of(tmp_path / "a.json", [(1, 1, [0, 0, 20, 20], 0)])
    one = detection_details.details(truth, entries({1: np.array([[0, 0, 20, 20, 0.9, 0.0]])}), LABELS, [1, 2])
    assert one.threshold == 0.9 and one.images == 2


def test_data_sets_as_the_scripts_open_them(coco):
    truth, data = truth_and_data(coco)
    perfect = [found(note["image_id"], data.label_of[note["category_id"]], note["bbox"], 0.9)
               for note in truth.dataset["annotations"]]
    one = detection_details.details(truth, perfect, data.category_of, data.image_ids)
    assert one.pooled.best() == {"threshold": 0.9, "F1": 1.0, "precision": 1.0, "recall": 1.0}
    assert not detection_details.misses(one, 5) and not detection_details.false_positives(one, 5)


def test_reliability_by_hand():
    rows = classification.reliability([0.05, 0.05, 0.95, 1.0], [0, 1, 1, 1])
    assert [tuple(row) for row in rows] == [(0.0, 2, pytest.approx(0.05), 0.5), (0.9, 2, pytest.approx(0.975), 1.0)]
    assert classification.calibration_error([0.05, 0.05, 0.95, 1.0], [0, 1, 1, 1]) == pytest.approx(
        0.5 * 0.45 + 0.5 * 0.025)
