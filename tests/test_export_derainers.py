"""export.py on de-rainers: INT8 judged by the picture, the refiner as one file, and whose weights are in it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import export
from utils import checkpoint, config
from utils.config import UserError
from utils.inference import exported, formats
from utils.networks import derainers, diffusion_base, onnx_file
from utils.networks.refiner import SETTINGS_FILE, PixelRefiner, RefinedDerainer, load_refiner, merged, save_refiner
from utils.networks.unet import new_unet

NONE = {"RTDETR_MODEL_NAME": "", "MODEL_NAME": "", "IMAGE_SIZE": 64}
TINY = str(export.Path(export.__file__).parent / "assets" / "demo" / "instruct_pix2pix_tiny")


def trained_like(model, seed=0):
    """The model with its zeros at the start moved, as training does: a de-rainer that corrects something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_derainer(path, arch="nafnet"):
    """-> the network whose checkpoint it writes."""
    torch.manual_seed(0)
    model = (new_unet("unet", width=4) if arch == "unet" else
             derainers.Derainer("nafnet", width=8, encoder=[1], middle=1, decoder=[1]))
    model = trained_like(model)
    checkpoint.save({"model": model.state_dict(), "model_args": model.model_args}, path)
    return model


@pytest.fixture
def rain(tmp_path):
    """Nine pictures, 40 x 56, and the same ones without their streaks: tmp_path/rainy, tmp_path/clean."""
    rng = np.random.default_rng(0)
    for name in ("rainy", "clean"):
        (tmp_path / name).mkdir()
    for number in range(9):
        soft = Image.fromarray(rng.integers(0, 200, (5, 7, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)
        soft.save(tmp_path / "clean" / f"{number}.png")
        wet = np.asarray(soft).copy()
        wet[:, rng.integers(0, 56, 6)] += 50
        Image.fromarray(wet).save(tmp_path / "rainy" / f"{number}.png")
    return tmp_path


def constants(rain, **more):
    return NONE | {"CALIBRATION_DIR": str(rain / "rainy"), "OUTPUT_DIR": str(rain / "out")} | more


# ---- INT8 -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["unet", "nafnet"])
def test_int8_of_a_derainer_keeps_the_picture_and_leaves_the_fragile_parts_in_float(rain, arch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = write_derainer(rain / "net.pt", arch)
    row = export.main(**constants(rain, DERAIN=arch, DERAIN_MODEL_PATH=str(rain / "net.pt"), LEAST_PSNR=25.0,
                                  CLEAN_DIR=str(rain / "clean"), FORMATS=("onnx-int8",)))["derainer"]["onnx-int8"]
    assert 25 < row["PSNR"] < 90 and abs(row["lost"]) < 3 and not row["refused"]
    nodes = onnx.load(rain / "out" / "derainer_int8.onnx").graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    heavy = [node for node in nodes if node.op_type == "Conv"]
    quantised = [made_by.get(node.input[1]) == "DequantizeLinear" for node in heavy]
    fragile = [onnx_file._within(node, ("attention", "depthwise")) for node in heavy]
    assert not quantised[0] and not quantised[-1] and sum(fragile) == (6 if arch == "nafnet" else 0)
    assert all(int8 != kept for int8, kept in zip(quantised[1:-1], fragile[1:-1], strict=True))
    run, pixels = exported.load_exported(rain / "out" / "derainer_int8.onnx"), torch.rand(2, 3, 33, 47)
    with torch.no_grad():
        assert 0 < (run(pixels).restored - model(pixels)).abs().mean() < 0.05  # any size, and not float32 after all
    files = json.loads((rain / "out" / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert files["derainer_int8.onnx"]["PSNR"] == row["PSNR"]
    if arch == "nafnet":  # one refusal is enough
        return
    with pytest.raises(UserError, match="derainer_int8.onnx restores images .* dB from PyTorch's.*LEAST_PSNR = 95"):
        export.main(**constants(rain, DERAIN=arch, DERAIN_MODEL_PATH=str(rain / "net.pt"), LEAST_PSNR=95.0,
                                FORMATS=("onnx-int8",)))
    assert not (rain / "out" / "derainer_int8.onnx").exists()


def test_psnr_and_loss_are_what_they_say(rain):
    """A file that is 0.1 brighter than a network that changes nothing: 20 dB from it."""
    model = formats.Model(lambda x: x, {"kind": "derainer", "outputs": ["restored"], "image_size": None, "multiple": 4,
                                        "model": "derainer"})
    cfg = config.resolve(vars(export), constants(rain, CLEAN_DIR=str(rain / "clean")))
    pairs = export.judged_pairs(cfg, export.image_paths(cfg))[1]
    found = export.restored_quality(cfg, model, lambda x: SimpleNamespace(restored=x + 0.1), pairs, {})
    assert abs(found["PSNR"] - 20) < 1e-3
    path, clean = next(iter(pairs.items()))
    image, twin = (next(formats.unscaled_images([name], cfg.IMAGE_SIZE)) for name in (path, clean))
    expected = [10 * torch.log10(1 / (x - twin).square().mean()).item() for x in (image, image + 0.1)]
    lost = export.restored_quality(cfg, model, lambda x: SimpleNamespace(restored=x + 0.1), {path: clean}, {})["lost"]
    assert abs(lost - (expected[0] - expected[1])) < 1e-3


def test_images_that_judge_are_not_calibrated_on(rain):
    cfg = config.resolve(vars(export), constants(rain, CLEAN_DIR=str(rain / "clean")))
    paths = export.image_paths(cfg)
    calibrate, pairs = export.judged_pairs(cfg, paths)
    assert len(calibrate) == 7 and [path.name for path in pairs] == ["3.png", "7.png"]
    assert not set(calibrate) & set(pairs) and all(twin.parent.name == "clean" for twin in pairs.values())
    assert export.judged_pairs(cfg, paths[:3])[0] == paths[:3] == list(export.judged_pairs(cfg, paths[:3])[1])
    (rain / "clean" / "7.png").unlink()
    with pytest.raises(UserError, match="CLEAN_DIR.*7.png"):
        export.judged_pairs(cfg, paths)


def test_a_derainer_is_calibrated_at_the_images_own_scale(rain):
    (one,) = formats.unscaled_images([rain / "rainy" / "0.png"], 48, 16)
    whole = torch.from_numpy(np.array(Image.open(rain / "rainy" / "0.png"))).permute(2, 0, 1)[None] / 255
    assert one.shape == (1, 3, 48, 48) and torch.equal(one[..., :40, :], whole[..., 4:52])


# ---- the refiner ----------------------------------------------------------------------------------------------------

def write_refiner(folder, mode="one_step", base=TINY):
    """A refiner's folder behind a tiny U-Net, both as if trained. -> RefinedDerainer."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from utils.networks.refiner import DiffusionRefiner
    net = write_derainer(folder.parent / "net.pt", "unet")
    torch.manual_seed(0)
    refiner = (PixelRefiner(width=4) if mode == "pixel" else
               DiffusionRefiner(diffusion_base.load_base(TINY, "remove rain"), mode, rank=2))
    trained_like(refiner)
    refiner.blend = 0.6
    save_refiner(refiner, folder, base=base, prompt="remove rain", derainer=str(folder.parent / "net.pt"))
    return RefinedDerainer(net, refiner).eval()


def test_the_refiner_is_one_file_from_rain_to_refined_image(tmp_path, capsys, loaded):
    model = write_refiner(tmp_path / "refiner")
    row = export.main(**NONE, REFINER_DIR=str(tmp_path / "refiner"), FORMATS=("torch.export",),
                      OUTPUT_DIR=str(tmp_path / "out"))["refiner"]["torch.export"]
    assert row["difference"] < 1e-3 and "apache-2.0" in capsys.readouterr().out
    (run,), pixels = loaded, torch.rand(3, 3, 33, 70)
    assert run.about["licence"] == "apache-2.0" and run.about["base"] == TINY and run.about["kind"] == "derainer"
    padded = formats.to_multiple(pixels, 32, 64)  # as the file does; a network that sees the border mirrors it itself
    with torch.no_grad():
        expected = model(padded)[..., :33, :70]
        torch.testing.assert_close(run(pixels).restored, expected, atol=1e-4, rtol=0)
        assert (model.derainer(padded) - model(padded)).abs().max() > 0.01  # the refiner does something
    files = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert files["refiner.pt2"]["licence"] == "apache-2.0"


def test_lora_within_the_weights_answers_the_same(tmp_path):
    write_refiner(tmp_path / "refiner")
    before = load_refiner(tmp_path / "refiner")
    after, pixels = merged(before), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(after(pixels), before(pixels), atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in after.named_parameters())
    assert any("lora" in name for name, _ in before.named_parameters())


def test_a_refiner_without_a_licence_or_without_one_graph_is_refused(tmp_path):
    write_refiner(tmp_path / "refiner", base="someone/some-model")
    given = NONE | {"REFINER_DIR": str(tmp_path / "refiner"), "OUTPUT_DIR": str(tmp_path / "out"),
                    "FORMATS": ("torch.export",)}
    with pytest.raises(UserError, match="REFINER_DIR.*someone/some-model.*BASE_LICENCE"):
        export.main(**given)
    with pytest.raises(UserError, match="REFINER_DIR.*cc-by-nd-4.0.*forbids changed copies"):
        export.main(**given, BASE_LICENCE="cc-by-nd-4.0")
    content = json.loads((tmp_path / "refiner" / SETTINGS_FILE).read_text(encoding="utf-8"))
    content["settings"]["mode"] = "sample"
    (tmp_path / "refiner" / SETTINGS_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="REFINER_DIR.*'sample'.*one_step"):
        export.main(**given)


def test_a_licence_is_read_from_the_bases_card(tmp_path):
    assert diffusion_base.licence_of(TINY) == "apache-2.0"
    assert "OpenRAIL-M" in diffusion_base.licence_of(diffusion_base.PUBLISHED)
    assert diffusion_base.licence_of(tmp_path) == diffusion_base.licence_of("someone/some-model") == ""
    for text, found in (("---\nlicense: 'mit'\n---\n", "mit"), ("---\r\ntags: []\r\nlicense: mit\r\n---\r\n", "mit"),
                        ("---\nlicense: other\nlicense_name: cc-by-nd-4.0\n---\n", "cc-by-nd-4.0"),
                        ("---\nlicense: unknown\n---\n", ""),
                        ("no block\nlicense: mit\n", ""), ("---\ntags: []\n---\nlicense: mit\n", "")):
        (tmp_path / "README.md").write_bytes(text.encode())
        assert diffusion_base.licence_of(tmp_path) == found, text


# ---- files and constants --------------------------------------------------------------------------------------------

def test_weights_beyond_one_files_limit_lie_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    layer, about = nn.Conv2d(3, 64, 3), {"kind": "derainer", "outputs": ["restored"], "image_size": 8}
    path = tmp_path / "big.onnx"
    program = onnx_file.export_program(layer, torch.rand(1, 3, 8, 8))
    onnx_file.write(program, path, 18, "pixel_values", ["restored"], about)
    assert [part.name for part in formats.parts_of(path)] == ["big.onnx", "big.onnx.data"]
    assert path.with_name("big.onnx.data").stat().st_size >= layer.weight.numel() * 4 > 1000
    run, pixels = exported.load_exported(path), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run.run(pixels)[0], layer(pixels), atol=1e-5, rtol=0)
    assert run.about == about
    (tmp_path / "big.bin").touch()  # of another format
    assert formats.parts_of(path)[1:] == [tmp_path / "big.onnx.data"]


@pytest.mark.parametrize("values, words", [
    ({"DERAIN": "refiner"}, "DERAIN = 'refiner'.*REFINER_DIR"), ({"CLEAN_DIR": "."}, "CLEAN_DIR.*CALIBRATION_DIR"),
    ({"LEAST_PSNR": -1.0}, "LEAST_PSNR"), ({"REFINER_DIR": "./nowhere"}, "REFINER_DIR = './nowhere'")])
def test_wrong_constants_of_derainers_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        export.main(**NONE | {"FORMATS": ("torch.export",)} | values)
