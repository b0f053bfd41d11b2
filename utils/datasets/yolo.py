"""Data sets in YOLO's form, as Ultralytics documents it: read as COCO's entries, and written.

    data.yaml            names: the classes; train:, val:, test: a folder of images, a text file that lists images, or
                         several of them; path: where these start, where not beside the file
    images/train/a.jpg   any folders; the labels are in the same place below "labels" for the last "images"
    labels/train/a.txt   a row per object: class cx cy w h, or class x1 y1 x2 y2 x3 y3 ... (a polygon), in shares of the
                         upright image; no file, or no row: an image without objects

YOLO knows no crowds and no difficult objects, and one polygon per object. A mask of several parts is written as one
polygon that walks from part to part and back, which covers the same pixels, and is taken apart when it is read.
"""

import math
import os
from collections import Counter
from pathlib import Path

import yaml

from utils import system
from utils.config import UserError
from utils.datasets import image_check
from utils.weather import twin

FILES = ("data.yaml", "data.yml")
SUFFIXES = (".yaml", ".yml")
TOLERANCE = 0.01  # of the image's side: labels that reach out of it by so much are rounded, not wrong
DIGITS = 4        # of pixels: whole and half ones come back as such, which decides how a polygon is filled
ROW = "a row is 'class cx cy w h', or 'class x1 y1 x2 y2 x3 y3 ...'"


def settings_file(root):
    """-> Path of the data.yaml of a folder (or of a path that is one); None where there is none. Under another name it
    is found where it is the only YAML file with classes."""
    root = Path(root)
    if root.suffix.lower() in SUFFIXES and root.is_file():
        return root
    if named := next((root / name for name in FILES if (root / name).is_file()), None):
        return named
    found = [path for path in system.files_in(root, below=False)
             if path.suffix.lower() in SUFFIXES and _has_names(path)]
    if len(found) > 1:
        raise UserError(f"{root.as_posix()} has several YAML files with classes "
                        f"({system.listed(path.name for path in found)}): give the one that is meant, such as "
                        f"{found[0].as_posix()}")
    return found[0] if found else None


def _has_names(path):
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and bool({"names", "nc"} & content.keys()) and "train" in content


def read_settings(file):
    """-> (content of a data.yaml, names of its classes in order); UserError that names the file and what is wrong."""
    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{file.as_posix()}{line}: no YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file.as_posix()} cannot be read ({error}): save it as UTF-8") from None
    if not isinstance(content, dict):
        raise UserError(f"{file.as_posix()} holds no 'key: value' lines: names, train and val are needed")
    return content, _class_names(content, file.as_posix())


def _class_names(content, source):
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int and count > 0:
        names = [f"class_{i}" for i in range(count)]  # as Ultralytics calls them
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{source}: the numbers of its names must be 0 to {len(names) - 1}, not "
                            f"{system.listed(names)}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{source} has no names: write the classes as 'names: [person, car]'")
    for number, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not str(name).strip():
            raise UserError(f"{source}: class {number} is read as {name!r}: write its name in quotes")
    names = [str(name) for name in names]
    if double := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{source}: two classes are called {double[0]!r}: merge or rename them")
    if count is not None and count != len(names):
        raise UserError(f"{source}: nc is {count}, but it has {len(names)} names")
    return names


def images_of(file, name):
    """-> (Path of the folder that a split's images have in common, their paths).

    Raises:
        UserError: names the file, and the line of a list, whose images are not there.
    """
    file, settings = Path(file), read_settings(file)[0]
    entries = settings.get(name)
    entries = entries if isinstance(entries, list) else [entries]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise UserError(f"{file.as_posix()} has no '{name}:' with a folder of images, such as '{name}: images/{name}'")
    places = [_place(file, settings.get("path"), entry, name) for entry in entries]
    if len(places) == 1 and places[0].is_dir():
        folder, paths = places[0], system.images_in(places[0], links=True)
    else:
        paths = [path for place in places for path in (
            system.images_in(place, links=True) if place.is_dir() else _listed(place, file.parent))]
        paths = list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
        try:
            folder = Path(os.path.commonpath([path.parent for path in paths])) if paths else file.parent
        except ValueError:  # Windows
            raise UserError(f"{file.as_posix()}: the images of '{name}:' lie on several drives") from None
    if not paths:
        raise UserError(f"{file.as_posix()}: '{name}: {system.listed(entries)}' has no images "
                        f"({' '.join(system.SUFFIXES)}) in {system.listed(place.as_posix() for place in places)}")
    _require_own_images(file, paths)
    return folder, paths


