"""RF-DETR in a few lines of Python: one small class per size.

    from rfdetr.detr import RFDETRNano
    detector = RFDETRNano()                                         # COCO weights, downloaded once
    found = detector.predict("street.jpg", threshold=0.5)           # found.xyxy, .scores, .class_names, .masks
    detector.train(dataset_dir="./dataset", epochs=50)              # train_detector_stage1.py, its options as keywords
    detector.export("nano.onnx")                                    # checked against PyTorch

Robinson et al., "RF-DETR", arXiv 2511.09554. The network is rfdetr/model.py, the training train_detector_stage1.py.
"""

import numbers
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from rfdetr import evaluate, masks, weights
from rfdetr.config import COCO_HEAD_ROWS, COCO_ROWS, PUBLISHED, default_resolution, mask_head_of
from rfdetr.datasets.transforms import stretched_image
from rfdetr.model import RFDETR
from utils import checkpoint, datasets, processes, system
from utils.config import UserError
from utils.images import to_floats
from utils.networks import onnx_file
from utils.training.plan import whole

TOLERANCE = 1e-3    # largest difference from PyTorch that an exported file may show


@dataclass
class Detections:
    """What was found in one image, best first.

    xyxy: (n, 4) float32 pixels of the image, upright; scores: (n,) float32; class_ids: (n,) int64, rows of the
    class head (COCO ids with COCO's weights); class_names: n strings; masks: (n, H, W) bool, None without a mask head.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    class_names: list
    masks: np.ndarray | None = None

    def __len__(self):
        return len(self.scores)

    def to_supervision(self):
        """-> supervision.Detections; UserError where that package is not installed."""
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision() needs the package supervision: pip install supervision") from None
        return supervision.Detections(xyxy=self.xyxy, confidence=self.scores, class_id=self.class_ids, mask=self.masks,
                                      data={"class_name": np.array(self.class_names, dtype=str)})


class Detector:
    """A detector with its class names. The classes below set `size`; this one takes it from a checkpoint.

    Args:
        pretrain_weights: "coco" or the published file's name (rf-detr-nano.pth): COCO weights, downloaded once;
            a path: a checkpoint of our scripts (with masks where it has them) or a published file; None: random.
        num_classes: None keeps the classes of the weights (COCO's without weights); a number makes new class heads of
            num_classes + 1 rows, unless the weights already have that many.
        device: "cuda", "cpu", ...; None takes the GPU where there is one.
        resolution: side of the square input; None takes the checkpoint's, else the size's own.
    """

    size, masks = None, False  # masks: whether a new one has a mask head

    def __init__(self, pretrain_weights="coco", num_classes=None, device=None, resolution=None):
        for name, value in (("num_classes", num_classes), ("resolution", resolution)):
            if value is not None:
                whole(1)(name, value)
        self.device = usable_device(device)
        self.start = self._start(pretrain_weights)
        self.model, self.class_rows = self._build(num_classes, resolution)
        self.model.to(self.device).eval()

    @classmethod
    def from_checkpoint(cls, path, device=None):
        """-> a detector of what `save` or one of the training scripts wrote; of a size class only that size."""
        return cls(path, device=device)

    def _start(self, source):
        """-> Path of the weights to begin with, or None."""
        if source is None or str(source).lower() == "none":
            return None
        if not isinstance(source, (str, os.PathLike)):
            raise UserError(f"pretrain_weights = {source!r}: give \"coco\", None or a checkpoint's path")
        own = PUBLISHED[self.size].file if self.size in PUBLISHED else None
        if str(source).lower() == "coco" or (str(source) == own and not Path(own).is_file()):
            if not self.size:
                raise UserError("Detector knows its size from a checkpoint: give its path, or take RFDETRNano, ...")
            return weights.fetch(self.size)
        published = {file.file: size for size, file in PUBLISHED.items()}
        if str(source) in published and not Path(source).is_file():
            raise UserError(f"pretrain_weights = '{source}' is of size {published[str(source)]}, this is {self.size}")
        weights.require_source(str(source), "pretrain_weights")
        return Path(source)

    def _build(self, num_classes, resolution):
        """-> (RFDETR, {class name: row})."""
        given, args = self._given()
        rows = COCO_HEAD_ROWS if given is None else weights.rows_of(given)[0]
        rows = num_classes + 1 if num_classes else rows
        size = self.size or args["size"]
        side = resolution or args.get("resolution") or default_resolution(size)
        head = args.get("mask_head")
        if not args:  # a published file, or a new one
            head = weights.head_of(given) if given else mask_head_of(size, "official") if self.masks else None
        model = RFDETR(size, rows, side, mask_head=head)
        known = weights.load_pretrained(model, given)["class_rows"] if given else {}
        if not known:  # new class heads
            known = {f"class {row}": row for row in range(num_classes)} if num_classes else dict(COCO_ROWS)
        return model, known

    def _given(self):
        """-> (weights.Checkpoint to begin with or None, its model arguments; {} of a published file)."""
        if self.start is None:
            if not self.size:
                raise UserError("Detector needs a checkpoint; take RFDETRNano, RFDETRSmall, ... for a new one")
            return None, {}
        given = weights.read(self.start)
        args = given.rest.get("args")
        if not (isinstance(args, dict) and "size" in args):
            if not self.size:
                raise UserError(f"{given.name} does not say its size: load it with RFDETRNano, RFDETRSmall, ...")
            return given, {}
        if self.size and args["size"] != self.size:
            raise UserError(f"{given.name} holds a detector of size {args['size']}, not {self.size}")
        return given, args

    @property
    def class_names(self):
        """-> the class names, in the order of their rows."""
        return sorted(self.class_rows, key=self.class_rows.get)

    @property
    def resolution(self):
        """-> side of the square that the network sees."""
        return self.model.model_args["resolution"]

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, dataset_dir, epochs, **options):
        """Train on a Roboflow-layout data set and go on with the best epoch's weights.

        Starts from the weights of the last `train`, `from_checkpoint` or `pretrain_weights`, as stage 1 does, which
        knows no masks: a mask head is gone afterwards, and a line says so.

        Args:
            options: constants of train_detector_stage1.py, in small letters: batch=4, lr=1e-4, multi_scale=False, ...
        Returns:
            result of the script: {"run_dir", "checkpoint", "history", "best_epoch", "best_score", ...}.
        """
        import train_detector_stage1  # only here: predicting needs nothing of the training

        constants = {name.upper(): value for name, value in options.items()}
        size = self.model.model_args["size"]
        if constants.get("SIZE", size) != size:
            raise UserError(f"train(size={constants['SIZE']!r}): this detector is of size {size}; leave size out, or "
                            "train one of that size")
        constants = {"SIZE": size, "RESOLUTION": self.resolution,
                     "PRETRAIN_WEIGHTS": str(self.start or "none")} | constants
        if self.model.mask_head is not None:
            processes.say("note: train() trains the detector alone and leaves its mask head out; "
                          "train_seg_single_stage.py trains both")
        result = train_detector_stage1.main(DATASET_DIR=str(dataset_dir), EPOCHS=epochs, **constants)
        if Path(result["checkpoint"]).is_file():  # not after Ctrl+C in the first epoch
            self.start = Path(result["checkpoint"])
            self.model, self.class_rows = self._build(None, None)
            self.model.to(self.device).eval()
        return result

    # ---- prediction ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, images, threshold=0.5, batch_size=8):
        """Detect objects.

        Args:
            images: one image or a list: a path, a PIL image (both are turned upright, as their EXIF data say), an array
                (H, W, 3) uint8 RGB, a tensor (3, H, W), uint8 or float in [0, 1]. Sizes may differ; the network sees
                them stretched to its square.
            threshold: lowest score in [0, 1]. batch_size: images per forward pass.
        Returns:
            Detections, or a list of them for a list.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
            raise UserError(f"threshold = {threshold!r}: choose a score in [0, 1]")
        whole(1)("batch_size", batch_size)
        several = isinstance(images, (list, tuple))
        found, images = [], list(images) if several else [images]
        for first in range(0, len(images), batch_size):
            found += self._predict_batch([as_tensor(image) for image in images[first:first + batch_size]], threshold)
        return found if several else found[0]

    def _predict_batch(self, images, threshold):
        """[(3, H, W) uint8 or float in [0, 1], ...] -> [Detections, ...]."""
        square = (self.resolution, self.resolution)
        pixels = torch.stack([as_float(stretched_image(image.to(self.device), square)) for image in images])
        sizes = [tuple(image.shape[-2:]) for image in images]
        self.model.eval()
        results = evaluate.predict_batch(self.model, pixels, sizes, rows=self.class_rows.values())
        return [self._detections({key: value[one["scores"] >= threshold] for key, value in one.items()}, size)
                for one, size in zip(results, sizes, strict=True)]

    def _detections(self, one, size):
        """One image's result of evaluate.predict_batch, size (H, W) -> Detections."""
        name_of = {row: name for name, row in self.class_rows.items()}
        height, width = size
        boxes = one["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        masks = evaluate.full_masks(one["mask_logits"], size).numpy() if "mask_logits" in one else None
        rows = one["labels"]
        return Detections(boxes.numpy(), one["scores"].numpy(), rows.numpy(),
                          [name_of[row] for row in rows.tolist()], masks)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, path):
        """Write a checkpoint that `from_checkpoint`, the scripts and a plain torch.load read.

        An earlier one of its kind moves into previous_<n>; UserError where a file with anything else stands there, such
        as a run's last.pt.
        """
        earlier = checkpoint.require_replaceable(file_name(path, "save"), weights.ENTRIES, "save()")
        weights.write(weights.checkpoint_content(self.model, self.class_names, self.class_rows), path, earlier)

    def export(self, path, opset=18, batch_size=1):
        """Write ONNX and compare it with PyTorch through onnxruntime. -> largest difference

        Input: images (batch_size, 3, S, S) RGB in [0, 1], S = `resolution`. Outputs: logits (B, Q, K), boxes
        (B, Q, 4) normalised cxcywh, and mask_logits (B, Q, S / 4, S / 4) where there is a mask head. An earlier file
        of that name moves into previous_<n>.

        Raises:
            UserError: a package is missing, an opset below 18, a folder, or a name that is not *.onnx; or a file that
                differs by more than TOLERANCE.
        """
        return export_onnx(self.model, file_name(path, "export"), opset, batch_size)


class RFDETRNano(Detector):
    """384 pixels, two decoder layers."""

    size = "nano"


class RFDETRSmall(Detector):
    """512 pixels, three decoder layers."""

    size = "small"


class RFDETRMedium(Detector):
    """576 pixels, four decoder layers."""

    size = "medium"


class RFDETRBase(Detector):
    """560 pixels, patches of 14 pixels in four windows per side, three decoder layers."""

    size = "base"


class RFDETRLarge(Detector):
    """560 pixels, DINOv2-B and two feature levels; its authors call it deprecated."""

    size = "large"


class RFDETRLarge2026(Detector):
    """704 pixels, otherwise the medium one."""

    size = "large_2026"


class RFDETRSegNano(Detector):
    """312 pixels, 100 queries, four decoder layers; like the others below with masks, in patches of 12 pixels."""

    size, masks = "seg_nano", True


class RFDETRSegSmall(Detector):
    """384 pixels, 100 queries, four decoder layers."""

    size, masks = "seg_small", True


class RFDETRSegMedium(Detector):
    """432 pixels, 200 queries, five decoder layers."""

    size, masks = "seg_medium", True


class RFDETRSegLarge(Detector):
    """504 pixels, 200 queries, five decoder layers."""

    size, masks = "seg_large", True


class RFDETRSegXLarge(Detector):
    """624 pixels, 300 queries, six decoder layers."""

    size, masks = "seg_xlarge", True


class RFDETRSeg2XLarge(Detector):
    """768 pixels, 300 queries, six decoder layers."""

    size, masks = "seg_2xlarge", True


class RFDETRSegPreview(Detector):
    """432 pixels, 200 queries, four decoder layers: the first one, replaced by those above."""

    size, masks = "seg_preview", True


def file_name(value, method):
    """-> Path of a file that `method` shall write; UserError where it is no name."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise UserError(f"{method}({value!r}): give the name of the file to write")
    return Path(value)


def usable_device(device):
    """-> torch.device of what the user calls it, the GPU or the CPU for None; UserError where this torch cannot use it.
    """
    if device is None or device == "":
        return processes.device()
    try:
        return torch.empty(1, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch without CUDA
        choices = '"cpu", "cuda"' if torch.cuda.is_available() else '"cpu" (torch finds no usable GPU)'
        raise UserError(f"device = {device!r} cannot be used here: choose {choices}, or None") from error


def as_tensor(image):
    """A path, PIL image, array (H, W, 3) uint8, or tensor (3, H, W) uint8 or in [0, 1] -> (3, H, W) uint8 or float."""
    if isinstance(image, (str, os.PathLike)):
        return datasets.read_image(image)
    if isinstance(image, Image.Image):
        try:
            system.require_eight_bits(image)
            image = np.asarray(system.upright(image).convert("RGB"))
        except system.FAULTS as error:  # Pillow reads a file's pixels only now
            raise UserError(f"predict() cannot use this PIL image: {error}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)  # (3, H, W)
    if torch.is_tensor(image) and image.ndim == 3 and image.shape[0] == 3 and image.numel():
        if image.dtype == torch.uint8:
            return image
        if image.is_floating_point() and image.min() >= 0 and image.max() <= 1:
            return image.float()
    shape = f" {tuple(image.shape)} {image.dtype}" if hasattr(image, "shape") else ""
    raise UserError(f"predict() cannot use a {type(image).__name__}{shape}: give a path, a PIL image, an array "
                    "(H, W, 3) of uint8 RGB, or a tensor (3, H, W), uint8 or float in [0, 1]")


def as_float(image):
    """uint8 -> float in [0, 1]; floats stay as they are."""
    return to_floats(image) if image.dtype == torch.uint8 else image


class Deployable(nn.Module):
    """RFDETR with plain tensors in and out; see Detector.export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        outputs = self.model(images)
        found = outputs["logits"], outputs["boxes"]
        if self.model.mask_head is None:
            return found
        logits = masks.every_mask(outputs)  # (B, Q, S / 4, S / 4)
        if not self.model.mask_head.confine:
            return *found, logits
        confined = masks.confined(logits.flatten(0, 1), outputs["boxes"].flatten(0, 1))
        return *found, confined.view_as(logits)


@torch.no_grad()
def export_onnx(model, path, opset, batch_size):
    """See Detector.export."""
    whole(1)("batch_size", batch_size)
    if path.is_dir() or path.suffix.lower() != ".onnx":
        kind = "a folder" if path.is_dir() else "no name of an ONNX file"
        raise UserError(f"{path.as_posix()} is {kind}: give one that ends in .onnx")
    onnx_file.require_packages("export()")
    onnx_file.require_opset(opset, "opset")
    side, device = model.model_args["resolution"], next(model.parameters()).device
    example, images = torch.rand(2, batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    checkpoint.require_writable(path.parent)
    names = ["logits", "boxes", "mask_logits"]
    try:
        deployable = Deployable(model).cpu().eval()
        expected = deployable(images)
        program = onnx_file.export_program(deployable, example)
        with system.written(path) as temporary:
            written = onnx_file.write(program, temporary, opset, "images", names[:len(expected)])
            found = onnx_file.difference(written(images), expected)
            del written  # Windows: an open file can be neither moved nor deleted
            if not found <= TOLERANCE:
                raise UserError(f"the ONNX file differs from PyTorch by {found:.1e}, more than {TOLERANCE}, and was "
                                f"not written to {path.as_posix()}")
            if earlier := checkpoint.keep_earlier(path.parent, [path.name], "model"):
                processes.say(f"{path.as_posix()} was there already: moved to {earlier.as_posix()}")
    finally:
        model.to(device)
    return found
