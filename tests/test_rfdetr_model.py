"""rfdetr/model.py, config.py, names.py, projector.py: the published names, numbers and outputs, and the adapter."""

import copy
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import rfdetr_fill
import torch
import torch.nn.functional as F
from torch import nn
from transformers import RfDetrConfig, RfDetrForObjectDetection

from rfdetr import config, names
from rfdetr.model import MEAN, PRIOR, RFDETR, STD
from utils import checkpoint, freeze
from utils.config import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "conformance" / "rfdetr"
PARAMETERS = {  # with all groups, in inference
    "nano": (30_467_298, 26_863_662), "small": (32_111_170, 28_507_534), "medium": (33_687_458, 30_083_822),
    "base": (32_174_530, 28_570_894), "large_2026": (33_933_218, 30_329_582), "large": (135_637_474, 128_470_318)}
# the two-level detector at a size for tests
SMALL_LARGE = config.SIZES["tiny"] | {"levels": 2, "groups": 2, "points": 4}


@pytest.fixture(scope="module")
def tiny():
    """A random tiny model with a mask head, in eval mode. Do not train it: copy it."""
    torch.manual_seed(0)
    return RFDETR("tiny", 5, mask_head="nano").eval()


@pytest.fixture
def two_levels(monkeypatch):
    monkeypatch.setitem(config.SIZES, "two", SMALL_LARGE)
    torch.manual_seed(0)
    return RFDETR("two", 5)


def photos(batch=2, side=160, seed=0):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def on_meta(size, rows=91):
    with torch.device("meta"):
        return RFDETR(size, rows)


# ---- the published models ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", PARAMETERS)
def test_names_shapes_and_numbers_of_parameters_are_the_published_ones(size):
    model = on_meta(size)
    state = names.published_file(model.state_dict())
    text = "\n".join(sorted(f"{name} {list(value.shape)}" for name, value in state.items()))
    expected = json.loads((rfdetr_fill.DATA / "published_names.json").read_text(encoding="utf-8"))[size]
    assert len(state) == expected["tensors"]
    assert hashlib.sha256(text.encode()).hexdigest() == expected["sha256"]
    assert model.count_parameters() == PARAMETERS[size]


def filled(size):
    """A model with the conformance weights, and those weights by published name."""
    model = RFDETR(size, 91)
    state = {name: rfdetr_fill.fill_tensor(name, value.shape)
             for name, value in names.published_file(model.state_dict()).items()}
    model.load_state_dict(state)
    return model.eval(), state


def as_sets(found, expected):
    """Largest difference between each detection (logits and box in one row) and the nearest of the other side."""
    distance = torch.cdist(found, expected, p=float("inf"))
    return max(distance.min(0)[0].max().item(), distance.min(1)[0].max().item())


def test_nano_equals_the_published_package_and_keeps_every_byte_of_a_checkpoint():
    model, state = filled("nano")
    back = names.published_file(model.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())
    reference = np.load(rfdetr_fill.DATA / "reference_nano.npz")
    with torch.no_grad():
        found = model.forward_normalised(rfdetr_fill.fill_input(1, 384))
    for key in ("logits", "boxes"):
        chosen = found[key][0, torch.from_numpy(reference["queries"])]
        assert (chosen - torch.from_numpy(reference[key])).abs().max() < 1e-4


@pytest.mark.skipif(not os.environ.get("RAINSIGHT_SLOW") or not SHARED.is_dir(),
                    reason="needs ../shared/conformance and RAINSIGHT_SLOW=1")
@pytest.mark.parametrize("file, size, tied", [
    ("nano", "nano", ()), ("small", "small", ()), ("medium", "medium", ()), ("base", "base", ()),
    ("large", "large_2026", ()), ("large_dep", "large", (124, 125))])
def test_every_size_equals_the_published_package(file, size, tied):
    """`tied`: two proposals whose scores differ by 5e-7 swap places, and so take each other's learned queries."""
    model, _ = filled(size)
    shapes = json.loads((SHARED / f"state_dict_{file}.json").read_text(encoding="utf-8"))
    assert {name: list(value.shape) for name, value in names.published_file(model.state_dict()).items()} == shapes
    if tied:
        for table in (model.detector.model.query_feat.weight, model.detector.model.reference_point_embed.weight):
            table.data[list(tied)] = table.data[list(reversed(tied))]
    reference = np.load(SHARED / f"reference_{file}.npz")
    with torch.no_grad():
        found = model.forward_normalised(rfdetr_fill.fill_input(1, model.model_args["resolution"]))
    ours = torch.cat([found["logits"], found["boxes"]], -1)[0]
    theirs = torch.cat([torch.from_numpy(reference[key]) for key in ("logits", "boxes")], -1)[0]
    assert as_sets(ours, theirs) < 1e-4


