"""The diffusion refiner on the tiny base of assets/demo: identity, files, diffusers' own pipeline, training, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WHOLE_IMAGES, Killed, dies_after, names_in
from PIL import Image
from test_unet import write_pairs

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import detect
import Eval_derain_baselines
import Eval_unet_derain
import train_diffusion_refiner as train
import train_unet_derain
from utils import checkpoint, freeze, memory
from utils.config import UserError
from utils.datasets import derained, windshield_pairs
from utils.networks import derainers, diffusion_base, refiner
from utils.networks.refiner import ATTENTION, DiffusionRefiner, PixelRefiner

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "assets" / "demo" / "instruct_pix2pix_tiny")
PROMPT = "remove rain artifacts, enhance image quality"


_NEEDS = {}  # {shapes: GB}


@pytest.fixture(autouse=True)
def _needs_worked_out_once(monkeypatch):
    """The memory of a step takes seconds to work out, in each of many trainings: once for networks of equal shapes."""
    original = memory.training_gigabytes

    def known(model, step):
        key = tuple((p.shape, p.requires_grad) for p in model.parameters())
        return _NEEDS[key] if key in _NEEDS else _NEEDS.setdefault(key, original(model, step))
    monkeypatch.setattr(memory, "training_gigabytes", known)


def new(mode="one_step", **settings):
    return DiffusionRefiner(diffusion_base.load_base(TINY, PROMPT), mode, **settings).eval()


def shaken(model, seed=0):
    """The model with its trained tensors moved off their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def picture(seed=0, size=(61, 83)):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


# ---- the networks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: new(), lambda: new("sample", strength=0.0), lambda: new(skips=False, lock_sigma=3.0),
    lambda: PixelRefiner(50000)], ids=["one_step", "sample", "locked", "pixel"])
def test_an_untrained_refiner_is_the_identity_at_odd_sizes(make):
    images = picture()
    with torch.no_grad():
        assert (make().eval()(images) - images).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["one_step", "sample"])
def test_only_lora_and_what_starts_at_zero_trains(mode):
    model = shaken(new(mode)).train()
    before = {name: value.clone() for name, value in model.unet.state_dict().items() if "lora" not in name}
    images = picture(size=(64, 64))
    (model(images, 1 - images) if mode == "sample" else (model(images) - images / 2).square().mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(("gain", "skips")) for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in trained)
    assert set(model.state_dict()) == trained  # the base is not written into every last.pt
    after = model.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not model.vae.training


def test_steps_from_noise_alone_are_the_pipelines_own():
    """At strength 1 the own loop is diffusers' pipeline, to the last digit that a picture shows."""
    from diffusers import StableDiffusionInstructPix2PixPipeline
    model = new("sample", strength=1.0, steps=4)
    images = picture(size=(64, 96))[:1]
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        TINY, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(model.seed))
    with torch.no_grad():
        condition, _ = model.encode(images)
        found = model.decode(model.sampled(condition * model.vae.config.scaling_factor, condition)).clamp(0, 1)
    wanted = pipeline(prompt=PROMPT, image=images, num_inference_steps=4, guidance_scale=1.0, image_guidance_scale=1.0,
                      latents=noise, output_type="pt").images
    assert (found - wanted).abs().max() < 1e-5


def test_sampling_has_the_same_noise_every_time():
    model = shaken(new("sample", strength=0.5, steps=2))
    images = picture()
    with torch.no_grad():
        first = model(images)
        assert torch.equal(first, model(images)) and torch.allclose(model(images[1:])[0], first[1], atol=1e-5)
        model.seed = 1
        assert not torch.equal(first, model(images))


def test_the_lock_keeps_low_frequencies():
    model = shaken(new(), 3)
    images = picture(size=(96, 96))
    with torch.no_grad():
        free = model.correction(images).mean((-1, -2)).abs().max()
        model.lock_sigma = 2.0
        assert model.correction(images).mean((-1, -2)).abs().max() < 0.3 * free


