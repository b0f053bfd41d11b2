"""Data sets in the layout that Roboflow exports, checked when they are opened: boxes, and masks where they are wanted.

    dataset/train/_annotations.coco.json, dataset/train/*.jpg     the same for valid/ and, perhaps, test/

The other layouts of utils/datasets/layouts.py are read as well.
Masks may be polygons, compressed or uncompressed RLE; in memory they are compressed RLE, about a hundred bytes each. A
sample is a function of (seed, epoch, index) alone, the size of a batch of (seed, keys in the batch) alone.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torchvision import tv_tensors

from rfdetr.datasets import transforms
from rfdetr.datasets.mask_codes import mask_code, masks_elsewhere, stretched_masks
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
            image = transforms.stretched_image(image, working)
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
