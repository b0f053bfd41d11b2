"""RT-DETR, RT-DETRv2 and D-FINE from transformers: load them, build small RT-DETRs, and reach the features between
backbone and encoder. What differs between the three stands here; everywhere else one is as good as another.

Input: RGB in [0, 1], sides a multiple of 32, no ImageNet normalisation. Outputs: `logits` (B, Q, K) and `pred_boxes`
(B, Q, 4), normalised cxcywh.
"""

import copy
import json
import math
import os
from pathlib import Path
from unittest import mock

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from torch.overrides import TorchFunctionMode
from transformers import RTDetrConfig, RTDetrResNetConfig
from transformers.utils.logging import disable_progress_bar

from utils import checkpoint, freeze, system
from utils.config import UserError
from utils.networks.rtdetr_loss import dfine_loss, rtdetr_loss

disable_progress_bar()  # transformers draws bars in block characters, even for a file of a megabyte

BACKBONES = {  # the published models' settings
    "r18": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "r34": {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 6, 3]},
    "r50": {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]},
    "tiny": {"layer_type": "basic", "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "embedding_size": 32},
}
FEATURE_LEVELS = ("backbone", "encoder", "both")
HEADS = {
    "r18": {"hidden_expansion": 0.5, "decoder_layers": 3},
    "r34": {"hidden_expansion": 0.5, "decoder_layers": 4},
    "r50": {},
    "tiny": {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "hidden_expansion": 0.5, "decoder_layers": 2,
             "decoder_in_channels": [64, 64, 64], "num_queries": 40, "num_denoising": 40},
}


class _FilledOnTheGpu(TorchFunctionMode):
    """Within, `tensor[index] = number` fills in place; torch would copy the number to the GPU and wait for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
            args[0][args[1]].fill_(args[2])
            return None
        return function(*args, **(kwargs or {}))


class _AnyBatch(TorchFunctionMode):
    """Within, len(tensor) is 1 instead of a number that would fix the batch of an exported file: transformers takes it
    for a batch size that only detectors with `learn_initial_query` use."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return 1 if function is torch.Tensor.__len__ else function(*args, **(kwargs or {}))


class _WithoutWaits:
    """transformers' forward without six waits for the GPU, where it writes the sizes of the feature maps number by
    number; exported, it takes batches of any size."""

    def forward(self, pixel_values, *args, **kwargs):
        """See transformers' forward of the class of this name."""
        if torch.compiler.is_exporting() and not self.config.learn_initial_query:
            # of its checks of shapes ONNX has no form
            with _AnyBatch(), mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"):
                return super().forward(pixel_values, *args, **kwargs)
        if self.device.type != "cuda" or torch.compiler.is_compiling():
            return super().forward(pixel_values, *args, **kwargs)
        with _FilledOnTheGpu():
            return super().forward(pixel_values, *args, **kwargs)


# The names stay, because config.json holds them. See `_ours` for how one is made.

class RTDetrForObjectDetection(_WithoutWaits, transformers.RTDetrForObjectDetection):
    """Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", CVPR 2024."""


class RTDetrV2ForObjectDetection(_WithoutWaits, transformers.RTDetrV2ForObjectDetection):
    """Lv et al., "RT-DETRv2", arXiv 2407.17140: another sampling in the decoder, else RT-DETR."""


class DFineForObjectDetection(_WithoutWaits, transformers.DFineForObjectDetection):
    """Peng et al., "D-FINE", ICLR 2025: boxes as distributions of their edges, with losses of their own."""


_FAMILY = {  # {model_type in config.json: transformers' class, ours, criterion, name in print}
    "rt_detr": (transformers.RTDetrForObjectDetection, RTDetrForObjectDetection, rtdetr_loss, "RT-DETR"),
    "rt_detr_v2": (transformers.RTDetrV2ForObjectDetection, RTDetrV2ForObjectDetection, rtdetr_loss, "RT-DETRv2"),
    "d_fine": (transformers.DFineForObjectDetection, DFineForObjectDetection, dfine_loss, "D-FINE")}
_DETECTORS = tuple(published for published, *_ in _FAMILY.values())


def _ours(detector):
    """Give transformers' detector our forward and our criterion, in place. -> the detector

    It is built as transformers' own: of a class that is not, transformers leaves the heads without their first values.
    """
    _, detector.__class__, detector.loss_function, _ = _FAMILY[detector.config.model_type]
    return detector


