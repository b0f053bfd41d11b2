"""The transforms of training and of evaluation, as named presets (torchvision v2: boxes and twins follow the image).

Every preset maps a dict {"image": tv_tensors.Image (3, H, W) uint8, optionally "twin": the same, "boxes":
tv_tensors.BoundingBoxes (N, 4) XYXY pixels, "labels": (N,) int64} to one of the same form. Image and twin pass in one
call, so that both get the same geometry.
"""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2


def evaluation(size):
    """Stretch to (size, size), as RT-DETR's own image processor does; nothing random."""
    return v2.Resize((size, size), antialias=True)


class Scaled:
    """See `scaled`."""

    def __init__(self, scale, limit=None):
        self.scale, self.limit = scale, limit

    def __call__(self, sample):
        if self.scale != 1:
            size = [max(1, round(side * self.scale)) for side in sample["image"].shape[-2:]]
            sample = v2.Resize(size, antialias=True)(sample)
        if self.limit:
            size = [min(side, self.limit) for side in sample["image"].shape[-2:]]
            sample = v2.CenterCrop(size)(sample)
        return sample


def scaled(scale, limit=None):
    """Shrink to `scale` of the size, as DERAIN_SCALE does in front of SPDNet; 1.0 leaves the image as it is. Of what is
    then larger than `limit` pixels a side, the middle."""
    return Scaled(scale, limit)


def adaptation(size):
    """Stretch and mirror: rain is drawn into the pixels already, and crops would change its scale."""
    return v2.Compose([v2.Resize((size, size), antialias=True), v2.RandomHorizontalFlip(0.5)])


def detection(size):
    """RT-DETR's training augmentation (Zhao et al. 2024): colour, zoom out, IoU crop, mirror, then stretch."""
    return v2.Compose([
        # on Pillow images: twice as fast in HSV as on tensors, equal to a few levels of 255
        v2.ToPILImage(), v2.RandomPhotometricDistort(p=0.5), v2.ToImage(),
        # uint8 mean of ImageNet; one number per plane is what v2 accepts for uint8 images
        v2.RandomZoomOut(fill={tv_tensors.Image: (124, 116, 104), "others": 0}, side_range=(1.0, 2.0), p=0.3),
        v2.RandomApply([v2.RandomIoUCrop(min_scale=0.4)], p=0.6),
        v2.SanitizeBoundingBoxes(min_size=1),  # finds the key "labels" itself
        v2.RandomHorizontalFlip(0.5),
        v2.Resize((size, size), antialias=True),
    ])


class PairedPatch:
    """A random `size` x `size` patch of image and twin, mirrored and turned (the de-raining literature's recipe).

    An image that is smaller than the patch is reflected at its borders, as often as needed.
    """

    def __init__(self, size):
        self.size = size

    def __call__(self, sample):
        height, width = sample["image"].shape[-2:]
        top, left, turns, mirror = (_draw(n) for n in (height - self.size + 1, width - self.size + 1, 2, 2))
        result = dict(sample)
        for key in ("image", "twin"):
            patch = _square(sample[key], top, left, self.size)
            patch = patch.flip(-1) if mirror else patch
            result[key] = tv_tensors.Image(patch.transpose(-1, -2) if turns else patch)
        return result


class Crop:
    """See `crops`."""

    def __init__(self, size, zoom=1.0):
        self.size, self.zoom = size, zoom

    def __call__(self, sample):
        side = self.size
        if self.zoom > 1:  # all magnifications between 1 and `zoom` alike, on a logarithmic scale
            side = max(1, round(side / self.zoom ** torch.rand(()).item()))
        top, left = (_draw(length - side + 1) for length in sample["image"].shape[-2:])
        images = {key: _square(sample[key], top, left, side) for key in ("image", "twin")}
        if side < self.size:
            images = {key: v2.functional.resize(image, [self.size, self.size]) for key, image in images.items()}
        return sample | {key: tv_tensors.Image(image) for key, image in images.items()}


