"""Windshield rain: lenses, determinism, strength, and make_rain.py --kind windshield."""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import make_rain
from utils import config
from utils.weather import glass_drops, rain, windshield
from utils.weather.glass_drops import EDGE, Wiper

ROOT = Path(__file__).resolve().parent.parent


def picture(height=120, width=160, seed=0):
    """Smooth random picture (H, W, 3) uint8."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def one_drop(radius, width=160, height=120, taper=0.0):
    """place_drops' array (6, 1) with a drop in the middle."""
    return np.array([[width / 2], [height / 2], [radius], [1.0], [0.0], [taper]], dtype=np.float32)


def still(intensity="medium", seed=0, **changes):
    """Parameters without film and noise, sharp: what changes is drops."""
    p = windshield.sample_parameters(rain.rng_for(seed, "x"), intensity)
    return replace(p, film=0.0, soften=0.0, warp=0.0, noise=0.0, scene_blur=0.0, **{"defocus": 0.0, **changes})


@pytest.fixture
def clear(tmp_path):
    """Nested folder of 20 pictures without annotations: JPEG, PNG, greyscale JPEG."""
    root = tmp_path / "clear"
    (root / "night" / "a").mkdir(parents=True)
    for i in range(18):
        folder = root / "night" / "a" if i % 3 == 0 else root
        Image.fromarray(picture(90, 120, seed=i)).save(folder / f"{i:04d}.jpg", quality=83, subsampling=1)
    Image.fromarray(picture()).save(root / "lossless.png")
    Image.fromarray(picture()[..., 0]).save(root / "grey.jpg", quality=70)
    return root


def make(clear, out, **overrides):
    return make_rain.main(KIND="windshield", CLEAR=clear, OUT=out, **{"WORKERS": 1, **overrides})


# --- the picture ------------------------------------------------------


@pytest.mark.parametrize("function", [windshield.add_windshield_rain, windshield.add_drops])
@pytest.mark.parametrize("intensity", windshield.INTENSITIES + ("random",))
def test_equal_seed_gives_equal_pixels(function, intensity):
    image = picture()
    before = image.copy()
    image.setflags(write=False)
    first = function(image, rain.rng_for(1, "a.jpg"), intensity)
    assert first.dtype == np.uint8 and first.shape == image.shape and first.flags.writeable
    assert np.array_equal(first, function(image, rain.rng_for(1, "a.jpg"), intensity))
    assert np.array_equal(image, before)
    for other in (rain.rng_for(2, "a.jpg"), rain.rng_for(1, "b.jpg")):
        assert not np.array_equal(first, function(image, other, intensity))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (7, 5), (33, 97), (160, 160), (61, 640), (500, 40)])
def test_any_size(size):
    for seed in range(4):
        for intensity in windshield.INTENSITIES:
            image = picture(*size)
            rainy = windshield.add_windshield_rain(image, rain.rng_for(seed, "x"), intensity)
            drops, mask = windshield.add_drops_with_mask(image, rain.rng_for(seed, "x"), intensity)
            assert rainy.shape == drops.shape == (*size, 3) and rainy.dtype == drops.dtype == np.uint8
            assert mask.shape == size and mask.dtype == np.uint8


def test_views_are_accepted():
    image = picture()[::-1, ::2]
    assert np.array_equal(windshield.add_drops(image, rain.rng_for(0, "x")),
                          windshield.add_drops(image.copy(), rain.rng_for(0, "x")))


@pytest.mark.parametrize("size", [(120, 160), (360, 480)])
def test_heavier_covers_more_and_changes_more(size):
    def mean(intensity):
        covered, changed = [], []
        for seed in range(12):
            image = picture(*size, seed)
            drops, mask = windshield.add_drops_with_mask(image, rain.rng_for(seed, "x"), intensity)
            covered.append((mask > 40).mean())
            changed.append(abs(drops.astype(float) - image).mean())
        return np.mean(covered), np.mean(changed)

    light, medium, heavy = (mean(intensity) for intensity in windshield.INTENSITIES)
    assert 0.01 < light[0] and 1.5 * light[0] < medium[0] and 1.5 * medium[0] < heavy[0] < 0.7
    assert 1.3 * light[1] < medium[1] and 1.3 * medium[1] < heavy[1]


def test_the_mask_is_where_the_picture_changes():
    image = picture(240, 320)
    out, mask = windshield.apply_drops(image, still(), rain.rng_for(0, "y"))
    changed = (out != image).any(axis=2)
    assert not changed[mask == 0].any() and changed[mask == 255].mean() > 0.9
    assert (mask == 255).sum() > 100


def test_streaks_come_with_windshield_rain_only(monkeypatch):
    """On a flat grey scene: between the drops add_drops leaves it flat, add_windshield_rain draws thin lines."""
    grey = np.full((240, 320, 3), 60, np.uint8)
    drops, mask = windshield.apply_drops(grey, still(defocus=0.01), rain.rng_for(3, "y"))
    assert abs(drops[mask == 0].astype(int) - 60).max() <= 1
    monkeypatch.setattr(windshield, "apply_drops", lambda image, p, rng: (image, None))  # what lies behind the pane
    behind = np.stack([windshield.add_windshield_rain(grey, rain.rng_for(seed, "x"), "heavy")[..., 1]
                       for seed in range(6)])
    across, along = (abs(np.diff(behind.astype(float), axis=axis)).mean() for axis in (2, 1))
    assert across > 0.4 and across > 1.3 * along


