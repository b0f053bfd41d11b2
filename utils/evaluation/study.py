"""A blind user study of de-rainers as one page: which of two results, shown side by side, do people prefer?

`write_page` makes study.html out of pictures that were computed before. Everything is in that file: it runs without a
network, on a phone and on a desktop. Each participant sees the same comparisons in an order and on sides of their own,
and saves a JSON file, which `python -m tools.study_results` reads:

    {"format": 1, "study": id, "session": random id, "participant": "name or empty", "comparisons": 60,
     "answers": [{"image": "rain-001", "left": "PReNet", "right": "rainy input", "choice": "left", "right" or "same",
                  "milliseconds": 2140}, ...]}

The id of a study is a hash of its pictures and comparisons. Names of methods are kept out of sight, not secret: who
reads the page's source or the saved file finds them.
"""

import base64
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from utils import system, visualize
from utils.config import UserError

FORMAT = 1                # of the saved files
CHOICES = ("left", "right", "same")
JPEG_QUALITY = 95         # with full colour resolution: what is compared is finer than what JPEG changes here
TEMPLATE = Path(__file__).with_name("study.html")


def require_pairs(methods, most):
    """UserError where `most` comparisons are too few for all pairs of the methods, or there is but one method."""
    pairs = len(methods) * (len(methods) - 1) // 2
    if not pairs:
        raise UserError("STUDY: there is one method only, nothing to compare: give MODELS or RESULTS_DIRS")
    if most < pairs:
        raise UserError(f"STUDY_PAIRS = {most}: {len(methods)} methods make {pairs} pairs, each to be shown at least "
                        f"once: choose {pairs} or more, or compare fewer methods")


def comparisons(scenes, methods, most):
    """Which methods are compared on which scenes: every pair of methods equally often, no scene much more than others.

    Args:
        scenes, methods: how many; most: comparisons that a participant can be asked for.
    Returns:
        [(scene, one, other), ...] of numbers, one < other; no comparison is there twice.
    """
    pairs = list(itertools.combinations(range(methods), 2))
    used, found = [0] * scenes, []
    for turn in range(min(scenes, most // len(pairs))):
        for number, pair in enumerate(pairs):
            free = [scene for scene in range(scenes) if (scene, *pair) not in found]
            scene = min(free, key=lambda scene: (used[scene], (scene - number - turn) % scenes))
            used[scene] += 1
            found.append((scene, *pair))
    return found


def small(image, side):
    """-> PIL image of a (3, H, W) one in [0, 1] on any device, its longer side at most `side` pixels."""
    picture = visualize.to_pil(image)
    scale = min(1.0, side / max(picture.size))
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def data_uri(picture, quality=JPEG_QUALITY):
    """-> a PIL image as the text that a page can hold instead of a file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def write_page(path, scenes, rainy, most):
    """Write the page.

    Args:
        path: of the page; scenes: {scene: {method: PIL image}}, the same methods everywhere, `rainy` among them: it is
        shown above each comparison, and compared as well; most: comparisons that a participant can be asked for.
    Returns:
        {"study": id, "comparisons", "scenes", "methods": their numbers, "bytes": of the page}.
    """
    names, methods = list(scenes), list(next(iter(scenes.values())))
    require_pairs(methods, most)
    chosen = comparisons(len(names), len(methods), most)
    above = methods.index(rainy)
    needed = sorted({(scene, method) for scene, *pair in chosen for method in (above, *pair)})
    # in an order that says nothing about the method, and the same for the same study
    needed = [needed[i] for i in np.random.default_rng(0).permutation(len(needed))]
    number = {entry: i for i, entry in enumerate(needed)}
    content = {
        "format": FORMAT,
        "pictures": [data_uri(scenes[names[scene]][methods[method]]) for scene, method in needed],
        "comparisons": [[number[scene, above], number[scene, one], number[scene, other]]
                        for scene, one, other in chosen],
        "key": base64.b64encode(json.dumps({"scenes": names, "methods": methods, "pictures": needed}).encode())
        .decode("ascii"),
    }
    content["study"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{study}}", json.dumps(content))
    with system.written(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {"study": content["study"], "comparisons": len(chosen), "scenes": len({one[0] for one in chosen}),
            "methods": len(methods), "bytes": len(page.encode())}