def test_blend_scales_the_correction():
    model = shaken(new())
    images = 0.4 + 0.2 * picture()
    with torch.no_grad():
        full = model(images) - images
        model.blend = 0.25
        assert torch.allclose(model(images) - images, 0.25 * full, atol=1e-6) and full.abs().max() > 1e-3
        model.blend = 0.0
        assert torch.equal(model(images), images)


def test_the_control_has_as_many_parameters():
    _, trained = freeze.count_parameters(new())
    assert freeze.count_parameters(PixelRefiner(trained))[1] == pytest.approx(trained, rel=0.15)


# ---- files -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [lambda: new(rank=4, alpha=16),
                                  lambda: new("sample", targets=ATTENTION, strength=0.4),
                                  lambda: PixelRefiner(50000)], ids=["one_step", "sample", "pixel"])
def test_a_saved_refiner_gives_the_same_images(make, tmp_path):
    model = shaken(make().eval())
    model.blend = 0.6
    refiner.save_refiner(model, tmp_path / "refiner", base=TINY, prompt=PROMPT, derainer="x.pt")
    again = refiner.load_refiner(tmp_path / "refiner")
    images = picture()
    with torch.no_grad():
        assert torch.equal(again(images), model(images)) and again.blend == 0.6


def test_diffusers_alone_reads_the_lora_file(tmp_path):
    """In a fresh process, without this repository: the file changes what the pipeline makes, rank and alpha differ."""
    model = shaken(new(rank=4, alpha=16))
    refiner.save_refiner(model, tmp_path / "refiner", base=TINY, prompt=PROMPT, derainer="x.pt")
    latents, condition = picture(1, (8, 12))[:1, :1].repeat(1, 4, 1, 1), picture(2, (8, 12))[:1, :1].repeat(1, 4, 1, 1)
    with torch.no_grad():
        wanted = model.predict(latents, torch.tensor(250), condition)
    torch.save({"latents": latents, "condition": condition, "prompt": model.prompt, "wanted": wanted},
               tmp_path / "case.pt")
    code = f"""
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
case = torch.load({str(tmp_path / 'case.pt')!r})
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
    {TINY!r}, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
def out():
    with torch.no_grad():
        return pipeline.unet(torch.cat([case["latents"], case["condition"]], 1), torch.tensor(250),
                             encoder_hidden_states=case["prompt"]).sample
plain = out()
pipeline.load_lora_weights({str(tmp_path / 'refiner')!r})
print((plain - case["wanted"]).abs().max().item(), (out() - case["wanted"]).abs().max().item())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    without, with_lora = map(float, found.stdout.split()[-2:])
    assert without > 1e-3 and with_lora < 1e-5


def test_what_is_no_base_is_one_line(tmp_path):
    def refused(change):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(TINY, folder)
        change(folder)
        with pytest.raises(UserError, match="BASE_MODEL") as error:
            diffusion_base.load_base(str(folder), PROMPT)
        return str(error.value)

    def weights_of(folder, ending="safetensors"):
        return folder / "unet" / f"diffusion_pytorch_model.{ending}"

    def plain(folder):
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 4}))
    assert "4 channels" in refused(plain)
    assert "scheduler" in refused(lambda folder: shutil.rmtree(folder / "scheduler"))
    assert "vae/diffusion_pytorch_model" in refused(
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink())
    assert "no pipeline" in refused(lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink()
                                                    for path in folder.iterdir()])
    assert "damaged" in refused(lambda folder: (folder / "unet" / "config.json").write_text("{"))
    assert "hub" not in refused(lambda folder: weights_of(folder).write_bytes(b"half"))
    assert "safetensors missing" in refused(  # another variant, which is not what would be read
        lambda folder: weights_of(folder).rename(weights_of(folder, "fp16.safetensors")))
    assert "vocab.json" in refused(  # without words every prompt is the same
        lambda folder: [(folder / "tokenizer" / name).unlink() for name in ("vocab.json", "merges.txt",
                                                                            "tokenizer.json")])

    def other_vae(folder):
        file = folder / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_channels": 16}))
    assert "16 latent channels" in refused(other_vae)
    with pytest.raises(UserError, match="does not exist"):
        diffusion_base.load_base(str(tmp_path / "nothing"), PROMPT)
    with pytest.raises(UserError, match="hf download"):
        diffusion_base.load_base("timbrooks/instruct-pix2pix", PROMPT)  # HF_HUB_OFFLINE is set


def test_without_the_packages_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="requirements-diffusion.txt"):
        train.main(demo=True)


def test_what_is_no_refiner_is_one_line(tmp_path):
    with pytest.raises(UserError, match="REFINER_DIR.*does not exist"):
        refiner.load_refiner(tmp_path / "nothing")
    with pytest.raises(UserError, match="REFINER_DIR.*refiner.json"):
        refiner.load_refiner(tmp_path)
    refiner.save_refiner(PixelRefiner(20000), tmp_path / "one", base=TINY, prompt=PROMPT, derainer="gone.pt")
    with pytest.raises(UserError, match="gone.pt"):
        derainers.load_derainer("refiner", tmp_path / "one", constant="REFINER_DIR")
    (tmp_path / "one" / refiner.OWN_FILE).unlink()
    with pytest.raises(UserError, match=refiner.OWN_FILE):
        refiner.load_refiner(tmp_path / "one")


@pytest.mark.parametrize("change", [
    {"blend": "much"}, {"blend": 5}, {"blend": None}, {"settings": 5}, {"derainer": 5}, {"prompt": 5},
    {"settings": {"width": 12}}, {"settings": {"mode": "turbo"}}, {"settings": {"lock_sigma": -3}}])
def test_an_edited_settings_file_is_one_line(tmp_path, change):
    refiner.save_refiner(PixelRefiner(width=8), tmp_path / "one", base=TINY, prompt=PROMPT, derainer="x.pt")
    file = tmp_path / "one" / refiner.SETTINGS_FILE
    content = json.loads(file.read_text())
    if isinstance(change.get("settings"), dict):
        change = {"settings": content["settings"] | change["settings"]}
    file.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match="REFINER_DIR"):
        refiner.load_refiner(tmp_path / "one")


def test_no_setting_of_a_refiner_is_guessed(tmp_path):
    """A file without the time that it was trained with does not get the default's."""
    refiner.save_refiner(new(), tmp_path / "one", base=TINY, prompt=PROMPT, derainer="x.pt")
    file = tmp_path / "one" / refiner.SETTINGS_FILE
    content = json.loads(file.read_text())
    del content["settings"]["time"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=refiner.SETTINGS_FILE):
        refiner.load_refiner(tmp_path / "one")