def test_a_drop_shows_the_scene_upside_down():
    image = np.zeros((120, 160, 3), np.uint8)
    image[:60] = (90, 150, 230)  # sky above, dark road below
    p = still(rim=0.0, glow=0.0, highlight=0.0, bend=0.35)
    lens = np.asarray(windshield._lenses(Image.fromarray(image), one_drop(20), p, np.full(3, 128, np.float32)))
    upper, lower = lens[46:52, 78:82, 2].mean(), lens[69:75, 78:82, 2].mean()
    assert lower > 200 and upper < 30
    image = np.zeros((120, 160, 3), np.uint8)
    image[:, :80] = 230  # left and right change places too
    lens = np.asarray(windshield._lenses(Image.fromarray(image), one_drop(20), p, np.full(3, 128, np.float32)))
    assert lens[58:62, 88:94, 0].mean() > 200 and lens[58:62, 66:72, 0].mean() < 30


def test_the_rim_is_dark():
    white = Image.fromarray(np.full((120, 160, 3), 200, np.uint8))
    p = still(rim=0.8, glow=0.0, highlight=0.0)
    lens = np.asarray(windshield._lenses(white, one_drop(25), p, np.full(3, 200, np.float32)))[60, :, 0].astype(int)
    assert lens[80] > 190 and lens[80 + 23] < 120 and lens[80 - 23] < 120


def test_defocus_keeps_the_light_and_softens_the_edge():
    layer = np.zeros((90, 130, 4), np.uint8)
    layer[30:60, 50:80] = 200
    for radius in (0.3, 1.2, 2.0, 5.0, 11.0):
        soft = np.asarray(windshield._disc_blur(Image.fromarray(layer, "RGBa"), radius)).astype(float)
        assert soft.shape == layer.shape
        assert abs(soft.sum() / layer.sum() - 1) < 0.02
        reach = np.flatnonzero(soft[45, :, 3] > 3)
        assert abs((50 - reach[0]) - radius) < 1.5 + 0.5 * radius  # a disc ends; a Gaussian of that size would not


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), [[0]],
                                 np.zeros((0, 4, 3), np.uint8)])
def test_bad_images_are_refused(bad):
    for function in (windshield.add_windshield_rain, windshield.add_drops):
        with pytest.raises(ValueError, match="rain needs"):
            function(bad, rain.rng_for(0, "x"))


def test_bad_intensity_names_the_valid_ones():
    with pytest.raises(ValueError, match="light, medium, heavy"):
        windshield.add_drops(picture(), rain.rng_for(0, "x"), "drizzle")


# --- where the water is -----------------------------------------------


def test_a_lone_drop_has_its_radius_and_neighbours_merge():
    field, radius = glass_drops.water_field(one_drop(20), 160, 120)
    water = field > EDGE**2
    assert abs(water.sum() / (np.pi * 20**2) - 1) < 0.03
    assert np.allclose(radius[water], 20 * glass_drops.SUPPORT)
    pair = np.repeat(one_drop(20), 2, axis=1)
    pair[0] += (-21, 21)  # two pixels apart as discs: a neck joins them
    field, _ = glass_drops.water_field(pair, 160, 120)
    assert (field[60, 60:100] > EDGE**2).all()


def test_a_drop_inside_a_larger_one_is_part_of_it():
    field, _ = glass_drops.water_field(one_drop(20), 160, 120)
    inside = np.concatenate([one_drop(20), one_drop(1)], axis=1)
    assert np.array_equal(field, glass_drops.water_field(inside, 160, 120)[0])


def test_wiped_arcs_hold_less_water():
    wiper = Wiper(0.5, 1.05, 0.2, 0.9, -60.0, 60.0)
    density = np.full((4, 5), 0.7, np.float32)
    p = windshield.sample_parameters(rain.rng_for(0, "x"), "heavy").layout
    counts = []
    for wipers in ((), (wiper,)):
        layout = replace(p, wipers=wipers, residue=0.1, trails=0.0, clustering=0.0)
        drops = glass_drops.place_drops(layout, 640, 480, density, rain.rng_for(1, "y"))
        distance, angle = glass_drops.polar(wiper, drops[0], drops[1], 640, 480)
        clear_of_edge = (distance > 0.25) & (distance < 0.85) & (abs(angle) < 55)
        counts.append((drops[2, clear_of_edge] > 3).sum())
    assert counts[1] < 0.4 * counts[0] and counts[0] > 50


