"""Detect objects in an image, a folder, a video or a camera's pictures, de-raining those in which it rains.

    python detect.py --demo                                       # renders a clip in which it begins to rain
    python detect.py --source street.jpg                          # or a folder, a video.mp4, 0 for the first camera
    python detect.py --source drive.mp4 --model conditional --threshold 0.5 --show-derained --compare

Writes OUTPUT (a second run gets OUTPUT2, ...): the pictures or the video with boxes, detections.json in COCO's result
format, images.json with file, frame, rain probability and branch of every image_id. docs/detect.md tells more.
"""

import contextlib
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path

import utils.threads  # noqa: F401 (before torch)

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from utils import config, fast, processes, system, transfer, visualize
from utils.boxes import decode
from utils.conditional_model import ConditionalRainRobustRTDETR, load_rainy_detector
from utils.datasets import presets
from utils.demo.clip import ensure_clip
from utils.evaluation import comparison
from utils.feature_derain import FeatureDerainRTDETR
from utils.images import to_floats
from utils.inference import detections, video
from utils.integrated_model import RainRobustRTDETR, require_trained_scale
from utils.networks.adapter import is_adapter
from utils.networks.derainers import load_derainer, require_arch
from utils.networks.rain_detector import load_rain_detector
from utils.networks.rtdetr import id2label_of, load_rtdetr, require_queries, require_size, rtdetr_of, trained_size
from utils.networks.spdnet import load_spdnet

# --- what to look at ----------------------------------------------------------------------------------------------
SOURCE: str = ""                        # image, folder of images, video, camera number ("0"), or a stream's URL
MAX_FRAMES = 0                          # stop after so many frames or images; 0: at the end (a camera: Ctrl+C)
OUTPUT = "./runs/detect"                # folder of the results; detect2, detect3, ... where it is there already
THRESHOLD = 0.5                         # score from which on a box is drawn and written; COCO scores want 0.001
SHOW_DERAINED = False                   # put the image that the detector saw beside the result
COMPARE = False                         # put vanilla RT-DETR's result beside it

# --- models -------------------------------------------------------------------------------------------------------
MODEL = "conditional"                   # conditional: de-rain where it rains; spdnet, feature: always; vanilla: never
RAINY_BRANCH = "spdnet"                 # of conditional: spdnet, a detector that knows rain (folder or hub id), or
                                        # rain.safetensors of Training_WeatherAdapter.py
RTDETR_MODEL_NAME = "PekingU/rtdetr_r18vd"  # hub id or folder
DERAIN = "spdnet"                       # de-rainer of MODEL conditional and spdnet: spdnet, unet, nafnet, unet+refiner
SPDNET_MODEL_PATH = "./outputs_spdnet_adaptation/spdnet_adapted.pt"  # from Training_SPDNet_Adaptation.py
DERAIN_MODEL_PATH = "./outputs_unet/best.pt"  # of DERAIN unet and nafnet, from train_unet_derain.py
REFINER_DIR = "./outputs_refiner/refiner"  # of DERAIN unet+refiner, from train_diffusion_refiner.py
RAIN_DETECTOR_PATH = "./rain_detector_pretrained/rain_detector_best.pt"  # from Training_RainDetector.py
FEATURE_MODEL_DIR = "./outputs_feature_derain/model"  # of feature, from Training_FeatureDerain.py
RAIN_THRESHOLD: float | None = 0.5      # an image is rainy from this probability on; None: the rain detector's own
DERAIN_SCALE = 1.0                      # 0.5: SPDNet sees half the size, a quarter of the cost; as in its training
PIPELINE_DIR: str | None = ""           # folder of save_pretrained: replaces the constants above for conditional
IMAGE_SIZE = 640                        # side of the square that the models see, as in training
BATCH_SIZE = 4                          # images per forward; 1 for a camera, so that nothing waits
FAST = ()                               # for GPUs: "tf32", "channels_last", "compile", "cuda_graphs", see docs/gpu.md

