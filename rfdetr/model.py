"""RF-DETR as one module: images in [0, 1] in, a dict of everything that losses, masks and evaluation need out.

The detector is transformers' RfDetr (Robinson et al., arXiv 2511.09554; Apache-2.0). This adapter is the only place
that knows its peculiarities, and works around them:

* its loss is not used: it stays in train mode inside an eval model, and log(sigmoid(x)) becomes NaN (rfdetr.criterion);
* fewer feature positions than queries crash its topk: refused with a clear line;
* its `freeze_backbone()` fails: utils.freeze does that, with `RFDETR.vit`;
* it has no two-level projector: rfdetr.projector;
* its initial weights are not those of the LW-DETR family: `initialise`;
* parameters that no output depends on (mask token, blocks behind the last tapped one) would make
  DistributedDataParallel complain about missing gradients: they do not ask for any;
* its state dict has names of its own: files keep the published ones (rfdetr.names).
"""

import contextlib
import math

import torch
from torch import nn
from transformers import RfDetrForObjectDetection
from transformers.models.rf_detr.modeling_rf_detr import RfDetrMultiscaleDeformableAttention

from rfdetr import names
from rfdetr.config import check_resolution, default_resolution, detector_config
from rfdetr.models.segmentation import MaskHead, MaskHeadNano, OfficialHead
from rfdetr.projector import TwoLevelDetector
from utils import freeze
from utils.config import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained
PRIOR = 0.01  # probability of every class before training (Lin et al., "Focal Loss", 2017)


class RFDETR(nn.Module):
    """A detector of one size, and a mask head if wanted.

    Args:
        size: a key of rfdetr.config.SIZES; num_rows: rows of the class head, K.
        resolution: side of the square input that it is for, None for the size's own (others are possible in forward).
        mask_head: None, "full" (MaskHead), "nano" (MaskHeadNano) or "official" (OfficialHead), of
            rfdetr.models.segmentation.
    Attributes:
        model_args: RFDETR(**model_args) builds the same module again.
    Raises:
        UserError: a size, resolution or mask head that does not exist.
    """

    def __init__(self, size, num_rows, resolution=None, mask_head=None):
        super().__init__()
        config = detector_config(size, num_rows, resolution)
        self.model_args = {
            "size": size, "num_rows": num_rows, "mask_head": mask_head,
            "resolution": default_resolution(size) if resolution is None else resolution}
        self.detector = new_detector(config)
        self.mask_head = new_mask_head(mask_head, config)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.register_state_dict_post_hook(_publish_names)
        self.register_load_state_dict_pre_hook(_accept_names)

    @property
    def groups(self):
        """Groups of queries in the detector's present mode: 13 (the tiny one's: 4) in train, 1 in eval."""
        return self.detector.config.group_detr if self.detector.training else 1

    @property
    def vit(self):
        """The backbone: the windowed DINOv2, without the projector, which belongs to what every data set trains."""
        return self.detector.model.backbone.backbone

    def checkpoint_blocks(self):
        """From now on the ViT's blocks keep their inputs alone in training and compute the rest again in the backward
        pass, with the same randomness (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016)."""
        # not reentrant: the reentrant kind would cut the graph at the maps that are read between the blocks
        enable = getattr(self.vit, "activation_checkpointing_enable", None) or self.vit.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": True})  # the second name is that of older releases

    def count_parameters(self):
        """-> (all, those that inference uses): the other groups' queries and encoder heads are for training only."""
        inner = self.detector.model
        extra = sum(p.numel() for heads in (inner.enc_output, inner.enc_output_norm, inner.enc_out_class_embed,
                                            inner.enc_out_bbox_embed) for head in heads[1:] for p in head.parameters())
        one = self.detector.config.num_queries
        extra += sum(table.weight[one:].numel() for table in (inner.query_feat, inner.reference_point_embed))
        whole = sum(p.numel() for p in self.parameters())
        return whole, whole - extra

    def forward(self, images, cached=None):
        """Detect, and embed for masks.

        Args:
            images: (B, 3, S, S) float RGB in [0, 1]; S a multiple of block_size(size).
            cached: {"features": (B, D, h, w), "queries": (B, n, D), "boxes": (B, n, 4)} of an earlier eval forward, n
                queries of one's choice and their boxes: the detector is not run, and only pixel_embedding and
                query_embedding come back (needs a mask head).
        Returns:
            dict. Q = groups * num_queries and q = num_queries while the detector trains, Q = q = num_queries in eval.
            "logits" (B, Q, K), "boxes" (B, Q, 4) normalised cxcywh, of the last decoder layer
            "aux" [{"logits", "boxes"}, ...] of the layers before it, "enc" {"logits", "boxes"} of the proposals
            "queries" (B, q, D) hidden state of the first group, "features" (B, D, h, w) the projector's finest map
            With a mask head also "pixel_embedding" (B, C, S/4, S/4) and "query_embedding" (B, q, C).
        Raises:
            UserError: not square, or a side that does not fit the size.
        """
        outputs = {} if cached is not None else self.forward_normalised((images - self.mean) / self.std)
        if self.mask_head is not None:
            source = outputs if cached is None else cached
            queries = source["queries"]
            boxes = source["boxes"][:, :queries.shape[1]]  # of the first group, as the queries are
            pixels, queries = self.mask_head(source["features"], images, queries, boxes)
            outputs |= {"pixel_embedding": pixels, "query_embedding": queries}
        elif cached is not None:
            raise UserError("cached features are of use only to a model with a mask head")
        return outputs

    def forward_normalised(self, pixels):
        """The detector alone on (B, 3, S, S) ImageNet-normalised pixels -> dict as of `forward`, without embeddings."""
        if pixels.shape[-1] != pixels.shape[-2]:
            raise UserError(f"RF-DETR takes square images, not {pixels.shape[-1]}x{pixels.shape[-2]}")
        check_resolution(self.model_args["size"], int(pixels.shape[-1]))
        detector = self.detector
        with torch.no_grad() if freeze.is_frozen(detector) else contextlib.nullcontext():
            found = detector(pixel_values=pixels)
            hidden, reference = found.intermediate_hidden_states, found.intermediate_reference_points[-1]
            earlier = [detector.predict_class_and_boxes(layer, reference) for layer in hidden[:-1]]
        return {
            "logits": found.logits, "boxes": found.pred_boxes,
            "aux": [{"logits": logits, "boxes": boxes} for logits, boxes in earlier],
            "enc": {"logits": found.enc_outputs_class, "boxes": found.enc_outputs_coord_logits},
            "queries": hidden[-1][:, :detector.config.num_queries],
            "features": found.backbone_features,
        }


