"""Data sets in Pascal VOC's form: read as COCO's entries, and written.

    JPEGImages/a.jpg                   images, of any kind that is read elsewhere
    Annotations/a.xml                  one per image, without <object> where the image has none
    ImageSets/Main/train.txt, val.txt  the names of a split's images, one a line, without their ending
    classes.txt                        optional: the classes in order, one a line; VOC itself has no list of them

Pixels count from 1 and xmax, ymax are inside the box: [xmin, ymin, xmax, ymax] is COCO's [xmin - 1, ymin - 1,
xmax - xmin + 1, ymax - ymin + 1]. An object that is "difficult" has iscrowd = 1: it is not trained on and not scored.
Classes are numbered in the order of classes.txt, else of the alphabet over all Annotations.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from utils import system
from utils.config import UserError
from utils.datasets import image_check
from utils.weather import twin

IMAGES, ANNOTATIONS, CLASSES, LISTS = twin.VOC_IMAGES, twin.VOC_ANNOTATIONS, "classes.txt", Path("ImageSets", "Main")
SPLIT_NAMES = ("train", "trainval", "val", "test")  # of lists; others (VOC has one per class) say nothing here


def is_root(root):
    """-> whether a folder is a data set in this form."""
    return (Path(root) / IMAGES).is_dir() and any(Path(root, ANNOTATIONS).rglob("*.xml"))


def split_file(root, name):
    """-> Path of what says which images a split has, None where nothing does: a list in ImageSets/Main, or Annotations
    themselves where there is no list at all; all images are then for validation, none for training."""
    there = {one: path for one in SPLIT_NAMES if (path := Path(root) / LISTS / f"{one}.txt").is_file()}
    if not there:
        return Path(root) / ANNOTATIONS if name == "val" else None
    if "val" not in there:  # VOC 2007 is often split as trainval and test, RTTS is test alone
        there = {"train": there.get("train") or there.get("trainval"), "val": there.get("test")}
    return there.get(name)


def require_split(root, name, named):
    """-> `split_file`; UserError that says how to give a split. named: the data set, for the message."""
    if file := split_file(root, name):
        return file
    lists = (Path(root) / LISTS).as_posix()
    raise UserError(f"{named} is in Pascal VOC's form and does not say which images are for '{name}': write "
                    f"{lists}/train.txt and {lists}/val.txt, each with the names of its images, one a line and without "
                    "their ending (without any list, all images are for validation)")


def read(file, name, masks=True):
    """Read the images that `split_file` says; as `yolo.read` does. name, masks: not needed, VOC has no polygons."""
    file = Path(file)
    root = file.parent if file.is_dir() else file.parent.parent.parent
    known = {}
    for path in system.images_in(root / IMAGES, links=True):
        stem = path.relative_to(root / IMAGES).with_suffix("").as_posix()
        if known.setdefault(stem, path) != path:
            raise UserError(f"{known[stem].as_posix()} and {path.name} differ in their ending alone: one {stem}.xml "
                            "cannot be for both; remove one")
    if file.is_dir():
        wanted = [(stem, file.as_posix()) for stem in known]
    else:
        wanted = [(stem, f"{file.as_posix()} line {number}") for number, stem in system.numbered_lines(file)]
    for stem, source in wanted:
        if stem not in known:
            raise UserError(f"{source}: {(root / IMAGES).as_posix()} has no image called {stem!r}")
    wanted = dict(wanted)
    if not wanted:
        raise UserError(f"{file.as_posix()} lists no images")
    missing = [stem for stem in wanted if not (root / ANNOTATIONS / f"{stem}.xml").is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(wanted)} images of {file.as_posix()} have no XML file in "
                        f"{(root / ANNOTATIONS).as_posix()} ({system.listed(missing)}): write one without <object> for "
                        "an image without objects")
    listed = [line for _, line in system.numbered_lines(root / CLASSES)] if (root / CLASSES).is_file() else None
    # without a list the classes are those of all splits, so that all number them alike
    stems = wanted if listed else {path.relative_to(root / ANNOTATIONS).with_suffix("").as_posix(): None
                                   for path in system.files_in(root / ANNOTATIONS) if path.suffix.lower() == ".xml"}
    trees = {stem: (path, parse(path)) for stem in stems for path in [root / ANNOTATIONS / f"{stem}.xml"]}
    classes = listed or sorted({_name(one, path) for path, tree in trees.values() for one in tree.all("object")})
    images = []
    for stem in wanted:
        (path, tree), image = trees[stem], known[stem]
        width, height = _size(tree, path, image)
        images.append({"file_name": image.relative_to(root / IMAGES).as_posix(), "width": width, "height": height,
                       "objects": [_object(one, path, classes, root) for one in tree.all("object")]})
    return classes, images


class Element(NamedTuple):
    """An element of an XML file; unlike ElementTree's it knows its line."""

    tag: str
    line: int
    texts: list
    children: list

    def all(self, tag):
        return [child for child in self.children if child.tag == tag]

    def text(self, tag):
        """-> text of the first child of that tag, None where there is none or it is empty."""
        return next(("".join(child.texts).strip() or None for child in self.all(tag)), None)


