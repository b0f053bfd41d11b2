"""Try the detectors in a browser: drop an image or a clip onto a page that this machine serves to itself.

    pip install -r requirements-app.txt
    python app.py --demo                                          # the small weights of assets/demo/, no network
    python app.py --rtdetr-model-name ./outputs_rtdetr/detector --model vanilla

The page shows the picture before and after de-raining, the boxes, the rain probability and the branch that ran; of a
clip the annotated video, and the files that detect.py writes. Every model is one of detect.py's, built and drawn by it.
Nothing leaves the machine: no tunnel, no analytics, no fonts or scripts from elsewhere. docs/detect.md tells more.
"""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import utils.threads  # noqa: F401 (before torch)

import torch
from PIL import Image

import detect
from utils import config, processes, system, visualize
from utils.demo.clip import ensure_clip
from utils.inference import detections, detectors, pictures, video

# --- the page -----------------------------------------------------------------------------------------------------
HOST = "127.0.0.1"                      # this machine alone; "0.0.0.0" lets everybody use it who reaches this machine
PORT = 7860                             # of the address in the browser
MAX_UPLOAD_MB = 200                     # larger files are refused
MAX_FRAMES = 900                        # of a clip, the rest is left out: half a minute of 30 frames per second
THRESHOLD = 0.5                         # score from which on a box is drawn, where the slider stands at first

# --- models -------------------------------------------------------------------------------------------------------
MODEL = "conditional"                   # the one of CHOICES that is chosen at first
CHOICES = {                             # {name on the page: constants of detect.py}; absent ones are not offered
    "conditional": {"MODEL": "conditional"},
    "conditional, specialist": {"MODEL": "conditional", "RAINY_BRANCH": "./outputs_rtdetr_rain/detector"},
    "conditional, adapter": {"MODEL": "conditional", "RAINY_BRANCH": "./outputs_adapter/rain.safetensors"},
    "spdnet": {"MODEL": "spdnet"}, "feature": {"MODEL": "feature"}, "vanilla": {"MODEL": "vanilla"},
    "rfdetr": {"MODEL": "rfdetr", "WEIGHTS": "./runs/segmentation_nano_384_1/best.pt"},
    "exported": {"MODEL": "exported", "WEIGHTS": "./outputs_export/manifest.json"},
}
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id or folder
SPDNET_MODEL_PATH = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # from Training_SPDNet_Adaptation.py
RAIN_DETECTOR_PATH = "./rain_detector_pretrained/rain_detector_best.pt"  # from Training_RainDetector.py
FEATURE_MODEL_DIR = "./outputs_feature_derain/model"  # of feature, from Training_FeatureDerain.py
RAIN_THRESHOLD: float | None = 0.5      # an image is rainy from this probability on; None: the rain detector's own
DERAIN_SCALE = 1.0                      # 0.5: SPDNet sees half the size, a quarter of the cost; as in its training
IMAGE_SIZE = 640                        # side of the square that the models see, as in training

DEMO = {
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "SPDNET_MODEL_PATH": "./assets/demo/spdnet_adapted.pt",
    "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt", "DERAIN_SCALE": 0.5, "IMAGE_SIZE": 160,
    "FEATURE_MODEL_DIR": "./demo/outputs_feature_derain/model",
    "CHOICES": CHOICES | {
        "conditional, specialist": {"MODEL": "conditional", "RAINY_BRANCH": "./assets/demo/rtdetr_specialist"},
        "conditional, adapter": {"MODEL": "conditional", "RAINY_BRANCH": "./demo/outputs_adapter/rain.safetensors"},
        "rfdetr": {"MODEL": "rfdetr", "WEIGHTS": "./assets/demo/rfdetr_tiny.pth"},
        "exported": {"MODEL": "exported", "WEIGHTS": "./demo/outputs_export/manifest.json"},
    },
}
_SHARED = ("RTDETR_MODEL_NAME", "SPDNET_MODEL_PATH", "RAIN_DETECTOR_PATH", "FEATURE_MODEL_DIR", "RAIN_THRESHOLD",
           "DERAIN_SCALE", "IMAGE_SIZE", "MAX_FRAMES", "THRESHOLD")
_OF_THE_PAGE = {"SOURCE": "", "RESUME": False, "OUTPUT": "", "COMPARE": False, "SHOW_DERAINED": False, "FAST": ()}
_CLIPS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")  # FFmpeg would follow a playlist
_BEGINS = re.compile(  # their first bytes: MPEG-4 and QuickTime, AVI, Matroska, MPEG, its transport stream, ASF
    rb"....(ftyp|styp|moov|mdat|wide|free|skip|pnot|uuid)|RIFF|\x1aE\xdf\xa3|\x00\x00\x01[\xba\xb3]|G|0&\xb2u",
    re.DOTALL)
