"""Rain: determinism, strength, and the script that writes a rainy twin of a data set."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, JpegImagePlugin

import make_rain
from utils import config, system
from utils.datasets.samples import read_image
from utils.weather import kinds, rain

ROOT = Path(__file__).resolve().parent.parent


def picture(height=120, width=160, seed=0):
    """Smooth random picture (H, W, 3) uint8."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def psnr(a, b):
    return 10 * np.log10(255.0**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def coco(tmp_path):
    """COCO layout with 20 pictures in two splits: JPEG, PNG, greyscale JPEG."""
    root = tmp_path / "coco"
    for split, count in (("train2017", 14), ("val2017", 6)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(seed=i)).save(root / split / f"{i:012d}.jpg", quality=83, subsampling=1)
    Image.fromarray(picture()).save(root / "val2017" / "lossless.png")
    Image.fromarray(picture()[..., 0]).save(root / "val2017" / "grey.jpg", quality=70)
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text('{"images": []}', encoding="utf-8")
    return root


def make(coco, out, **overrides):
    return make_rain.main(COCO=coco, OUT=out, **{"WORKERS": 1, "INTENSITY": "light", **overrides})


# --- utils/weather/rain.py ----------------------------------------------------


@pytest.mark.parametrize("intensity", rain.INTENSITIES + ("random",))
def test_equal_seed_gives_equal_pixels(intensity):
    image = picture()
    first = rain.add_rain(image, rain.rng_for(1, "a.jpg"), intensity)
    assert np.array_equal(first, rain.add_rain(image, rain.rng_for(1, "a.jpg"), intensity))
    for other in (rain.rng_for(2, "a.jpg"), rain.rng_for(1, "b.jpg")):
        assert not np.array_equal(first, rain.add_rain(image, other, intensity))


def test_generator_does_not_depend_on_the_process():
    """The value is written down: another machine, another PYTHONHASHSEED must give it too."""
    expected = 3659939462
    assert expected == rain.rng_for(7, "000000000139.jpg").integers(2**32)
    code = "from utils.weather import rain; print(rain.rng_for(7, '000000000139.jpg').integers(2**32))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert int(answer.stdout) == expected, answer.stderr


def test_input_is_untouched_and_output_is_new():
    image = picture()
    before = image.copy()
    image.setflags(write=False)
    rainy = rain.add_rain(image, rain.rng_for(0, "x"), "heavy")
    assert np.array_equal(image, before)
    assert rainy.dtype == np.uint8 and rainy.shape == image.shape and not np.shares_memory(rainy, image)
    rainy[:] = 0  # writable


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 5), (33, 97), (96, 96), (61, 640), (500, 40)])
def test_any_size(size):
    for seed in range(4):
        for intensity in rain.INTENSITIES:
            rainy = rain.add_rain(picture(*size), rain.rng_for(seed, "x"), intensity)
            assert rainy.shape == (*size, 3) and rainy.dtype == np.uint8


def test_views_are_accepted():
    image = picture()[::-1, ::2]
    assert np.array_equal(rain.add_rain(image, rain.rng_for(0, "x")), rain.add_rain(image.copy(), rain.rng_for(0, "x")))


@pytest.mark.parametrize("size", [(96, 96), (240, 320)])
def test_light_is_milder_than_medium_is_milder_than_heavy(size):
    def mean_psnr(intensity):
        values = [psnr(rain.add_rain(picture(*size, seed), rain.rng_for(seed, "x"), intensity), picture(*size, seed))
                  for seed in range(20)]
        return np.mean(values)

    light, medium, heavy = (mean_psnr(intensity) for intensity in rain.INTENSITIES)
    assert light > medium + 2 and medium > heavy + 2
    assert light > 20 and heavy > 9  # light is nearly the picture; heavy still shows it


def test_streaks_lean_with_the_angle():
    """On black, rain at angle a correlates along a, not across: structure tensor of the streaks."""
    black = np.zeros((240, 320, 3), np.uint8)
    for angle in (-30.0, 0.0, 30.0):
        p = replace(rain.sample_parameters(rain.rng_for(0, "x"), "medium"), angle=angle, fan=0.0, noise=0.0, veil=0.0,
                    spray=0.0)
        drops = rain.apply_rain(black, p, rain.rng_for(1, "x")).astype(float).mean(axis=2)
        gy, gx = np.gradient(drops)
        # The gradient stands across the streaks; its main axis, from the horizontal, is the streaks' tilt.
        tilt = np.degrees(0.5 * np.arctan2(2 * (gx * gy).mean(), (gx * gx).mean() - (gy * gy).mean()))
        assert abs(tilt - angle) < 12, (tilt, angle)  # thin lines bias np.gradient


