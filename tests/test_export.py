"""export.py: files that answer as PyTorch does, refusals, and files that run without this project or torch."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import names_in, small_spdnet
from PIL import Image
from torch import nn

import detect
import export
from rfdetr import detr
from rfdetr.model import RFDETR
from tools import convert_dataset
from utils import checkpoint, config, datasets, feature_derain, freeze, images
from utils.boxes import decode
from utils.conditional_model import ConditionalRainRobustRTDETR
from utils.config import UserError
from utils.datasets import presets
from utils.demo.coco import ensure_demo
from utils.inference import deployable, exported, formats
from utils.integrated_model import RainRobustRTDETR
from utils.networks import adapter, onnx_file
from utils.networks.folding import folded
from utils.networks.rain_detector import RainDetector, save_rain_detector
from utils.networks.rtdetr import load_rtdetr, new_rtdetr
from utils.networks.unet import new_unet

ROOT = Path(__file__).resolve().parent.parent
TRAINED = str(ROOT / "assets" / "demo" / "rtdetr")  # a random detector's queries are all equally good
NONE = {"RTDETR_MODEL_NAME": "", "MODEL_NAME": ""}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A demo data set of a few scenes: a folder with coco/."""
    return ensure_demo(tmp_path_factory.mktemp("scenes"), 4, 6)