def _square(image, top, left, size):
    """-> (3, size, size) from (top, left) on; a smaller image is reflected at its border as often as needed."""
    patch = image[..., top:top + size, left:left + size]
    if min(patch.shape[-2:]) < size:
        rows, columns = (_reflected(side, size) for side in patch.shape[-2:])
        patch = patch[..., rows, :][..., columns]
    return patch


def _draw(number):
    """-> a random integer in [0, number), 0 where there is no choice."""
    return int(torch.randint(number, ())) if number > 1 else 0


def _reflected(side, size):
    """-> `size` indices into an axis of `side` pixels: 0 1 2 2 1 0 0 1 ..."""
    there_and_back = torch.arange(size) % (2 * side)
    return torch.minimum(there_and_back, 2 * side - 1 - there_and_back)


def paired_patches(size, scale=1.0):
    """Training patches of rainy/clean pairs, cut from images that were `scaled` before; see PairedPatch."""
    return v2.Compose([Scaled(scale), PairedPatch(size)])


def crops(size, flip=0.5, jitter=0.0, zoom=1.0):
    """Random `size` x `size` squares at the images' own scale, or enlarged by up to `zoom`; reflected at the border
    where the image is smaller; one geometry and one colour change for image and twin, see `unet_training`."""
    colour = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    return v2.Compose([Crop(size, zoom), v2.RandomHorizontalFlip(flip), *colour])


class KeepTone:
    """The clean twin in the rainy image's tone: each colour moved by the straight line that brings it nearest to the
    rainy one (least squares over the whole image). What is left to learn are drops and streaks, not veil and contrast.
    """

    def __call__(self, sample):
        rainy, clean = (sample[key].float().flatten(1) for key in ("image", "twin"))  # (3, H * W)
        centre, mean = (values.mean(1, keepdim=True) for values in (clean, rainy))
        spread = (clean - centre).square().mean(1, keepdim=True)
        slope = ((clean - centre) * (rainy - mean)).mean(1, keepdim=True) / spread.clamp(min=1e-3)
        twin = (slope * (clean - centre) + mean).round().clamp(0, 255).to(torch.uint8)
        return sample | {"twin": tv_tensors.Image(twin.reshape(sample["twin"].shape))}


def keep_tone(preset):
    """A preset of pairs, after `KeepTone`."""
    return v2.Compose([KeepTone(), preset])


class NoObjects:
    """Gives a pair the empty boxes and labels of an image without objects."""

    def __call__(self, sample):
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=sample["image"].shape[-2:])
        return sample | {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.int64)}


def without_objects(preset):
    """A preset of detection data, for pairs, which have no boxes: they pass as images without objects."""
    return v2.Compose([NoObjects(), preset])


class OverEpochs:
    """See `over_epochs`."""

    def __init__(self, transforms, epochs):
        self.transforms, self.epochs = list(transforms), epochs

    def at(self, epoch):
        """-> the transform of an epoch, counted from 0."""
        return self.transforms[min(epoch * len(self.transforms) // self.epochs, len(self.transforms) - 1)]


def over_epochs(transforms, epochs):
    """Transforms that share the epochs of a run out, equal parts in this order; what PairedRainDataset takes as one."""
    return OverEpochs(transforms, epochs)


def unet_training(size, random_crop=False, flip=0.5, jitter=0.1):
    """The U-Net's training pairs, (size, size): one geometry and one colour change for image and twin.

    Args:
        random_crop: False stretches the whole image; True scales its short side to 9/8 of `size` and cuts a random
            square, which keeps the aspect ratio.
        flip: probability of mirroring; jitter: strength of v2.ColorJitter on brightness, contrast and saturation.
    """
    fit = ([v2.Resize(size * 9 // 8, antialias=True), v2.RandomCrop(size)] if random_crop
           else [v2.Resize((size, size), antialias=True)])
    colour = [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
    return v2.Compose([*fit, v2.RandomHorizontalFlip(flip), *colour])


def unet_evaluation(size, random_crop=False):
    """The same size without chance: stretched, or the middle of the image where training cuts a random part."""
    if random_crop:
        return v2.Compose([v2.Resize(size * 9 // 8, antialias=True), v2.CenterCrop(size)])
    return evaluation(size)
