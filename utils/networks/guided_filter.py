"""The guided filter of an image by itself: He, Sun, Tang, "Guided Image Filtering", ECCV 2010.

DDN and DerainNet split an image with it into a smooth base and the detail that holds the rain.
"""

import torch
import torch.nn.functional as F

RADIUS, EPS = 15, 1.0  # of both networks; with eps 1 for values in [0, 1] nearly a box mean of the box mean


def base_layer(images, radius=RADIUS, eps=EPS, subsampling=1):
    """-> the smooth part of images (B, 3, H, W) in [0, 1], each colour by itself: (B, 3, H, W) float32.

    Runs in float32 also under autocast: running sums in half precision lose everything.

    Args:
        subsampling: 4 takes the statistics from every fourth pixel of every fourth row, with a radius of a fourth (He &
            Sun, "Fast Guided Filter", arXiv 1505.00996).
    """
    with torch.autocast(images.device.type, enabled=False):
        x = images.float()
        small, radius = _subsampled(x, subsampling), radius // subsampling
        mean = box_mean(small, radius)
        variance = box_mean(small * small, radius) - mean * mean
        slope = variance / (variance + eps)
        slope, offset = box_mean(slope, radius), box_mean(mean - slope * mean, radius)
        if subsampling > 1:
            slope, offset = (F.interpolate(one, x.shape[-2:], mode="bilinear", align_corners=False)
                             for one in (slope, offset))
        return slope * x + offset


def _subsampled(x, step):
    """-> (B, C, ceil(H / step), ceil(W / step)): of every square of step x step pixels the one in its middle."""
    for dim in (-2, -1) if step > 1 else ():
        at = torch.arange(step // 2, x.shape[dim] + step // 2, step, device=x.device)
        x = x.index_select(dim, at[:-(-x.shape[dim] // step)].clamp(max=x.shape[dim] - 1))
    return x


def box_mean(x, radius):
    """Means over (2 radius + 1)^2 pixels, at the border over those that there are: (B, C, H, W) -> the same."""
    for dim in (-1, -2):
        x = _along(x, radius, dim)
    return x


def _along(x, radius, dim):
    """`box_mean` along one side, from differences of the running sum."""
    size = x.shape[dim]
    # sums of what is left of the mean: float32 would lose digits in sums of thousands of values
    middle = x.mean(dim, keepdim=True)
    total = torch.cat([torch.zeros_like(middle), torch.cumsum(x - middle, dim)], dim)  # size + 1
    at = torch.arange(size, device=x.device)
    last, first = (at + radius + 1).clamp(max=size), (at - radius).clamp(min=0)
    count = (last - first).to(x.dtype).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    return (total.index_select(dim, last) - total.index_select(dim, first)) / count + middle
