"""Roboflow-layout data: masks of every kind, augmentation, batches, multi-scale, every error."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torchvision import tv_tensors

from rfdetr.datasets import batches, mask_codes, roboflow, transforms
from utils import datasets
from utils.config import UserError
from utils.datasets import layouts, loaders
from utils.evaluation.coco import coco_scores, ground_truth, with_masks_only

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
ROWS = {"cat": 0, "dog": 1}
CATEGORIES = [{"id": 0, "name": "pets", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "pets"},
              {"id": 2, "name": "dog", "supercategory": "pets"}]
# rectangles [x0, y0, x1, y1] per image (width, height); white on black, so that pixels say where objects are
IMAGES = {1: (64, 48, [(1, [8, 6, 30, 40]), (2, [50, 4, 62, 20])]), 2: (50, 71, [(2, [5, 10, 45, 66])]),
          3: (40, 40, [])}


def rectangle(width, height, box):
    mask = np.zeros((height, width), np.uint8)
    mask[box[1]:box[3], box[0]:box[2]] = 1
    return mask


def segmentation(kind, mask, box):
    x0, y0, x1, y1 = box
    if kind == "polygon":
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    code = rle.encode(np.asfortranarray(mask))
    if kind == "rle":
        return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": runs if not flat[0] else [0, *runs]}


def write_dataset(root, kind="rle", splits=("train", "valid")):
    """White rectangles on black, PNG so that the pixels are exact."""
    for split in splits:
        folder = root / split
        folder.mkdir(parents=True)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number, (width, height, things) in IMAGES.items():
            pixels = np.zeros((height, width), np.uint8)
            for category, box in things:
                mask = rectangle(width, height, box)
                pixels |= mask * 255
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": category, "iscrowd": 0,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": int(mask.sum()),
                    "segmentation": segmentation(kind, mask, box)})
            Image.fromarray(pixels).convert("RGB").save(folder / f"{number}.png")
            content["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        (folder / layouts.ROBOFLOW_FILE).write_text(json.dumps(content), encoding="utf-8")
    return root


def edit(root, change, split="train"):
    """Let `change(content)` alter a split's annotation file."""
    path = root / split / layouts.ROBOFLOW_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def opened(root, split="train", train=False, masks=True, resolution=64, rows=ROWS, **kwargs):
    return roboflow.RoboflowDataset(root, split, rows, resolution, train=train, masks=masks, **kwargs)


# ---- samples -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["polygon", "rle", "counts"])
def test_a_sample_holds_the_boxes_and_masks_of_the_file(tmp_path, kind):
    data = opened(write_dataset(tmp_path, kind))
    assert data.notes == [] and data.image_ids == [1, 2, 3] and data.category_of == {0: 1, 1: 2}
    for sample, (width, height, things) in zip((data[i] for i in range(3)), IMAGES.values(), strict=True):
        assert sample["size"] == (height, width) and sample["image"].shape == (3, height, width)
        assert sample["image"].dtype == torch.uint8 and sample["masks"].dtype == torch.bool
        assert sample["labels"].tolist() == [category - 1 for category, _ in things]
        assert sample["boxes"].shape == (len(things), 4) and sample["masks"].shape == (len(things), height, width)
        for (_, box), mask, found in zip(things, sample["masks"], sample["boxes"], strict=True):
            assert np.array_equal(mask.numpy(), rectangle(width, height, box))
            x0, y0, x1, y1 = box
            expected = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            assert torch.allclose(found, torch.tensor(expected))


def test_without_masks_a_sample_has_none_and_needs_none(tmp_path):
    edit(write_dataset(tmp_path), lambda content: [note.pop("segmentation") for note in content["annotations"]])
    assert "masks" not in opened(tmp_path, masks=False)[0]


def test_boxes_and_masks_follow_the_augmented_image(tmp_path):
    data = opened(write_dataset(tmp_path), train=True)
    shapes, dropped = set(), 0
    for epoch in range(40):
        for index in (0, 1, 2):
            sample = data[(epoch, index)]
            _, height, width = sample["image"].shape
            shapes.add((height, width))
            white = sample["image"].float().mean(0) > 64  # whatever the colours, objects are brighter than the ground
            assert torch.equal(sample["masks"].any(0), white)
            dropped += len(sample["labels"]) < len(IMAGES[index + 1][2])
            assert len(sample["labels"]) == len(sample["boxes"]) == len(sample["masks"])
            for mask, box in zip(sample["masks"], sample["boxes"], strict=True):
                ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                corners = [xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height]
                centre, extent = box[:2], box[2:]
                assert np.allclose(torch.cat([centre - extent / 2, centre + extent / 2]), corners, atol=1e-5)
    assert len(shapes) > 20 and dropped > 0  # crops of many sizes, some without one of the objects


