"""Batches of one size each: the sizes that multi-scale training draws from, and how samples come together."""

import hashlib
import json

from rfdetr.datasets.mask_codes import stretched_masks
from rfdetr.datasets.transforms import stretched_image
from utils import datasets


def multi_scale_sizes(resolution, block, expanded, min_tokens, patch):
    """-> the sizes of multi-scale training, smallest first: `resolution` plus -3 to 4 (expanded: -5 to 5) blocks.

    Args:
        block: step that the backbone's windows need; min_tokens: as many queries as the encoder must be able to
            propose, one per token, so a size has at least so many patches of `patch` pixels.
    """
    steps = range(-5, 6) if expanded else range(-3, 5)
    return tuple(size for size in (resolution + step * block for step in steps)
                 if size > 0 and (size // patch) ** 2 >= min_tokens)


class Collate:
    """Samples of RoboflowDataset -> one batch of square images, as utils.datasets.collate plus labels[i]["masks"]
    (N, S, S) bool where the samples have masks.

    S is `resolution`, or one of `scales`, drawn by a hash of `seed` and the keys in the batch: the same in a resumed
    run, whatever the number of workers.
    """

    def __init__(self, resolution, scales=(), seed=0):
        self.resolution, self.scales, self.seed = resolution, tuple(scales), seed

    def size_of(self, keys):
        """-> S of the batch with these keys [(epoch, index), ...]."""
        if not self.scales:
            return self.resolution
        text = json.dumps([self.seed, [list(key) for key in keys]])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self.scales[int.from_bytes(digest, "big") % len(self.scales)]

    def __call__(self, samples):
        return self._batch(samples, self.size_of([sample["key"] for sample in samples]))

    def at_largest(self, samples):
        """-> the batch at the largest size that batches get."""
        return self._batch(samples, max(self.scales, default=self.resolution))

    def _batch(self, samples, side):
        size = (side, side)
        batch = datasets.collate([sample | {"image": stretched_image(sample["image"], size)} for sample in samples])
        for label, sample in zip(batch["labels"], samples, strict=True):
            if "masks" in sample:
                label["masks"] = stretched_masks(sample["masks"], size)
        return batch