def test_the_prompt_is_the_one_that_was_trained_with(tmp_path):
    model = shaken(new())
    refiner.save_refiner(model, tmp_path / "one", base=TINY, prompt=PROMPT, derainer="x.pt")
    file = tmp_path / "one" / refiner.SETTINGS_FILE
    file.write_text(file.read_text().replace(PROMPT, "a photograph of a cat"))
    assert torch.equal(refiner.load_refiner(tmp_path / "one").prompt, model.prompt)


def test_the_lock_takes_one_axis_after_the_other():
    """Two thin kernels take what torchvision's square one takes."""
    from torchvision.transforms.v2.functional import gaussian_blur
    model, images = PixelRefiner(width=8, lock_sigma=2.0), picture()
    model.raw_correction = lambda images: images
    wide = torch.nn.functional.pad(images, (6,) * 4, mode="replicate")
    assert torch.allclose(model.correction(images), images - gaussian_blur(wide, [13, 13], [2.0, 2.0])[..., 6:-6, 6:-6],
                          atol=1e-6)


# ---- training --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained_unet(tmp_path_factory):
    """Pairs, and a small U-Net that was trained on some of them."""
    folder = tmp_path_factory.mktemp("unet")
    write_pairs(folder / "data", count=24)
    data = {"CLEAR_DIR": str(folder / "data" / "clear"), "RAINY_DIR": str(folder / "data" / "rainy")}
    train_unet_derain.main(**data, **WHOLE_IMAGES, REAL_DIR="", CHECKPOINT_DIR=str(folder / "out"), IMAGE_SIZE=32,
                           BASE_WIDTH=4, TRAIN_PAIRS=12, VAL_PAIRS=8, TEST_PAIRS=4, EPOCHS=1,
                           BATCH_SIZE=4, DATALOADER_WORKERS=0)
    return data | {"DERAIN_MODEL_PATH": str(folder / "out" / "best.pt")}