def test_the_training_preset_mirrors_changes_colour_and_can_leave_all_alone(tmp_path):
    data = opened(write_dataset(tmp_path), train=True)
    plain = opened(tmp_path)[0]["image"]
    same = mirrored = colours = 0
    for epoch in range(60):
        image = data[(epoch, 0)]["image"]
        same += torch.equal(image, plain)
        mirrored += torch.equal(image, plain.flip(-1))
        colours += image.shape == plain.shape and 0 < int(image.max()) < 255
    assert same > 2 and mirrored > 2 and colours > 2


def test_crop_drops_what_it_leaves_no_pixel_of():
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[0, :5, :5] = masks[1, 10:, 10:] = True  # the third mask is empty, its box is not
    boxes = torch.tensor([[0.0, 0, 5, 5], [10, 10, 10.5, 20], [3, 3, 9, 9]])
    sample = {"image": tv_tensors.Image(torch.zeros(3, 20, 20, dtype=torch.uint8)), "masks": tv_tensors.Mask(masks),
              "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(20, 20)),
              "labels": torch.tensor([7, 8, 9])}
    kept = transforms.drop_vanished(sample)
    assert kept["labels"].tolist() == [7] and kept["boxes"].tolist() == [[0, 0, 5, 5]] and kept["masks"].shape[0] == 1
    assert isinstance(kept["boxes"], tv_tensors.BoundingBoxes) and kept["boxes"].canvas_size == (20, 20)


def test_mirror_preset_only_mirrors(tmp_path):
    image = tv_tensors.Image(torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4).expand(3, 3, 4))
    seen = {tuple(transforms.mirror()({"image": image})["image"].flatten().tolist()) for _ in range(30)}
    assert seen == {tuple(image.flatten().tolist()), tuple(image.flip(-1).flatten().tolist())}


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    data = opened(write_dataset(tmp_path), train=True, seed=3)
    first = [data[(epoch, 0)]["image"] for epoch in range(6)]
    torch.manual_seed(99)
    copy = pickle.loads(pickle.dumps(data))
    again = [copy[(epoch, 0)]["image"] for epoch in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = opened(tmp_path, train=True, seed=4)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in
               zip(first, [other[(epoch, 0)]["image"] for epoch in range(6)], strict=True))


def test_large_images_are_made_smaller_before_their_masks_are_stacked(tmp_path):
    write_dataset(tmp_path)
    evaluated, trained = opened(tmp_path, resolution=16)[1], opened(tmp_path, resolution=16, train=True)
    assert evaluated["image"].shape == (3, 16, 16) and evaluated["masks"].shape == (1, 16, 16)
    assert evaluated["size"] == (71, 50)
    whole = opened(tmp_path, resolution=64)[1]
    direct = batches.Collate(16)([whole])
    assert torch.equal(direct["images"][0], evaluated["image"])  # one stretch, as without the limit
    assert torch.equal(direct["labels"][0]["masks"], evaluated["masks"])
    assert torch.allclose(direct["labels"][0]["boxes"], evaluated["boxes"])
    for epoch in range(12):
        sample = trained[(epoch, 1)]
        assert sample["image"].shape[1] * sample["image"].shape[2] <= 1.1 * 32 ** 2
        assert sample["masks"].shape[1:] == sample["image"].shape[1:] and sample["masks"].any()


def test_a_mask_never_vanishes_by_stretching():
    masks = torch.zeros(2, 90, 90, dtype=torch.bool)
    masks[0, 40, 40] = masks[1, 10:70, 20:50] = True
    small = mask_codes.stretched_masks(masks, (16, 16))
    assert small.flatten(1).any(1).tolist() == [True, True] and 1 <= small[0].sum() <= 4  # at most its neighbours
    assert 45 < small[1].sum() < 70
    assert mask_codes.stretched_masks(masks[:0], (16, 16)).shape == (0, 16, 16)


