"""Write a rainy twin of a data set: same folders and file names, annotations (COCO, Roboflow, YOLO, VOC) copied.

    python make_rain.py --coco ./dataset/coco --out ./dataset/coco_rain
    python make_rain.py --kind fog --coco ./dataset/coco --out ./dataset/coco_fog
    python make_rain.py --kind windshield --clear ./data/clear --out ./data/windshield_rainy_v40
    python make_rain.py --demo                     # procedural street scenes, a few seconds
    python make_rain.py --kind windshield --demo   # the same scenes through a wet windshield

Each image's weather depends only on SEED and its file name, so the result is the same for any number of workers.
A stopped run goes on where it was: finished files are kept, and a file appears only when it is complete. No file is
ever overwritten.
The weather itself is in utils/weather/rain.py (falling streaks, mist, fog) and utils/weather/windshield.py (drops on
glass); docs/rain.md and docs/windshield.md show and measure it.
"""

import filecmp
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin
from tqdm import tqdm

from utils import config, system
from utils.weather import rain, twin, windshield

KIND = "streaks"             # streaks: rain that falls through the scene; mist; fog; windshield: drops on glass
COCO = "./dataset/coco"      # for all but windshield, the clean data set: COCO, Roboflow's layout, YOLO or Pascal VOC
CLEAR = "./data/clear"       # for windshield, the clean images: one folder or nested ones, annotations not needed
OUT = ""                     # the twin; empty: ./dataset/coco_rain (coco_mist, coco_fog), ./data/windshield_rainy_v40
INTENSITY = "random"         # light, medium, heavy, or random: one of the three per image; mist and fog take no other
SEED = 0                     # another seed, other weather on every image
WORKERS = 0                  # processes; 0 means all cores

DEMO = {"COCO": "./demo/coco", "CLEAR": "./demo/coco", "INTENSITY": "heavy"}


class Kind(NamedTuple):
    """What the kinds of weather do differently."""

    source: str  # the constant that names the clean images
    layout: str  # what is expected there
    out: str  # where the twin goes if OUT is empty
    demo_out: str
    add: object  # function (image, rng, intensity) -> image; a worker gets it by its name
    version: object  # of the function's pixels
    graded: bool = True  # whether it is drawn by intensity


def _mist(image, rng, intensity):
    return rain.add_mist(image, rng)


def _fog(image, rng, intensity):
    return rain.add_fog(image, rng)


_STREAKS = Kind("COCO", "expected layout: <COCO>/annotations/*.json and folders with images such as "
                "<COCO>/train2017/*.jpg", "./dataset/coco_rain", "./demo/coco_rain_heavy", rain.add_rain, rain.VERSION)
_KINDS = {
    "streaks": _STREAKS,
    "mist": _STREAKS._replace(out="./dataset/coco_mist", demo_out="./demo/coco_mist", add=_mist, graded=False),
    "fog": _STREAKS._replace(out="./dataset/coco_fog", demo_out="./demo/coco_fog", add=_fog, graded=False),
    "windshield": Kind("CLEAR", "expected layout: images in <CLEAR> or in folders below it",
                       "./data/windshield_rainy_v40", "./demo/windshield_rainy_heavy",
                       windshield.add_windshield_rain, windshield.VERSION),
}
_TEMPORARY = ".rain-tmp"
_CHUNK = 8  # images a worker takes at a time
_SEVERAL, _TRANSPARENT = "hold several pictures, the twin has the first", "are transparent in places, the twin is not"


class Loaded(NamedTuple):
    """An image file."""

    picture: Image.Image  # how it is stored
    pixels: np.ndarray  # (H, W, 3) uint8, upright
    lost: tuple  # what of it a twin does not have: _SEVERAL, _TRANSPARENT


class Done(NamedTuple):
    """What became of an image."""

    fault: str | None = None  # why it could not be read
    lost: tuple = ()  # see Loaded


def find_images(source):
    """-> sorted paths, relative to source, of every image below it except in annotations/; links are followed."""
    return twin.files_of(source).images


