"""Detection data in any layout of layouts.py, clean images and their rainy twins, checked when they are opened."""

from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors

from utils import processes
from utils.boxes import normalised_boxes
from utils.config import UserError
from utils.datasets import image_check, yolo
from utils.datasets.annotations import (
    image_by_image,
    label_table,
    notes_on_images,
    one_category_each,
    read_annotations,
    usable_boxes,
)
from utils.datasets.layouts import ADVICE, find_split
from utils.datasets.samples import epoch_and_index, read_image, sample_randomness, seeded_subset
from utils.weather.twin import twin_above


class CocoDetectionDataset(torch.utils.data.Dataset):
    """Images and boxes of one split of a data set, optionally with each image's twin from another one.

    Keys are `index` or `(epoch, index)`. A sample is {"image": (3, H, W) uint8, "twin": the same or absent, "boxes":
    (N, 4) float32 normalised cxcywh, "labels": (N,) int64, "image_id": int, "size": original (H, W), "domain": str,
    "path": str}. Images without boxes are samples with (0, 4) boxes; crowd regions are not trained on.

    Args:
        root, split: see `layouts.find_split`; constant: the script's constant that holds `root`, for error messages.
        id2label: the model's classes; see `label_table`, also for `unknown`.
        transform: one of utils.datasets.presets.
        domain: "clean" or "rainy"; what this root is, whatever its path looks like.
        twin_root: data set of clean images with the same file names (and `twin_constant`), or None.
        percent, part, seed: see `seeded_subset`; `seed` also drives the augmentation.
        fresh_rain: FreshRain that draws on the images of this clean root, whose domain is then "rainy", or None.
    Raises:
        UserError: missing files or folders, broken JSON or images, boxes of unknown categories.
    """

    def __init__(self, root, split, id2label, transform, *, constant, domain, percent=100, seed=0,
                 part=(0.0, 1.0), twin_root=None, twin_constant=None, unknown="error", check=True, fresh_rain=None):
        from_twin = domain == "rainy" and not fresh_rain
        self.annotations = find_split(root, split, constant, ADVICE["rainy" if from_twin else "clean"])
        self.folder, source = self.annotations.folder, str(self.annotations)
        self.transform, self.domain, self.seed, self.fresh_rain = transform, domain, seed, fresh_rain
        content = read_annotations(self.annotations, masks=False)
        self.label_of = label_table(content["categories"], id2label, source, unknown)
        self.category_of = one_category_each(self.label_of, content["annotations"], source)
        chosen = [content["images"][i] for i in
                  seeded_subset([im["file_name"] for im in content["images"]], percent, seed, part)]
        if not chosen:
            raise UserError(f"{source} lists too few images ({len(content['images'])})")
        self.files = [image["file_name"] for image in chosen]
        self.image_ids = [image["id"] for image in chosen]
        self.twin_folder = find_split(twin_root, split, twin_constant).folder if twin_root else None
        self.notes = self._index_boxes(chosen, content["annotations"])
        if split == "val" and not len(self.labels):
            raise UserError(f"{source} has no object of the detector's classes in the {len(chosen)} chosen image(s): "
                            "there is nothing to score")
        if check:
            sizes = [(image["width"], image["height"]) for image in chosen]
            paths, twins = [self.folder / name for name in self.files], None
            if self.twin_folder not in (None, self.folder):
                twins = [self.twin_folder / name for name in self.files]
                image_check.check_images(twins, f"{twin_constant} ({split}, twins of {constant}'s images, of the same "
                                                "names)", sizes)
            image_check.check_images(paths, f"{constant} ({split})", sizes, twins)

    def _index_boxes(self, images, annotations):
        """Flat arrays, not dicts: spawned workers get a copy of them. -> lines about boxes that were clipped or
        left out."""
        ids = {image["id"] for image in images}
        objects = [note for note in annotations if note["image_id"] in ids and not note.get("iscrowd", 0)
                   and note["category_id"] in self.label_of]
        usable = usable_boxes(objects, images, str(self.annotations))
        order, self.ends = image_by_image(usable.owner, usable.kept, len(images))
        self.boxes = usable.corners[order].astype(np.float32)  # xyxy pixels
        self.labels = np.array([self.label_of[objects[i]["category_id"]] for i in order], np.int64)
        return usable.notes + notes_on_images(images, str(self.annotations))

    def __len__(self):
        return len(self.files)

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return [folder / name for folder in dict.fromkeys((self.folder, self.twin_folder)) if folder
                for name in self.files]

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        path = self.folder / self.files[index]
        image = read_image(path)
        size = tuple(image.shape[-2:])
        span = slice(self.ends[index], self.ends[index + 1])
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(self.boxes[span]), format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(self.labels[span]),
        }
        if self.fresh_rain:
            sample = self.fresh_rain(sample, epoch, self.files[index], twin=bool(self.twin_folder))
        elif self.twin_folder:
            own = self.twin_folder == self.folder  # a clean image is its own twin
            twin = image.clone() if own else read_image(self.twin_folder / self.files[index])
            if twin.shape != image.shape:
                raise UserError(f"{path.as_posix()} is {size[1]}x{size[0]}, its twin in "
                                f"{self.twin_folder.as_posix()} is {twin.shape[2]}x{twin.shape[1]}")
            sample["twin"] = tv_tensors.Image(twin)
        with sample_randomness(self.seed, epoch, index):
            sample = self.transform(sample)
        sample["boxes"] = normalised_boxes(sample["boxes"])
        return sample | {"image_id": self.image_ids[index], "size": size, "domain": self.domain,
                         "path": path.as_posix()}


