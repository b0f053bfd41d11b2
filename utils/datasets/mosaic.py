"""Four training images as the quarters of one: four times as many objects per step, for the price of one image.

Bochkovskiy et al., "YOLOv4", 2020; for detectors of the DETR family, whose one-to-one matching learns from few queries
per image, Huang et al., "DEIM: DETR with Improved Matching for Fast Convergence", CVPR 2025.
"""

import torch
from torchvision.transforms.v2 import functional as F

from utils import processes
from utils.config import UserError
from utils.datasets.samples import epoch_and_index, sample_randomness


class Mosaic(torch.utils.data.Dataset):
    """Samples of a data set, a share of them replaced by mosaics of themselves and three others; keys as there.

    A mosaic is a function of (seed, epoch, index) and carries the image_id, size, domain and path of its first image.

    Args:
        data: CocoDetectionDataset or Mixture, whose transform makes squares of one size, a multiple of 2.
        share: probability of a mosaic, in [0, 1].
        epochs: how many of the first epochs have them; the rest sees whole images, as at inference.
        seed: decides which samples are mosaics, and of what.
    """

    fullest_epoch = 0  # the last epochs have no mosaics, and so fewer objects; see training/needs.py

    def __init__(self, data, share, epochs, seed):
        self.data, self.share, self.epochs, self.seed = data, share, epochs, seed
        self.notes = data.notes

    def __len__(self):
        return len(self.data)

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return self.data.image_paths()

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        with sample_randomness(f"mosaic {self.seed}", epoch, index):
            alone = epoch >= self.epochs or torch.rand(()).item() >= self.share
            others = torch.randint(len(self.data), (3,)).tolist()
        if alone:
            return self.data[epoch, index]
        return joined([self.data[epoch, i] for i in (index, *others)])


def joined(samples):
    """Four samples of CocoDetectionDataset -> one of the same size: top left, top right, bottom left, bottom right."""
    result = dict(samples[0])
    for name in ("image", "twin"):
        if name in result:
            result[name] = _quarters([sample[name] for sample in samples])
    corners = [(column / 2, row / 2, 0.0, 0.0) for row in (0, 1) for column in (0, 1)]
    result["boxes"] = torch.cat([sample["boxes"] / 2 + sample["boxes"].new_tensor(corner)
                                 for sample, corner in zip(samples, corners, strict=True)])
    result["labels"] = torch.cat([sample["labels"] for sample in samples])
    return result


def _quarters(images):
    half = [F.resize(image, [side // 2 for side in image.shape[-2:]], antialias=True) for image in images]
    return torch.cat([torch.cat(half[:2], -1), torch.cat(half[2:], -1)], -2)


def with_mosaics(data, cfg):
    """-> the training data of a script's constants MOSAIC_RATIO, CLOSE_MOSAIC, NUM_EPOCHS and SEED.

    Raises:
        UserError: a share outside [0, 1], a negative number of epochs.
    """
    if not 0 <= cfg.MOSAIC_RATIO <= 1:
        raise UserError(f"MOSAIC_RATIO = {cfg.MOSAIC_RATIO}: choose a share between 0 and 1")
    if not isinstance(cfg.CLOSE_MOSAIC, int) or cfg.CLOSE_MOSAIC < 0:
        raise UserError(f"CLOSE_MOSAIC = {cfg.CLOSE_MOSAIC}: choose a whole number of epochs, 0 or more")
    if not cfg.MOSAIC_RATIO:
        return data
    if cfg.CLOSE_MOSAIC >= cfg.NUM_EPOCHS:
        processes.say(f"note: MOSAIC_RATIO = {cfg.MOSAIC_RATIO} has no effect: the last CLOSE_MOSAIC = "
                      f"{cfg.CLOSE_MOSAIC} of NUM_EPOCHS = {cfg.NUM_EPOCHS} epochs are without mosaics")
    return Mosaic(data, cfg.MOSAIC_RATIO, cfg.NUM_EPOCHS - cfg.CLOSE_MOSAIC, cfg.SEED)
