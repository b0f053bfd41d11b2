"""De-rainers: the published networks against their reference outputs, one interface for all, NAFNet."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from derainer_fill import GAINS, STEP, fill, fill_input, fill_tensor, references
from PIL import Image
from test_unet import picture

from utils.config import UserError
from utils.networks import derainers, guided_filter, nafnet, tiling
from utils.networks.derainers import NETWORKS, Derainer, load_derainer
from utils.networks.rescan import SqueezeExcitation

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
PARAMETERS = {"prenet": 168_963, "prenet_r": 94_979, "prn": 95_107, "prn_r": 21_123, "rescan": 149_823,
              "rescan_add": 149_823, "rescan_lstm": 197_367, "ddn": 57_369, "ddn_matlab": 57_369, "ddn_port": 57_369,
              "derainnet": 754_691, "spdnet": 3_318_741}
PUBLISHED = [name for name in PARAMETERS if name != "spdnet"]  # test_spdnet.py has that
SIZES = {"ddn_matlab": (64, 96), "ddn_port": (64, 96)}         # of their references; others 61 x 83


def small_nafnet(seed=0, **settings):
    """A NAFNet that changes its input: no scale and no last convolution is zero."""
    torch.manual_seed(seed)
    net = nafnet.NAFNet(**{"width": 4, "encoder": (1, 1), "middle": 1, "decoder": (1, 1), "patch": 1} | settings)
    for name, parameter in net.named_parameters():
        if "scale" in name or name.startswith("last"):
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def result_of(arch, net, x):
    """The image that the references hold: in the network's own channel order, not clamped."""
    out = net(x)
    return x - out[-1] if arch.startswith("rescan") else out[-1] if isinstance(out, list) else out


# ---- the published networks ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters(arch):
    assert sum(p.numel() for p in NETWORKS[arch].build().parameters()) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", PUBLISHED)
def test_reference_outputs_and_input_gradients(arch):
    """Outputs to 1e-4 of their standard deviation. Gradients in the norm: other rounding (another order of operations,
    another processor's kernels) switches a few ReLUs, each of which moves the gradient around it."""
    size = SIZES.get(arch, (61, 83))
    net, expected = fill(arch, NETWORKS[arch].build()), references()
    x = fill_input(*size).requires_grad_()
    out = result_of(arch, net, x)
    gradient, = torch.autograd.grad(out.square().mean(), x)
    name = f"{size[0]}x{size[1]}"
    for what, value in (("out", out.detach()), ("dx", gradient)):
        wanted, std = (expected[f"{arch}_{what}_{name}{end}"] for end in ("", "_std"))
        difference = (value[..., ::STEP, ::STEP] - wanted).abs() / std
        assert difference.square().mean().sqrt() < (1e-4 if what == "out" else 5e-3), what
        assert difference.max() < 1e-4 if what == "out" else (difference < 1e-4).float().mean() > 0.8, what


@pytest.mark.parametrize("arch", ["mprnet", "restormer"])
def test_spandrels_networks_are_the_published_ones(arch, tmp_path):
    """Filled weights, saved as the authors' files are, through spandrel and our wrapper."""
    pytest.importorskip("spandrel_extra_arches")
    shapes = SHARED / "conformance" / arch / "state_dict.json"
    if not shapes.is_file():
        pytest.skip("needs ../shared")
    state = {name: fill_tensor(name, shape, GAINS[arch])
             for name, shape in json.loads(shapes.read_text(encoding="utf-8")).items()}
    torch.save({"params": state} if arch == "restormer" else
               {"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "weights.pth")
    size = (32, 40) if arch == "restormer" else (64, 96)
    model, x, expected = load_derainer(arch, tmp_path / "weights.pth"), fill_input(*size), references()
    with torch.no_grad():
        out = NETWORKS[arch].stages(model.net, x)[-1]
        wanted, std = (expected[f"{arch}_out_{size[0]}x{size[1]}{end}"] for end in ("", "_std"))
        assert ((out[..., ::STEP, ::STEP] - wanted).abs() / std).max() < 1e-4
        assert model(x[..., :37, :61]).shape[-2:] == (min(37, size[0]), min(61, size[1]))  # sides that are no multiples
    other = "mprnet" if arch == "restormer" else "restormer"
    with pytest.raises(UserError, match=rf"weights.pth.* not {other}"):
        load_derainer(other, tmp_path / "weights.pth")


def test_published_weights_give_the_published_images():
    """PReNet's Rain100L weights on a test image: 37.89 dB were measured with the authors' code on a JPEG copy of it."""
    weights = SHARED / "weights" / "prenet" / "prenet6_rain100l.pth"
    folder = SHARED / "data" / "rain_pairs" / "Rain100L" / "test"
    if not weights.is_file() or not folder.is_dir():
        pytest.skip("needs ../shared")
    images = [np.asarray(Image.open(folder / kind / "001.webp").convert("RGB")) for kind in ("rainy", "clean")]
    rainy, clean = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in images)
    with torch.no_grad():
        out = (load_derainer("prenet", weights)(rainy) * 255).round()
    luma = torch.tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1) / 255
    y, y_clean = (((image * luma).sum(1) + 16).round() for image in (out, clean * 255))
    assert abs(10 * torch.log10(255**2 / (y - y_clean).square().mean()).item() - 37.89) < 0.3


