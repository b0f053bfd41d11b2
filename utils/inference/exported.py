"""Files of export.py: what they say of themselves, how torch.export's and OpenVINO's are written, and how each is run.

    detector = load_exported("outputs_export/vanilla_int8.onnx")
    outputs = detector(images)              # (B, 3, S, S) in [0, 1] -> .logits (B, Q, K), .pred_boxes (B, Q, 4)
    detector.about["classes"]               # {"0": "person", ...}

A file carries `about`, plain data: {"kind": "detector", "rain detector" or "derainer", "model", "input": name,
"outputs": [names], "image_size": side of the square, None for any, "multiple": that sides must be of, "classes":
{label: name} of a detector, "rain_threshold" of a rain detector, "largest_batch" of a refiner, and "base" and "licence"
of the weights of another that are in it}. Without this project's code: docs/export.md.
"""

import io
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from utils import system
from utils.boxes import decode
from utils.config import UserError
from utils.networks import onnx_file
from utils.networks.tiling import to_multiple

KINDS = {"detector": ("logits", "pred_boxes"), "rain detector": ("probability",), "derainer": ("restored",)}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_ABOUT_FILE = "rainsight.json"  # within a .pt2, which is an archive


class Exported:
    """An exported file as a callable model, on the CPU.

    Args:
        run: ((B, 3, H, W) float32) -> [Tensor, ...], one per name of about["outputs"].
        about: see the module; path: of the file.
    """

    def __init__(self, run, about, path):
        self.run, self.about, self.path = run, about, Path(path)

    @property
    def classes(self):
        """-> {label: class name} of a detector."""
        return {int(label): name for label, name in self.about["classes"].items()}

    @property
    def side(self):
        """-> side of the square that it takes, None for any size."""
        return self.about["image_size"]

    def __call__(self, pixel_values):
        """What the model answers.

        Args:
            pixel_values: (B, 3, H, W) float32 RGB in [0, 1]; a de-rainer takes any size (mirrored up to
                about["multiple"] and cut back), the others squares of about["image_size"].
        Returns:
            SimpleNamespace with the Tensors that about["outputs"] names: `logits` (B, Q, K), `pred_boxes` (B, Q, 4)
            normalised cxcywh and, with a mask head, `mask_logits` (B, Q, S / 4, S / 4); or `probability` (B,) of rain;
            or `restored`, (B, 3, H, W) in [0, 1].
        Raises:
            UserError: images of another size than the file takes, or more of them than a refiner's takes.
        """
        height, width = pixel_values.shape[-2:]
        side = self.side
        if side and (height, width) != (side, side):
            raise UserError(f"{self.path.as_posix()} takes images of {side} x {side} pixels, not {width} x {height}: "
                            f"set IMAGE_SIZE = {side}, or export it again")
        if len(pixel_values) > (most := self.about.get("largest_batch", math.inf)):
            raise UserError(f"{self.path.as_posix()} takes {most} images at a time at most, not {len(pixel_values)}")
        if side is None:
            pixel_values = to_multiple(pixel_values, self.about["multiple"], 2 * self.about["multiple"])
        found = self.run(pixel_values.contiguous())
        if side is None:
            found = [one[..., :height, :width] for one in found]
        return SimpleNamespace(**dict(zip(self.about["outputs"], found, strict=True)))


class ExportedPipeline:
    """A rain detector and two detectors as export.py's manifest.json puts them together: see docs/export.md.

    Args:
        gate, rainy, clean: Exported; rain_threshold: an image is rainy from this probability on.
    """

    def __init__(self, gate, rainy, clean, rain_threshold):
        self.gate, self.rainy, self.clean, self.rain_threshold = gate, rainy, clean, rain_threshold
        self.classes, self.side = clean.classes, clean.side

    def __call__(self, pixel_values, decide=None):
        """What the pipeline answers.

        Args:
            pixel_values: (B, 3, S, S) float32 RGB in [0, 1]; decide: see ConditionalRainRobustRTDETR.forward.
        Returns:
            SimpleNamespace: `logits` (B, Q, K), `pred_boxes` (B, Q, 4), `rain_stats` {"scores": (B,) probability,
            "mask": (B,) bool, "num_fallback": rainy images whose answer was not finite, so that the clean one counts}.
        """
        scores = self.gate(pixel_values).probability.reshape(-1)
        mask = decide(scores) if decide else scores >= self.rain_threshold
        answers, fallbacks = [], 0
        for i, rainy in enumerate(mask.tolist()):
            image = pixel_values[i:i + 1]
            found = (self.rainy if rainy else self.clean)(image)
            if rainy and not (found.logits.isfinite().all() and found.pred_boxes.isfinite().all()):
                found, fallbacks = self.clean(image), fallbacks + 1
            answers.append(found)
        logits, boxes = (torch.cat([getattr(one, name) for one in answers]) for name in ("logits", "pred_boxes"))
        return SimpleNamespace(
            logits=logits, pred_boxes=boxes,
            rain_stats={"scores": scores, "mask": mask, "num_fallback": fallbacks})