class Mixture(torch.utils.data.Dataset):
    """Several data sets end to end; keys and samples as theirs."""

    def __init__(self, parts):
        self.parts = list(parts)
        self.notes = [note for part in self.parts for note in part.notes]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self):
        return int(self.ends[-1])

    def image_paths(self):
        """-> paths of all image files that samples come from."""
        return [path for part in self.parts for path in part.image_paths()]

    def __getitem__(self, key):
        epoch, index = epoch_and_index(key)
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[which][(epoch, index - (int(self.ends[which - 1]) if which else 0))]


def clean_rainy_mixture(coco_dir, rain_dir, id2label, transform, *, coco_ratio, rain_ratio, percent, seed,
                        split="train", twins=False, unknown="error", fresh_rain=None, labelled=True):
    """The training mix: of `percent` of the images, coco_ratio come clean and rain_ratio rainy, none as both.

    Args:
        coco_dir, rain_dir: data sets with equal file names (the constants COCO_DIR and COCO_RAIN_DIR).
        coco_ratio, rain_ratio: shares that add up to 1.
        twins: give every sample its clean image as "twin" (a clean sample is its own twin).
        fresh_rain: FreshRain that draws on clean images in the place of those of rain_dir, which is then not read.
        labelled: False takes annotation files without any object: nothing is to be learnt from labels.
    """
    if not (coco_ratio >= 0 and rain_ratio >= 0 and abs(coco_ratio + rain_ratio - 1) <= 1e-6):  # NaN is neither
        raise UserError(f"COCO_RATIO = {coco_ratio} and RAIN_RATIO = {rain_ratio} must be shares that add up to 1")
    common = {"split": split, "id2label": id2label, "transform": transform, "percent": percent, "seed": seed,
              "unknown": unknown}
    if twins:
        common |= {"twin_root": coco_dir, "twin_constant": "COCO_DIR"}
    if fresh_rain:
        require_no_rain(coco_dir, ("COCO_DIR", "COCO_RAIN_DIR"))
    elif rain_ratio > 0:
        require_clean_and_rainy(coco_dir, rain_dir)
    parts = []
    if coco_ratio > 0:
        parts.append(CocoDetectionDataset(coco_dir, constant="COCO_DIR", domain="clean", part=(0.0, coco_ratio),
                                          **common))
    if rain_ratio > 0:
        root, constant = (coco_dir, "COCO_DIR") if fresh_rain else (rain_dir, "COCO_RAIN_DIR")
        parts.append(CocoDetectionDataset(root, constant=constant, domain="rainy", part=(coco_ratio, 1.0),
                                          fresh_rain=fresh_rain, **common))
    if labelled and not any(len(part.labels) for part in parts):
        raise UserError(f"{parts[-1].annotations} has no object of the detector's classes in the chosen "
                        "images: there is nothing to learn from")
    return Mixture(parts)


