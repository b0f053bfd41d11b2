"""Data sets in the layout that Roboflow exports, checked when they are opened: boxes, and masks where they are wanted.

    dataset/train/_annotations.coco.json, dataset/train/*.jpg     the same for valid/ and, perhaps, test/

The other layouts of utils/datasets/layouts.py are read as well.
Masks may be polygons, compressed or uncompressed RLE; in memory they are compressed RLE, about a hundred bytes each. A
sample is a function of (seed, epoch, index) alone, the size of a batch of (seed, keys in the batch) alone.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from rfdetr.datasets import transforms
from utils import datasets, processes, system
from utils.boxes import normalised_boxes
from utils.config import UserError
from utils.datasets import image_check
from utils.datasets.annotations import (
    image_by_image,
    notes_on_images,
    read_annotations,
    require_own_ids,
    usable_boxes,
)
from utils.datasets.layouts import ADVICE, find_split, has_split

SPLITS = ("train", "valid", "test")
NO_MASKS = "No segmentation masks found in COCO annotations"
ELSEWHERE = "mask(s) do not fit their box: they share less than half of their extent with it (are x and y swapped?)"


# ---- annotation files ----------------------------------------------------------------------------------------------

def split_of(root, split, flag="--dataset_dir"):
    """-> layouts.Split; UserError that says what is missing and how to get a data set."""
    return find_split(root, split, flag, ADVICE["masks"], usual="roboflow")


def read_split(root, split, flag="--dataset_dir"):
    """-> (layouts.Split, its content as COCO's; the categories of `_namesakes` are "namesakes" in it, not categories);
    UserError where anything that training relies on is not there."""
    found = split_of(root, split, flag)
    content = read_annotations(found)
    content["namesakes"] = _namesakes(content)
    content["categories"] = [c for c in content["categories"] if c["id"] not in content["namesakes"]]
    if problem := _problem(content):
        raise UserError(f"{found}: {problem}")
    require_own_ids(content, "annotations", str(found))
    return found, content


def _namesakes(content):
    """-> {category id: name} of Roboflow's parent category where it is called as one of the classes, and unused."""
    names = [category["name"] for category in content["categories"]]
    used = {note["category_id"] for note in content["annotations"]}
    return {c["id"]: c["name"] for c in content["categories"] if c.get("supercategory") == "none"
            and c["id"] not in used and names.count(c["name"]) == 2 and any(
                other.get("supercategory") == c["name"] == other["name"] for other in content["categories"])}


def _problem(content):
    """-> what is wrong with a file that has all its keys, or None."""
    for part in ("images", "categories"):
        ids = [entry["id"] for entry in content[part]]
        if unusable := [value for value in ids if not _usable_id(value)]:
            return f"'{part}' has the id {str(unusable[0])[:60]!r}; ids are whole numbers, or short words"
        if len({type(value) for value in ids}) > 1:
            return f"the ids of '{part}' are partly numbers, partly words"
    names = [category["name"] for category in content["categories"]]
    if len(set(names)) < len(names):
        return f"two categories are called {next(n for n in names if names.count(n) > 1)!r}; merge or rename them"
    for image in content["images"]:
        if not all(isinstance(image[side], int) for side in ("width", "height")):
            return f"image {image['id']} ({image['file_name']}) has no whole width and height"
    return None


def _usable_id(value):
    """Words become names of files (rfdetr.features), so they have no characters that a file name cannot have."""
    return type(value) is int or (isinstance(value, str) and re.fullmatch(r"[\w. -]{1,100}", value) is not None)


def class_names_of(root, flag="--dataset_dir"):
    """The classes to train, from train/ and valid/. test/ has no say: it is optional and read with --run_test alone.

    Returns:
        (names in the order of their category ids, notes to print). Roboflow's parent category (supercategory "none",
        id 0 or the others' supercategory) is left out where no annotation of the two uses it.
    Raises:
        UserError: no data set, no classes.
    """
    contents = {split: read_split(root, split, flag)[1] for split in ("train", "valid")
                if split == "train" or has_split(root, "val")}
    used = {names[note["category_id"]] for content in contents.values()
            for names in [{c["id"]: c["name"] for c in content["categories"]}] for note in content["annotations"]}
    categories = sorted(contents["train"]["categories"], key=lambda category: category["id"])
    parents = {category.get("supercategory") for category in categories}
    dummies = [c["name"] for c in categories if c["name"] not in used and c.get("supercategory") == "none"
               and (c["id"] == 0 or c["name"] in parents)]
    names = [c["name"] for c in categories if c["name"] not in dummies]
    if not names:
        raise UserError(f"{flag} {Path(root).as_posix()}: its training annotations list no classes")
    return names, [f"{what} is Roboflow's parent category without annotations: left out" for what in (
        *(f"class {name!r}" for name in dummies),
        *(f"category {number}, called {name!r} as a class is," for number, name in
          contents["train"]["namesakes"].items()))]


# ---- masks ---------------------------------------------------------------------------------------------------------

def mask_code(segmentation, height, width):
    """-> an annotation's mask as compressed RLE counts (bytes), None where it has none or one without pixels.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], {"size", "counts": str or list of int}, or nothing.
    Raises:
        ValueError: that cannot be a mask of a (height, width) image; the text says why.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return _rle_code(segmentation, height, width)
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation):
        raise ValueError("it is neither a list of polygons nor RLE")
    return _polygons_code(segmentation, height, width)


def _rle_code(segmentation, height, width):
    """`mask_code` of {"size", "counts"}, compressed (str) or not (list)."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != [height, width] or not all(type(side) is int for side in size):
        raise ValueError(f"its RLE has the size {size}, the image is {height} high and {width} wide")
    if isinstance(counts, list):
        if not all(type(n) is int and 0 <= n <= height * width for n in counts):
            raise ValueError(f"its RLE counts are not whole numbers from 0 to the image's {height * width} pixels")
        runs = np.array(counts, np.int64)
    elif isinstance(counts, str):
        runs = _runs(counts)
    else:
        raise ValueError("its RLE has no counts")
    if runs.sum() != height * width or (runs < 0).any():  # pycocotools would write beyond the image
        raise ValueError(f"its RLE covers {int(runs.sum())} pixels, the image has {height * width}")
    if not runs[1::2].sum():
        return None
    return counts.encode() if isinstance(counts, str) else rle.frPyObjects(segmentation, height, width)["counts"]


def _polygons_code(segmentation, height, width):
    """`mask_code` of [[x, y, x, y, ...], ...]."""
    far = 10 * max(height, width)  # pycocotools walks along every edge, pixel by pixel
    if any(isinstance(value, (list, dict)) for part in segmentation for value in part):
        raise ValueError("its polygon is a list of points [[x, y], ...]; COCO has plain numbers, [x, y, x, y, ...]")
    polygons = [part for part in segmentation if len(part) >= 6]  # two points are no area
    for part in polygons:
        if len(part) % 2 or not all(isinstance(v, (int, float)) and -far <= v <= far for v in part):
            raise ValueError("its polygon is not a list of x, y in the image")
    if not polygons:
        return None
    merged = rle.merge(rle.frPyObjects(polygons, height, width))
    return merged["counts"] if rle.area(merged) else None


def _runs(counts):
    """COCO's string of compressed counts -> run lengths (n,) int64, checked; pycocotools itself trusts it.

    A character holds five bits of a number, lowest first, and whether more follow; from the fourth on, numbers are
    differences from the one before the last.
    """
    try:
        digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("its RLE string holds characters that no RLE has") from None
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("its RLE string is cut off or holds characters that no RLE has")
    last = (digits & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(digits.size) - np.repeat(starts, np.diff(np.append(starts, digits.size)))
    if place.max() > 6:
        raise ValueError("its RLE string holds a number that no image has")
    numbers = np.add.reduceat((digits & 31) << (5 * place), starts)
    numbers -= np.where(digits[last] & 16, 1 << (5 * (place[last] + 1)), 0)  # the sign bit
    numbers[1::2], numbers[2::2] = numbers[1::2].cumsum(), numbers[2::2].cumsum()
    return numbers


def masks_elsewhere(codes, images, corners):
    """-> how many of n masks do not fit their boxes: the extent of the mask and the box share less than half of what
    they cover together.

    Args:
        codes: of `mask_code`; images: entries of the annotation file; corners: (n, 4) xyxy pixels.
    """
    if not len(codes):
        return 0
    found = rle.toBbox([{"size": [image["height"], image["width"]], "counts": code}
                        for code, image in zip(codes, images, strict=True)]).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    sides = np.minimum(found[:, 2:], corners[:, 2:]) - np.maximum(found[:, :2], corners[:, :2])
    shared = sides.clip(min=0).prod(1)
    together = sum((one[:, 2:] - one[:, :2]).prod(1) for one in (found, corners)) - shared
    return int((shared < 0.5 * together).sum())


def note_on_shared_images(train, other, split):
    """-> a line about image files of another split whose content is in the training split as well, or None.

    Args:
        train, other: RoboflowDatasets; split: the other's name.
    """
    paths = [[data.folder / name for name in data.files] for data in (other, train)]
    shared = [path.name for path in image_check.same_content(*paths)]
    if not shared:
        return None
    return (f"{len(shared)} of {len(other.files)} images of {split}/ are in train/ as well "
            f"({system.listed(shared, 3)}): scores on {split}/ say little")


def stretched_masks(masks, size):
    """(N, H, W) bool -> (N, *size) bool, nearest pixel; a mask that would vanish keeps every pixel it touches."""
    if not len(masks) or tuple(masks.shape[-2:]) == tuple(size):
        return masks.new_zeros(len(masks), *size) if not len(masks) else masks
    masks = masks.as_subclass(torch.Tensor)
    result = torch.nn.functional.interpolate(masks[None].byte(), size, mode="nearest-exact")[0].bool()
    lost = ~result.flatten(1).any(1) & masks.flatten(1).any(1)
    if lost.any():
        result[lost] = torch.nn.functional.adaptive_max_pool2d(masks[lost].float(), size) > 0
    return result


# ---- the data set --------------------------------------------------------------------------------------------------

class RoboflowDataset(torch.utils.data.Dataset):
    """Images, boxes and perhaps masks of one split.

    Keys are `index` or `(epoch, index)`. A sample is {"image": (3, H, W) uint8 after augmentation, "boxes": (N, 4)
    float32 normalised cxcywh, "labels": (N,) int64 rows of the class head, "masks": (N, H, W) bool where they are
    wanted, "image_id": int, "size": original (H, W), "domain": "clean", "path": str, "key": (epoch, index)}. Images
    without objects are samples with N = 0; crowd regions are not trained on.

    Images of more than (2 * resolution)^2 pixels are made smaller first, masks one at a time, so that a hundred masks
    of a large photograph fit into memory: to about that many pixels for training, to the network's own
    (resolution, resolution) otherwise, which is what Collate would have made of them.

    Args:
        root, split: see the top of this file; flag: what the script calls `root`, for error messages.
        class_rows: {class name: row of the class head}; categories that are not in it may have no annotations.
        resolution: side of the network's square input.
        train: augment and refuse a split without objects; augmentation: a key of transforms.AUGMENTATIONS.
        masks: every object needs a mask; those without are left out and counted.
        seed: of the augmentation; check: decode every image once.
    Attributes:
        annotations (layouts.Split), folder (Path), files (names in it), image_ids, category_of {row: category id},
        class_names, notes (lines to print), sample_with_masks (how many of the first annotations have a mask, how many
        were looked at: at most 10).
    Raises:
        UserError: missing files, broken JSON, images or masks, unknown classes, no masks at all.
    """

    def __init__(self, root, split, class_rows, resolution, *, train, masks=False, seed=0, flag="--dataset_dir",
                 augmentation="full", check=True):
        self.annotations, content = read_split(root, split, flag)
        self.folder, self.resolution, self.seed, self.train = self.annotations.folder, resolution, seed, train
        if augmentation not in transforms.AUGMENTATIONS:
            raise UserError(f"--augmentation {augmentation}: choose {' or '.join(transforms.AUGMENTATIONS)}")
        self.transform = transforms.AUGMENTATIONS[augmentation]() if train else transforms.evaluation()
        self.class_names = list(class_rows)
        row_of = {c["id"]: class_rows[c["name"]] for c in content["categories"] if c["name"] in class_rows}
        unknown = {note["category_id"] for note in content["annotations"]} - row_of.keys()
        if unknown:
            names = sorted(c["name"] for c in content["categories"] if c["id"] in unknown)
            raise UserError(f"{self.annotations} annotates {system.listed(map(repr, names))}, which is "
                            f"not among the classes to train: {system.listed(class_rows, 8)}. Give all splits the "
                            "same classes.")
        self.category_of = {row: category for category, row in row_of.items()}
        if not content["images"]:
            raise UserError(f"{self.annotations} lists no images")
        self.files = [image["file_name"] for image in content["images"]]
        self.image_ids = [image["id"] for image in content["images"]]
        self.notes = self._index_objects(content["images"], content["annotations"], row_of, masks)
        if train and not len(self.labels):
            crowd = sum(bool(note.get("iscrowd", 0)) for note in content["annotations"])
            raise UserError(f"{self.annotations} has no object to train on"
                            + (f": {crowd} of its {len(content['annotations'])} annotation(s) are crowd regions "
                               "(\"iscrowd\": 1), which are not trained on" if crowd else ""))
        if check:
            image_check.check_images([self.folder / name for name in self.files],
                                     f"{flag} {Path(root).as_posix()} ({split})",
                                     [(image["width"], image["height"]) for image in content["images"]])

    def _index_objects(self, images, annotations, row_of, masks):
        """Flat arrays, not dicts: spawned workers get a copy of them. -> lines on what was clipped or left out."""
        objects = [note for note in annotations if not note.get("iscrowd", 0)]
        usable = usable_boxes(objects, images, str(self.annotations))
        owner, kept = usable.owner, usable.kept.copy()
        counts = {"crowd region(s) are not trained on": len(annotations) - len(objects)}
        codes = None
        sample = annotations[:10]
        self.sample_with_masks = sum(bool(note.get("segmentation")) for note in sample), len(sample)
        if masks:
            codes = self._mask_codes(objects, [(images[i]["height"], images[i]["width"]) for i in owner])
            without = np.array([code is None for code in codes], bool)
            empty = np.array([bool(note.get("segmentation")) for note in objects], bool)
            counts["object(s) without a mask were left out"] = (kept & without & ~empty).sum()
            counts["object(s) whose mask covers no pixel of the image were left out"] = (kept & without & empty).sum()
            kept &= ~without
            chosen = np.flatnonzero(kept)
            counts[ELSEWHERE] = masks_elsewhere([codes[i] for i in chosen], [images[owner[i]] for i in chosen],
                                                 usable.corners[chosen])
        order, self.ends = image_by_image(owner, kept, len(images))
        self.boxes = usable.corners[order].astype(np.float32)  # xyxy pixels of the original image
        self.labels = np.array([row_of[objects[i]["category_id"]] for i in order], np.int64)
        self.codes = self.code_ends = None
        if masks:
            chosen = [codes[i] for i in order]
            self.codes = np.frombuffer(b"".join(chosen), np.uint8)
            self.code_ends = np.cumsum([0, *map(len, chosen)])
        return usable.notes + notes_on_images(images, str(self.annotations)) + [
            f"{self.annotations}: {count} {what}" for what, count in counts.items() if count]

    def _mask_codes(self, objects, sizes):
        """-> one `mask_code` per object; UserError that names those that are broken, or says that there are none."""
        if objects and not any(note.get("segmentation") for note in objects):
            raise UserError(f"{NO_MASKS} ({self.annotations}): boxes alone are enough for "
                            "train_detector_stage1.py, masks need 'segmentation' (polygons or RLE); export the data "
                            "set as COCO Segmentation")
        codes, broken, names = [], [], dict(zip(self.image_ids, self.files, strict=True))
        for note, size in processes.progress(list(zip(objects, sizes, strict=True)), "checking masks",
                                             shown=len(objects) > 20_000):
            try:
                codes.append(mask_code(note.get("segmentation"), *size))
            except ValueError as error:
                broken.append(f"annotation {note['id']} of {names[note['image_id']]} ({error})")
        if broken:
            raise UserError(f"{self.annotations}: {len(broken)} mask(s) cannot be decoded: "
                            f"{system.listed(broken, 3, '; ')}. Fix or remove them.")
        if objects and not any(codes):
            raise UserError(f"{NO_MASKS} ({self.annotations}): every mask in it covers no pixel. "
                            "Polygons are x, y, x, y, ... in pixels of the image, not in shares of it; export the data "
                            "set as COCO Segmentation")
        return codes

    def __len__(self):
        return len(self.files)

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return [self.folder / name for name in self.files]

    def __getitem__(self, key):
        epoch, index = datasets.epoch_and_index(key)
        path = self.folder / self.files[index]
        image = datasets.read_image(path)
        size = tuple(image.shape[-2:])
        working = self._working_size(*size)
        if working != size:
            image = stretched_image(image, working)
        span = slice(self.ends[index], self.ends[index + 1])
        scale = np.array([working[1] / size[1], working[0] / size[0]] * 2, np.float32)
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(self.boxes[span] * scale), format="XYXY",
                                              canvas_size=working),
            "labels": torch.from_numpy(self.labels[span]),
        }
        if self.codes is not None:
            sample["masks"] = tv_tensors.Mask(self._masks(span, size, working))
        with datasets.sample_randomness(self.seed, epoch, index):
            sample = self.transform(sample)
        sample["boxes"] = normalised_boxes(sample["boxes"])
        plain = {name: sample[name].as_subclass(torch.Tensor) for name in ("image", "masks") if name in sample}
        return sample | plain | {"image_id": self.image_ids[index], "size": size, "domain": "clean",
                                 "path": path.as_posix(), "key": (epoch, index)}

    def _working_size(self, height, width):
        """-> (H, W) that the sample is made at."""
        limit = (2 * self.resolution) ** 2
        if height * width <= limit:
            return height, width
        if not self.train:
            return self.resolution, self.resolution
        scale = math.sqrt(limit / (height * width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _masks(self, span, size, working):
        """-> (N, *working) bool."""
        result = torch.zeros((span.stop - span.start, *working), dtype=torch.bool)
        for i, n in enumerate(range(span.start, span.stop)):
            code = self.codes[self.code_ends[n]:self.code_ends[n + 1]].tobytes()
            mask = torch.from_numpy(rle.decode({"size": list(size), "counts": code})).bool()
            result[i] = stretched_masks(mask[None], working)[0]
        return result


# ---- batches -------------------------------------------------------------------------------------------------------

def multi_scale_sizes(resolution, block, expanded, min_tokens, patch):
    """-> the sizes of multi-scale training, smallest first: `resolution` plus -3 to 4 (expanded: -5 to 5) blocks.

    Args:
        block: step that the backbone's windows need; min_tokens: as many queries as the encoder must be able to
            propose, one per token, so a size has at least so many patches of `patch` pixels.
    """
    steps = range(-5, 6) if expanded else range(-3, 5)
    return tuple(size for size in (resolution + step * block for step in steps)
                 if size > 0 and (size // patch) ** 2 >= min_tokens)


def stretched_image(image, size):
    """(3, H, W) uint8 -> (3, *size) uint8, bilinear with antialiasing."""
    return F.resize(image, list(size), interpolation=F.InterpolationMode.BILINEAR, antialias=True)


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