_LONGEST = 65500  # pixels; a JPEG, as which the page shows pictures, ends there
_HEADERS = ["class", "score", "x", "y", "width", "height"]
# the browser itself refuses what would leave this machine; Gradio's page needs inline and evaluated scripts
_POLICY = (b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
           b"style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'")


# --- models -------------------------------------------------------------------------------------------------------

class Choices:
    """The models of the page. Each is built when it is first asked for, and kept.

    Args:
        cfg: the script's constants; device: where models run.
    Raises:
        UserError: constants that no model could be built with, or MODEL cannot be.
    """

    def __init__(self, cfg, device):
        self.device, self.built = device, {}
        self.settings = {name: settings_of(cfg, name) for name in cfg.CHOICES}
        self.reasons = {name: reason for name, own in self.settings.items() if (reason := detectors.missing(own))}
        self.offered = [name for name in self.settings if name not in self.reasons]
        if cfg.MODEL not in self.settings:
            raise config.UserError(f"MODEL = {cfg.MODEL!r} is not among CHOICES: choose one of "
                                   f"{', '.join(self.settings) or 'nothing, as it is empty'}")
        if cfg.MODEL in self.reasons:
            raise config.UserError(f"MODEL = {cfg.MODEL!r}: {self.reasons[cfg.MODEL]}; there are the files of "
                                   f"{', '.join(self.offered) or 'none'}; choose another MODEL, or try --demo")

    def get(self, name, threshold=None):
        """-> (detect.py's constants, {name: model} of detect.build_models); threshold: None keeps the constant's.

        Raises:
            UserError: not offered, its weights are damaged or of something else, or no such threshold.
        """
        if name not in self.offered:
            raise config.UserError(f"{name} is not offered: {self.reasons.get(name, 'there is no such choice')}")
        own = self.settings[name]
        if name not in self.built:
            models = detect.build_models(own, self.device)
            detectors.score_thresholds(own, detectors.classes_of(models[own.MODEL]))
            detect.note_other_sizes(own)
            self.built[name] = models
        asked = own.THRESHOLD if threshold is None else threshold
        own = config.Config(**vars(own) | {"THRESHOLD": asked})
        detect.require_usable(own)
        return own, self.built[name]


def settings_of(cfg, name):
    """-> config.Config of detect.py's constants for an entry of CHOICES: its own, those at the top of this script,
    those at the top of detect.py."""
    entry = cfg.CHOICES[name]
    try:
        if not isinstance(entry, dict):
            raise config.UserError(f"give a dict of detect.py's constants, not {entry!r}")
        if not all(isinstance(one, str) for one in (name, *entry)):
            raise config.UserError("write names of choices and of constants as text, in quotes")
        if taken := {*_OF_THE_PAGE, "THRESHOLD", "demo"} & entry.keys():  # the threshold is a slider
            raise config.UserError(f"{system.listed(sorted(taken))} is the page's own: leave it out")
        own = config.resolve(vars(detect) | _OF_THE_PAGE, {one: getattr(cfg, one) for one in _SHARED} | entry)
        own.given = frozenset(entry) | cfg.given & set(_SHARED)  # what stands at the top of this script is not
        detect.require_usable(own)
    except config.UserError as error:
        raise config.UserError(f"CHOICES[{name!r}]: {error}") from None
    return own


# --- what the page shows ------------------------------------------------------------------------------------------

class Picture(NamedTuple):
    """An image's answer. `before` and `after` are for the slider, PIL images of one size."""

    picture: Image.Image  # with boxes, as detect.py writes it
    before: Image.Image
    after: Image.Image    # what the detector saw where it was de-rained, else `picture`
    derained: bool        # which of the two
    rows: list            # of the table: class, score, x, y, width, height in pixels, best first
    line: str             # rain, branch, number of objects, ms
    note: str             # "" or what the user should know


class Clip(NamedTuple):
    """A clip's answer."""

    shown: Path | None    # .webm that browsers play, at most 480 pixels on its longer side
    files: list           # .mp4, detections.json, images.json, as detect.py writes them
    line: str
    note: str