def clean_rainy_validation(coco_dir, rain_dir, id2label, transform, *, domains=("clean", "rainy"), percent=100, seed=0,
                           unknown="error", train=None, fresh_rain=None):
    """The validation images of both roots, each to be scored by itself; what is odd about them is said.

    Args:
        coco_dir, rain_dir: data sets (the constants COCO_DIR and COCO_RAIN_DIR); transform: of the images.
        domains: the wanted ones, in the order of the answer; percent, seed, unknown: see CocoDetectionDataset.
        train: the data set of the training, if any: images that are in both are said.
        fresh_rain: where rain_dir is empty, FreshRain that draws on coco_dir's images, once (a validation loader's keys
            are those of epoch 0), or None.
    Returns:
        {"clean", "rainy": CocoDetectionDataset}.
    """
    roots = {"clean": (coco_dir, "COCO_DIR", None), "rainy": (rain_dir, "COCO_RAIN_DIR", None)}
    if fresh_rain and not rain_dir:
        roots["rainy"] = coco_dir, "COCO_DIR", fresh_rain
        if "rainy" in domains:
            processes.say("COCO_RAIN_DIR is empty: the weather of the rainy validation images is drawn, once")
    found = {}
    for domain in domains:
        root, constant, rain = roots[domain]
        found[domain] = CocoDetectionDataset(root, "val", id2label, transform, constant=constant, domain=domain,
                                             percent=percent, seed=seed, unknown=unknown, fresh_rain=rain)
    for data in found.values():
        say_notes(data)
        if both := _in_both(data, train):
            processes.say(f"note: {both} of {len(data)} validation images of {data.folder.as_posix()} are trained on "
                          "as well (same name and size of the file): their scores say little")
    return found


def _in_both(val, train):
    """-> how many of the validation images have the name and the number of bytes of a training image."""
    def files(data):
        return {(Path(name).name, (data.folder / name).stat().st_size) for name in data.files}
    parts = [] if train is None else getattr(train, "parts", [train])
    return len(files(val) & set().union(*map(files, parts)))


def say_notes(data):
    """Print a data set's `notes`, one line each, from the main process."""
    for note in data.notes:
        processes.say(f"note: {note}")


def require_clean_and_rainy(clean, rainy, constants=("COCO_DIR", "COCO_RAIN_DIR")):
    """UserError that names the two constants where their folders are one, or the clean one holds make_rain.py's rain.

    Swapped folders would train a network to make rain, and nothing else would tell.
    """
    clean, rainy = Path(clean), Path(rainy)
    one, other = (path.parent if path.name in yolo.FILES else path for path in (clean.resolve(), rainy.resolve()))
    if one == other:
        raise UserError(f"{constants[0]} and {constants[1]} are the same folder ('{clean.as_posix()}'): give the clean "
                        "images and their rainy twins, which make_rain.py writes")
    require_no_rain(clean, constants)


def require_no_rain(clean, constants):
    """UserError where a folder that should hold clean images is a twin that make_rain.py wrote, or lies in one.

    constants: the names of the one with the clean and of the one with the rainy images.
    """
    clean = Path(str(clean))
    if record := twin_above(clean):
        raise UserError(f"{constants[0]} = '{clean.as_posix()}' holds rain that make_rain.py wrote "
                        f"({record.as_posix()}), not clean images: are {constants[0]} and {constants[1]} swapped?")