@pytest.fixture
def base(trained_unet, tmp_path):
    """Constants of a refiner's training that takes seconds."""
    return trained_unet | {
        "BASE_MODEL": TINY, "FOLDS": 0, "IMAGE_SIZE": 32, "BATCH_SIZE": 2, "GRADIENT_ACCUMULATION_STEPS": 1,
        "NUM_EPOCHS": 2, "LEARNING_RATE": 1e-3, "GAIN_LEARNING_RATE": 1e-2, "WARMUP_STEPS": 0, "EMA_DECAY": 0.0,
        "DATALOADER_WORKERS": 0, "VAL_LIMIT": 64, "OUTPUT_DIR": str(tmp_path / "out")}


@pytest.mark.parametrize("mode", refiner.MODES)
def test_every_mode_trains_and_is_never_worse_on_its_validation_pairs(base, mode, capsys, every_curve):
    result = train.main(**base, MODE=mode)
    out = Path(base["OUTPUT_DIR"])
    assert {"refiner", "derained", "last.pt", "best.pt", "metrics.json", "curves.png", "tb", "results.json",
            "refined.png"} <= names_in(out)
    assert len(result["history"]) == 2 and [row["images"] for row in result["test"]] == ["de-rained", "refined"]
    content = torch.load(out / "best.pt")
    assert sum(value.numel() for value in content["model"].values()) < 500_000  # without the base
    model = derainers.load_derainer("refiner", out / "refiner")
    images = torch.rand(1, 3, 50, 70)
    assert model(images).shape == images.shape and "gain:" in capsys.readouterr().out
    best = result["history"][result["best_epoch"] - 1]
    assert model.refiner.blend == best["val/blend"]
    if best["val/blend"] == 0:
        assert torch.equal(model(images), model.derainer(images))


