"""Mask heads, mask losses, masks at the original size and their scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from torch import nn

from rfdetr import criterion, evaluate, masks
from rfdetr.models import segmentation
from rfdetr.models.segmentation import MaskHead, MaskHeadNano
from utils import visualize
from utils.evaluation.coco import coco_scores, ground_truth

HEADS = pytest.mark.parametrize("head", [MaskHead, MaskHeadNano])


def disc(side, x, y, radius):
    """(side, side) bool; centre and radius as shares of the side."""
    axis = (torch.arange(side) + 0.5) / side
    return ((axis - x) ** 2 + (axis[:, None] - y) ** 2) < radius**2


def inputs(batch=1, side=64, stride=16, channels=32, queries=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, channels, side // stride, side // stride, generator=generator),
            torch.rand(batch, 3, side, side, generator=generator),
            torch.randn(batch, queries, channels, generator=generator),
            0.2 + 0.5 * torch.rand(batch, queries, 4, generator=generator))


def embeddings(batch=2, channels=5, queries=4, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_embedding": torch.randn(batch, channels, side, side, generator=generator).requires_grad_(),
            "query_embedding": torch.randn(batch, queries, channels, generator=generator).requires_grad_()}


# ---- heads -----------------------------------------------------------------------------------------------------

@HEADS
@pytest.mark.parametrize("side, stride", [(64, 16), (112, 14), (40, 8)])
def test_heads_embed_at_a_quarter_of_the_image(head, side, stride):
    torch.manual_seed(0)
    model = head(32).train()
    features, images, queries, boxes = inputs(2, side, stride)
    pixels, embedded = model(features, images, queries, boxes)
    assert pixels.shape == (2, embedded.shape[-1], side // 4, side // 4) and embedded.shape[:2] == (2, 3)
    alone = model(features[:1], images[:1], queries[:1], boxes[:1])  # a batch of one is no special case
    torch.testing.assert_close(alone[0], pixels[:1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone[1], embedded[:1], atol=1e-5, rtol=1e-4)
    assert model(features, images, queries[:, :0], boxes[:, :0])[1].shape == (2, 0, embedded.shape[-1])


def test_the_nano_head_has_at_most_a_quarter_of_the_parameters():
    small, large = (sum(p.numel() for p in head(256).parameters()) for head in (MaskHeadNano, MaskHead))
    assert small <= large / 4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in MaskHead(256).modules())


@HEADS
def test_every_parameter_exists_from_the_start_and_learns(head):
    torch.manual_seed(0)
    model = head(32)
    names = set(dict(model.named_parameters()))
    features, images, queries, boxes = inputs()
    boxes.requires_grad_()
    pixels, embedded = model(features, images, queries, boxes)
    (embedded @ pixels.flatten(2)).sigmoid().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert boxes.grad is None  # masks do not teach boxes
    assert set(dict(model.named_parameters())) == names


@HEADS
def test_the_first_masks_are_ellipses_in_the_boxes(head):
    torch.manual_seed(0)
    model = head(32).eval()
    features, images, queries, _ = inputs(1, 256, queries=4)
    boxes = torch.tensor([[[.5, .5, .4, .6], [.3, .2, .2, .15], [.8, .5, .3, .12], [.5, .4, 1., .8]]])
    with torch.no_grad():
        pixels, embedded = model(features, images, queries, boxes)
        found = (embedded @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:])[0] > 0
    axis = (torch.arange(64) + 0.5) / 64
    for mask, (x, y, w, h) in zip(found, boxes[0].tolist(), strict=True):
        ellipse = ((axis - x) / w * 2) ** 2 + ((axis[:, None] - y) / h * 2) ** 2 < 1
        assert (mask & ellipse).sum() / (mask | ellipse).sum() > 0.65


def test_the_ellipse_of_a_box_is_half_high_at_its_border():
    boxes = torch.tensor([[[0.4, 0.55, 0.3, 0.2]]])
    weights = segmentation.ellipses(boxes)[0, 0]
    waves = segmentation.waves_of_pixels(200, 200, torch.zeros(1))[0]  # one pixel is 1/200
    values = (weights[:, None, None] * waves).sum(0)
    centre, right, corner = values[109, 79], values[109, 109], values[10, 190]
    assert centre.item() == pytest.approx(0.5, abs=0.01) and right.item() == pytest.approx(0.0, abs=0.03)
    assert corner.item() == pytest.approx(-1.5, abs=0.02)


def test_the_nano_head_learns_discs():
    """Two discs per image that look alike, and boxes that are half as wide again as the discs."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    side, batch = 96, 4
    model = MaskHeadNano(32)
    radius = 0.1 + 0.1 * torch.rand(batch, 2, generator=generator)
    x = torch.tensor([0.28, 0.72]) + 0.1 * torch.rand(batch, 2, generator=generator) - 0.05
    y = 0.3 + 0.4 * torch.rand(batch, 2, generator=generator)
    truth = torch.stack([torch.stack([disc(side, *v) for v in zip(x[i], y[i], radius[i], strict=True)])
                         for i in range(batch)])  # (B, 2, S, S)
    images = torch.where(truth.any(1)[:, None], 0.8, 0.3) + 0.05 * torch.randn(batch, 3, side, side)
    features = F.adaptive_avg_pool2d(images.repeat(1, 11, 1, 1)[:, :32], side // 16)
    boxes = torch.stack([x, y, 2 * radius, 2 * radius], -1)
    roughly = boxes * torch.tensor([1, 1, 1.5, 1.5])
    queries = torch.cat([boxes, torch.zeros(batch, 2, 28)], -1)
    labels = [{"class_labels": torch.zeros(2, dtype=torch.int64), "boxes": boxes[i], "masks": truth[i]}
              for i in range(batch)]
    indices = [(torch.arange(2), torch.arange(2))] * batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    image, query = torch.arange(batch).repeat_interleave(2), torch.arange(2).repeat(batch)
    overlap = []
    for step in range(120):
        pixels, embedded = model(features, images, queries, roughly)
        outputs = {"pixel_embedding": pixels, "query_embedding": embedded}
        if step in (0, 119):
            found = evaluate.full_masks(masks.mask_logits(outputs, image, query).detach(), (side, side))
            wanted = truth.flatten(0, 1)
            overlap.append((found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2)))
        losses = masks.mask_losses(outputs, labels, indices)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert overlap[0].max() < 0.75 and overlap[1].min() > 0.9, overlap


