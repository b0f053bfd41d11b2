"""MixedRain: photographs in mist, rain and snow storms, for evaluation alone.

    root/images/                 the weather is the file name's prefix: mist, rain_storm, snow_storm, else clear
    root/labels.txt              one object per line: image_id class_id x_center y_center width height, all four in
                                 shares of the image; image_id is the file's name with or without its extension

An image without a line is an image without objects.
"""

from pathlib import Path

from PIL import Image

from utils import processes, report, system
from utils.config import UserError
from utils.datasets import image_check
from utils.datasets.coco import CocoDetectionDataset

CLASSES = ("person", "car", "dog", "bicycle", "cat", "bus", "horse", "boat", "bird", "truck")  # by class_id
PREFIXES = ("mist", "rain_storm", "snow_storm")
_LAYOUT = "expected <folder>/images/*.jpg and <folder>/labels.txt"


def weather_of(file_name):
    """-> the kind of weather in an image, from its file name."""
    return next((prefix for prefix in PREFIXES if Path(file_name).name.startswith(prefix)), "clear")


def read_mixedrain(root, constant="MIXEDRAIN_DIR"):
    """-> the folder's content as a COCO annotation file has it (boxes [x, y, w, h] in pixels, ids from 1).

    Raises:
        UserError: naming `constant` and what is missing, or the line of labels.txt that is wrong.
    """
    root = Path(root)
    for path in (root, root / "images", root / "labels.txt"):
        if problem := system.absent(path, folder=path.suffix != ".txt"):
            raise UserError(f"{constant} = '{root.as_posix()}': {path.as_posix()} {problem}; {_LAYOUT}")
    files = system.images_in(root / "images", below=False)
    if not files:
        raise UserError(f"{constant} = '{root.as_posix()}': images/ holds no images; {_LAYOUT}")
    images, by_name = [], {}
    for path in files:
        try:
            with Image.open(path) as image:
                width, height = system.upright_size(image)
        except system.FAULTS as error:
            raise UserError(f"cannot read image {path.as_posix()}: {error}") from error
        images.append({"id": len(images) + 1, "file_name": path.name, "width": width, "height": height})
        if by_name.setdefault(path.stem, images[-1]) is not images[-1]:
            raise UserError(f"{constant}: {path.as_posix()} and {by_name[path.stem]['file_name']} share a name")
        by_name[path.name] = images[-1]
    annotations = []
    for number, line in system.numbered_lines(root / "labels.txt"):
        words, place = line.rsplit(maxsplit=5), f"{(root / 'labels.txt').as_posix()}, line {number}"
        annotations.append({"id": len(annotations) + 1, "iscrowd": 0} | _object(words, by_name, place))
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _object(words, by_name, place):
    """One line's words -> {"image_id", "category_id", "bbox", "area"}; UserError that names the line."""
    try:
        name, label, box = words[0], int(words[1]), [float(word) for word in words[2:]]
        if len(box) != 4:
            raise ValueError
    except (ValueError, IndexError):
        raise UserError(f"{place}: '{' '.join(words)[:80]}' is not 'image_id class_id x_center y_center width height'"
                        ) from None
    if name not in by_name:
        raise UserError(f"{place}: images/ holds no image named '{name}'")
    if not 0 <= label < len(CLASSES):
        raise UserError(f"{place}: class_id {label} is not one of 0 ({CLASSES[0]}) to {len(CLASSES) - 1} "
                        f"({CLASSES[-1]})")
    if not all(0 <= value <= 1 for value in box):  # also refuses NaN
        raise UserError(f"{place}: the box {box} is not in shares of the image (0 to 1)")
    image = by_name[name]
    x, y, w, h = (share * image[side] for share, side in zip(box, ("width", "height") * 2, strict=True))
    return {"image_id": image["id"], "category_id": label + 1, "bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}


class MixedRainDataset(CocoDetectionDataset):
    """MixedRain's images and boxes; samples and attributes as CocoDetectionDataset's, domain "mixedrain".

    Args:
        root: the folder described above; constant: the script's constant that holds it.
        id2label, transform, percent, seed, unknown: see CocoDetectionDataset.
        converted: folder to write its labels into, in COCO layout (evaluation reads that file).
    """

    def __init__(self, root, id2label, transform, converted, *, constant="MIXEDRAIN_DIR", percent=100, seed=0,
                 unknown="error"):
        converted = Path(converted)
        if processes.is_main():
            (converted / "val2017").mkdir(parents=True, exist_ok=True)  # part of the layout; the images stay in `root`
            report.write_json(converted / "annotations" / "instances_val2017.json", read_mixedrain(root, constant))
        processes.accelerator().wait_for_everyone()
        super().__init__(converted, "val", id2label, transform, constant=constant, domain="mixedrain", percent=percent,
                         seed=seed, unknown=unknown, check=False)
        self.folder = Path(root) / "images"
        image_check.check_images([self.folder / name for name in self.files], constant)

    def kinds(self):
        """-> {weather: [image id, ...]}, only those that occur."""
        found = {}
        for name, image_id in zip(self.files, self.image_ids, strict=True):
            found.setdefault(weather_of(name), []).append(image_id)
        return {kind: found[kind] for kind in (*PREFIXES, "clear") if kind in found}
