"""train_unet_derain.py with NAFNet and the published networks: crops at the images' own scale, newer losses, resume."""

from pathlib import Path

import pytest
import torch
from conftest import WHOLE_IMAGES, Killed, dies_after
from test_unet import picture, write_pairs
from torchvision import tv_tensors

import train_unet_derain as train
from utils import losses
from utils.config import UserError
from utils.datasets import image_pairs, presets, windshield_pairs
from utils.networks import derainers

SMALL_NAFNET = {"ARCH": "nafnet", "NAFNET_WIDTH": 4, "NAFNET_ENCODER": (1,), "NAFNET_MIDDLE": 1, "NAFNET_DECODER": (1,)}
RECIPE = {"CROP_SIZES": (16, 24), "CROPS_PER_PAIR": 2, "CACHE_GB": 1.0, "EMA_DECAY": 0.9, "OPTIMIZER": "adamw",
          "BETAS": (0.9, 0.9), "SCHEDULER": "cosine", "L1_WEIGHT": 0.0, "SSIM_WEIGHT": 0.0, "PSNR_WEIGHT": 0.1,
          "FFT_WEIGHT": 0.05, "CHARBONNIER_WEIGHT": 1.0}


@pytest.fixture
def base(tmp_path):
    write_pairs(tmp_path / "data", count=12)
    return WHOLE_IMAGES | {
            "CLEAR_DIR": str(tmp_path / "data" / "clear"), "RAINY_DIR": str(tmp_path / "data" / "rainy"),
            "REAL_DIR": "", "CHECKPOINT_DIR": str(tmp_path / "out"), "IMAGE_SIZE": 32, "PERCEPTUAL_WEIGHT": 0.0,
            "TRAIN_PAIRS": 8, "VAL_PAIRS": 3, "TEST_PAIRS": 1, "EPOCHS": 1, "BATCH_SIZE": 4, "LEARNING_RATE": 1e-3,
            "DATALOADER_WORKERS": 0}


# ---- training ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    SMALL_NAFNET, SMALL_NAFNET | {"NAFNET_RAIN_CHANNELS": 1, "NAFNET_PATCH": 1}, {"ARCH": "prn_r"},
    {"ARCH": "rescan", "EARLY_STAGES_WEIGHT": 1.0}, {"ARCH": "ddn"}, {"ARCH": "derainnet"}], ids=str)
def test_every_network_trains_by_a_constant(base, changes):
    result = train.main(**base | changes)
    assert result["history"][0]["loss"] == pytest.approx(result["history"][0]["l1"] + 0.2 *
                                                         result["history"][0]["ssim_loss"], rel=1e-4)
    best = Path(base["CHECKPOINT_DIR"]) / "best.pt"
    model = derainers.load_trained(best)
    start = train.build_model(train.config.resolve(vars(train), base | changes), "cpu")
    assert model.model_args["arch"] == changes["ARCH"] and type(start.net) is type(model.net)
    x = picture(30, 40)
    with torch.no_grad():
        assert torch.equal(model(x), derainers.load_derainer(changes["ARCH"], best)(x))


def test_nafnet_learns_by_its_recipe(base):
    result = train.main(**base | SMALL_NAFNET | RECIPE | {"EPOCHS": 6, "LEARNING_RATE": 1e-2})
    assert result["history"][-1]["val/psnr"] > result["rainy_input"]["val/psnr"] + 0.5
    assert {"psnr_loss", "fft", "charbonnier"} <= set(result["history"][0])


def test_a_stopped_run_of_the_recipe_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    settings = base | SMALL_NAFNET | RECIPE | {"EPOCHS": 4, "CHECKPOINT_STEPS": 1}
    train.main(**settings | {"CHECKPOINT_DIR": str(tmp_path / "whole"), "CACHE_GB": 0.0})  # a cache changes nothing
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "compute_losses", dies_after(10, train.compute_losses))  # where crops are larger already
        train.main(**settings)
    train.main(**settings | {"RESUME": True})
    a, b = (torch.load(Path(out) / "last.pt") for out in (tmp_path / "whole", base["CHECKPOINT_DIR"]))
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    assert all(torch.equal(one, other) for one, other in zip(a["average"], b["average"], strict=True))


def with_more(base, tmp_path, share=0.25):
    write_pairs(tmp_path / "more", count=20)
    return base | SMALL_NAFNET | {"CROP_SIZES": (16,), "CROPS_PER_PAIR": 5, "COLOR_JITTER": 0.1, "MORE_PAIRS": (
        (str(tmp_path / "more" / "clear"), str(tmp_path / "more" / "rainy"), share),)}


