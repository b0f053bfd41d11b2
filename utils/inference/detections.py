"""What detect.py writes beside the pictures: detections.json in COCO's result format, images.json about every image."""

import contextlib
import itertools
import json
import os
import socket
from pathlib import Path

import psutil
from pycocotools import mask as rle
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from utils import system
from utils.config import UserError
from utils.datasets.annotations import label_table
from utils.inference.video import opencv


class Results:
    """The two files of a video, written as its frames come.

    Args:
        folder: where they go; source: from video.open_source; id2label: of the detector; polygons: see `entries`.
    """

    after_picture = False  # an entry also where the picture fails

    def __init__(self, folder, source, id2label, polygons=False):
        self.source, self.polygons = source, polygons
        self.ids = itertools.count(1)
        self.category_of, categories = category_table(id2label)
        self.boxes, self.images = files(folder, categories)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.boxes.close()
        self.images.close()

    def add(self, frame, one):
        """Append a video.Frame's entry, and the detections in `one` (see detect.detect_frames; None: no image)."""
        image_id = next(self.ids)
        image, boxes = entries(frame, one, self.category_of, self.polygons)
        time = {"frame": frame.number, "seconds": round(frame.seconds, 4)}
        self.images.add([{"id": image_id, "file_name": self.source.name} | time | image])
        self.boxes.add({"image_id": image_id} | box for box in boxes)


class Journal:
    """What is done of a folder of images, a line per image, so that a killed run can go on: nothing is lost, and no
    image is done twice. Every process of several has a file of its own.

    `finish` makes the two files of all journals in the folder.

    Args:
        folder: of the results; constants: what a run that goes on must have in common with this one, as plain data;
        id2label, polygons: as of Results.
    """

    after_picture = True

    def __init__(self, folder, constants, id2label, polygons=False):
        self.path = Path(folder) / f".done.{socket.gethostname()}.{os.getpid()}.jsonl"
        self.constants, self.polygons = constants, polygons
        self.category_of, _ = category_table(id2label)

    def __enter__(self):
        self.file = open(self.path, "ab")
        started = psutil.Process().create_time()
        self._write({"constants": self.constants, "host": socket.gethostname(), "process": os.getpid(),
                     "started": started})
        return self

    def __exit__(self, *error):
        self.file.close()

    def add(self, frame, one):
        """As of Results; the picture must have been written."""
        image, boxes = entries(frame, one, self.category_of, self.polygons)
        self._write({"image": {"file_name": frame.name} | image, "boxes": boxes})

    def _write(self, entry):
        self.file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self.file.flush()  # from here on it outlives a kill of this process


def journals(folder):
    """-> paths of the journals in a folder of results, those of an earlier run among them."""
    return sorted(Path(folder).glob(".done.*.jsonl"))


def done_images(folder, constants):
    """-> names of the images that earlier runs have finished in a folder; those with a problem are tried again.

    Raises:
        UserError: the earlier run had other constants, or is still running on this machine.
    """
    done = set()
    for path in journals(folder):
        for entry, _ in _lines(path):
            if "constants" in entry:
                _require_same(path, entry, constants)
            elif "problem" not in entry["image"]:
                done.add(entry["image"]["file_name"])
    return done


def _require_same(path, entry, constants):
    """UserError where a journal's run has other constants than this one, or lives."""
    where = f"RESUME: {path.parent.as_posix()}"
    if other := [name for name, value in entry["constants"].items() if value != constants.get(name)]:
        name = other[0]
        raise UserError(f"{where} was begun with {name} = {entry['constants'][name]!r}, now it is "
                        f"{constants.get(name)!r}: give the same {system.listed(other)}, or leave RESUME out")
    if entry["host"] == socket.gethostname() and entry["process"] != os.getpid():
        with contextlib.suppress(psutil.Error):
            if psutil.Process(entry["process"]).create_time() == entry["started"]:
                raise UserError(f"{where} is being written by process {entry['process']}: wait for it or end it")


def _lines(path):
    """Yield (entry, offset) of a journal's lines; one that a kill cut off in the middle is no line."""
    with open(path, "rb") as file:
        at = 0
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line), at
            at += len(line)