def opened(path):
    """An uploaded file -> a stream of frames, see video.open_source.

    Raises:
        UserError: neither an image nor a clip, or not to be read.
    """
    path = Path(path)
    if not system.is_image(path) and path.suffix.lower() not in _CLIPS:
        raise config.UserError(f"{path.name} is neither an image ({' '.join(system.SUFFIXES)}) nor a clip "
                               f"({' '.join(_CLIPS)})")
    if path.suffix.lower() in _CLIPS and not begins_as_clip(path):
        raise config.UserError(f"{path.name} does not begin as a clip does ({' '.join(_CLIPS)}): is it a whole video?")
    return video.open_source(str(path), "the file")


def begins_as_clip(path):
    """-> whether a file begins as those of _CLIPS do. FFmpeg goes by the content, not by the name: a playlist that is
    called .mp4 would have it open other files."""
    with open(path, "rb") as file:
        return bool(_BEGINS.match(file.read(8)))


@contextlib.contextmanager
def by_name(path):
    """Within, a UserError names an uploaded file as the user knows it, without the folder that it lies in."""
    path = Path(path)
    try:
        yield
    except config.UserError as error:
        raise config.UserError(str(error).replace(str(path), path.name).replace(path.as_posix(), path.name)) from None


def look_at_image(choices, name, path, threshold):
    """Detect in an uploaded image. -> Picture

    Args:
        choices: Choices; name: one that is offered; path: of the file; threshold: score in [0, 1].
    Raises:
        UserError: see `opened` and Choices.get.
    """
    own, models = choices.get(name, threshold)
    own.TRACK = False  # there is nothing to follow
    with by_name(path), contextlib.closing(opened(path)) as source:
        frame = next(iter(source))
        if frame.problem:
            raise config.UserError(frame.problem)
        if max(frame.image.shape) > _LONGEST:
            raise config.UserError(f"{frame.name} is longer than the {_LONGEST} pixels that the page can show: use "
                                   "detect.py")
        begin = time.perf_counter()
        (result,), fallbacks = detect.detect_frames(own, models, [frame], choices.device)
        milliseconds = 1000 * (time.perf_counter() - begin)
        notes = [note.replace("the file: ", "") for note in source.notes]
    one, id2label = result[own.MODEL], detectors.classes_of(models[own.MODEL])
    picture, before = pictures.draw(own, frame.image, result, id2label), visualize.to_pil(frame.image)
    derained = one["seen"] is not None and not torch.equal(one["seen"], one["given"])  # else a branch without de-rainer
    after = pictures.draw_seen(one, before.size) if derained else picture
    category_of, categories = detections.category_table(id2label)
    names = {entry["id"]: entry["name"] for entry in categories}
    image, boxes = detections.entries(frame, one, category_of, polygons=False)
    rows = [[names[box["category_id"]], box["score"], *box["bbox"]] for box in boxes]
    rain = [f"rain {image['rain_probability']:.2f}, {image['branch']} branch"] if "branch" in image else []
    line = f"{name}: " + ", ".join([*rain, counted(row[0] for row in rows), f"{milliseconds:.0f} ms"])
    if fallbacks:
        notes.append("the de-rainer's answer was no picture, so the detector saw the image as it came")
    return Picture(picture, before, after, derained, rows, line, "; ".join(notes + nothing(rows, own.THRESHOLD)))


def look_at_clip(choices, name, path, threshold, folder):
    """Detect in an uploaded clip, as detect.py does, into a folder of its own. -> Clip

    Args:
        folder: exists and is empty; the rest as of look_at_image.
    """
    own, models = choices.get(name, threshold)
    folder = Path(folder)
    with by_name(path), contextlib.closing(opened(path)) as source:
        tally = detect.run(own, models, source, folder, choices.device)
        announced = source.total
    if not tally.images:
        raise config.UserError(f"{Path(path).name} holds no frame that can be read: " + (
            system.listed(tally.problems, 1, total=tally.problem_count) or "is it a whole video?"))
    written_of = json.loads((folder / "images.json").read_text(encoding="utf-8"))
    names = {entry["id"]: entry["name"] for entry in written_of["categories"]}
    # clips that a browser has recorded do not say how long they are
    longer = own.MAX_FRAMES and (announced > own.MAX_FRAMES if announced else
                                 len(written_of["images"]) >= own.MAX_FRAMES)
    boxes = json.loads((folder / "detections.json").read_text(encoding="utf-8"))
    (written,) = folder.glob("*.mp4")
    notes = [f"only the first {own.MAX_FRAMES} frames were looked at (MAX_FRAMES)"] if longer else []
    if tally.problem_count:
        notes.append(system.listed(tally.problems, 3, separator="; ", total=tally.problem_count))
    try:
        shown = video.for_browsers(written)
    except config.UserError as error:
        shown, notes = None, [*notes, f"the page cannot play the clip, but you can save it ({error})"]
    switches = [f"from frame {one['frame']} the {one['branch']} branch" for one in tally.switches]
    line = "; ".join([f"{name}: {tally.images} frames, boxes: {counted(names[box['category_id']] for box in boxes)}, "
                      f"{1000 * tally.model_seconds / tally.images:.0f} ms per frame",
                      *([system.listed(switches, 6, total=tally.switch_count)] if switches else [])])
    files = [written, folder / "detections.json", folder / "images.json"]
    return Clip(shown, files, line, "; ".join(notes + nothing(boxes, own.THRESHOLD)))