def new_rtdetr(size, id2label, train_backbone_norms=True):
    """A randomly initialised RT-DETR.

    Args:
        size: "r18", "r34", "r50" (the published architectures) or "tiny" (about 1M parameters, for the demo).
        id2label: {label: class name}, labels 0..K-1.
        train_backbone_norms: True leaves the backbone's BatchNorm alive, which training from scratch needs; published
            weights come with False.
    """
    if size not in BACKBONES:
        raise UserError(f"ARCHITECTURE = {size!r}: choose one of {', '.join(BACKBONES)}")
    backbone = RTDetrResNetConfig(out_indices=[2, 3, 4], **BACKBONES[size])
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=backbone.hidden_sizes[1:], id2label=dict(id2label),
        label2id={name: label for label, name in id2label.items()},
        freeze_backbone_batch_norms=not train_backbone_norms, **HEADS[size])
    return _ours(transformers.RTDetrForObjectDetection(config))


def load_rtdetr(name, num_labels=None, device="cpu", constant="RTDETR_MODEL_NAME", new_classes=None):
    """Load a pretrained RT-DETR, RT-DETRv2 or D-FINE (its config.json says which) in float32 and eval mode.

    Args:
        name: a Hugging Face hub id, or a folder written by save_pretrained.
        num_labels: number of classes that the caller expects; None takes the checkpoint's.
        constant: the script's constant that holds `name`, for the error.
        new_classes: {label: name} replaces the checkpoint's classes; what depends on their number starts anew.
    Raises:
        UserError: not there, hub unreachable, not an RT-DETR, another number of classes.
    """
    looks_local = checkpoint.is_local(name)
    if looks_local and not (Path(name) / "config.json").is_file():
        problem = system.absent(name, folder=True) or "has no config.json in it"
        raise UserError(f"{constant} = '{name}' {problem}. Give a folder that save_pretrained wrote, or a Hugging Face "
                        "hub id such as PekingU/rtdetr_r18vd.")
    changes = {} if new_classes is None else {
        "id2label": new_classes, "label2id": {text: label for label, text in new_classes.items()},
        "ignore_mismatched_sizes": True}
    loudness = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # an unreachable hub is reported below, once, and not at each of its retries
    try:
        settings, _ = RTDetrConfig.get_config_dict(name, local_files_only=looks_local)
        _require_rtdetr(settings, f"{constant} = '{name}'")
        published = _FAMILY[settings["model_type"]][0]
        # float32: transformers keeps a checkpoint's own dtype otherwise
        detector, report = published.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, local_files_only=looks_local, **changes)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # huggingface_hub and httpx raise many kinds; all mean that the model cannot be had
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if checkpoint.unpickled(error):
            reason = "its weights are damaged, or hold other things than tensors; model.safetensors is the safe form"
        if isinstance(error, (AttributeError, TypeError)):  # transformers has not expected that
            reason = "its config.json is not that of a model"
        advice = ("" if looks_local else " The hub may be unreachable: on a machine with network run "
                  f"'hf download {name} --local-dir {name.split('/')[-1]}' and set {constant} to that folder, "
                  "or try --demo.")
        raise UserError(f"{constant} = '{name}' cannot be loaded: {reason}.{advice}") from error
    finally:
        hub_logging.set_verbosity(loudness)
    broken = [key for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()]
    if broken and new_classes is None:
        raise UserError(f"{constant} = '{name}': {len(broken)} weights are missing or misshapen, e.g. {broken[0]}")
    classes = detector.config.num_labels
    if num_labels is not None and classes != num_labels:
        raise UserError(f"{constant} = '{name}' has {classes} classes, {num_labels} were expected")
    return _ours(detector).to(device).eval()


def _require_rtdetr(settings, what):
    """UserError unless a config.json (dict) is one of _FAMILY with classes 0 .. K - 1; what: for the message."""
    kind = settings.get("model_type")
    if kind not in _FAMILY:
        raise UserError(f"{what} is a {kind or 'model without model_type'}, one of {', '.join(_FAMILY)} is needed, "
                        "such as PekingU/rtdetr_r18vd, PekingU/rtdetr_v2_r18vd or ustc-community/dfine-small-coco")
    classes = settings.get("id2label", {})
    if not isinstance(classes, dict) or {str(key) for key in classes} != {str(i) for i in range(len(classes))}:
        raise UserError(f"{what}: id2label in its config.json must number its {len(classes)} classes from 0 on without "
                        f"a gap; it has {system.listed(classes, 8)}")


def require_size(image_size, constant="IMAGE_SIZE"):
    """UserError unless the side of the square input is one that RT-DETR takes; names `constant`."""
    if image_size < 32 or image_size % 32:
        raise UserError(f"{constant} = {image_size}: RT-DETR needs a multiple of 32, such as "
                        f"{max(32, round(image_size / 32) * 32)}")


def require_queries(detector, image_size):
    """UserError unless a square image yields at least as many feature positions as the detector has queries, which are
    chosen among these. Only images far below 640 are too small: R18 needs 128."""
    def positions(side):
        return sum(math.ceil(side / stride) ** 2 for stride in detector.config.feat_strides)
    wanted = detector.config.num_queries
    if positions(image_size) < wanted:
        least = next(side for side in range(32, 10_000, 32) if positions(side) >= wanted)
        raise UserError(f"IMAGE_SIZE = {image_size} gives {positions(image_size)} feature positions, this detector "
                        f"chooses {wanted} of them: set {least} or more")


