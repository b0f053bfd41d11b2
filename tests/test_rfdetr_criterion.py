"""rfdetr/criterion.py against the published numbers, against transformers' losses, and at the edges."""

import itertools
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from rfdetr import criterion, masks
from rfdetr.model import RFDETR

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "conformance" / "rfdetr"
COUNTED = ("loss_ce", "loss_bbox", "loss_giou")


def random_boxes(*shape, generator):
    """(*shape, 4) cxcywh inside the image."""
    extent = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.02
    return torch.cat([extent / 2 + torch.rand(*shape, 2, generator=generator) * (1 - extent), extent], -1)


def random_batch(counts=(3, 0, 5), groups=4, queries=20, rows=7, layers=3, seed=0):
    """-> outputs with gradients, as of RFDETR, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def stage():
        logits = torch.randn(len(counts), groups * queries, rows, generator=generator) * 2 - 2
        boxes = random_boxes(len(counts), groups * queries, generator=generator)
        return {"logits": logits.requires_grad_(), "boxes": boxes.requires_grad_()}

    outputs = stage() | {"aux": [stage() for _ in range(layers - 1)], "enc": stage()}
    labels = [{"class_labels": torch.randint(rows, (n,), generator=generator),
               "boxes": random_boxes(n, generator=generator)} for n in counts]
    return outputs, labels


def stages(outputs):
    return [outputs, *outputs["aux"], outputs["enc"]]


# ---- against others --------------------------------------------------------------------------------------------

@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs ../shared/conformance")
def test_nano_losses_and_gradient_norm_equal_the_published_package(monkeypatch):
    monkeypatch.syspath_prepend(str(REFERENCE))
    import fill
    reference = json.loads((REFERENCE / "reference_nano_losses.json").read_text(encoding="utf-8"))
    state = fill.fill_state(json.loads((REFERENCE / "state_dict_nano.json").read_text(encoding="utf-8")))
    model = RFDETR("nano", 91)
    model.load_state_dict({name.replace("class_embed.", "class_embed.0.") if name.startswith("class_embed.") else name:
                           value for name, value in state.items()})
    labels = [{"class_labels": torch.tensor([1, 17, 17]),
               "boxes": torch.tensor([[.5, .5, .2, .3], [.3, .3, .1, .1], [.7, .6, .3, .4]])},
              {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[.4, .6, .5, .3]])}]
    weights = criterion.loss_weights(2)
    assert weights == reference["weights"]
    for mode in ("eval", "train"):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            losses = criterion.detection_losses(model.forward_normalised(fill.fill_input(2, 384)), labels, model.groups)
        expected = reference[f"{mode}_losses"]
        assert losses.keys() == expected.keys()
        assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    total = sum(weight * losses[name] for name, weight in weights.items())
    assert total.item() == pytest.approx(reference["train_total"], rel=1e-5)
    total.backward()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(reference["train_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_losses_and_gradients_equal_transformers(groups):
    outputs, labels = random_batch(groups=groups)
    ours = criterion.detection_losses(outputs, labels, groups)
    weights = criterion.loss_weights(3)
    sum(weight * ours[name] for name, weight in weights.items()).backward()
    found = [(stage["logits"].grad, stage["boxes"].grad) for stage in stages(outputs)]

    outputs, labels = random_batch(groups=groups)
    reference = LwDetrImageLoss(LwDetrHungarianMatcher(2, 5, 2), 7, 0.25, ["labels", "boxes"], groups)
    renamed = [{"logits": stage["logits"], "pred_boxes": stage["boxes"]} for stage in stages(outputs)]
    theirs = reference(renamed[0] | {"auxiliary_outputs": renamed[1:-1], "enc_outputs": renamed[-1]}, labels)
    sum(weight * theirs[name] for name, weight in weights.items()).backward()
    for name in weights:
        assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-5), name
    for (logits, boxes), stage in zip(found, stages(outputs), strict=True):
        torch.testing.assert_close(logits, stage["logits"].grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(boxes, stage["boxes"].grad, rtol=1e-4, atol=1e-5)


def test_overlap_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = random_boxes(9, generator=generator), random_boxes(6, generator=generator)
    iou, giou = criterion.box_overlap(a[:, None], b)
    corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b)]
    torch.testing.assert_close(giou, generalized_box_iou(*corners), atol=1e-5, rtol=0)
    assert iou.max() > 0.1 and (iou >= giou - 1e-6).all()


# ---- matching --------------------------------------------------------------------------------------------------

def test_matching_is_the_cheapest_of_all_assignments():
    outputs, labels = random_batch(counts=(3,), groups=1, queries=5)
    logits, boxes = outputs["logits"].detach()[0], outputs["boxes"].detach()[0]
    score = logits.sigmoid()[:, labels[0]["class_labels"]]
    focal = -0.25 * (1 - score) ** 2 * score.log() + 0.75 * score**2 * (1 - score).log()
    giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(labels[0]["boxes"], "cxcywh", "xyxy"))
    costs = 2 * focal + 5 * torch.cdist(boxes, labels[0]["boxes"], p=1) - 2 * giou  # (5, 3)
    best = min(itertools.permutations(range(5), 3), key=lambda queries: sum(costs[q, t] for t, q in enumerate(queries)))
    query, target = criterion.match(outputs["logits"], outputs["boxes"], labels)[0]
    assert dict(zip(target.tolist(), query.tolist(), strict=True)) == dict(enumerate(best))


def test_every_group_is_matched_by_itself():
    outputs, labels = random_batch(groups=4)
    together = criterion.match(outputs["logits"], outputs["boxes"], labels, groups=4)
    for g in range(4):
        part = slice(20 * g, 20 * (g + 1))
        alone = criterion.match(outputs["logits"][:, part], outputs["boxes"][:, part], labels)
        for (query, target), (own_query, own_target) in zip(together, alone, strict=True):
            mine = (query >= part.start) & (query < part.stop)
            assert torch.equal(query[mine] - part.start, own_query) and torch.equal(target[mine], own_target)
    assert [len(query) for query, _ in together] == [12, 0, 20]


# ---- edges -----------------------------------------------------------------------------------------------------

def test_huge_logits_stay_finite_with_gradients():
    outputs, labels = random_batch()
    for stage in stages(outputs):
        signs = torch.where(torch.rand(stage["logits"].shape) < 0.5, -1e4, 1e4)
        stage["logits"] = signs.requires_grad_()
    losses = criterion.detection_losses(outputs, labels, 4)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses[name] for name in criterion.loss_weights(3)).backward()
    assert all(torch.isfinite(stage["logits"].grad).all() and stage["logits"].grad.abs().sum() > 0
               for stage in stages(outputs))


def test_images_without_objects_only_push_scores_down():
    outputs, labels = random_batch(counts=(0, 0))
    losses = criterion.detection_losses(outputs, labels, 4)
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["class_error"] == 0
    sum(weight * losses[name] for name, weight in criterion.loss_weights(3).items()).backward()
    for stage in stages(outputs):
        assert (stage["logits"].grad > 0).all() and not stage["boxes"].grad.any()
    # divided by 1 and not by 0: the sum of -p^2 log(1 - p) over everything
    score = outputs["logits"].detach().double().sigmoid()
    assert losses["loss_ce"].item() == pytest.approx(-(score**2 * (1 - score).log()).sum().item(), rel=1e-5)


def test_more_objects_than_queries():
    outputs, labels = random_batch(counts=(9, 2), groups=2, queries=4)
    matched = criterion.match(outputs["logits"], outputs["boxes"], labels, groups=2)
    assert [len(query) for query, _ in matched] == [8, 4]
    assert all(len(set(query.tolist())) == len(query) for query, _ in matched)
    losses = criterion.detection_losses(outputs, labels, 2)
    assert all(torch.isfinite(value) for value in losses.values())


def test_boxes_without_area_and_broken_costs_do_not_crash():
    outputs, labels = random_batch(counts=(2,), groups=1, layers=1)
    with torch.no_grad():
        outputs["boxes"][:, :, 2:] = 0
        labels[0]["boxes"][:, 2:] = 0
    losses = criterion.detection_losses(outputs, labels, 1)
    sum(losses.values()).backward()
    assert torch.isfinite(losses["loss_giou"]) and torch.isfinite(outputs["boxes"].grad).all()
    broken = torch.full_like(outputs["logits"].detach(), float("nan"))
    assert len(criterion.match(broken, outputs["boxes"], labels)[0][0]) == 2


def test_losses_are_float32_under_autocast_and_of_half_inputs():
    outputs, labels = random_batch()
    expected = criterion.detection_losses(outputs, labels, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion.detection_losses(outputs, labels, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rounded = [{name: stage[name].detach().half() for name in ("logits", "boxes")} for stage in stages(outputs)]
    halves = criterion.detection_losses(rounded[0] | {"aux": rounded[1:-1], "enc": rounded[-1]}, labels, 4)
    for name in COUNTED:
        assert halves[name].dtype == torch.float32
        assert halves[name].item() == pytest.approx(expected[name].item(), rel=5e-3)


# ---- two processes ---------------------------------------------------------------------------------------------

def one_rank(rank, folder):
    """Losses of one of two ranks, written to a file; the second one's image has no object."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2,
                                         timeout=timedelta(seconds=120))
    try:
        torch.save(losses_of_rank(rank), folder / f"rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def losses_of_rank(rank):
    outputs, labels, mask_outputs, indices = two_images()
    mine = slice(rank, rank + 1)

    def cut(stage):
        return {name: value[mine] for name, value in stage.items() if torch.is_tensor(value)}

    losses = criterion.detection_losses(cut(outputs) | {"aux": [], "enc": cut(outputs["enc"])}, labels[mine], 4)
    losses |= masks.mask_losses(cut(mask_outputs), labels[mine], indices[mine])
    return {name: value.detach() for name, value in losses.items()}


def two_images():
    outputs, labels = random_batch(counts=(3, 0), layers=1)
    for label in labels:  # one value everywhere: the points' places do not matter
        label["masks"] = torch.ones(len(label["boxes"]), 16, 16, dtype=torch.bool)
    pixels, queries = torch.ones(2, 5, 8, 8), torch.linspace(-0.3, 0.4, 2 * 20 * 5).reshape(2, 20, 5)
    indices = [(torch.tensor([4, 7, 9]), torch.tensor([1, 0, 2])), (torch.zeros(0, dtype=torch.int64),) * 2]
    return outputs, labels, {"pixel_embedding": pixels, "query_embedding": queries}, indices


def test_two_ranks_average_to_the_loss_of_both_batches(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=one_rank, args=(1, tmp_path))
    other.start()
    one_rank(0, tmp_path)
    other.join(120)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    outputs, labels, mask_outputs, indices = two_images()
    whole = criterion.detection_losses(outputs, labels, 4) | masks.mask_losses(mask_outputs, labels, indices)
    for name in (*criterion.loss_weights(1), "loss_mask", "loss_dice"):
        mean = (parts[0][name] + parts[1][name]).item() / 2
        assert mean == pytest.approx(whole[name].item(), rel=1e-5) and mean > 0, name


def test_summed_up_terms_have_the_same_total():
    torch.manual_seed(0)
    stage = lambda: {"logits": torch.randn(2, 8, 5), "boxes": torch.rand(2, 8, 4)}  # noqa: E731
    outputs = stage() | {"aux": [stage(), stage()], "enc": stage()}
    labels = [{"class_labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4)},
              {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    losses = criterion.detection_losses(outputs, labels, groups=2)
    total = sum(weight * losses[name] for name, weight in criterion.loss_weights(3).items())
    short = criterion.summed_up(losses)
    assert set(short) == {"loss_ce", "loss_bbox", "loss_giou", "loss_aux", "class_error"}
    torch.testing.assert_close(sum(weight * short[name] for name, weight in criterion.SUMMED_WEIGHTS.items()), total)
