"""What a detector in the rain can learn from one that sees the same scene without rain.

Two DETRs cannot be compared output by output, because each chooses its own queries. So the student's decoder runs once
more with the teacher's queries and reference points on the student's features, and what comes out is compared query by
query (Wang et al., "KD-DETR", CVPR 2024), without a matching. RT-DETR chooses its queries by scoring every position of
its feature maps, and positions do correspond: these scores and boxes are compared as well, and the features, where the
teacher sees objects. None of it needs labels.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from utils import freeze
from utils.boxes import box_overlap
from utils.config import UserError
from utils.losses import count_over_ranks, float32
from utils.networks.rtdetr import id2label_of

TERMS = ("queries", "positions", "features")
BOX_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # of RT-DETR's own loss, where classes count 1
UNSURE = 0.01  # boxes of scores below are not compared: at positions without an object they mean nothing


class Answer(NamedTuple):
    """What the teacher says about B images: Q queries, L decoder layers (of D-FINE the last one alone), T positions of
    all feature maps, K classes."""

    queries: torch.Tensor          # (B, Q, C) content that enters the decoder
    references: torch.Tensor       # (B, Q, 4) its boxes before the sigmoid, cxcywh
    logits: torch.Tensor           # (B, L, Q, K)
    boxes: torch.Tensor            # (B, L, Q, 4) normalised cxcywh
    position_logits: torch.Tensor  # (B, T, K)
    position_boxes: torch.Tensor   # (B, T, 4) normalised cxcywh
    features: torch.Tensor         # (B, T, C) what the decoder attends to


def require_same_form(teacher, student, constant):
    """UserError that names the teacher's constant unless two detectors can be compared query by query."""
    def form(detector):
        found = detector.config
        return {"kind and version (model_type)": found.model_type, "classes": tuple(id2label_of(detector).values()),
                "queries": found.num_queries,
                "width (d_model)": found.d_model, "decoder layers": found.decoder_layers,
                "feature levels": found.num_feature_levels}
    wanted, found = form(student), form(teacher)
    for name in wanted:
        if wanted[name] != found[name]:
            raise UserError(f"{constant}: the teacher's {name} are {found[name]}, those of the detector that learns "
                            f"{wanted[name]}: they cannot be compared query by query")


class Teacher(nn.Module):
    """A detector that answers about clean images, frozen.

    Args:
        detector: RTDetrForObjectDetection with the student's classes and shapes.
        cache_gb: memory for answers about images that come again, on the CPU; 0 asks the detector every time, about all
            images of a batch together.
    """

    def __init__(self, detector, cache_gb=0.0):
        super().__init__()
        self.rtdetr = freeze.freeze(detector)
        self.cached, self.room, self._known = cache_gb > 0, cache_gb * 1e9, {}

    def forward(self, images, digests=None):
        """-> Answer.

        Args:
            images: (B, 3, H, W) in [0, 1]; digests: B keys that are equal where images are (see
                samples.collate_with_digests), None asks the detector about all of them.
        """
        if not self.cached or digests is None:
            return self.live(images)
        # one by one: an answer must not depend, by a rounding error, on which images of a batch were known already
        rows = [self._known.get(digest) or self._kept(digest, self.live(image[None]))
                for digest, image in zip(digests, images, strict=True)]
        return Answer(*(torch.cat([part.to(images.device) for part in parts]) for parts in zip(*rows, strict=True)))

    def _kept(self, digest, answer):
        size = sum(part.nbytes for part in answer)
        if size <= self.room:
            self.room -= size
            self._known[digest] = [part.cpu() for part in answer]
        return answer

    @torch.no_grad()
    def live(self, images):
        """Images (B, 3, H, W) in [0, 1] -> Answer of the detector itself."""
        outputs, inputs = _called(self.rtdetr, partial(self.rtdetr, pixel_values=images))
        return Answer(inputs["inputs_embeds"], inputs["reference_points"], outputs.intermediate_logits,
                      outputs.intermediate_reference_points, outputs.enc_outputs_class,
                      outputs.enc_outputs_coord_logits.sigmoid(), inputs["encoder_hidden_states"])


class Student(nn.Module):
    """A detector that is compared with a teacher's Answer while it trains."""

    def __init__(self, detector):
        super().__init__()
        self.rtdetr = detector

    def forward(self, images, labels, answer, terms=TERMS, over_ranks=True):
        """-> (outputs of the detector, with its own loss where there are labels; {term: scalar Tensor}).

        Without labels nothing is learnt from the detector's own queries, so its decoder runs with the teacher's alone
        where those are compared, and the outputs are what it answers to them.

        Args:
            images: (B, 3, H, W) in [0, 1]; labels: as RT-DETR takes them, None leaves its own loss out.
            answer, terms, over_ranks: see `compared`.
        """
        return compared(self.rtdetr, partial(self.rtdetr, pixel_values=images, labels=labels), answer, terms,
                        over_ranks, own_queries=labels is not None)


