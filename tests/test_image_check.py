"""Files are looked at once: what is wrong with them is said, and what was found good is remembered."""

import os

import numpy as np
import pytest
from PIL import ExifTags, Image

from utils import datasets, image_check, presets
from utils.config import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Four JPEGs of 40 x 30 pixels, in a world where four images are many and the cache folder is empty."""
    monkeypatch.setenv("RAINSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_check, "REMEMBERED", 4)
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i}.jpg" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def looked_at(monkeypatch):
    """The files that are opened, as they are."""
    names, look = [], image_check._problem
    monkeypatch.setattr(image_check, "_problem", lambda path, *asked: names.append(path.name) or look(path, *asked))
    return names


def test_good_images_are_not_looked_at_twice(photos, looked_at):
    image_check.check_images(photos, "PHOTOS")
    assert sorted(looked_at) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    image_check.check_images(photos, "PHOTOS")
    assert len(looked_at) == 4


def test_a_changed_file_another_set_or_another_question_is_a_new_check(photos, looked_at):
    image_check.check_images(photos, "PHOTOS")
    content = photos[2].read_bytes()
    photos[2].write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="2.jpg"):
        image_check.check_images(photos, "PHOTOS")
    with pytest.raises(UserError, match="2.jpg"):  # a failure is never remembered
        image_check.check_images(photos, "PHOTOS")
    photos[2].write_bytes(content)
    os.utime(photos[2], ns=(1, 1))
    looked_at.clear()
    image_check.check_images(photos, "PHOTOS")
    assert len(looked_at) == 4
    with pytest.raises(UserError, match="0.jpg .is 40x30, its annotation says 30x30"):
        image_check.check_images(photos, "PHOTOS", [(30, 30), *[(40, 30)] * 3])
    photos[3].unlink()
    with pytest.raises(UserError, match="3.jpg .missing"):
        image_check.check_images(photos, "PHOTOS")


def test_few_images_are_always_looked_at_and_leave_nothing_behind(photos, looked_at, tmp_path):
    for _ in range(2):
        image_check.check_images(photos[:3], "PHOTOS")
    assert len(looked_at) == 6 and not (tmp_path / "cache").exists()


def test_a_cache_folder_that_cannot_be_written_stops_nothing(photos, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    image_check.check_images(photos, "PHOTOS")


def test_a_photograph_on_its_side_is_told_from_a_wrong_one(photos):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photos[0]).save(photos[0], exif=exif)
    with pytest.raises(UserError, match="says 30x40: it lies on its side, as its EXIF orientation says"):
        image_check.check_images(photos[:1], "PHOTOS", [(30, 40)])
    with pytest.raises(UserError, match=r"says 30x41\)"):
        image_check.check_images(photos[:1], "PHOTOS", [(30, 41)])


def test_pairs_of_unequal_sizes_are_found_before_training(photos, tmp_path):
    (tmp_path / "clean").mkdir()
    for path in photos:
        Image.open(path).save(tmp_path / "clean" / path.name)
    Image.new("RGB", (30, 40)).save(tmp_path / "clean" / "2.jpg")
    with pytest.raises(UserError, match=r"photos/2.jpg .is 40x30, its partner .*clean/2.jpg 30x40"):
        datasets.PairedRainDataset(tmp_path / "photos", tmp_path / "clean", presets.evaluation(32))