def parse(path):
    """-> Element, the root of an XML file; UserError that names file and line."""
    top = Element("", 0, [], [])
    stack, parser = [top], expat.ParserCreate()

    def start(tag, _):
        stack[-1].children.append(Element(tag, parser.CurrentLineNumber, [], []))
        stack.append(stack[-1].children[-1])
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = lambda text: stack[-1].texts.append(text)
    try:
        parser.Parse(Path(path).read_bytes(), True)
    except expat.ExpatError as error:
        raise UserError(f"{Path(path).as_posix()} line {error.lineno}: no XML: "
                        f"{expat.errors.messages.get(error.code, error)}") from None
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{Path(path).as_posix()} cannot be read: {error}") from None
    return top.children[0]


def _fail(path, element, problem):
    raise UserError(f"{Path(path).as_posix()} line {element.line}: {problem}")


def _name(element, path):
    return element.text("name") or _fail(path, element, "the object has no <name>")


def _number(element, tag, path):
    text = element.text(tag)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf"):
        _fail(path, element, f"<{tag}> is {text!r}, not a number")
    return value


def _size(tree, path, image):
    """-> (width, height): of <size>; of the image file where that says nothing, or 0."""
    for element in tree.all("size"):
        size = [_number(element, tag, path) for tag in ("width", "height") if element.text(tag)]
        if len(size) == 2 and all(side > 0 for side in size):
            return round(size[0]), round(size[1])
    return image_check.size_or_error(image)


def _object(element, path, classes, root):
    """-> one object, as of `yolo.read`."""
    name = _name(element, path)
    if name not in classes:
        _fail(path, element, f"class {name!r} is not in {(root / CLASSES).as_posix()}")
    difficult = element.text("difficult") or "0"
    if difficult not in ("0", "1"):
        _fail(path, element, f"<difficult> is {difficult!r}, not 0 or 1")
    boxes = element.all("bndbox") or _fail(path, element, f"the object {name!r} has no <bndbox>")
    x1, y1, x2, y2 = (_number(boxes[0], tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))
    x, y, w, h = x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1
    if w < 0 or h < 0:
        _fail(path, boxes[0], f"xmax {x2:g} or ymax {y2:g} lies before xmin {x1:g}, ymin {y1:g}")
    return {"category": classes.index(name), "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(difficult),
            "segmentation": []}


# ---- writing -------------------------------------------------------------------------------------------------------

def write(out, names, contents):
    """Write Annotations, lists and classes.txt; arguments and answer as of `yolo.write`."""
    out, places, lost = Path(out), {}, Counter()
    stems = Counter(Path(image["file_name"]).with_suffix("").as_posix()
                    for content in contents.values() for image in content["images"])
    apart = any(count > 1 for count in stems.values())  # VOC keeps all splits in one folder
    (out / LISTS).mkdir(parents=True)
    (out / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
    for split, content in contents.items():
        objects, lines = {image["id"]: [] for image in content["images"]}, []
        for note in content["annotations"]:
            objects[note["image_id"]].append(note)
            lost["mask(s) left out: Pascal VOC's XML has boxes alone"] += bool(note.get("segmentation"))
        for image in content["images"]:
            place = Path(split if apart else "", image["file_name"])
            places[split, image["file_name"]] = Path(IMAGES) / place
            lines.append(place.with_suffix("").as_posix())
            target = (out / ANNOTATIONS / place).with_suffix(".xml")
            target.parent.mkdir(parents=True, exist_ok=True)
            tree = ElementTree.ElementTree(_document(image, place, objects[image["id"]], names))
            ElementTree.indent(tree, "\t")
            tree.write(target, encoding="utf-8")
        (out / LISTS / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8",
                                                  newline="\n")
    return places, lost


def _document(image, place, notes, names):
    """-> ElementTree.Element of one image."""
    def add(parent, tag, text=None):
        child = ElementTree.SubElement(parent, tag)
        child.text = None if text is None else str(text)
        return child
    top = ElementTree.Element("annotation")
    add(top, "folder", IMAGES)
    add(top, "filename", place.as_posix())
    size = add(top, "size")
    for tag, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        add(size, tag, value)
    add(top, "segmented", 0)
    for note in notes:
        x, y, w, h = note["bbox"]
        one = add(top, "object")
        for tag, value in (("name", names[note["category_id"] - 1]), ("pose", "Unspecified"), ("truncated", 0),
                           ("difficult", int(bool(note.get("iscrowd"))))):
            add(one, tag, value)
        box = add(one, "bndbox")
        for tag, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            add(box, tag, f"{value:.4f}".rstrip("0").rstrip("."))
    return top
