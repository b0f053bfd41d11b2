"""One-to-one assignment of queries and objects (Carion et al., "DETR", ECCV 2020), one transfer each way.

The Hungarian algorithm runs on the CPU. The costs of every decoder layer are therefore computed first and fetched
together, and the pairs of all layers are sent back together: a GPU is waited for once in a training step.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from utils.transfer import sent


class Objects(NamedTuple):
    """The objects of a whole batch, image after image."""

    counts: list            # objects of each image, B numbers
    image: torch.Tensor     # (N,) int64, index of each object's image in the batch
    classes: torch.Tensor   # (N,) int64
    boxes: torch.Tensor     # (N, 4) float32, normalised cxcywh

    def parts(self):
        """-> what costs are computed for at a time, Objects in order: on a CPU one image's, to stay in its cache."""
        if self.boxes.is_cuda or not len(self.boxes):
            return [self]
        columns = (part.split(self.counts) for part in (self.image, self.classes, self.boxes))
        return [Objects([len(boxes)], image, classes, boxes)
                for image, classes, boxes in zip(*columns, strict=True) if len(boxes)]


def objects_of(labels):
    """[{"class_labels": (n,) int64, "boxes": (n, 4) cxcywh}, ...], one per image -> Objects on the labels' device."""
    counts = [len(label["class_labels"]) for label in labels]
    boxes = torch.cat([label["boxes"] for label in labels]).float()
    image = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return Objects(counts, sent(image, boxes.device), torch.cat([label["class_labels"] for label in labels]), boxes)


class Matches(NamedTuple):
    """The matched pairs of a batch in S stages (decoder layers), image after image, int64; n of them in every stage."""

    image: torch.Tensor   # (n,), index of the image in the batch
    query: torch.Tensor   # (S, n), index of the query in its image
    target: torch.Tensor  # (S, n), index of the object in Objects

    def to(self, device):
        """-> the same on `device`, in one transfer."""
        image, query, target = sent(torch.cat([self.image[None], self.query, self.target]), device).split(
            [1, len(self.query), len(self.target)])
        return Matches(image[0], query, target)


def assign(costs, counts, groups=1):
    """Give every object of an image one query of every group, at the least total cost, in each stage.

    Args:
        costs: [(N, Q) finite, ...], one per stage: what it costs to give an object a query of its own image.
        counts: objects of each image; they add up to N.
        groups: Q is `groups` times the queries, group after group, and each group is matched by itself.
    Returns:
        Matches on the CPU: groups * min(count, Q / groups) pairs an image, group by group and within a group by rising
        query index. With more objects than queries some are left over.
    """
    costs = torch.stack(costs).cpu().numpy()  # (S, N, Q)
    group = costs.shape[2] // groups
    ends = [0, *np.cumsum(counts)]
    queries, targets = [], []
    for stage in costs:
        for first, last in pairwise(ends):
            for g in range(groups):
                query, target = linear_sum_assignment(stage[first:last, g * group:(g + 1) * group].T)
                queries.append(query + g * group)
                targets.append(target + first)
    image = np.repeat(np.arange(len(counts)), [groups * min(count, group) for count in counts])
    shape = len(costs), len(image)
    return Matches(torch.from_numpy(image), torch.from_numpy(np.concatenate(queries).reshape(shape)),
                   torch.from_numpy(np.concatenate(targets).reshape(shape)))