def test_coco_rows_are_category_ids():
    assert len(config.COCO_ROWS) == 80 and max(config.COCO_ROWS.values()) == 90
    expected = {"person": 1, "stop sign": 13, "bench": 15, "backpack": 27, "wine glass": 46, "dining table": 67,
                "toilet": 70, "tv": 72, "sink": 81, "book": 84, "toothbrush": 90}
    assert {name: config.COCO_ROWS[name] for name in expected} == expected


# ---- forward -----------------------------------------------------------------------------------------------------

def test_outputs_in_train_and_eval(tiny):
    images = photos()
    with torch.no_grad():
        found = tiny(images)
        assert tiny.groups == 1
        trained = copy.deepcopy(tiny).train()
        assert trained.groups == 4
        several = trained(images)
    for outputs, queries in ((found, 60), (several, 240)):
        for stage in (outputs, *outputs["aux"], outputs["enc"]):
            assert stage["logits"].shape == (2, queries, 5) and stage["boxes"].shape == (2, queries, 4)
        assert len(outputs["aux"]) == 1
        assert outputs["queries"].shape == (2, 60, 128) and outputs["features"].shape == (2, 128, 20, 20)
        assert outputs["pixel_embedding"].shape[::2] == (2, 40) and outputs["query_embedding"].shape[:2] == (2, 60)
        assert outputs["pixel_embedding"].shape[1] == outputs["query_embedding"].shape[2]
    for key in ("queries", "query_embedding", "pixel_embedding"):  # the first group does not see the others
        assert torch.allclose(found[key], several[key], atol=1e-5)


def test_images_are_normalised_once(tiny):
    images = photos()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(tiny(images)["logits"], tiny.forward_normalised((images - mean) / std)["logits"])


def test_last_layer_of_hidden_states_makes_the_logits(tiny):
    with torch.no_grad():
        found = tiny(photos())
        assert torch.allclose(tiny.detector.class_embed(found["queries"]), found["logits"], atol=1e-6)


def test_cached_features_give_the_same_masks_without_the_detector(tiny, monkeypatch):
    images = photos()
    with torch.no_grad():
        found = tiny(images)
        monkeypatch.setattr(tiny.detector, "forward", None)  # would fail if it were called
        again = tiny(images, cached={"features": found["features"], "queries": found["queries"][:, 7:9],
                                     "boxes": found["boxes"][:, 7:9]})
    assert set(again) == {"pixel_embedding", "query_embedding"}
    assert torch.allclose(again["pixel_embedding"], found["pixel_embedding"], atol=1e-6)
    assert torch.allclose(again["query_embedding"], found["query_embedding"][:, 7:9], atol=1e-6)


def test_cached_features_need_a_mask_head():
    with pytest.raises(UserError, match="mask head"):
        RFDETR("tiny", 2)(photos(), cached={"features": None, "queries": None, "boxes": None})


@pytest.mark.parametrize("side", [128, 192])
def test_other_resolutions_work(tiny, side):
    with torch.no_grad():
        found = tiny(photos(side=side))
    assert found["features"].shape[-1] == side // 8 and found["pixel_embedding"].shape[-1] == side // 4


def test_frozen_detector_stays_in_eval_without_a_graph(tiny):
    model = copy.deepcopy(tiny)
    freeze.freeze(model.detector)
    before = freeze.fingerprint(model.detector)
    model.train()
    assert model.groups == 1 and not model.detector.training and model.mask_head.training
    outputs = model(photos())
    assert outputs["logits"].shape[1] == 60 and not outputs["logits"].requires_grad
    assert not outputs["features"].requires_grad and outputs["pixel_embedding"].requires_grad
    (outputs["pixel_embedding"].mean() + outputs["query_embedding"].mean()).backward()
    assert all(p.grad is not None for p in model.mask_head.parameters())
    assert freeze.fingerprint(model.detector) == before


def everything(outputs):
    """A scalar that depends on all that a detector's losses use."""
    stages = (outputs, *outputs["aux"], outputs["enc"])
    return sum(stage["logits"].square().mean() + stage["boxes"].square().mean() for stage in stages)


def test_every_parameter_that_asks_for_a_gradient_gets_one():
    model = RFDETR("tiny", 5).train()
    nn.init.normal_(model.detector.bbox_embed.layers[-1].weight)  # zero at first, which hides what is before it
    everything(model(photos())).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    idle = {name for name, p in on_meta("base").named_parameters() if not p.requires_grad}
    assert {"embeddings" if "mask_token" in name else name.split("encoder.layer.")[1][:2] for name in idle} \
        == {"embeddings", "11"}  # base taps blocks 2, 5, 8 and 11 of 12