def _place(file, start, entry, name):
    """-> Path of a folder or list that a data.yaml names: beside the file if there is one, else where `path` says."""
    here, entry = file.parent, entry.replace("\\", "/")
    tried = [here / entry]
    if entry.startswith("../"):
        tried.append(here / entry[3:])  # so Roboflow exports it, and Ultralytics reads it
    if isinstance(start, str):
        start = start.replace("\\", "/")
        tried += [here / start / entry, here.parent / start / entry]
    for place in dict.fromkeys(Path(os.path.normpath(one)) for one in tried):
        if place.is_dir() or (place.suffix.lower() == ".txt" and place.is_file()):
            return place
    raise UserError(f"{file.as_posix()}: '{name}: {entry}' is not there; looked for "
                    f"{system.listed(dict.fromkeys(Path(os.path.normpath(one)).as_posix() for one in tried))}")


def _listed(file, root):
    """-> paths of the images that a text file lists, relative to itself or to `root`."""
    found = []
    for number, line in system.numbered_lines(file):
        places = [file.parent / line.replace("\\", "/"), root / line.replace("\\", "/")]
        place = next((one for one in places if one.is_file()), None)
        if place is None:
            raise UserError(f"{file.as_posix()} line {number}: {places[0].as_posix()} does not exist")
        found.append(place)
    return found


def _require_own_images(file, paths):
    """UserError where a rainy twin's data.yaml, which is a copy, leads to the clean images."""
    record = twin.twin_above(file.parent)
    strays = [path for path in paths if record and record.parent not in path.resolve().parents]
    if strays:
        raise UserError(f"{file.as_posix()} leads out of the rainy twin that it lies in, to {strays[0].as_posix()}: "
                        "write its paths (path, train, val, and lists of images) relative to its folder")


def label_file(image):
    """-> Path of an image's labels, None where it has none."""
    return next((path for path in reversed(twin.yolo_texts(image)) if path.is_file()), None)


def read(file, name, masks=True):
    """Read a split.

    Returns:
        names of the classes; images [{"file_name" (relative to the folder of `images_of`), "width", "height",
        "objects": [{"category": index, "bbox": [x, y, w, h] pixels, "area", "iscrowd": 0, "segmentation"}, ...]}, ...];
        masks: whether polygons are kept.
    Raises:
        UserError: names the file and line.
    """
    names, (folder, paths) = read_settings(file)[1], images_of(file, name)
    images, labelled = [], 0
    for path in paths:
        width, height = image_check.size_or_error(path)
        text, objects = label_file(path), []
        labelled += text is not None
        for number, line in system.numbered_lines(text) if text else []:
            try:
                objects.append(_object(line.split(), names, width, height, masks))
            except ValueError as error:
                raise UserError(f"{text.as_posix()} line {number}: {error}") from None
        images.append({"file_name": path.relative_to(folder).as_posix(), "width": width, "height": height,
                       "objects": objects})
    if not labelled:
        raise UserError(f"{Path(file).as_posix()} ({name}): none of its {len(paths)} images has labels; those of "
                        f"{paths[0].as_posix()} should be {twin.yolo_texts(paths[0])[-1].as_posix()}")
    return names, images


def _object(words, names, width, height, masks):
    """-> one object of a row; ValueError says what is wrong with it."""
    try:
        index, *values = map(float, words)
    except ValueError:
        raise ValueError(f"{' '.join(words)[:60]!r} is not numbers alone: {ROW}") from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"it has {len(words)} values: {ROW}")
    if index not in range(len(names)):
        raise ValueError(f"class {words[0]}, but names has the classes 0 to {len(names) - 1}")
    if wrong := [value for value in values if not -TOLERANCE <= value <= 1 + TOLERANCE]:
        raise ValueError(f"{wrong[0]:g} is no share of the image, which is 0 to 1 (are these pixels?)")
    result = {"category": int(index), "iscrowd": 0}
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (width, height) * 2, strict=True))
        if w < 0 or h < 0:
            raise ValueError("the box has a negative width or height")
        box = [round(value, DIGITS) for value in (x - w / 2, y - h / 2, w, h)]
        return result | {"bbox": box, "area": box[2] * box[3]} | ({"segmentation": []} if masks else {})
    points = [(round(x * width, DIGITS), round(y * height, DIGITS))
              for x, y in zip(values[::2], values[1::2], strict=True)]
    xs, ys = zip(*points, strict=True)
    parts = _parts(points)
    result |= {"bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
               "area": sum(abs(_signed_area(part)) for part in parts)}
    return result | ({"segmentation": [[v for point in part for v in point] for part in parts]} if masks else {})


