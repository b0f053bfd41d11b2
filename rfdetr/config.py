"""The sizes of RF-DETR, their published weights, and the rows of COCO's class head.

Robinson et al., "RF-DETR: Neural Architecture Search for Real-Time Detection Transformers", arXiv 2511.09554: a
windowed DINOv2 backbone, a projector, a deformable decoder with 300 queries in 13 groups. `detector_config` turns a
size into transformers' configuration.
"""

from dataclasses import dataclass

from transformers import RfDetrConfig
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from utils.config import UserError

# What the published sizes have in common; a size below states its differences.
COMMON = {
    "hidden": 384, "blocks": 12, "heads": 6, "patch": 16, "windows": 2, "stages": (3, 6, 9, 12),  # the ViT
    "channels": 256, "decoder_layers": 3, "self_heads": 8, "cross_heads": 16, "points": 2, "ffn": 2048,  # the decoder
    "queries": 300, "groups": 13, "levels": 1,
}
SIZES = {  # resolution: side of the square input; grid: side of the position embeddings
    "nano": {"resolution": 384, "grid": 24, "decoder_layers": 2},
    "small": {"resolution": 512, "grid": 32},
    "medium": {"resolution": 576, "grid": 36, "decoder_layers": 4},
    "base": {"resolution": 560, "grid": 37, "patch": 14, "windows": 4, "stages": (2, 5, 8, 11)},
    # deprecated by its authors: DINOv2-B, two feature levels (P3, P5)
    "large": {"resolution": 560, "grid": 37, "patch": 14, "windows": 4, "stages": (2, 5, 8, 11), "hidden": 768,
              "heads": 12, "channels": 384, "self_heads": 12, "cross_heads": 24, "points": 4, "levels": 2},
    "large_2026": {"resolution": 704, "grid": 44, "decoder_layers": 4},
    # Roboflow's segmentation models: detectors of their own, patches of 12 pixels, with a mask head on them
    "seg_nano": {"resolution": 312, "grid": 26, "patch": 12, "windows": 1, "decoder_layers": 4, "queries": 100},
    "seg_small": {"resolution": 384, "grid": 32, "patch": 12, "decoder_layers": 4, "queries": 100},
    "seg_medium": {"resolution": 432, "grid": 36, "patch": 12, "decoder_layers": 5, "queries": 200},
    "seg_large": {"resolution": 504, "grid": 42, "patch": 12, "decoder_layers": 5, "queries": 200},
    "seg_xlarge": {"resolution": 624, "grid": 52, "patch": 12, "decoder_layers": 6},
    "seg_2xlarge": {"resolution": 768, "grid": 64, "patch": 12, "decoder_layers": 6},
    "seg_preview": {"resolution": 432, "grid": 36, "patch": 12, "decoder_layers": 4, "queries": 200},  # their first one
    # the demo's: learns from scratch on two CPU cores; nobody has published weights of it, and it is not a nano
    "tiny": {"resolution": 160, "grid": 20, "patch": 8, "hidden": 96, "blocks": 6, "heads": 4, "stages": (2, 4, 6),
             "channels": 128, "decoder_layers": 2, "self_heads": 4, "cross_heads": 8, "ffn": 256, "queries": 60,
             "groups": 4},
}


@dataclass(frozen=True)
class Published:
    """A published COCO checkpoint: the file's name in the cache, where it comes from, its MD5 sum."""

    file: str
    url: str
    md5: str


_STORE = "https://storage.googleapis.com/rfdetr/"
PUBLISHED = {
    "nano": Published("rf-detr-nano.pth", f"{_STORE}nano_coco/checkpoint_best_regular.pth",
                      "fb6504cce7fbdc783f7a46991f07639f"),
    "small": Published("rf-detr-small.pth", f"{_STORE}small_coco/checkpoint_best_regular.pth",
                       "fb37061c1af7bace359c91b723a8d5c1"),
    "medium": Published("rf-detr-medium.pth", f"{_STORE}medium_coco/checkpoint_best_regular.pth",
                        "7223f764a87b863f02eb8d52bf0ce2ee"),
    "base": Published("rf-detr-base.pth", f"{_STORE}rf-detr-base-coco.pth", "b4d3ce46099eaed50626ede388caf979"),
    "large": Published("rf-detr-large.pth", f"{_STORE}rf-detr-large.pth", "992c8e862aa733a7bb2777e45d49f1a0"),
    "large_2026": Published("rf-detr-large-2026.pth", f"{_STORE}rf-detr-large-2026.pth",
                            "5cb72153541cbcb9aa6efa26222acc75"),
    "seg_nano": Published("rf-detr-seg-nano.pt", f"{_STORE}rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20"),
    "seg_small": Published("rf-detr-seg-small.pt", f"{_STORE}rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08"),
    "seg_medium": Published("rf-detr-seg-medium.pt", f"{_STORE}rf-detr-seg-m-ft.pth",
                            "a49af1562c3719227ad43d0ca53b4c7a"),
    "seg_large": Published("rf-detr-seg-large.pt", f"{_STORE}rf-detr-seg-l-ft.pth", "275f7b094909544ed2841c94a677d07e"),
    "seg_xlarge": Published("rf-detr-seg-xlarge.pt", f"{_STORE}rf-detr-seg-xl-ft.pth",
                            "3693b35d0eea86ebb3e0444f4a611fba"),
    "seg_2xlarge": Published("rf-detr-seg-xxlarge.pt", f"{_STORE}rf-detr-seg-2xl-ft.pth",
                             "040bc3412af840fa8a47e0ff69b552ba"),
    "seg_preview": Published("rf-detr-seg-preview.pt", f"{_STORE}rf-detr-seg-preview.pt",
                             "e35820c28fb86080558123e47a5e49ca"),
}