def load_image(path):
    """-> Loaded. Raises on anything but a whole 8-bit image of a kind that can be written again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
        with Image.open(path) as picture:
            system.require_eight_bits(picture)
            if picture.format not in (*Image.SAVE, "MPO"):
                raise ValueError(f"a {picture.format} file, which can be read but not written: save it as PNG")
            lost = (_SEVERAL,) if _holds_several(picture) else ()
            pixels = np.asarray(system.upright(picture).convert("RGB"))
            if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
                lost += (_TRANSPARENT,)
            return Loaded(picture, pixels, lost)


def _holds_several(picture):
    """-> whether an open image has pages or frames; MPO is a photograph with small copies of itself."""
    with suppress(*system.FAULTS):  # a damaged page after a sound first one
        return picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1
    return True


def save_like(pixels, picture, target):
    """Write upright pixels as the picture is stored: its orientation, format and, for JPEG, quality. The target appears
    complete or not."""
    options = {key: picture.info[key] for key in ("exif", "icc_profile") if picture.info.get(key)}
    file_format = "JPEG" if picture.format == "MPO" else picture.format
    if file_format == "JPEG":
        colour = picture.mode == "RGB"  # grey and CMYK files become RGB: their profile and sampling do not fit
        if not colour:
            options.pop("icc_profile", None)
        options |= {"qtables": picture.quantization,
                    "subsampling": JpegImagePlugin.get_sampling(picture) if colour else -1}
    elif file_format == "WEBP":
        options["quality"] = 95
    stored = system.as_stored(Image.fromarray(pixels), system.orientation(picture))
    with system.written(target, _TEMPORARY) as temporary:
        stored.save(temporary, format=file_format, **options)


def rain_one(task, add=rain.add_rain):
    """One image in a worker process: (source, target, seed, intensity) -> Done.

    add: function (image, rng, intensity) -> image.
    """
    source, target, seed, intensity = task
    try:
        image = load_image(source)
    except system.FAULTS as error:
        return Done(f"{source} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    save_like(add(image.pixels, rain.rng_for(seed, source.name), intensity), image.picture, target)
    return Done(lost=image.lost)


def start_worker():
    """Worker initializer: Ctrl+C is the main process's business, and a worker does not outlive a killed one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def run_tasks(tasks, workers, add=rain.add_rain):
    """Yield rain_one's answers in the order of tasks, over processes (in this one for a single worker)."""
    function = partial(rain_one, add=add)
    workers = min(workers or system.available_cores(), 61, -(-len(tasks) // _CHUNK))  # 61: Windows' limit
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        yield from pool.map(function, tasks, chunksize=_CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


def check_source(source, kind):
    """-> twin.Files of the clean data set, or a UserError that says what is missing."""
    if not source.is_dir():
        raise config.UserError(f"{kind.source} = {source} is not a folder; {kind.layout}; set --{kind.source.lower()}, "
                               "or try --demo")
    if any(path.name == twin.ANNOTATIONS and path.is_dir() and not any(path.glob("*.json"))
           for path in source.iterdir()):  # by name: on Windows VOC's "Annotations" would be found as well
        raise config.UserError(f"{kind.source} = {source} has an annotations folder without *.json files; "
                               f"{kind.layout}")
    files = twin.files_of(source)
    if record := twin.twin_above(source):
        raise config.UserError(f"{kind.source} = {source} is rain that make_rain.py wrote ({record}): give the clean "
                               "images")
    if record := next((path for path in files.others if path.name == twin.RECORD), None):
        raise config.UserError(f"{kind.source} = {source} has rain in it that make_rain.py wrote ({record}): give the "
                               "folder of the clean images alone")
    if not files.images:
        raise config.UserError(f"{kind.source} = {source} has no images ({' '.join(system.SUFFIXES)}); "
                               f"{kind.layout}")
    return files


def require_listed(source, files, kind):
    """-> notes on what the twin will lack; UserError for images that an annotation file lists and that would be left
    out: they are there, but are of no kind that is read."""
    taken = {path.as_posix() for path in files.images}
    names = [name for name in twin.listed_images(source, files.annotations) if name not in taken]
    left_out = [name for name in names if (source / name).is_file()]
    if left_out:
        raise config.UserError(f"{len(left_out)} image(s) that the annotations list are of a kind that is not read "
                               f"({' '.join(system.SUFFIXES)}): {system.listed(left_out)}. Save them as one of these "
                               "and change the annotations.")
    notes = [f"{len(names)} image(s) that the annotations list are not there"] if names else []
    if files.others:
        kinds = Counter(path.suffix.lower() or "without an ending" for path in files.others)
        notes.append(f"{len(files.others)} file(s) of {kind.source} = {source} are not in the twin: "
                     f"{', '.join(f'{count} {ending}' for ending, count in kinds.most_common())} "
                     f"({system.listed([path.as_posix() for path in files.others], 3)}); images are "
                     f"{' '.join(system.SUFFIXES)}, annotations COCO's JSON, YOLO's text and VOC's XML")
    return notes


def prepare_out(source, out, annotations, settings, kind):
    """Create OUT and its rain.json, or check that what is there was made with the same settings, and that its
    annotations are the source's."""
    if out.resolve() == source.resolve():
        raise config.UserError(f"OUT and {kind.source} are the same folder ({out}): the clean images would be lost; "
                               "set --out")
    if source.resolve() in out.resolve().parents:
        raise config.UserError(f"OUT = {out} lies inside {kind.source} = {source}; set --out to a folder beside it")
    record = out / twin.RECORD
    try:
        if record.is_file():
            try:
                before = system.read_json(record)
            except ValueError:
                before = None
            if not isinstance(before, dict):
                raise config.UserError(f"{record} is damaged; delete OUT = {out} or set another --out")
            before = {"kind": "streaks", **before}  # written before there was another kind
            other = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in settings.items()
                     if before.get(key) != value]
            if other:
                raise config.UserError(f"OUT = {out} was made with other settings ({'; '.join(other)}): set another "
                                       f"--out or delete the folder (a data set that only moved: edit {record})")
        elif out.is_dir() and find_images(out):
            raise config.UserError(f"OUT = {out} holds images but no rain.json, so make_rain.py did not write them; "
                                   "set another --out")
        other = [path.as_posix() for path in annotations
                 if (out / path).exists() and not _equal(source / path, out / path)]
        if other:
            raise config.UserError(f"OUT = {out} holds {len(other)} annotation file(s) that are not those of "
                                   f"{kind.source} = {source} and will not be overwritten: {system.listed(other)}. "
                                   "Move or delete them to have the source's copied, or set another --out")
        out.mkdir(parents=True, exist_ok=True)
        if not record.is_file():
            with system.written(record, _TEMPORARY) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for left in out.rglob(f".*{_TEMPORARY}"):  # of a run that was killed
            left.unlink(missing_ok=True)
    except OSError as error:
        raise config.UserError(f"cannot write to OUT = {out} ({error}); set --out") from None


def _equal(one, other):
    """-> whether two files have one content; equal size and time will do."""
    if not other.is_file():
        return False
    state, others = one.stat(), other.stat()
    return state.st_size == others.st_size and (abs(state.st_mtime - others.st_mtime) < 2.0
                                                or filecmp.cmp(one, other, shallow=False))


def copy_annotations(source, out, names):
    """Copy the annotation files that are not there yet, each complete or not at all; names: relative to both."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not (out / name).exists():
            with system.written(out / name, _TEMPORARY) as temporary:
                shutil.copy2(source / name, temporary)


def notes_on(paths, answers):
    """-> lines about images of which the twin does not have all."""
    found = [(path.as_posix(), answer.lost) for path, answer in zip(paths, answers, strict=True)]
    return [f"{len(names)} image(s) {what}: {system.listed(names, 3)}" for what in (_SEVERAL, _TRANSPARENT)
            if (names := [name for name, lost in found if what in lost])]


def notes_on_older(source, out, kept):
    """-> a line about images that were kept from an earlier run although their clean ones have changed since."""
    older = sorted(path for path in kept if (source / path).stat().st_mtime > (out / path).stat().st_mtime)
    return [f"{len(older)} rainy image(s) are older than their clean ones and were kept "
            f"({system.listed([path.as_posix() for path in older], 3)}): where the clean ones have changed, delete "
            "these and run again"] if older else []


def require_intensity(cfg, kind):
    """UserError for an INTENSITY that is none, or that this kind does not have; the demo's own becomes "random"."""
    if not kind.graded:
        if cfg.INTENSITY != "random" and (not cfg.demo or "INTENSITY" in cfg.given):
            raise config.UserError(f"INTENSITY = {cfg.INTENSITY!r}: how dense {cfg.KIND} is, is drawn for every image; "
                                   "set it to 'random'")
        cfg.INTENSITY = "random"
    try:
        rain.check_intensity(cfg.INTENSITY)
    except ValueError as error:
        raise config.UserError(f"INTENSITY: {error}") from None


def main(**overrides):
    """Write the twin; -> {"written": int, "kept": int, "seconds": float}. UserError names every unreadable image."""
    cfg = config.resolve(globals(), overrides)
    if cfg.KIND not in _KINDS:
        raise config.UserError(f"KIND = {cfg.KIND!r} is unknown; valid: {', '.join(_KINDS)}")
    kind = _KINDS[cfg.KIND]
    source = Path(getattr(cfg, kind.source))
    out = Path(cfg.OUT or (kind.demo_out if cfg.demo else kind.out))
    if cfg.demo and source == Path(DEMO[kind.source]):
        from utils.demo.coco import ensure_demo
        try:
            ensure_demo()
        except OSError as error:
            raise config.UserError(str(error)) from None
    require_intensity(cfg, kind)
    if cfg.WORKERS < 0:
        raise config.UserError(f"WORKERS = {cfg.WORKERS} is negative; 0 means all cores")
    files = check_source(source, kind)
    for note in require_listed(source, files, kind):
        print(f"note: {note}")
    for other in {other.source for other in _KINDS.values()} & overrides.keys() - {kind.source}:
        print(f"note: {other} has no effect with KIND = {cfg.KIND!r}, whose clean images are {kind.source} = {source}")
    prepare_out(source, out, files.annotations,
                {"kind": cfg.KIND, "source": source.resolve().as_posix(), "seed": cfg.SEED,
                 "intensity": cfg.INTENSITY, "version": kind.version}, kind)
    started = time.perf_counter()
    try:
        copy_annotations(source, out, files.annotations)
        for folder in sorted({path.parent for path in files.images}):
            (out / folder).mkdir(parents=True, exist_ok=True)
        todo = [path for path in files.images if not (out / path).is_file()]
        tasks = [(source / path, out / path, cfg.SEED, cfg.INTENSITY) for path in todo]
        answers = list(tqdm(run_tasks(tasks, cfg.WORKERS, kind.add), total=len(tasks), unit="img", ascii=True,
                            desc=cfg.KIND))
    except OSError as error:
        raise config.UserError(f"cannot write to OUT = {out} ({error}); finished files are kept, run again") from None
    except BrokenProcessPool:
        raise config.UserError("a worker process died (out of memory?); finished files are kept: run again, "
                               "with fewer --workers") from None
    except KeyboardInterrupt:
        raise config.UserError("stopped; finished files are kept, run the same command to go on") from None
    seconds = time.perf_counter() - started
    bad = [answer.fault for answer in answers if answer.fault]
    report = {"written": len(tasks) - len(bad), "kept": len(files.images) - len(tasks), "seconds": seconds}
    for note in [*notes_on(todo, answers), *notes_on_older(source, out, set(files.images) - set(todo))]:
        print(f"note: {note}")
    print(f"{source} -> {out}\n"
          f"  weather      {cfg.KIND}{f', {cfg.INTENSITY}' if kind.graded else ''}, seed {cfg.SEED}\n"
          f"  annotations  {len(files.annotations)} file(s) copied\n"
          f"  images       {report['written']} written, {report['kept']} kept from an earlier run\n"
          f"  time         {seconds:.1f} s, {report['written'] / max(seconds, 1e-9):.1f} images/s")
    if bad:
        raise config.UserError(f"{len(bad)} image(s) could not be read, the others are finished: {', '.join(bad)}")
    return report


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
