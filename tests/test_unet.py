"""The U-Net's parts: network, tiles, losses and metrics with their ranges, pairs, splits, schedule."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchvision import tv_tensors
from torchvision.models import alexnet, resnet34, vgg16

from utils import losses
from utils.config import UserError
from utils.datasets import presets, windshield_pairs
from utils.evaluation import image_quality
from utils.networks import derainers, tiling, unet
from utils.training import schedule
from utils.weather import rain, windshield


def trained(arch="unet", width=4, residual=True, seed=0):
    """A network that changes its input: the last layer is not zero, BatchNorm has seen something."""
    torch.manual_seed(seed)
    model = unet.new_unet(arch, width, residual=residual)
    nn.init.normal_(model.net.head.weight, std=0.3)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(2, 3, 64, 64))
    return model.eval()


def picture(height, width, seed=0):
    """(1, 3, height, width) smooth noise in [0, 1]."""
    torch.manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, height // 8), max(2, width // 8))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


# ---- network ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["unet", "resnet34"])
@pytest.mark.parametrize("size", [(64, 96), (37, 53), (1, 70), (16, 7)])
def test_any_size_in_and_out_in_range(arch, size):
    model = trained(arch)
    images = picture(*size)
    with torch.no_grad():
        out = model(images)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out, images)


def test_the_plans_widths():
    net = unet.UNet(64)
    assert [block[0].out_channels for block in net.down] == [64, 128, 256, 512, 1024]
    assert [block[0].in_channels for block in net.merge] == [128, 256, 512, 1024]
    assert net.head.kernel_size == (1, 1) and net.head.out_channels == 3


def test_a_residual_network_starts_as_the_identity_and_the_other_one_in_grey():
    images = picture(40, 40)
    for arch in ("unet", "resnet34"):
        assert torch.equal(unet.new_unet(arch, 4).eval()(images), images)
    plain = unet.new_unet("unet", 4, residual=False)
    with torch.no_grad():
        plain.net.head.weight.zero_()
        plain.net.head.bias.zero_()
    assert torch.equal(plain.eval()(images), torch.full_like(images, 0.5))  # tanh(0) is the middle of [-1, 1]


def test_the_network_sees_minus_one_to_one_and_imagenet_units():
    seen = []
    for arch in ("unet", "resnet34"):
        model = unet.new_unet(arch, 4).eval()
        model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)]))
    assert seen[0][0].unique().tolist() == [-1.0] and seen[0][1].unique().tolist() == [1.0]
    torch.testing.assert_close(seen[1][0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-4)


def test_gradients_reach_every_parameter():
    for arch in ("unet", "resnet34"):
        model = trained(arch).train()
        losses.pixel_l1(model(picture(64, 64).repeat(2, 1, 1, 1)), torch.rand(2, 3, 64, 64)).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_dropout_only_acts_in_training():
    for arch in ("unet", "resnet34"):
        torch.manual_seed(0)
        model = unet.new_unet(arch, 4, dropout=0.3)
        nn.init.normal_(model.net.head.weight)
        images = picture(64, 64)
        model.eval()
        assert torch.equal(model(images), model(images))
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout2d))
        assert not torch.equal(model(images), model(images))


def test_reflection_at_the_border():
    row = torch.arange(4.0).view(1, 1, 1, 4)
    assert tiling.reflected(row, 5, 0).flatten().tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]  # more than the image has
    assert tiling.reflected(row[..., :1], 2, 1).shape == (1, 1, 2, 3)


def test_a_checkpoint_reproduces_the_output(tmp_path):
    for arch, residual in (("unet", False), ("resnet34", True)):
        model, images = trained(arch, residual=residual), picture(50, 70)
        torch.save({"model": model.state_dict(), "model_args": model.model_args}, tmp_path / "best.pt")
        assert torch.equal(derainers.load_trained(tmp_path / "best.pt")(images), model(images))


def test_clear_lines_for_wrong_architectures_and_files(tmp_path):
    torch.save(resnet34(weights=None).state_dict(), tmp_path / "resnet34.pt")
    model = unet.new_unet("resnet34", encoder_weights=str(tmp_path / "resnet34.pt"))
    assert torch.equal(model.net.net.encoder.conv1.weight, torch.load(tmp_path / "resnet34.pt")["conv1.weight"])
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    for call, message in (
        (lambda: unet.new_unet("resnet35"), "ARCH = 'resnet35'"),
        (lambda: unet.new_unet("resnet34", encoder_weights=str(tmp_path / "other.pt")), "ENCODER_WEIGHTS.*missing"),
        (lambda: unet.new_unet("unet", 0), "BASE_WIDTH = 0"),
        (lambda: unet.new_unet("unet", 4, dropout=1.0), "DROPOUT = 1.0"),
        (lambda: derainers.load_trained(tmp_path / "none.pt"), "UNET_PATH = .*train_unet_derain.py"),
        (lambda: derainers.load_trained(tmp_path / "other.pt"), "UNET_PATH = .*no model_args"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_encoder_weights_that_cannot_be_reached_are_one_line(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known\nand a second line")
    monkeypatch.setattr("segmentation_models_pytorch.encoders.get_encoder", no_network)
    with pytest.raises(UserError, match="ENCODER_WEIGHTS = 'imagenet': cannot download .*not known") as error:
        unet.new_unet("resnet34", encoder_weights="imagenet")
    assert "\n" not in str(error.value)


# ---- tiles -----------------------------------------------------------------------------------------------------

def test_tiles_equal_the_whole_image_where_the_context_is_wide_enough():
    """Two convolutions of 3x3 look 2 pixels far, less than the quarter of the overlap that is context alone."""
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Sigmoid()).eval()
    images = picture(200, 330).repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    with torch.no_grad():
        whole = small(images)
    for tile, overlap in ((64, 32), (96, 32), (128, 64), (512, 128)):
        torch.testing.assert_close(tiling.restore(small, images, tile, overlap), whole, rtol=0, atol=1e-6)


def test_no_seam_shows_in_the_unets_tiles():
    model, images = trained(), picture(384, 448)
    whole = tiling.restore(model, images)
    tiled = tiling.restore(model, images, 256, 128)
    difference = (tiled - whole).abs()
    assert (whole - images).abs().mean() > 0.02  # the network does something
    assert difference.max() < 2 / 255 and difference.mean() < 0.1 / 255
    no_overlap = (tiling.restore(model, images, 256, 0) - whole).abs()
    assert no_overlap.max() > 4 * difference.max()  # that is what the overlap is good for


def test_every_tile_is_small_and_every_pixel_is_covered():
    sizes = []

    def note(images):
        sizes.append(images.shape[-2:])
        return images
    images = picture(100, 333)
    torch.testing.assert_close(tiling.restore(note, images, 96, 32), images, rtol=0, atol=1e-6)
    assert max(max(size) for size in sizes) == 96 and len(sizes) == 2 * 5
    for tile, overlap in ((100, 32), (96, 64), (96, 20), (-32, 0)):
        with pytest.raises(UserError, match="TILE"):
            tiling.restore(note, images, tile, overlap)


# ---- losses and metrics ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """The convolutions of a random vgg16 (the real file has a classifier as well; it is not used)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pt"
    features = vgg16(weights=None, init_weights=False).features
    for layer in features[:16]:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state, path)
    return path


