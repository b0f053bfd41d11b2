"""Which boxes of a video are the same object: ByteTrack (Zhang et al., ECCV 2022), with motion alone.

Strong detections are matched to the tracks first, by the overlap with where each track should be by now; then the weak
ones to the tracks that are left, as an object in heavy rain or behind another one loses score before it is lost.
Written from the paper with NumPy and SciPy: supervision, which had it, removed it in 0.31, and its successor `trackers`
would bring opencv-python beside opencv-python-headless, two packages of one module.
Deviations: boxes are matched within their class; every coordinate (cx, cy, w, h) has a Kalman filter of its own.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou

LOW = 0.1             # weakest score that may continue a track
FIRST, SECOND = 0.2, 0.5  # overlap (IoU) that strong and weak boxes need at least
CONFIRMED = 2         # frames in a row that a new object must be seen in before it gets a number
LOST_SECONDS = 1.0    # so long a track waits for its object
_POSITION, _SPEED = 1 / 20, 1 / 160  # standard deviations, in heights of the object, as in SORT and ByteTrack


class Track:
    """One object: a Kalman filter with constant velocity over its box.

    Args:
        box: (4,) cx, cy, w, h pixels; label: its class.
    """

    def __init__(self, box, label):
        self.label, self.number, self.seen, self.missed = label, 0, 1, 0
        self.state = np.stack([box, np.zeros(4)], 1)  # (4, 2) value and velocity per frame
        size = box[3]
        self.spread = np.tile(np.diag([(2 * _POSITION * size) ** 2, (10 * _SPEED * size) ** 2]), (4, 1, 1))  # (4, 2, 2)

    @property
    def box(self):
        """(4,) cx, cy, w, h where the object should be now."""
        return self.state[:, 0]

    def predict(self):
        """One frame later."""
        move, size = np.array([[1.0, 1.0], [0.0, 1.0]]), max(self.box[3], 1.0)
        self.state = self.state @ move.T
        self.spread = move @ self.spread @ move.T + np.diag([(_POSITION * size) ** 2, (_SPEED * size) ** 2])
        self.state[2:, 0] = np.maximum(self.state[2:, 0], 1.0)  # a box that shrinks stays a box

    def correct(self, box):
        """The object was seen, at cx, cy, w, h."""
        noise = (_POSITION * max(self.box[3], 1.0)) ** 2
        gain = self.spread[:, :, 0] / (self.spread[:, 0, 0] + noise)[:, None]  # (4, 2)
        self.state = self.state + gain * (box - self.state[:, 0])[:, None]
        self.spread = self.spread - gain[:, :, None] * self.spread[:, :1, :]
        self.seen, self.missed = self.seen + 1, 0


class Tracker:
    """Numbers for the objects of a video, from 1 on.

    Args:
        fps: frames per second of the video.
    """

    def __init__(self, fps):
        self.patience, self.tracks, self.count = max(1, round(LOST_SECONDS * fps)), [], 0

    def update(self, one, strong):
        """Match a frame's detections.

        Args:
            one: {"boxes": (n, 4) xyxy pixels, "scores", "labels": (n,)}; strong: (n,) bool, what counts by itself; the
                others may only continue a track.
        Returns:
            (n,) int64 numbers of the objects, 0 where there is none (yet).
        """
        for track in self.tracks:
            track.predict()
            track.missed += 1
        boxes = box_convert(one["boxes"].double(), "xyxy", "cxcywh").numpy()
        labels, strong = one["labels"].tolist(), strong.tolist()
        numbers = torch.zeros(len(labels), dtype=torch.int64)
        free = list(self.tracks)
        taken = set()
        for wanted, least in ((True, FIRST), (False, SECOND)):
            candidates = [i for i, value in enumerate(strong) if value == wanted]
            for i, track in self._pairs(one["boxes"], labels, candidates, free, least):
                track.correct(boxes[i])
                numbers[i] = self._number(track)
                free.remove(track)
                taken.add(i)
            free = [track for track in free if track.number]  # a weak box does not confirm a new object
        self.tracks += [Track(boxes[i], labels[i]) for i, value in enumerate(strong) if value and i not in taken]
        self._forget()
        return numbers

    def pass_by(self):
        """A frame without an image: time goes on."""
        for track in self.tracks:
            track.predict()
            track.missed += 1
        self._forget()

    def _pairs(self, boxes, labels, candidates, tracks, least):
        """-> [(detection, Track), ...] with the largest overlap in all, each at least `least`, of the same class."""
        if not candidates or not tracks:
            return []
        expected = box_convert(torch.from_numpy(np.stack([track.box for track in tracks])), "cxcywh", "xyxy")
        overlap = box_iou(boxes[candidates].double(), expected).numpy()
        overlap[np.array([[labels[i] != track.label for track in tracks] for i in candidates])] = 0
        overlap[overlap < least] = 0
        return [(candidates[i], tracks[j]) for i, j in zip(*linear_sum_assignment(overlap, maximize=True), strict=True)
                if overlap[i, j] > 0]

    def _number(self, track):
        if not track.number and track.seen >= CONFIRMED:
            self.count += 1
            track.number = self.count
        return track.number

    def _forget(self):
        """New objects go when they are missed once, known ones after `patience` frames."""
        self.tracks = [track for track in self.tracks if track.missed <= (self.patience if track.number else 0)]


def selected(one, keep):
    """One image's detections -> those where keep (n,) is True."""
    return {key: [mask for mask, kept in zip(value, keep.tolist(), strict=True) if kept] if key == "masks" else
            value[keep] for key, value in one.items()}


def follow(tracker, one, thresholds):
    """-> a frame's detections with "tracks": (n,) numbers, 0 for none; of the weak ones those alone that have one."""
    strong = one["scores"] >= thresholds[one["labels"]]
    numbers = tracker.update(one, strong)
    objects = {key: one[key] for key in ("boxes", "scores", "labels", "masks") if key in one} | {"tracks": numbers}
    return one | selected(objects, strong | (numbers > 0))