def finish(folder, source, id2label, complete):
    """Make detections.json and images.json of all journals, in the order of the source's images.

    Args:
        source: video.ImageFiles; complete: whether all is done, so that the journals can go.
    """
    where = {}  # {file name: (journal, offset)}: a million images' boxes are too much for the memory
    for path in journals(folder):
        for entry, at in _lines(path):
            if "image" in entry and (entry["image"]["file_name"] not in where or "problem" not in entry["image"]):
                where[entry["image"]["file_name"]] = path, at
    boxes, images = files(folder, category_table(id2label)[1])
    with contextlib.ExitStack() as stack:
        stack.callback(images.close)
        stack.callback(boxes.close)
        opened = {path: stack.enter_context(open(path, "rb")) for path in journals(folder)}
        for path, image_id in zip(source.paths, image_ids(source), strict=False):
            if path.name in where:
                journal, at = where[path.name]
                opened[journal].seek(at)
                entry = json.loads(opened[journal].readline())
                images.add([{"id": image_id} | entry["image"]])
                boxes.add({"image_id": image_id} | box for box in entry["boxes"])
    if complete:
        for path in journals(folder):
            path.unlink()


def files(folder, categories):
    """-> (JsonList of detections.json, JsonList of images.json)."""
    return (JsonList(Path(folder) / "detections.json"),
            JsonList(Path(folder) / "images.json", f'{{"categories": {json.dumps(categories)},\n"images": ', "}"))


def entries(frame, one, category_of, polygons):
    """A frame's part of the two files, without ids.

    Args:
        frame: video.Frame; one: its detections (see detect.detect_frames), None where it has no image; category_of:
            {label: category id}; polygons: masks as polygons, not as run lengths.
    Returns:
        (dict of images.json, [dict of detections.json, ...]).
    """
    if one is None:
        return {"problem": frame.problem or "no picture at this time, the last one is held"}, []
    height, width = frame.image.shape[-2:]
    image = {"height": height, "width": width}
    if one["branch"]:
        image |= {"rain_probability": round(one["rain"], 5), "branch": one["branch"]}
    boxes = [{"category_id": category_of[label], "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
              "score": round(score, 5)} for label, score, (x1, y1, x2, y2) in
             zip(one["labels"].tolist(), one["scores"].tolist(), one["boxes"].tolist(), strict=True)]
    for box, mask in zip(boxes, one.get("masks", ()), strict=False):
        box["segmentation"] = outlines(mask) if polygons else mask
    for box, number in zip(boxes, one["tracks"].tolist() if "tracks" in one else (), strict=False):
        box |= {"track_id": number} if number else {}
    return image, boxes


def outlines(mask):
    """A mask's run lengths -> its polygons, [[x1, y1, x2, y2, ...], ...] pixels, as COCO has them; holes are filled."""
    cv2 = opencv("MASKS = 'polygon'")
    pixels = rle.decode(mask)  # (H, W) uint8
    # through the corners of pixels twice as fine: an outline through their centres would lack half a pixel
    fine = cv2.resize(pixels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [((line[:, 0] + 0.5) / 2).round(2).flatten().tolist() for line in found if len(line) > 2]


class JsonList:
    """A JSON file with a list that grows entry by entry, on disk and not in memory.

    The file appears when the list is closed, also after Ctrl+C, and then holds every entry that was written whole.

    Args:
        path: the file; head, tail: JSON text before and after the list.
    """

    def __init__(self, path, head="", tail=""):
        self.path, self.tail = Path(path), tail
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}{system.TEMPORARY}")
        self.file = open(self.temporary, "wb")
        self.empty = True
        self.file.write(f"{head}[".encode())
        self.end = self.file.tell()

    def add(self, entries):
        """Append dicts, all of them or none."""
        for entry in entries:
            self.file.write(b"\n" if self.empty else b",\n")
            self.file.write(json.dumps(entry, ensure_ascii=False).encode())
            self.empty = False
        self.end = self.file.tell()

    def close(self):
        """Finish the file and move it into place."""
        self.file.seek(self.end)
        self.file.truncate()  # what Ctrl+C cut off in the middle
        self.file.write(f"\n]{self.tail}\n".encode())
        self.file.close()
        system.replace(self.temporary, self.path)


def category_table(id2label):
    """-> ({label: category id}, [{"id", "name"}, ...]): COCO's ids by name, 1001 and up for what COCO does not have."""
    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # 91 rows, the index is COCO's id
    coco = [{"id": i, "name": name} for i, name in enumerate(names) if name not in ("__background__", "N/A")]
    known = {label: i for i, label in label_table(coco, id2label, "COCO", unknown=None).items()}
    table = {label: known.get(label, 1001 + label) for label in id2label}
    return table, [{"id": table[label], "name": id2label[label]} for label in sorted(id2label)]


def image_ids(source):
    """-> iterator of ids: the numbers in the file names where all are such numbers (COCO's are), else 1, 2, 3, ..."""
    stems = [path.stem for path in getattr(source, "paths", ())]
    if stems and all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems):
        return map(int, stems)
    return itertools.count(1)
