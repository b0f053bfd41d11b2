"""The U-Net's part of the demo data: clear scenes, the same through a wet windshield, and "real" rain without truth.

    root/windshield/demo_windshield.json       settings, written last: it says that the rest is complete
    root/windshield/clear/                     copies of root/coco's clean training scenes, 000000000001_0.jpg,
                                               000000000001_1.jpg, ...: one per pane that the scene is seen through
    root/windshield/windshield_rainy_v40/      the same names through utils/weather/windshield.py, with the rain.json
                                               that make_rain.py would write
    root/windshield/real_rainy/                scenes of root/coco_rain's validation split behind a wet pane: they stand
                                               for photographs, in another rain than the pairs

Only the U-Net's scripts ask for it; utils/demo/coco.py and its settings know nothing of it.
"""

import json
import shutil

import numpy as np
from PIL import Image

from utils import system
from utils.config import UserError
from utils.demo.build_once import build_once
from utils.demo.coco import JPEG, ensure_demo, results
from utils.weather import rain, windshield

FORMAT_VERSION = 2   # raise it when the same settings would give other files
CLEAR, RAINY, REAL = "clear", "windshield_rainy_v40", "real_rainy"
MARKER = "demo_windshield.json"


def ensure_windshield_demo(root="./demo", scenes=1200, panes=2, real=12, intensity="medium", seed=0):
    """Make sure that the pairs are under root/windshield, and draw them if they are missing or have other settings.

    Args:
        scenes: clear scenes; panes: times that each is seen through another rain, a pair each (a split must keep them
            together: SEQUENCE_SEPARATOR = "_"); a second pane is cheaper to draw than another scene. real:
            photographs without a pair; intensity: "light", "medium", "heavy" or "random", of the pairs;
            seed: of the rain on the glass.
    Returns:
        Path(root) / "windshield".
    Raises:
        UserError: root/windshield holds something that is not demo data.
    """
    root = ensure_demo(root)
    folder = root / "windshield"
    settings = {"format_version": FORMAT_VERSION, "windshield_version": windshield.VERSION,
                "demo": json.loads((root / "demo.json").read_text(encoding="utf-8")), "scenes": scenes,
                "panes": panes, "real": real, "intensity": intensity, "seed": seed}

    def make(build):
        _draw(root, build, settings)
        system.swap_in(build / "windshield", folder, build / "old")

    build_once(root, lambda: _is_complete(folder, settings), lambda: _refuse_foreign(folder), make)
    return folder


def _refuse_foreign(folder):
    """UserError where the folder holds what we did not draw: it is never deleted."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"{folder.as_posix()} is not demo data of RainSight and will not be replaced. Move it away.")


def _is_complete(folder, settings):
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        return False


def _draw(root, build, settings):
    """Every picture into build/windshield, the marker last."""
    target = build / "windshield"
    for name in (CLEAR, RAINY, REAL):
        (target / name).mkdir(parents=True)
    scenes = sorted((root / "coco" / "train2017").iterdir())[:settings["scenes"]]
    wet = sorted((root / "coco_rain" / "val2017").iterdir())[:settings["real"]]
    names = {path: [f"{path.stem}_{pane}{path.suffix}" for pane in range(settings["panes"])] for path in scenes}
    for path in scenes:
        for name in names[path]:
            shutil.copyfile(path, target / CLEAR / name)
    seed, intensity = settings["seed"], settings["intensity"]
    jobs = [(path, target / RAINY / name, seed, intensity, windshield.add_windshield_rain)
            for path in scenes for name in names[path]]
    jobs += [(path, target / REAL / path.name, seed + 1, "random", windshield.add_drops) for path in wet]
    results(_draw_one, jobs)
    record = {"kind": "windshield", "source": CLEAR, "seed": seed, "intensity": intensity,
              "version": windshield.VERSION}
    (target / RAINY / "rain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (target / MARKER).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _draw_one(job):
    """One scene through the glass."""
    source, target, seed, intensity, add = job
    with Image.open(source) as scene:
        pixels = np.asarray(scene.convert("RGB"))
    Image.fromarray(add(pixels, rain.rng_for(seed, target.name), intensity)).save(target, **JPEG)
