"""What is not labelled in a demo scene: the street itself, and the clutter beside it.

The clutter is there to hide objects and to look like them: round red signs, lamps, boxes, posters.
"""

import math
from itertools import pairwise

import numpy as np
from PIL import Image

from utils.demo.stage import Board, paint, pick

BANDS = (80, 50, 34, 24, 17, 12, 8, 5, 2, .8)          # the ground is drawn in strips between these distances


def deep(rng, near, far):
    """A distance, evenly spread in size on the picture's logarithmic scale."""
    return near * (far / near) ** rng.random()


# --- the street --------------------------------------------------------------

def draw_street(stage):
    """Sky, ground, roads and houses.

    Returns {"curbs": (left, right), "walls": (left, right), "cross": z}: X of the curbs and of the houses, and
    the middle of a crossing street or None, in metres.
    """
    rng, width, height, horizon = stage.rng, stage.width, stage.height, stage.horizon
    top, low = (np.array(c, float) for c in stage.light["sky"])
    ramp = np.linspace(0, 1, 64)[:, None] ** 0.8 * (low - top) + top
    sky = Image.fromarray(np.rint(ramp).astype(np.uint8)[:, None, :])
    stage.image.paste(sky.resize((width, max(2, round(horizon) + 1)), Image.BILINEAR), (0, 0))
    for _ in range(int(rng.integers(0, 5))):                 # clouds
        cx, cy = rng.uniform(0, width), rng.uniform(0, horizon * 0.7)
        for _ in range(5):
            rx, x, y = rng.uniform(.04, .14) * width, cx + rng.normal() * .07 * width, cy + rng.normal() * .015 * height
            stage.pen.ellipse((x - rx, y - rx * .3, x + rx, y + rx * .3), fill=tuple(stage.light["haze"]) + (70,))
    half = rng.uniform(3.2, 6.0)
    middle = rng.uniform(-1.0, 1.0) * (half + 1.0)
    left, right = middle - half, middle + half
    grass = pick(rng, ((96, 116, 70), (120, 116, 84), (110, 110, 106)))
    stage.flat([(0, horizon), (width, horizon), (width, height), (0, height)], stage.color(grass, 300))
    for far, near in pairwise((2000,) + BANDS):
        strip(stage, -3000, 3000, near, far, grass)
    draw_skyline(stage)
    walk, tar = [rng.uniform(120, 178)] * 3, [rng.uniform(58, 100)] * 3
    walkway = rng.uniform(1.8, 3.5)
    for far, near in pairwise((140,) + BANDS):
        strip(stage, left - walkway, right + walkway, near, far, walk)
        strip(stage, left - .15, right + .15, near, far, [c * .72 for c in walk])
        strip(stage, left, right, near, far, tar)
    for z in range(2, 24):                                   # joints between the slabs
        for a, b in ((left - walkway, left - .15), (right + .15, right + walkway)):
            strip(stage, a, b, z, z + .05, [c * .8 for c in walk])
    cross = deep(rng, 9, 24) if rng.random() < .6 else None
    draw_markings(stage, left, right, tar)
    if cross:
        strip(stage, -300, left, cross - 4.2, cross + 4.2, walk)
        strip(stage, right, 300, cross - 4.2, cross + 4.2, walk)
        strip(stage, -300, 300, cross - 3.2, cross + 3.2, tar)
        for x in range(-60, 60, 4):
            strip(stage, x, x + 2, cross - .06, cross + .06, [200] * 3)
    for side, edge in ((-1, left - walkway - .6), (1, right + walkway + .6)):
        if rng.random() < 0.78:
            draw_houses(stage, side, edge, cross)
        else:
            draw_hedge(stage, side, edge, cross)
    return {"curbs": (left, right), "walls": (left - walkway, right + walkway), "cross": cross}


def draw_skyline(stage):
    """Pale blocks or hills where the street ends."""
    rng, x = stage.rng, -130.0
    blocks = rng.random() < .6
    while x < 130:
        wide, tall, z = rng.uniform(6, 16), rng.uniform(3, 20) if blocks else rng.uniform(4, 8), rng.uniform(95, 130)
        if blocks:
            stage.face([(x, 0, z), (x + wide, 0, z), (x + wide, tall, z), (x, tall, z)], [rng.uniform(80, 150)] * 3)
        else:
            leaves(Board(stage, x, z), tall * .3, tall, 5)
        x += wide * rng.uniform(.6, 1.5)


def strip(stage, x0, x1, z0, z1, rgb, shade=1.0):
    stage.face([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], rgb, shade)