def counted(names):
    """-> "3 car, 1 person", the largest number first; "no objects" for none."""
    found = Counter(names).most_common()
    return ", ".join(f"{count} {name}" for name, count in found) or "no objects"


def nothing(found, threshold):
    """-> [] or [what to do where nothing was found]."""
    return [] if found else [f"no object has a score of {threshold:.2f} or more: try a lower threshold"]


# --- the page -----------------------------------------------------------------------------------------------------

def gradio_module():
    """-> the module gradio, which asks nobody for its newest version; UserError that says how to get it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise config.UserError(f"app.py needs gradio ({error}): pip install -r requirements-app.txt") from None
    return gradio


class SelfOnly:
    """ASGI middleware: pages carry _POLICY, so that the browser asks no other machine for anything.

    Args:
        app: the application behind it.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)
        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def page(cfg, choices, folder):
    """-> gradio.Blocks of the page; folder: for the files of clips."""
    gradio = gradio_module()
    with gradio.Blocks(title="RainSight", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown("# RainSight\nObjects in bad weather. All is computed on the machine that serves this page.")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                file = gradio.File(label="Image or clip", type="filepath", elem_id="file")
                name = gradio.Dropdown(choices.offered, value=cfg.MODEL, label="Model", elem_id="model")
                threshold = gradio.Slider(0.0, 1.0, value=cfg.THRESHOLD, step=0.01, label="Threshold of the score")
                button = gradio.Button("Detect", variant="primary", elem_id="detect")
                if examples := demo_files() if cfg.demo else []:
                    gradio.Examples([[str(path)] for path in examples], [file], label="Drawn by the demo")
                if choices.reasons:
                    with gradio.Accordion("Not offered", open=False):
                        gradio.Markdown("\n".join(f"- {one}: {why}" for one, why in choices.reasons.items()))
            with gradio.Column(scale=3):
                line = gradio.Markdown("Drop an image or a clip, then press Detect.", elem_id="line")
                shown = {
                    "slider": gradio.ImageSlider(label="Before and after", format="jpeg", interactive=False,
                                                 visible=False, elem_id="slider", buttons=["fullscreen"]),
                    "picture": gradio.Image(label="Boxes", format="jpeg", interactive=False, visible=False,
                                            elem_id="picture", buttons=["download", "fullscreen"]),
                    "table": gradio.Dataframe(headers=_HEADERS, interactive=False, visible=False, elem_id="table",
                                              label="Detections, in pixels"),
                    "clip": gradio.Video(label="Clip with boxes", interactive=False, visible=False, elem_id="clip"),
                    "files": gradio.File(label="Files, as detect.py writes them", interactive=False, visible=False,
                                         elem_id="files")}
        answer = answering(gradio, choices, folder, line, shown)
        button.click(answer, [file, name, threshold], [line, *shown.values()], concurrency_limit=1,
                     api_visibility="private")
    return blocks.queue(max_size=8, api_open=False)


def answering(gradio, choices, folder, line, shown):
    """-> what the button calls: (path, name, threshold) -> updates of `line` and of the components in `shown`."""
    def answer(path, name, threshold, progress=gradio.Progress(track_tqdm=True)):  # noqa: B008 (gradio looks for it)
        try:
            if not path:
                raise config.UserError("choose an image or a clip first")
            if system.is_image(path):
                found = look_at_image(choices, name, path, threshold)
                values = {"picture": {"value": found.picture}, "table": {"value": found.rows}, "slider": {
                    "value": (found.before, found.after),
                    "label": f"Before and after: {'what the detector saw' if found.derained else 'boxes'}"}}
            else:
                found = look_at_clip(choices, name, path, threshold, empty_folder(folder))
                values = {"files": {"value": [str(one) for one in found.files]}} | (
                    {"clip": {"value": str(found.shown)}} if found.shown else {})
        except config.UserError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise gradio.Error("the memory is full: take a smaller file, or another model", duration=None,
                               print_exception=False) from None
        if found.note:
            gradio.Warning(found.note, duration=None)
        return {line: f"**{found.line}**"} | {
            part: gradio.update(visible=key in values, **values.get(key, {"value": None}))
            for key, part in shown.items()}
    return answer


def empty_folder(root):
    """-> a new folder in `root`. The last clip's files, which Gradio has copied, go; on Windows one that another
    program reads just now stays."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(dir=root)


def demo_files(folder="./demo"):
    """-> paths of the demo's clip, and of its first picture and its last, in which it rains."""
    clip = ensure_clip(Path(folder) / "rain_begins.mp4", video.VideoWriter)
    files = [Path(folder) / name for name in ("app_dry.png", "app_rain.png")]
    if not all(path.is_file() for path in files):
        with contextlib.closing(video.open_source(str(clip))) as source:
            frames = [frame.image for frame in source if frame.image is not None]
        for path, image in zip(files, (frames[0], frames[-1]), strict=True):
            with system.written(path, path.suffix) as whole:
                visualize.to_pil(image).save(whole)
    return [*files, clip]


@contextlib.contextmanager
def serving(cfg, choices):
    """Serve the page from a thread. -> its address

    Uploads and results lie in a folder that is gone afterwards; what is older than an hour goes before.

    Raises:
        UserError: HOST or PORT cannot be used.
    """
    gradio_module()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    with tempfile.TemporaryDirectory(prefix="rainsight_app_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "cache")
        middleware, host = [Middleware(SelfOnly)], f"[{cfg.HOST}]" if ":" in cfg.HOST else cfg.HOST
        if is_loopback(cfg.HOST):  # a page from elsewhere whose name leads to this machine does not reach it
            allowed = ["127.0.0.1", "localhost", cfg.HOST, host]
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=allowed))
        blocks, font = page(cfg, choices, Path(folder) / "clip"), ["system-ui", "sans-serif"]
        try:
            with unproxied():
                _, address, _ = blocks.launch(
                    server_name=host, server_port=cfg.PORT, share=False, inbrowser=False, inline=False, quiet=True,
                    prevent_thread_lock=True, max_file_size=f"{cfg.MAX_UPLOAD_MB}mb", footer_links=[], ssr_mode=False,
                    enable_monitoring=False, mcp_server=False, app_kwargs={"middleware": middleware},
                    theme=theme(font))
        except OSError as error:
            raise config.UserError(f"HOST = '{cfg.HOST}', PORT = {cfg.PORT} cannot be used ({error}): is another "
                                   "program there, or is this no address of this machine? Choose another PORT, or "
                                   "HOST = '127.0.0.1'") from None
        try:
            yield address
        finally:
            blocks.close(verbose=False)


