"""Images, folders, videos and cameras as one stream of frames, and a writer of videos.

A stream decodes one frame when it is asked for one, so memory does not grow with a video's length. Videos and cameras
need OpenCV (Apache-2.0), which is imported on first use; images do not.

What OpenCV tells about damage (tried with 4.14 and 5.0): a packet that cannot be decoded makes one grab() fail, and the
next one goes on; lost packets show as a jump of the time stamps, and frames are missing at the end. A picture that
FFmpeg has patched up cannot be told from a sound one.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import datasets, system
from utils.config import UserError

FALLBACK_FPS = 30.0   # where a camera does not tell
LONGEST_GAP = 300     # frames in a row that may be missing; then the video counts as ended
_OF_SEVERAL = (".png", ".webp", ".tif", ".tiff")  # image files that can hold more than one picture
PREVIEW = 480         # longer side of `for_browsers`
_CODECS = {".mp4": "mp4v", ".webm": "VP80"}  # those of every OpenCV wheel; H.264 is in none of them
TOLERANCE = 0.02      # many files announce a few frames more than they hold: their number is duration times rate


@dataclass
class Frame:
    """One image of a stream, or the place of one that is not there."""

    name: str                          # file name; of a video "clip.mp4 frame 12"
    image: torch.Tensor | None = None  # (3, H, W) uint8 RGB
    number: int | None = None          # in a video, from 0
    seconds: float | None = None       # since its start
    problem: str | None = None         # why there is no image; neither image nor problem: a pause, hold the last one


class ImageFiles:
    """A stream of image files. A broken one becomes a Frame with its `problem`.

    `paths` are all of them, `total` of them come: see `take`.
    """

    fps, live, cut_short = None, False, None

    def __init__(self, paths, notes=()):
        self.paths = list(paths)
        self.name = self.paths[0].name
        self.notes = list(notes)
        self.take()

    def take(self, limit=0, done=(), share=(0, 1)):
        """Choose what comes: of the first `limit` files (0: of all) those whose names are not in `done`, of these every
        n-th from the k-th on, share = (k, n)."""
        left = [path for path in self.paths[:limit or None] if path.name not in done]
        self.chosen = left[share[0]::share[1]]
        self.total = len(self.chosen)

    def __iter__(self):
        for path in self.chosen:
            try:
                yield Frame(path.name, datasets.read_image(path))
            except UserError as error:
                yield Frame(path.name, problem=str(error))

    def writer(self, folder):
        """-> a writer of one picture per image; see PictureWriter."""
        return PictureWriter(folder)

    def close(self):
        """Nothing is open between two images."""


class Video:
    """A stream of a video's or a camera's frames.

    Every frame keeps its place in time: one that cannot be decoded comes as a Frame with a `problem`, and where the
    time stamps jump (lost packets, a variable frame rate, a camera that is faster than the model) Frames without image
    and problem fill the gap. After the last frame `cut_short` says in words if there were fewer than announced.

    Args:
        address: path, URL, or number of a camera; name: for files and messages; constant: for the error.
    """

    def __init__(self, address, name, constant="SOURCE"):
        cv2 = opencv(f"{constant} = '{address}'")
        self.name, self.notes = name, []
        self.capture = cv2.VideoCapture(address if isinstance(address, int) else str(address))
        if not self.capture.isOpened():
            advice = ("no camera of that number, or another program uses it" if isinstance(address, int) else
                      "no answer from there, or no stream that OpenCV can read" if "://" in str(address) else
                      f"not a video that OpenCV can read, and no image ({' '.join(system.SUFFIXES)})")
            raise UserError(f"{constant} = '{address}' cannot be opened: {advice}")
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else FALLBACK_FPS
        announced = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.total = int(announced) if 0 < announced < 2**31 else None
        self.live = isinstance(address, int) or ("://" in str(address) and self.total is None)
        if self.live:
            self.capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not a queue of old ones
        self.cut_short = None
        self._milliseconds = cv2.CAP_PROP_POS_MSEC

    def __iter__(self):
        number, failed, known, begin = 0, 0, 0, None  # known: frames that were read or reported one by one
        while True:
            if not self.capture.grab():
                failed += 1
                if failed > min(LONGEST_GAP, (self.total or 0) - number):
                    break
                continue
            for _ in range(failed):
                yield self._frame(number, problem="cannot be decoded")
                number += 1
            known, failed = known + failed + 1, 0
            seconds = time.perf_counter() if self.live else self.capture.get(self._milliseconds) / 1000
            begin = seconds - number / self.fps if begin is None else begin
            late = round((seconds - begin) * self.fps) - number
            if late >= 2:  # one frame is rounding
                for _ in range(min(late, LONGEST_GAP)):
                    yield self._frame(number)
                    number += 1
                begin += max(0, late - LONGEST_GAP) / self.fps  # the rest of a longer gap is forgotten
            good, pixels = self.capture.retrieve()
            if good:
                yield self._frame(number, torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1])).permute(2, 0, 1))
            else:
                yield self._frame(number, problem="cannot be decoded")
            number += 1
        if self.live:
            self.cut_short = f"{self.name} gives no more pictures"
        elif self.total and self.total - known > max(1, TOLERANCE * self.total):
            self.cut_short = (f"{self.name} announces {self.total} frames, but only {known} are there: it is damaged "
                              "or was cut off")

    def _frame(self, number, image=None, problem=None):
        name = f"{self.name} frame {number}"
        return Frame(name, image, number, number / self.fps, problem and f"{name} {problem}")

    def writer(self, folder):
        """-> a writer of a video with the same rate and number of frames; see VideoWriter."""
        stem = re.sub(r'[<>:"|?*]', "_", Path(self.name).stem) or "stream"  # what Windows refuses in a file name
        return VideoWriter(Path(folder) / f"{stem}.mp4", self.fps)

    def close(self):
        """Let the file or the camera go."""
        self.capture.release()


class PictureWriter:
    """Write pictures into a folder under the names of their sources, in the same file format."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Nothing is open between two pictures."""

    def write(self, picture, name):
        """Save a PIL image. -> None, or what the file format has against it (WebP ends at 16383 pixels)."""
        try:
            picture.save(self.folder / name, quality=92)
        except ValueError as error:
            return f"{name} cannot be written: {error}"
        return None

    def hold(self):
        """No picture for a broken image."""


