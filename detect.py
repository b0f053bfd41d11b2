"""Detect objects in an image, a folder, a video or a camera's pictures, de-raining those in which it rains.

    python detect.py --demo                                       # renders a clip in which it begins to rain
    python detect.py --source street.jpg                          # or a folder, a video.mp4, 0 for the first camera
    python detect.py --source drive.mp4 --model conditional --threshold 0.5 --show-derained --compare
    python detect.py --source ./photos --model rfdetr --weights checkpoint_best_regular.pth      # with its masks
    python detect.py --source drive.mp4 --model exported --weights vanilla_int8.onnx --track

Writes OUTPUT (a second run gets OUTPUT2, ...): the pictures or the video with boxes, detections.json in COCO's result
format, images.json with file, frame, rain probability and branch of every image_id. A folder of images is shared out
over the processes of torchrun. docs/detect.md tells more.
"""

import contextlib
import itertools
import json
import time

import utils.threads  # noqa: F401 (before torch)

import torch
from tqdm import tqdm

from rfdetr import evaluate
from rfdetr import weights as rfdetr_weights
from utils import config, fast, processes, system, transfer
from utils.boxes import decode
from utils.conditional_model import learnt_sizes
from utils.datasets import presets
from utils.demo.clip import ensure_clip
from utils.evaluation import comparison
from utils.images import to_floats
from utils.inference import detections, detectors, exported, overlap, pictures, tiles, tracks, video, weather_gate
from utils.inference.output import claimed
from utils.inference.tally import Tally, print_summary, together
from utils.networks.rtdetr import load_rtdetr, require_queries, require_size, rtdetr_of

# --- what to look at ----------------------------------------------------------------------------------------------
SOURCE: str = ""                        # image, folder of images, video, camera number ("0"), or a stream's URL
RESUME = False                          # go on with the last run on this folder of images, which was stopped or killed
MAX_FRAMES = 0                          # stop after so many frames or images; 0: at the end (a camera: Ctrl+C)
OUTPUT = "./runs/detect"                # folder of the results; detect2, detect3, ... where it is there already
THRESHOLD = 0.5                         # score from which on a box is drawn and written; COCO scores want 0.001
CLASS_THRESHOLDS = ()                   # scores of single classes instead, such as ("car=0.3", "stop sign=0.6")
TILE = 0                                # also detect in tiles of so many pixels, for small objects; 0: whole images
OVERLAP = 128                           # pixels that neighbouring tiles share
TRACK = False                           # number the objects of a video: the same one has the same number
MASKS = "rle"                           # in detections.json, of models with masks: rle or polygon
SHOW_DERAINED = False                   # put the image that the detector saw beside the result
COMPARE = False                         # put vanilla RT-DETR's result beside it

# --- models -------------------------------------------------------------------------------------------------------
MODEL = "conditional"                   # conditional: de-rain where it rains; spdnet, feature: always; vanilla: never;
                                        # rfdetr, exported: what WEIGHTS holds
WEIGHTS: str | None = ""                # of rfdetr: checkpoint of its scripts; of exported: .onnx, .xml or .pt2 file of
                                        # export.py, or its manifest.json for the pipeline with its gate
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
RAIN_FRAMES = 5                         # of a video: so many frames in a row change the branch; 1: each by itself
RAIN_MARGIN = 0.4                       # they must be surer than RAIN_THRESHOLD, by this share of the way to certainty
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
    "WEIGHTS": "./assets/demo/rfdetr_tiny.pth",
}
_MAY_DIFFER = ("OUTPUT", "RESUME", "BATCH_SIZE", "MAX_FRAMES", "FAST")  # between a run and the one that goes on with it
_MOST = 1000  # detections of an image that is seen in tiles


# --- models -------------------------------------------------------------------------------------------------------

def note_other_sizes(cfg):
    """Say which of the detectors that are used were trained at another IMAGE_SIZE."""
    used = detectors.used_constants(cfg)
    comparison.note_other_sizes(learnt_sizes(cfg, [name for name in (
        "RTDETR_MODEL_NAME", "RAINY_BRANCH", "FEATURE_MODEL_DIR") if name in used]), cfg.IMAGE_SIZE)