def test_trails_lie_along_the_flow():
    p = windshield.sample_parameters(rain.rng_for(0, "x"), "heavy").layout
    for flow in (-30.0, 0.0, 30.0):
        trail = glass_drops._trail(replace(p, flow=flow), 640, 480, rain.rng_for(4, "y"))
        dx, dy = trail[:2, 0] - trail[:2, -1]  # from the oldest bead to the head
        assert abs(np.degrees(np.arctan2(dx, dy)) - flow) < 20
        assert trail[2, 0] > 1.3 * trail[2, 1:].max()  # the head is the largest


# --- make_rain.py -----------------------------------------------------


def test_twin_of_nested_folders(clear, tmp_path):
    out = tmp_path / "rainy"
    report = make(clear, out, INTENSITY="medium", SEED=3)
    assert report["written"] == 20 and make_rain.find_images(out) == make_rain.find_images(clear)
    expected = windshield.add_windshield_rain(np.asarray(Image.open(clear / "lossless.png")),
                                              rain.rng_for(3, "lossless.png"), "medium")
    assert np.array_equal(np.asarray(Image.open(out / "lossless.png")), expected)
    with Image.open(clear / "0001.jpg") as clean, Image.open(out / "0001.jpg") as rainy:
        assert rainy.quantization == clean.quantization and rainy.size == clean.size
    record = json.loads((out / "rain.json").read_text())
    assert record == {"kind": "windshield", "source": clear.resolve().as_posix(), "seed": 3, "intensity": "medium",
                      "version": windshield.VERSION}
    assert not (out / "annotations").exists() and not list(out.rglob(".*"))


def test_annotations_are_copied_if_there(clear, tmp_path):
    (clear / "annotations").mkdir()
    (clear / "annotations" / "a.json").write_text("{}")
    make(clear, tmp_path / "rainy")
    assert (tmp_path / "rainy" / "annotations" / "a.json").read_text() == "{}"


def test_restart_keeps_finished_files(clear, tmp_path):
    out = tmp_path / "rainy"
    make(clear, out)
    before = {path: (out / path).stat().st_mtime_ns for path in make_rain.find_images(out)}
    bytes_before = (out / "0004.jpg").read_bytes()
    (out / "0004.jpg").unlink()
    report = make(clear, out)
    assert report["written"] == 1 and report["kept"] == 19
    assert (out / "0004.jpg").read_bytes() == bytes_before
    assert all((out / path).stat().st_mtime_ns == time for path, time in before.items() if path.name != "0004.jpg")


def test_other_settings_and_the_other_kind_are_refused(clear, tmp_path):
    out = tmp_path / "rainy"
    make(clear, out)
    for change in ({"SEED": 1}, {"INTENSITY": "heavy"}):
        with pytest.raises(config.UserError, match="other settings.*" + next(iter(change)).lower()):
            make(clear, out, **change)
    with pytest.raises(config.UserError, match="other settings.*kind 'windshield', now 'streaks'"):
        make_rain.main(COCO=clear, OUT=out, WORKERS=1)


def test_a_twin_without_a_kind_holds_streaks(clear, tmp_path):
    """rain.json of earlier versions has no kind."""
    out = tmp_path / "old"
    out.mkdir()
    record = {"source": clear.resolve().as_posix(), "seed": 0, "intensity": "random", "version": rain.VERSION}
    (out / "rain.json").write_text(json.dumps(record))
    assert make_rain.main(COCO=clear, OUT=out, WORKERS=1)["written"] == 20
    with pytest.raises(config.UserError, match="kind 'streaks', now 'windshield'"):
        make(clear, out)


def test_spawned_workers_write_the_same_files(clear, tmp_path, monkeypatch):
    make(clear, tmp_path / "one")
    spawn = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    monkeypatch.setattr(make_rain, "ProcessPoolExecutor", spawn)
    make(clear, tmp_path / "two", WORKERS=2)
    for path in make_rain.find_images(clear):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_user_mistakes(clear, tmp_path):
    def refused(match, **overrides):
        with pytest.raises(config.UserError, match=match):
            make_rain.main(**{"KIND": "windshield", "CLEAR": clear, "OUT": tmp_path / "x", "WORKERS": 1, **overrides})

    refused("KIND = 'hail'.*streaks, mist, fog, windshield", KIND="hail")
    refused("CLEAR .*not a folder.*images in <CLEAR>.*--clear", CLEAR=tmp_path / "nowhere")
    refused("OUT and CLEAR are the same", OUT=clear)
    refused("inside CLEAR", OUT=clear / "rainy")
    refused("light, medium, heavy", INTENSITY="strong")
    (tmp_path / "empty").mkdir()
    refused("CLEAR .*no images", CLEAR=tmp_path / "empty")


def test_command_line(clear, tmp_path):
    (clear / "broken.png").write_bytes(b"")
    command = [sys.executable, str(ROOT / "make_rain.py"), "--kind", "windshield", "--clear", str(clear), "--workers",
               "1"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert answer.returncode == 1 and "broken.png" in answer.stderr and "Traceback" not in answer.stderr
    assert "20 written" in answer.stdout
    assert (tmp_path / "data" / "windshield_rainy_v40" / "rain.json").is_file()  # OUT was not given