def test_bfloat16_autocast_keeps_boxes_exact_enough(tiny):
    with torch.no_grad():
        exact = tiny(photos())
        with torch.autocast("cpu", torch.bfloat16):
            rough = tiny(photos())
    assert all(torch.isfinite(rough[key]).all() for key in ("logits", "boxes", "pixel_embedding"))
    assert rough["boxes"].dtype == torch.float32
    assert (exact["features"] - rough["features"].float()).abs().max() < 0.2


def test_torch_export_takes_the_eval_model(tiny):
    plain = RFDETR("tiny", 5).eval()
    images = photos(1)
    program = torch.export.export(plain, (images,))
    with torch.no_grad():
        expected, found = plain(images), program.module()(images)
    assert torch.allclose(found["logits"], expected["logits"], atol=1e-5)
    assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-5)


# ---- initial weights ---------------------------------------------------------------------------------------------

def test_initial_model_is_a_sane_detr():
    torch.manual_seed(0)
    model = RFDETR("tiny", 5)
    inner = model.detector.model
    with torch.no_grad():
        outputs = model.eval()(photos())
    for stage in (outputs, outputs["enc"]):
        assert 0.3 * PRIOR < stage["logits"].sigmoid().mean() < 3 * PRIOR
    assert torch.allclose(outputs["boxes"], outputs["enc"]["boxes"])  # no delta yet: every box is its proposal
    assert torch.allclose(outputs["boxes"][..., 2:], torch.tensor(0.05))
    heads = [model.detector.class_embed.weight, *(head.weight for head in inner.enc_out_class_embed)]
    assert all(torch.equal(heads[0], other) for other in heads[1:])
    assert all(torch.equal(one.data, other.data) for head in inner.enc_out_bbox_embed
               for one, other in zip(head.parameters(), model.detector.bbox_embed.parameters(), strict=True))
    assert len({value.data_ptr() for value in heads}) == len(heads)  # equal, not shared
    assert 0.9 < inner.query_feat.weight.std() < 1.1 and not inner.reference_point_embed.weight.any()
    assert 0.01 < inner.backbone.backbone.embeddings.position_embeddings.std() < 0.03
    assert all(torch.equal(block.layer_scale1.lambda1.data, torch.ones(96))
               for block in inner.backbone.backbone.encoder.layer)
    attention = inner.decoder.layers[0].cross_attn
    offsets = attention.sampling_offsets.bias.view(8, 1, 2, 2)  # heads, levels, points, xy
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()
    assert torch.allclose(offsets[0, 0], torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert torch.allclose(offsets[1, 0], torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert torch.allclose(offsets.abs().amax(-1)[:, 0], torch.tensor([1.0, 2.0]))


def test_the_tiny_one_is_small():
    parameters = sum(p.numel() for p in RFDETR("tiny", 9).parameters())
    assert parameters < 2_000_000


# ---- state dict --------------------------------------------------------------------------------------------------

def test_state_dict_under_a_prefix_a_copy_and_a_file(tiny, tmp_path):
    own = tiny.state_dict()
    assert own["class_embed.0.weight"].shape[0] == 5 and any(name.startswith("mask_head.") for name in own)
    assert not any(name.startswith("detector.") for name in own)

    wrapped = nn.ModuleDict({"module": copy.deepcopy(tiny), "other": nn.Linear(2, 2)})
    state = wrapped.state_dict()
    assert {name for name in state if name.startswith("module.")} == {f"module.{name}" for name in own}
    checkpoint.save({"model": state}, tmp_path / "wrapped.pt")
    other = nn.ModuleDict({"module": RFDETR("tiny", 5, mask_head="nano"), "other": nn.Linear(2, 2)})
    other.load_state_dict(torch.load(tmp_path / "wrapped.pt")["model"])
    with torch.no_grad():
        assert torch.equal(other["module"].eval()(photos())["pixel_embedding"], tiny(photos())["pixel_embedding"])


def test_a_copys_state_dict_is_its_own(tiny):
    twin = copy.deepcopy(tiny)
    changed = {name: value + 1 for name, value in twin.state_dict().items()}
    twin.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in twin.state_dict().items())
    assert not any(torch.equal(value, changed[name]) for name, value in tiny.state_dict().items())


def test_state_dict_through_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1)
    try:
        model = RFDETR("tiny", 5).train()
        parallel = nn.parallel.DistributedDataParallel(model)  # without find_unused_parameters
        for _ in range(2):
            everything(parallel(photos())).backward()
        state = parallel.state_dict()
        assert set(state) == {f"module.{name}" for name in model.state_dict()}
        parallel.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
        assert not any(value.any() for value in model.state_dict().values())
    finally:
        torch.distributed.destroy_process_group()