@contextlib.contextmanager
def unproxied():
    """Within, HTTP goes to no proxy: Gradio asks its own server once, which a company's proxy does not know."""
    name = "no_proxy"  # the small letters win
    earlier = os.environ.get(name)
    os.environ[name] = "*"
    try:
        yield
    finally:
        os.environ.pop(name)
        if earlier is not None:
            os.environ[name] = earlier


def theme(font):
    """-> Gradio's look with the fonts that a machine has."""
    return gradio_module().themes.Default(font=font, font_mono=["ui-monospace", "monospace"])


def is_loopback(host):
    """-> whether only programs of this machine reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def require_usable(cfg):
    """UserError for constants that no page could be served with."""
    if not 1 <= cfg.PORT <= 65535:
        raise config.UserError(f"PORT = {cfg.PORT}: choose a number from 1 to 65535")
    if cfg.MAX_UPLOAD_MB < 1 or cfg.MAX_FRAMES < 0:
        raise config.UserError(f"MAX_UPLOAD_MB = {cfg.MAX_UPLOAD_MB} must be at least 1, MAX_FRAMES = "
                               f"{cfg.MAX_FRAMES} at least 0 (all)")


def main(**overrides):
    """Serve the page until Ctrl+C."""
    cfg = config.resolve(globals(), overrides)
    require_usable(cfg)
    processes.require_one("app.py")
    gradio_module()
    choices = Choices(cfg, processes.announced_device())
    choices.get(cfg.MODEL)
    for name, reason in choices.reasons.items():
        processes.say(f"note: not offered: {name}: {reason}")
    if not is_loopback(cfg.HOST):
        processes.say(f"note: HOST = '{cfg.HOST}': anyone who reaches this machine can use the page, upload files and "
                      "have them computed; HOST = '127.0.0.1' is for this machine alone")
    with serving(cfg, choices) as address, contextlib.suppress(KeyboardInterrupt):
        processes.say(f"open {address} in a browser; Ctrl+C ends the page")
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
