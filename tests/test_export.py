"""export.py: files that answer as PyTorch does, and clear errors where packages are missing."""

import sys
from pathlib import Path

import pytest
import torch

import export
from utils import feature_derain
from utils.config import UserError
from utils.networks import onnx_file

ROOT = Path(__file__).resolve().parent.parent


def test_export_writes_checked_files(weights, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    trained = str(ROOT / "assets" / "demo" / "rtdetr")  # a random detector's queries are all equally good
    model = feature_derain.create_feature_derain_rtdetr(trained)
    with torch.no_grad():
        for block in model.derain_module.blocks:
            block.blend.fill_(0.5)
    model.save_pretrained(weights / "multiscale", 96)
    results = export.main(MODEL_NAME=str(weights / "multiscale"), RTDETR_MODEL_NAME=trained, IMAGE_SIZE=96,
                          OUTPUT_DIR=str(weights / "exported"))
    assert set(results) == {"vanilla", "feature_derain"}
    assert {path.name for path in (weights / "exported").iterdir()} == {
        f"{name}.{kind}" for name in results for kind in ("onnx", "pt2")}
    for name, differences in results.items():
        assert set(differences) == {"onnx", "torch.export"} and max(differences.values()) < 1e-3
        program = torch.export.load(weights / "exported" / f"{name}.pt2").module()
        logits, boxes = program(torch.rand(1, 3, 96, 96))
        assert logits.shape == (1, 40, 5) and boxes.shape == (1, 40, 4)
    assert capsys.readouterr().out.isascii()


def test_export_without_onnx_says_what_to_install(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime.*FORMATS"):
        export.main(RTDETR_MODEL_NAME=str(weights / "rtdetr"), MODEL_NAME="", IMAGE_SIZE=96,
                    OUTPUT_DIR=str(weights / "exported"))
    monkeypatch.setattr(export, "export", lambda model, name, cfg: dict.fromkeys(cfg.FORMATS, 0.0))
    assert export.main(demo=True, RTDETR_MODEL_NAME=str(weights / "rtdetr"), MODEL_NAME="", IMAGE_SIZE=96,
                       FORMATS=("onnx",), OUTPUT_DIR=str(weights / "exported")) == {"vanilla": {}}  # noted, not refused
    with pytest.raises(UserError, match="FORMATS"):
        export.main(FORMATS=("tensorrt",))
    with pytest.raises(UserError, match="OPSET = 17.*18"):
        export.main(OPSET=17)


def test_an_opset_that_the_exporter_does_not_reach_is_an_error(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = onnx_file.export_program(torch.nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(UserError, match="opset 40 was asked for.*choose"):
        onnx_file.write(program, tmp_path / "a.onnx", 40, "x", ["y"])
