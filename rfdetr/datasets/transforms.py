"""The augmentation of RF-DETR's training, as named presets (torchvision v2: boxes and masks follow the image).

RF-DETR (Robinson et al., arXiv 2511.09554) trains with mirror images and random resizing and cropping, and with no
strong colour changes: those wear off on a pretrained ViT. Every preset maps a dict {"image": tv_tensors.Image (3, H, W)
uint8, "boxes": tv_tensors.BoundingBoxes (N, 4) XYXY pixels, "labels": (N,) int64, optionally "masks": tv_tensors.Mask
(N, H, W) bool} to one of the same form. No preset stretches to the network's size: the collate function does, because
multi-scale training chooses the size per batch.
"""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


def training():
    """Colour, crop, mirror. The random crop, stretched afterwards, is the random resizing too."""
    return v2.Compose([
        v2.RandomApply([v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03)], p=0.5),
        RandomSizeCrop(p=0.5, smallest=0.5),
        v2.RandomHorizontalFlip(0.5),
    ])


def mirror():
    """Only the mirror image: enough for short runs on plenty of data."""
    return v2.RandomHorizontalFlip(0.5)


def evaluation():
    """Nothing: the stretch to the network's size happens in the collate function."""
    return v2.Identity()


AUGMENTATIONS = {"full": training, "mirror": mirror}


class RandomSizeCrop:
    """With probability `p` cut a window whose sides are uniform in [smallest, 1] of the image's, each for itself.

    Objects of which no box (one pixel wide and high) or no mask pixel is left are dropped; other boxes are clipped.
    """

    def __init__(self, p, smallest):
        self.p, self.smallest = p, smallest

    def __call__(self, sample):
        if torch.rand(()) >= self.p:
            return sample
        sides = torch.tensor(sample["image"].shape[-2:])
        window = (sides * (self.smallest + (1 - self.smallest) * torch.rand(2))).round().long().clamp(min=1)
        corner = (torch.rand(2) * (sides - window + 1)).long().clamp(max=sides - window)
        (top, left), (height, width) = corner.tolist(), window.tolist()
        return drop_vanished({name: F.crop(value, top, left, height, width)
                              if isinstance(value, tv_tensors.TVTensor) else value for name, value in sample.items()})


def drop_vanished(sample):
    """-> the sample without objects whose box is thinner than a pixel or whose mask has no pixel."""
    boxes = sample["boxes"].as_subclass(torch.Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    if "masks" in sample:
        kept &= sample["masks"].as_subclass(torch.Tensor).flatten(1).any(1)
    if kept.all():
        return sample
    found = {name: tv_tensors.wrap(sample[name][kept], like=sample[name]) for name in ("boxes", "masks")
             if name in sample}
    return sample | found | {"labels": sample["labels"][kept]}


def stretched_image(image, size):
    """(3, H, W) uint8 -> (3, *size) uint8, bilinear with antialiasing."""
    return F.resize(image, list(size), interpolation=F.InterpolationMode.BILINEAR, antialias=True)