# ---- masks ---------------------------------------------------------------------------------------------------------

def test_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 0.99, 1.0):
        for shape in ((1, 1), (7, 5), (480, 640), (3000, 2)):
            mask = np.asfortranarray(rng.random(shape) < density, dtype=np.uint8)
            runs = mask_codes._runs(rle.encode(mask)["counts"].decode("ascii"))
            rebuilt = np.repeat(np.arange(len(runs)) % 2, runs).reshape(shape, order="F")
            assert np.array_equal(rebuilt, mask)


GOOD = rle.encode(np.asfortranarray(rectangle(30, 20, (3, 4, 20, 15))))["counts"].decode("ascii")


@pytest.mark.parametrize("broken, why", [
    ({"size": [20, 30], "counts": GOOD[:-2]}, "pixels"),
    ({"size": [20, 30], "counts": GOOD[:-1] + chr(48 + 32)}, "cut off"),
    ({"size": [20, 30], "counts": GOOD + "~~"}, "characters"),
    ({"size": [20, 30], "counts": "\u00e9" + GOOD}, "characters"),
    ({"size": [20, 30], "counts": "o" * 12 + "0"}, "no image has"),
    ({"size": [30, 20], "counts": GOOD}, "size"),
    ({"size": [20, 30]}, "no counts"),
    ({"size": [20, 30], "counts": [300, -1, 301]}, "whole numbers"),
    ({"size": [20, 30], "counts": [5, 5]}, "covers 10 pixels"),
    ([[1, 1, 5, 5, float("nan"), 4]], "polygon"),
    ([[1, 1, 5, 5, 9, 4, 3]], "polygon"),
    ([[1, 1, 5, 1e12, 9, 4]], "polygon"),
    ([1, 1, 5, 5, 9, 4], "neither"),
    ("abc", "neither"),
])
def test_a_broken_mask_says_why(broken, why):
    with pytest.raises(ValueError, match=why):
        mask_codes.mask_code(broken, 20, 30)


@pytest.mark.parametrize("nothing", [
    None, [], {}, [[]], [[1, 1, 5, 5]], [[2, 2, 2, 2, 2, 2]], {"size": [20, 30], "counts": [600]}])
def test_a_mask_without_pixels_is_none(nothing):
    assert mask_codes.mask_code(nothing, 20, 30) is None


def test_several_polygons_are_one_mask():
    code = mask_codes.mask_code([[0, 0, 5, 0, 5, 5, 0, 5], [10, 10, 15, 10, 15, 15, 10, 15], [1, 2]], 20, 30)
    expected = rectangle(30, 20, (0, 0, 5, 5)) | rectangle(30, 20, (10, 10, 15, 15))
    assert np.array_equal(rle.decode({"size": [20, 30], "counts": code}), expected)


@pytest.mark.parametrize("name", ["instances_sample", "instances_nuclei"])
def test_real_data_sets_give_the_masks_that_pycocotools_sees(name):
    if not (SHARED / name).is_dir():
        pytest.skip("needs ../shared/data")
    names, notes = roboflow.class_names_of(SHARED / name)
    assert len(notes) == 1 and "parent" in notes[0]
    for split in ("valid", "test"):
        data = opened(SHARED / name, split, resolution=1000, rows={n: row for row, n in enumerate(names)})
        truth = ground_truth(data.annotations)
        assert data.notes == [] and len(data.labels) == len(truth.anns)
        for index in range(0, len(data), 2):
            sample, notes = data[index], truth.imgToAnns[data.image_ids[index]]
            assert [data.category_of[row] for row in sample["labels"].tolist()] == [n["category_id"] for n in notes]
            for mask, note in zip(sample["masks"], notes, strict=True):
                assert np.array_equal(mask.numpy(), truth.annToMask(note))
    assert len(pickle.dumps(data)) < 600 * len(data.labels)  # compact: no dicts, no lists of coordinates


# ---- what is clipped, left out, refused -----------------------------------------------------------------------------