def test_a_killed_training_ends_with_the_same_weights(base, tmp_path, monkeypatch):
    whole = base | {"OUTPUT_DIR": str(tmp_path / "whole"), "CHECKPOINT_STEPS": 1, "EMA_DECAY": 0.9}
    train.main(**whole)
    broken = whole | {"OUTPUT_DIR": str(tmp_path / "broken")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", dies_after(3, checkpoint.save))
        train.main(**broken)
    train.main(**broken, RESUME=True)
    one, other = (torch.load(Path(run["OUTPUT_DIR"]) / "last.pt") for run in (whole, broken))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert checkpoint.equal(*(checkpoint.load(Path(run["OUTPUT_DIR"]) / "refiner" / refiner.LORA_FILE)
                              for run in (whole, broken)))


def test_no_image_is_derained_by_a_network_that_was_trained_on_it(base, monkeypatch):
    """Each training image's file comes from the fold's network that had not seen it, also where CACHE_DIR holds the
    networks of other folds."""
    train.main(**base | {"FOLDS": 3, "NUM_EPOCHS": 1, "CACHE_DIR": base["OUTPUT_DIR"] + "_cache"})
    asked = []
    original = derained.derained_pairs
    monkeypatch.setattr(derained, "derained_pairs", lambda derain, pairs, names, folder: (
        asked.append((Path(folder).name, set(names))), original(derain, pairs, names, folder))[1])
    train.main(**base | {"FOLDS": 2, "NUM_EPOCHS": 1, "CACHE_DIR": base["OUTPUT_DIR"] + "_cache"})
    parts = windshield_pairs.splits_of(Path(base["DERAIN_MODEL_PATH"]).with_name("splits.json"))
    used = {}
    for file in sorted(Path(base["OUTPUT_DIR"] + "_cache", "folds").glob("*.json")):
        network, split = checkpoint.file_digest(file.with_suffix("") / "best.pt"), windshield_pairs.splits_of(file)
        used[network] = set(split["train"])
        # MORE_PAIRS leaves out what is validated or tested on, also under other rain
        assert set(split["test"]) == (set(parts["train"]) - used[network]) | set(parts["test"])
    own = checkpoint.file_digest(base["DERAIN_MODEL_PATH"])
    assert len(used) == 5 and own not in used
    seen = [(used.get(network, set(parts["train"])), names) for network, names in asked]
    assert all(not trained & names for trained, names in seen)
    assert set.union(*(names for network, names in asked if network in used)) == set(parts["train"])


def test_no_part_of_the_pairs_was_trained_on(base, trained_unet, tmp_path):
    """Parts of another de-rainer, parts that are too small, swapped folders."""
    own = windshield_pairs.splits_of(Path(base["DERAIN_MODEL_PATH"]).with_name("splits.json"))
    found = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])[0]

    def parts(content, rainy=base["RAINY_DIR"], clear=base["CLEAR_DIR"]):
        (tmp_path / "splits.json").write_text(json.dumps(content))
        return derained.parts_of(base["DERAIN_MODEL_PATH"], found, str(tmp_path / "splits.json"), rainy, clear)
    assert parts(own) == own
    with pytest.raises(UserError, match="SPLITS_FILE"):
        parts({"train": own["val"], "val": own["train"], "test": own["test"]})
    with pytest.raises(UserError, match="CLEAR_DIR.*swapped"):
        parts(own, base["CLEAR_DIR"], base["RAINY_DIR"])
    for count in (2, 3, 8):
        shares = derained.shared_out(own["val"][:count], "", "x.pt")
        assert shares["train"] and shares["val"] and sorted(shares["train"] + shares["val"]) == own["val"][:count]
    for few, separator in ((own["val"][:1], ""), (["a_1", "a_2", "a_3"], "_")):
        with pytest.raises(UserError, match="DERAIN_MODEL_PATH.*FOLDS"):
            derained.shared_out(few, separator, "x.pt")


def test_derained_images_are_made_once(base):
    train.main(**base | {"NUM_EPOCHS": 1})
    files = sorted(Path(base["OUTPUT_DIR"]).glob("derained/*/*.png"))
    before = [path.stat().st_mtime_ns for path in files]
    train.main(**base | {"NUM_EPOCHS": 1, "RESUME": True})
    assert files and before == [path.stat().st_mtime_ns for path in files]