@pytest.fixture(scope="module")
def vanilla(scenes):
    """-> (folder, results) of the demo's detector in ONNX's three forms and torch.export's."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = scenes / "exported"
    results = export.main(**NONE | {"RTDETR_MODEL_NAME": TRAINED}, IMAGE_SIZE=160, COCO_DIR=str(scenes / "coco"),
                          FORMATS=("onnx", "onnx-fp16", "onnx-int8", "torch.export"), OUTPUT_DIR=str(folder))
    return folder, results["vanilla"]


def pictures(scenes):
    """-> ([path, ...], (B, 3, 160, 160) in [0, 1]) of the validation scenes."""
    paths = sorted((scenes / "coco" / "val2017").iterdir())
    return paths, images.to_floats(torch.stack([datasets.read_image(path) for path in paths]))


# ---- files that answer ----------------------------------------------------------------------------------------------

def test_every_file_keeps_the_boxes_and_the_map(vanilla, scenes):
    folder, results = vanilla
    assert names_in(folder) == {"vanilla.onnx", "vanilla_fp16.onnx", "vanilla_int8.onnx", "vanilla.pt2",
                                "manifest.json"}
    assert results["onnx"]["PyTorch's mAP"] > 0.3
    for kind, row in results.items():
        assert row["mAP"] > 0.97 * row["PyTorch's mAP"] and row["agreement"] > 0.8 and not row["refused"], kind
    assert max(results[kind]["difference"] for kind in ("onnx", "torch.export")) < 1e-3
    assert 1e-3 < results["onnx-fp16"]["difference"] < results["onnx-int8"]["difference"]  # they are what they say
    assert results["onnx-fp16"]["MB"] < 0.7 * results["onnx"]["MB"]
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert content["files"]["vanilla_int8.onnx"]["classes"]["0"] == load_rtdetr(TRAINED).config.id2label[0]
    assert "pipeline" not in content


@pytest.mark.parametrize("name", ["vanilla.onnx", "vanilla_int8.onnx", "vanilla.pt2"])
def test_a_file_takes_any_batch_and_answers_like_the_model(vanilla, scenes, name):
    model, run = load_rtdetr(TRAINED), exported.load_exported(vanilla[0] / name, threads=1)
    _, pixels = pictures(scenes)
    for batch in (pixels[:1], pixels[:3]):
        with torch.no_grad():
            expected, found = model(pixel_values=batch), run(pixel_values=batch)
        assert found.logits.shape == expected.logits.shape and found.pred_boxes.shape == expected.pred_boxes.shape
        if "int8" in name:
            assert formats.agreement(found, expected) > 0.8
        else:
            assert onnx_file.difference([found.logits, found.pred_boxes],
                                        [expected.logits, expected.pred_boxes]) < 1e-3
    assert run.about["kind"] == "detector" and run.about["image_size"] == 160
    with pytest.raises(UserError, match=f"{name}.*160 x 160.*IMAGE_SIZE"):
        run(torch.rand(1, 3, 96, 96))


def test_int8_leaves_the_decoder_in_float(vanilla):
    onnx = pytest.importorskip("onnx")
    nodes = onnx.load(vanilla[0] / "vanilla_int8.onnx").graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    quantised = [made_by.get(node.input[1]) == "DequantizeLinear" for node in nodes if node.op_type == "Conv"]
    assert sum(quantised) > 0.8 * len(quantised) > 10
    assert not any(made_by.get(name) == "DequantizeLinear" for node in nodes if node.op_type == "MatMul"
                   for name in node.input)


def test_int8_leaves_what_is_kept_in_float_as_well(scenes, tmp_path):
    onnx = pytest.importorskip("onnx")
    export.main(**NONE | {"RTDETR_MODEL_NAME": TRAINED}, FORMATS=("onnx-int8",), IMAGE_SIZE=160, CALIBRATION_IMAGES=2,
                CALIBRATION_DIR=str(scenes), INT8_KEPT=("backbone",), LEAST_MAP=0.0, OUTPUT_DIR=str(tmp_path))
    nodes = onnx.load(tmp_path / "vanilla_int8.onnx").graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    quantised = {("backbone" in str(node.metadata_props), made_by.get(node.input[1]) == "DequantizeLinear")
                 for node in nodes if node.op_type == "Conv"}
    model = formats.Model(nn.ModuleDict({"net": nn.Identity()}), {}, int8=formats.Int8(("Conv",), ("net",)))
    assert not deployable.keep_in_float32({"one": model}, ())["one"].without
    assert "nothing" in deployable.keep_in_float32({"one": model}, ("net",))["one"].without["openvino-int8"]
    assert (True, True) not in quantised and {(True, False), (False, True)} <= quantised


def test_the_pages_example_runs_without_torch_and_without_this_project(vanilla, scenes, tmp_path):
    """docs/export.md's own code, in a fresh process that has onnxruntime, numpy and Pillow alone."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "InferenceSession" in block)
    block = "import sys\nfor name in ('torch', 'utils', 'rfdetr', 'torchvision', 'transformers'):\n" \
            "    sys.modules[name] = None\n"  # an import of them fails
    paths, pixels = pictures(scenes)
    (tmp_path / "run.py").write_text(block + code, encoding="utf-8")
    done = subprocess.run([sys.executable, "run.py", str(vanilla[0] / "vanilla.onnx"), *map(str, paths)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [(line.split()[0], " ".join(line.split()[1:-5]), *map(float, line.split()[-5:]))  # "stop sign" is two words
             for line in done.stdout.splitlines()]
    with torch.no_grad():
        outputs = load_rtdetr(TRAINED)(pixel_values=pixels)
    expected = []
    decoded = decode(outputs.logits, outputs.pred_boxes, [(160, 160)] * len(paths))
    for path, one in zip(paths, decoded, strict=True):
        kept = one["scores"] >= 0.5
        expected += [(path.name, *row) for row in zip(one["labels"][kept].tolist(), one["scores"][kept].tolist(),
                                                      one["boxes"][kept].tolist(), strict=True)]
    names = load_rtdetr(TRAINED).config.id2label
    assert len(found) == len(expected) > 5
    for (file, name, score, *box), (path, label, wanted, corners) in zip(found, expected, strict=True):
        assert (file, name) == (path, names[int(label)])
        assert abs(score - wanted) < 2e-3
        np.testing.assert_allclose(box, corners, atol=0.15)


def test_openvino_answers_as_pytorch_does(vanilla, scenes, tmp_path):
    pytest.importorskip("openvino")
    about = exported.load_exported(vanilla[0] / "vanilla.onnx").about
    _, pixels = pictures(scenes)
    with torch.no_grad():
        expected = load_rtdetr(TRAINED)(pixel_values=pixels[:3])
    for source, least in (("vanilla.onnx", 1), ("vanilla_int8.onnx", 0.8)):
        exported.write_openvino(vanilla[0] / source, tmp_path / "model.xml", about)
        run = exported.load_exported(tmp_path / "model.xml", threads=1)
        assert run.about == about and formats.agreement(run(pixels[:3]), expected) >= least


# ---- the other models -----------------------------------------------------------------------------------------------

def test_a_derainer_takes_images_of_any_size(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    unet = new_unet("unet", width=4).eval()
    nn.init.normal_(unet.net.head.weight, std=0.1)
    checkpoint.save({"model": unet.state_dict(), "model_args": unet.model_args}, tmp_path / "unet.pt")
    results = export.main(**NONE, DERAIN_MODEL_PATH=str(tmp_path / "unet.pt"), FORMATS=("onnx", "onnx-fp16"),
                          IMAGE_SIZE=64, OUTPUT_DIR=str(tmp_path / "out"))["derainer"]
    assert results["onnx"]["difference"] < 1e-4 < results["onnx-fp16"]["difference"] < 0.02
    run = exported.load_exported(tmp_path / "out" / "derainer.onnx")
    for size in ((40, 100), (96, 48), (33, 47)):
        pixels = torch.rand(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(run(pixels).restored, unet(pixels), atol=1e-4, rtol=0)


def test_spdnet_is_written_for_any_size_and_not_in_float16(weights, capsys, loaded):
    results = export.main(**NONE, DERAIN="spdnet", DERAIN_MODEL_PATH=str(weights / "spdnet.pt"), IMAGE_SIZE=64,
                          FORMATS=("torch.export",), OUTPUT_DIR=str(weights / "out"))["derainer"]
    assert results["torch.export"]["difference"] < 1e-3
    assert "overflows" in deployable.derainer("spdnet", weights / "spdnet.pt").without["onnx-fp16"]
    (run,), net = loaded, small_spdnet().eval()
    pixels = torch.rand(1, 3, 52, 88)  # multiples of 4: nothing is mirrored
    with torch.no_grad():
        torch.testing.assert_close(run(pixels).restored, net(pixels * 255)[0].clamp(0, 255) / 255, atol=1e-4, rtol=0)


def test_pipeline_and_rainy_models_become_parts_with_a_manifest(weights, small_detector, tmp_path):
    model = feature_derain.create_feature_derain_rtdetr(str(weights / "rtdetr"))
    model.save_pretrained(tmp_path / "feature", 96)
    pytest.importorskip("peft")
    changed = adapter.inject(small_detector, 2, 4, ("attention",))
    adapter.write(changed, tmp_path / "rain.safetensors", freeze.fingerprint(small_detector), rank=2, alpha=4)
    ConditionalRainRobustRTDETR(RainDetector(8).eval(), small_spdnet(), small_detector, 0.3,
                                derain_scale=0.5).eval().save_pretrained(tmp_path / "pipeline")
    both = {"RTDETR_MODEL_NAME": str(weights / "rtdetr"), "MODEL_NAME": str(tmp_path / "feature"), "IMAGE_SIZE": 96,
            "ADAPTER_PATH": str(tmp_path / "rain.safetensors"), "SPDNET_MODEL_PATH": str(weights / "spdnet.pt"),
            "RAIN_DETECTOR_PATH": str(tmp_path / "pipeline" / "rain_detector.pt"), "RAIN_THRESHOLD": 0.7}

    def parts(**constants):
        cfg = export.config.resolve(vars(export), constants)
        models = export.build_models(cfg)
        rows = {name: {"onnx": {"file": f"{name}.onnx", "refused": ""}} for name in models}
        return models, export.manifest(models, rows, cfg)["pipeline"]
    models, pipeline = parts(**both)
    assert set(models) == {"vanilla", "feature_derain", "spdnet_rtdetr", "adapter", "rain_detector"}
    assert (pipeline["gate"], pipeline["rainy"], pipeline["clean"]) == ("rain_detector", "adapter", "vanilla")
    assert pipeline["rain_threshold"] == 0.7
    assert parts(**both, RAINY_MODEL="spdnet_rtdetr")[1]["rainy"] == "spdnet_rtdetr"
    models, pipeline = parts(**NONE, PIPELINE_DIR=str(tmp_path / "pipeline"), IMAGE_SIZE=96)
    assert pipeline["rain_threshold"] == 0.3 and pipeline["rainy"] == "pipeline_rainy"
    pixels = torch.rand(2, 3, 96, 96)
    whole = ConditionalRainRobustRTDETR.from_pretrained(tmp_path / "pipeline")
    for threshold, name in ((0.0, "pipeline_rainy"), (1.0, "pipeline_clean")):  # everything is rain, nothing is
        whole.rain_threshold = threshold
        with torch.no_grad():
            torch.testing.assert_close(whole(pixels).logits, models[name].module(pixels)[0])


class Constant(nn.Module):
    """A part that takes no time to trace: the same outputs for every image; shapes: of one image's."""

    def __init__(self, value, *shapes):
        super().__init__()
        self.value, self.shapes = value, shapes

    def forward(self, pixel_values):
        zero = 0 * pixel_values.mean((1, 2, 3))  # (B,)
        found = [zero.reshape(-1, *(1 for _ in shape)) + torch.full(shape, self.value) for shape in self.shapes]
        return tuple(found) if len(found) > 1 else found[0]


def test_a_specialist_is_the_pipelines_rainy_part_and_detect_runs_it(scenes, tmp_path, monkeypatch, capsys):
    save_rain_detector(RainDetector(8).eval(), tmp_path / "gate.pt")
    specialist, built = str(ROOT / "assets" / "demo" / "rtdetr_specialist"), export.build_models

    def with_small_parts(cfg):
        models = built(cfg)
        rows = len(models["vanilla"].about["classes"])
        models["rain_detector"] = models["rain_detector"]._replace(module=Constant(0.9, ()))
        models["vanilla"] = models["vanilla"]._replace(module=Constant(-9.0, (300, rows), (300, 4)))  # finds nothing
        return models
    monkeypatch.setattr(export, "build_models", with_small_parts)
    results = export.main(
        RTDETR_MODEL_NAME=TRAINED, MODEL_NAME="", RAINY_DETECTOR_NAME=specialist, IMAGE_SIZE=160, RAIN_THRESHOLD=0.7,
        RAIN_DETECTOR_PATH=str(tmp_path / "gate.pt"), FORMATS=("torch.export",), OUTPUT_DIR=str(tmp_path / "out"),
        CALIBRATION_DIR=str(scenes / "coco" / "val2017"))
    assert results["specialist"]["torch.export"]["difference"] < 1e-3
    content = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert content["pipeline"]["rainy"] == "specialist" and content["pipeline"]["rain_threshold"] == 0.7
    shown = capsys.readouterr().out
    assert "rain_detector: an image is rainy from a probability of 0.7 on (RAIN_THRESHOLD)" in shown
    assert "pipeline: gate rain_detector, rainy specialist, clean vanilla" in shown
    common = {"SOURCE": str(scenes / "coco_rain" / "val2017"), "OUTPUT": str(tmp_path / "found"), "IMAGE_SIZE": 160}
    found, alone = (detect.main(**common | more) for more in (
        {"MODEL": "exported", "WEIGHTS": str(tmp_path / "out" / "manifest.json")},
        {"MODEL": "vanilla", "RTDETR_MODEL_NAME": specialist}))
    ours, theirs = (json.loads((one["folder"] / "detections.json").read_text(encoding="utf-8"))
                    for one in (found, alone))
    assert found["derained"] == found["images"] == 6 and len(ours) == len(theirs) > 6
    for one, other in zip(ours, theirs, strict=True):
        assert one["category_id"] == other["category_id"] and abs(one["score"] - other["score"]) < 1e-3


def test_a_specialist_of_other_classes_is_no_part(weights, tmp_path):
    new_rtdetr("tiny", {0: "cat", 1: "dog"}).save_pretrained(tmp_path / "cats")
    values = {"RTDETR_MODEL_NAME": str(weights / "rtdetr"), "RAINY_DETECTOR_NAME": str(tmp_path / "cats"),
              "MODEL_NAME": "", "IMAGE_SIZE": 96}
    with pytest.raises(UserError, match="RAINY_DETECTOR_NAME.*other classes"):
        export.build_models(config.resolve(vars(export), values))
    alone = export.build_models(config.resolve(vars(export), values | {"RTDETR_MODEL_NAME": ""}))
    assert list(alone) == ["specialist"] and alone["specialist"].about["classes"] == {"0": "cat", "1": "dog"}


def test_a_unet_in_front_of_the_detector_can_be_the_rainy_part(tmp_path):
    unet = new_unet("unet", width=4).eval()
    nn.init.normal_(unet.net.head.weight, std=0.1)
    checkpoint.save({"model": unet.state_dict(), "model_args": unet.model_args}, tmp_path / "unet.pt")
    models = export.build_models(config.resolve(vars(export), {
        "RTDETR_MODEL_NAME": TRAINED, "MODEL_NAME": "", "RAINY_MODEL": "derainer_rtdetr", "IMAGE_SIZE": 96,
        "DERAIN_MODEL_PATH": str(tmp_path / "unet.pt")}))
    assert set(models) == {"vanilla", "derainer", "derainer_rtdetr"}
    model, pixels = models["derainer_rtdetr"], torch.rand(3, 3, 96, 96)
    program = onnx_file.export_program(model.module, torch.rand(2, 3, 96, 96), {0: torch.export.Dim("batch")})
    with torch.no_grad():
        expected = load_rtdetr(TRAINED)(pixel_values=unet(pixels))
        assert onnx_file.difference(program.module()(pixels), [expected.logits, expected.pred_boxes]) < 1e-3
    assert model.int8.kept == ("derain_module",)  # the name of a module of RainRobustRTDETR, whose "encoder" is no part
    assert any(name == "model.derain_module" for name, _ in model.module.named_modules())


def test_masks_are_traced_for_any_batch():
    torch.manual_seed(0)
    model = RFDETR("tiny", 4, mask_head="nano").eval()
    program = onnx_file.export_program(detr.Deployable(model), torch.rand(2, 3, 160, 160),
                                       {0: torch.export.Dim("batch")})
    pixels = torch.rand(3, 3, 160, 160)
    with torch.no_grad():
        assert [tuple(one.shape) for one in program.module()(pixels)] == [(3, 60, 4), (3, 60, 4), (3, 60, 40, 40)]
        assert onnx_file.difference(program.module()(pixels), detr.Deployable(model)(pixels)) < 1e-3


def test_spdnet_and_detector_are_traced_for_any_batch(small_detector):
    model = deployable.Deployable(RainRobustRTDETR(small_spdnet(), small_detector, derain_scale=0.5).eval())
    program = onnx_file.export_program(model, torch.rand(2, 3, 96, 96), {0: torch.export.Dim("batch")})
    pixels = torch.rand(3, 3, 96, 96)
    with torch.no_grad():
        assert onnx_file.difference(program.module()(pixels), model(pixels)) < 1e-3
    assert not antialiasing(program)


def test_a_rain_detector_is_traced_for_images_larger_than_its_own():
    model, pixels = deployable.Gate(RainDetector(8).eval()), torch.rand(2, 3, 320, 256)
    program = onnx_file.export_program(model, pixels, {0: torch.export.Dim("batch")})
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels), model(pixels), atol=1e-5, rtol=0)
    assert not antialiasing(program)


def antialiasing(program):
    """-> nodes that no runtime but onnxruntime knows: OpenVINO leaves the antialiasing out, TensorRT refuses."""
    return [node for node in program.graph.nodes if "_aa" in str(node.target)]


@pytest.mark.parametrize("size", [(20, 48), (31, 64), (80, 15), (80, 64)])
def test_no_file_needs_an_antialiasing_resize(size):
    class Smaller(torch.nn.Module):
        def forward(self, pixels):
            return images.antialiased(pixels, size)

    program = onnx_file.export_program(Smaller(), torch.rand(2, 3, 40, 64), {0: torch.export.Dim("batch")})
    pixels = torch.rand(3, 3, 40, 64)
    torch.testing.assert_close(program.module()(pixels), images.antialiased(pixels, size), atol=1e-5, rtol=0)
    assert not antialiasing(program)


def test_folding_changes_no_answer():
    torch.manual_seed(0)
    for live in (True, False):
        model = new_rtdetr("tiny", {0: "a", 1: "b"}, train_backbone_norms=live).eval()
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_(0, 0.1)
        before, small = {name: value.clone() for name, value in model.state_dict().items()}, folded(model)
        pixels = torch.rand(1, 3, 96, 96)
        with torch.no_grad():
            ours, theirs = small(pixel_values=pixels), model(pixel_values=pixels)
        assert onnx_file.difference([ours.enc_outputs_class], [theirs.enc_outputs_class]) < 1e-4
        assert not any("BatchNorm" in type(module).__name__ or "RepVgg" in type(module).__name__
                       for module in small.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- refusals -------------------------------------------------------------------------------------------------------

def test_a_file_that_loses_too_much_is_refused_and_the_others_stay(scenes, tmp_path, monkeypatch):
    def spoilt(*args):
        if not programs:  # tracing is most of the time
            programs.append(traced(*args))
            with torch.no_grad():
                for name, value in programs[0].state_dict.items():  # the order of scores stays, the boxes are elsewhere
                    value.add_(3 if "bbox_embed" in name and name.endswith("bias") else 0)
        return programs[0]
    traced, programs = onnx_file.export_program, []
    monkeypatch.setattr(onnx_file, "export_program", spoilt)
    constants = {"MODEL_NAME": "", "RTDETR_MODEL_NAME": TRAINED, "IMAGE_SIZE": 160, "FORMATS": ("torch.export",),
                 "CALIBRATION_DIR": str(scenes / "coco" / "val2017"), "OUTPUT_DIR": str(tmp_path)}
    with pytest.raises(UserError, match="vanilla.pt2 differs from PyTorch by .*TOLERANCE"):
        export.main(**constants)
    monkeypatch.setitem(formats.FORMATS, "torch.export", formats.FORMATS["torch.export"]._replace(reduced=True))
    with pytest.raises(UserError, match="vanilla.pt2 finds 0% of what PyTorch finds.*CALIBRATION_DIR"):
        export.main(**constants)
    coco = constants | {"COCO_DIR": str(scenes / "coco"), "PERCENT_DATASET": 50}
    with pytest.raises(UserError, match=r"vanilla.pt2 keeps .* mAP.*LEAST_MAP = 0.97"):
        export.main(**coco)
    assert names_in(tmp_path) == {"manifest.json", "previous_1", "previous_2"}
    assert export.main(**coco, LEAST_MAP=0)["vanilla"]["torch.export"]["mAP"] < 0.2  # the user's own decision
    assert (tmp_path / "vanilla.pt2").is_file()
    monkeypatch.setattr(export, "_LEARNT", 1.0)  # as if the detector knew nothing: any share of its mAP is noise
    with pytest.raises(UserError, match="vanilla.pt2 keeps .*train the detector first"):
        export.main(**coco)


def test_export_without_packages_says_what_to_install(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    small = NONE | {"RTDETR_MODEL_NAME": str(weights / "rtdetr"), "IMAGE_SIZE": 96, "OUTPUT_DIR": str(weights / "out")}
    with pytest.raises(UserError, match="onnxscript: pip install -r requirements-export.txt.*FORMATS"):
        export.main(**small)
    monkeypatch.setattr(export, "export", lambda *args: {})
    demo = small | {"COCO_DIR": "", "RAIN_DETECTOR_PATH": "", "RFDETR_PATH": "", "ADAPTER_PATH": "",
                    "RAINY_DETECTOR_NAME": ""}
    assert export.main(demo=True, **demo, INT8_KEPT=("backbone",)) == {"vanilla": {}}  # noted, not refused
    assert "no onnx, onnx-fp16, onnx-int8" in (shown := capsys.readouterr().out)
    assert "note: INT8_KEPT has no effect without an INT8 format" in shown
    assert "pip install -r requirements-export.txt" in shown


@pytest.mark.parametrize("values, words", [
    ({"FORMATS": ("tensorrt",)}, "FORMATS"), ({"OPSET": 17}, "OPSET = 17.*18"), ({"LEAST_MAP": -1.0}, "LEAST_MAP"),
    ({"FORMATS": ("torch.export",), "INT8_KEPT": ("backbones",)}, "INT8_KEPT holds 'backbones'"),
    ({"FORMATS": ("onnx-int8",)}, "CALIBRATION_DIR.*onnx-int8"), ({"CALIBRATION_IMAGES": 0}, "CALIBRATION_IMAGES"),
    ({"FORMATS": ("torch.export",), "CALIBRATION_DIR": "./nowhere"}, "CALIBRATION_DIR.*nowhere"),
    ({"RAINY_MODEL": "other"}, "RAINY_MODEL"), ({"DERAIN_SCALE": 3.0}, "DERAIN_SCALE"),
    ({"RAINY_MODEL": "adapter", "FORMATS": ("torch.export",)}, "RAINY_MODEL = 'adapter'.*written are vanilla"),
    ({"RTDETR_MODEL_NAME": "", "ADAPTER_PATH": "a.safetensors", "FORMATS": ("torch.export",)},
     "ADAPTER_PATH.*RTDETR_MODEL_NAME"),
    ({"RAINY_MODEL": "derainer_rtdetr", "FORMATS": ("torch.export",)}, "'derainer_rtdetr' needs DERAIN_MODEL_PATH"),
    ({"RAINY_DETECTOR_NAME": "./none", "FORMATS": ("torch.export",)}, "RAINY_DETECTOR_NAME = './none' does not exist"),
    (NONE | {"FORMATS": ("torch.export",)}, "nothing to export")])
def test_wrong_constants_are_refused(weights, values, words):
    pytest.importorskip("onnxscript")
    small = {"RTDETR_MODEL_NAME": str(weights / "rtdetr"), "MODEL_NAME": "", "IMAGE_SIZE": 96}
    with pytest.raises(UserError, match=words):
        export.main(**small | values)


def test_what_is_no_exported_file(tmp_path):
    pytest.importorskip("onnxruntime")
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(UserError, match=f"{name} is damaged, or no file of export.py"):
            exported.load_exported(tmp_path / name)
    for name in ("missing.onnx", "a.txt"):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(UserError, match=f"{name}.*export.py"):
            exported.load_exported(tmp_path / name)


def test_an_opset_that_the_exporter_does_not_reach_is_an_error(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = onnx_file.export_program(torch.nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(UserError, match="opset 40 was asked for.*choose"):
        onnx_file.write(program, tmp_path / "a.onnx", 40, "x", ["y"])


def test_a_difference_that_is_no_number_is_not_passed_over():
    """Python's max keeps 0.1 of (0.1, NaN)."""
    right, wrong = torch.rand(1, 3, 2), torch.full((1, 3, 2), float("nan"))
    assert math.isnan(onnx_file.difference([right, wrong], [right, right]))
    found, expected = (SimpleNamespace(restored=right, other=one) for one in (wrong, right))
    about = {"outputs": ["restored", "other"], "kind": "derainer"}
    assert math.isnan(formats.largest_difference(found, expected, about))


def test_a_file_that_answers_with_nan_is_refused_and_ends_nothing_else(monkeypatch):
    about = {"kind": "detector", "outputs": ["logits", "pred_boxes"], "image_size": 32, "model": "vanilla"}
    model = formats.Model(lambda x: (torch.full((len(x), 4, 2), -9.0), torch.full((len(x), 4, 4), 0.5)), about)
    monkeypatch.setattr(exported, "load_exported", lambda path: lambda x: SimpleNamespace(
        logits=torch.full((len(x), 4, 2), -9.0), pred_boxes=torch.full((len(x), 4, 4), float("nan"))))
    cfg = SimpleNamespace(COCO_DIR="", TOLERANCE=1e-3)
    inputs = [torch.rand(4, 3, 32, 32), torch.rand(1, 3, 32, 32)]
    row = export.check("a_fp16.onnx", "onnx-fp16", model, inputs, cfg, None, {})
    assert "NaN" in row["refused"]
    export.print_table({"vanilla": {"onnx-fp16": row | {"file": "a", "MB": 1.0, "PyTorch's mAP": None}}}, "out")


def test_the_table_of_a_detector_that_finds_nothing(capsys):
    row = {"file": "a.onnx", "difference": 0.0, "MB": 1.0, "agreement": 1.0, "refused": "", "PyTorch's mAP": 0.0}
    export.print_table({"vanilla": {"onnx": row | {"mAP": 0.01}, "onnx-int8": row | {"mAP": 0.0}}}, "out")
    assert "0.0100" in capsys.readouterr().out


def test_calibration_sees_the_pictures_as_the_detector_does(tmp_path):
    Image.fromarray(np.full((50, 80, 3), 255, np.uint8)).save(tmp_path / "white.png")
    (one,) = formats.real_images([tmp_path / "white.png"], 64)
    assert one.shape == (1, 3, 64, 64) and one.min() == one.max() == 1
    assert presets.evaluation(64)(torch.zeros(3, 50, 80, dtype=torch.uint8)).shape == (3, 64, 64)


def test_images_to_calibrate_on_come_from_any_form_of_data(coco, tmp_path):
    for form in ("yolo", "voc"):  # VOC has the images of all splits in one folder
        convert_dataset.main(SOURCE=str(coco / "coco"), TO=form, OUT=str(tmp_path / form))
    names = []
    for root in (coco / "coco", tmp_path / "yolo", tmp_path / "voc"):
        cfg = config.resolve(vars(export), {"COCO_DIR": str(root), "CALIBRATION_IMAGES": 5})
        paths = export.image_paths(cfg)
        names.append([path.name for path in paths])
        assert len(paths) == 5 and all(path.is_file() for path in paths)
        assert all("train" in path.relative_to(root).as_posix() for path in paths)
    assert names[0] == names[1] == names[2]
    assert export.image_paths(config.resolve(vars(export), {"COCO_DIR": ""})) == []