def test_equal_images_have_no_loss_and_different_ones_do(vgg_file):
    images = picture(64, 64)
    for loss in (losses.pixel_l1, losses.ssim_loss, losses.PerceptualLoss(str(vgg_file))):
        assert loss(images, images).item() == pytest.approx(0, abs=1e-6)
        assert loss(images, 1 - images).item() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.ssim_loss(images.bfloat16(), images).dtype == torch.float32


def test_ssim_loss_has_the_range_of_the_images():
    """The plan's data_range=1.0 on [-1, 1] images would read another number: the unit is [0, 1]."""
    a, b = picture(64, 64), picture(64, 64, seed=1)
    theirs = structural_similarity(a[0].permute(1, 2, 0).numpy(), b[0].permute(1, 2, 0).numpy(), data_range=1.0,
                                   channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert losses.ssim_loss(a, b).item() == pytest.approx(1 - theirs, abs=1e-5)


def test_perceptual_loss_normalises_and_stays_frozen(vgg_file):
    perceptual = losses.PerceptualLoss(str(vgg_file))
    perceptual.train()
    assert not perceptual.training and not any(p.requires_grad for p in perceptual.parameters())
    reference = vgg16(weights=None)
    reference.load_state_dict(torch.load(vgg_file), strict=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    a, b = picture(64, 64), picture(64, 64, seed=1)
    with torch.no_grad():
        ours = reference.features[:16]((a - mean) / std) - reference.features[:16]((b - mean) / std)
    assert perceptual(a, b).item() == pytest.approx(ours.square().mean().item(), rel=1e-4)
    images = a.clone().requires_grad_()
    perceptual(images, b).backward()
    assert images.grad.abs().sum() > 0


def test_weights_that_cannot_be_reached_are_one_line(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "broken.pt")
    for call, message in (
        (losses.PerceptualLoss, "PERCEPTUAL_WEIGHTS = 'imagenet'.*PERCEPTUAL_WEIGHT = 0"),
        (lambda: losses.PerceptualLoss(str(tmp_path / "broken.pt")), "PERCEPTUAL_WEIGHTS = .*broken"),
        (lambda: image_quality.load_lpips("imagenet"), "LPIPS_WEIGHTS = 'imagenet'.*to leave LPIPS out"),
        (lambda: image_quality.load_lpips(str(tmp_path / "broken.pt")), "LPIPS_WEIGHTS = .*broken"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_metrics_equal_scikit_image():
    a = torch.cat([picture(48, 60), picture(48, 60, seed=2)])
    b = (a + 0.1 * torch.randn(a.shape)).clamp(0, 1)
    found = image_quality.full_quality(a, b)
    assert set(found) == {"psnr", "ssim", "psnr_y", "ssim_y", "mse"}
    for i in range(2):
        x, y = (t[i].permute(1, 2, 0).double().numpy() for t in (a, b))
        ssim = structural_similarity(y, x, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                     use_sample_covariance=False)
        assert found["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.0))
        assert found["mse"][i].item() == pytest.approx(mean_squared_error(y, x))
        assert found["ssim"][i].item() == pytest.approx(ssim, abs=1e-5)  # its window is float32


def test_lpips_takes_torchvisions_file_and_the_right_range(tmp_path):
    torch.manual_seed(0)
    state = {name: value for name, value in alexnet(weights=None).state_dict().items() if name.startswith("features.")}
    torch.save(state, tmp_path / "alexnet.pt")
    network = image_quality.load_lpips(str(tmp_path / "alexnet.pt"))
    assert torch.equal(network.net.state_dict()["slice2.3.weight"], state["features.3.weight"])
    a, b = picture(64, 64), picture(64, 64, seed=1)
    found = image_quality.full_quality(a, b, network)["lpips"]
    assert found.item() == pytest.approx(network(a * 2 - 1, b * 2 - 1).item(), rel=1e-5) and found.item() > 0
    assert image_quality.full_quality(a, a, network)["lpips"].item() == 0
    assert not any(p.requires_grad for p in network.parameters())


def test_plateau_factor_equals_torch():
    values = [1.0, 0.9, 0.95, 0.91, 0.9, 0.9, 0.85, 0.86, 0.84995, 0.87, 0.88, 0.89, 0.9, 0.91]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=0.5, patience=2)
    for count in range(1, len(values) + 1):
        theirs.step(values[count - 1])
        assert schedule.plateau_factor(values[:count], 2, 0.5) == optimizer.param_groups[0]["lr"]
    assert schedule.plateau_factor([], 2, 0.5) == 1.0 and optimizer.param_groups[0]["lr"] < 0.5


# ---- pairs -----------------------------------------------------------------------------------------------------

def write_pairs(root, count=12, size=(64, 48), name="drive{}_{:03d}", per_sequence=3):
    """root/clear and root/rainy: smooth scenes, and the same darker with a spot."""
    for folder in ("clear", "rainy"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = (picture(size[1], size[0], seed=100 + i)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        wet = (scene * 0.7).astype(np.uint8)
        wet[5:15, 5:20] = 200
        file = name.format(i // per_sequence, i)
        Image.fromarray(scene).save(root / "clear" / f"{file}.png")
        Image.fromarray(wet).save(root / "rainy" / f"{file}.jpg", quality=95)
    return root


def test_pairs_are_found_by_name_and_oddities_are_told(tmp_path):
    write_pairs(tmp_path)
    found, notes = windshield_pairs.find_pairs(tmp_path / "rainy", tmp_path / "clear")
    assert len(found) == 12 and notes == []
    assert all(rainy.stem == clear.stem == name for name, (rainy, clear) in found.items())
    (tmp_path / "clear" / "alone.png").write_bytes((tmp_path / "clear" / "drive0_000.png").read_bytes())
    a, b = tmp_path / "rainy" / "drive0_001.jpg", tmp_path / "rainy" / "drive3_010.jpg"
    swapped = a.read_bytes(), b.read_bytes()
    a.write_bytes(swapped[1])
    b.write_bytes(swapped[0])
    notes = windshield_pairs.find_pairs(tmp_path / "rainy", tmp_path / "clear")[1]
    assert "1 image(s) in CLEAR_DIR have no rainy partner" in notes[0]
    assert "2 rainy image(s) look more like another" in notes[1] and "drive0_001, drive3_010" in notes[1]


def test_bad_pairs_are_one_report(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "clear" / "drive0_000.png").unlink()
    (tmp_path / "rainy" / "drive0_001.jpg").write_bytes(b"no image")
    Image.new("RGB", (50, 40)).save(tmp_path / "clear" / "drive0_002.png")
    truncated = tmp_path / "clear" / "drive1_003.png"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    with pytest.raises(UserError, match="4 bad pair") as error:
        windshield_pairs.find_pairs(tmp_path / "rainy", tmp_path / "clear")
    text = str(error.value)
    assert "\n" not in text and "drive0_000.jpg has no partner" in text and "drive0_001.jpg cannot be read" in text
    assert "drive0_002.jpg is 64x48, its partner" in text and "50x40" in text and "drive1_003.png cannot" in text
    for rainy, clear, constant in (("none", "clear", "RAINY_DIR"), ("rainy", "none", "CLEAR_DIR")):
        with pytest.raises(UserError, match=f"{constant} = .*--kind windshield.*--demo"):
            windshield_pairs.find_pairs(tmp_path / rainy, tmp_path / clear)


def test_splits_share_nothing_and_depend_on_names_and_seed_alone():
    names = [f"b/{i:04d}" for i in range(1550)]
    split, note = windshield_pairs.split_names(names, (1200, 150, 200), seed=3)
    assert [len(split[part]) for part in windshield_pairs.PARTS] == [1200, 150, 200] and note is None
    assert len(set().union(*split.values())) == 1550
    assert windshield_pairs.split_names(names[::-1], (1200, 150, 200), seed=3)[0] == split
    assert windshield_pairs.split_names(names, (1200, 150, 200), seed=4)[0] != split
    few, note = windshield_pairs.split_names(names[:31], (1200, 150, 200))
    assert [len(few[part]) for part in windshield_pairs.PARTS] == [24, 3, 4] and "31 pairs: 24 to train" in note
    uneven, _ = windshield_pairs.split_names(names[:20], (12, 4, 200))
    assert [len(uneven[part]) for part in windshield_pairs.PARTS] == [1, 1, 18]
    many, note = windshield_pairs.split_names(names, (100, 10, 0))
    assert [len(many[part]) for part in windshield_pairs.PARTS] == [100, 10, 0]


def test_a_sequence_stays_together():
    names = [f"drive{i // 10}_{i:04d}" for i in range(300)]
    split, _ = windshield_pairs.split_names(names, (200, 50, 50), separator="_")
    where = {part: {windshield_pairs.sequence_of(name, "_") for name in split[part]} for part in windshield_pairs.PARTS}
    assert not (where["train"] & where["val"] | where["train"] & where["test"] | where["val"] & where["test"])
    assert sum(map(len, split.values())) == 300 and len(split["val"]) == 50
    loose, _ = windshield_pairs.split_names(names, (200, 50, 50))
    in_part = {part: {windshield_pairs.sequence_of(name, "_") for name in loose[part]} for part in ("train", "val")}
    assert in_part["train"] & in_part["val"]
    with pytest.raises(UserError, match="too few for a split"):
        windshield_pairs.split_names(names[:10], (8, 1, 1), separator="_")
    with pytest.raises(UserError, match="TRAIN_PAIRS = 0"):
        windshield_pairs.split_names(names, (0, 1, 1))


def test_sequences_that_leave_nothing_to_train_on_are_refused():
    """Which of two sequences comes first is the seed's choice: b alone is enough for validation, a is not."""
    def outcome(seed):
        try:
            return len(windshield_pairs.split_names(["a_1", "b_1", "b_2", "b_3"], (2, 2, 0), seed, "_")[0]["train"])
        except UserError as error:
            return str(error)[:32]
    assert {outcome(seed) for seed in range(20)} == {1, "no pair is left for training: th"}


def test_a_splits_file_is_checked(tmp_path):
    file = tmp_path / "splits.json"
    file.write_text(json.dumps({"train": ["a", "b.jpg"], "val": ["c"]}), encoding="utf-8")
    assert windshield_pairs.read_splits(file, ["a", "b", "c", "d"]) == {"train": ["a", "b"], "val": ["c"], "test": []}
    for content, message in (({"train": ["a"], "val": ["a"]}, "'a' is in train and in val"),
                             ({"train": ["a"], "val": ["e"]}, "'e' of val is no pair"),
                             ({"train": ["a"]}, "expected"), ({"train": [], "val": ["a"]}, "at least one")):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            windshield_pairs.read_splits(file, ["a", "b", "c", "d"])
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="SPLITS_FILE.*JSON"):
        windshield_pairs.read_splits(file, ["a"])


def test_intensities_are_those_that_were_drawn(tmp_path):
    root = write_pairs(tmp_path, count=9)
    (root / "rainy" / "rain.json").write_text(json.dumps(
        {"kind": "windshield", "seed": 5, "intensity": "random", "version": windshield.VERSION}), encoding="utf-8")
    found, _ = windshield_pairs.find_pairs(root / "rainy", root / "clear")
    drawn = windshield_pairs.intensities(root / "rainy", found)
    assert set(drawn) == set(found) and len(set(drawn.values())) > 1
    name, (rainy, _) = next(iter(found.items()))
    assert windshield.sample_parameters(rain.rng_for(5, rainy.name), "random").intensity == drawn[name]
    (root / "rainy" / "rain.json").write_text("{}", encoding="utf-8")
    assert windshield_pairs.intensities(root / "rainy", found) == {}


@pytest.mark.parametrize("crop", [False, True])
def test_augmentation_keeps_the_pair_aligned(crop):
    image = (picture(90, 160)[0] * 255).byte()
    sample = {"image": tv_tensors.Image(image), "twin": tv_tensors.Image(image.clone())}
    transform = presets.unet_training(64, crop, 0.5, 0.2)
    seen = []
    for seed in range(6):
        torch.manual_seed(seed)
        out = transform(sample)
        assert out["image"].shape == (3, 64, 64) and torch.equal(out["image"], out["twin"])
        seen.append(out["image"])
    assert any(not torch.equal(seen[0], other) for other in seen[1:])
    still = presets.unet_evaluation(64, crop)
    assert torch.equal(still(sample)["image"], still(sample)["image"]) and still(sample)["twin"].shape == (3, 64, 64)
