"""Files are looked at once: what is wrong with them is said, and what was found good is remembered."""

import os

import numpy as np
import pytest
from conftest import write_coco
from PIL import ExifTags, Image, ImageOps

from utils import datasets
from utils.config import UserError
from utils.datasets import image_check, presets


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


@pytest.mark.parametrize(("there", "asked"), [
    ("a.JPG", "a.jpg"), ("a.png", "a.jpg"), ("gru\u0308n.jpg", "gr\u00fcn.jpg")])
def test_a_file_that_is_there_under_another_name_is_named(photos, there, asked):
    """Other capitals, another export's ending, and letters in two parts (macOS), which look the same."""
    photos[0].rename(photos[0].with_name(there))
    if not photos[0].with_name(asked).exists():  # Windows and macOS do not tell capitals
        with pytest.raises(UserError) as caught:
            image_check.check_images([photos[0].with_name(asked), *photos[1:]], "PHOTOS")
        assert ascii(there) in str(caught.value) and "(missing)" in str(caught.value)
    with pytest.raises(UserError) as caught:
        image_check.check_images([photos[0].with_name("b.jpg"), *photos[1:]], "PHOTOS")
    assert "is there as" not in str(caught.value)


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


@pytest.mark.parametrize("error", [PermissionError, RuntimeError])
def test_a_home_folder_that_is_missing_or_closed_stops_nothing(photos, monkeypatch, error):
    def refuse():
        raise error
    monkeypatch.setattr(image_check.system, "cache_folder", refuse)
    image_check.check_images(photos, "PHOTOS")
    photos[1].write_bytes(b"")
    with pytest.raises(UserError, match="1.jpg"):
        image_check.check_images(photos, "PHOTOS")


def test_stricter_rules_look_again(photos, looked_at, monkeypatch):
    image_check.check_images(photos, "PHOTOS")
    monkeypatch.setattr(image_check, "RULES", image_check.RULES + 1)
    image_check.check_images(photos, "PHOTOS")
    assert len(looked_at) == 8


def test_a_photograph_on_its_side_is_told_from_a_wrong_one(photos, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photos[0]).save(photos[0], exif=exif)  # 40 wide, 30 high; upright 30 wide
    with pytest.raises(UserError, match="is 30x40, its annotation says 40x30: it was made of the picture as it is"):
        image_check.check_images(photos[:1], "PHOTOS", [(40, 30)])
    with pytest.raises(UserError, match=r"says 41x30\)"):
        image_check.check_images(photos[:1], "PHOTOS", [(41, 30)])
    image_check.check_images(photos[:2], "PHOTOS", [(30, 40), (40, 30)])
    assert "note: PHOTOS: 1 image(s) are stored turned or mirrored and are read upright" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_and_detection_read_images_upright(tmp_path, orientation):
    """180 degrees and square pictures have the same size either way."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    read = datasets.read_image(tmp_path / "phone.png")
    assert np.array_equal(read.permute(1, 2, 0).numpy(), expected)


def test_a_partner_that_is_stored_turned_is_the_same_scene(photos, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    turned = [path.with_name(f"turned_{path.name}") for path in photos]
    for path, other in zip(photos, turned, strict=True):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.ROTATE_180).save(other, exif=exif)
    image_check.check_images(photos, "PHOTOS", partners=turned)
    assert "look more like another" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [(5, 40), (40, 7), (1, 1), (7, 7)])
def test_images_of_a_few_pixels_are_images(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "small.jpg")
    image_check.check_images([tmp_path / "small.jpg"] * 2, "PHOTOS", partners=[tmp_path / "small.jpg", None])


def test_pairs_of_unequal_sizes_are_found_before_training(photos, tmp_path):
    (tmp_path / "clean").mkdir()
    for path in photos:
        Image.open(path).save(tmp_path / "clean" / path.name)
    Image.new("RGB", (30, 40)).save(tmp_path / "clean" / "2.jpg")
    with pytest.raises(UserError, match=r"photos/2.jpg .is 40x30, its partner .*clean/2.jpg 30x40"):
        datasets.PairedRainDataset(tmp_path / "photos", tmp_path / "clean", presets.evaluation(32))


def test_partners_of_other_scenes_are_noted_at_every_start(photos, tmp_path, capsys):
    for name, order in (("right", (0, 1, 2, 3)), ("wrong", (0, 2, 1, 3))):
        (tmp_path / name).mkdir()
        for path, i in zip(photos, order, strict=True):
            image = Image.open(photos[i])
            image.point([value // 2 for value in range(256)] * 3).save(tmp_path / name / path.name)
    for _ in range(2):
        datasets.PairedRainDataset(tmp_path / "right", tmp_path / "photos", presets.evaluation(32))
        assert capsys.readouterr().out == ""
    for _ in range(2):
        datasets.PairedRainDataset(tmp_path / "wrong", tmp_path / "photos", presets.evaluation(32))
        assert "2 of 4 images look more like another one's partner" in (said := capsys.readouterr().out)
        assert "wrong/1.jpg" in said and "wrong/2.jpg" in said and "3.jpg" not in said


def test_partners_without_rain_and_turned_ones_are_noted(photos, tmp_path, capsys):
    for name, change in (("same", lambda image: image), ("turned", lambda image: image.rotate(180))):
        (tmp_path / name).mkdir()
        for i, path in enumerate(photos):
            column = Image.linear_gradient("L").resize((64, 64)).convert("RGB")  # dark above, as no rain turns a scene
            image = Image.blend(Image.open(path).convert("RGB").resize((64, 64)), column, 0.8)
            image.save(tmp_path / "photos" / f"scene{i}.png")
            change(image).save(tmp_path / name / f"scene{i}.png")
        for path in photos:
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    datasets.PairedRainDataset(tmp_path / "same", tmp_path / "photos", presets.evaluation(32))
    assert "there is no rain in them" in capsys.readouterr().out
    datasets.PairedRainDataset(tmp_path / "turned", tmp_path / "photos", presets.evaluation(32))
    assert "4 of 8 images look more like another one's partner" in capsys.readouterr().out


def test_twins_of_other_scenes_are_noted(tmp_path, capsys):
    write_coco(tmp_path / "clean", splits=("train",))
    write_coco(tmp_path / "other", splits=("train",))
    files = sorted((tmp_path / "other" / "train2017").iterdir())
    for file, content in zip(files, [file.read_bytes() for file in files[1:] + files[:1]], strict=True):
        file.write_bytes(content)  # the next one's picture
    write_coco(tmp_path / "rain", splits=("train",))
    for path in (tmp_path / "rain" / "train2017").iterdir():
        Image.open(path).point([value // 2 for value in range(256)] * 3).save(path)
    for twin, note in (("clean", False), ("other", True)):
        datasets.CocoDetectionDataset(tmp_path / "rain", "train", {0: "person", 1: "car"}, presets.evaluation(32),
                                      constant="COCO_RAIN_DIR", domain="rainy", twin_root=tmp_path / twin,
                                      twin_constant="COCO_DIR")
        assert ("look more like another one's partner" in capsys.readouterr().out) == note