def test_boxes_are_clipped_and_dropped_and_crowds_left_out_with_a_note(tmp_path):
    def change(content):
        first = content["annotations"][0]
        for box, extra in (([-5, 2, 20, 20], {}), ([10, 10, 0.5, 9], {}), ([0, 0, 60, 40], {"iscrowd": 1}),
                           ([10, 10, 9, 0], {}), ([2, 2, 20, 20], {"segmentation": []})):
            content["annotations"].append(first | {"id": len(content["annotations"]) + 1, "bbox": box} | extra)
    edit(write_dataset(tmp_path), change)
    data = opened(tmp_path)
    notes = " / ".join(data.notes)
    assert "1 crowd region(s)" in notes and "2 box(es) thinner" in notes and "1 box(es) reached out" in notes
    assert "1 object(s) without a mask" in notes and (tmp_path / "train").as_posix() in data.notes[0]
    assert data.labels.tolist() == [0, 1, 0, 1] and data.boxes[2].tolist() == [0, 2, 15, 22]
    assert len(opened(tmp_path, masks=False).labels) == 5


def _set(part, number, **values):
    return lambda content: content[part][number].update(values)


BROKEN_MASK = {"size": [48, 64], "counts": "zz"}


@pytest.mark.parametrize("change, message", [
    (_set("annotations", 1, segmentation=BROKEN_MASK), r"train/_annotations.*1 mask.*annotation 2 of 1\.png"),
    (_set("annotations", 0, segmentation={"size": [5, 5], "counts": "1"}), r"annotation 1 of 1\.png.*size"),
    (_set("annotations", 0, bbox=[1, 2, "3", 4]), "annotation 1: bbox"),
    (_set("annotations", 0, bbox=[1, 2, 3]), "annotation 1: bbox"),
    (_set("annotations", 1, id=1), "'annotations' have the id 1"),
    (_set("images", 2, id=1), "'images' have the id 1"),
    (_set("categories", 2, name="cat"), "two categories are called 'cat'"),
    (_set("categories", 2, name=7), "category 2 is called '7'; a name is text"),
    (_set("categories", 2, name=None), "category 2 is called 'None'"),
    (_set("categories", 2, name=" "), "not empty"),
    (_set("images", 0, id=1.0), "'images' has the id '1.0'"),
    (_set("images", 0, id=True), "'images' has the id 'True'"),
    (_set("images", 2, id=[1]), "not lists of entries with plain ids"),
    (_set("images", 2, id="a/b"), "'images' has the id 'a/b'"),
    (_set("images", 2, id="three"), "ids of 'images' are partly numbers, partly words"),
    (_set("categories", 0, id=None), "'categories' has the id 'None'"),
    (_set("images", 0, width=0), "width and height"),
    (_set("images", 2, width=39), r"3\.png \(is 40x40, its annotation says 39x40"),
    (_set("images", 0, file_name="gone.png"), r"gone\.png \(missing\)"),
    (_set("categories", 2, name="horse"), "annotates 'horse'.*cat, dog"),
    (lambda content: content.update(images=[]), "image id"),
    (lambda content: content.update(images=[], annotations=[]), "lists no images"),
    (lambda content: content.update(images=[1, 2]), "an entry of 'images' has no id"),
    (lambda content: content.pop("categories"), "has no categories"),
])
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, change, message):
    edit(write_dataset(tmp_path), change)
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "train").as_posix() in str(error.value)


def test_corrupt_json_and_a_truncated_image_are_named(tmp_path):
    path = write_dataset(tmp_path) / "train" / layouts.ROBOFLOW_FILE
    path.write_text(path.read_text(encoding="utf-8")[:200], encoding="utf-8")
    with pytest.raises(UserError, match="train/_annotations.coco.json is not readable JSON"):
        opened(tmp_path)
    image = tmp_path / "valid" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(UserError, match=r"valid/1\.png"):
        opened(tmp_path, "valid")


@pytest.mark.parametrize("change", [
    lambda content: [note.pop("segmentation") for note in content["annotations"]],
    lambda content: [note.update(segmentation=[]) for note in content["annotations"]],
    lambda content: [note.update(segmentation=[[1, 1, 1, 1, 1, 1]]) for note in content["annotations"]],
])
def test_no_masks_at_all_is_an_error(tmp_path, change):
    edit(write_dataset(tmp_path), change)
    with pytest.raises(UserError, match="No segmentation masks found in COCO annotations"):
        opened(tmp_path)