def test_kept_images_are_those_of_this_rain_and_whole(base, tmp_path):
    """Other rain under the same names and the same time is not taken for it; half a file is made again."""
    found = windshield_pairs.find_pairs(base["RAINY_DIR"], base["CLEAR_DIR"])[0]
    name, (rainy, clear) = next(iter(found.items()))
    other = tmp_path / "other" / rainy.name
    other.parent.mkdir()
    Image.new("RGB", Image.open(rainy).size, (9, 9, 9)).save(other)
    os.utime(other, ns=(rainy.stat().st_atime_ns, rainy.stat().st_mtime_ns))

    def kept(path):
        return derained.derained_pairs(lambda images: images, {name: (path, clear)}, [name], tmp_path / "kept")[name][0]
    first, second = kept(rainy), kept(other)
    assert np.asarray(Image.open(second)).max() < 20 < np.asarray(Image.open(first)).max()
    whole = first.read_bytes()
    for broken in (whole[:len(whole) // 2], second.read_bytes()[:-20], b""):
        first.write_bytes(broken)
        assert kept(rainy).read_bytes() == whole
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        train.main(**base | {"CACHE_DIR": str(tmp_path / "file")})


def test_a_derainer_that_was_trained_again_is_told(base, trained_unet, tmp_path, capsys):
    """Under the same path: no run goes on with its images, and the old refiner says so where it is used."""
    shutil.copytree(Path(base["DERAIN_MODEL_PATH"]).parent, tmp_path / "unet")
    weights, moved = tmp_path / "unet" / "best.pt", tmp_path / "moved.pt"
    run = base | {"DERAIN_MODEL_PATH": str(weights), "NUM_EPOCHS": 1}
    train.main(**run)
    folder = Path(base["OUTPUT_DIR"]) / "refiner"
    derainers.load_derainer("refiner", folder)
    shutil.copy(weights, moved)
    assert "note" not in capsys.readouterr().out and not derainers.other_derainer(folder, moved)
    content = torch.load(weights)
    content["epoch"] += 1  # stands for other weights
    torch.save(content, weights)
    derainers.load_derainer("refiner", folder)
    assert str(folder) in capsys.readouterr().out
    with pytest.raises(UserError, match="DERAIN_MODEL_PATH"):
        train.main(**run | {"RESUME": True, "NUM_EPOCHS": 2})


def test_no_run_moves_its_derainer_aside(base, trained_unet):
    before = names_in(Path(base["DERAIN_MODEL_PATH"]).parent)
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        train.main(**base | {"OUTPUT_DIR": str(Path(base["DERAIN_MODEL_PATH"]).parent)})
    assert names_in(Path(base["DERAIN_MODEL_PATH"]).parent) == before


def test_a_finished_run_without_its_refiner_is_one_line(trained_refiner):
    base, folder = trained_refiner
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="OUTPUT_DIR.*put it back"):
        train.main(**base | {"NUM_EPOCHS": 1, "RESUME": True})


def test_folds_need_the_constants_of_the_derainer(base, tmp_path):
    content = torch.load(base["DERAIN_MODEL_PATH"])
    del content["constants"]
    torch.save(content, tmp_path / "best.pt")
    shutil.copy(Path(base["DERAIN_MODEL_PATH"]).with_name("splits.json"), tmp_path)
    with pytest.raises(UserError, match="FOLDS"):
        train.main(**base | {"FOLDS": 2, "DERAIN_MODEL_PATH": str(tmp_path / "best.pt")})


def test_a_refiner_that_harms_gets_no_share():
    class Harmful(torch.nn.Module):
        def correction(self, images):
            return torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 0.5

    class Helpful(torch.nn.Module):
        def correction(self, images):
            return torch.full_like(images, 0.1)
    clear = torch.full((1, 3, 32, 32), 0.6) + 0.1 * picture(1, (32, 32))[:1]
    batch = {"images": (255 * (clear - 0.1)).round().byte(), "twins": (255 * clear).round().byte(), "labels": []}
    for model, share in ((Harmful(), 0.0), (Helpful(), 1.0)):
        assert train.evaluate(model, [batch], "cpu")["val/blend"] == share == model.blend


def test_a_refiner_that_blurs_gets_no_share_although_its_psnr_is_higher():
    class Blur(torch.nn.Module):
        def correction(self, images):
            padded = torch.nn.functional.pad(images, (1, 1, 1, 1), "reflect")
            return torch.nn.functional.avg_pool2d(padded, 3, 1) - images + 0.1
    clear = 0.2 + 0.1 * picture(1, (32, 32))[:1]  # fine detail, all of which is lost
    batch = {"images": (255 * (clear - 0.1)).round().byte(), "twins": (255 * clear).round().byte(), "labels": []}
    blurred = (clear - 0.1 + Blur().correction(clear - 0.1)).clamp(0, 1)
    before, after = (train.quality(images, clear) for images in (clear - 0.1, blurred))
    assert after["psnr"] > before["psnr"] + 5 and after["texture"] < before["texture"] - 0.05
    assert train.evaluate(Blur(), [batch], "cpu")["val/blend"] == 0


def test_a_correction_that_is_not_finite_is_no_refiner_that_does_not_help():
    """fit stops at a score that is not a number; share 0 of it would have looked sound."""
    class Overflow(torch.nn.Module):
        def correction(self, images):
            return images * float("nan")
    batch = {"images": (255 * picture()).byte(), "twins": (255 * picture(1)).byte(), "labels": []}
    assert np.isnan(train.evaluate(Overflow(), [batch], "cpu")["val/psnr"])


def test_blend_is_lowered_until_the_detector_finds_no_less(base, monkeypatch, capsys):
    scores = {0.0: 0.5, 1.0: 0.3, 0.8: 0.45, 0.6: 0.49, 0.4: 0.5, 0.2: 0.6}
    model = PixelRefiner(20000)
    monkeypatch.setattr(train.behind_derainer, "rows_behind",
                        lambda networks, *rest: [{"mAP": scores[next(iter(networks.values())).refiner.blend]}])
    from utils import config
    cfg = config.resolve(vars(train), base)
    for chosen, lowered in ((1.0, 0.4), (0.4, 0.4), (0.2, 0.2)):
        model.blend = chosen
        train.lower_blend(cfg, model, (None, type("L", (), {"dataset": [0]})), "cpu")
        assert model.blend == lowered
    scores |= dict.fromkeys((0.2, 0.4), 0.1)
    train.lower_blend(cfg, model, (None, type("L", (), {"dataset": [0]})), "cpu")
    assert model.blend == 0.0 and "less is used" in capsys.readouterr().out
    model.blend = 0.4
    scores |= dict.fromkeys(scores, -1.0)  # COCO's word for images without boxes
    train.lower_blend(cfg, model, (None, type("L", (), {"dataset": [0]})), "cpu")
    assert model.blend == 0.4 and "LABELED_RAIN_DIR" in capsys.readouterr().out


def test_memory_of_a_step_is_known_before_anything_is_loaded(base, capsys):
    """The count on "meta" is that of real tensors, within the few that only a real optimizer needs."""
    from utils import config
    _NEEDS.clear()  # worked out here, not remembered
    cfg = config.resolve(vars(train), base | {"GRADIENT_CHECKPOINTING": False})
    images = torch.rand(2, 3, 32, 32)

    def step(model, images):
        return memory.peak_bytes(lambda: model(images).mean().backward())
    real = step(train.diffusion_refiner(cfg, diffusion_base.load_base(TINY, PROMPT), "one_step").train(), images)
    outlined = step(train.outline(cfg).train(), images.to("meta"))
    assert outlined == pytest.approx(real, rel=0.1)
    assert train.main(**base, DRY_RUN=True) is None
    assert "GB" in capsys.readouterr().out and not Path(base["OUTPUT_DIR"]).exists()
    assert train.main(**base, DRY_RUN=True, MODE="pixel") is None
    assert "parameters" in capsys.readouterr().out


def test_checkpointing_gives_the_same_gradients_for_less_memory():
    gradients, peaks = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = shaken(new(checkpointing=checkpointing)).train()
        images = picture(size=(64, 64))
        peaks.append(memory.peak_bytes(lambda m=model, x=images: m(x).square().mean().backward()))
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
    assert peaks[1] < 0.8 * peaks[0]


def test_validation_memory_does_not_grow(base):
    """A second pass over the validation pairs needs what the first one did."""
    model = new()
    batch = {"images": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "labels": []}
    batch["twins"] = batch["images"]
    first, more = (memory.peak_bytes(lambda n=n: train.evaluate(model, [batch] * n, "cpu")) for n in (1, 4))
    assert more < 1.1 * first


@pytest.mark.parametrize("change, named", [
    ({"MODE": "turbo"}, "MODE"), ({"FOLDS": 1}, "FOLDS"), ({"IMAGE_SIZE": 100}, "IMAGE_SIZE"),
    ({"STRENGTH": 1.5}, "STRENGTH"), ({"TIME": 1000}, "TIME"), ({"LORA_TARGETS": ("nothing",)}, "LORA_TARGETS"),
    ({"LPIPS_WEIGHT": 0.1}, "LPIPS_WEIGHTS"), ({"DERAIN_MODEL_PATH": "nothing.pt"}, "DERAIN_MODEL_PATH"),
    ({"LORA_RANK": 0}, "LORA_RANK"), ({"LOCK_SIGMA": -1.0}, "LOCK_SIGMA"), ({"FOLDS": 20}, "FOLDS"),
    ({"LOCK_SIGMA": 1e-50}, "LOCK_SIGMA"), ({"LOCK_SIGMA": 2000.0}, "LOCK_SIGMA"),
    ({"MODE": "sample", "STRENGTH": 0.001}, "STRENGTH"), ({"MODE": "sample", "STEPS": 1500}, "STEPS"),
    ({"LORA_TARGETS": ("to_q", "to_kk")}, "to_kk"), ({"LORA_TARGETS": ("norm1",)}, "convolutions"),
    ({"LABELED_RAIN_DIR": "x", "DETECTOR_SIZE": 100}, "DETECTOR_SIZE"), ({"TILE": 100}, "TILE")])
def test_constants_that_cannot_be_are_one_line(base, change, named):
    with pytest.raises(UserError, match=named):
        train.main(**base | change)


@pytest.fixture
def trained_refiner(base):
    """Constants of its run, its folder."""
    train.main(**base | {"NUM_EPOCHS": 1})
    return base, str(Path(base["OUTPUT_DIR"]) / "refiner")


def test_detect_takes_every_derainer(trained_refiner, tmp_path, capsys):
    """Images behind the U-Net and behind U-Net and refiner, always and gated."""
    base, folder = trained_refiner
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    demo = {name: value for name, value in detect.DEMO.items() if name not in ("SOURCE", "OUTPUT")}
    for kind in ("unet", "unet+refiner", "UNet"):
        for model in ("spdnet", "conditional"):
            found = detect.main(**demo | {
                "SOURCE": str(tmp_path / "a.png"), "OUTPUT": str(tmp_path / "runs"), "MODEL": model, "DERAIN": kind,
                "DERAIN_MODEL_PATH": base["DERAIN_MODEL_PATH"], "REFINER_DIR": folder})
            assert found["images"] == 1
    given = demo | {"SOURCE": str(tmp_path / "a.png"), "OUTPUT": str(tmp_path / "runs"), "MODEL": "spdnet"}
    capsys.readouterr()
    detect.main(**given | {"DERAIN": "unet+refiner", "REFINER_DIR": folder, "DERAIN_MODEL_PATH": "x.pt"})
    note = next(line for line in capsys.readouterr().out.splitlines() if "DERAIN_MODEL_PATH" in line)
    assert "DERAIN = 'unet+refiner'" in note
    for change in ({"DERAIN": "x"}, {"DERAIN": "nafnet+refiner", "REFINER_DIR": folder}):  # it is behind a U-Net
        with pytest.raises(UserError, match="DERAIN"):
            detect.main(**given | change)


def test_both_evaluations_have_a_row_for_it(trained_refiner, tmp_path, capsys):
    base, folder = trained_refiner
    rows = Eval_unet_derain.main(
        CLEAR_DIR=base["CLEAR_DIR"], RAINY_DIR=base["RAINY_DIR"], REAL_DIR="", LPIPS_WEIGHTS="", REFINER_DIR=folder,
        UNET_PATH=base["DERAIN_MODEL_PATH"], IMAGE_SIZE=32, OUTPUT_DIR=str(tmp_path / "eval"), DATALOADER_WORKERS=0,
        SPLITS_FILE=str(Path(base["DERAIN_MODEL_PATH"]).with_name("splits.json")))["pairs"]
    assert {row["network"] for row in rows} == {"rainy input", "U-Net", "U-Net + refiner"}
    found = Eval_derain_baselines.main(
        TEST_SETS=(str(Path(base["CLEAR_DIR"]).parent),), OUTPUT_DIR=str(tmp_path / "baselines"), LATENCY_SIZE=32,
        CROP=16, MODELS={"U-Net": ("unet", base["DERAIN_MODEL_PATH"]), "refined": ("refiner", folder)})
    assert "'refined' was trained" in capsys.readouterr().out  # on its de-rainer's pairs
    assert {row["method"] for row in found["pairs"]} == {"rainy input", "U-Net", "refined"}
    assert found["costs"]["refined"]["parameters"] > 2_000_000