SEG_HEADS = ("ours", "official")  # the latter: of the form of Roboflow's segmentation checkpoints

# The published heads have 91 rows, and a class's row is its COCO category id; these ids belong to no class.
COCO_HEAD_ROWS = 91
_NO_CLASS = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
COCO_ROWS = dict(zip(_COCO_NAMES, sorted(set(range(COCO_HEAD_ROWS)) - _NO_CLASS), strict=True))


def settings(size):
    """-> dict of a size's numbers (the keys of COMMON, and "resolution", "grid"). UserError for an unknown size."""
    if size not in SIZES:
        raise UserError(f"size '{size}': choose one of {', '.join(SIZES)}")
    return COMMON | SIZES[size]


def default_resolution(size):
    """-> side of the square input that the size was made for."""
    return settings(size)["resolution"]


def mask_head_of(size, choice="ours"):
    """-> the kind of mask head that a size gets by SEG_HEAD: "ours" is the light one for the smallest detectors and the
    full one for others. UserError for another choice."""
    if choice not in SEG_HEADS:
        raise UserError(f"--seg_head {choice}: choose one of {', '.join(SEG_HEADS)}")
    return "official" if choice == "official" else "nano" if size in ("nano", "seg_nano", "tiny") else "full"


def block_size(size):
    """-> patch size * windows: the step between resolutions that the backbone's windows divide evenly."""
    return settings(size)["patch"] * settings(size)["windows"]


def token_count(size, resolution):
    """-> T, the feature positions that compete for the decoder's queries at a resolution."""
    side = resolution // settings(size)["patch"]
    return side**2 if settings(size)["levels"] == 1 else (2 * side)**2 + ((side + 1) // 2)**2


def smallest_resolution(size):
    """-> the lowest resolution that gives every query a feature position."""
    step, queries = block_size(size), settings(size)["queries"]
    return next(side for side in range(step, 10**6, step) if token_count(size, side) >= queries)


def check_resolution(size, resolution):
    """UserError unless the windows divide `resolution` and it has at least as many feature positions as queries."""
    step = block_size(size)
    if not isinstance(resolution, int) or resolution < step or resolution % step:
        near = max(round(float(resolution) / step), 1) * step if isinstance(resolution, (int, float)) else None
        raise UserError(f"--resolution {resolution}: size {size} needs a multiple of {step}"
                        + (f", for example {max(near, smallest_resolution(size))}" if near else ""))
    if token_count(size, resolution) < settings(size)["queries"]:
        raise UserError(f"--resolution {resolution}: size {size} has {settings(size)['queries']} queries, and "
                        f"{resolution} gives only {token_count(size, resolution)} feature positions to choose them "
                        f"from; use {smallest_resolution(size)} or more")


def detector_config(size, num_rows, resolution=None):
    """transformers' configuration of one size.

    Args:
        size: a key of SIZES; num_rows: rows of the class head, K.
        resolution: side of the square input, None for the size's own. Another one than the size's own also sets the
            side of the position embeddings, so that the backbone need not interpolate them in every forward.
    Raises:
        UserError: unknown size, or a resolution that does not fit it.
    """
    one = settings(size)
    resolution = one["resolution"] if resolution is None else resolution
    check_resolution(size, resolution)
    if not isinstance(num_rows, int) or num_rows < 1:
        raise UserError(f"num_rows = {num_rows!r}: the class head needs at least one row")
    grid = one["grid"] if resolution == one["resolution"] else resolution // one["patch"]
    backbone = RfDetrDinov2Config(
        hidden_size=one["hidden"], num_hidden_layers=one["blocks"], num_attention_heads=one["heads"],
        image_size=grid * one["patch"], patch_size=one["patch"], num_windows=one["windows"],
        out_features=[f"stage{stage}" for stage in one["stages"]], layer_norm_eps=1e-6)
    return RfDetrConfig(
        backbone_config=backbone, num_labels=num_rows, d_model=one["channels"], num_feature_levels=one["levels"],
        decoder_layers=one["decoder_layers"], decoder_self_attention_heads=one["self_heads"],
        decoder_cross_attention_heads=one["cross_heads"], decoder_n_points=one["points"], decoder_ffn_dim=one["ffn"],
        num_queries=one["queries"], group_detr=one["groups"],
        dropout=0.0, layer_norm_eps=1e-6)  # transformers' defaults are not the published values