class VideoWriter:
    """Write pictures into an .mp4 file (MPEG-4 part 2) or a .webm file (VP8), which appears when it is complete.

    The first picture sets the size; an odd side loses its last row or column, which the format does not know.

    Args:
        path: the file; fps: its frame rate.
    """

    def __init__(self, path, fps):
        self.path, self.fps = Path(path), fps
        self.temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}{system.TEMPORARY}{self.path.suffix}")
        self.writer, self.last, self.owed = None, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Close the file also after an error or Ctrl+C: what was written until then stays."""
        if self.writer is not None:
            self.writer.release()
            if not self.temporary.is_file() or not self.temporary.stat().st_size:
                raise UserError(f"cannot write the video {self.path.as_posix()}: is the disk full?")
            system.replace(self.temporary, self.path)

    def write(self, picture, name=""):
        """Append a PIL image, RGB; its `name` has no place in a video."""
        pixels = np.ascontiguousarray(np.asarray(picture)[..., ::-1])
        if self.writer is None:
            self._open(pixels)
        if pixels.shape != self.last.shape:  # OpenCV would drop it without a word
            pixels = opencv("a video").resize(pixels, self.last.shape[1::-1])
        self.last = pixels
        self.writer.write(pixels)

    def hold(self):
        """Append the last picture once more (black before the first one), so that the time line stays right."""
        if self.writer is None:
            self.owed += 1
        else:
            self.writer.write(self.last)

    def _open(self, pixels):
        cv2, codec = opencv(f"writing {self.path.name}"), _CODECS[self.path.suffix]
        height, width = pixels.shape[:2]
        self.writer = cv2.VideoWriter(str(self.temporary), cv2.VideoWriter_fourcc(*codec), self.fps, (width, height))
        if not self.writer.isOpened():
            self.writer = None
            raise UserError(f"cannot write the video {self.path.as_posix()} ({width}x{height}, {self.fps:g} frames/s): "
                            f"this OpenCV has no {codec} encoder, or the folder is not writable")
        self.last = np.zeros_like(pixels)
        for _ in range(self.owed):
            self.writer.write(self.last)


def for_browsers(path):
    """Copy a video into a .webm file (VP8) beside it, PREVIEW pixels on the longer side at most: no browser plays the
    .mp4 files of VideoWriter, and VP8 takes OpenCV fifty times as long. -> its Path

    Raises:
        UserError: not to be read, or no encoder in this OpenCV.
    """
    cv2, copy = opencv("a video for browsers"), Path(path).with_suffix(".webm")
    with (contextlib.closing(Video(path, Path(path).name, "the video")) as source,
          VideoWriter(copy, source.fps) as writer):
        for frame in source:
            if frame.image is None:
                writer.hold()
                continue
            pixels = frame.image.permute(1, 2, 0).numpy()
            share = min(1.0, PREVIEW / max(pixels.shape))
            size = [max(2, round(share * side / 2) * 2) for side in pixels.shape[1::-1]]
            writer.write(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    return copy


def opencv(what):
    """-> the module cv2; UserError that says how to get it, naming `what` needs it."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # damage is reported by us, once per frame
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"{what}: videos and cameras need OpenCV ({error}); pip install opencv-python-headless"
                        ) from None
    return cv2