def test_streaks_show_on_dark_and_vanish_on_bright():
    p = replace(rain.sample_parameters(rain.rng_for(0, "x"), "heavy"), veil=0.0, spray=0.0, noise=0.0, gain=1.0)
    half = np.zeros((200, 300, 3), np.uint8)
    half[:, 150:] = 225
    rainy = rain.apply_rain(half, p, rain.rng_for(0, "y")).astype(float)
    assert rainy[:, :140].std() > 3 * rainy[:, 160:].std()


def test_random_uses_all_three():
    drawn = {rain.sample_parameters(rain.rng_for(0, str(i))).intensity for i in range(30)}
    assert drawn == set(rain.INTENSITIES)


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), [[0]],
                                 np.zeros((0, 4, 3), np.uint8)])
def test_bad_images_are_refused(bad):
    with pytest.raises(ValueError, match="rain needs"):
        rain.add_rain(bad, rain.rng_for(0, "x"))


def test_bad_intensity_names_the_valid_ones():
    with pytest.raises(ValueError, match="light, medium, heavy"):
        rain.add_rain(picture(), rain.rng_for(0, "x"), "drizzle")


# --- make_rain.py -----------------------------------------------------


def test_a_plain_folder_of_images_will_do(coco, tmp_path):
    make(coco / "val2017", tmp_path / "twin")
    assert sorted(p.name for p in (tmp_path / "twin").iterdir() if p.name != "rain.json") == sorted(
        p.name for p in (coco / "val2017").iterdir())


def test_twin_has_the_same_layout(coco, tmp_path):
    out = tmp_path / "twin"
    report = make(coco, out, INTENSITY="heavy")
    assert report["written"] == 22 and report["kept"] == 0
    assert make_rain.find_images(out) == make_rain.find_images(coco)
    annotations = "annotations/instances_val2017.json"
    assert (out / annotations).read_bytes() == (coco / annotations).read_bytes()
    assert not list(out.rglob(".*"))  # no temporary files
    for path in make_rain.find_images(coco):
        with Image.open(coco / path) as clean, Image.open(out / path) as rainy:
            assert rainy.size == clean.size and rainy.mode == "RGB" and rainy.format == clean.format
    expected = rain.add_rain(read(coco / "val2017/lossless.png"), rain.rng_for(0, "lossless.png"), "heavy")
    assert np.array_equal(read(out / "val2017/lossless.png"), expected)
    # Grey files become RGB without a colour cast from mismatched tables.
    grey = rain.add_rain(read(coco / "val2017/grey.jpg"), rain.rng_for(0, "grey.jpg"), "heavy")
    assert psnr(read(out / "val2017/grey.jpg"), grey) > 25


@pytest.mark.parametrize("kind", ["mist", "fog"])
def test_mist_and_fog_are_drawn_as_trainings_draw_them(coco, tmp_path, kind):
    make_rain.main(demo=True, COCO=coco, OUT=tmp_path / "twin", KIND=kind, WORKERS=1)  # the demo's rain is heavy
    expected = kinds.add_weather(read(coco / "val2017/lossless.png"), rain.rng_for(0, "lossless.png"), kind)
    assert np.array_equal(read(tmp_path / "twin/val2017/lossless.png"), expected)
    assert json.loads((tmp_path / "twin/rain.json").read_text(encoding="utf-8"))["kind"] == kind
    with pytest.raises(config.UserError, match=f"INTENSITY = 'heavy'.*{kind}.*'random'"):
        make(coco, tmp_path / "other", KIND=kind, INTENSITY="heavy")
    assert not (tmp_path / "other").exists()


def test_jpeg_tables_and_sampling_are_kept(coco, tmp_path):
    make(coco, tmp_path / "twin")
    with Image.open(coco / "val2017/000000000001.jpg") as clean, \
            Image.open(tmp_path / "twin/val2017/000000000001.jpg") as rainy:
        assert rainy.quantization == clean.quantization
        assert JpegImagePlugin.get_sampling(rainy) == JpegImagePlugin.get_sampling(clean) == 1


def test_workers_do_not_change_pixels(coco, tmp_path):
    make(coco, tmp_path / "one", WORKERS=1, INTENSITY="random")
    make(coco, tmp_path / "two", WORKERS=2, INTENSITY="random")
    for path in make_rain.find_images(coco):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_restart_keeps_finished_files_and_writes_missing_ones(coco, tmp_path):
    out = tmp_path / "twin"
    make(coco, out)
    files = {path: (out / path).read_bytes() for path in make_rain.find_images(out)}
    missing = sorted(files)[3]
    (out / missing).unlink()
    leftover = out / "val2017" / f".x.jpg.1{make_rain._TEMPORARY}"
    leftover.write_bytes(b"half")
    times = {path: (out / path).stat().st_mtime_ns for path in files if path != missing}
    report = make(coco, out)
    assert report["written"] == 1 and report["kept"] == len(files) - 1
    assert {path: (out / path).stat().st_mtime_ns for path in times} == times
    assert (out / missing).read_bytes() == files[missing]
    assert not leftover.exists()