# ---- logits and losses -----------------------------------------------------------------------------------------

def test_mask_logits_are_dot_products_in_the_order_asked_for():
    outputs = embeddings()
    every = torch.einsum("bchw,bqc->bqhw", outputs["pixel_embedding"], outputs["query_embedding"])
    for pairs in ([(1, 2), (0, 3), (1, 0), (0, 0), (0, 3)], [(i, q) for i in (1, 0) for q in range(4)], []):
        image, query = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        found = masks.mask_logits(outputs, image, query)
        assert found.shape == (len(pairs), 8, 8)
        torch.testing.assert_close(found, every[image, query])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(masks.mask_logits(outputs, torch.tensor([1]), torch.tensor([2])), every[1, 2][None])


def truth_of_logits(factor):
    """Outputs of one image whose two masks are `factor` times +-1 at the right places, labels and pairs."""
    wanted = torch.stack([disc(64, 0.3, 0.4, 0.2), disc(64, 0.7, 0.6, 0.1)])
    coarse = wanted[:, 2::4, 2::4].float() * 2 - 1  # (2, 16, 16)
    outputs = {"pixel_embedding": (factor * coarse)[None].requires_grad_(),
               "query_embedding": torch.eye(2)[None].requires_grad_()}
    labels = [{"class_labels": torch.tensor([0, 1]), "masks": wanted.flip(0),
               "boxes": torch.tensor([[.7, .6, .2, .2], [.3, .4, .4, .4]])}]
    return outputs, labels, [(torch.tensor([0, 1]), torch.tensor([1, 0]))]


