"""RT-DETR's criterion against transformers' own, and what ours does otherwise."""

import copy

import pytest
import torch
import transformers
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from utils.networks import matching, rtdetr, rtdetr_loss

LABELS = [{"class_labels": torch.tensor([0, 1, 1]),
           "boxes": torch.tensor([[.5, .5, .2, .3], [.3, .3, .1, .1], [.7, .2, .3, .2]])},
          {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
          {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[.4, .6, .5, .5]])}]
EMPTY = [LABELS[1]] * 3


def images():
    return torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def outputs_of(detector, labels, loss_function=None):
    """-> (outputs, {parameter: gradient}) of a copy of the detector, with one random stream."""
    detector = copy.deepcopy(detector)
    if loss_function:
        detector.loss_function = loss_function
    torch.manual_seed(3)
    outputs = detector(pixel_values=images(), labels=labels)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("labels", [LABELS, EMPTY])
def test_loss_terms_and_gradients_equal_transformers(small_detector, training, labels):
    detector = copy.deepcopy(small_detector).train(training)
    ours, gradients = outputs_of(detector, labels)
    theirs, expected = outputs_of(detector, labels, RTDetrForObjectDetectionLoss)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys()
    assert any("_dn_" in name for name in ours.loss_dict) == (training and labels is LABELS)
    for name, value in theirs.loss_dict.items():
        assert ours.loss_dict[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 + 1e-4 * value.abs().max().item())


def test_matching_is_that_of_transformers_matcher(small_detector):
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher
    generator = torch.Generator().manual_seed(1)
    logits, boxes = torch.randn(3, 2, 20, 2, generator=generator), torch.rand(3, 2, 20, 4, generator=generator) / 2
    matcher = RTDetrHungarianMatcher(small_detector.config)
    found = rtdetr_loss.match(logits, boxes, matching.objects_of(LABELS), small_detector.config)
    assert found.image.tolist() == [0, 0, 0, 2]
    for stage in range(2):
        expected = matcher({"logits": logits[:, stage], "pred_boxes": boxes[:, stage]}, LABELS)
        assert found.query[stage].tolist() == torch.cat([query for query, _ in expected]).tolist()
        starts = [0, 3, 3]
        assert found.target[stage].tolist() == torch.cat(
            [target + start for (_, target), start in zip(expected, starts, strict=True)]).tolist()


def test_outputs_that_are_not_finite_give_a_loss_of_nan(small_detector):
    detector = copy.deepcopy(small_detector).eval()
    with torch.no_grad():
        detector.model.enc_output[0].weight[0, 0] = float("nan")
        assert detector(pixel_values=images(), labels=LABELS).loss.isnan()


def test_a_new_detector_has_transformers_first_values():
    torch.manual_seed(0)
    detector = rtdetr.new_rtdetr("tiny", {0: "person", 1: "car"})
    torch.manual_seed(0)
    plain = transformers.RTDetrForObjectDetection(detector.config)
    for name, value in plain.state_dict().items():
        assert torch.equal(detector.state_dict()[name], value), name


def test_more_objects_than_queries_leave_some_over():
    costs = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))  # 5 objects of one image, 3 queries
    found = matching.assign([costs, costs.flip(0)], [5, 0])
    assert found.image.tolist() == [0, 0, 0] and found.query.tolist() == [[0, 1, 2]] * 2
    assert (found.target[0] + found.target[1]).tolist() == [4, 4, 4]