def test_a_training_split_without_objects_is_refused_a_validation_split_is_not(tmp_path):
    for split in ("train", "valid"):
        edit(tmp_path if split == "valid" else write_dataset(tmp_path), lambda c: c.update(annotations=[]), split)
    with pytest.raises(UserError, match="no object to train on"):
        opened(tmp_path, train=True)
    assert opened(tmp_path, "valid")[0]["masks"].shape == (0, 48, 64)


def test_a_missing_data_set_says_what_is_missing_and_how_to_get_one(tmp_path):
    for make, missing in ((tmp_path / "d", "/d does"), (tmp_path / "d" / "train", "train/_annotations.coco.json does")):
        with pytest.raises(UserError, match=f"--dataset_dir .*{missing}.*make_demo_dataset.*--demo"):
            roboflow.class_names_of(tmp_path / "d")
        make.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "train").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="--data .*d/valid does not exist"):
        opened(tmp_path / "d", "valid", flag="--data")


def test_roboflows_parent_category_is_dropped_only_where_nothing_uses_it(tmp_path):
    write_dataset(tmp_path)
    names, notes = roboflow.class_names_of(tmp_path)
    assert names == ["cat", "dog"] and len(notes) == 1 and "'pets'" in notes[0]
    edit(tmp_path, _set("annotations", 0, category_id=0), "valid")  # used, though not in train
    assert roboflow.class_names_of(tmp_path) == (["pets", "cat", "dog"], [])


def test_roboflows_parent_category_may_be_called_as_a_class_is(tmp_path):
    write_dataset(tmp_path)
    for split in ("train", "valid"):
        edit(tmp_path, lambda c: c["categories"][0].update(name="cat"), split)
        edit(tmp_path, lambda c: [one.update(supercategory="cat") for one in c["categories"][1:]], split)
    names, notes = roboflow.class_names_of(tmp_path)
    assert names == ["cat", "dog"] and len(notes) == 1 and "category 0, called 'cat'" in notes[0]
    assert len(opened(tmp_path).labels) and len(opened(tmp_path, "valid").labels)
    edit(tmp_path, _set("annotations", 0, category_id=0), "train")
    with pytest.raises(UserError, match="two categories are called 'cat'"):
        roboflow.class_names_of(tmp_path)


def test_class_names_do_not_depend_on_the_optional_test_split(tmp_path):
    expected = roboflow.class_names_of(write_dataset(tmp_path))
    write_dataset(tmp_path, splits=("test",))
    edit(tmp_path, _set("annotations", 0, category_id=0), "test")
    assert roboflow.class_names_of(tmp_path) == expected
    (tmp_path / "test" / layouts.ROBOFLOW_FILE).write_text("{", encoding="utf-8")
    assert roboflow.class_names_of(tmp_path) == expected
    with pytest.raises(UserError, match="test/_annotations.coco.json is not readable JSON"):  # with --run_test 1
        opened(tmp_path, "test")


def test_words_as_image_ids_train_and_score(tmp_path):
    def in_words(content):
        for image in content["images"]:
            image["id"] = f"image {image['id']}"
        for note in content["annotations"]:
            note["image_id"] = f"image {note['image_id']}"
    edit(write_dataset(tmp_path), in_words)
    data = opened(tmp_path)
    assert data[0]["image_id"] == "image 1" and len(data[0]["labels"]) == 2
    truth = ground_truth(data.annotations)
    found = [{"image_id": note["image_id"], "label": note["category_id"] - 1, "bbox": note["bbox"], "score": 0.9,
              "segmentation": truth.annToRLE(note)} for note in truth.dataset["annotations"]]
    for kind in ("bbox", "segm"):
        assert coco_scores(truth, found, data.category_of, data.image_ids, kind)["mAP"] > 0.99


EMPTY_SHAPES = [
    None, [], [[]], [[1, 1, 9, 9]], [[1, 1, 1, 1, 1, 1]], [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], [[3, 3, 9, 3, 6, 3]],
    {"size": [48, 64], "counts": [48 * 64]}, {"size": [48, 64], "counts": []},
    {"size": [48, 64], "counts": rle.encode(np.zeros((48, 64), np.uint8, order="F"))["counts"].decode()},
]