def test_several_folders_share_every_epoch(base, tmp_path, capsys):
    cfg = train.config.resolve(vars(train), with_more(base, tmp_path))
    data = train.build_data(cfg)
    assert "20 pairs" in capsys.readouterr().out and len(data["train"]) == 40 and len(data["val"]) == 3
    seen, own = [], set()
    for epoch in range(2):
        samples = [data["train"][(epoch, index)] for index in range(40)]
        more = [sample for sample in samples if "/more/" in sample["path"]]
        assert len(more) == 10
        seen += [sample["path"] for sample in more]
        own |= {sample["path"] for sample in samples} - set(seen)
        ours = [sample["image"] for sample in samples if "/more/" not in sample["path"]]
        assert not any(torch.equal(a, b) for i, a in enumerate(ours) for b in ours[:i])  # no crop is there twice
    assert len(set(seen)) == 20 and len(own) == 8  # each of the larger folder once in two epochs, all of the own pairs
    again = train.build_data(cfg)["train"]
    assert torch.equal(again[(1, 39)]["image"], data["train"][(1, 39)]["image"])


def test_a_run_on_several_folders_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    settings = with_more(base, tmp_path) | {"EPOCHS": 2, "CHECKPOINT_STEPS": 1}
    train.main(**settings | {"CHECKPOINT_DIR": str(tmp_path / "whole")})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "compute_losses", dies_after(14, train.compute_losses))
        train.main(**settings)
    train.main(**settings | {"RESUME": True})
    a, b = (torch.load(Path(out) / "last.pt") for out in (tmp_path / "whole", base["CHECKPOINT_DIR"]))
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


@pytest.mark.parametrize("entry", [("a", "b"), ("a", "b", 1.5), ("a", "b", "half"), (1, "b", 0.5)], ids=str)
def test_more_pairs_that_cannot_be(base, entry, tmp_path):
    with pytest.raises(UserError, match="MORE_PAIRS holds"):
        train.main(**base | {"MORE_PAIRS": (entry,)})
    with pytest.raises(UserError, match="MORE_PAIRS.*add up to 1.2"):
        train.main(**base | {"MORE_PAIRS": (("a", "b", 0.6), ("c", "d", 0.6))})
    with pytest.raises(UserError, match="MORE_PAIRS.*does not exist"):
        train.main(**base | SMALL_NAFNET | {"MORE_PAIRS": (("a", "b", 0.6),)})


def test_earlier_stages_are_supervised_where_they_are_weighted():
    model = derainers.Derainer("rescan")
    batch = {"images": picture(24, 24), "twins": picture(24, 24, seed=1)}
    stages = model(batch["images"], every_stage=True)
    single = [losses.pixel_l1(stage, batch["twins"]) for stage in stages]
    for early, expected in ((0.0, single[-1]), (0.5, single[-1] + 0.5 * sum(single[:-1]))):
        found = train.compute_losses(model, batch, {"l1": 1.0}, early=early)
        torch.testing.assert_close(found["l1"], expected)


@pytest.mark.parametrize("values", [
    {"CROP_SIZES": (8,)}, {"CROP_SIZES": ("64",)}, {"CROPS_PER_PAIR": 0}, {"CROP_ZOOM": 0.5}, {"CACHE_GB": -1.0},
    {"BETAS": (0.9,)},
    {"EARLY_STAGES_WEIGHT": -1.0}, {"BETAS": (0.9, 1.5)}, {"ARCH": "nafnett"},
    {"NAFNET_ENCODER": (1, 2, 3), "ARCH": "nafnet"}])
def test_settings_that_cannot_be(values, base):
    with pytest.raises(UserError, match=next(iter(values))):
        train.main(**base | values)


# ---- data ----------------------------------------------------------------------------------------------------------

def test_crops_keep_the_images_own_scale(base):
    found, _ = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])
    data = windshield_pairs.WindshieldPairs(found, list(found), presets.crops(16, flip=0.0), seed=1, crops=3)
    assert len(data) == 36
    whole = windshield_pairs.WindshieldPairs(found, list(found), presets.scaled(1.0))
    seen = set()
    for number in (2, 14, 26):  # three crops of one pair
        sample, image = data[(0, number)], whole[2]
        squares = image["image"].unfold(1, 16, 1).unfold(2, 16, 1)  # (3, H', W', 16, 16)
        equal = (squares == sample["image"][:, None, None]).all(-1).all(-1).all(0).nonzero()
        assert len(equal) >= 1
        top, left = equal[0].tolist()
        assert torch.equal(sample["twin"], image["twin"][:, top:top + 16, left:left + 16])  # one geometry for both
        seen.add((top, left))
    assert len(seen) > 1 and torch.equal(data[(0, 2)]["image"], data[(0, 2)]["image"])
    large = windshield_pairs.WindshieldPairs(found, list(found), presets.crops(80))[0]  # larger than the images
    assert large["image"].shape == large["twin"].shape == (3, 80, 80)


