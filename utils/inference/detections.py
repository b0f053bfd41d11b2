"""What detect.py writes beside the pictures: detections.json in COCO's result format, images.json about every image."""

import itertools
import json
import os
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from utils import system
from utils.datasets.annotations import label_table


class Results:
    """The two files of one run, written as the frames come.

    Args:
        folder: where they go; source: from video.open_source; id2label: of the detector.
    """

    def __init__(self, folder, source, id2label):
        self.source, self.ids = source, image_ids(source)
        self.category_of, categories = category_table(id2label)
        self.boxes = JsonList(Path(folder) / "detections.json")
        self.images = JsonList(Path(folder) / "images.json", f'{{"categories": {json.dumps(categories)},\n"images": ',
                               "}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.boxes.close()
        self.images.close()

    def add(self, frame, one):
        """Append a video.Frame's entry, and the detections in `one` (see detect.detect_frames; None: no image)."""
        image_id = next(self.ids)
        entry = {"id": image_id, "file_name": frame.name if frame.number is None else self.source.name}
        if frame.number is not None:
            entry |= {"frame": frame.number, "seconds": round(frame.seconds, 4)}
        if one is None:
            self.images.add([entry | {"problem": frame.problem or "no picture at this time, the last one is held"}])
            return
        entry["height"], entry["width"] = frame.image.shape[-2:]
        if one["branch"]:
            entry |= {"rain_probability": round(one["rain"], 5), "branch": one["branch"]}
        self.images.add([entry])
        self.boxes.add({"image_id": image_id, "category_id": self.category_of[label],
                        "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)], "score": round(score, 5)}
                       for label, score, (x1, y1, x2, y2) in
                       zip(one["labels"].tolist(), one["scores"].tolist(), one["boxes"].tolist(), strict=True))


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
