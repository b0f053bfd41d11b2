"""Draw docs/images/rain_contact_sheet.jpg: demo scenes, clean and in the three intensities of rain.

    python -m tools.rain_contact_sheet

The scenes are procedural (utils/demo/coco.py), so the picture can be published.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import config, system
from utils.demo.scene import render_scene
from utils.weather import rain

OUT = str(Path(__file__).resolve().parent.parent / "docs" / "images" / "rain_contact_sheet.jpg")  # the sheet
SCENES = (3, 5, 8, 12)  # seeds of the scenes, one row each
SCENE_SIZE = (640, 480)  # the scenes' width and height: the rain is drawn at this size
PICTURE_SIZE = (400, 300)  # the size in the sheet
SEED = 0                # of the rain
QUALITY = 80            # JPEG quality; the sheet is to stay below 400 KB


def require_sizes(cfg):
    """UserError unless SCENE_SIZE and PICTURE_SIZE are sizes."""
    for name in ("SCENE_SIZE", "PICTURE_SIZE"):
        if len(getattr(cfg, name)) != 2 or min(getattr(cfg, name)) < 32:
            raise config.UserError(f"{name} = {getattr(cfg, name)}: give width and height, 32 pixels or more each")


def main(**overrides):
    """Draw the sheet; -> its path."""
    cfg = config.resolve(globals(), overrides)
    if not system.is_image(cfg.OUT):
        raise config.UserError(f"OUT = '{cfg.OUT}': give a file that ends in one of {' '.join(system.SUFFIXES)}")
    require_sizes(cfg)
    width, height = cfg.PICTURE_SIZE
    band = 24
    sheet = Image.new("RGB", (4 * width, band + len(cfg.SCENES) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("clean", *rain.INTENSITIES)):
        draw.text((column * width + width // 2, band // 2), title, fill="black", anchor="mm",
                  font=ImageFont.load_default(16))
    for row, scene_seed in enumerate(cfg.SCENES):
        clean = np.asarray(render_scene(scene_seed, size=cfg.SCENE_SIZE)[0])
        pictures = [clean] + [rain.add_rain(clean, rain.rng_for(cfg.SEED, f"{scene_seed}-{name}"), name)
                              for name in rain.INTENSITIES]
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
