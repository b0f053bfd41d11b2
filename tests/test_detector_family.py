"""RT-DETRv2 and D-FINE in the place of RT-DETR: loaded by their config, equal to transformers, trained, kept."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import names_in, small_spdnet
from transformers import DFineConfig, HGNetV2Config, RTDetrResNetConfig, RTDetrV2Config

import export
import Training_FeatureDerain
import Training_RTDETR
import Training_SPDNet_Adaptation
from utils import freeze
from utils.conditional_model import load_rainy_detector
from utils.config import UserError
from utils.feature_derain import FeatureDerainRTDETR
from utils.inference.exported import load_exported
from utils.integrated_model import RainRobustRTDETR
from utils.networks import adapter, distillation, folding, rtdetr_loss
from utils.networks.rtdetr import backbone_features, detect_from_features, freeze_first_stages, load_rtdetr, new_rtdetr

_SMALL = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4, "hidden_expansion": 0.5, "decoder_layers": 2,
          "decoder_in_channels": [64, 64, 64], "num_queries": 40, "num_denoising": 40,
          "encoder_in_channels": [64, 96, 128], "id2label": {0: "person", 1: "car"},
          "label2id": {"person": 0, "car": 1}}
KINDS = {"rt_detr_v2": "RTDetrV2ForObjectDetection", "d_fine": "DFineForObjectDetection"}


def _config(kind):
    if kind == "rt_detr_v2":
        backbone = RTDetrResNetConfig(out_indices=[2, 3, 4], layer_type="basic", hidden_sizes=[32, 64, 96, 128],
                                      depths=[1, 1, 1, 1], embedding_size=32)
        return RTDetrV2Config(backbone_config=backbone, **_SMALL)
    backbone = HGNetV2Config(  # as the published ones, narrower
        stem_channels=[3, 8, 16], stage_in_channels=[16, 32, 64, 96], stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[32, 64, 96, 128], stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5], stage_numb_of_layers=[2, 2, 2, 2], embedding_size=16,
        hidden_sizes=[32, 64, 96, 128], out_features=["stage2", "stage3", "stage4"])
    return DFineConfig(backbone_config=backbone, **_SMALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a folder as the hub holds them, with random weights}."""
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    for kind, name in KINDS.items():
        getattr(transformers, name)(_config(kind)).save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