def draw_markings(stage, left, right, tar):
    """Lane dashes, edge lines, a crossing, patches and lids on the road."""
    rng, middle = stage.rng, (left + right) / 2
    paint_rgb = [rng.uniform(170, 235)] * 3
    for _ in range(int(rng.integers(2, 7))):
        x, z = rng.uniform(left, right - 1.5), rng.uniform(3, 25)
        strip(stage, x, x + rng.uniform(.4, 1.5), z, z + rng.uniform(.5, 3), tar, rng.uniform(.75, 1.2))
    if rng.random() < 0.8:
        for z in range(1, 50, 4):
            strip(stage, middle - .07, middle + .07, z, z + 2.2, paint_rgb)
    if rng.random() < 0.5:
        for x in (left + .3, right - .4):
            for near, far in ((.8, 3), (3, 10), (10, 120)):
                strip(stage, x, x + .1, near, far, paint_rgb, .9)
    if rng.random() < 0.35:                                  # a zebra crossing
        z, x = rng.uniform(5, 14), left + .3
        while x < right - .4:
            strip(stage, x, x + .45, z, z + 2.5, paint_rgb)
            x += .95
    if rng.random() < 0.5:
        x, z = rng.uniform(left, right), rng.uniform(3, 12)
        stage.face([(x + .4 * math.cos(k * .628), 0, z + .4 * math.sin(k * .628)) for k in range(10)], tar, .6)