def test_right_masks_cost_little_and_wrong_ones_much():
    right = masks.mask_losses(*truth_of_logits(12.0))
    wrong = masks.mask_losses(*truth_of_logits(-12.0))
    assert right["loss_dice"] < 0.25 < 0.8 < wrong["loss_dice"] and wrong["loss_mask"] > 5 * right["loss_mask"]
    flat = masks.mask_losses(*truth_of_logits(0.0))  # logit 0: log 2 wherever the points are
    assert flat["loss_mask"].item() == pytest.approx(np.log(2), abs=1e-5)
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in flat.values())


def test_losses_reach_both_embeddings_of_matched_images_only():
    outputs = embeddings(batch=3)
    labels = [{"class_labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.full((n, 4), 0.4),
               "masks": torch.rand(n, 32, 32) > 0.5} for n in (2, 0, 1)]
    indices = [(torch.tensor([1, 3]), torch.tensor([1, 0])), (torch.zeros(0, dtype=torch.int64),) * 2,
               (torch.tensor([2]), torch.tensor([0]))]
    with torch.autocast("cpu", torch.bfloat16):
        losses = masks.mask_losses(outputs, labels, indices)
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert outputs["pixel_embedding"].grad.flatten(1).any(1).tolist() == [True, False, True]
    assert outputs["query_embedding"].grad.any(-1).nonzero().tolist() == [[0, 1], [0, 3], [2, 2]]


def test_no_object_at_all_is_a_zero_with_a_graph():
    outputs = embeddings()
    labels = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
               "masks": torch.zeros(0, 32, 32, dtype=torch.bool)}] * 2
    losses = masks.mask_losses(outputs, labels, [(torch.zeros(0, dtype=torch.int64),) * 2] * 2)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert not outputs["pixel_embedding"].grad.any() and not outputs["query_embedding"].grad.any()


def test_points_lie_where_the_mask_is_uncertain_and_around_the_object():
    torch.manual_seed(0)
    axis = (torch.arange(64) + 0.5) / 64
    logits = ((0.3 - axis) * 50).expand(1, 64, 64)  # border of the mask at x = 0.3
    chosen = masks.choose_points(logits, torch.tensor([[0.3, 0.5, 0.4, 0.4]]), 400)
    assert chosen.shape == (1, 400, 2) and chosen.min() >= 0 and chosen.max() <= 1
    assert (chosen[0, :300, 0] - 0.3).abs().median() < 0.15 < (chosen[0, 300:, 0] - 0.3).abs().max()
    tiny = masks.random_points(torch.tensor([[0.9, 0.1, 0.01, 0.01]]), 1000)[0]
    near = ((tiny - torch.tensor([0.9, 0.1])).abs() <= masks.MIN_EXTENT / 2 + 1e-6).all(1)
    assert 490 <= near.sum() <= 520
    one, other = (masks.random_points(torch.full((1, 4), 0.5), 9, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)


def test_points_read_masks_as_resizing_would():
    generator = torch.Generator().manual_seed(0)
    logits, wanted = torch.randn(2, 7, 7, generator=generator), torch.rand(2, 28, 28, generator=generator) > 0.5
    axis = (torch.arange(28) + 0.5) / 28
    where = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2).expand(2, -1, -1)
    resized = F.interpolate(logits[None], size=(28, 28), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(masks.sample(logits, where), resized.flatten(1))
    assert torch.equal(masks.values_at(wanted, where), wanted.flatten(1).float())


def test_without_crop_the_losses_are_those_of_the_points():
    """To the last bit, with masks at the points of the same random numbers."""
    outputs, labels, indices = truth_of_logits(1.7)
    found = masks.mask_losses(outputs, labels, indices, generator=torch.Generator().manual_seed(4))
    logits, boxes = outputs["pixel_embedding"][0], labels[0]["boxes"][[1, 0]]
    where = masks.choose_points(logits, boxes, 64, torch.Generator().manual_seed(4))
    values, wanted = masks.sample(logits, where), masks.values_at(labels[0]["masks"][[1, 0]], where)
    entropy = F.binary_cross_entropy_with_logits(values, wanted, reduction="none").mean(1).sum() / 2.0
    score = values.sigmoid()
    dice = (2 * (score * wanted).sum(1) + 1) / (score.sum(1) + wanted.sum(1) + 1)
    assert torch.equal(found["loss_mask"], entropy) and torch.equal(found["loss_dice"], (1 - dice).sum() / 2.0)


# ---- losses in the box, masks in the matching --------------------------------------------------------------------

def in_one_box(logits, box, mask):
    """mask_losses with crop of one query whose mask has these logits (h, w); box (4,) cxcywh; mask (S, S) bool."""
    outputs = {"pixel_embedding": logits[None, None], "query_embedding": torch.ones(1, 1, 1)}
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([box]), "masks": mask[None]}]
    return masks.mask_losses(outputs, labels, [(torch.tensor([0]),) * 2], crop=True)


