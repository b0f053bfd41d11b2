"""Mask heads: an object's mask is its query's embedding times every pixel's, at a quarter of the image's size.

Query times pixel as in Cheng et al., "MaskFormer", 2021; where the object is, its box says through fixed waves in
the pixel embedding (the idea of CondInst's relative coordinates, Tian et al. 2020, without one map per object); blocks
after Liu et al., "ConvNeXt", 2022, with GroupNorm, which a batch of one does not mind. The detector's map is coarse
(stride 14 or 16), so a light stem looks at the image itself for sharp borders.

Everything trainable runs in `forward`; mask logits (rfdetr.masks.mask_logits) have no parameters of their own, so that
only the masks that someone asks for are ever computed.

OfficialHead is the head of Roboflow's RF-DETR-Seg models (Robinson et al., arXiv 2511.09554; rfdetr 1.11, Apache-2.0),
written anew from the names and shapes of its weights and what it computes, so that their checkpoints can be loaded.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

WAVES = 24               # cosines and sines per axis in the pixel embedding; half the finest period is 1/24
PRIOR_SCALE = 4.0        # steepness of the first mask around a query's box
NARROWEST = 2.5 / (math.pi * WAVES)  # spread of the narrowest bump that the waves can form


class Block(nn.Module):
    """Depthwise 3x3, then an inverted bottleneck, around a residual connection: (B, C, h, w) -> the same."""

    def __init__(self, channels, expansion):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.GroupNorm(channels // 16, channels)
        self.wide = nn.Conv2d(channels, expansion * channels, 1)
        self.narrow = nn.Conv2d(expansion * channels, channels, 1)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x):
        return x + self.narrow(F.gelu(self.wide(self.norm(self.depthwise(x)))))


class MaskHead(nn.Module):
    """Mask head for the small to large detectors.

    Args:
        d_model: channels of the detector's map and of its queries, D.
    Attributes:
        channels: learned channels of the embeddings; C = channels + 4 * WAVES + 1.
    """

    confine = True  # masks are kept to their boxes, see rfdetr.masks.confined
    channels, stem, hidden = 128, 32, 256
    coarse_blocks, fine_blocks, expansion = 2, 3, 2

    def __init__(self, d_model):
        super().__init__()
        channels, stem = self.channels, self.stem
        self.stem_half = nn.Conv2d(3, stem // 2, 3, stride=2, padding=1)
        self.stem_quarter = nn.Conv2d(stem // 2, stem, 3, stride=2, padding=1)
        self.stem_norm = nn.GroupNorm(stem // 8, stem)
        self.stem_out = nn.Conv2d(stem, channels, 1)
        self.reduce = nn.Conv2d(d_model, channels, 1)
        self.reduce_norm = nn.GroupNorm(channels // 16, channels)
        self.coarse = nn.Sequential(*(Block(channels, 2 * self.expansion) for _ in range(self.coarse_blocks)))
        self.fine = nn.Sequential(*(Block(channels, self.expansion) for _ in range(self.fine_blocks)))
        self.pixel_norm = nn.GroupNorm(channels // 16, channels)
        self.pixel_out = nn.Conv2d(channels, channels, 1)

        self.query_norm = nn.LayerNorm(d_model)
        self.query_in = nn.Linear(d_model, self.hidden)
        self.box_in = nn.Linear(4 * WAVES + 4, self.hidden, bias=False)
        self.query_out = nn.Linear(self.hidden, channels + 4 * WAVES + 1)
        self.box_scale = nn.Parameter(torch.tensor(PRIOR_SCALE))
        with torch.no_grad():
            self.query_out.weight[channels:] *= 0.1  # the first masks follow the prior, not noise
            self.query_out.bias.zero_()

    def forward(self, features, images, queries, boxes):
        """Embed pixels and queries.

        Args:
            features: (B, D, h, w), the projector's map; images: (B, 3, S, S) float RGB in [0, 1].
            queries: (B, n, D), hidden states of the last decoder layer.
            boxes: (B, n, 4) normalised cxcywh that the detector gives these queries; no gradient returns to them.
        Returns:
            pixel_embedding (B, C, S/4, S/4) and query_embedding (B, n, C), float32: their product is the mask's logit.
            Before anything is learned, masks are ellipses in the boxes.
        """
        # channels last: a fifth faster on the CPU, measured with the rest of a training step
        images = images.contiguous(memory_format=torch.channels_last)
        features = features.contiguous(memory_format=torch.channels_last)
        image = F.gelu(self.stem_half((images - 0.5) * 4))  # (B, stem / 2, S/2, S/2)
        image = self.stem_out(F.gelu(self.stem_norm(self.stem_quarter(image))))  # (B, channels, S/4, S/4)
        context = self.coarse(self.reduce_norm(self.reduce(features)))  # (B, channels, h, w)
        context = F.interpolate(context, size=image.shape[-2:], mode="bilinear", align_corners=False)
        pixels = self.pixel_out(self.pixel_norm(self.fine(image + context)))
        boxes = boxes.detach().float()
        hidden = self.query_in(self.query_norm(queries)) + self.box_in(describe_boxes(boxes))
        embedding = self.query_out(F.gelu(hidden)).float()  # (B, n, C)
        learned, position = embedding[..., :self.channels] / math.sqrt(self.channels), embedding[..., self.channels:]
        position = position + self.box_scale * ellipses(boxes)
        pixels = torch.cat([pixels.float(), waves_of_pixels(*pixels.shape[-2:], pixels)], 1)
        return pixels, torch.cat([learned, position], -1)


class MaskHeadNano(MaskHead):
    """The light one, for the smallest detectors: fewer than a quarter of MaskHead's parameters."""

    channels, stem, hidden = 64, 16, 128
    coarse_blocks, fine_blocks, expansion = 1, 1, 1