def _signed_area(points):
    """-> square pixels, positive or negative by the direction in which the points go round."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True)) / 2


def _parts(points):
    """Take a polygon apart that walks from part to part and back (see `_joined`). -> [[(x, y), ...], ...]

    A part that goes round the other way is a hole, as other tools join them: then the polygon stays as it is.
    """
    walk, parts = [], []
    for point in points:
        if point in walk:  # back where it was: what lies between is a part, or a way there and back
            at = walk.index(point)
            parts.append(walk[at:])
            del walk[at:]
        walk.append(point)
    parts = [part for part in [*parts, walk] if len(part) >= 3]
    same_way = len({_signed_area(part) > 0 for part in parts}) == 1
    return parts if same_way else [points]


def _joined(parts):
    """[[(x, y), ...], ...] -> one polygon: round each part in one direction, and from the first point of the first to
    the others and back, on lines that enclose nothing."""
    parts = [part if _signed_area(part) >= 0 else part[::-1] for part in parts]
    first, *others = parts
    joined = list(first)
    for part in others:
        joined += [first[0], *part, part[0]]
    return joined


# ---- writing -------------------------------------------------------------------------------------------------------

def write(out, names, contents):
    """Write data.yaml and labels of COCO contents whose category ids are 1 for names[0], and so on.

    Args:
        contents: {"train", "val", "test": content}.
    Returns:
        {(split, file name): Path where its image belongs, relative to `out`}, Counter of what was lost.
    """
    places, lost = {}, Counter()
    for split, content in contents.items():
        objects = {image["id"]: [] for image in content["images"]}
        for note in content["annotations"]:
            objects[note["image_id"]].append(note)
        for image in content["images"]:
            rows = [_row(note, image, lost) for note in objects[image["id"]] if not note.get("iscrowd")]
            places[split, image["file_name"]] = Path("images", split, image["file_name"])
            # where readers look for it: "labels" stands for the last "images", which may be one of the file's own name
            text = Path(out, twin.yolo_texts(places[split, image["file_name"]])[-1])
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")
        lost["crowd or difficult object(s) left out: YOLO has no flag for them"] += sum(
            bool(note.get("iscrowd")) for note in content["annotations"])
    settings = {split: f"images/{split}" for split in contents} | {"names": dict(enumerate(names))}
    Path(out, FILES[0]).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return places, lost


def _row(note, image, lost):
    """-> a line of labels: the polygon where there is one, else the box."""
    sides, parts = (image["width"], image["height"]), _polygons(note, image["file_name"])
    x, y, w, h = note["bbox"]
    corners = [(x, y), (x + w, y + h)]
    if note.get("segmentation") and not parts:
        lost["mask(s) written as their boxes: YOLO has polygons alone, no RLE"] += 1
    points = _joined(parts) if parts else corners
    (left, top), (right, bottom) = (tuple(map(end, zip(*points, strict=True))) for end in (min, max))
    if max(abs(left - x), abs(top - y), abs(right - x - w), abs(bottom - y - h)) > 1:
        lost["box(es) differ from the extent of their polygon by more than a pixel: YOLO keeps the polygon"] += 1
    inside = [tuple(min(max(value, 0), side) for value, side in zip(point, sides, strict=True)) for point in points]
    if any(math.dist(one, other) > 1e-3 for one, other in zip(inside, points, strict=True)):
        lost["object(s) reached out of their image and were clipped: YOLO's shares are 0 to 1"] += 1
    shares = [(px / sides[0], py / sides[1]) for px, py in inside]
    if not parts:
        (x1, y1), (x2, y2) = shares
        shares = [((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1)]
    return " ".join([str(note["category_id"] - 1), *(f"{value:.8f}" for point in shares for value in point)])


def _polygons(note, file_name):
    """-> [[(x, y), ...], ...] of an annotation, without parts of two points, which are no area."""
    shape = note.get("segmentation")
    parts = shape if isinstance(shape, list) else []
    for part in parts:
        if not isinstance(part, list) or len(part) % 2 or not all(
                isinstance(value, (int, float)) and abs(value) < math.inf for value in part):
            raise UserError(f"annotation {note['id']} of {file_name}: its polygon is not a list of x, y, x, y, ...")
    return [list(zip(part[::2], part[1::2], strict=True)) for part in parts if len(part) >= 6]