class Rfdetr:
    """RF-DETR of a checkpoint: the `network`, {row: name} of its `classes`, the `side` of its square.

    Args:
        path: checkpoint of the RF-DETR scripts, with a mask head or without.
    """

    def __init__(self, path, device):
        if problem := system.absent(path):
            raise config.UserError(f"WEIGHTS = '{path}' {problem}: give a checkpoint of the RF-DETR scripts")
        self.network, info = rfdetr_weights.load_detector(path, device)
        rows = info["class_rows"] or {f"class {row}": row for row in range(info["args"]["num_rows"] - 1)}
        self.classes, self.side = {row: name for name, row in rows.items()}, info["args"]["resolution"]


def load_weights(cfg, device):
    """-> Rfdetr, Exported or ExportedPipeline of WEIGHTS."""
    if not cfg.WEIGHTS:
        raise config.UserError(f"WEIGHTS is empty, and MODEL = '{cfg.MODEL}' needs it: give a checkpoint of the "
                               "RF-DETR scripts, or with MODEL = 'exported' a file of export.py")
    if cfg.MODEL == "rfdetr":
        return Rfdetr(cfg.WEIGHTS, device)
    if detectors.is_manifest(cfg):
        return exported.load_exported_pipeline(cfg.WEIGHTS, detectors.given_threshold(cfg))
    model = exported.load_exported(cfg.WEIGHTS)
    if model.about["kind"] != "detector":
        raise config.UserError(f"WEIGHTS = '{cfg.WEIGHTS}' is a {model.about['kind']}: give a detector's file, or the "
                               "manifest.json beside it for the pipeline")
    return model


def build_models(cfg, device):
    """-> {name: model}, the chosen one last; the vanilla one beside it is its own detector where that stayed frozen."""
    detectors.require(cfg)
    if cfg.MODEL in detectors.OF_WEIGHTS:
        chosen = load_weights(cfg, device)
        cfg.IMAGE_SIZE = chosen.side
        detectors.say_threshold(cfg, chosen)
        cfg.RAIN_THRESHOLD = getattr(chosen, "rain_threshold", cfg.RAIN_THRESHOLD)  # RESUME goes on with the same
        return {cfg.MODEL: chosen}
    chosen = detectors.build_model(cfg, device)
    require_queries(rtdetr_of(chosen), cfg.IMAGE_SIZE)
    detectors.say_threshold(cfg, chosen)
    if not cfg.COMPARE:
        return {cfg.MODEL: chosen}
    # feature-level training may have changed the detector, so the plain one is loaded
    vanilla = rtdetr_of(chosen) if cfg.MODEL != "feature" else load_rtdetr(cfg.RTDETR_MODEL_NAME,
                                                                           device=device)
    return {"vanilla": vanilla, cfg.MODEL: chosen}


# --- one batch ----------------------------------------------------------------------------------------------------

def stretched(cfg, images, device):
    """[(3, H, W) uint8, ...] -> (B, 3, S, S) float in [0, 1], as in training and evaluation."""
    stretch = presets.evaluation(cfg.IMAGE_SIZE)
    return to_floats(torch.stack([stretch(image) for image in images]), device)


