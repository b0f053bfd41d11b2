"""The deprecated RF-DETR-L: two feature levels, P3 and P5, which transformers' RfDetr does not have.

The backbone's four maps (stride 14) are brought to half the stride by a transposed convolution each (P3) and to twice
the stride by a strided convolution each (P5); per level they are concatenated and go through the same C2f block and
layer norm as in the one-level sizes. Module names are the published checkpoint's where transformers has none.
"""

import torch
from torch import nn
from transformers.models.rf_detr.modeling_rf_detr import (
    RfDetrC2FLayer,
    RfDetrConvNormLayer,
    RfDetrForObjectDetection,
    RfDetrLayerNorm,
    RfDetrMLPPredictionHead,
    RfDetrModel,
    RfDetrModelOutput,
    RfDetrPreTrainedModel,
    refine_bboxes,
)


class TwoLevelProjector(nn.Module):
    """Backbone maps, each (B, C, h, w) -> [P3 (B, D, 2h, 2w), P5 (B, D, ceil(h/2), ceil(w/2))]."""

    def __init__(self, config):
        super().__init__()
        width, maps = config.backbone_config.hidden_size, len(config.backbone_config.out_indices)
        up = [nn.Sequential(nn.ConvTranspose2d(width, width // 2, 2, 2)) for _ in range(maps)]
        down = [nn.Sequential(RfDetrConvNormLayer(config, width, width, 3, 2, activation="relu")) for _ in range(maps)]
        self.stages_sampling = nn.ModuleList([nn.ModuleList(up), nn.ModuleList(down)])
        self.stages = nn.ModuleList([
            nn.ModuleList([RfDetrC2FLayer(config, channels),
                           RfDetrLayerNorm(config.d_model, data_format="channels_first")])
            for channels in (maps * width // 2, maps * width)])

    def forward(self, maps):
        levels = []
        for sampling, (block, norm) in zip(self.stages_sampling, self.stages, strict=True):
            resampled = [layer(one) for layer, one in zip(sampling, maps, strict=True)]
            levels.append(norm(block(torch.cat(resampled, 1))))
        return levels


class TwoLevelModel(RfDetrModel):
    """RfDetrModel over two feature levels. Square inputs without padding."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone.projector = TwoLevelProjector(config)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        """(B, 3, S, S), ImageNet-normalised -> RfDetrModelOutput; backbone_features is the finest level."""
        levels = self.backbone.projector(self.backbone.backbone(pixel_values).feature_maps)
        shapes = [tuple(level.shape[-2:]) for level in levels]
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)  # (B, T, D), P3's tokens first
        batch, tokens = memory.shape[:2]
        spatial_shapes = torch.tensor(shapes, dtype=torch.long, device=memory.device)
        starts = torch.tensor([0, *[h * w for h, w in shapes[:-1]]], device=memory.device).cumsum(0)
        padding = torch.zeros(batch, tokens, dtype=torch.bool, device=memory.device)
        candidates, anchors, invalid = self.gen_encoder_output_proposals(memory, padding, shapes)

        groups = self.config.group_detr if self.training else 1
        chosen = [self.generate_topk_proposals(group, candidates, anchors, invalid, self.num_queries)
                  for group in range(groups)]
        encoder_queries, detached, encoder_boxes = (torch.cat(parts, 1) for parts in zip(*chosen, strict=True))

        used = groups * self.num_queries
        reference = refine_bboxes(detached, self.reference_point_embed.weight[:used].expand(batch, -1, -1))  # (B, Q, 4)
        decoded = self.decoder(
            inputs_embeds=self.query_feat.weight[:used].expand(batch, -1, -1), reference_points=reference,
            spatial_shapes=spatial_shapes, spatial_shapes_list=shapes, level_start_index=starts,
            valid_ratios=memory.new_ones(batch, len(levels), 2), encoder_hidden_states=memory,
            encoder_attention_mask=~padding)
        return RfDetrModelOutput(
            init_reference_points=reference, last_hidden_state=decoded.last_hidden_state,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            intermediate_reference_points=decoded.intermediate_reference_points,
            enc_outputs_class=encoder_queries, enc_outputs_coord_logits=encoder_boxes, backbone_features=levels[0])


class TwoLevelDetector(RfDetrForObjectDetection):
    """RfDetrForObjectDetection on a TwoLevelModel."""

    def __init__(self, config):
        RfDetrPreTrainedModel.__init__(self, config)
        self.model = TwoLevelModel(config)
        self.class_embed = nn.Linear(config.d_model, config.num_labels)
        self.bbox_embed = RfDetrMLPPredictionHead(config.d_model, config.d_model, 4, num_layers=3)
        self.post_init()
