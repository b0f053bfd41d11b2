"""How much could a perfect de-rainer win back? The demo's detector on images that no network has made.

    python -m tools.derain_bounds

Every row replaces a part of the rainy image by that part of its clean twin, and leaves the rest: what the row then wins
is the most that a de-rainer for this part could win.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F

import Eval_SPDNet_Adaptation as Eval
from utils import config, datasets, processes, report
from utils.demo.coco import ensure_demo
from utils.evaluation.coco import detection_scores
from utils.networks.rtdetr import id2label_of, load_rtdetr

_ROOT = Path(__file__).resolve().parent.parent

COARSE = 20                             # pixels a side to which "coarse" shrinks an image


def tone(rainy, clean):
    """The best straight line per image and channel."""
    middle, wanted = rainy.mean((2, 3), keepdim=True), clean.mean((2, 3), keepdim=True)
    slope = ((rainy - middle) * (clean - wanted)).mean((2, 3), keepdim=True)
    return slope / (rainy - middle).square().mean((2, 3), keepdim=True) * (rainy - middle) + wanted


def coarse_part(images, side):
    """Brightness and colour at side x side pixels, enlarged again."""
    small = F.interpolate(images, size=side, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)


def perfect_network(rainy, clean, scale):
    """What a de-rainer would win that sees DERAIN_SCALE of an image and answers with the clean one."""
    small = F.interpolate(clean - rainy, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)
    return rainy + F.interpolate(small, clean.shape[-2:], mode="bilinear", align_corners=False)


def bounds(side, scale):
    """-> {what is taken from the clean twin: (rainy, clean) -> images}, all (B, 3, H, W) in [0, 1]."""
    return {
        "nothing (rainy)": lambda rainy, clean: rainy,
        "tone": tone,
        "coarse brightness and colour": lambda rainy, clean: rainy + coarse_part(clean - rainy, side),
        f"everything at scale {scale}": lambda rainy, clean: perfect_network(rainy, clean, scale),
        "everything finer than coarse": lambda rainy, clean: clean + coarse_part(rainy - clean, side),
        "everything (clean)": lambda rainy, clean: clean,
    }


@torch.no_grad()
def main(**overrides):
    """Print mAP and the share of the rain gap for every bound."""
    side = config.resolve(globals(), overrides).COARSE
    os.chdir(_ROOT)
    ensure_demo()
    cfg, device = config.resolve(vars(Eval), {"demo": True}), processes.device()
    model = load_rtdetr(cfg.RTDETR_MODEL_NAME, device=device)
    loaders = Eval.build_loaders(cfg, id2label_of(model))
    twins = [datasets.to_device(batch, device)["images"] for batch in loaders["clean"]]  # in the order of the rainy
    scores = {}
    for name, bound in bounds(side, cfg.DERAIN_SCALE).items():
        following = iter(twins)

        def detect(images, bound=bound, following=following):
            return model(pixel_values=bound(images, next(following)).clamp(0, 1))

        scores[name] = detection_scores(detect, loaders["rainy"], device, name=name)[0]["mAP"]
    rainy, best = scores["nothing (rainy)"], scores["everything (clean)"]
    rows = [{"part": name, "mAP": score, "gap": f"{100 * (score - rainy) / (best - rainy):.1f}%"}
            for name, score in scores.items()]
    print("\n" + report.table(rows, {"part": "taken from the clean twin", "mAP": "mAP", "gap": "of the rain gap"}))


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