DEMO = {
    "SOURCE": "./demo/rain_begins.mp4", "OUTPUT": "./demo/runs/detect", "IMAGE_SIZE": 160, "DERAIN_SCALE": 0.5,
    "RTDETR_MODEL_NAME": "./assets/demo/rtdetr", "SPDNET_MODEL_PATH": "./assets/demo/spdnet_adapted.pt",
    "RAIN_DETECTOR_PATH": "./assets/demo/rain_detector.pt", "SHOW_DERAINED": True, "COMPARE": True,
    "DERAIN_MODEL_PATH": "./demo/outputs_unet/best.pt", "REFINER_DIR": "./demo/outputs_refiner/refiner",
}
_MODEL_CONSTANTS = ("RAINY_BRANCH", "RTDETR_MODEL_NAME", "DERAIN", "SPDNET_MODEL_PATH", "DERAIN_MODEL_PATH",
                    "REFINER_DIR", "RAIN_DETECTOR_PATH", "FEATURE_MODEL_DIR", "RAIN_THRESHOLD", "DERAIN_SCALE")
# {DERAIN: (name for load_derainer, the constant that says where)}
_DERAINERS = {"spdnet": (None, "SPDNET_MODEL_PATH"), "unet": ("unet", "DERAIN_MODEL_PATH"),
              "nafnet": ("nafnet", "DERAIN_MODEL_PATH"), "unet+refiner": ("refiner", "REFINER_DIR"),
              "nafnet+refiner": ("refiner", "REFINER_DIR")}
_SHOWN = 20  # problems and switches that are listed on the console; images.json has them all


# --- models -------------------------------------------------------------------------------------------------------

def used_constants(cfg):
    """-> names of the _MODEL_CONSTANTS that MODEL, PIPELINE_DIR and COMPARE let decide anything."""
    derainer = {"DERAIN", _DERAINERS[cfg.DERAIN][1], "DERAIN_SCALE"}
    if cfg.MODEL == "vanilla":
        return {"RTDETR_MODEL_NAME"}
    if cfg.MODEL == "spdnet":
        return {"RTDETR_MODEL_NAME"} | derainer
    if cfg.MODEL == "feature":
        return {"FEATURE_MODEL_DIR"} | ({"RTDETR_MODEL_NAME"} if cfg.COMPARE else set())
    if cfg.PIPELINE_DIR:  # holds its own detector, threshold and scale
        return set()
    branch = derainer if cfg.RAINY_BRANCH == "spdnet" else set()
    return {"RTDETR_MODEL_NAME", "RAIN_DETECTOR_PATH", "RAIN_THRESHOLD", "RAINY_BRANCH"} | branch


def note_without_effect(cfg, given):
    """Say which constants of models decide nothing in this run; given: names that the user set."""
    used = used_constants(cfg)
    if idle := [name for name in _MODEL_CONSTANTS if name in given and name not in used]:
        chosen = (f"PIPELINE_DIR = '{cfg.PIPELINE_DIR}'" if cfg.PIPELINE_DIR else f"MODEL = '{cfg.MODEL}'"
                  if cfg.MODEL != "conditional" else f"RAINY_BRANCH = '{cfg.RAINY_BRANCH}'")
        paths = {constant for _, constant in _DERAINERS.values()} if "DERAIN" in used else set()
        for reason, names in ((f"DERAIN = '{cfg.DERAIN}'", [name for name in idle if name in paths]),
                              (chosen, [name for name in idle if name not in paths])):
            if names:
                processes.say(f"note: without effect with {reason}: {', '.join(names)}")


def note_other_sizes(cfg):
    """Say which of the detectors that are used were trained at another IMAGE_SIZE."""
    folders = {"RTDETR_MODEL_NAME": cfg.RTDETR_MODEL_NAME, "FEATURE_MODEL_DIR": Path(cfg.FEATURE_MODEL_DIR) / "rtdetr"}
    used = used_constants(cfg)
    comparison.note_other_sizes({name: trained_size(folder) for name, folder in folders.items() if name in used},
                                cfg.IMAGE_SIZE)


