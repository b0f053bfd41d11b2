"""Data: checked when opened, the same for every worker, nothing silently dropped."""

import json

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from torchvision import tv_tensors

from utils import datasets
from utils.config import UserError
from utils.datasets import coco as coco_datasets
from utils.datasets import loaders, presets
from utils.datasets.annotations import label_table, read_annotations

NAMES = {0: "person", 1: "car"}


def open_set(root, split="train", transform=None, id2label=NAMES, **kwargs):
    return datasets.CocoDetectionDataset(root, split, id2label, transform or presets.evaluation(64),
                                         constant="COCO_DIR", domain="clean", **kwargs)


def edit(root, change, split="train"):
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_samples_have_normalised_boxes_and_empty_images_stay(coco):
    data = open_set(coco / "coco")
    assert len(data) == 8
    counts = {data.image_ids[i]: len(data[i]["boxes"]) for i in range(8)}
    assert counts == {i: (1, 2, 0)[i % 3] for i in range(1, 9)}
    empty = data[data.image_ids.index(2)]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)
    first = data[data.image_ids.index(3)]
    assert first["image"].dtype == torch.uint8 and first["image"].shape == (3, 64, 64)
    torch.testing.assert_close(first["boxes"][0], torch.tensor([23 / 96, 28 / 96, 30 / 96, 40 / 96]))
    batch = datasets.to_device(datasets.collate([empty, first]), "cpu")
    assert batch["images"].dtype == torch.float32 and 0 <= batch["images"].min() and batch["images"].max() <= 1
    assert batch["labels"][0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("missing", ["train2017", "annotations", "annotations/instances_train2017.json"])
def test_missing_parts_are_named_with_the_constant(coco, missing):
    (coco / "coco" / missing).rename(coco / "elsewhere")
    with pytest.raises(UserError, match=f"COCO_DIR.*{missing}.*does not exist.*--demo"):
        open_set(coco / "coco")


def test_a_truncated_image_stops_at_the_check_with_its_name(coco):
    path = coco / "coco" / "train2017" / "000000000004.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match="000000000004.jpg"):
        open_set(coco / "coco")
    path.unlink()
    with pytest.raises(UserError, match="000000000004.jpg.*missing"):
        open_set(coco / "coco")
    data = open_set(coco / "coco", check=False)
    with pytest.raises(UserError, match="000000000004.jpg"):
        data[data.image_ids.index(4)]


def test_an_error_in_a_worker_names_the_image(coco):
    (coco / "coco" / "train2017" / "000000000004.jpg").write_bytes(b"broken")
    loader = loaders.training_loader(open_set(coco / "coco", check=False), 2, 1, 0)
    with pytest.raises(UserError, match="000000000004.jpg"):
        list(loader)


def test_boxes_are_clipped_or_left_out_and_counted(coco):
    def change(content):
        notes = content["annotations"]
        notes[0]["bbox"] = [-20, 8, 50, 40]
        notes[1]["bbox"] = [5, 5, 0.2, 30]
        notes[2]["iscrowd"] = 1
    edit(coco / "coco", change)
    data = open_set(coco / "coco")
    assert [note.split(": ")[1].split(" ")[0] for note in data.notes] == ["1", "1"]
    boxes = torch.cat([data[i]["boxes"] for i in range(len(data))])
    assert len(boxes) == len(json.loads(data.annotations.file.read_text())["annotations"]) - 2
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6


def test_boxes_in_other_units_are_refused(coco):
    original = json.loads((coco / "coco" / "annotations" / "instances_train2017.json").read_text())["annotations"]

    def rewrite(box):
        edit(coco / "coco", lambda content: [note.update(bbox=box(old["bbox"]))
                                             for note, old in zip(content["annotations"], original, strict=True)])
    rewrite(lambda box: [value / 96 for value in box])
    with pytest.raises(UserError, match="all 8 box.*in pixels, not in shares"):
        open_set(coco / "coco")
    edit(coco / "coco", lambda content: content["annotations"].extend(
        content["annotations"][0] | {"id": 100 + i, "bbox": [50, 50, 90, 90]} for i in range(12)))
    with pytest.raises(UserError, match="12 of 12 boxes reach out.*not .x1, y1, x2, y2"):
        open_set(coco / "coco")


def test_nothing_to_score_or_to_learn_from_is_said(coco):
    for split in ("train", "val"):
        edit(coco / "coco", lambda content: content["annotations"].clear(), split)
    with pytest.raises(UserError, match="instances_val2017.json has no object .* nothing to score"):
        open_set(coco / "coco", "val")
    with pytest.raises(UserError, match="instances_train2017.json has no object .* nothing to learn from"):
        mixture(coco, coco_ratio=1.0, rain_ratio=0.0)


def mixture(coco, clean="coco", rainy="coco_rain", **ratios):
    return datasets.clean_rainy_mixture(coco / clean, coco / rainy, NAMES, presets.evaluation(64), percent=100, seed=0,
                                        **({"coco_ratio": 0.5, "rain_ratio": 0.5} | ratios))


def test_one_folder_for_both_or_rain_as_clean_images_is_refused(coco):
    (coco / "coco_rain" / "rain.json").write_text("{}")  # make_rain.py's
    assert len(mixture(coco)) == 8
    with pytest.raises(UserError, match="COCO_DIR and COCO_RAIN_DIR are the same folder"):
        mixture(coco, rainy="coco")
    with pytest.raises(UserError, match="COCO_DIR and COCO_RAIN_DIR are the same folder"):
        mixture(coco, rainy="coco/data.yaml")
    with pytest.raises(UserError, match="COCO_DIR = .* holds rain .* swapped"):
        mixture(coco, "coco_rain", "coco")
    with pytest.raises(UserError, match="CLEAN_DIR = .* holds rain .* are CLEAN_DIR and RAINY_DIR swapped"):
        datasets.PairedRainDataset(coco / "coco" / "train2017", coco / "coco_rain" / "train2017",
                                   presets.evaluation(64))


def test_a_byte_order_mark_is_read_over_and_a_file_name_is_text(coco):
    path = coco / "coco" / "annotations" / "instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # Windows PowerShell writes one
    assert len(open_set(coco / "coco")) == 8
    path.write_bytes(path.read_bytes()[3:])
    edit(coco / "coco", lambda content: content["images"][0].update(file_name=None))
    with pytest.raises(UserError, match="image 1: file_name None is no text"):
        open_set(coco / "coco")


def test_wrong_categories_and_broken_json_are_named(coco):
    edit(coco / "coco", lambda content: content["categories"].append({"id": 9, "name": "rickshaw"}))
    with pytest.raises(UserError, match="does not know 'rickshaw'"):
        open_set(coco / "coco")
    assert open_set(coco / "coco", unknown="ignore").label_of == {1: 0, 3: 1}
    with pytest.raises(UserError, match="does not know"):
        open_set(coco / "coco", id2label={0: "cat"}, unknown="ignore")
    edit(coco / "coco", lambda content: content["annotations"][0].update(category_id=77))
    with pytest.raises(UserError, match="77"):
        open_set(coco / "coco")
    edit(coco / "coco", lambda content: content.pop("categories"))
    with pytest.raises(UserError, match="no categories"):
        open_set(coco / "coco")
    (coco / "coco" / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        open_set(coco / "coco")
    (coco / "coco" / "annotations" / "instances_train2017.json").write_text("{}", encoding="utf-16")
    with pytest.raises(UserError, match="not readable JSON: it is not in UTF-8: save it as UTF-8"):
        open_set(coco / "coco")


def test_sizes_and_fields_that_do_not_fit_are_named(coco):
    Image.new("RGB", (20, 20)).save(coco / "coco" / "train2017" / "000000000004.jpg")
    with pytest.raises(UserError, match="000000000004.jpg .is 20x20, its annotation says 96x96"):
        open_set(coco / "coco")
    edit(coco / "coco", lambda content: content["images"][0].pop("width"))
    with pytest.raises(UserError, match="an entry of 'images' has no width"):
        open_set(coco / "coco")


def test_an_image_id_that_stands_twice_is_named(coco):
    edit(coco / "coco", lambda content: content["images"][1].update(id=content["images"][0]["id"]))
    with pytest.raises(UserError, match="several 'images' have the id 1 "):
        open_set(coco / "coco")


def test_a_category_id_that_stands_twice_is_named(coco):
    edit(coco / "coco", lambda content: content["categories"].append(content["categories"][0] | {"name": "bus"}))
    with pytest.raises(UserError, match="several 'categories' have the id"):
        open_set(coco / "coco")


@pytest.mark.parametrize("name", ["/data/val2017/1.jpg", "C:\\data\\1.jpg", "../coco/1.jpg"])
def test_a_file_name_that_leaves_its_folder_is_refused(coco, name):
    """A rainy twin's annotations are a copy: it would read the clean images, and nothing else would tell."""
    edit(coco / "coco", lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(UserError, match="must be a path below the image folder"):
        open_set(coco / "coco")


@pytest.mark.parametrize(("field", "value"), [("iscrowd", "0"), ("iscrowd", 2), ("area", "40000"), ("area", -1),
                                              ("area", float("nan"))])
def test_a_crowd_flag_or_area_that_is_none_is_named(coco, field, value):
    edit(coco / "coco", lambda content: content["annotations"][0].update({field: value}))
    with pytest.raises(UserError, match=rf"annotation \d+: {field} "):
        open_set(coco / "coco")
    edit(coco / "coco", lambda content: content["annotations"][0].update({field: None}))
    open_set(coco / "coco")


def test_polygons_are_only_read_where_they_are_needed(coco):
    edit(coco / "coco", lambda content: [note.update(segmentation=[[0, 0, 5, 0, 5, 5]])
                                         for note in content["annotations"]])
    path = coco / "coco" / "annotations" / "instances_train2017.json"
    whole, bare = read_annotations(path), read_annotations(path, masks=False)
    assert all("segmentation" in note for note in whole["annotations"])
    for note in whole["annotations"]:
        note.pop("segmentation")
    assert whole == bare


def test_a_clean_image_is_its_own_twin_without_being_read_twice(coco, monkeypatch):
    data = open_set(coco / "coco", twin_root=coco / "coco", twin_constant="COCO_DIR")
    reads, plain = [], coco_datasets.read_image
    monkeypatch.setattr(coco_datasets, "read_image", lambda path: (reads.append(path), plain(path))[1])
    sample = data[0]
    assert len(reads) == 1 and torch.equal(sample["image"], sample["twin"])
    assert sample["image"].data_ptr() != sample["twin"].data_ptr()


@pytest.mark.parametrize("width", ["64", None, 0])
def test_a_size_that_is_none_is_named(coco, width):
    edit(coco / "coco", lambda content: content["images"][0].update(width=width))
    with pytest.raises(UserError, match=r"image \d+: width and height must be positive numbers"):
        open_set(coco / "coco")
    edit(coco / "coco", lambda content: content["images"].__setitem__(0, None))
    with pytest.raises(UserError, match="an entry of 'images' has no id"):
        open_set(coco / "coco")


@pytest.mark.parametrize("change", [lambda content: content["images"][0].update(id=[1]),
                                    lambda content: content.update(annotations=7)])
def test_what_is_no_list_of_entries_is_refused_in_one_line(coco, change):
    edit(coco / "coco", change)
    with pytest.raises(UserError, match="instances_train2017.json: its parts are not lists of entries with plain ids"):
        open_set(coco / "coco")


def test_two_categories_of_one_class_are_refused_where_both_are_used(coco):
    data = open_set(coco / "coco")
    name = next(c["name"] for c in json.loads(data.annotations.file.read_text())["categories"] if c["id"] == 3)
    edit(coco / "coco", lambda content: content["categories"].append({"id": 9, "name": name.upper()}))
    assert open_set(coco / "coco").category_of == data.category_of  # nothing carries the new one
    edit(coco / "coco", lambda content: content["annotations"][0].update(category_id=9))
    edit(coco / "coco", lambda content: content["annotations"][1].update(category_id=3))
    with pytest.raises(UserError, match="categories 3 and 9 are the same class|categories 9 and 3 are the same class"):
        open_set(coco / "coco")


@pytest.mark.parametrize("box", [[], None, [1, 2, 3], ["a", 2, 3, 4], [1, 2, float("nan"), 4]])
def test_a_bbox_that_is_none_is_named(coco, box):
    edit(coco / "coco", lambda content: content["annotations"][0].update(bbox=box))
    with pytest.raises(UserError, match=r"annotation \d+: bbox .* is not \[x, y, width, height\]"):
        open_set(coco / "coco")


def test_old_spellings_of_coco_classes_match():
    table = label_table([{"id": 4, "name": "motorcycle"}, {"id": 63, "name": "couch"}],
                        {3: "motorbike", 57: "sofa"}, "x.json")
    assert table == {4: 3, 63: 57}
    with pytest.raises(UserError, match="UNKNOWN_CATEGORIES = 'Ignore'"):
        label_table([{"id": 4, "name": "motorcycle"}], {3: "motorbike"}, "x.json", unknown="Ignore")


def test_the_domain_is_the_roots_not_the_paths(coco):
    data = open_set(coco / "coco")
    assert "rain" in data[0]["path"] and data[0]["domain"] == "clean"  # 'train2017' contains 'rain'


def test_subsets_depend_on_seed_and_names_alone():
    names = [f"{i:012d}.jpg" for i in range(200)]
    chosen = datasets.seeded_subset(names, 10, seed=0)
    assert len(chosen) == 20 and chosen[:5] == [2, 10, 28, 31, 40]  # the same on every machine
    backwards = datasets.seeded_subset(names[::-1], 10, seed=0)
    assert {names[i] for i in chosen} == {names[::-1][i] for i in backwards}
    assert datasets.seeded_subset(names, 10, seed=1) != chosen
    parts = [datasets.seeded_subset(names, 50, 0, part) for part in ((0, 0.3), (0.3, 1))]
    assert not set(parts[0]) & set(parts[1]) and sorted(parts[0] + parts[1]) == datasets.seeded_subset(names, 50, 0)


def test_the_mixture_shares_out_images_once(coco):
    data = datasets.clean_rainy_mixture(coco / "coco", coco / "coco_rain", NAMES, presets.evaluation(64),
                                        coco_ratio=0.25, rain_ratio=0.75, percent=100, seed=0, twins=True)
    samples = [data[i] for i in range(len(data))]
    assert [s["domain"] for s in samples] == ["clean"] * 2 + ["rainy"] * 6
    assert len({s["image_id"] for s in samples}) == 8
    assert all((s["image"] == s["twin"]).all() for s in samples[:2])
    assert all((s["image"] != s["twin"]).any() for s in samples[2:])
    with pytest.raises(UserError, match="add up to 1"):
        datasets.clean_rainy_mixture(coco / "coco", coco / "coco_rain", NAMES, None, coco_ratio=0.5, rain_ratio=1.0,
                                     percent=100, seed=0)


def test_image_and_twin_get_the_same_geometry(tmp_path):
    write_coco(tmp_path / "a", seed=3)
    write_coco(tmp_path / "b", seed=3)
    for preset in (presets.adaptation(64), presets.detection(64)):
        data = open_set(tmp_path / "a", transform=preset, twin_root=tmp_path / "b", twin_constant="COCO_RAIN_DIR")
        for epoch in range(6):
            sample = data[(epoch, epoch)]
            assert (sample["image"] == sample["twin"]).all()
            assert sample["boxes"].numel() == 0 or 0 <= sample["boxes"].min() <= sample["boxes"].max() <= 1


def test_a_missing_or_misshapen_twin_is_named(coco):
    Image.new("RGB", (50, 50)).save(coco / "coco_rain" / "train2017" / "000000000005.jpg")
    with pytest.raises(UserError, match="coco_rain/train2017/000000000005.jpg .is 50x50"):
        open_set(coco / "coco", twin_root=coco / "coco_rain", twin_constant="COCO_RAIN_DIR")
    data = open_set(coco / "coco", twin_root=coco / "coco_rain", twin_constant="COCO_RAIN_DIR", check=False)
    with pytest.raises(UserError, match="000000000005.jpg is 96x96, its twin"):
        data[data.image_ids.index(5)]
    (coco / "coco_rain" / "train2017" / "000000000005.jpg").unlink()
    with pytest.raises(UserError, match="000000000005.jpg .missing"):
        open_set(coco / "coco", twin_root=coco / "coco_rain", twin_constant="COCO_RAIN_DIR")


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_a_function_of_seed_epoch_and_index(coco, workers):
    data = open_set(coco / "coco", transform=presets.detection(64), seed=5)
    loader = loaders.training_loader(data, 3, workers, seed=5)
    runs = []
    for epoch, first in ((0, 0), (1, 0), (0, 0), (1, 2)):
        loader.batch_sampler.start_at(epoch, first)
        torch.randn(3)  # randomness of the caller has no say
        runs.append(list(loader))
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[0][0]["images"], runs[1][0]["images"])
    assert len(runs[1]) == 3 and len(runs[3]) == 1 and torch.equal(runs[1][2]["images"], runs[3][0]["images"])
    single = [data[(0, i)]["image"] for i in range(8)]
    by_id = {i: image for batch in runs[0] for i, image in zip(batch["image_ids"], batch["images"], strict=True)}
    assert all(torch.equal(by_id[data.image_ids[i]], single[i]) for i in range(8))


def test_ranks_share_every_batch(coco):
    whole = loaders.EpochBatches(11, 4, True, 0, rank=0, world=1)
    halves = [loaders.EpochBatches(11, 2, True, 0, rank=r, world=2) for r in (0, 1)]
    for big, left, right in zip(whole, *halves, strict=True):
        assert big == (left + right)[:len(big)] and len(left) == len(right)


@pytest.fixture
def pair_folders(tmp_path):
    """Five pairs, rainy JPEGs and clean PNGs, in a folder below each root."""
    for name, ending in (("rainy", "jpg"), ("clean", "png")):
        (tmp_path / name / "sub").mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((40, 50, 3), 10 * i, np.uint8)).save(tmp_path / name / "sub" / f"{i}.{ending}")
    return tmp_path


def open_pairs(root, transform=None, rainy="rainy", **kwargs):
    return datasets.PairedRainDataset(root / rainy, root / "clean", transform or presets.scaled(1.0), **kwargs)


def test_pairs_are_of_one_scene_and_cut_alike(pair_folders):
    data = open_pairs(pair_folders, presets.paired_patches(32))
    assert len(data) == 5
    sample = data[(3, 2)]
    assert sample["image"].shape == sample["twin"].shape == (3, 32, 32)
    assert (sample["image"].int() - sample["twin"].int()).abs().max() < 4  # the partner, not another image


def test_patches_larger_than_the_image_are_mirrored(pair_folders):
    assert open_pairs(pair_folders, presets.paired_patches(64))[0]["image"].shape == (3, 64, 64)
    ramp = torch.arange(3).repeat(3, 5, 1).to(torch.uint8)  # 5 x 3 pixels: less than half of the patch
    patch = presets.PairedPatch(8)({"image": ramp, "twin": ramp})["image"].float().mean(0)
    ends = torch.tensor([0.0, 1, 2, 2, 1, 0, 0, 1])
    assert any(torch.equal(patch, view) for row in (ends, ends.flip(0)) for view in (row.expand(8, 8),
                                                                                     row.expand(8, 8).T))


def test_parts_share_no_pair(pair_folders):
    parts = [open_pairs(pair_folders, part=part) for part in ((0, 0.6), (0.6, 1))]
    assert parts[0].pairs and parts[1].pairs
    assert not {p for p, _ in parts[0].pairs} & {p for p, _ in parts[1].pairs}


def test_pairs_that_are_none_are_refused(pair_folders):
    clean = pair_folders / "clean" / "sub"
    Image.new("RGB", (50, 40)).save(clean / "3.bmp")
    with pytest.raises(UserError, match="share a name"):
        open_pairs(pair_folders)
    (clean / "3.bmp").unlink()
    (clean / "3.png").unlink()
    with pytest.raises(UserError, match="CLEAN_DIR.*sub/3"):
        open_pairs(pair_folders)
    with pytest.raises(UserError, match="RAINY_DIR.*does not exist"):
        open_pairs(pair_folders, rainy="none")


def test_scaled_preset_shrinks_image_and_twin_alike():
    sample = {"image": tv_tensors.Image(torch.zeros(3, 41, 60, dtype=torch.uint8)),
              "twin": tv_tensors.Image(torch.zeros(3, 41, 60, dtype=torch.uint8))}
    half = presets.scaled(0.5)(sample)
    assert half["image"].shape == half["twin"].shape == (3, 20, 30)
    assert presets.scaled(1.0)(sample) is sample
    assert presets.paired_patches(16, 0.5)(sample)["image"].shape == (3, 16, 16)


def test_scaled_preset_keeps_the_middle_of_what_is_too_large():
    ramp = torch.arange(60, dtype=torch.uint8).repeat(3, 41, 1)
    kept = presets.scaled(1.0, 50)({"image": tv_tensors.Image(ramp), "twin": tv_tensors.Image(ramp)})
    assert kept["image"].shape == (3, 41, 50) and torch.equal(kept["image"], ramp[:, :, 5:55])
    assert torch.equal(kept["twin"], kept["image"])


def test_a_missing_folder_comes_with_the_advice_of_its_domain_whatever_its_constant_is_called(coco):
    with pytest.raises(UserError, match="TRAIN_DIR.*cocodataset.org") as error:
        datasets.CocoDetectionDataset(coco / "none", "train", NAMES, presets.evaluation(64), constant="TRAIN_DIR",
                                      domain="clean")
    assert "make_rain.py" not in str(error.value)
    with pytest.raises(UserError, match="WET_DIR.*make_rain.py"):
        datasets.CocoDetectionDataset(coco / "none", "train", NAMES, presets.evaluation(64), constant="WET_DIR",
                                      domain="rainy")
    with pytest.raises(UserError, match="TRAIN_DIR.*cocodataset.org"):
        datasets.PairedRainDataset(coco / "coco_rain", coco / "none", presets.evaluation(64),
                                   constants=("WET_DIR", "TRAIN_DIR"))


def test_clean_and_rainy_validation_sets_come_in_the_wanted_order_with_their_notes(coco, capsys):
    edit(coco / "coco_rain", lambda content: content["annotations"][0].update(bbox=[5, 5, 0.2, 20]), "val")
    found = datasets.clean_rainy_validation(coco / "coco", coco / "coco_rain", NAMES, presets.evaluation(64),
                                            domains=("rainy", "clean"))
    assert list(found) == [data.domain for data in found.values()] == ["rainy", "clean"]
    assert found["clean"].folder == coco / "coco" / "val2017" and found["rainy"].files == found["clean"].files
    assert "note: " in (text := capsys.readouterr().out) and "coco_rain" in text and "thinner" in text
    assert list(datasets.clean_rainy_validation(coco / "none", coco / "coco_rain", NAMES, presets.evaluation(64),
                                                domains=("rainy",))) == ["rainy"]