def test_crops_are_enlarged_by_up_to_the_zoom(base):
    found, _ = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])

    def opened(zoom):
        return windshield_pairs.WindshieldPairs(found, list(found), presets.crops(24, flip=0.0, zoom=zoom), crops=8)
    detail = {}
    for zoom in (1.0, 4.0):
        samples = [opened(zoom)[i] for i in range(8 * len(found))]
        assert all(sample[key].shape == (3, 24, 24) and sample[key].dtype == torch.uint8
                   for sample in samples for key in ("image", "twin"))
        detail[zoom] = [sample["twin"].float().diff(dim=-1).abs().mean().item() for sample in samples]
    assert sum(detail[4.0]) < 0.8 * sum(detail[1.0])  # what is enlarged is smoother
    assert torch.equal(opened(4.0)[5]["image"], opened(4.0)[5]["image"])
    own = windshield_pairs.WindshieldPairs(found, list(found), presets.crops(24, flip=0.0), crops=8)
    assert torch.equal(own[3]["image"], opened(1.0)[3]["image"])


def test_the_clean_image_takes_the_rainy_ones_tone():
    clean = (picture(40, 50)[0] * 255).to(torch.uint8)
    wet = clean.float() * 0.6 + torch.tensor([50.0, 60.0, 70.0])[:, None, None]
    drop = torch.zeros(40, 50, dtype=torch.bool)
    drop[10:15, 20:26] = True
    wet[:, drop] = 128
    sample = presets.KeepTone()({"image": tv_tensors.Image(wet.round().to(torch.uint8)),
                                 "twin": tv_tensors.Image(clean)})
    apart = (sample["twin"].float() - wet).abs().mean(0)
    assert apart[~drop].mean() < 3 < 10 < apart[drop].mean()  # the veil is left, the drop is to be taken away
    grey = {key: tv_tensors.Image(torch.full((3, 8, 8), value, dtype=torch.uint8)) for key, value in
            (("image", 90), ("twin", 30))}
    assert torch.equal(presets.KeepTone()(grey)["twin"], grey["image"])  # an image without any contrast


def test_a_training_may_keep_the_tone(base, capsys):
    with_tone = train.main(**base | SMALL_NAFNET | {"CROP_SIZES": (16, 24), "EPOCHS": 2, "KEEP_TONE": True})
    without = train.main(**base | SMALL_NAFNET | {"CROP_SIZES": (16, 24), "EPOCHS": 2})
    assert with_tone["rainy_input"]["val/psnr"] > without["rainy_input"]["val/psnr"]  # its truth is nearer to the input


def test_sizes_share_the_run_out():
    transform = presets.over_epochs(["a", "b", "c"], 7)
    assert [transform.at(epoch) for epoch in range(9)] == ["a", "a", "a", "b", "b", "c", "c", "c", "c"]


def test_a_cache_reads_files_once_and_ends_at_its_limit(base, monkeypatch):
    found, _ = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])
    read, original = [], image_pairs.read_image
    monkeypatch.setattr(image_pairs, "read_image", lambda path: read.append(path) or original(path))
    one = 2 * 3 * 64 * 48  # bytes of a pair
    for room, expected in ((12, 24), (2, 24 + 20), (0, 48)):
        read.clear()
        data = windshield_pairs.WindshieldPairs(found, list(found), presets.scaled(1.0),
                                                cache_gb=(room + 0.5) * one / 1e9)
        for _ in range(2):
            for i in range(len(data)):
                data[i]
        assert len(read) == expected
    assert "_cache" not in data.__getstate__()  # a loading process begins with an empty one


# ---- losses --------------------------------------------------------------------------------------------------------

def test_the_newer_losses_have_their_values():
    x = torch.rand(2, 3, 16, 16)
    assert losses.charbonnier(x, x).item() == pytest.approx(1e-3)
    assert losses.charbonnier(x, x + 0.5).item() == pytest.approx(0.5, abs=1e-3)
    assert losses.psnr_loss(x, x + 0.1).item() == pytest.approx(-20, abs=1e-3)
    assert losses.psnr_loss(x, x).item() == pytest.approx(-80)
    assert losses.fft_l1(x, x).item() == 0
    in_one_coefficient = 0.1 * 16 / (16 * 9 * 2)
    assert losses.fft_l1(x, x + 0.1).item() == pytest.approx(in_one_coefficient, rel=1e-4)
    y = x.clone().requires_grad_()
    for loss in (losses.charbonnier, losses.psnr_loss, losses.fft_l1):
        gradient, = torch.autograd.grad(loss(y, x.flip(0)), y)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