def draw_houses(stage, side, edge, cross):
    """A row of houses along X = edge, far to near, with windows, doors and shop fronts."""
    rng, lamps = stage.rng, stage.light["lamps"]
    z = 70.0
    while z > 3.0:
        tall, near, x = rng.uniform(4, 15), max(1.2, z - rng.uniform(6, 14)), edge + side * rng.uniform(0, 1.5)
        if cross and z > cross + 5 > near:                   # ends at the corner
            near = cross + 5
        elif cross and cross - 5 < z <= cross + 5:
            z = cross - 5
            continue
        wall, glass = paint(rng, .6), [rng.uniform(30, 110) * c for c in (.85, .95, 1.1)]
        wall = [75 + sum(wall) * .09 + c * .33 for c in wall]
        lit, floors = (250, 214, 140), max(1, round(tall / 3.1))

        def pane(z0, y0, z1, y1, rgb, shade=1.0, glow=False, x=x):
            stage.face([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], rgb, shade, glow)
        if rng.random() < 0.5:                               # a pitched roof behind the wall
            stage.face([(x, tall, near), (x, tall, z), (x + side * 4, tall + 2.5, z), (x + side * 4, tall + 2.5, near)],
                       (120, 70, 58))
            stage.face([(x, tall, near), (x + side * 8, tall, near), (x + side * 4, tall + 2.5, near)], wall, .9)
        front = [(x, 0, near), (x + side * 12, 0, near), (x + side * 12, tall, near), (x, tall, near)]
        stage.face(front, wall, .95)
        for k in range(8):                                   # windows of the wall that faces the camera
            a, y = x + side * (1 + 3 * (k % 4)), 1 + 3 * (k // 4)
            if y + 1.6 < tall:
                shine = lamps and rng.random() < .3
                b = a + side * 1.2
                stage.face([(a, y, near), (b, y, near), (b, y + 1.6, near), (a, y + 1.6, near)],
                           lit if shine else glass, glow=shine)
        pane(near, 0, z, tall, wall, .78)
        if rng.random() < .4:
            for k in range(1, int(tall * 1.6)):              # courses of brick or cladding
                pane(near, k / 1.6, z, k / 1.6 + .06, wall, .68)
        columns = max(2, int((z - near) / 2.6)) if z < 45 else 2
        step = (z - near) / columns
        for floor in range(floors):
            y = floor * 3.1 + (.5 if floor == 0 else .9)
            shop = floor == 0 and rng.random() < .5
            for k in range(columns):
                z0, shine = near + (k + (.08 if shop else .25)) * step, lamps and rng.random() < .35
                z1, y1 = z0 + step * (.84 if shop else .5), min(tall - .3, y + (2.0 if shop else 1.5))
                if z < 45:
                    pane(z0 - .1, y - .12, z1 + .1, y1 + .1, wall, .95)
                pane(z0, y, z1, y1, lit if shine else glass, rng.uniform(.6, 1.3), glow=shine)
            if shop:
                pane(near + .2, 2.6, z - .2, 3.1, paint(rng, .2), .9)
        pane(near, tall - .25, z, tall, wall, .6)
        z = near - (rng.uniform(1, 6) if rng.random() < .2 else 0)


def draw_hedge(stage, side, edge, cross):
    """A fence with greenery behind it, where no houses are."""
    rng = stage.rng
    for z in np.arange(45, 3, -2.2):
        x, r = edge + side * rng.uniform(.5, 3), rng.uniform(.8, 2.2)
        if not cross or abs(z - cross) > 5:
            leaves(Board(stage, x, z), r * .6, r, 10)
    wood = paint(rng, .8)
    for near, far in ((2, cross - 5), (cross + 5, 31)) if cross else ((2, 31),):
        for z in np.arange(far, near, -1):
            stage.face([(edge, 0, z), (edge, 0, z + .12), (edge, 1.0, z + .12), (edge, 1.0, z)], wood)
        for y in (.4, .85):
            stage.face([(edge, y, near), (edge, y, far), (edge, y + .1, far), (edge, y + .1, near)], wood, .9)


# --- clutter: what must not be mistaken for an object, and what hides objects --------

GREENS = ((70, 105, 48), (96, 112, 50), (52, 82, 52), (140, 100, 46))


def leaves(board, y, radius, count):
    rng = board.stage.rng
    green = pick(rng, GREENS)
    for k in range(count):
        angle, away, r = rng.uniform(0, 6.283), radius * rng.uniform(0, .75), radius * rng.uniform(.2, .5)
        dy = away * math.sin(angle)
        board.disc(away * math.cos(angle), y + dy, r, r * .85, green, .8 + .35 * dy / radius + .25 * k / count)


def tree(stage, x, z):
    tall = stage.rng.uniform(2.2, 3.6)
    stage.shadow(x, z, 1.2, .8)
    b = Board(stage, x, z)
    b.limb((0, 0), (.05, tall), .32, .2, (88, 68, 50))
    b.limb((.03, tall * .7), (.7, tall), .12, .08, (78, 60, 44))
    leaves(b, tall + .8, stage.rng.uniform(1.1, 1.9), 34)


def bush(stage, x, z):
    leaves(Board(stage, x, z), .45, .65, 14)


def lamp_post(stage, x, z):
    b, metal = Board(stage, x, z), [stage.rng.uniform(50, 130)] * 3
    tall, arm = stage.rng.uniform(4.5, 6.5), pick(stage.rng, (-1, 1)) * 1.2
    b.limb((0, 0), (0, tall), .16, .1, metal)
    b.limb((0, tall), (arm, tall + .25), .09, .09, metal)
    b.limb((arm * .8, tall + .2), (arm * 1.2, tall + .25), .2, .16, (255, 226, 160) if stage.light["lamps"] else metal)
    if stage.light["lamps"]:
        b.halo(arm, tall + .15, 1.5, (255, 220, 150))


def plain_sign(stage, x, z):
    """A road sign that is no stop sign: round, triangular, square or a diamond."""
    rng = stage.rng
    b, y, r = Board(stage, x, z, squeeze=rng.uniform(.75, 1)), rng.uniform(1.9, 2.6), rng.uniform(.3, .5)
    b.limb((0, 0), (0, y), .08, .08, (120, 122, 124))
    red, blue, yellow, white = (205, 30, 36), (30, 80, 170), (235, 190, 40), (230, 230, 226)
    kind = int(rng.integers(5))
    if kind == 0:
        b.disc(0, y, r, r, red)
        b.disc(0, y, r * .7, r * .7, white)
    elif kind == 1:
        b.disc(0, y, r, r, red)
        b.rect(-r * .7, y - r * .16, r * .7, y + r * .16, white)
    elif kind == 2:
        b.poly([(-r, y - r * .7), (r, y - r * .7), (0, y + r)], red)
        b.poly([(-r * .6, y - r * .48), (r * .6, y - r * .48), (0, y + r * .55)], white)
    elif kind == 3:
        b.rect(-r, y - r, r, y + r, blue)
        b.poly([(-r * .5, y - r * .6), (r * .5, y), (-r * .5, y + r * .6)], white)
    else:
        b.poly([(0, y - r * 1.2), (r * 1.2, y), (0, y + r * 1.2), (-r * 1.2, y)], yellow)
        b.limb((0, y - r * .5), (0, y + r * .5), r * .3, r * .3, (30, 30, 30))


def bin_or_box(stage, x, z):
    """Bins, letter boxes, cabinets, skips: boxy things on the pavement."""
    rng = stage.rng
    w, tall, rgb = pick(rng, ((.3, 1.0), (.35, 1.3), (.6, 1.5), (1.1, 1.2))) + (paint(rng, .4),)
    b = Board(stage, x, z)
    stage.shadow(x, z, w * 1.1, .4)
    b.rect(-w, 0, w, tall, rgb)
    b.rect(w * .5, 0, w, tall, rgb, .7)
    b.rect(-w * 1.06, tall * .86, w * 1.06, tall, rgb, 1.15)
    b.rect(-w * .6, tall * .55, w * .2, tall * .72, paint(rng, .5))


def poster(stage, x, z):
    """A board with bright shapes on it."""
    rng, b = stage.rng, Board(stage, x, z)
    w, low, high = rng.uniform(.6, 1.3), rng.uniform(.5, 1.0), rng.uniform(2.0, 2.8)
    b.rect(-w * .8, 0, -w * .7, high, (70, 70, 72))
    b.rect(w * .7, 0, w * .8, high, (70, 70, 72))
    b.rect(-w, low, w, high, paint(rng, .3))
    for _ in range(4):
        cx, cy = rng.uniform(-.5, .5) * w, rng.uniform(low + .3, high - .3)
        if rng.random() < .5:
            b.disc(cx, cy, .25, .25, paint(rng, .2))
        else:
            b.rect(cx - .3, cy - .12, cx + .3, cy + .12, paint(rng, .2))


def bollards(stage, x, z):
    b, rgb = Board(stage, x, z), paint(stage.rng, .7)
    for k in range(int(stage.rng.integers(1, 4))):
        b.limb((k * 1.1, 0), (k * 1.1, .85), .16, .16, rgb)
        b.rect(k * 1.1 - .08, .62, k * 1.1 + .08, .72, (220, 220, 215))


CLUTTER = (tree, tree, bush, lamp_post, plain_sign, plain_sign, bin_or_box, poster, bollards)