class PixelBlock(nn.Module):
    """Depthwise 3x3, LayerNorm over the channels, one layer of width C, around a residual: (B, C, h, w) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, channels)

    def forward(self, x):
        inner = self.dwconv(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        return x + F.gelu(self.pwconv1(self.norm(inner))).permute(0, 3, 1, 2)


class QueryBlock(nn.Module):
    """Inverted bottleneck around a residual connection: (B, n, D) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.layers = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return x + self.layers(self.norm_in(x))


class OfficialHead(nn.Module):
    """The mask head of Roboflow's segmentation checkpoints; its parameters have their names.

    Theirs gives every decoder layer's queries masks from the map after as many blocks; here, as in their inference, the
    last layer's alone. It knows neither the image nor the boxes.

    Args:
        d_model: channels of the detector's map and of its queries, D; blocks: as many as the decoder has layers.
    """

    confine = False  # it was trained on points of the whole image, and scored without a look at the boxes

    def __init__(self, d_model, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(PixelBlock(d_model) for _ in range(blocks))
        self.spatial_features_proj = nn.Conv2d(d_model, d_model, 1)
        self.query_features_block = QueryBlock(d_model)
        self.query_features_proj = nn.Linear(d_model, d_model)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features, images, queries, boxes):
        """Embed pixels and queries: arguments and result as of `MaskHead.forward`, C = D + 1; the last channel is the
        bias of all masks."""
        side = [length // 4 for length in images.shape[-2:]]
        pixels = F.interpolate(features, size=side, mode="bilinear", align_corners=False)  # (B, D, S/4, S/4)
        for block in self.blocks:
            pixels = block(pixels)
        pixels = self.spatial_features_proj(pixels).float()
        queries = self.query_features_proj(self.query_features_block(queries)).float()  # (B, n, D)
        return (torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1),
                torch.cat([queries, self.bias.float().expand(*queries.shape[:2], 1)], -1))


# ---- where things are --------------------------------------------------------------------------------------------
# Positions are numbers in [0, 1]. Their waves are cos(pi k x) and sin(pi k x), k = 1 .. WAVES. A product of waves is a
# function of distance, since cos(pi k (x - c)) = cos(pi k x) cos(pi k c) + sin(pi k x) sin(pi k c).

def waves(positions):
    """(...) -> (..., 2 * WAVES) float32: all cosines, then all sines."""
    angles = positions.float()[..., None] * (math.pi * torch.arange(1, WAVES + 1, device=positions.device))
    return torch.cat([angles.cos(), angles.sin()], -1)


def waves_of_pixels(height, width, like):
    """-> (B, 4 * WAVES + 1, height, width) float32: waves of x, waves of y, and a channel of ones; batch of `like`."""
    x = waves((torch.arange(width, device=like.device) + 0.5) / width).T  # (2 * WAVES, width)
    y = waves((torch.arange(height, device=like.device) + 0.5) / height).T  # (2 * WAVES, height)
    parts = [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width), x.new_ones(1, height, width)]
    return torch.cat(parts)[None].expand(like.shape[0], -1, -1, -1)  # (B, 4 * WAVES + 1, height, width)


def describe_boxes(boxes):
    """(B, n, 4) cxcywh -> (B, n, 4 * WAVES + 4): waves of the centre, centre, logarithms of the extent."""
    return torch.cat([waves(boxes[..., 0]), waves(boxes[..., 1]), boxes[..., :2],
                      boxes[..., 2:].clamp(min=1e-3).log()], -1)


def ellipses(boxes):
    """Weights for the channels of `waves_of_pixels` that make a smooth ellipse in every box.

    A bump along x plus one along y, minus 1.5: each is a Gaussian, 1 at the box's centre and 1/2 at its border (boxes
    narrower than the finest wave get a wider one), so that the sum is positive inside and lies in [-1.5, 0.5].

    Args:
        boxes: (B, n, 4) cxcywh.
    Returns:
        (B, n, 4 * WAVES + 1).
    """
    order = torch.arange(WAVES + 1, device=boxes.device)
    spread = (boxes[..., 2:] / math.sqrt(8 * math.log(2))).clamp(min=NARROWEST)  # (B, n, 2): x, y
    strength = torch.exp(-((math.pi * spread[..., None] * order) ** 2) / 2)  # Fourier series of a Gaussian, period 2
    strength = torch.cat([strength[..., :1] / 2, strength[..., 1:]], -1)
    strength = strength / strength.sum(-1, keepdim=True)  # (B, n, 2, 1 + WAVES)
    weights = waves(boxes[..., :2]) * torch.cat([strength[..., 1:]] * 2, -1)  # (B, n, 2, 2 * WAVES)
    constant = strength[..., 0].sum(-1, keepdim=True) - 1.5  # (B, n, 1)
    return torch.cat([weights.flatten(-2), constant], -1)  # (B, n, 4 * WAVES + 1)
