"""Draw docs/images/windshield_contact_sheet.jpg: demo scenes, clean and through three wet windshields.

    python -m tools.windshield_contact_sheet

The scenes are procedural (utils/demo/coco.py), so the picture can be published. Each row has one seed, so that its
panes share focus, wipers and wind and differ in how much water there is.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.rain_contact_sheet import require_sizes
from utils import config, system
from utils.demo.scene import render_scene
from utils.weather import rain, windshield

OUT = str(Path(__file__).resolve().parent.parent / "docs" / "images" / "windshield_contact_sheet.jpg")  # the sheet
SCENES = (3, 5, 8, 12)   # seeds of the scenes, one row each
PANES = (14, 1, 6, 5)    # seeds of the water, one per row; chosen to show both focuses and wipers
SCENE_SIZE = (640, 480)  # the scenes' width and height: the water is drawn at this size
PICTURE_SIZE = (400, 300)  # the size in the sheet
QUALITY = 80             # JPEG quality; the sheet is to stay below 400 KB


def main(**overrides):
    """Draw the sheet; -> its path."""
    cfg = config.resolve(globals(), overrides)
    if not system.is_image(cfg.OUT):
        raise config.UserError(f"OUT = '{cfg.OUT}': give a file that ends in one of {' '.join(system.SUFFIXES)}")
    if len(cfg.SCENES) != len(cfg.PANES):
        raise config.UserError(f"SCENES = {cfg.SCENES} and PANES = {cfg.PANES}: give one pane for each scene")
    columns = ("clean", *windshield.INTENSITIES)
    require_sizes(cfg)
    width, height = cfg.PICTURE_SIZE
    band = 24
    sheet = Image.new("RGB", (len(columns) * width, band + len(cfg.SCENES) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((column * width + width // 2, band // 2), title, fill="black", anchor="mm",
                  font=ImageFont.load_default(16))
    for row, (scene, pane) in enumerate(zip(cfg.SCENES, cfg.PANES, strict=True)):
        clean = np.asarray(render_scene(scene, size=cfg.SCENE_SIZE)[0])
        pictures = [clean] + [windshield.add_windshield_rain(clean, rain.rng_for(pane, "sheet"), name)
                              for name in windshield.INTENSITIES]
        for column, pixels in enumerate(pictures):
            tile = Image.fromarray(pixels).resize(cfg.PICTURE_SIZE, Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * width, band + row * height))
    out = Path(cfg.OUT)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, quality=cfg.QUALITY, optimize=True)
    print(f"{out}: {sheet.width} x {sheet.height}, {out.stat().st_size / 1024:.0f} KB")
    return out


if __name__ == "__main__":
    main(**config.from_command_line(globals()))