def build_model(cfg, device):
    """-> MODEL in eval mode: (pixel_values (B, 3, H, W) in [0, 1]) -> transformers' outputs, plus `derained` where it
    has a de-rainer and `rain_stats` where it has a gate."""
    def vanilla():
        return load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device)

    def derainer():
        name, constant = _DERAINERS[cfg.DERAIN]
        if name:
            model, kind = load_derainer(name, getattr(cfg, constant), constant=constant), cfg.DERAIN.partition("+")[0]
            if name != kind:
                require_arch(model.derainer, kind, f"DERAIN = '{cfg.DERAIN}': the de-rainer of {constant} = "
                                                   f"'{cfg.REFINER_DIR}'")
            return model
        require_trained_scale(cfg.SPDNET_MODEL_PATH, cfg.DERAIN_SCALE)
        return load_spdnet(cfg.SPDNET_MODEL_PATH, constant=constant)

    def spdnet():
        return RainRobustRTDETR(derainer(), load_rtdetr(cfg.RTDETR_MODEL_NAME), derain_scale=cfg.DERAIN_SCALE
                                ).to(device)

    def conditional():
        if cfg.PIPELINE_DIR:
            return ConditionalRainRobustRTDETR.from_pretrained(cfg.PIPELINE_DIR, device, constant="PIPELINE_DIR")
        rain_detector, rtdetr = load_rain_detector(cfg.RAIN_DETECTOR_PATH), load_rtdetr(cfg.RTDETR_MODEL_NAME)
        spdnet, rainy = ((derainer(), None) if cfg.RAINY_BRANCH == "spdnet" else
                         (None, load_rainy_detector(cfg.RAINY_BRANCH, base=rtdetr)))
        return ConditionalRainRobustRTDETR(rain_detector, spdnet, rtdetr, cfg.RAIN_THRESHOLD, "hard",
                                           cfg.DERAIN_SCALE, rainy).to(device)

    def feature():
        return FeatureDerainRTDETR.from_pretrained(cfg.FEATURE_MODEL_DIR, device, "FEATURE_MODEL_DIR")

    builders = {"conditional": conditional, "spdnet": spdnet, "feature": feature, "vanilla": vanilla}
    if cfg.MODEL not in builders:
        raise config.UserError(f"MODEL = {cfg.MODEL!r}: choose one of {', '.join(builders)}")
    if cfg.PIPELINE_DIR and cfg.MODEL != "conditional":
        raise config.UserError(f"PIPELINE_DIR holds a conditional pipeline, but MODEL = {cfg.MODEL!r}: leave one out")
    return builders[cfg.MODEL]().eval()


def build_models(cfg, device):
    """-> {name: model}, the chosen one last; the vanilla one beside it is its own detector where that stayed frozen."""
    if cfg.MODEL == "vanilla" and (cfg.COMPARE or cfg.SHOW_DERAINED):
        raise config.UserError("MODEL = 'vanilla' has nothing that COMPARE or SHOW_DERAINED could show: choose another "
                               "MODEL, or leave them out")
    gate = cfg.MODEL == "conditional" and not cfg.PIPELINE_DIR
    a_folder = not is_adapter(cfg.RAINY_BRANCH)
    if gate and cfg.RAINY_BRANCH != "spdnet" and "/" not in cfg.RAINY_BRANCH and (  # a hub id has a slash
            problem := system.absent(cfg.RAINY_BRANCH, folder=a_folder)):
        raise config.UserError(f"RAINY_BRANCH = '{cfg.RAINY_BRANCH}' {problem}: choose spdnet, a detector's folder or "
                               "hub id, or an adapter's file")
    if gate and cfg.RAINY_BRANCH != "spdnet" and cfg.SHOW_DERAINED:
        raise config.UserError(f"SHOW_DERAINED: RAINY_BRANCH = '{cfg.RAINY_BRANCH}' is a detector that knows rain, "
                               "there is no image to show")
    if cfg.MODEL == "feature" and cfg.SHOW_DERAINED:
        raise config.UserError("SHOW_DERAINED: MODEL = 'feature' de-rains features, there is no image to show")
    chosen = build_model(cfg, device)
    require_queries(rtdetr_of(chosen), cfg.IMAGE_SIZE)
    if not cfg.COMPARE:
        return {cfg.MODEL: chosen}
    # feature-level training may have changed the detector, so the plain one is loaded
    vanilla = rtdetr_of(chosen) if cfg.MODEL != "feature" else load_rtdetr(cfg.RTDETR_MODEL_NAME,
                                                                           device=device)
    return {"vanilla": vanilla, cfg.MODEL: chosen}