def look(cfg, model, pixels, views, size=None, weak=False, decide=None):
    """Detect in one batch of whole images, or of tiles of one image.

    Args:
        pixels: (B, 3, S, S); views: B tiles.View, what each of them is of its image; size: (H, W) of the image that
            they are tiles of, None for whole ones. weak: also what may only continue a track. decide: of the gate.
    Returns:
        per image {"boxes": (n, 4) xyxy pixels of the image, inside the view, "scores", "labels": (n,), "masks": [RLE
        of the image, ...] of models that have them}, best first, on the CPU; and the model's outputs, None of RF-DETR.
    """
    sizes = [(view.bottom - view.top, view.right - view.left) for view in views]
    if isinstance(model, Rfdetr):
        found, outputs = evaluate.predict_batch(model.network, pixels, sizes, rows=list(model.classes)), None
    elif isinstance(model, (exported.Exported, exported.ExportedPipeline)):
        outputs = model(pixels.cpu(), **({"decide": decide} if decide else {}))
        found = exported.decode_classes(outputs, model.classes, sizes)
    else:
        outputs = model(pixel_values=pixels, **({"decide": decide} if decide else {}))
        found = decode(outputs.logits, outputs.pred_boxes, sizes)
    thresholds = detectors.score_thresholds(cfg, detectors.classes_of(model))
    if weak:
        thresholds = thresholds.clamp(max=tracks.LOW)
    results = []
    for one, view, (height, width) in zip(found, views, sizes, strict=True):
        one = tracks.selected(one, one["scores"] >= thresholds[one["labels"]])
        if "mask_logits" in one:
            within = (*size, view.top, view.left) if size else None
            one["masks"] = evaluate.run_lengths(one, (height, width), within)
        boxes = one["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        one["boxes"] = boxes + torch.tensor([view.left, view.top, view.left, view.top])
        results.append({key: value for key, value in one.items() if key not in ("queries", "mask_logits")})
    return results, outputs


def look_closer(cfg, model, image, one, device, weak, rainy=None):
    """Detect in the tiles of an image as well, and merge that with what the whole image showed.

    Args:
        image: (3, H, W) uint8; one: of `look` at the whole image; rainy: what the gate said of it, for all its tiles.
    Returns:
        detections as of `look`, and the number of tiles that the de-rainer spoilt.
    """
    height, width = image.shape[-2:]
    corners, fallbacks = tiles.views(height, width, cfg.TILE, cfg.OVERLAP), 0
    if not corners:
        return one, 0
    decide = None if rainy is None else lambda scores: torch.full_like(scores, rainy, dtype=torch.bool)
    parts = [(tiles.View(0, 0, width, height), one)]
    for first in range(0, len(corners), cfg.BATCH_SIZE):
        some = corners[first:first + cfg.BATCH_SIZE]
        crops = [image[:, view.top:view.bottom, view.left:view.right] for view in some]
        found, outputs = look(cfg, model, stretched(cfg, crops, device), some, (height, width), weak, decide)
        parts += zip(some, found, strict=True)
        fallbacks += (getattr(outputs, "rain_stats", None) or {"num_fallback": 0})["num_fallback"]
    return tiles.merged(parts, height, width, _MOST), fallbacks


@torch.no_grad()
def detect_frames(cfg, models, frames, device, gate=None):
    """Run every model on one batch.

    Args:
        frames: video.Frames with images of any size; the models see them stretched to IMAGE_SIZE.
        gate: weather_gate.WeatherGate of a video, None where every image is decided by itself.
    Returns:
        per frame None where it has no image, else {model: {"boxes": (n, 4) xyxy pixels inside the image, "labels",
        "scores": (n,), "masks": of models that have them, [RLE, ...], "given": (3, S, S) in [0, 1], "seen": the same
        de-rained, both None without a de-rainer, "branch": "rain", "clean" or None, "rain": probability or None}}, on
        the CPU, and with TRACK also weaker ones (see tracks.Tracker); and the number of images that the de-rainer
        spoilt and the gate passed on as they were.
    """
    images = [frame.image for frame in frames if frame.image is not None]
    if not images:
        return [None] * len(frames), 0
    whole = [tiles.View(0, 0, image.shape[-1], image.shape[-2]) for image in images]
    pixels = stretched(cfg, images, device)
    results, fallbacks = [{} for _ in images], 0
    for name, model in models.items():
        weak = cfg.TRACK and name == cfg.MODEL
        found, outputs = look(cfg, model, pixels, whole, weak=weak, decide=gate if name == cfg.MODEL else None)
        stats, seen = getattr(outputs, "rain_stats", None), getattr(outputs, "derained", None)
        given, seen = ([None] * len(images),) * 2 if seen is None else (pixels.cpu(), seen.cpu())
        fallbacks += stats["num_fallback"] if stats else 0
        gates = transfer.rows({"branch": stats["mask"], "rain": stats["scores"]}) if stats else [None] * len(images)
        for i, (one, image) in enumerate(zip(found, images, strict=True)):
            if cfg.TILE:
                one, more = look_closer(cfg, model, image, one, device, weak, gates[i] and bool(gates[i]["branch"]))
                fallbacks += more
            one |= {"given": given[i], "seen": seen[i], "branch": None, "rain": None}
            if gates[i]:
                one |= {"branch": "rain" if gates[i]["branch"] else "clean", "rain": gates[i]["rain"]}
            results[i][name] = one
    found = iter(results)
    return [None if frame.image is None else next(found) for frame in frames], fallbacks


# --- the run ------------------------------------------------------------------------------------------------------

def batches(frames, size, limit):
    """Yield lists of at most `size` frames, as they are needed; `limit` frames in all, 0 for every one."""
    frames = itertools.islice(frames, limit or None)
    while batch := list(itertools.islice(frames, size)):
        yield batch


def run(cfg, models, source, folder, device):
    """Detect in every frame and write the results as they come; the next frames are read and the last ones written
    meanwhile. -> Tally"""
    id2label, gate, tracker = detectors.classes_of(models[cfg.MODEL]), weather_gate.gate_of(cfg, models, source), None
    thresholds = detectors.score_thresholds(cfg, id2label)
    if cfg.TRACK:
        tracker = tracks.Tracker(source.fps)
    tally, begin = Tally(), time.perf_counter()
    size = 1 if source.live else cfg.BATCH_SIZE
    total = min(filter(None, (source.total, cfg.MAX_FRAMES)), default=None)
    bar = tqdm(total=total, desc=source.name, unit="image", ascii=True, dynamic_ncols=True, disable=total == 1)

    def write(frame, result):
        one = result and result[cfg.MODEL]
        if tracker and one:
            one = result[cfg.MODEL] = tracks.follow(tracker, one, thresholds)
        elif tracker:
            tracker.pass_by()
        if not results.after_picture:
            results.add(frame, one)
        if result is None:
            writer.hold()
        elif problem := writer.write(pictures.draw(cfg, frame.image, result, id2label), frame.name):
            tally.report(problem)
        if results.after_picture:
            results.add(frame, one)
        tally.count(frame, one)
        bar.update()

    frames_of = batches(source, size, cfg.MAX_FRAMES)
    reading = frames_of if source.live else overlap.ahead(frames_of)  # a camera: the newest picture, not one in waiting
    with (results_of(cfg, source, folder, id2label) as results, source.writer(folder) as writer, bar,
          contextlib.closing(reading)):
        try:
            with overlap.Behind(write, size) as behind:
                for frames in reading:
                    started = time.perf_counter()
                    found, fallbacks = detect_frames(cfg, models, frames, device, gate)
                    tally.model_seconds += time.perf_counter() - started
                    tally.fallbacks += fallbacks
                    for frame, result in zip(frames, found, strict=True):
                        behind.put(frame, result)
        except KeyboardInterrupt:
            tally.stopped = True
    tally.seconds = time.perf_counter() - begin
    if source.cut_short:
        tally.report(source.cut_short)
    return tally


def results_of(cfg, source, folder, id2label):
    """-> what takes a run's results: the two files of a video, a journal of images, from which they are made."""
    polygons = cfg.MASKS == "polygon"
    if source.fps:
        return detections.Results(folder, source, id2label, polygons)
    return detections.Journal(folder, lasting(cfg), id2label, polygons)


def lasting(cfg):
    """-> {constant: value} that a run and the one that goes on with it have in common, as JSON has them."""
    return json.loads(json.dumps({name: value for name, value in cfg.as_dict().items() if name not in _MAY_DIFFER}))


def main(**overrides):
    """Detect; -> {"folder", "images", "objects", "derained", "fallbacks", "seconds", "stopped", "switches",
    "flicker"}.

    Raises:
        UserError: what cannot start; and at the end, after everything else was written, where images or frames could
            not be read.
    """
    cfg = config.resolve(globals(), overrides)
    if cfg.demo:
        for name in detectors.empty_panels(cfg).keys() - overrides.keys():
            setattr(cfg, name, False)
    require_usable(cfg)
    if cfg.demo and cfg.SOURCE == DEMO["SOURCE"]:
        ensure_clip(cfg.SOURCE, video.VideoWriter)
    device = processes.announced_device()
    if {"compile", "cuda_graphs"} & set(cfg.FAST):
        comparison.require_compiler(device, f"FAST = {tuple(cfg.FAST)!r}", "FAST = ()")
    with contextlib.closing(video.open_source(cfg.SOURCE)) as source:
        require_suits(cfg, source)
        for note in source.notes:
            processes.say(f"note: {note}")
        models = build_models(cfg, device)
        id2label = detectors.classes_of(models[cfg.MODEL])
        detectors.score_thresholds(cfg, id2label)
        fast.switch_on(cfg.FAST, device, *(model for model in models.values() if isinstance(model, torch.nn.Module)))
        detectors.note_without_effect(cfg, overrides)
        note_other_sizes(cfg)
        folder = claimed(cfg, source, lasting(cfg))
        try:
            tally = together(run(cfg, models, source, folder, device))
            if not source.fps and processes.is_main():
                detections.finish(folder, source, id2label, complete=not tally.stopped)
        except OSError as error:
            raise config.UserError(f"OUTPUT = '{folder.as_posix()}': cannot write ({error})") from error
        if processes.is_main():
            print_summary(cfg, tally, source, folder)
    if tally.problem_count and processes.is_main():
        raise config.UserError(f"{tally.problem_count} problem(s), everything else is finished: "
                               f"{system.listed(tally.problems, separator='; ', total=tally.problem_count)}")
    names = ("images", "objects", "derained", "fallbacks", "seconds", "stopped", "switches", "flicker")
    return {"folder": folder} | {name: getattr(tally, name) for name in names}


def require_usable(cfg):
    """UserError for constants that no source could be looked at with."""
    require_size(cfg.IMAGE_SIZE)
    if not 0 <= cfg.THRESHOLD <= 1:
        raise config.UserError(f"THRESHOLD = {cfg.THRESHOLD}: choose a score in [0, 1]")
    if cfg.RAINY_BRANCH.lower() == "spdnet":
        cfg.RAINY_BRANCH = "spdnet"
    cfg.DERAIN = cfg.DERAIN.lower()
    if cfg.DERAIN not in detectors.DERAINERS:
        raise config.UserError(f"DERAIN = {cfg.DERAIN!r}: choose one of {', '.join(detectors.DERAINERS)}")
    if cfg.BATCH_SIZE < 1 or cfg.MAX_FRAMES < 0:
        raise config.UserError(f"BATCH_SIZE = {cfg.BATCH_SIZE} must be at least 1, MAX_FRAMES = {cfg.MAX_FRAMES} at "
                               "least 0")
    if cfg.MASKS not in ("rle", "polygon"):
        raise config.UserError(f"MASKS = {cfg.MASKS!r}: choose rle or polygon")
    tiles.require(cfg.TILE, cfg.OVERLAP)
    weather_gate.require(cfg.RAIN_FRAMES, cfg.RAIN_MARGIN)
    fast.require("FAST", cfg.FAST, fast.INFERENCE)


def require_suits(cfg, source):
    """UserError for constants that go with a video alone, or with a folder of images alone."""
    if cfg.TRACK and not source.fps:
        raise config.UserError(f"TRACK: SOURCE = '{cfg.SOURCE}' is no video, there is nothing to follow from one image "
                               "to the next: leave TRACK out")
    if source.fps and cfg.RESUME:
        raise config.UserError(f"RESUME: SOURCE = '{cfg.SOURCE}' is a video, which starts anew: leave RESUME out; a "
                               "run on a folder of images can go on")
    if source.fps:
        processes.require_one("detect.py with a video")


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