@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_an_object_whose_mask_covers_no_pixel_is_scored_as_it_is_trained_as_without_mask(tmp_path, shape):
    edit(write_dataset(tmp_path, "polygon"), _set("annotations", 0, segmentation=shape))
    if shape != {"size": [48, 64], "counts": []}:  # that one is refused: it is not as long as the image
        assert mask_codes.mask_code(shape, 48, 64) is None
        what = "whose mask covers no pixel of the image" if shape else "without a mask"
        assert f"1 object(s) {what} were left out" in opened(tmp_path).notes[0]
    truth = ground_truth(tmp_path / "train" / layouts.ROBOFLOW_FILE)
    masks = with_masks_only(truth)
    assert [note["iscrowd"] for note in masks.dataset["annotations"]] == [1, 0, 0]
    found = [{"image_id": note["image_id"], "label": note["category_id"] - 1, "score": 0.9,
              "segmentation": truth.annToRLE(note)} for note in truth.dataset["annotations"][1:]]
    scores = coco_scores(truth, found, {0: 1, 1: 2}, [1, 2, 3], "segm")
    assert scores["mAP"] > 0.99 and scores["per_class"]["cat"] == -1


@pytest.mark.parametrize("kind", ["polygon", "rle", "uncompressed"])
def test_a_truth_with_all_its_masks_is_scored_as_it_is(tmp_path, kind):
    truth = ground_truth(write_dataset(tmp_path, kind) / "train" / layouts.ROBOFLOW_FILE)
    assert with_masks_only(truth) is truth


def test_an_unused_class_of_ones_own_stays(tmp_path):
    write_dataset(tmp_path)
    edit(tmp_path, lambda content: content.update(categories=[
        {"id": 5, "name": "bird", "supercategory": "none"}, {"id": 0, "name": "zebra"}] + content["categories"][1:]))
    assert roboflow.class_names_of(tmp_path) == (["zebra", "cat", "dog", "bird"], [])


# ---- batches -------------------------------------------------------------------------------------------------------