def test_missing_unexpected_and_misshapen_names_are_refused(tiny):
    state = tiny.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected.*unknown"):
        tiny.load_state_dict(state | {"unknown": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing.*query_feat"):
        tiny.load_state_dict({name: value for name, value in state.items() if name != "query_feat.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny.load_state_dict(state | {"query_feat.weight": torch.zeros(3, 3)})


def test_names_of_older_transformers_are_understood():
    assert names.published_name("model.backbone.backbone.encoder.layer.3.attention.attention.query.weight") \
        == names.published_name("model.backbone.backbone.encoder.layer.3.attention.q_proj.weight")


# ---- sizes and resolutions ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, resolution, text", [
    ("nano", 400, "multiple of 32, for example 384"), ("nano", 256, "use 288 or more"), ("base", 576, "multiple of 56"),
    ("tiny", 48, "60 queries"), ("nano", 0, "multiple of 32"), ("nano", 384.5, "multiple of 32")])
def test_resolutions_that_do_not_fit_are_refused(size, resolution, text):
    with pytest.raises(UserError, match=text):
        config.detector_config(size, 91, resolution)


def test_other_user_mistakes(tiny):
    with pytest.raises(UserError, match="choose one of nano"):
        RFDETR("huge", 91)
    with pytest.raises(UserError, match="at least one row"):
        RFDETR("tiny", 0)
    with pytest.raises(UserError, match="mask_head"):
        RFDETR("tiny", 2, mask_head="big")
    with pytest.raises(UserError, match="square"):
        tiny(torch.rand(1, 3, 160, 192))
    with pytest.raises(UserError, match="multiple of 16"):
        tiny(torch.rand(1, 3, 150, 150))


def test_resolution_sets_the_grid_of_position_embeddings():
    assert [config.detector_config("base", 2, side).backbone_config.image_size for side in (None, 560, 616)] \
        == [518, 518, 616]
    model = RFDETR("tiny", 2, 192)
    assert model.model_args == {"size": "tiny", "num_rows": 2, "resolution": 192, "mask_head": None}
    assert RFDETR(**model.model_args).state_dict().keys() == model.state_dict().keys()
    assert model.detector.model.backbone.backbone.embeddings.position_embeddings.shape == (1, 24 * 24 + 1, 96)


# ---- two levels --------------------------------------------------------------------------------------------------

def test_two_level_projector_equals_its_definition(two_levels):
    projector = two_levels.detector.model.backbone.projector
    maps = [torch.randn(2, 96, 10, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def norm(x, layer):
        x = x.permute(0, 2, 3, 1)  # channels last
        return F.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, 1e-6).permute(0, 3, 1, 2)

    def conv(x, layer, act, **options):
        return act(norm(F.conv2d(x, layer.conv.weight, **options), layer.norm))

    def c2f(x, block):
        first, second = conv(x, block.conv1, F.silu).chunk(2, 1)
        parts = [first, second]
        for bottleneck in block.bottlenecks:
            inner = conv(parts[-1], bottleneck.conv1, F.silu, padding=1)
            parts.append(conv(inner, bottleneck.conv2, F.silu, padding=1))
        return conv(torch.cat(parts, 1), block.conv2, F.silu)

    fine = [F.conv_transpose2d(x, layer[0].weight, layer[0].bias, stride=2)
            for x, layer in zip(maps, projector.stages_sampling[0], strict=True)]
    coarse = [conv(x, layer[0], F.relu, stride=2, padding=1)
              for x, layer in zip(maps, projector.stages_sampling[1], strict=True)]
    with torch.no_grad():
        found = projector(maps)
        expected = [norm(c2f(torch.cat(parts, 1), stage[0]), stage[1])
                    for parts, stage in zip((fine, coarse), projector.stages, strict=True)]
    assert [tuple(level.shape) for level in found] == [(2, 128, 20, 20), (2, 128, 5, 5)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_two_level_detector_in_train_and_eval(two_levels):
    images = photos()
    assert config.token_count("two", 160) == 40 * 40 + 10 * 10
    with torch.no_grad():
        found = two_levels.eval()(images)
    assert found["logits"].shape == (2, 60, 5) and found["features"].shape == (2, 128, 40, 40)
    outputs = two_levels.train()(images)
    assert outputs["logits"].shape == (2, 120, 5) and outputs["queries"].shape == (2, 60, 128)
    assert torch.allclose(found["queries"], outputs["queries"], atol=1e-5)
    nn.init.normal_(two_levels.detector.bbox_embed.layers[-1].weight)
    everything(two_levels(images)).backward()
    assert [name for name, p in two_levels.named_parameters() if p.requires_grad and p.grad is None] == []


def test_one_level_through_the_two_level_forward_equals_transformers(tiny):
    """Our own forward of two levels, given one level, is transformers' forward."""
    from rfdetr.projector import TwoLevelModel

    class OneLevel(nn.Module):
        def __init__(self, projector):
            super().__init__()
            self.projector = projector

        def forward(self, maps):
            return [self.projector(maps)]

    expected, inner = tiny.detector.model, copy.deepcopy(tiny.detector.model)
    inner.backbone.projector = OneLevel(inner.backbone.projector)
    pixels = photos() * 4 - 2
    with torch.no_grad():
        ours, theirs = TwoLevelModel.forward(inner, pixels), expected(pixels)
        for key in ("intermediate_hidden_states", "intermediate_reference_points", "enc_outputs_class",
                    "enc_outputs_coord_logits", "backbone_features"):
            assert torch.allclose(ours[key], theirs[key], atol=1e-6), key
        ours, theirs = TwoLevelModel.forward(inner.train(), pixels), copy.deepcopy(expected).train()(pixels)
        assert torch.allclose(ours["intermediate_hidden_states"], theirs["intermediate_hidden_states"], atol=1e-5)


# ---- what is worked around: a failure here means that transformers has fixed it and the work-around can go -------

def upstream(**changes):
    """transformers' own detector of the tiny size."""
    torch.manual_seed(0)
    settings = config.detector_config("tiny", 5)
    for name, value in changes.items():
        setattr(settings, name, value)
    return RfDetrForObjectDetection(settings)


def labelled():
    return [{"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[.5, .5, .2, .3], [.3, .3, .1, .1]])}]


def test_upstream_loss_in_eval_mode_splits_the_queries_into_groups():
    """Reason for rfdetr.criterion: with one group per forward, the loss in eval mode is that of one group."""
    from rfdetr import criterion
    detector = upstream().eval()
    with torch.no_grad():
        found = detector(pixel_values=photos(1), labels=labelled())
    outputs = {"logits": found.logits, "boxes": found.pred_boxes, "aux": [],
               "enc": {"logits": found.enc_outputs_class, "boxes": found.enc_outputs_coord_logits}}
    right, wrong = (criterion.detection_losses(outputs, labelled(), groups)["loss_bbox"] for groups in (1, 4))
    assert not torch.isclose(right, wrong, rtol=0.01)
    assert torch.isclose(found.loss_dict["loss_bbox"], wrong, rtol=1e-4)


def test_upstream_loss_is_nan_where_a_logit_is_large():
    """Reason for rfdetr.criterion's logsigmoid."""
    detector = upstream().train()
    nn.init.constant_(detector.class_embed.bias, -300.0)
    assert not torch.isfinite(detector(pixel_values=photos(1), labels=labelled()).loss)


def test_upstream_crashes_with_fewer_tokens_than_queries():
    """Reason for config.check_resolution."""
    with pytest.raises(RuntimeError):
        upstream()(pixel_values=photos(1, 48))


def test_upstream_freeze_and_gradient_checkpointing_fail():
    """Reason for utils.freeze."""
    with pytest.raises(AttributeError):
        upstream().model.freeze_backbone()
    with pytest.raises(ValueError, match="does not support"):
        upstream().gradient_checkpointing_enable()


def test_upstream_has_one_level():
    """Reason for rfdetr.projector."""
    detector = upstream(num_feature_levels=2)
    with pytest.raises((IndexError, RuntimeError)):
        detector(pixel_values=photos(1))


def test_upstream_defaults_are_not_the_published_ones():
    """Reason for the explicit settings in config.detector_config."""
    assert RfDetrConfig().dropout != 0 and RfDetrConfig().layer_norm_eps != 1e-6


def test_upstream_initial_weights_are_small_and_encoder_heads_differ():
    """Reason for model.initialise."""
    inner = upstream().model
    assert inner.query_feat.weight.std() < 0.1
    assert not torch.equal(inner.enc_out_class_embed[0].weight, inner.enc_out_class_embed[1].weight)


def test_upstream_has_parameters_without_gradients():
    """Reason for requires_grad_(False) in model.new_detector."""
    detector = upstream().train()
    detector(pixel_values=photos(1)).logits.sum().backward()
    token = detector.model.backbone.backbone.embeddings.mask_token
    assert token.requires_grad and token.grad is None
