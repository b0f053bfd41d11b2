"""Images of any size through a network that wants certain sides, or that has no memory for all of it at once."""

import math

import torch
from torch import nn

from utils.config import UserError


def to_multiple(images, multiple, least=1):
    """(B, 3, H, W) -> the same, `reflected` to the next sides that are multiples of `multiple` and at least `least`."""
    right, below = (-(-max(side, least) // multiple) * multiple - side for side in (images.shape[-1], images.shape[-2]))
    return reflected(images, right, below)


def reflected(images, right, below):
    """(B, 3, H, W) -> (B, 3, H + below, W + right), mirrored at the border as often as it takes."""
    for dim, amount in ((-1, right), (-2, below)):
        if amount:
            size = images.shape[dim]
            at = torch.arange(size + amount, device=images.device) % max(2 * size - 2, 1)
            images = images.index_select(dim, torch.where(at < size, at, 2 * size - 2 - at))
    return images


@torch.no_grad()
def restore(model, images, tile=0, overlap=128):
    """Restore images at their own resolution, in tiles where they are larger than one.

    Neighbouring tiles overlap. The outer quarter of the overlap is context alone, over its middle half one tile fades
    into the next, so that no seam shows; tiles start at multiples of 32, where the network's grids agree.

    Args:
        model: a de-rainer in eval mode, or any (1, 3, h, w) -> (1, 3, h, w) in [0, 1].
        images: (B, 3, H, W) in [0, 1], on any device; tiles travel to the model's one by one.
        tile: side of a tile in pixels, 0 for none; overlap: pixels that two neighbours share.
    Returns:
        (B, 3, H, W) float32 on the device of `images`.
    Raises:
        UserError: sides that are no multiples of 32, or an overlap of more than half a tile; names TILE.
    """
    require_tiles(tile, overlap)
    device = next(model.parameters(), images).device if isinstance(model, nn.Module) else images.device
    height, width = images.shape[-2:]
    if not tile or max(height, width) <= tile:
        return model(images.to(device)).float().to(images.device)
    rows, columns = (_starts(side, tile, overlap) for side in (height, width))
    total = images.new_zeros(images.shape, dtype=torch.float32)
    weight = images.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in rows:
        for left in columns:
            part = images[..., top:top + tile, left:left + tile]
            h, w = part.shape[-2:]
            share = (_fade(top, h, height, overlap)[:, None] * _fade(left, w, width, overlap)).to(images.device)
            for i in range(len(images)):  # one by one: the memory is that of a single tile
                found = model(part[i:i + 1].to(device)).float().to(images.device)
                total[i:i + 1, :, top:top + h, left:left + w] += found * share
            weight[..., top:top + h, left:left + w] += share
    return total / weight


def usual_overlap(tile):
    """-> the overlap of scripts that have no constant for it: 128, of small tiles as much as goes with their side."""
    return min(128, max(tile, 0) // 64 * 32)


def require_tiles(tile, overlap):
    """UserError unless TILE and OVERLAP go together; see `restore`."""
    if tile < 0 or tile % 32 or overlap < 0 or overlap % 32 or tile and 2 * overlap > tile:
        raise UserError(f"TILE = {tile}, OVERLAP = {overlap}: choose multiples of 32 with an overlap of at most half a "
                        "tile, such as 512 and 128, or TILE = 0 for whole images")


def _starts(side, tile, overlap):
    """-> first pixels of the tiles along a side, multiples of 32; the last tile may be smaller."""
    step = tile - overlap
    count = max(1, math.ceil((side - overlap) / step))
    return [i * step for i in range(count)]


def _fade(start, length, side, overlap):
    """-> (length,) weights of a tile along one side: 0 in the outer quarter of the overlap, a ramp over its middle
    half, then 1; where the tile ends with the image there is nothing to fade into."""
    position = torch.arange(length, dtype=torch.float32) + 0.5
    ramp = max(overlap / 2, 1e-6)
    weight = torch.ones(length)
    if start > 0:
        weight = weight * ((position - overlap / 4) / ramp).clamp(0, 1)
    if start + length < side:
        weight = weight * ((length - position - overlap / 4) / ramp).clamp(0, 1)
    return weight
