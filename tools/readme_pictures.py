"""Draw docs/images/readme_strip.jpg, the pictures at the top of README.md, from procedural scenes.

    python train_seg_stage2.py --demo          # the mask head
    python train_unet_derain.py --demo         # the U-Net
    python -m tools.readme_pictures

De-rainer and detector are those of assets/demo/; mask head and U-Net are not kept in the repository, so their demos are
run first. Above: a scene in rain with what the detector finds, the same de-rained, and what it finds then. Below: a
scene through a wet windshield, what the U-Net makes of it, and instance masks. The scenes were chosen as ones on which
the networks show what they do (docs/results.md has the averages); as they are procedural, they can be published.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import resize

from rfdetr.detr import Detector
from utils import config, visualize
from utils.boxes import decode
from utils.demo.scene import render_scene
from utils.images import to_floats
from utils.integrated_model import load_integrated_model
from utils.networks.derainers import load_trained
from utils.networks.rtdetr import id2label_of
from utils.networks.tiling import restore
from utils.weather import rain, windshield

OUT = str(Path(__file__).resolve().parent.parent / "docs" / "images" / "readme_strip.jpg")  # the strip
RAIN_SCENE = 157         # seed of the scene in the upper row
PANE_SCENE = 12          # of the one behind the windshield
MASK_SCENE = 150         # of the one with masks
PANE = 14                # seed of the water on the windshield
SIDE = 320               # pixels of a panel; scenes and weather are drawn at this size
DETECTOR_SIDE = 160      # what detector, mask head and (halved) SPDNet have been trained at
UNET_SIDE = 128          # what the U-Net sees
THRESHOLD = 0.5          # score from which a detection is drawn
SPDNET_MODEL_PATH = "./assets/demo/spdnet_adapted.pt"
RTDETR_MODEL_NAME = "./assets/demo/rtdetr"
UNET_PATH = "./demo/outputs_unet/best.pt"                         # of python train_unet_derain.py --demo
SEGMENTATION_PATH = "./demo/runs/segmentation_tiny_160_1/best.pt"  # of python train_seg_stage2.py --demo
QUALITY = 85             # JPEG quality; the strip is to stay below 200 KB
_BAND, _GAP, _LETTERS = 40, 6, 25  # pixels: caption, gap, font; captions stay readable at a phone's width


def main(**overrides):
    """Draw the strip; -> its path."""
    cfg = config.resolve(globals(), overrides)
    for name, command in (("UNET_PATH", "train_unet_derain.py"), ("SEGMENTATION_PATH", "train_seg_stage2.py")):
        if not Path(getattr(cfg, name)).is_file():
            raise config.UserError(f"{name} = '{getattr(cfg, name)}' does not exist: python {command} --demo makes it")
    with torch.no_grad():
        rows = [rain_panels(cfg), [*windshield_panels(cfg), mask_panel(cfg)]]
    out = Path(cfg.OUT)
    out.parent.mkdir(parents=True, exist_ok=True)
    strip = page(rows, cfg.SIDE)
    strip.save(out, quality=cfg.QUALITY, optimize=True)
    print(f"{out}: {strip.width} x {strip.height}, {out.stat().st_size / 1024:.0f} KB")
    return out


def as_floats(pixels):
    """(H, W, 3) uint8 -> (1, 3, H, W) float in [0, 1]."""
    return to_floats(torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1))[None]


def rain_panels(cfg):
    """-> [(caption, PIL image), ...]: found in rain, de-rained, found in the de-rained picture."""
    scale = cfg.DETECTOR_SIDE / 2 / cfg.SIDE  # SPDNet sees as many pixels as in the demo's training
    model = load_integrated_model(cfg.SPDNET_MODEL_PATH, cfg.RTDETR_MODEL_NAME, None, derain_scale=scale).eval()
    scene, _ = render_scene(cfg.RAIN_SCENE, size=(cfg.SIDE, cfg.SIDE))
    wet = as_floats(rain.add_rain(np.asarray(scene), rain.rng_for(0, str(cfg.RAIN_SCENE)), "heavy"))
    derained = model.derain(wet)
    return [("detected in rain", detected(cfg, model.detection_module, wet)),
            ("de-rained", visualize.to_pil(derained[0])),
            ("detected again", detected(cfg, model.detection_module, derained))]


def detected(cfg, detector, image):
    """-> PIL image with boxes and class names; image: (1, 3, SIDE, SIDE) in [0, 1]."""
    outputs = detector(pixel_values=resize(image, [cfg.DETECTOR_SIDE] * 2, antialias=True))
    found = decode(outputs.logits, outputs.pred_boxes, [(cfg.SIDE, cfg.SIDE)])[0]
    keep = found["scores"] >= cfg.THRESHOLD
    return visualize.draw_boxes(image[0], found["boxes"][keep], found["labels"][keep], id2label_of(detector))


def windshield_panels(cfg):
    """-> [(caption, PIL image), ...]: a scene through a wet windshield, and what the U-Net makes of it."""
    scene, _ = render_scene(cfg.PANE_SCENE, size=(cfg.SIDE, cfg.SIDE))
    wet = as_floats(windshield.add_windshield_rain(np.asarray(scene), rain.rng_for(cfg.PANE, "strip"), "medium"))
    model = load_trained(cfg.UNET_PATH)
    small = resize(wet, [cfg.UNET_SIDE] * 2, antialias=True)
    correction = restore(model, small) - small
    restored = (wet + resize(correction, [cfg.SIDE] * 2, antialias=True)).clamp(0, 1)
    return [("wet windshield", visualize.to_pil(wet[0])), ("restored", visualize.to_pil(restored[0]))]


def mask_panel(cfg):
    """-> (caption, PIL image): a clear scene with RF-DETR's instance masks."""
    scene, _ = render_scene(cfg.MASK_SCENE, size=(cfg.SIDE, cfg.SIDE))
    found = Detector.from_checkpoint(cfg.SEGMENTATION_PATH, device="cpu").predict(np.asarray(scene), cfg.THRESHOLD)
    labels = torch.arange(len(found))  # a colour per object
    picture = visualize.draw_masks(as_floats(scene)[0], torch.from_numpy(found.xyxy), labels,
                                   dict(enumerate(found.class_names)), torch.from_numpy(found.masks))
    return "instance masks", picture


def page(rows, side):
    """-> PIL image: panels of `side` pixels in rows, each below its caption."""
    font = ImageFont.load_default(size=_LETTERS)
    strip = Image.new("RGB", (len(rows[0]) * (side + _GAP) - _GAP, len(rows) * (side + _BAND)), visualize.PAPER)
    pen = ImageDraw.Draw(strip)
    for i, row in enumerate(rows):
        for j, (caption, picture) in enumerate(row):
            left, top = j * (side + _GAP), i * (side + _BAND)
            pen.text((left + side // 2, top + _BAND // 2), caption, fill=visualize.INK, font=font, anchor="mm")
            strip.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top + _BAND))
    return strip


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