def images():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def labels():
    return [{"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])},
            {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_losses_equal_those_of_transformers(folders, kind):
    own, theirs = load_rtdetr(folders[kind]), getattr(transformers, KINDS[kind]).from_pretrained(folders[kind])
    assert type(own).__name__ == KINDS[kind] and not own.training
    for training in (False, True):
        found, expected = [], []
        for detector, results in ((own, found), (theirs, expected)):
            torch.manual_seed(1)  # denoising queries
            results.append(detector.train(training)(pixel_values=images(), labels=labels()))
            detector.eval()
        assert torch.equal(found[0].logits, expected[0].logits)
        assert found[0].loss_dict.keys() == expected[0].loss_dict.keys()
        for name, value in expected[0].loss_dict.items():
            torch.testing.assert_close(found[0].loss_dict[name], value, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=1e-5)
    assert {"loss_vfl", "loss_bbox", "loss_giou"} <= found[0].loss_dict.keys()
    assert any("fgl" in name for name in found[0].loss_dict) == (kind == "d_fine")


def test_normalised_by_the_boxes_of_all_ranks(folders, monkeypatch):
    detector = load_rtdetr(folders["d_fine"]).train()

    def terms():
        torch.manual_seed(1)
        return detector(pixel_values=images(), labels=labels()).loss_dict
    alone = terms()
    monkeypatch.setattr(rtdetr_loss, "count_over_ranks", lambda count, device: torch.tensor(3.0))  # 2 here, 4 there
    for name, value in terms().items():
        torch.testing.assert_close(value, alone[name] * (1 if "ddf" in name else 2 / 3), rtol=1e-5, atol=1e-6)


def test_outputs_that_are_not_finite_give_a_loss_that_is_none(folders):
    detector = load_rtdetr(folders["d_fine"]).train()
    with torch.no_grad():
        detector.model.decoder.bbox_embed[0].layers[0].weight.fill_(float("nan"))
    assert detector(pixel_values=images(), labels=labels()).loss.isnan()


def test_features_pass_through_the_same_detector(folder):
    detector = load_rtdetr(folder)
    expected = detector(pixel_values=images(), labels=labels())
    found = detect_from_features(detector, backbone_features(detector, images()), labels())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    folded = folding.folded(detector)
    torch.testing.assert_close(folded(pixel_values=images()).logits, expected.logits, rtol=0, atol=1e-4)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) < sum(
        isinstance(m, torch.nn.BatchNorm2d) for m in detector.modules())


def test_a_frozen_one_passes_gradients_to_spdnet_and_stays(folder):
    detector = load_rtdetr(folder)
    model = RainRobustRTDETR(small_spdnet(), detector, freeze_detection=True).train()
    digest = freeze.fingerprint(detector)
    outputs = model(images(), labels=labels(), feature_level="both")
    outputs.loss.backward()
    assert len(outputs.features) == 6 and freeze.fingerprint(detector) == digest
    assert all(p.grad is None for p in detector.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.derain_module.parameters() if p.grad is not None)


def test_feature_module_is_kept_and_found_again(folder, tmp_path):
    model = FeatureDerainRTDETR(load_rtdetr(folder)).eval()
    model.save_pretrained(tmp_path / "model")
    again = FeatureDerainRTDETR.from_pretrained(tmp_path / "model")
    assert type(again.rtdetr) is type(model.rtdetr)
    with torch.no_grad():
        assert torch.equal(again(images()).logits, model(images()).logits)


def test_adapter_and_teacher(folder, tmp_path):
    pytest.importorskip("peft")
    detector = load_rtdetr(folder)
    model = adapter.inject(detector, 2, 2, adapter.TARGETS).eval()
    with torch.no_grad():
        expected = detector(pixel_values=images())
        assert torch.equal(model(pixel_values=images()).logits, expected.logits)
        for parameter in model.parameters():
            parameter += 0.01 * parameter.requires_grad
        adapter.write(model, tmp_path / "rain.safetensors", freeze.fingerprint(detector), rank=2, alpha=2)
        folded = load_rainy_detector(str(tmp_path / "rain.safetensors"), base=detector)
        # the features: with random weights a rounding error chooses other queries
        found, wanted = (backbone_features(one, images()) for one in (folded, model))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    student = distillation.Student(copy.deepcopy(detector)).eval()
    _, terms = student(images(), None, distillation.Teacher(detector)(images()))
    assert terms.keys() == set(distillation.TERMS) and all(abs(value) < 1e-5 for value in terms.values())


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_from_a_teacher_of_their_kind(kind, folders):
    """While it trains, D-FINE's decoder answers with every layer, the teacher's with the last one."""
    detectors = {name: load_rtdetr(folder) for name, folder in folders.items()}
    teacher, student = distillation.Teacher(detectors[kind]), distillation.Student(load_rtdetr(folders[kind]))
    student.rtdetr.model.decoder.train()
    _, terms = student(images(), None, teacher(images()), ("queries",))
    assert abs(terms["queries"]) < 1e-5
    _, terms = student.train()(0.5 * images(), labels(), teacher(images()))
    sum(terms.values()).backward()
    layers = student.rtdetr.model.decoder.layers
    assert terms["queries"] > 0 and all(any(p.grad.any() for p in layer.parameters()) for layer in layers)
    other = next(name for name in KINDS if name != kind)
    with pytest.raises(UserError, match="TEACHER_NAME: the teacher's kind"):
        distillation.require_same_form(detectors[other], student.rtdetr, "TEACHER_NAME")


@pytest.fixture
def awake(folder, tmp_path):
    """A folder of a detector whose scores differ: of one with new weights a rounding error chooses the queries."""
    detector = load_rtdetr(folder)
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        torch.nn.init.xavier_normal_(detector.model.enc_score_head.weight)
        for _ in range(2):
            detector.train()(pixel_values=images())
    detector.eval().save_pretrained(tmp_path / "awake")
    return str(tmp_path / "awake")


def test_exported_for_any_batch(awake, tmp_path):
    pytest.importorskip("onnxruntime")
    files = export.main(RTDETR_MODEL_NAME=awake, MODEL_NAME="", IMAGE_SIZE=96, FORMATS=("onnx",),
                        OUTPUT_DIR=str(tmp_path / "out"))
    assert files
    run, detector = load_exported(tmp_path / "out" / "vanilla.onnx"), load_rtdetr(awake)
    for number in (1, 3):
        batch = torch.rand(number, 3, 96, 96, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.testing.assert_close(run(batch).logits, detector(pixel_values=batch).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_trainings_take_them(kind, folders, coco, weights):
    common = {"COCO_DIR": str(coco / "coco"), "COCO_RAIN_DIR": str(coco / "coco_rain"), "IMAGE_SIZE": 96,
              "BATCH_SIZE": 4, "RTDETR_MODEL_NAME": folders[kind], "WARMUP_STEPS": 0, "PERCENT_DATASET": 100}
    out = coco / "out"
    Training_RTDETR.main(**common, OUTPUT_DIR=str(out), NUM_EPOCHS=1, DATALOADER_WORKERS=0, EMA_DECAY=0.5)
    assert type(load_rtdetr(str(out / "detector"))).__name__ == KINDS[kind]
    code = re.search(r"```python\n(.*?)```", (out / "detector" / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    picture = next((coco / "coco" / "val2017").iterdir())
    exec(code.replace("path/of/this/folder", (out / "detector").as_posix()).replace("street.jpg", picture.as_posix()),
         found := {})
    assert type(found["model"]).__name__ == KINDS[kind]  # loaded as another class, half of the weights were new
    result = Training_SPDNet_Adaptation.main(
        **common, OUTPUT_DIR=str(coco / "adapted"), SPDNET_MODEL_PATH=str(weights / "spdnet.pt"), NUM_EPOCHS=1,
        DATALOADER_WORKERS=0, EMA_DECAY=0.0, PICTURES=1)
    assert result["history"] and "before_after.png" in names_in(coco / "adapted")
    Training_FeatureDerain.main(**common, OUTPUT_DIR=str(coco / "feature"), PHASE1_EPOCHS=1, PHASE2_EPOCHS=1,
                                COCO_RATIO=0.5, RAIN_RATIO=0.5, NUM_WORKERS=0)
    assert type(FeatureDerainRTDETR.from_pretrained(coco / "feature" / "model").rtdetr).__name__ == KINDS[kind]


def test_other_models_are_refused_by_name(tmp_path):
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a resnet, one of rt_detr, rt_detr_v2, d_fine is needed"):
        load_rtdetr(str(tmp_path))
    assert Path(tmp_path).is_dir()


@pytest.mark.parametrize("count, trained", [(0, {"embedder", "0", "1", "2", "3"}), (1, {"0", "1", "2", "3"}),
                                            (3, {"2", "3"})])
@pytest.mark.parametrize("kind", ["rt_detr", *KINDS])
def test_the_first_stages_of_the_backbone_freeze_with_their_statistics(folders, kind, count, trained):
    model = load_rtdetr(folders[kind]) if kind in folders else new_rtdetr("tiny", {0: "person", 1: "car"})
    freeze_first_stages(model, count)
    model.train()
    backbone = model.model.backbone.model
    before = copy.deepcopy(backbone.state_dict())
    outputs = model(torch.rand(2, 3, 64, 64), labels=[{"class_labels": torch.tensor([0]),
                                                       "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2)
    outputs.loss.backward()
    parts = {"embedder": backbone.embedder} | dict(backbone.encoder.stages.named_children())
    assert {name for name, part in parts.items()
            if any(parameter.grad is not None for parameter in part.parameters())} == trained
    after = backbone.state_dict()
    moved = {"embedder" if name.startswith("embedder") else name.split(".")[2] for name in after
             if "running" in name and not torch.equal(before[name], after[name])}
    assert moved == (trained if kind == "rt_detr" else set())  # the others come with frozen statistics, as published


def test_a_count_of_frozen_stages_that_the_backbone_has_not_is_named(folder):
    for count in (-1, 5, 1.5):
        with pytest.raises(UserError, match="FREEZE_AT = .* choose 0 to 4"):
            freeze_first_stages(load_rtdetr(folder), count)