def compared(detector, call, answer, terms=TERMS, over_ranks=True, own_queries=True):
    """-> (outputs of a call of the detector, {term: scalar Tensor}).

    Args:
        detector: the student, RTDetrForObjectDetection; call: () -> its outputs, from images or from features on.
        answer: the teacher's, about the same scenes in the same geometry; terms: those of TERMS that are wanted.
        over_ranks: whether under torchrun all ranks call this together and the terms are those of one batch of all
            their images, as in training; False: of these images alone, whatever the others do.
        own_queries: False saves a run of the decoder where "queries" is among the terms: the call's decoder gets the
            teacher's queries, and the outputs belong to them. Only for a call without labels.
    """
    theirs = {"inputs_embeds": answer.queries, "reference_points": answer.references}
    keeps_own = own_queries or "queries" not in terms
    outputs, inputs = _called(detector, call, {} if keeps_own else theirs)
    found, device_type = {}, answer.logits.device.type
    with float32(device_type):
        if "positions" in terms:
            found["positions"] = position_loss(outputs.enc_outputs_class, outputs.enc_outputs_coord_logits, answer,
                                               over_ranks)
        if "features" in terms:
            found["features"] = feature_loss(inputs["encoder_hidden_states"], answer, over_ranks)
    if "queries" in terms:
        asked = {name: value for name, value in inputs.items() if name != "encoder_attention_mask"}
        again = detector.model.decoder(**asked | theirs) if keeps_own else outputs
        with float32(device_type):
            found["queries"] = query_loss(again.intermediate_logits, again.intermediate_reference_points, answer,
                                          over_ranks)
    return outputs, found


def _called(detector, call, instead=None):
    """-> (outputs of the detector's call, the arguments that its decoder was called with); instead: {name: Tensor} of
    arguments that it gets in place of its own."""
    seen = {}

    def replace(decoder, args, kwargs):
        seen.update(kwargs | (instead or {}))
        return args, seen
    handle = detector.model.decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return call(), seen
    finally:
        handle.remove()


def query_loss(logits, boxes, answer, over_ranks=True):
    """The same queries' classes and boxes, summed over the L layers of the answer: (B, L or more, Q, K), (B, L or more,
    Q, 4), of which the last ones count, Answer -> scalar. over_ranks: see `compared`."""
    layers = answer.logits.shape[1]  # while D-FINE trains it answers with all of its layers, else with the last
    return layers * _difference(logits[:, -layers:], boxes[:, -layers:], answer.logits, answer.boxes, over_ranks)


def position_loss(logits, box_logits, answer, over_ranks=True):
    """Scores and boxes by which queries are chosen: (B, T, K), (B, T, 4) before the sigmoid, Answer -> scalar.
    over_ranks: see `compared`."""
    return _difference(logits, box_logits.float().sigmoid(), answer.position_logits, answer.position_boxes, over_ranks)


def _difference(logits, boxes, wanted_logits, wanted_boxes, over_ranks):
    """-> scalar, 0 where both say the same, per unit of the teacher's scores, see `_units`.

    Classes: cross entropy against the teacher's scores less its least possible value (a Kullback-Leibler divergence),
    weighted as in the quality focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020) plus the teacher's score.
    Boxes: L1 and generalised IoU, weighted with the teacher's score.
    """
    logits, boxes, wanted_logits, wanted_boxes = (
        tensor.float() for tensor in (logits, boxes, wanted_logits, wanted_boxes))
    wanted = wanted_logits.sigmoid()
    weight = wanted + (logits.detach().sigmoid() - wanted).square() * (1 - wanted)
    entropy = F.binary_cross_entropy_with_logits
    classes = entropy(logits, wanted, weight, reduction="sum") - entropy(wanted_logits, wanted, weight, reduction="sum")
    sure = wanted.amax(-1)  # (...)
    sure = torch.where(sure > UNSURE, sure, 0.0)
    placed = (BOX_WEIGHT * (boxes - wanted_boxes).abs().sum(-1)
              + GIOU_WEIGHT * (1 - box_overlap(boxes, wanted_boxes)[1]))
    return (classes + (sure * placed).sum()) / _units(sure.sum(), over_ranks)


def _units(scores, over_ranks, least=1.0):
    """-> what a sum of losses is divided by: the sum of the teacher's scores, under torchrun that of all ranks unless a
    rank is by itself."""
    return count_over_ranks(scores, scores.device, least=least) if over_ranks else scores.clamp(min=least)


def feature_loss(features, answer, over_ranks=True):
    """Squared error of the features (B, T, C) in shares of their mean square, weighted with the teacher's score of each
    position: scalar, 0 for the teacher's own features. over_ranks: see `compared`."""
    features, wanted = features.float(), answer.features.float()
    sure = answer.position_logits.float().sigmoid().amax(-1)  # (B, T)
    error = (features - wanted).square().mean(-1) / wanted.square().mean((1, 2)).clamp(min=1e-6)[:, None]
    return (sure * error).sum() / _units(sure.sum(), over_ranks, least=1e-6)