# --- one batch ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def detect_frames(cfg, models, frames, device):
    """Run every model on one batch.

    Args:
        frames: video.Frames with images of any size; the models see them stretched to IMAGE_SIZE.
    Returns:
        per frame None where it has no image, else {model: {"boxes": (n, 4) xyxy pixels inside the image, "labels",
        "scores": (n,), "given": (3, S, S) in [0, 1], "seen": the same de-rained, both None without a de-rainer,
        "branch": "rain", "clean" or None, "rain": probability or None}}, on the CPU; and the number of images that the
        de-rainer spoilt and the gate passed on as they were.
    """
    images = [frame.image for frame in frames if frame.image is not None]
    if not images:
        return [None] * len(frames), 0
    stretch, sizes = presets.evaluation(cfg.IMAGE_SIZE), [tuple(image.shape[-2:]) for image in images]
    pixels = to_floats(torch.stack([stretch(image) for image in images]), device)
    results, fallbacks = [{} for _ in images], 0
    for name, model in models.items():
        outputs = model(pixel_values=pixels)
        gate, seen = getattr(outputs, "rain_stats", None), getattr(outputs, "derained", None)
        given, seen = ([None] * len(images),) * 2 if seen is None else (pixels.cpu(), seen.cpu())
        if gate:
            fallbacks += gate["num_fallback"]
            gates = transfer.rows({"branch": gate["mask"], "rain": gate["scores"]})
        found = decode(outputs.logits, outputs.pred_boxes, sizes)
        for i, (one, (height, width)) in enumerate(zip(found, sizes, strict=True)):
            one = {key: value[one["scores"] >= cfg.THRESHOLD] for key, value in one.items()}
            one["boxes"] = one["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            one |= {"given": given[i], "seen": seen[i], "branch": None, "rain": None}
            if gate:
                one |= {"branch": "rain" if gates[i]["branch"] else "clean", "rain": gates[i]["rain"]}
            results[i][name] = one
    found = iter(results)
    return [None if frame.image is None else next(found) for frame in frames], fallbacks


def draw(cfg, image, result, id2label):
    """-> PIL image: vanilla (COMPARE) | chosen | what the detector saw (SHOW_DERAINED), each of the image's size."""
    titles = {"spdnet": cfg.DERAIN}  # MODEL = "spdnet" is whatever DERAIN names
    panels = [draw_result(image, titles.get(name, name), one, id2label) for name, one in result.items()]
    if cfg.SHOW_DERAINED:
        panels.append(draw_seen(result[cfg.MODEL], panels[0].size))
    return side_by_side(panels)


def draw_result(image, name, one, id2label):
    """One model's boxes on the image, with a line about its gate and their number. -> PIL image"""
    gate = "" if one["branch"] is None else f"rain {one['rain']:.2f}, {one['branch']} branch, "
    picture = visualize.draw_boxes(image, one["boxes"], one["labels"], id2label, one["scores"])
    return with_banner(picture, f"{name}: {gate}{len(one['boxes'])} objects")


def draw_seen(one, size):
    """The de-rained image that the detector saw, enlarged to `size` (width, height). -> PIL image"""
    picture = visualize.to_pil(one["seen"]).resize(size, Image.Resampling.BICUBIC)
    return with_banner(picture, "what the detector saw")


def side_by_side(panels):
    """PIL images of one size -> one PIL image, from left to right."""
    if len(panels) == 1:
        return panels[0]
    width, height = panels[0].size
    page = Image.new("RGB", (width * len(panels), height))
    for i, panel in enumerate(panels):
        page.paste(panel, (i * width, 0))
    return page


def with_banner(picture, text):
    """Write a line onto a dark strip in the lower left corner, in place. -> the picture"""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(11, picture.height // 36))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    corner = picture.height - (bottom - top) - 6
    pen.rectangle((0, corner, right - left + 8, picture.height), fill=visualize.INK)
    pen.text((4 - left, corner + 3 - top), text, fill=visualize.PAPER, font=font)
    return picture


# --- the run ------------------------------------------------------------------------------------------------------

@dataclass
class Tally:
    """What the summary says. Lists end at _SHOWN entries: a camera may run for days."""

    images: int = 0
    objects: int = 0
    derained: int | None = None  # None: a model that de-rains nothing
    fallbacks: int = 0
    stopped: bool = False
    seconds: float = 0.0
    problem_count: int = 0
    problems: list = field(default_factory=list)
    switch_count: int = 0
    switches: list = field(default_factory=list)
    branch: str | None = None
    flicker: float = 0.0  # of consecutive de-rained frames, summed: mean change after de-raining minus that before
    flicker_count: int = 0
    before: tuple | None = None  # the frame before as it was given and de-rained

    def report(self, problem):
        """Say a problem at once, and keep it for the end."""
        self.problem_count += 1
        if self.problem_count <= _SHOWN:
            self.problems.append(problem)
            tqdm.write(f"problem: {problem}")

    def count(self, frame, one):
        """Count one frame; `one` is its result, None where it has no image."""
        if frame.problem:
            self.report(frame.problem)
            self.before = None  # the frames around it are not consecutive
        if one is None:
            return
        self.images += 1
        self.objects += len(one["boxes"])
        if one["seen"] is not None:
            self.derained = (self.derained or 0) + (one["branch"] != "clean")
        if frame.number is not None:
            self.count_flicker(one)
        if frame.number is not None and one["branch"] != self.branch:
            self.switch_count += 1
            if self.switch_count <= _SHOWN:
                self.switches.append({"frame": frame.number, "seconds": frame.seconds, "branch": one["branch"],
                                      "rain_probability": one["rain"]})
            self.branch = one["branch"]

    def count_flicker(self, one):
        """Compare a frame of a video with the one before it, where both were de-rained."""
        now = None if one["seen"] is None or one["branch"] == "clean" else (one["given"], one["seen"])
        if now and self.before:
            given, seen = ((new - old).abs().mean().item() for new, old in zip(now, self.before, strict=True))
            self.flicker += seen - given
            self.flicker_count += 1
        self.before = now


def batches(frames, size, limit):
    """Yield lists of at most `size` frames, as they are needed; `limit` frames in all, 0 for every one."""
    frames = itertools.islice(frames, limit or None)
    while batch := list(itertools.islice(frames, size)):
        yield batch


def run(cfg, models, source, folder, device):
    """Detect in every frame and write the results as they come. -> Tally"""
    id2label = id2label_of(rtdetr_of(models[cfg.MODEL]))
    tally, begin = Tally(), time.perf_counter()
    total = min(filter(None, (source.total, cfg.MAX_FRAMES)), default=None)
    bar = tqdm(total=total, desc=source.name, unit="image", ascii=True, dynamic_ncols=True, disable=total == 1)
    with detections.Results(folder, source, id2label) as results, source.writer(folder) as pictures, bar:
        try:
            for frames in batches(source, 1 if source.live else cfg.BATCH_SIZE, cfg.MAX_FRAMES):
                found, fallbacks = detect_frames(cfg, models, frames, device)
                tally.fallbacks += fallbacks
                for frame, result in zip(frames, found, strict=True):
                    one = result and result[cfg.MODEL]
                    results.add(frame, one)
                    if result is None:
                        pictures.hold()
                    else:
                        problem = pictures.write(draw(cfg, frame.image, result, id2label), frame.name)
                        if problem:
                            tally.report(problem)
                    tally.count(frame, one)
                bar.update(len(frames))
        except KeyboardInterrupt:
            tally.stopped = True
    tally.seconds = time.perf_counter() - begin
    if source.cut_short:
        tally.report(source.cut_short)
    return tally


def new_folder(output):
    """-> a folder that did not exist before: OUTPUT, OUTPUT2, OUTPUT3, ..."""
    path = Path(output)
    if not path.name or path.name == "..":
        raise config.UserError(f"OUTPUT = '{output}': give a folder of its own")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = path.with_name(path.name + (str(number) if number > 1 else ""))
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise config.UserError(f"OUTPUT = '{path.as_posix()}' cannot be made: {error}") from error


def print_summary(cfg, tally, source, folder):
    """Images, objects, what the gate did, speed, where the results are."""
    derained = "" if tally.derained is None else f", {tally.derained} of them in the rain branch"
    lines = [f"\n{cfg.SOURCE} -> {folder.as_posix()}{' (stopped)' if tally.stopped else ''}",
             f"  images   {tally.images}{derained}",
             f"  objects  {tally.objects} with a score of {cfg.THRESHOLD:g} or more",
             f"  time     {tally.seconds:.1f} s, {tally.images / max(tally.seconds, 1e-9):.1f} images/s"]
    if tally.flicker_count:
        more = 255 * tally.flicker / tally.flicker_count
        lines.append(f"  flicker  {more:+.2f} levels: consecutive frames differ by so much more after de-raining")
    if tally.fallbacks:
        lines.append(f"  note     {tally.fallbacks} image(s) were detected on as they were: the de-rainer's answer was "
                     "not finite")
    for switch in tally.switches:
        lines.append(f"  gate     {switch['branch']} branch from frame {switch['frame']} ({switch['seconds']:.2f} s), "
                     f"rain probability {switch['rain_probability']:.2f}")
    if tally.switch_count > len(tally.switches):
        lines.append(f"  gate     {tally.switch_count - len(tally.switches)} more changes, see images.json")
    lines.append(f"  written  {'video' if source.fps else 'pictures'}, detections.json, images.json")
    print("\n".join(lines), flush=True)


def main(**overrides):
    """Detect; -> {"folder", "images", "objects", "derained", "fallbacks", "seconds", "stopped", "switches",
    "flicker"}.

    Raises:
        UserError: what cannot start; and at the end, after everything else was written, where images or frames could
            not be read.
    """
    cfg = config.resolve(globals(), overrides)
    processes.require_one("detect.py")
    require_size(cfg.IMAGE_SIZE)
    if not 0 <= cfg.THRESHOLD <= 1:
        raise config.UserError(f"THRESHOLD = {cfg.THRESHOLD}: choose a score in [0, 1]")
    if cfg.RAINY_BRANCH.lower() == "spdnet":
        cfg.RAINY_BRANCH = "spdnet"
    cfg.DERAIN = cfg.DERAIN.lower()
    if cfg.DERAIN not in _DERAINERS:
        raise config.UserError(f"DERAIN = {cfg.DERAIN!r}: choose one of {', '.join(_DERAINERS)}")
    if cfg.BATCH_SIZE < 1 or cfg.MAX_FRAMES < 0:
        raise config.UserError(f"BATCH_SIZE = {cfg.BATCH_SIZE} must be at least 1, MAX_FRAMES = {cfg.MAX_FRAMES} at "
                               "least 0")
    fast.require("FAST", cfg.FAST, fast.INFERENCE)
    if cfg.demo and cfg.SOURCE == DEMO["SOURCE"]:
        ensure_clip(cfg.SOURCE, video.VideoWriter)
    device = processes.announced_device()
    if {"compile", "cuda_graphs"} & set(cfg.FAST):
        comparison.require_compiler(device, f"FAST = {tuple(cfg.FAST)!r}", "FAST = ()")
    with contextlib.closing(video.open_source(cfg.SOURCE)) as source:
        for note in source.notes:
            processes.say(f"note: {note}")
        models = build_models(cfg, device)
        fast.switch_on(cfg.FAST, device, *models.values())
        note_without_effect(cfg, overrides)
        note_other_sizes(cfg)
        folder = new_folder(cfg.OUTPUT)
        try:
            tally = run(cfg, models, source, folder, device)
        except OSError as error:
            raise config.UserError(f"OUTPUT = '{folder.as_posix()}': cannot write ({error})") from error
        print_summary(cfg, tally, source, folder)
    if tally.problem_count:
        raise config.UserError(f"{tally.problem_count} problem(s), everything else is finished: "
                               f"{system.listed(tally.problems, separator='; ', total=tally.problem_count)}")
    names = ("images", "objects", "derained", "fallbacks", "seconds", "stopped", "switches", "flicker")
    return {"folder": folder} | {name: getattr(tally, name) for name in names}


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