def left_half(side, first, last):
    """(side, side) bool: the left half of the square from row and column `first` to `last`."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[first:last, first:(first + last) // 2] = True
    return mask


def test_cropped_losses_by_hand():
    logits = torch.full((8, 8), 3.0)
    logits[2:6, 2:4], logits[2:6, 4:6] = 2.0, -1.0  # of the box's 16 cells the left 8 are the object
    found = in_one_box(logits, [0.5, 0.5, 0.5, 0.5], left_half(32, 8, 24))
    inside, outside = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(1))
    assert found["loss_mask"].item() == pytest.approx((8 * -np.log(inside) + 8 * -np.log(1 - outside)) / 16, rel=1e-5)
    assert found["loss_dice"].item() == pytest.approx(
        1 - (2 * 8 * inside + 1) / (8 * inside + 8 * outside + 8 + 1), rel=1e-5)


def test_cropped_losses_do_not_see_what_is_outside_of_the_box():
    logits = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    box, mask = [0.5, 0.5, 0.5, 0.5], left_half(32, 8, 24)
    found = in_one_box(logits, box, mask)
    sum(found.values()).backward()
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    assert torch.equal(logits.grad != 0, inside)
    changed = torch.where(inside, logits.detach(), 1e4 * torch.randn(8, 8))
    again = in_one_box(changed, box, mask)
    assert all(torch.equal(found[name], again[name]) for name in found)
    with torch.no_grad():
        logits[3, 3] += 1  # and what is inside they do see
    assert in_one_box(logits, box, mask)["loss_mask"] != found["loss_mask"]


def test_cropped_entropy_is_that_of_a_cell_whatever_the_area():
    """One pattern, once on 4 and once on 16 cells; the dice has a constant beside its sums and is only near."""
    small, large = torch.zeros(16, 16), torch.zeros(16, 16)
    small[2:4, 2], small[2:4, 3] = 1.5, -0.5
    large[4:8, 4:6], large[4:8, 6:8] = 1.5, -0.5
    one = in_one_box(small, [3 / 16, 3 / 16, 2 / 16, 2 / 16], left_half(64, 8, 16))
    other = in_one_box(large, [6 / 16, 6 / 16, 4 / 16, 4 / 16], left_half(64, 16, 32))
    assert one["loss_mask"].item() == pytest.approx(other["loss_mask"].item(), rel=1e-5)
    assert one["loss_dice"].item() == pytest.approx(other["loss_dice"].item(), abs=0.1)


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.004, 0.004], [0.001, 0.999, 0.002, 0.002], [0.25, 0.75, 0.0, 0.0]])
def test_the_smallest_boxes_have_finite_losses_in_them(box):
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[int(box[1] * 32), int(box[0] * 32)] = True
    logits = torch.zeros(8, 8, requires_grad=True)
    found = in_one_box(logits, box, mask)
    sum(found.values()).backward()
    assert all(torch.isfinite(value) for value in found.values()) and torch.isfinite(logits.grad).all()
    assert box[2] == 0 or found["loss_mask"].item() == pytest.approx(np.log(2), rel=1e-5)


def test_cells_that_are_partly_an_object_have_their_share():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, :4, :6] = True
    shares = masks.cell_shares(mask, (4, 4))
    assert shares[0, 0].tolist() == [1, 0.5, 0, 0] and not shares[0, 1:].any()
    assert masks.cell_shares(mask[:0], (4, 4)).shape == (0, 4, 4)


@pytest.mark.parametrize("crop", [False, True])
def test_matching_costs_are_the_losses_of_the_pair(crop):
    outputs = embeddings(batch=3, queries=4)
    labels = [{"class_labels": torch.zeros(n, dtype=torch.int64), "masks": torch.rand(n, 32, 32) > 0.5,
               "boxes": torch.tensor([[0.5, 0.4, 0.5, 0.3], [0.2, 0.7, 0.3, 0.5]])[:n]} for n in (2, 0, 1)]
    if not crop:  # a box around the whole image: then mask_losses with crop is the loss over the whole map
        labels = [label | {"boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(len(label["boxes"]), 4)}
                  for label in labels]
    costs = masks.matching_costs(outputs, labels, crop)
    assert costs.shape == (3, 4) and costs.dtype == torch.float32 and not costs.requires_grad
    nothing = (torch.zeros(0, dtype=torch.int64),) * 2
    for row, (image, own) in enumerate([(0, 0), (0, 1), (2, 0)]):
        for query in range(4):
            indices = [nothing, nothing, nothing]
            indices[image] = torch.tensor([query]), torch.tensor([own])
            pair = masks.mask_losses(outputs, labels, indices, crop=True)
            assert costs[row, query].item() == pytest.approx(sum(pair.values()).item(), rel=1e-4)
    empty = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
              "masks": torch.zeros(0, 32, 32, dtype=torch.bool)}] * 3
    assert masks.matching_costs(outputs, empty, crop).shape == (0, 4)


@pytest.mark.parametrize("crop", [False, True])
def test_where_boxes_tie_masks_decide_the_matching(crop):
    """Two queries, one box to the left and one as far to the right of the object's; only the second one's mask fits."""
    wanted = disc(64, 0.5, 0.5, 0.2)
    coarse = 6 * (wanted[2::4, 2::4].float() * 2 - 1)
    label = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), "masks": wanted[None]}
    boxes = torch.tensor([[[0.375, 0.5, 0.4, 0.4], [0.625, 0.5, 0.4, 0.4]]]).requires_grad_()
    logits = torch.zeros(1, 2, 3)
    outputs = {"pixel_embedding": torch.stack([-coarse, coarse])[None], "query_embedding": torch.eye(2)[None]}
    for fits, embedding in ((1, outputs["query_embedding"]), (0, outputs["query_embedding"].flip(1))):
        further = 0.1 * masks.matching_costs(outputs | {"query_embedding": embedding}, [label], crop)
        (query, target), = criterion.match(logits, boxes, [label], further=further)
        assert query.tolist() == [fits] and target.tolist() == [0]
        stage = {"logits": logits, "boxes": boxes}
        losses = criterion.detection_losses(stage | {"aux": [], "enc": stage}, [label], 1, further)
        grad, = torch.autograd.grad(losses["loss_bbox"], boxes)
        assert grad[0].any(-1).nonzero().tolist() == [[fits]]
        earlier, = torch.autograd.grad(losses["loss_bbox_enc"], boxes)  # without masks there: whatever a tie gives
        assert earlier[0].any(-1).nonzero().tolist() == [[criterion.match(logits, boxes, [label])[0][0].item()]]


def test_costs_of_broken_masks_leave_a_matching():
    outputs = embeddings(batch=1, queries=4)
    with torch.no_grad():
        outputs["query_embedding"][0, 1] = float("nan")
    label = {"class_labels": torch.zeros(2, dtype=torch.int64), "boxes": torch.full((2, 4), 0.4),
             "masks": torch.rand(2, 32, 32) > 0.5}
    further = masks.matching_costs(outputs, [label])
    (query, _), = criterion.match(torch.zeros(1, 4, 3), torch.full((1, 4, 4), 0.4), [label], further=further)
    assert len(query) == 2 and 1 not in query.tolist()


# ---- masks at the original size --------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(64, 64), (237, 411), (33, 20), (9, 5), (1, 300)])
def test_full_masks_equal_interpolation(size):
    generator = torch.Generator().manual_seed(1)
    smooth = F.interpolate(torch.randn(1, 6, 4, 4, generator=generator), size=(24, 24), mode="bicubic")[0] - 0.5
    spots = torch.full((3, 24, 24), -1.0)
    spots[0, 0, 0], spots[1, 23, 23], spots[2, 11, 23] = 4.0, 0.1, 9.0
    logits = torch.cat([smooth, spots, torch.full((1, 24, 24), -3.0), torch.full((1, 24, 24), 3.0)])
    expected = F.interpolate(logits[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    found = evaluate.full_masks(logits, size)
    clear = expected.abs() > 1e-5  # rounding decides the others
    assert torch.equal(found[clear], (expected > 0)[clear]) and clear.float().mean() > 0.99


def test_run_lengths_hold_the_masks_and_encode_a_query_once(monkeypatch):
    logits = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = {"queries": torch.tensor([7, 2, 7]), "mask_logits": logits[[0, 1, 0]]}
    calls, encode = [], rle.encode
    monkeypatch.setattr(rle, "encode", lambda pixels: calls.append(1) or encode(pixels))
    codes = evaluate.run_lengths(found, (31, 17))
    assert len(calls) == 2 and json.loads(json.dumps(codes)) == codes
    for code, mask in zip(codes, evaluate.full_masks(found["mask_logits"], (31, 17)), strict=True):
        assert np.array_equal(rle.decode(code).astype(bool), mask.numpy())


# ---- predictions and scores ------------------------------------------------------------------------------------

class Perfect(nn.Module):
    """Answers with the scenes' objects; image i is told by its first pixel. Rows 1 and 3 are classes, others noise."""

    def __init__(self, scenes, shift=0.0):
        super().__init__()
        self.scenes, self.shift = scenes, shift
        self.mask_head = SimpleNamespace(confine=MaskHead.confine)

    def forward(self, images):
        which = (images[:, 0, 0, 0] * 255).round().int().tolist()
        logits = torch.full((len(which), 6, 5), -9.0)
        logits[..., [0, 2, 4]] = 9.0  # rows that no class uses, better than everything else
        boxes, pixels = torch.full((len(which), 6, 4), 0.5), torch.full((len(which), 6, 16, 16), -5.0)
        for i, number in enumerate(which):
            for q, (row, x, y, radius) in enumerate(self.scenes[number]):
                logits[i, q, row] = 5.0 - q
                boxes[i, q] = torch.tensor([x + self.shift, y, 2 * radius, 2 * radius])
                fine = disc(160, x + self.shift, y, radius).float()[None, None]
                pixels[i, q] = F.interpolate(fine, size=(16, 16), mode="area")[0, 0] * 10 - 5
        return {"logits": logits, "boxes": boxes, "pixel_embedding": pixels,
                "query_embedding": torch.eye(6).expand(len(which), -1, -1)}


