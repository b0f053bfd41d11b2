"""The demo data set: scenes with exact masks, files in COCO layout, drawn once and never half."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from utils.config import UserError
from utils.demo import coco as demo
from utils.demo.scene import CATEGORIES, render_scene

SMALL = {"num_train": 8, "num_val": 4}


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small data set that no test may change."""
    return demo.ensure_demo(tmp_path_factory.mktemp("shared") / "demo", **SMALL)


def fingerprint(root):
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*")
            if p.is_file() and p.name != ".lock"}


def visible(root):
    """Names in a folder, without the lock file that may stay behind."""
    return sorted({path.name for path in root.iterdir()} - {".lock"})


# --- scenes ----------------------------------------------------------------------

def test_a_seed_gives_one_scene(scenes):
    for seed in (0, 7, 33):
        image, objects = render_scene(seed)
        assert np.array_equal(image, scenes[seed][0])
        assert len(objects) == len(scenes[seed][1])
        assert all(np.array_equal(a["mask"], b["mask"]) for a, b in zip(objects, scenes[seed][1], strict=True))
    assert not np.array_equal(scenes[0][0], scenes[1][0])


def test_shapes_and_types(scenes):
    for image, objects in scenes:
        assert image.shape == (160, 160, 3) and image.dtype == np.uint8 and image.std() > 3
        for thing in objects:
            assert thing["mask"].shape == (160, 160) and thing["mask"].dtype == bool and thing["mask"].sum() >= 24
    image, objects = render_scene(3, (200, 96))
    assert image.shape == (96, 200, 3) and all(o["mask"].shape == (96, 200) for o in objects)


def test_masks_of_a_scene_do_not_overlap(scenes):
    for _, objects in scenes:
        if objects:
            assert np.sum([o["mask"] for o in objects], axis=0).max() == 1


def test_the_world_has_variety(scenes):
    found = [o["category_id"] for _, objects in scenes for o in objects]
    assert set(found) == {c["id"] for c in CATEGORIES} == {1, 3, 6, 10, 13}
    assert all(found.count(c["id"]) >= 8 for c in CATEGORIES)
    assert 3 <= len(found) / len(scenes) <= 4.5
    sides = [max(np.ptp(np.nonzero(o["mask"]), axis=1) + 1) for _, objects in scenes for o in objects]
    assert min(sides) <= 12 and max(sides) >= 70
    assert any(not objects for _, objects in scenes)


def test_a_mask_covers_its_object(scenes):
    """The lamps of a traffic light and the red of a stop sign lie inside the masks, not beside them."""
    reds = []
    for image, objects in scenes:
        for thing in objects:
            if thing["category_id"] == 13 and thing["mask"].sum() > 150:
                r, g, b = image[thing["mask"]].astype(float).mean(0)
                reds.append(r / (g + b))
    assert np.median(reds) > 0.6


# --- files -------------------------------------------------------------------------