def new_detector(config):
    """-> transformers' detector, or ours of two levels, with initial weights as LW-DETR's training code sets them."""
    detector = (TwoLevelDetector if config.num_feature_levels == 2 else RfDetrForObjectDetection)(config)
    initialise(detector)
    backbone = detector.model.backbone.backbone
    backbone.embeddings.mask_token.requires_grad_(False)
    for block in backbone.encoder.layer[max(config.backbone_config.out_indices):]:
        block.requires_grad_(False)
    return detector


def new_mask_head(kind, config):
    """-> MaskHead ("full"), MaskHeadNano ("nano"), OfficialHead ("official") or None for a detector of transformers'
    configuration `config`."""
    if kind is None:
        return None
    if kind == "official":
        return OfficialHead(config.d_model, config.decoder_layers)
    heads = {"full": MaskHead, "nano": MaskHeadNano}
    if kind not in heads:
        raise UserError(f"mask_head = {kind!r}: choose None, 'full', 'nano' or 'official'")
    return heads[kind](config.d_model)


@torch.no_grad()
def initialise(detector):
    """Initial weights of projector, decoder and heads (Chen et al., "LW-DETR", 2024; Zhu et al., "Deformable DETR",
    2021). The backbone keeps DINOv2's.

    transformers draws every matrix from N(0, 0.02), query features included, and every encoder head for itself; here
    matrices are Xavier-uniform, query features N(0, 1), and all class heads start equal, all box heads with a zero
    last layer: every box begins as its proposal, every class with probability PRIOR.
    """
    model = detector.model
    for module in model.backbone.projector.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()
    for part in (model.decoder, model.enc_output):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    for module in model.decoder.modules():
        if isinstance(module, RfDetrMultiscaleDeformableAttention):
            _initialise_sampling(module)
    nn.init.normal_(model.query_feat.weight)
    nn.init.zeros_(model.reference_point_embed.weight)
    detector.class_embed.reset_parameters()
    nn.init.constant_(detector.class_embed.bias, math.log(PRIOR / (1 - PRIOR)))
    for layer in detector.bbox_embed.layers:
        layer.reset_parameters()
    nn.init.zeros_(detector.bbox_embed.layers[-1].weight)
    nn.init.zeros_(detector.bbox_embed.layers[-1].bias)
    for head in model.enc_out_class_embed:
        head.load_state_dict(detector.class_embed.state_dict())
    for head in model.enc_out_bbox_embed:
        head.load_state_dict(detector.bbox_embed.state_dict())


def _initialise_sampling(attention):
    """Points of head i start in direction i around the reference box, the k-th point k steps out, all weighed alike."""
    angles = torch.arange(attention.n_heads) * (2 * math.pi / attention.n_heads)
    direction = torch.stack([angles.cos(), angles.sin()], -1)
    direction = direction / direction.abs().max(-1, keepdim=True)[0]  # (heads, 2), on the unit square's border
    steps = torch.arange(1, attention.n_points + 1).view(1, 1, -1, 1)  # (1, 1, points, 1)
    offsets = (direction[:, None, None] * steps).expand(-1, attention.n_levels, -1, -1)  # (heads, levels, points, 2)
    nn.init.zeros_(attention.sampling_offsets.weight)
    attention.sampling_offsets.bias.copy_(offsets.flatten())
    nn.init.zeros_(attention.attention_weights.weight)


def _publish_names(module, state, prefix, metadata):
    """State dict hook: the detector's entries get the published names, without "detector."."""
    inner = f"{prefix}detector."
    own = {name.removeprefix(inner): state.pop(name) for name in list(state) if name.startswith(inner)}
    later = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}  # the mask head, after it
    state.update({prefix + name: value for name, value in names.to_published(own).items()} | later)


def _accept_names(module, state, prefix, *_):
    """Before loading: published names become transformers' again."""
    given = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    own = [name for name, _ in module.detector.named_parameters()]
    renamed = names.from_published(given, own)
    own = set(own)
    state.update({prefix + ("detector." if name in own else "") + name: value for name, value in renamed.items()})