SCENES = [[(1, 0.3, 0.4, 0.25), (3, 0.7, 0.6, 0.25)], [], [(3, 0.5, 0.5, 0.4)]]


def make_truth(tmp_path, size=(120, 160), without_mask=()):
    """Annotation file of SCENES, images of (H, W); objects whose ids are in `without_mask` have only a box."""
    content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "cell"}, {"id": 9, "name": "vessel"}]}
    for number, scene in enumerate(SCENES):
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": size[0], "width": size[1]})
        for row, x, y, radius in scene:
            fine = disc(480, x, y, radius).float()[None, None]
            mask = F.interpolate(fine, size=size, mode="area")[0, 0] > 0.5
            code = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            note = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": {1: 5, 3: 9}[row],
                    "bbox": [(x - radius) * size[1], (y - radius) * size[0], 2 * radius * size[1],
                             2 * radius * size[0]], "area": int(mask.sum()), "iscrowd": 0,
                    "segmentation": {"size": list(size), "counts": code["counts"].decode()}}
            if note["id"] in without_mask:
                note["segmentation"] = []
            content["annotations"].append(note)
    (tmp_path / "truth.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "truth.json"


class Loader(list):
    """Batches of two, with what `evaluate` wants of a data set."""

    def __init__(self, annotation_file, size=(120, 160)):
        images = torch.stack([torch.full((3, 64, 64), i, dtype=torch.uint8) for i in range(len(SCENES))])
        super().__init__({"images": images[i:i + 2], "image_ids": list(range(len(SCENES)))[i:i + 2],
                          "sizes": [size] * len(images[i:i + 2])} for i in (0, 2))
        self.dataset = SimpleNamespace(annotations=annotation_file, image_ids=[0, 1, 2], category_of={1: 5, 3: 9})


def test_predictions_drop_foreign_rows_before_choosing():
    images = torch.zeros(1, 3, 64, 64)
    found = evaluate.predict_batch(Perfect(SCENES), images, [(120, 160)], top=2, rows=[3, 1])[0]
    assert found["labels"].tolist() == [1, 3] and found["queries"].tolist() == [0, 1]
    assert found["mask_logits"].shape == (2, 16, 16)
    torch.testing.assert_close(found["boxes"][0], torch.tensor([8.0, 18.0, 88.0, 78.0]), atol=1e-3, rtol=0)
    everything = evaluate.predict_batch(Perfect(SCENES), images, [(120, 160)], top=2, masks=False)[0]
    assert set(everything["labels"].tolist()) <= {0, 2, 4} and "mask_logits" not in everything


def test_perfect_and_shifted_masks_score_as_they_should(tmp_path):
    path = make_truth(tmp_path)
    metrics, table, found = evaluate.evaluate(Perfect(SCENES), Loader(path), "cpu", masks=True)
    assert metrics["box/mAP"] == pytest.approx(1.0) and metrics["mask/AP75"] == pytest.approx(1.0)
    assert metrics["mask/mAP"] > 0.85  # 16 x 16 cells cannot follow a disc of 80 pixels to the last one
    assert [row["class"] for row in table] == ["cell", "vessel"] and table[0]["box"] == pytest.approx(1.0)
    assert {d["label"] for d in found} == {1, 3} and {d["image_id"] for d in found} == {0, 1, 2}
    shifted, _, _ = evaluate.evaluate(Perfect(SCENES, shift=0.08), Loader(path), "cpu", masks=True)
    assert 0 < shifted["mask/mAP"] < metrics["mask/mAP"] and shifted["box/mAP"] < 0.9
    boxes_only, table, found = evaluate.evaluate(Perfect(SCENES), Loader(path), "cpu")
    assert not any(name.startswith("mask") for name in boxes_only) and set(table[0]) == {"class", "box"}
    assert "segmentation" not in found[0]


def test_objects_without_a_mask_count_neither_way(tmp_path):
    path = make_truth(tmp_path, without_mask=(3,))
    metrics, table, found = evaluate.evaluate(Perfect(SCENES), Loader(path), "cpu", masks=True)
    assert metrics["mask/AP75"] == pytest.approx(1.0) and metrics["box/mAP"] == pytest.approx(1.0)
    truth = ground_truth(path)
    before = json.dumps(truth.dataset)
    lost = [d for d in found if d["image_id"] != 2]  # not found, and still nothing is missing
    scores = coco_scores(truth, lost, {1: 5, 3: 9}, [0, 1, 2], "segm")
    assert scores["AP75"] == pytest.approx(1.0) and json.loads(before)["annotations"][2]["segmentation"] == []
    assert coco_scores(truth, lost, {1: 5, 3: 9}, [0, 1, 2])["mAP"] < 0.9


def test_sizes_of_masks_go_by_the_masks_own_area(tmp_path):
    """A thin diagonal of 1000 pixels in a box of 10,000: wrong detections outside of an area range are ignored only
    if their own area is the mask's."""
    size = (120, 120)
    thin = np.zeros(size, np.uint8, order="F")
    for i in range(100):
        thin[i, i:i + 10] = 1
    code = rle.encode(thin)
    shape = {"size": list(size), "counts": code["counts"].decode()}
    note = {"id": 1, "image_id": 0, "category_id": 5, "bbox": [0, 0, 109, 100], "area": 1000, "iscrowd": 0,
            "segmentation": shape}
    content = {"images": [{"id": 0, "file_name": "0.jpg", "height": 120, "width": 120}], "annotations": [note],
               "categories": [{"id": 5, "name": "cell"}]}
    (tmp_path / "thin.json").write_text(json.dumps(content), encoding="utf-8")
    truth = ground_truth(tmp_path / "thin.json")
    elsewhere = rle.encode(np.asfortranarray(thin[::-1]))
    wrong = {"image_id": 0, "label": 0, "bbox": [0, 0, 109, 100], "score": 0.9,
             "segmentation": {"size": list(size), "counts": elsewhere["counts"].decode()}}
    right = wrong | {"score": 0.5, "segmentation": shape}
    scores = coco_scores(truth, [wrong, right], {0: 5}, [0], "segm")
    assert scores["AP_small"] == pytest.approx(0.5) and scores["AP_medium"] == -1


# ---- pictures --------------------------------------------------------------------------------------------------

def test_masks_are_drawn_translucent_below_the_boxes():
    image = torch.zeros(3, 60, 80)
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 20:50, 30:60] = True
    picture = visualize.draw_masks(image, torch.tensor([[30.0, 20.0, 60.0, 50.0]]), torch.tensor([3]), {3: "car"}, mask,
                                   torch.tensor([0.9]), scale=2)
    assert picture.size == (160, 120)
    inside, outside = picture.getpixel((90, 70)), picture.getpixel((10, 110))
    assert outside == (0, 0, 0)
    assert inside == pytest.approx([0.45 * v for v in (0xe6, 0x19, 0x4b)], abs=2)
    empty = visualize.draw_masks(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), {}, mask[:0])
    assert empty.size == (80, 60)