def open_source(source, constant="SOURCE"):
    """An image, a folder of images, a video file, a camera's number ("0") or a stream's URL as a stream of frames.

    Returns:
        ImageFiles or Video: iterate over it for Frames; `name`, `total` (frames, None where nobody knows), `fps` (None
        for images), `live` (a camera or URL), `cut_short` (None, or what was missing at the end), `notes` (lines on
        what is left out), `close()`.
    Raises:
        UserError: empty, missing, unreadable, or a folder without images.
    """
    if not source:
        raise UserError(f"{constant} is empty: give an image, a folder, a video or a camera's number, or try --demo")
    if source.isdecimal() and not Path(source).exists():
        return Video(int(source), f"camera{int(source)}", constant)
    if "://" in source:
        return Video(source, source.rstrip("/").rsplit("/", 1)[-1] or "stream", constant)
    path = Path(source)
    if path.is_dir():
        found = system.images_in(path, below=False)
        if not found:
            below = sorted({image.parent.as_posix() for image in system.images_in(path)})
            raise UserError(f"{constant} = '{path.as_posix()}' is a folder without images "
                            f"({' '.join(system.SUFFIXES)}); " + (f"there are some in {system.listed(below, 3)}: give "
                            "one of these" if below else "videos are given one by one"))
        return ImageFiles(found, _left_out(path, found, constant))
    if not path.is_file():
        raise UserError(f"{constant} = '{path.as_posix()}' does not exist; give an image, a folder, a video or a "
                        "camera's number, or try --demo")
    if not system.is_image(path):
        return Video(path, path.name, constant)
    return ImageFiles([path], _frames_left_out([path], constant))


def _left_out(folder, images, constant):
    """-> lines about what lies in a folder and is not looked at: images below it, other files, further frames."""
    notes, begin = [], f"{constant} = '{folder.as_posix()}'"
    if below := len(system.images_in(folder)) - len(images):
        notes.append(f"{begin}: {below} image(s) in its folders are not looked at; give those folders one by one")
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and not system.is_image(path)
                    and not path.name.startswith("."))
    if {"detections.json", "images.json"} <= set(others):
        notes.append(f"{begin} holds results of detect.py: boxes are drawn on its pictures, which the detector sees")
    if others:
        notes.append(f"{begin}: {len(others)} file(s) that are no images ({' '.join(system.SUFFIXES)}) are left out: "
                     f"{system.listed(others)}")
    return notes + _frames_left_out(images, constant)


def _frames_left_out(paths, constant):
    """-> a line about image files that hold several pictures, of which only the first is looked at."""
    several = []
    for path in paths:
        if path.suffix.lower() not in _OF_SEVERAL:
            continue
        with contextlib.suppress(*system.FAULTS), Image.open(path) as image:
            several += [path.name] if getattr(image, "n_frames", 1) > 1 else []
    return [f"{constant}: {len(several)} file(s) hold several pictures, of which the first is looked at: "
            f"{system.listed(several)}"] if several else []