def trained_size(folder):
    """-> side of the images that a detector folder was written for, None where it does not say (or is a hub id)."""
    file = Path(folder) / "preprocessor_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["size"]["height"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rtdetr_of(model):
    """-> the detector inside a wrapper (its property `rtdetr`), or the model itself where it is one."""
    return model if isinstance(model, _DETECTORS) else model.rtdetr


def name_of(detector):
    """-> "RT-DETR", "RT-DETRv2" or "D-FINE"."""
    return _FAMILY[detector.config.model_type][-1]


def same_shapes(one, other):
    """-> whether two detectors have the same weights and buffers, of the same shapes."""
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (one, other)]
    return shapes[0] == shapes[1]


@torch.no_grad()
def interpolated(one, other, share):
    """-> a copy of `one` whose weights and buffers have gone `share` of the way to those of `other`, a detector with
    `same_shapes` (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022)."""
    model, wanted = copy.deepcopy(one), other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(wanted[name].to(tensor), share)
    return model


def id2label_of(detector):
    """-> {label: class name} with int keys."""
    return {int(label): name for label, name in detector.config.id2label.items()}


def freeze_first_stages(detector, count):
    """Freeze the stem and the first count - 1 stages of the backbone: general features of the largest maps, which an
    ImageNet backbone has already, and whose backward pass costs most (`FREEZE_AT` in Detectron2).

    Raises:
        UserError: FREEZE_AT is not between 0 and the number of stages with the stem.
    """
    backbone = detector.model.backbone.model
    backbone = getattr(backbone, "_backbone", backbone)  # of timm
    children = dict(backbone.named_children())
    if encoder := children.pop("encoder", None):  # transformers' own keep their stages in one
        children |= dict(encoder.named_children())
    names = [name for name in children if name.startswith(("stages", "blocks", "layer"))]
    stem, stages = [child for name, child in children.items() if name not in names], [children[name] for name in names]
    if len(stages) == 1:  # all of them in one list
        stages = list(stages[0])
    parts = [stem, *([stage] for stage in stages)]
    if not isinstance(count, int) or not 0 <= count < len(parts):
        raise UserError(f"FREEZE_AT = {count}: this backbone has a stem and {len(stages)} stages, choose 0 to "
                        f"{len(parts) - 1}; BACKBONE_LEARNING_RATE = 0 freezes all of it")
    for part in parts[:count]:
        for module in part:
            freeze.freeze(module)


def backbone_features(detector, images):
    """Images (B, 3, H, W) in [0, 1] -> [(B, C, H/8, W/8), (B, C, H/16, W/16), (B, C, H/32, W/32)]."""
    mask = torch.ones(images.shape[0], *images.shape[-2:], device=images.device)
    return [features for features, _ in detector.model.backbone(images, mask)]


def encode(detector, features):
    """Backbone features -> (their projections [(B, d_model, h, w), ...], transformers' output of the hybrid encoder,
    whose `last_hidden_state` is such a list)."""
    projected = [project(level) for project, level in zip(detector.model.encoder_input_proj, features, strict=True)]
    return projected, detector.model.encoder(projected)


def detect_from_features(detector, features, labels=None):
    """The rest of RT-DETR after `backbone_features`; output and loss equal detector(images, labels=labels)."""
    projected, encoded = encode(detector, features)
    # with encoder_outputs given, transformers only asks inputs_embeds for its device and skips the backbone
    return detector(pixel_values=None, inputs_embeds=projected[0], encoder_outputs=encoded, labels=labels)


def select_features(levels, encoded, feature_level):
    """-> tuple of feature maps for a consistency loss; levels: the backbone's, encoded: the hybrid encoder's."""
    return {"backbone": tuple(levels), "encoder": tuple(encoded), "both": (*levels, *encoded)}[feature_level]


@torch.no_grad()
def clean_features(detector, images, feature_level):
    """A detector's features of images that need no de-raining, the targets of a consistency loss.

    Args:
        images: (B, 3, H, W) in [0, 1]; feature_level: one of FEATURE_LEVELS.
    """
    levels = backbone_features(detector, images)
    encoded = () if feature_level == "backbone" else encode(detector, levels)[1].last_hidden_state
    return select_features(levels, encoded, feature_level)


def require_feature_level(feature_level):
    """UserError unless `select_features` knows it."""
    if feature_level not in FEATURE_LEVELS:
        raise UserError(f"FEATURE_LEVEL = {feature_level!r}: choose {', '.join(FEATURE_LEVELS[:-1])} or "
                        f"{FEATURE_LEVELS[-1]}")