# ---- one interface -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", [*PUBLISHED, "nafnet"])
@pytest.mark.parametrize("size", [(37, 53), (5, 70), (1, 1)])
def test_any_size_in_and_images_in_range_out(arch, size):
    model = Derainer(arch, net=small_nafnet(patch=2)) if arch == "nafnet" else Derainer(arch)
    x = picture(*size) if min(size) > 1 else torch.rand(1, 3, *size)
    with torch.no_grad():
        out, stages = model.eval()(x), model.eval()(x, every_stage=True)
    assert out.shape == x.shape and out.dtype == torch.float32 and 0 <= out.min() <= out.max() <= 1
    assert torch.equal(stages[-1], out)
    assert len(stages) == {"prenet": 6, "prn": 6, "rescan": 4}.get(arch.split("_")[0], 1)


def test_rescan_sees_bgr():
    model, seen = Derainer("rescan").eval(), []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    with torch.no_grad():
        model(red)
        assert seen[0][0, :, 0, 0].tolist() == [0, 0, 1]
        assert torch.equal(model(red), (red.flip(1) - model.net(red.flip(1))[-1]).flip(1).clamp(0, 1))


def test_spdnet_is_given_0_to_255():
    model, seen = Derainer("spdnet", n_feats=8, n_resblocks=1).eval(), []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        stages = model(torch.ones(1, 3, 16, 16), every_stage=True)
    assert seen[0].max() == 255 and len(stages) == 3


@pytest.mark.parametrize("arch", ["prenet_r", "ddn", "rescan"])
@pytest.mark.parametrize("form", ["plain", "net", "module", "safetensors"])
def test_published_files_load(arch, form, tmp_path):
    state, path = fill(arch, NETWORKS[arch].build()).state_dict(), tmp_path / "weights.pth"
    if form == "safetensors":
        from safetensors.torch import save_file
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save({"plain": state, "net": {"net": state, "clock": 3},
                    "module": {f"module.{name}": value for name, value in state.items()}}[form], path)
    model, x = load_derainer(arch, path), picture(20, 24)
    assert not model.training and model.source.year and model.source.licence
    with torch.no_grad():
        assert torch.equal(model(x), Derainer(arch, net=fill(arch, NETWORKS[arch].build())).eval()(x))


def test_clear_lines_for_wrong_names_and_files(tmp_path):
    torch.save(NETWORKS["prn"].build().state_dict(), tmp_path / "prn.pth")
    model = Derainer("nafnet", width=4, encoder=[1], middle=1, decoder=[1])
    torch.save({"model": model.state_dict(), "model_args": model.model_args}, tmp_path / "naf.pt")
    for call, words in (
            (lambda: load_derainer("prenext", "x"), "prenext.*nafnet"),
            (lambda: load_derainer("prenet", tmp_path / "none.pth"), "none.pth.*csdwren/PReNet"),
            (lambda: load_derainer("prenet", tmp_path / "prn.pth"), "prn.pth.*It fits prn"),
            (lambda: load_derainer("rescan", tmp_path / "naf.pt"), "naf.pt.*ARCH = 'nafnet'"),
            (lambda: load_derainer("nafnet", tmp_path / "prn.pth"), "prn.pth.*train_unet_derain.py"),
            (lambda: load_derainer("unet", tmp_path / "naf.pt"), "nafnet")):
        with pytest.raises(UserError, match=words):
            call()
    assert torch.equal(load_derainer("nafnet", tmp_path / "naf.pt").net.last.weight, model.net.last.weight)


