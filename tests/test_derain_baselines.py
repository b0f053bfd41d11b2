"""The comparison of de-rainers: test sets by layout, protocols against scikit-image, absent and foreign methods."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_unet import picture, trained

import Eval_derain_baselines as script
import make_rain
from utils import memory
from utils.config import UserError
from utils.datasets import derain_sets
from utils.evaluation import derain_report, image_quality
from utils.networks.derainers import NETWORKS


def pixels(seed, height=40, width=48):
    return (picture(height, width, seed)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def wet(clean):
    """Vertical streaks."""
    found = clean.astype(int)
    found[:, ::6] += 60
    return found.clip(0, 255).astype(np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


# ---- layouts -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ours": ["rainy/{n}.png clean/{n}.png"], "windshield": ["windshield_rainy_v40/drive_{n}.jpg clear/drive_{n}.png"],
    "Rain100L": ["rainy/rain-00{n}.png norain-00{n}.png"], "Rain100H": ["rain/rain-00{n}.png norain/norain-00{n}.png"],
    "Rain200L": ["rain/{n}x2.png norain/{n}.png"], "SPA": ["rain/scene{n}_rain.png gt/scene{n}gt.png"],
    "SPA-plain": ["rain/scene{n}.png gt/scene{n}.png"], "RainDrop": ["data/{n}_rain.png gt/{n}_clean.png"],
    "Rain1400": ["rainy_image/90{n}_1.jpg ground_truth/90{n}.jpg", "rainy_image/90{n}_14.jpg ground_truth/90{n}.jpg"],
    "RainDS": ["raindrop/rd-{n}.png gt/norain-{n}.png", "rainstreak/rs-{n}.png gt/norain-{n}.png",
               "rainstreak_raindrop/rd-rs-{n}.png gt/norain-{n}.png"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_known_by_their_layout(layout, tmp_path):
    wanted = {}
    for n in (1, 2, 3):
        for line in LAYOUTS[layout]:
            rainy, clean = (tmp_path / text for text in line.format(n=n).split())
            write(clean, pixels(n))
            write(rainy, wet(pixels(n)))
            wanted[rainy] = clean
    found, notes = derain_sets.find_pairs(tmp_path)
    assert {pair.rainy: pair.clean for pair in found.values()} == wanted and notes == []
    for pair in found.values():
        assert pair.read()[0].shape == pair.read()[1].shape == (3, 40, 48)


@pytest.mark.parametrize("side", ["left", "right"])
def test_wide_files_are_halved_and_the_rainy_half_is_found(side, tmp_path):
    for n in range(4):
        both = [pixels(n, 40, 60), wet(pixels(n, 40, 60))]
        write(tmp_path / f"{n}.png", np.concatenate(both if side == "right" else both[::-1], 1))
    found, notes = derain_sets.find_pairs(tmp_path)
    assert len(found) == 4 and side in notes[0]
    rainy, clean = found["0"].read()
    assert np.array_equal(clean.permute(1, 2, 0).numpy(), pixels(0, 40, 60)) and not torch.equal(rainy, clean)


def test_test_sets_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match="TEST_SETS.*nothing.*does not exist"):
        derain_sets.find_pairs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no known test set"):
        derain_sets.find_pairs(tmp_path / "empty")
    write(tmp_path / "set" / "rainy" / "a.png", pixels(0))
    write(tmp_path / "set" / "clean" / "b.png", pixels(0))
    with pytest.raises(UserError, match="no clean partner.*a.png"):
        derain_sets.find_pairs(tmp_path / "set")


def test_a_test_set_that_is_ambiguous_is_refused(tmp_path):
    for folder in ("rainy", "clean"):
        write(tmp_path / folder / "a.png", pixels(0))
    for folder, other in (("rain", "rainy"), ("gt", "clean")):
        write(tmp_path / folder / "a.png", pixels(0))
        with pytest.raises(UserError, match=f"TEST_SETS.*{other}, {folder}|TEST_SETS.*{folder}, {other}"):
            derain_sets.find_pairs(tmp_path)
        (tmp_path / folder / "a.png").unlink()
        (tmp_path / folder).rmdir()
    write(tmp_path / "rainy" / "a.jpg", pixels(0))
    with pytest.raises(UserError, match="a.jpg and a.png share a name"):
        derain_sets.find_pairs(tmp_path)


def test_photographs_are_no_wide_pairs(tmp_path):
    for n in range(4):
        write(tmp_path / f"{n}.png", pixels(n, 90, 160))
    with pytest.raises(UserError, match="no known test set"):
        derain_sets.find_pairs(tmp_path)


def test_only_rain1400_names_end_in_a_number_of_the_rain(tmp_path):
    write(tmp_path / "rainy" / "drive07_1.png", pixels(0))
    write(tmp_path / "clean" / "drive07.png", pixels(0))
    with pytest.raises(UserError, match="no clean partner.*drive07_1"):
        derain_sets.find_pairs(tmp_path)


def test_what_is_wrong_with_files_is_found_at_once(tmp_path):
    for folder in ("rainy", "clean"):
        for n in (0, 1):
            write(tmp_path / folder / f"{n}.png", pixels(n))
    write(tmp_path / "clean" / "2.png", pixels(2))
    assert "1 clean image(s)" in derain_sets.find_pairs(tmp_path)[1][0]
    whole = (tmp_path / "clean" / "1.png").read_bytes()
    for content, words in ((whole[:200], "1.png"), (b"", "1.png")):
        (tmp_path / "clean" / "1.png").write_bytes(content)
        with pytest.raises(UserError, match=f"TEST_SETS.*{words}"):
            derain_sets.find_pairs(tmp_path)
    write(tmp_path / "clean" / "1.png", pixels(1, 30, 30))
    with pytest.raises(UserError, match="48x40.*30x30"):
        derain_sets.find_pairs(tmp_path)
    for folder in ("rainy", "clean"):
        write(tmp_path / folder / "1.png", pixels(1, 10, 30))
    with pytest.raises(UserError, match="TEST_SETS.*1.png.*11 pixels"):
        derain_sets.find_pairs(tmp_path)


def test_greyscale_images_are_read_as_colour_and_sixteen_bits_are_refused(tmp_path):
    for folder in ("rainy", "clean"):
        write(tmp_path / folder / "a.png", pixels(0)[..., 0])
    rainy, clean = derain_sets.find_pairs(tmp_path)[0]["a"].read()
    assert rainy.shape == (3, 40, 48) and torch.equal(clean[0], clean[2])
    write(tmp_path / "rainy" / "a.png", pixels(0)[..., 0].astype(np.uint16) * 256)
    with pytest.raises(UserError, match="TEST_SETS.*rainy/a.png.*16"):
        derain_sets.find_pairs(tmp_path)


# ---- protocols -----------------------------------------------------------------------------------------------------

def test_protocols_against_scikit_image():
    """PReNet: cut to 8 bits, Y as it is; MPRNet, Restormer: rounded, Y rounded; RGB."""
    image, target = picture(60, 70, 1), (picture(60, 70, 2) * 255).round() / 255
    found = image_quality.quality_by_protocol(image, target)

    def luma(array):
        return array.astype(float) @ np.array([65.481, 128.553, 24.966]) / 255 + 16
    cut, rounded, truth = ((values * 255)[0].permute(1, 2, 0).numpy() for values in (image, image, target))
    cut, rounded, truth = np.floor(cut), np.round(rounded), np.round(truth)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}

    def ssim(first, second, **more):
        _, full = structural_similarity(first, second, full=True, **settings, **more)
        return full[5:-5, 5:-5].mean()  # 'valid': windows inside of the image
    for end, y, y_truth in (("y", luma(cut), luma(truth)), ("y8", luma(rounded).round(), luma(truth).round())):
        assert abs(found[f"psnr_{end}"].item() - peak_signal_noise_ratio(y_truth, y, data_range=255)) < 1e-3
        assert abs(found[f"ssim_{end}"].item() - ssim(y_truth, y)) < 1e-4
    assert abs(found["psnr"].item() - peak_signal_noise_ratio(truth, rounded, data_range=255)) < 1e-3
    assert abs(found["ssim"].item() - ssim(truth, rounded, channel_axis=-1)) < 1e-4


def test_images_that_are_8_bits_already_lose_nothing_when_cut():
    image = (torch.arange(256.0).repeat(3, 16, 1) / 255)[None]
    assert image_quality.quality_by_protocol(image, image)["psnr_y"].item() > 100


def test_the_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = image_quality.bootstrap_interval(rng.normal(30, 2, 40), resamples=500, seed=seed)
        covered += low < 30 < high
    assert 88 <= covered <= 100
    assert image_quality.bootstrap_interval([1.0]) == (None, None)


# ---- the script ----------------------------------------------------------------------------------------------------

@pytest.fixture
def settings(tmp_path):
    for n in range(4):
        write(tmp_path / "Rain100L" / "test" / "rainy" / f"{n}.png", wet(pixels(n)))
        write(tmp_path / "Rain100L" / "test" / "clean" / f"{n}.png", pixels(n))
        write(tmp_path / "others" / f"{n}.png", pixels(n) // 2 * 2)
    model = trained("unet", 4)
    torch.save({"model": model.state_dict(), "model_args": model.model_args}, tmp_path / "best.pt")
    torch.save(NETWORKS["prn_r"].build().state_dict(), tmp_path / "prn_r.pth")
    return {"TEST_SETS": (str(tmp_path / "Rain100L" / "test"),), "LATENCY_SIZE": 32, "CROP": 16, "PICTURES": 2,
            "MODELS": {"U-Net": ("unet", str(tmp_path / "best.pt")), "PRN": ("prn_r", str(tmp_path / "prn_r.pth")),
                       "PReNet": ("prenet", str(tmp_path / "none.pth"))},
            "RESULTS_DIRS": (f"Theirs={tmp_path / 'others'}",), "OUTPUT_DIR": str(tmp_path / "out")}


def test_a_comparison(settings, tmp_path, capsys):
    result = script.main(**settings, REAL_DIR=str(tmp_path / "others"))
    rows = {row["method"]: row for row in result["pairs"]}
    assert list(rows) == ["rainy input", "U-Net", "PRN", "Theirs", "PReNet"]
    assert rows["PReNet"]["count"] == 0 and "csdwren/PReNet" in rows["PReNet"]["published"]
    assert rows["Theirs"]["psnr_y"] > 40 > rows["rainy input"]["psnr_y"]
    assert rows["rainy input"]["psnr_y_low"] < rows["rainy input"]["psnr_y"] < rows["rainy input"]["psnr_y_high"]
    assert result["costs"]["PRN"]["parameters"] == 21_123 and result["costs"]["PRN"]["GMAC"] > 0
    out, text = tmp_path / "out", capsys.readouterr().out
    assert "no row 'PReNet'" in text and "Rain100L" in text
    with open(out / "results.csv", encoding="utf-8") as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(rows)
    assert (out / "results.md").read_text(encoding="utf-8").count("\n") == 7
    saved = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(saved["results"]["images"]["Rain100L"]["U-Net"]["psnr_y"]) == 4
    for name in ("crops.png", "real_rain.png", "latency_quality.png"):
        assert Image.open(out / name).width > 50


def test_one_method_alone_and_images_without_a_model(settings):
    one = script.main(**settings | {"RESULTS_DIRS": (), "MODELS": {"U-Net": settings["MODELS"]["U-Net"]}})
    assert [row["method"] for row in one["pairs"]] == ["rainy input", "U-Net"]
    none = script.main(**settings | {"MODELS": {}})
    assert [row["method"] for row in none["pairs"]] == ["rainy input", "Theirs"]


def test_files_are_checked_before_anything_is_computed(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "costs", lambda *_: pytest.fail("the long work began"))
    test, others = tmp_path / "Rain100L" / "test", str(tmp_path / "others")
    for values, words in (
            ({"REAL_DIR": str(tmp_path / "rael")}, "REAL_DIR.*rael"),
            ({"LABELED_RAIN_DIR": str(tmp_path / "labbeled"), "RTDETR_MODEL_NAME": "./assets/demo/rtdetr"},
             "LABELED_RAIN_DIR.*labbeled"),
            ({"LABELED_RAIN_DIR": others, "RTDETR_MODEL_NAME": f"{others}/rt-detr"}, "RTDETR_MODEL_NAME.*rt-detr"),
            ({"OUTPUT_DIR": str(test / "rainy" / "out")}, "OUTPUT_DIR.*TEST_SETS"),
            ({"OUTPUT_DIR": others, "REAL_DIR": others}, "OUTPUT_DIR.*REAL_DIR"),
            ({"RESULTS_DIRS": (f"Theirs={test / 'clean'}",)}, "RESULTS_DIRS.*test set")):
        with pytest.raises(UserError, match=words):
            script.main(**settings | values)
    write(tmp_path / "others" / "3.png", pixels(3, 20, 20))
    with pytest.raises(UserError, match="3.png has another size"):
        script.main(**settings)


def test_results_of_equal_names_are_not_counted_twice(settings, tmp_path):
    root = tmp_path / "RainDS"
    for kind in ("raindrop", "rainstreak"):
        write(root / kind / "1.png", wet(pixels(1)))
    write(root / "gt" / "1.png", pixels(1))
    write(tmp_path / "flat" / "1.png", pixels(1))
    cfg = settings | {"TEST_SETS": (str(root),), "RESULTS_DIRS": (f"Theirs={tmp_path / 'flat'}",), "MODELS": {}}
    with pytest.raises(UserError, match="RESULTS_DIRS.*no image for raindrop/1, rainstreak/1"):
        script.main(**cfg)
    for kind in ("raindrop", "rainstreak"):
        write(tmp_path / "flat" / kind / "1.png", pixels(1))
    assert script.main(**cfg)["pairs"][1]["count"] == 2


def test_figures_that_cannot_be_are_noted(settings, tmp_path, capsys):
    for n in range(4):
        write(tmp_path / "others" / f"{n}.png", pixels(n))
        write(tmp_path / "worse" / f"{n}.png", 255 - pixels(n))
    others = (f"Same={tmp_path / 'others'}", f"Worse={tmp_path / 'worse'}")
    script.main(**settings | {"MODELS": {}, "RESULTS_DIRS": others})
    text = capsys.readouterr().out
    assert "'Same' equals the clean images" in text and "'Worse' is further from the clean images" in text
    assert "'Worse' equals" not in text and "'Same' is further" not in text


def test_windshield_pairs_are_told_apart_by_their_rain(settings, tmp_path):
    for n in range(12):
        write(tmp_path / "panes" / "clear" / f"{n}.png", pixels(n, 64, 64))
    rainy = tmp_path / "panes" / "rainy"
    make_rain.main(KIND="windshield", CLEAR=str(tmp_path / "panes" / "clear"), OUT=str(rainy))
    result = script.main(**settings | {"TEST_SETS": (str(tmp_path / "panes"),), "RESULTS_DIRS": ()})
    rows = {row["method"]: row for row in result["intensities"]}
    assert list(rows) == ["rainy input", "U-Net", "PRN"]
    assert rows["rainy input"]["light"] > rows["rainy input"]["heavy"]


def test_memory_of_a_call_counts_what_lives_at_once():
    images = torch.rand(1, 3, 100, 100)

    class Two(torch.nn.Module):
        def forward(self, x):
            return ((x * 2) + 1) * 3  # never more than two of them

    class Held(torch.nn.Module):
        def forward(self, x):
            part = (x * 2)[..., :5]  # a view holds all of it
            return part, x + 1, x + 2
    assert memory.peak_gigabytes(Two(), images) * 1e9 == 2 * images.nbytes
    assert memory.peak_gigabytes(Held(), images) * 1e9 == 3 * images.nbytes
    layer = torch.nn.Conv2d(3, 3, 1)
    assert memory.peak_gigabytes(layer, images) * 1e9 >= images.nbytes + 12 * 4


def test_published_figures_belong_to_network_and_set():
    assert derain_report.published("prenet", "Rain100L").startswith("37.48")
    assert derain_report.published("prenet", "mine") is None
    assert derain_report.published(None, "Rain100L") is None


def test_only_pairs_that_nothing_was_trained_on(settings, tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["0", "1"], "val": ["2"], "test": []}), encoding="utf-8")
    assert {row["count"] for row in script.main(**settings, SPLITS_FILE=str(splits))["pairs"]} == {1, 0}
    splits.write_text(json.dumps({"train": ["x"], "val": ["y"]}), encoding="utf-8")
    with pytest.raises(UserError, match="SPLITS_FILE.*names no pair of TEST_SETS"):
        script.main(**settings, SPLITS_FILE=str(splits))
    splits.write_text(json.dumps({"train": list("0123"), "val": []}), encoding="utf-8")
    with pytest.raises(UserError, match="SPLITS_FILE.*trained on"):
        script.main(**settings, SPLITS_FILE=str(splits))


@pytest.mark.parametrize("values, words", [
    ({"MODELS": {"A": "prenet"}}, "MODELS\\['A'\\]"), ({"MODELS": {"A": ("prenext", "x")}}, "prenext"),
    ({"MODELS": {1: ("prenet", "x")}}, "MODELS.*1"), ({"MODELS": {" ": ("prenet", "x")}}, "MODELS"),
    ({"RESULTS_DIRS": ("others",)}, "NAME=FOLDER"), ({"RESULTS_DIRS": ("=others",)}, "NAME=FOLDER"),
    ({"RESULTS_DIRS": ("X=",)}, "NAME=FOLDER"), ({"RESULTS_DIRS": ("rainy input=x",)}, "twice"),
    ({"RESULTS_DIRS": ("A=nowhere",)}, "RESULTS_DIRS.*nowhere"), ({"CROP": 0}, "CROP"), ({"TILE": 100}, "TILE"),
    ({"TEST_SETS": ()}, "empty"), ({"RESULTS_DIRS": (), "MODELS": {}}, "nothing to compare"),
])
def test_what_cannot_be_compared(settings, values, words):
    with pytest.raises(UserError, match=words):
        script.main(**settings | values)


def test_foreign_results_must_be_complete_and_of_the_same_size(settings, tmp_path):
    write(tmp_path / "others" / "0.png", pixels(0, 20, 20))
    with pytest.raises(UserError, match="0.png has another size"):
        script.main(**settings)
    (tmp_path / "others" / "0.png").unlink()
    with pytest.raises(UserError, match="no image for 0"):
        script.main(**settings)