def test_collate_stretches_images_and_masks_to_one_square(tmp_path):
    data = opened(write_dataset(tmp_path))
    batch = batches.Collate(32)([data[i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 32, 32) and batch["images"].dtype == torch.uint8
    assert [label["masks"].shape for label in batch["labels"]] == [(2, 32, 32), (1, 32, 32), (0, 32, 32)]
    assert batch["sizes"] == [(48, 64), (71, 50), (40, 40)] and batch["image_ids"] == [1, 2, 3]
    for image, label in zip(batch["images"], batch["labels"], strict=True):
        assert label["class_labels"].dtype == torch.int64 and label["masks"].dtype == torch.bool
        white = image[0] > 127
        assert (label["masks"].any(0) != white).float().mean() < 0.01  # half pixels at the border at most
    assert "masks" not in batches.Collate(32)([opened(tmp_path, masks=False)[0]])["labels"][0]
    moved = datasets.to_device(batch, "cpu")
    assert moved["images"].max() <= 1 and moved["labels"][0]["masks"].dtype == torch.bool


def test_the_sizes_of_multi_scale_training():
    assert batches.multi_scale_sizes(384, 32, False, 300, 16) == (288, 320, 352, 384, 416, 448, 480, 512)
    assert batches.multi_scale_sizes(384, 32, True, 300, 16) == (288, 320, 352, 384, 416, 448, 480, 512, 544)
    assert batches.multi_scale_sizes(560, 56, False, 300, 14) == tuple(range(392, 785, 56))
    assert batches.multi_scale_sizes(560, 56, True, 300, 14) == tuple(range(280, 841, 56))
    for sizes in (batches.multi_scale_sizes(160, 16, expanded, 60, 8) for expanded in (False, True)):
        assert 160 in sizes and all((size // 8) ** 2 >= 60 and size % 16 == 0 for size in sizes)


def test_the_size_of_a_batch_is_a_function_of_seed_and_keys():
    scales = batches.multi_scale_sizes(384, 32, False, 300, 16)
    collate = batches.Collate(384, scales, seed=1)
    keys = [[(epoch, 4 * i + j) for j in range(4)] for epoch in range(3) for i in range(60)]
    sizes = [collate.size_of(batch) for batch in keys]
    again = pickle.loads(pickle.dumps(collate))
    assert sizes == [again.size_of([tuple(key) for key in batch]) for batch in keys]
    counts = [sizes.count(size) for size in scales]
    assert sum(counts) == 180 and min(counts) > 5  # every size is used, and nothing else
    assert sizes != [batches.Collate(384, scales, seed=2).size_of(batch) for batch in keys]
    assert sizes[:60] != sizes[60:120]  # another epoch, other sizes
    assert batches.Collate(384).size_of(keys[0]) == 384


def test_batches_do_not_depend_on_workers_and_go_on_in_the_middle(tmp_path):
    data = opened(write_dataset(tmp_path), train=True)
    collate = batches.Collate(32, (16, 32, 48), seed=5)

    def batches_of(workers, first=0):
        loader = loaders.training_loader(data, 1, workers, seed=0, collate=collate)
        loader.batch_sampler.start_at(2, first)
        if workers:
            loader.multiprocessing_context = "spawn"  # as on Windows: everything is pickled
        return list(loader)

    plain, spawned, resumed = batches_of(0), batches_of(1), batches_of(0, first=1)
    assert len(plain) == 3
    for one, other in zip(plain + plain[1:], spawned + resumed, strict=True):
        assert one["paths"] == other["paths"] and torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"][0]["masks"], other["labels"][0]["masks"])
        assert torch.equal(one["labels"][0]["boxes"], other["labels"][0]["boxes"])


# ---- masks in another layout, masks elsewhere, images in two splits -------------------------------------------------

@pytest.mark.parametrize("shape, words", [
    ([[[1, 1], [9, 1], [9, 9], [1, 9]]], r"list of points .*\[x, y, x, y, \.\.\.\]"),  # four corners: eight numbers
    ([[{"x": 1, "y": 1}]], "list of points"),
    ({"size": [48.0, 64.0], "counts": [0, 48 * 64]}, "size"),
    ({"size": [48, 64], "counts": [10**30]}, "whole numbers from 0 to"),
    ({"size": [48, 64], "counts": [2**63 - 1, 2**63 - 1, 48 * 64 + 2]}, "whole numbers from 0 to"),
    ({"size": [48, 64], "counts": [True, 48 * 64 - 1]}, "whole numbers"),
])
def test_a_mask_in_another_layout_is_refused_and_never_taken_for_none(tmp_path, shape, words):
    edit(write_dataset(tmp_path, "polygon"), _set("annotations", 0, segmentation=shape))
    with pytest.raises(UserError, match=f"annotation 1 of 1.png.*{words}"):
        opened(tmp_path)


def test_polygons_in_shares_of_the_image_are_told_what_they_should_be(tmp_path):
    def in_shares(content):
        for note in content["annotations"]:
            note["segmentation"] = [[value / 100 for value in part] for part in note["segmentation"]]
    edit(write_dataset(tmp_path, "polygon"), in_shares)
    with pytest.raises(UserError, match="not in shares"):
        opened(tmp_path)


@pytest.mark.parametrize("change", [
    lambda part: [part[i ^ 1] for i in range(len(part))],       # x and y swapped
    lambda part: [0, 0, 64, 0, 64, 48, 0, 48],                  # the whole image
])
def test_masks_that_do_not_fit_their_boxes_are_counted(tmp_path, change):
    root = write_dataset(tmp_path, "polygon")
    assert not any("do not fit" in note for note in opened(root).notes)
    edit(root, lambda content: content["annotations"][0].update(
        segmentation=[change(part) for part in content["annotations"][0]["segmentation"]]))
    assert any("1 mask(s) do not fit their box" in note for note in opened(root).notes)


def test_a_training_split_of_crowd_regions_alone_says_so(tmp_path):
    edit(write_dataset(tmp_path), lambda content: [note.update(iscrowd=1) for note in content["annotations"]])
    with pytest.raises(UserError, match="3 of its 3 annotation.*crowd"):
        opened(tmp_path, train=True, masks=False)


def test_images_of_two_splits_are_compared_by_content(tmp_path):
    root = write_dataset(tmp_path)
    train, valid = (opened(root, split) for split in ("train", "valid"))
    assert "3 of 3 images of valid/ are in train/" in roboflow.note_on_shared_images(train, valid, "valid")
    for name in valid.files:
        with Image.open(valid.folder / name) as image:
            image.rotate(180).save(valid.folder / name)
    shared = roboflow.note_on_shared_images(train, opened(root, "valid"), "valid")
    assert shared is None or "1 of 3" in shared  # the image without objects is black either way round