def test_without_the_optional_package_it_is_named(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    with pytest.raises(UserError, match="requirements-derain.txt.*non-commercial"):
        load_derainer("restormer", tmp_path / "weights.pth")


# ---- the guided filter ---------------------------------------------------------------------------------------------

def test_the_guided_filter_is_its_definition():
    """Window by window, in float64."""
    x, radius, eps = torch.rand(1, 1, 9, 12, dtype=torch.float64), 2, 0.01

    def mean(values):
        out = torch.zeros_like(values)
        for i in range(9):
            for j in range(12):
                out[..., i, j] = values[..., max(0, i - radius):i + radius + 1,
                                        max(0, j - radius):j + radius + 1].mean((-2, -1))
        return out
    variance = mean(x * x) - mean(x)**2
    slope = variance / (variance + eps)
    expected = mean(slope) * x + mean(mean(x) - slope * mean(x))
    torch.testing.assert_close(guided_filter.base_layer(x, radius, eps).double(), expected, rtol=0, atol=1e-6)


def test_the_guided_filter_ignores_autocast():
    x = picture(40, 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guided_filter.base_layer(x), guided_filter.base_layer(x))
        assert guided_filter.base_layer(x).dtype == torch.float32


# ---- NAFNet --------------------------------------------------------------------------------------------------------

def test_nafnet_starts_as_the_identity():
    x = picture(40, 48)
    for patch in (1, 2):
        assert torch.equal(Derainer("nafnet", width=4, patch=patch).eval()(x), x)


@pytest.mark.parametrize("settings", [{}, {"patch": 2}, {"rain_channels": 1}, {"encoder": (), "decoder": ()}])
def test_nafnet_gradients_reach_every_parameter(settings):
    net = small_nafnet(**settings).train()
    net(picture(32, 32).repeat(2, 1, 1, 1)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_grey_rain_is_one_correction_for_all_colours():
    x = picture(32, 32)
    with torch.no_grad():
        change = small_nafnet(rain_channels=1)(x) - x
    torch.testing.assert_close(change[:, 0], change[:, 2], rtol=0, atol=1e-6)
    assert change.abs().max() > 0.01


def test_the_attention_sees_the_surroundings_and_not_the_whole_image():
    means = nafnet.surroundings(torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 8, 64), 4)
    assert means.shape == (1, 1, 2, 16)
    assert means[0, 0, 0, 8].item() == torch.arange(24.0, 44.0).mean()  # two cells to each side
    assert means[0, 0, 0, 0].item() == torch.arange(12.0).mean()        # at the border what there is
    net, x = small_nafnet(window=20), picture(48, 400)
    other = x.clone()
    other[..., 300:] = 0
    with torch.no_grad():
        assert torch.equal(net(x)[..., :100], net(other)[..., :100])


@pytest.mark.parametrize("patch", [1, 2])
def test_nafnet_in_tiles_is_nafnet(patch):
    """Less than 0.05 dB of difference where the network has something to do."""
    model, x = Derainer("nafnet", net=small_nafnet(patch=patch, window=64)).eval(), picture(500, 700)
    with torch.no_grad():
        whole, tiled = model(x), tiling.restore(model, x, 256, 128)
    change, difference = (whole - x).square().mean(), (tiled - whole).square().mean()
    assert change > 1e-4 and difference < 1e-3 * change, (change, difference)


@pytest.mark.parametrize("settings, name", [
    ({"width": 0}, "NAFNET_WIDTH"), ({"encoder": (1,), "decoder": (1, 1)}, "NAFNET_ENCODER"),
    ({"patch": 0}, "NAFNET_PATCH"), ({"middle": -1}, "NAFNET_MIDDLE"), ({"rain_channels": 2}, "NAFNET_RAIN_CHANNELS"),
    ({"window": 0}, "NAFNET_WINDOW")])
def test_settings_of_nafnet_that_cannot_be(settings, name):
    with pytest.raises(UserError, match=name):
        nafnet.NAFNet(**settings)


def test_squeeze_and_excitation_weighs_channels():
    x = torch.rand(2, 24, 5, 6)
    weighed = SqueezeExcitation()(x)
    ratio = (weighed / x).flatten(2)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_trainable_networks_can_be_built_and_others_not():
    assert set(derainers.TRAINABLE) == set(NETWORKS) - {"mprnet", "restormer"}


def test_every_tile_has_an_overlap_that_goes_with_it():
    for tile in (0, 32, 64, 96, 160, 256, 1024):
        tiling.require_tiles(tile, tiling.usual_overlap(tile))
    assert tiling.usual_overlap(1024) == 128