def test_an_edge_of_the_image_is_no_outline_and_an_empty_mask_leaves_nothing():
    masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    masks[0, :10, :12] = True
    boxes, labels = torch.tensor([[40.0, 30.0, 49.0, 39.0]]).expand(2, 4), torch.tensor([3, 4])  # away from the mask
    picture = visualize.draw_masks(torch.zeros(3, 40, 50), boxes, labels, {3: "", 4: ""}, masks, opacity=0.5)
    full, half = (0xe6, 0x19, 0x4b), tuple(v / 2 for v in (0xe6, 0x19, 0x4b))
    for x in range(20):
        for y in range(20):
            expected = (0, 0, 0) if x > 11 or y > 9 else full if x == 11 or y == 9 else half
            assert picture.getpixel((x, y)) == pytest.approx(expected, abs=1), (x, y)


def test_lettering_is_what_pillow_writes():
    page = Image.new("RGB", (120, 60), "#3cb44b")
    written = page.copy()
    ImageDraw.Draw(written).text((10, 20), "person gj 0.53", fill="#202020", font=visualize.font_of(13))
    strip, (x, y) = visualize.lettering("person gj 0.53", 13, "#202020", "#3cb44b")
    page.paste(strip, (10 + x, 20 + y))
    assert page.tobytes() == written.tobytes() != Image.new("RGB", (120, 60), "#3cb44b").tobytes()
    assert visualize.lettering("person gj 0.53", 13, "#202020", "#3cb44b")[0] is strip


def test_masks_are_confined_to_their_boxes():
    logits = torch.full((2, 40, 40), 3.0)
    logits[1] = -5.0
    boxes = torch.tensor([[0.5, 0.25, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    found = masks.confined(logits, boxes)
    hit = (found[0] > 0).nonzero()
    low, high = hit.min(0).values / 40, (hit.max(0).values + 1) / 40
    # the box 0.40..0.60 x 0.20..0.30 in cells of 0.025
    assert low.tolist() == pytest.approx([0.2, 0.4]) and high.tolist() == pytest.approx([0.3, 0.6])
    assert found[0].min() == -1 and torch.equal(found[1], logits[1])


@pytest.mark.parametrize("at", [0.5, 0.5125, 0.51])  # between two cells, in the middle of one, beside it
def test_a_mask_of_a_box_smaller_than_a_cell_is_not_lost(at):
    found = masks.confined(torch.full((1, 40, 40), 3.0), torch.tensor([[at, at, 0.001, 0.001]]))
    assert 1 <= (found > 0).sum() <= 4 and (found[0, 19:22, 19:22] > 0).sum() == (found > 0).sum()