@pytest.mark.parametrize("part", demo.PARTS)
@pytest.mark.parametrize("split", demo.SPLITS)
def test_coco_files_say_what_was_drawn(drawn, part, split):
    coco = COCO(drawn / part / "annotations" / f"instances_{split}2017.json")
    images = coco.loadImgs(coco.getImgIds())
    assert len(images) == SMALL[f"num_{split}"]
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == [(c["id"], c["name"]) for c in CATEGORIES]
    for index, record in enumerate(images):
        with Image.open(drawn / part / f"{split}2017" / record["file_name"]) as file:
            assert file.size == (record["width"], record["height"]) == (160, 160) and file.mode == "RGB"
            saved = np.asarray(file)
        image, objects = render_scene(demo.scene_seed(0, split, index))
        gap = np.abs(saved.astype(int) - image).mean()
        assert gap < 6 if part == "coco" else gap > 0.5
        entries = coco.loadAnns(coco.getAnnIds(imgIds=record["id"]))
        assert len(entries) == len(objects)
        for entry, thing in zip(entries, objects, strict=True):
            mask = thing["mask"]
            assert isinstance(entry["segmentation"]["counts"], (str, bytes)) and entry["iscrowd"] == 0
            assert np.array_equal(coco.annToMask(entry).astype(bool), mask)
            assert entry["category_id"] == thing["category_id"] and entry["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            x, y, w, h = entry["bbox"]
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert entry["bbox"] == rle.toBbox(entry["segmentation"]).tolist()


def test_annotation_ids_are_unique_and_counts_are_text(drawn):
    entries = [a for s in demo.SPLITS for a in json.loads(
        demo.annotation_file(drawn / "coco", s).read_text(encoding="utf-8"))["annotations"]]
    assert len({e["id"] for e in entries}) == len(entries) > 0
    assert all(isinstance(e["segmentation"]["counts"], str) for e in entries)


def test_train_and_val_share_nothing(drawn):
    ids = {s: set(COCO(demo.annotation_file(drawn / "coco", s)).getImgIds()) for s in demo.SPLITS}
    assert not ids["train"] & ids["val"]
    seeds = [demo.scene_seed(seed, s, i) for seed in range(3) for s in demo.SPLITS for i in range(500)]
    assert len(set(seeds)) == len(seeds)


def test_the_twin_has_equal_names_and_other_pixels(drawn):
    for split in demo.SPLITS:
        clean, rainy = (sorted((drawn / part / f"{split}2017").iterdir()) for part in demo.PARTS)
        assert [p.name for p in clean] == [p.name for p in rainy] and len(clean) == SMALL[f"num_{split}"]
        assert all(a.read_bytes() != b.read_bytes() for a, b in zip(clean, rainy, strict=True))
        clean, rainy = (demo.annotation_file(drawn / part, split).read_bytes() for part in demo.PARTS)
        assert clean == rainy


# --- drawn once, never half ----------------------------------------------------------

def test_a_second_call_writes_nothing(drawn):
    before = fingerprint(drawn)
    assert demo.ensure_demo(str(drawn), **SMALL) == drawn
    assert fingerprint(drawn) == before
    assert visible(drawn) == ["coco", "coco_rain", "demo.json"]


def copy_of(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "demo")


def test_other_settings_draw_anew_and_leave_other_files(drawn, tmp_path):
    root = copy_of(drawn, tmp_path)
    (root / "mine.txt").write_text("keep", encoding="utf-8")
    demo.ensure_demo(root, num_train=3, num_val=1, size=(96, 64), seed=5)
    assert len(list((root / "coco/train2017").iterdir())) == 3
    with Image.open(next((root / "coco_rain/val2017").iterdir())) as file:
        assert file.size == (96, 64)
    assert visible(root) == ["coco", "coco_rain", "demo.json", "mine.txt"]


@pytest.mark.parametrize("missing", ["", "coco_rain", "coco/annotations/instances_val2017.json"])
def test_what_is_not_complete_is_drawn_again(drawn, tmp_path, missing):
    root = copy_of(drawn, tmp_path)
    (root / "coco/train2017/000000000003.jpg").unlink()
    if not missing:  # killed between two renames
        (root / "demo.json").write_text('{"unfinished": true}')
    else:
        shutil.rmtree(root / missing) if (root / missing).is_dir() else (root / missing).unlink()
    (root / ".building-dead").mkdir()
    demo.ensure_demo(root, **SMALL)
    assert set(fingerprint(root)) == set(fingerprint(drawn))
    path = "coco_rain/train2017/000000000003.jpg"
    assert (root / path).read_bytes() == (drawn / path).read_bytes()
    assert not (root / ".building-dead").exists()


def test_a_copy_without_its_marker_is_somebodys_own(drawn, tmp_path):
    root = copy_of(drawn, tmp_path)
    (root / "demo.json").unlink()
    (root / "coco/train2017/000000000003.jpg").unlink()
    before = fingerprint(root)
    with pytest.raises(UserError, match="demo.json"):
        demo.ensure_demo(root, **SMALL)
    assert fingerprint(root) == before


def test_a_crash_leaves_no_data_set(tmp_path, monkeypatch):
    real, calls = demo.draw_one, []

    def failing(*job):
        calls.append(job)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*job)
    monkeypatch.setattr(demo, "draw_one", failing)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure_demo(tmp_path / "demo", **SMALL)
    assert visible(tmp_path / "demo") == []
    monkeypatch.setattr(demo, "draw_one", real)
    demo.ensure_demo(tmp_path / "demo", num_train=1, num_val=1)
    assert (tmp_path / "demo/demo.json").is_file()


def test_foreign_data_is_never_replaced(tmp_path):
    photo = tmp_path / "coco" / "train2017" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"dear")
    with pytest.raises(UserError, match="coco"):
        demo.ensure_demo(tmp_path, **SMALL)
    assert photo.read_bytes() == b"dear" and not (tmp_path / ".lock").exists()


def test_processes_at_the_same_time(tmp_path):
    root = tmp_path / "demo"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=demo.ensure_demo, args=(root, 4, 2)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert visible(root) == ["coco", "coco_rain", "demo.json"]
    assert len(list((root / "coco/train2017").iterdir())) == 4


def test_many_scenes_are_drawn_by_several_processes(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(demo, "PARALLEL_FROM", 5)
    demo.ensure_demo(tmp_path / "demo", **SMALL)
    for path in fingerprint(drawn):
        assert (tmp_path / "demo" / path).read_bytes() == (drawn / path).read_bytes()