def test_nothing_half_written_when_encoding_fails(coco, tmp_path, monkeypatch):
    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(config.UserError, match="No space left"):
        make(coco, tmp_path / "twin")
    assert not make_rain.find_images(tmp_path / "twin") and not list((tmp_path / "twin").rglob(".*"))


@pytest.mark.parametrize("change", [{"SEED": 1}, {"INTENSITY": "heavy"}])
def test_other_settings_are_refused(coco, tmp_path, change):
    make(coco, tmp_path / "twin")
    with pytest.raises(config.UserError, match="other settings.*" + next(iter(change)).lower()):
        make(coco, tmp_path / "twin", **change)
    other = coco.rename(tmp_path / "coco2")
    with pytest.raises(config.UserError, match="other settings.*source"):
        make(other, tmp_path / "twin")


@pytest.mark.parametrize("workers", [1, 2])
def test_corrupt_images_are_named_and_the_others_written(coco, tmp_path, workers):
    (coco / "train2017" / "broken.jpg").write_bytes(b"not a picture")
    whole = (coco / "train2017" / "000000000000.jpg").read_bytes()
    (coco / "val2017" / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(config.UserError, match=r"2 image.*broken\.jpg.*cut\.jpg"):
        make(coco, tmp_path / "twin", WORKERS=workers)
    written = make_rain.find_images(tmp_path / "twin")
    assert len(written) == 22 and not any(path.name in ("broken.jpg", "cut.jpg") for path in written)


def test_a_picture_of_a_kind_that_cannot_be_written_is_named_and_the_others_written(tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(scenes / "a.png")
    header = b"8BPS" + (1).to_bytes(2, "big") + bytes(6) + (3).to_bytes(2, "big") + (4).to_bytes(4, "big") * 2
    (scenes / "b.jpg").write_bytes(  # a Photoshop file of 4 x 4 pixels
        header + (8).to_bytes(2, "big") + (3).to_bytes(2, "big") + bytes(12) + bytes(2) + bytes(48))
    with pytest.raises(config.UserError, match=r"1 image.*b\.jpg \(a PSD file, which can be read but not written"):
        make_rain.main(COCO=scenes, OUT=tmp_path / "twin", WORKERS=1)
    assert [path.name for path in make_rain.find_images(tmp_path / "twin")] == ["a.png"]


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7, 8])
def test_rain_falls_down_in_photographs_that_are_stored_turned(tmp_path, number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    for name, picture, options in (("upright", scene, {}), ("turned", system.as_stored(scene, number), {"exif": exif})):
        for folder in (name, f"{name}_rain"):
            (tmp_path / folder).mkdir()
        picture.save(tmp_path / name / "a.png", **options)
        done = make_rain.rain_one((tmp_path / name / "a.png", tmp_path / f"{name}_rain" / "a.png", 0, "heavy"))
        assert done == make_rain.Done()
    assert Image.open(tmp_path / "turned_rain" / "a.png").size == Image.open(tmp_path / "turned" / "a.png").size
    upright, turned = (read_image(tmp_path / f"{name}_rain" / "a.png") for name in ("upright", "turned"))
    assert np.array_equal(upright, turned) and not np.array_equal(upright, read_image(tmp_path / "upright" / "a.png"))


def test_command_line_exit_code(coco, tmp_path):
    (coco / "val2017" / "broken.png").write_bytes(b"")
    command = [sys.executable, str(ROOT / "make_rain.py"), "--coco", str(coco), "--out", str(tmp_path / "twin"),
               "--workers", "2"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1 and "broken.png" in answer.stderr and "Traceback" not in answer.stderr
    assert "22 written" in answer.stdout and answer.stdout.isascii()
    assert json.loads((tmp_path / "twin/rain.json").read_text())["intensity"] == "random"


def test_user_mistakes(coco, tmp_path):
    def refused(match, **overrides):
        with pytest.raises(config.UserError, match=match):
            make_rain.main(**{"COCO": coco, "OUT": tmp_path / "twin", "WORKERS": 1, **overrides})

    refused("COCO .*not a folder.*layout", COCO=tmp_path / "nowhere")
    refused("same folder", OUT=coco)
    refused("lies inside", OUT=coco / "rainy")
    make_rain.main(COCO=coco, OUT=tmp_path / "once", WORKERS=1)
    refused("is rain that make_rain.py wrote", COCO=tmp_path / "once")
    refused("light, medium, heavy", INTENSITY="strong")
    refused("WORKERS", WORKERS=-1)
    (tmp_path / "file").write_text("x")
    refused("cannot write to OUT", OUT=tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"x")
    refused("no rain.json", OUT=tmp_path / "photos")
    assert (tmp_path / "photos" / "mine.jpg").read_bytes() == b"x"
    empty = tmp_path / "empty"
    (empty / "val2017").mkdir(parents=True)
    refused("no images", COCO=empty)
    (empty / "annotations").mkdir()
    refused("annotations folder without", COCO=empty)
    (empty / "annotations" / "a.json").write_text("{}")
    refused("no images", COCO=empty)
