"""Feature-level de-raining: the identity at the start, sizes, gradients, freezing, files, compile."""

import copy

import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor

from utils import feature_derain, freeze, losses
from utils.config import UserError
from utils.feature_derain import (
    CBAM,
    FeatureDerainBlock,
    FeatureDerainRTDETR,
    LightweightFeatureDerain,
    MultiScaleFeatureDerain,
    SpatialAttention,
    create_feature_derain_rtdetr,
)
from utils.networks.rtdetr import new_rtdetr

LABELS = [{"class_labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.2, 0.1, 0.1]])},
          {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


@pytest.fixture
def images():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rtdetr(small_detector, images):
    """A detector with BatchNorm statistics of its own, as a pretrained one: without them its signals fade away."""
    model = copy.deepcopy(small_detector)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(pixel_values=images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture
def model(rtdetr):
    torch.manual_seed(1)
    return FeatureDerainRTDETR(rtdetr).eval()


def disturbed(model):
    """A module that is no longer the identity."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.derain_module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- sizes and start -------------------------------------------------------------------------------------------

def test_parameter_counts_are_those_of_the_docs():
    assert freeze.count_parameters(LightweightFeatureDerain())[0] == 63
    assert freeze.count_parameters(LightweightFeatureDerain((512, 1024, 2048)))[0] == 63
    assert freeze.count_parameters(MultiScaleFeatureDerain())[0] == 1_455_516
    assert freeze.count_parameters(MultiScaleFeatureDerain(width=0.125))[0] == 336_412
    assert freeze.count_parameters(MultiScaleFeatureDerain((512, 1024, 2048)))[0] == 3_978_540


@pytest.mark.parametrize("size", ["tiny", "r18", "r34", "r50"])
@pytest.mark.parametrize("derain_type", feature_derain.DERAIN_TYPES)
def test_fresh_module_is_the_identity(size, derain_type):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 160, 160)  # 525 places: the published sizes pick 300 of them as queries
    rtdetr = new_rtdetr(size, {0: "person", 1: "car"}).eval()
    model = FeatureDerainRTDETR(rtdetr, derain_type).eval()
    with torch.no_grad():
        ours, vanilla = model(images, labels=LABELS[:1]), rtdetr(pixel_values=images, labels=LABELS[:1])
    torch.testing.assert_close(ours.logits, vanilla.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pred_boxes, vanilla.pred_boxes, rtol=0, atol=1e-6)
    assert ours.loss.item() == pytest.approx(vanilla.loss.item(), rel=1e-6)
    assert [tuple(f.shape[-2:]) for f in ours.features] == [(20, 20), (10, 10), (5, 5)]


def test_a_trained_module_does_change_the_output(model, images):
    before = model(images).logits
    assert not torch.allclose(disturbed(model)(images).logits, before, atol=1e-3)


def test_blocks_keep_shapes_and_masks_are_shares():
    features = torch.randn(2, 32, 10, 7, generator=torch.Generator().manual_seed(0))
    block = FeatureDerainBlock(32, 2, 12)
    assert torch.equal(block(features), features)  # three attributes: rain_mask, blend, refine
    mask = block.rain_mask(features)
    assert mask.shape == (2, 1, 10, 7) and 0 < mask.min() and mask.max() < 0.5  # starts nearly closed
    with torch.no_grad():
        block.blend.fill_(0.5)
    torch.testing.assert_close(block(features), features * (1 - 0.5 * mask))  # refine is still the identity
    assert CBAM(32)(features).shape == features.shape
    assert (CBAM(32)(features).abs() <= features.abs()).all()  # two gates in (0, 1)
    assert SpatialAttention()(features).shape == (2, 1, 10, 7)


# ---- training --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("derain_type", ["multiscale", "lightweight"])
def test_every_parameter_gets_a_gradient_within_the_first_steps(rtdetr, images, derain_type):
    torch.manual_seed(3)
    model = FeatureDerainRTDETR(rtdetr, derain_type)
    model.freeze_detector()
    before = freeze.fingerprint(model.rtdetr)
    model.train()
    optimizer = torch.optim.Adam(model.derain_module.parameters(), lr=1e-3)
    seen = set()
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(images, labels=LABELS)
        assert outputs.denoising_meta_values is None  # phase 1: the detector stays in eval
        outputs.loss.backward()
        seen |= {name for name, p in model.derain_module.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert seen == {name for name, _ in model.derain_module.named_parameters()}
    assert all(p.grad is None for p in model.rtdetr.parameters())
    assert freeze.fingerprint(model.rtdetr) == before  # buffers included


def test_phase_two_trains_everything_but_batch_norm(model, images):
    model.freeze_detector()
    model.unfreeze_detector()
    norms = [m for m in model.rtdetr.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [freeze.fingerprint(m) for m in norms]
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]
    model.train()
    assert model.rtdetr.model.decoder.training and not any(m.training for m in norms) and len(norms) > 40
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(images, labels=LABELS)
        assert outputs.denoising_meta_values is not None  # RT-DETR's own training, denoising queries included
        outputs.loss.backward()
        optimizer.step()
    assert [freeze.fingerprint(m) for m in norms] == before
    assert not any(torch.equal(p, s) for p, s in zip(trainable, start, strict=True))


def test_batch_norm_moves_where_it_is_let_loose(model, images):
    model.freeze_detector()
    model.unfreeze_detector(freeze_batch_norm=True)
    model.unfreeze_detector(freeze_batch_norm=False)
    before = [m.running_mean.clone() for m in model.rtdetr.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    model.train()
    model(images)
    after = [m.running_mean for m in model.rtdetr.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_frozen_backbone_stays_frozen_through_both_phases(weights):
    model = create_feature_derain_rtdetr(str(weights / "rtdetr"), freeze_backbone=True)
    model.freeze_detector()
    model.unfreeze_detector(freeze_batch_norm=False)
    model.train()
    backbone = model.rtdetr.model.backbone
    assert freeze.is_frozen(backbone) and not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert all(p.requires_grad for p in model.rtdetr.model.encoder.parameters())


# ---- use -------------------------------------------------------------------------------------------------------

def test_the_guides_usage_example(weights, tmp_path):
    RTDetrImageProcessor(size={"height": 96, "width": 96}, do_normalize=False).save_pretrained(weights / "rtdetr")
    Image.new("RGB", (120, 80), (90, 120, 60)).save(tmp_path / "rainy_image.jpg")
    model = create_feature_derain_rtdetr(model_name=str(weights / "rtdetr"), derain_type="multiscale",
                                         freeze_backbone=False, device="cpu")
    processor = RTDetrImageProcessor.from_pretrained(str(weights / "rtdetr"))
    image = Image.open(tmp_path / "rainy_image.jpg")
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixel_values)
    results = processor.post_process_object_detection(outputs, target_sizes=[(image.height, image.width)],
                                                      threshold=0.0)
    assert len(results) == 1 and results[0]["boxes"].shape == (40, 4)
    assert results[0]["boxes"][:, 2].max() > 1  # pixels
    assert model.rtdetr.config.num_labels == 2 and isinstance(model.derain_module, MultiScaleFeatureDerain)


def test_features_alone_cost_no_detection(model, images):
    outputs = disturbed(model)(images, detect=False)
    assert outputs.logits is None and outputs.loss is None
    assert all(torch.equal(a, b) for a, b in zip(outputs.features, model(images).features, strict=True))


@pytest.mark.parametrize("derain_type", feature_derain.DERAIN_TYPES)
def test_files_and_copies_reproduce_the_outputs(rtdetr, images, tmp_path, derain_type):
    model = disturbed(FeatureDerainRTDETR(rtdetr, derain_type, 1, 0.25)).eval()
    expected = model(images).logits
    model.save_pretrained(tmp_path / "model", 96)
    again = FeatureDerainRTDETR.from_pretrained(tmp_path / "model")
    assert torch.equal(again(images).logits, expected) and again.settings == model.settings
    assert RTDetrImageProcessor.from_pretrained(tmp_path / "model" / "rtdetr").size["height"] == 96
    model.freeze_detector()
    assert torch.equal(copy.deepcopy(model)(images).logits, expected)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole(images).logits, expected) and freeze.is_frozen(whole.rtdetr)


def test_masks_are_shown_per_scale(model, images):
    masks = model.rain_masks(images)
    assert [tuple(mask.shape) for mask in masks] == [(2, 1, 12, 12), (2, 1, 6, 6), (2, 1, 3, 3)]
    picture = feature_derain.mask_overlay(images[0], torch.ones(1, 12, 12))
    torch.testing.assert_close(picture[:, 5, 5], torch.tensor([1.0, 0.1, 0.1]))
    grey = feature_derain.mask_overlay(images[0], torch.zeros(1, 3, 3))
    torch.testing.assert_close(grey[0], images[0].mean(0))
    assert FeatureDerainRTDETR(model.rtdetr, "none").rain_masks(images) == []


def test_masks_are_returned_where_asked_for_and_change_nothing(model, images):
    with torch.no_grad():
        plain, rich = disturbed(model)(images), model(images, masks=True)
    assert plain.masks is None and torch.equal(plain.logits, rich.logits)
    for mask, shown in zip(rich.masks, model.rain_masks(images), strict=True):
        torch.testing.assert_close(mask, shown)


def test_mask_loss_is_lowest_where_masks_show_the_change():
    clean = torch.full((1, 3, 8, 8), 0.5)
    rainy = clean.clone()
    rainy[:, :, :4, :4] += losses.RAIN_MASK_FULL  # rain in the upper left quarter
    right = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    undecided = torch.full((1, 1, 4, 4), 0.5)
    assert losses.rain_mask_loss([right], rainy, clean) < 1e-5
    assert losses.rain_mask_loss([undecided], rainy, clean).item() == pytest.approx(0.6931, abs=1e-4)
    assert losses.rain_mask_loss([1 - right], rainy, clean) > 10  # torch caps the logarithm at 100
    assert losses.rain_mask_loss([torch.zeros_like(right)], clean, clean).item() == 0


def test_compiled_equals_eager(model, images):
    disturbed(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_close(model, images):
    disturbed(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, labels=LABELS)
    assert outputs.loss.dtype == torch.float32 and torch.isfinite(outputs.loss)
    # of the features, because a random detector picks other queries at the slightest difference
    assert 0 < losses.feature_consistency(outputs.features, model(images).features) < 5e-3


def test_errors_name_the_constant(weights, tmp_path, small_detector):
    rtdetr = str(weights / "rtdetr")
    for make, message in (
            (lambda: create_feature_derain_rtdetr(rtdetr, "heavy"), "DERAIN_TYPE = 'heavy'.*multiscale, lightweight"),
            (lambda: create_feature_derain_rtdetr(rtdetr, num_residual_blocks=0), "NUM_RESIDUAL_BLOCKS = 0"),
            (lambda: create_feature_derain_rtdetr(rtdetr, width=0.0), "REFINE_WIDTH = 0.0"),
            (lambda: create_feature_derain_rtdetr("./none"), "RTDETR_MODEL_NAME.*none.*does not exist"),
            (lambda: FeatureDerainRTDETR.from_pretrained(tmp_path, constant="MULTISCALE_MODEL_NAME"),
             "MULTISCALE_MODEL_NAME.*feature_derain.json.*Training_FeatureDerain.py")):
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    FeatureDerainRTDETR(small_detector).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="MODEL_NAME = .*none' does not exist: Training_FeatureDerain.py writes it"):
        FeatureDerainRTDETR.from_pretrained(tmp_path / "none", constant="MODEL_NAME")
    settings = (tmp_path / "model" / "feature_derain.json").read_text()
    more = settings.replace("{", '{"of a later version": 1,')
    for damaged in ("{", "[]", "{}", more):
        (tmp_path / "model" / "feature_derain.json").write_text(damaged)
        with pytest.raises(UserError, match="MODEL_NAME: .*feature_derain.json is damaged"):
            FeatureDerainRTDETR.from_pretrained(tmp_path / "model", constant="MODEL_NAME")
    (tmp_path / "model" / "feature_derain.json").write_text(settings)
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "model" / "derain.pt")
    with pytest.raises(UserError, match="derain.pt does not fit"):
        FeatureDerainRTDETR.from_pretrained(tmp_path / "model")
