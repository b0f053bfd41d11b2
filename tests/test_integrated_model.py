"""SPDNet in front of a frozen RT-DETR: outputs, gradients, files, and what frozen has to mean."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import small_spdnet

from utils import freeze, integrated_model, losses
from utils.config import UserError
from utils.integrated_model import RainRobustRTDETR, load_integrated_model
from utils.networks import clamp, distillation
from utils.networks.rtdetr import FEATURE_LEVELS, load_rtdetr, new_rtdetr
from utils.networks.spdnet import SPDNet
from utils.networks.unet import new_unet

ROOT = Path(__file__).resolve().parent.parent
LABELS = [{"class_labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.2, 0.1, 0.1]])},
          {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


@pytest.fixture
def model(small_detector):
    return RainRobustRTDETR(small_spdnet(), copy.deepcopy(small_detector), freeze_detection=True)


@pytest.fixture
def images():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_published_size_gives_the_guides_block():
    names = {i: str(i) for i in range(80)}
    model = RainRobustRTDETR(SPDNet(), new_rtdetr("r18", names, train_backbone_norms=False),
                             freeze_detection=True)
    text = freeze.describe({"SPDNet": model.derain_module, "RT-DETR": model.detection_module})
    assert text.splitlines() == ["SPDNet: 3,318,741 trainable parameters (100%)",
                                 "RT-DETR: 0 trainable parameters (0% - FROZEN)",
                                 "Total parameters: 23,493,349", "Trainable parameters: 3,318,741 (14.1%)"]


def test_outputs_are_hugging_faces_plus_the_derained_image(model, images):
    outputs = model(images, labels=LABELS)
    assert outputs.logits.shape == (2, 40, 2) and outputs.pred_boxes.shape == (2, 40, 4)
    assert outputs.loss.requires_grad and {"loss_vfl", "loss_bbox", "loss_giou"} <= set(outputs.loss_dict)
    assert outputs.derained.shape == images.shape and 0 <= outputs.derained.min() <= outputs.derained.max() <= 1
    direct = model.detection_module(pixel_values=outputs.derained, labels=LABELS)
    assert torch.equal(direct.logits, outputs.logits) and torch.equal(direct.loss, outputs.loss)
    assert torch.equal(model.derain(images), outputs.derained)


@pytest.mark.parametrize("level", FEATURE_LEVELS)
def test_asking_for_features_changes_no_output(model, images, level):
    plain, rich = model(images, labels=LABELS), model(images, labels=LABELS, clean=images[:1], feature_level=level)
    assert torch.equal(plain.logits, rich.logits) and torch.equal(plain.loss, rich.loss)
    assert [f.shape[-1] for f in rich.features] == [12, 6, 3] * (2 if level == "both" else 1)
    assert rich.derained_clean.shape == (1, 3, 96, 96)
    same = model.clean_features(rich.derained.detach(), level)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same, rich.features, strict=True))
    assert losses.feature_consistency(rich.features, same) < 1e-9


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_teachers_answers_are_compared_with_those_on_derained_images(images, labels):
    detector = load_rtdetr(str(ROOT / "assets" / "demo" / "rtdetr"))  # a new one is sure of nothing
    model, teacher = RainRobustRTDETR(small_spdnet(), detector, freeze_detection=True), distillation.Teacher(detector)
    derained = model.derain(images).detach()
    outputs = model(images, labels=labels, feature_level="both", answer=teacher(derained), terms=distillation.TERMS)
    assert outputs.taught.keys() == set(distillation.TERMS) and len(outputs.features) == 6
    assert all(abs(value.item()) < 1e-5 for value in outputs.taught.values())
    if labels:
        assert torch.equal(outputs.loss, model(images, labels=labels, feature_level="both").loss)
    again = model(images, labels=labels, answer=teacher(1 - derained), terms=("queries", "positions"))
    sum(again.taught.values()).backward()
    assert all(value.item() > 0.01 for value in again.taught.values())
    assert any(parameter.grad.abs().max() > 0 for parameter in model.derain_module.parameters()
               if parameter.grad is not None)
    assert all(parameter.grad is None for parameter in model.detection_module.parameters())


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_many_images_pass_spdnet_in_parts_without_gradients(model, monkeypatch, scale):
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole = integrated_model.derain_unclamped(model.derain_module, images, scale)  # with gradients: at once
    seen = []
    model.derain_module.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    monkeypatch.setattr(integrated_model, "PIXELS_AT_ONCE", 2 * int(64 * scale) ** 2)
    with torch.no_grad():
        parts = integrated_model.derain_unclamped(model.derain_module, images, scale)
    assert seen == [2, 2, 1] and torch.allclose(whole, parts, atol=1e-5)


def test_a_foreign_best_pt_beside_the_weights_is_left_alone(tmp_path):
    best = tmp_path / "best.pt"
    for write in (lambda: best.write_bytes(b"no checkpoint"), lambda: torch.save([1, 2], best)):
        write()
        integrated_model.require_trained_scale(tmp_path / "model_spa.pt", 0.5)
        assert integrated_model.trained_scale(tmp_path / "model_spa.pt") == 1
        assert integrated_model.trained_size(tmp_path / "model_spa.pt") is None
        assert integrated_model.pretraining_note(tmp_path / "model_spa.pt", 0.5) is None


def test_feature_consistency_is_relative_to_each_level():
    targets = [torch.full((2, 4, 8, 8), 100.0), torch.full((2, 8, 2, 2), 0.01)]
    assert losses.feature_consistency(targets, targets).item() == 0
    assert losses.feature_consistency([0 * t for t in targets], targets).item() == pytest.approx(1.0)
    assert losses.feature_consistency([1.1 * t for t in targets], targets).item() == pytest.approx(0.01, rel=1e-4)


def test_gradients_reach_every_used_tensor_of_spdnet_and_nothing_else(model, images):
    model.train()
    outputs = model(images, labels=LABELS)
    assert outputs.denoising_meta_values is None  # the frozen detector stays in eval: no denoising queries
    outputs.loss.backward()
    missing = {name for name, p in model.derain_module.named_parameters() if p.grad is None}
    assert missing == set(model.derain_module.unused_parameters())
    assert all(p.grad is None for p in model.detection_module.parameters())


def test_training_leaves_the_detector_bit_identical(model, images):
    before = freeze.fingerprint(model.detection_module)
    vanilla = model.detection_module(pixel_values=images).logits
    model.train()
    optimizer = torch.optim.Adam(model.derain_module.parameters(), lr=1e-3)
    start = model.derain(images).detach()
    for _ in range(2):
        model(images, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert freeze.fingerprint(model.detection_module) == before
    assert torch.equal(model.detection_module(pixel_values=images).logits, vanilla)
    assert not torch.equal(model.derain(images), start)


def test_without_freezing_batch_norms_would_move(small_detector, images):
    """The trap that freezing guards against: requires_grad alone does not stop them."""
    loose = copy.deepcopy(small_detector).requires_grad_(False)
    before = freeze.fingerprint(loose)
    loose.train()
    loose(pixel_values=images)
    assert freeze.fingerprint(loose) != before


def test_the_clamp_pulls_stray_values_back():
    x = torch.tensor([-0.5, 0.5, 1.5, -0.5, 1.5], requires_grad=True)
    y = clamp._ClampWithReturn.apply(x)
    assert y.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    y.backward(torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0]))
    assert x.grad.tolist() == [-1.0, 1.0, 1.0, 0.0, 0.0]  # descent moves by -grad: only towards the range


def test_half_scale_starts_near_the_identity_and_learns(small_detector, images):
    smooth = torch.nn.functional.interpolate(images, scale_factor=1 / 8, mode="area")
    smooth = torch.nn.functional.interpolate(smooth, size=(96, 96), mode="bilinear")
    model = RainRobustRTDETR(small_spdnet(), small_detector, derain_scale=0.5)
    derained = model.derain(smooth)
    assert derained.shape == smooth.shape and (derained - smooth).abs().mean() < 0.02
    derained.mean().backward()
    assert model.derain_module.conv_init1.conv.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="DERAIN_SCALE"):
        RainRobustRTDETR(small_spdnet(), small_detector, derain_scale=0)


def test_files_reproduce_the_outputs(model, images, tmp_path):
    model.save_pretrained(tmp_path / "both")
    again = RainRobustRTDETR.from_pretrained(tmp_path / "both", freeze_detection=True)
    assert torch.equal(model.eval()(images).logits, again.eval()(images).logits)
    assert torch.load(tmp_path / "both" / "spdnet.pt").keys() == model.derain_module.state_dict().keys()
    loaded = load_integrated_model(tmp_path / "both" / "spdnet.pt", str(tmp_path / "both" / "rtdetr"), num_labels=2,
                                   freeze_derain=True, freeze_detection=True)
    assert torch.equal(model(images).logits, loaded.eval()(images).logits)
    assert freeze.count_parameters(loaded)[1] == 0


def test_files_of_another_derainer_reproduce_the_outputs(small_detector, images, tmp_path):
    torch.manual_seed(0)
    derainer = new_unet("unet", width=4)
    with torch.no_grad():
        derainer.net.head.bias += 0.1
    model = RainRobustRTDETR(derainer, copy.deepcopy(small_detector), freeze_detection=True).eval()
    model.save_pretrained(tmp_path / "both")
    again = RainRobustRTDETR.from_pretrained(tmp_path / "both").eval()
    assert torch.equal(model(images).logits, again(images).logits)
    assert not torch.equal(model(images).derained, images)


def test_without_weights_spdnet_starts_near_the_identity(weights):
    model = load_integrated_model(None, str(weights / "rtdetr"), 2)
    image = torch.full((1, 3, 32, 32), 0.5)
    assert (model.derain(image) - image).abs().mean() < 0.02


def test_errors_name_the_constant(weights, tmp_path):
    rtdetr, spdnet = str(weights / "rtdetr"), weights / "spdnet.pt"
    with pytest.raises(UserError, match="SPDNET_MODEL_PATH.*does not exist.*--demo"):
        load_integrated_model(tmp_path / "none.pt", rtdetr, 2)
    with pytest.raises(UserError, match="RTDETR_MODEL_NAME.*none.*does not exist"):
        load_integrated_model(spdnet, str(tmp_path / "none"), 2)
    with pytest.raises(UserError, match="has 2 classes, 80 were expected"):
        load_integrated_model(spdnet, rtdetr)
    with pytest.raises(UserError, match="RTDETR_MODEL_NAME = 'PekingU/rtdetr_r18vd' cannot be loaded.*--demo"):
        load_integrated_model(spdnet, "PekingU/rtdetr_r18vd")
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="wrong.pt"):
        load_integrated_model(tmp_path / "wrong.pt", rtdetr, 2)
    with pytest.raises(UserError, match="integrated.json"):
        RainRobustRTDETR.from_pretrained(tmp_path)


def test_bf16_keeps_losses_in_float32(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, labels=LABELS)
    assert outputs.loss.dtype == torch.float32 and torch.isfinite(outputs.loss)
    plain = model(images, labels=LABELS)
    assert outputs.loss.item() == pytest.approx(plain.loss.item(), rel=0.1)