def load_exported_pipeline(path, rain_threshold=None):
    """-> ExportedPipeline of the manifest.json of export.py; of every part the first file that it lists.

    Args:
        path: of manifest.json; rain_threshold: None takes the manifest's.
    Raises:
        UserError: no such file, no pipeline in it, or a part that is missing or damaged.
    """
    path = Path(path)
    if problem := system.absent(path):
        raise UserError(f"{path.as_posix()} {problem}: export.py writes it")
    try:
        content = system.read_json(path)
        pipeline, files = content.get("pipeline"), content["files"]
        names = pipeline and {part: next(name for name, about in files.items() if about["model"] == pipeline[part])
                              for part in ("gate", "rainy", "clean")}
        threshold = pipeline and float(pipeline["rain_threshold"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path.as_posix()} is no manifest.json of export.py, or damaged: export again") from error
    if not pipeline:
        raise UserError(f"{path.as_posix()} tells of no pipeline: export a rain detector, a rainy and a clean detector "
                        "together, or give one detector's file")
    parts = {part: load_exported(path.parent / name) for part, name in names.items()}
    return ExportedPipeline(**parts, rain_threshold=threshold if rain_threshold is None else rain_threshold)


def decode_classes(outputs, classes, sizes):
    """boxes.decode of a detector whose head has rows without a class: these do not count.

    Args:
        outputs: with `logits`, `pred_boxes`, perhaps `mask_logits` (B, Q, h, w); classes: {row: name}; sizes: [(H, W),
            ...] of the original images.
    Returns:
        what boxes.decode does; with masks also "mask_logits" (n, h, w).
    """
    rows = torch.tensor(sorted(classes))
    every = len(rows) == outputs.logits.shape[-1]
    found = decode(outputs.logits if every else outputs.logits[..., rows], outputs.pred_boxes, sizes)
    for i, one in enumerate(found):
        one["labels"] = rows[one["labels"]]
        if hasattr(outputs, "mask_logits"):
            one["mask_logits"] = outputs.mask_logits[i, one["queries"]]
    return found


def load_exported(path, threads=0, precision="float32"):
    """-> Exported of an .onnx, .xml (OpenVINO) or .pt2 file of export.py.

    Args:
        threads: that onnxruntime and OpenVINO use, 0 for one per core; torch.export's files go by torch's own number.
        precision: of OpenVINO's arithmetic, "bfloat16" where the CPU has it; the others compute as the file says.
    Raises:
        UserError: the file is missing, damaged or not of export.py, or its package is not installed.
    """
    path = Path(path)
    if problem := system.absent(path):
        raise UserError(f"{path.as_posix()} {problem}: export.py writes it")
    loaders = {".onnx": lambda: _onnx(path, threads), ".xml": lambda: _openvino(path, threads, precision),
               ".pt2": lambda: _torch_export(path)}
    if path.suffix not in loaders:
        raise UserError(f"{path.as_posix()}: a file that export.py wrote ends in {', '.join(loaders)}")
    try:
        run, about = loaders[path.suffix]()
        about = json.loads(about)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each runtime has errors of its own for a damaged file
        raise UserError(f"{path.as_posix()} is damaged, or no file of export.py: export it again") from error
    if about.get("kind") not in KINDS:
        raise UserError(f"{path.as_posix()} holds another kind of model than this version knows: export it again")
    return Exported(run, about, path)


def _onnx(path, threads):
    onnx_file.require_packages(path.as_posix(), names=("onnxruntime",))
    session = onnx_file.session(path, threads)
    name = session.get_inputs()[0].name
    return (lambda images: [torch.from_numpy(one) for one in session.run(None, {name: images.numpy()})],
            session.get_modelmeta().custom_metadata_map[onnx_file.ABOUT])


def _openvino(path, threads, precision):
    onnx_file.require_packages(path.as_posix(), names=("openvino",))
    import openvino
    core = openvino.Core()
    model = core.read_model(path)
    settings = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)
    # a call's outputs live in its request: copied, or the next call would overwrite them
    return (lambda images: [torch.from_numpy(one.copy()) for one in compiled(images.numpy()).values()],
            model.get_rt_info([onnx_file.ABOUT]).astype(str))


def _torch_export(path):
    extra = {_ABOUT_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    try:  # its guards hold the strides of the traced example as well: a NAFNet would take a few sizes alone
        module = program.module(check_guards=False)
    except TypeError:  # torch before 2.9 checks none
        module = program.module()

    @torch.no_grad()
    def run(images):
        found = module(images)
        return [found] if torch.is_tensor(found) else list(found)
    return run, extra[_ABOUT_FILE]


def write_torch_export(program, path, about):
    """Write torch.export's program."""
    content = io.BytesIO()  # a full disk would end the process within torch's own writing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that share memory with others, as RT-DETR's heads do
        torch.export.save(program, content, extra_files={_ABOUT_FILE: json.dumps(about)})
    path.write_bytes(content.getbuffer())


def write_openvino(source, path, about):
    """Write OpenVINO's .xml, and the .bin beside it, of an ONNX file in float32 or INT8."""
    import openvino
    model = openvino.Core().read_model(source)  # convert_model splits a path at its commas
    model.set_rt_info(json.dumps(about), [onnx_file.ABOUT])
    openvino.save_model(model, path, compress_to_fp16=False)
