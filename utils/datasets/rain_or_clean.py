"""Images for the rain detector: clean, rainy from disk, and rainy rendered anew in every epoch.

A detector trained on one generator's streaks learns the generator: elsewhere such a network reached 99.6% on its own
rain and 15% recall on real rain, mist and snow. Hence the many kinds of weather, and `break_shortcuts`, which gives
both classes the same JPEG artefacts, resize kernels, blur, noise and brightness, so that none of them tells.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from utils.config import UserError
from utils.datasets.samples import digest, epoch_and_index, read_image, sample_randomness
from utils.weather import kinds, rain

RENDER_SIDE = 384  # short side at which weather is rendered: streaks keep about the width they have at 640
_KERNELS = (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)


def in_validation(path, share):
    """Whether an image belongs to the validation part: a function of its file name without extension alone, so that a
    clean image and its rainy twin never end up on different sides."""
    return int.from_bytes(digest(Path(path).stem), "big") / 2**64 < share


def break_shortcuts(side):
    """The augmentation of training, the same for both classes: (3, H, W) uint8 of any size -> (3, side, side)."""
    return v2.Compose([
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.2, saturation=0.4, hue=0.03)], p=0.8),
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.6))], p=0.3),
        RandomKernelResize(side),
        v2.RandomApply([Noise(8.0)], p=0.3),
        v2.RandomApply([Jpeg(35, 95)], p=0.7),
    ])


class RandomKernelResize:
    """Resize to `side` x `side` with a random kernel, half the time by way of a random other size."""

    def __init__(self, side):
        self.side = side

    def __call__(self, image):
        if torch.rand(()) < 0.5:
            size = int(torch.randint(self.side * 3 // 4, self.side * 2, ()))
            image = self._resize(image, size)
        return self._resize(image, self.side)

    def _resize(self, image, size):
        kernel = _KERNELS[int(torch.randint(len(_KERNELS), ()))]
        return v2.functional.resize(image, [size, size], interpolation=kernel, antialias=bool(torch.rand(()) < 0.8))


class Noise:
    """Gaussian noise of up to `most` grey levels on a uint8 image."""

    def __init__(self, most):
        self.most = most

    def __call__(self, image):
        sigma = self.most * torch.rand(())
        noisy = image.float() + sigma * torch.randn(image.shape)
        return tv_tensors.Image(noisy.round_().clamp_(0, 255).to(torch.uint8))


class Jpeg:
    """Compress a uint8 image at a random quality and read it again (torchvision's own JPEG transform is deprecated)."""

    def __init__(self, lowest, highest):
        self.lowest, self.highest = lowest, highest

    def __call__(self, image):
        quality = int(torch.randint(self.lowest, self.highest + 1, ()))
        buffer = io.BytesIO()
        v2.functional.to_pil_image(image).save(buffer, "JPEG", quality=quality)
        return tv_tensors.Image(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))


class RainClassificationDataset(torch.utils.data.Dataset):
    """As many rainy as clean samples, in the form of the other data sets (their "domain" is the class).

    Index i < N is clean image i, index N + i is a rainy one: with `rendered_share` clean image i in rendered weather,
    else a random file of `rainy`. Image: (3, side, side) uint8. Keys are `index` or `(epoch, index)`.

    Args:
        clean, rainy: paths; rainy may be empty, then all rain is rendered.
        rendered_share: share of the rainy samples that are rendered; shares: {kind of kinds.KINDS: share} of these.
        augment: True for training (random crop, `break_shortcuts`), False for the image as the network will see it.
        seed: of everything random.
        side: of the square images, in pixels: what the rain detector sees.
    """

    def __init__(self, clean, rainy, rendered_share, shares, augment, seed, side):
        if not clean:
            raise UserError("CLEAN_DIRS has too few images for training and validation")
        if not 0 <= rendered_share <= 1:
            raise UserError(f"RENDERED_SHARE = {rendered_share}: choose a share in [0, 1]")
        if not rainy and rendered_share == 0:
            raise UserError("RENDERED_SHARE is 0 and RAINY_DIRS has no image for training or for validation: there is "
                            "no rain to learn")
        self.clean, self.rainy, self.seed, self.side = list(clean), list(rainy), seed, side
        self.rendered_share, self.shares = rendered_share if rainy else 1.0, shares
        self.augmentation = break_shortcuts(side) if augment else None

    def __len__(self):
        return 2 * len(self.clean)

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return [*self.clean, *self.rainy]

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        wet, index = divmod(index, len(self.clean))
        with sample_randomness(self.seed, epoch, f"{index}:{wet}"):
            render = bool(wet) and bool(torch.rand(()) < self.rendered_share)
            path = self.rainy[int(torch.randint(len(self.rainy), ()))] if wet and not render else self.clean[index]
            image = read_image(path)
            size = tuple(image.shape[-2:])
            if self.augmentation:
                image = _random_crop(image)
            image = _limit(image)
            if render:
                pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
                rng = rain.rng_for(self.seed, f"{epoch}:{path.name}")
                image = torch.from_numpy(kinds.draw(pixels, rng, self.shares)).permute(2, 0, 1)
            image = tv_tensors.Image(image)
            image = self.augmentation(image) if self.augmentation else _stretched(image, self.side)
        return {"image": image, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
                "image_id": index, "size": size, "domain": "rainy" if wet else "clean", "path": path.as_posix()}


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images as the network will see them, (3, side, side) uint8, of one known domain."""

    def __init__(self, paths, domain, side):
        self.paths, self.domain, self.side = list(paths), domain, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        size = tuple(image.shape[-2:])
        return {"image": tv_tensors.Image(_stretched(image, self.side)), "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64), "image_id": index, "size": size, "domain": self.domain,
                "path": self.paths[index].as_posix()}


def _stretched(image, side):
    """(3, H, W) -> (3, side, side)."""
    return v2.functional.resize(image, [side, side])


def _random_crop(image):
    """A crop of at least half of each side: (3, H, W) -> (3, h, w)."""
    height, width = image.shape[-2:]
    h, w = (max(1, round(side * (0.5 + 0.5 * torch.rand(()).item()))) for side in (height, width))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    return image[:, top:top + h, left:left + w]


def _limit(image):
    """Shrink so that the short side is at most RENDER_SIDE: rendering is the slowest step."""
    short = min(image.shape[-2:])
    if short <= RENDER_SIDE:
        return image
    size = [max(1, round(side * RENDER_SIDE / short)) for side in image.shape[-2:]]
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).copy()).permute(2, 0, 1)
