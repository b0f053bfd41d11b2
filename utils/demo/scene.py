"""Procedural street scenes with exact masks: the pictures of the demo data set.

`render_scene(seed)` builds a small 3-D street (road, houses, trees, poles, signs that are no stop signs), puts
people, cars, buses, traffic lights and stop signs into it with one common perspective, and photographs it at
day, under clouds, at dusk or at night. Nothing is loaded from disk, and no font is used.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

from utils.demo.objects import person, stop_sign, traffic_light
from utils.demo.stage import SUPERSAMPLE, Stage, pick
from utils.demo.street import CLUTTER, deep, draw_street
from utils.demo.vehicles import bus, car

CATEGORIES = [                                             # with the ids of COCO
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 6, "name": "bus", "supercategory": "vehicle"},
    {"id": 10, "name": "traffic light", "supercategory": "outdoor"},
    {"id": 13, "name": "stop sign", "supercategory": "outdoor"},
]
PERSON, CAR, BUS, LIGHT, STOP = (c["id"] for c in CATEGORIES)
SHARES = (0.36, 0.28, 0.10, 0.14, 0.12)                    # how often each class is placed

COUNTS = (0.015, 0.07, 0.14, 0.19, 0.18, 0.15, 0.115, 0.08, 0.04, 0.02)   # chance of 0, 1, ... 9 objects placed
MIN_VISIBLE = 0.25                                         # of an object's own pixels, else it is not labelled
MIN_AREA = 24 / 160 ** 2                                   # of the image: 24 px at 160 x 160

LIGHTS = {                                                 # ambient colour, sky from top to horizon, shadows 0..255
    "day": {"ambient": (1.0, .98, .94), "sky": ((84, 140, 214), (196, 216, 232)), "haze": (190, 204, 218),
            "haze_metres": 110, "shadow": 120, "lamps": False},
    "cloudy": {"ambient": (.74, .77, .8), "sky": ((132, 142, 152), (196, 200, 204)), "haze": (178, 184, 190),
               "haze_metres": 60, "shadow": 70, "lamps": False},
    "dusk": {"ambient": (.74, .57, .5), "sky": ((58, 66, 116), (238, 160, 110)), "haze": (176, 128, 116),
             "haze_metres": 70, "shadow": 80, "lamps": True},
    "night": {"ambient": (.33, .35, .44), "sky": ((10, 13, 28), (44, 48, 70)), "haze": (38, 42, 58),
              "haze_metres": 80, "shadow": 60, "lamps": True},
}
LIGHT_SHARES = (0.42, 0.28, 0.16, 0.14)


def render_scene(seed, size=(160, 160)):
    """Draw the scene of a seed, alike on every machine.

    Args:
        seed: a non-negative integer of any length.
        size: (width, height) in pixels; details scale with it.
    Returns:
        image: uint8 (H, W, 3), RGB.
        objects: list of {"category_id": int, "mask": bool (H, W)}, far to near. A mask holds the pixels that
            show the object (more than half of the pixel's samples); masks never overlap. Objects that are
            nearly hidden or tiny are in the picture but not in the list.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    light = LIGHTS[list(LIGHTS)[int(rng.choice(len(LIGHTS), p=LIGHT_SHARES))]]
    stage = Stage(size, rng, light)
    road = draw_street(stage)
    things = place_objects(stage, road) + place_clutter(stage, road)
    categories, whole = {}, {}
    for _, category_id, draw in sorted(things, key=lambda t: -t[0]):
        label = len(categories) + 1 if category_id else 0
        if category_id in (LIGHT, STOP):
            draw(label)
        else:
            stage.label = label
            draw()
            stage.label = 0
        if category_id:
            categories[label], whole[label] = category_id, stage.ids.histogram()[label]
    return finish(stage), read_objects(stage, categories, whole)


def read_objects(stage, categories, whole):
    """Masks of the labels on stage.ids; whole: samples each object had before something covered it."""
    samples = stage.ids.histogram()
    ids = np.asarray(stage.ids)
    height, width = ids.shape[0] // SUPERSAMPLE, ids.shape[1] // SUPERSAMPLE
    objects = []
    for label, category_id in categories.items():
        if samples[label] < max(1, MIN_VISIBLE * whole[label]):
            continue
        hits = (ids == label).reshape(height, SUPERSAMPLE, width * SUPERSAMPLE).sum(1, dtype=np.uint8)
        mask = hits.reshape(height, width, SUPERSAMPLE).sum(2, dtype=np.uint8) * 2 > SUPERSAMPLE ** 2
        if mask.sum() >= MIN_AREA * width * height:
            objects.append({"category_id": category_id, "mask": mask})
    return objects


# --- where things stand --------------------------------------------------------

def spot(stage, z, road=None, margin=0.04):
    """X at distance z of a random column of the picture, between the houses if road is given."""
    low, high = ((share * stage.width - stage.vanish) * z / stage.focal for share in (margin, 1 - margin))
    if road:
        walls = road["walls"][0] + .4, road["walls"][1] - .4
        if max(low, walls[0]) < min(high, walls[1]):
            low, high = max(low, walls[0]), min(high, walls[1])
    return stage.rng.uniform(low, high)


def place_clutter(stage, road):
    """Scenery beside the road: a list of (z, None, draw)."""
    rng, things = stage.rng, []
    for _ in range(int(rng.integers(3, 9))):
        z, kind, (left, right) = deep(rng, 5, 30), pick(rng, CLUTTER), road["curbs"]
        x = left - rng.uniform(.4, 2.0) if rng.random() < .5 else right + rng.uniform(.4, 2.0)
        if road["cross"] and abs(z - road["cross"]) < 4:
            continue
        things.append((z, None, lambda kind=kind, x=x, z=z: kind(stage, x, z)))
    return things


def place_objects(stage, road):
    """What is labelled: a list of (z, category id, draw), without two things on one spot."""
    rng, things, taken = stage.rng, [], []
    for _ in range(int(rng.choice(len(COUNTS), p=COUNTS))):
        category_id = CATEGORIES[int(rng.choice(len(SHARES), p=SHARES))]["id"]
        if category_id not in (PERSON, CAR) and [t[1] for t in things].count(category_id) > 1:
            category_id = pick(rng, (PERSON, CAR))           # three of the others would look odd
        for _ in range(12):
            thing, box = propose(stage, category_id, road)
            if all(overlap(box, other) < 0.45 for other in taken):
                taken.append(box)
                things.append((thing[0], category_id, thing[1]))
                break
    return things


def propose(stage, category_id, road):
    """One place for an object: (z, draw) and its rough box on the picture."""
    rng, (left, right), cross, edge = stage.rng, road["curbs"], road["cross"], stage.nearest
    if category_id in (CAR, BUS):
        big = category_id == BUS
        along = cross is None or rng.random() < (0.5 if big else 0.55)
        if along:                                            # in a lane, or at the curb; some turn
            z = deep(rng, 11, 34) if big else deep(rng, max(5.5, edge), 24)
            x = rng.uniform(.15, .85) * (right - left) + left
            turn = rng.normal() * .1 if rng.random() < .75 else rng.uniform(-.8, .8)
            yaw = pick(rng, (1, -1)) * math.pi / 2 + turn
        else:
            lane = pick(rng, (-1, 1))
            z, yaw = cross + lane * 1.6, (math.pi if lane > 0 else 0) + rng.normal() * .06
            x = spot(stage, z)
        reach, tall = (4.5 if big else 2.1) * abs(math.cos(yaw)) + 1.0, 3.1 if big else 1.5
        draw = bus if big else car
        return (z, lambda: draw(stage, x, z, yaw)), around(stage, x, z, reach, 0, tall)
    if category_id == PERSON:
        z, grown = deep(rng, max(3.2, .75 * edge), 17), rng.random() < .85
        tall = rng.uniform(1.5, 1.9) if grown else rng.uniform(1.05, 1.4)
        x = spot(stage, z, road)
        return (z, lambda: person(stage, x, z, tall)), around(stage, x, z, .35, 0, tall)
    z = deep(rng, 4.5, 15) if category_id == LIGHT else deep(rng, 3.5, 13)
    x = spot(stage, z, road)
    draw = traffic_light if category_id == LIGHT else stop_sign
    return (z, lambda label: draw(stage, x, z, label)), around(stage, x, z, .5, 1.6, 3.6)


def around(stage, x, z, reach, low, high):
    (x0, y1), (x1, y0) = stage.point(x - reach, low, z), stage.point(x + reach, high, z)
    return x0, y0, x1, y1


def overlap(a, b):
    """Intersection over the smaller box."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0.0, wide) * max(0.0, tall) / max(smaller, 1e-6)


# --- the photograph ------------------------------------------------------------

def finish(stage):
    """Shrink the canvas and add what a camera adds: uneven light, grain, exposure, a little blur."""
    rng, image = stage.rng, stage.image.reduce(SUPERSAMPLE)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(.1, .4) * min(3, image.width / 160)))

    def cloud(cells, share):
        """Smooth noise around 0, +-share/2; whole numbers until the last step, so every machine agrees."""
        small = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        smooth = np.asarray(small.resize(image.size, Image.BICUBIC)).astype(np.float32)
        return (smooth - 127.5) * np.float32(share / 255)
    gain = 1 + cloud(5, .26) + cloud(20, .05) + cloud(90, .07)
    cast = rng.uniform(.92, 1.08, 3) * rng.uniform(.8, 1.15)
    contrast, lift = rng.uniform(.75, 1.1), rng.uniform(-8, 16)
    scene = np.asarray(image).astype(np.float32) * gain[..., None]
    scene = (scene - 110) * (cast * contrast).astype(np.float32) + np.float32(110 * cast.mean() + lift)
    grain = rng.integers(-100, 101, (2, *scene.shape), dtype=np.int16).sum(0).astype(np.float32)
    scene += grain * np.float32(rng.uniform(1.0, 5.0) / 80)
    return np.clip(np.rint(scene), 0, 255).astype(np.uint8)
