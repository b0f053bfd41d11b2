"""What is labelled in a demo scene and is flat: people, traffic lights and stop signs (vehicles.py has the others).

Each draws one of them on a `stage.Stage`, with sizes, colours and poses from the stage's generator, in the order of
the calls: another order would draw other pictures.
"""

import math
from dataclasses import dataclass

from utils.demo.stage import Board, paint, pick

# --- people ------------------------------------------------------------------

SKINS = ((238, 200, 175), (222, 170, 135), (190, 135, 100), (140, 95, 65), (95, 62, 45))
HAIRS = ((30, 24, 20), (70, 45, 28), (125, 85, 45), (190, 160, 100), (150, 148, 145))


@dataclass(frozen=True)
class Figure:
    """What a person looks like: lengths and heights in metres, colours as RGB."""

    h: float            # from sole to crown
    flip: int           # 1 looks to the right, -1 to the left
    side: bool          # seen from the side
    stride: float       # how far the feet are apart
    swing: float        # how far the hands are
    dress: bool
    bare_arms: bool
    skin: tuple
    hair: tuple
    top: list
    legs: list
    shoes: list
    hip: float          # heights
    waist: float
    neck: float
    gap: float          # half distances between the legs, and between the shoulders
    shoulder: float


def figure(rng, h, flip):
    """A random Figure of height `h`."""
    skin, hair, top, legs = pick(rng, SKINS), pick(rng, HAIRS), paint(rng), paint(rng, 0.7)
    shoes = paint(rng, 0.8)
    side, stride, swing = rng.random() < 0.5, rng.uniform(0.03, 0.2), rng.uniform(0.02, 0.16)
    gap, shoulder = (0.02 * h, 0.075 * h) if side else (0.055 * h, 0.115 * h)
    dress, bare_arms = rng.random() < 0.18, rng.random() < 0.35
    return Figure(h, flip, side, stride, swing, dress, bare_arms, skin, hair, top, legs, shoes,
                  0.49 * h, 0.56 * h, 0.83 * h, gap, shoulder)


def person(stage, x, z, tall=1.72):
    """Someone who stands or walks, from the front or the side, in random clothes."""
    rng = stage.rng
    stage.shadow(x, z, 0.3 * tall / 1.7, 0.2)
    b = Board(stage, x, z, squeeze=rng.choice([-1, 1]) * rng.uniform(1.0, 1.2), lean=rng.uniform(-0.03, 0.03))
    b.squeeze, flip = abs(b.squeeze), -1 if b.squeeze < 0 else 1
    f = figure(rng, tall, flip)
    draw_legs(b, f)
    draw_arm(b, f, -1, 0.7)
    draw_clothes(b, f, rng)
    draw_arm(b, f, 1, 1.0)
    draw_head(b, f, rng)


def draw_legs(b, f):
    h, flip, gap, stride = f.h, f.flip, f.gap, f.stride
    cloth = f.skin if f.dress else f.legs
    for sign, shade in ((-1, 0.75), (1, 1.0)):                      # far leg, near leg
        knee = (sign * flip * (gap + stride * 0.6), 0.27 * h)
        foot = (sign * flip * (gap + stride * (1.0 if sign > 0 else 1.2)), 0.035 * h + (0.05 if sign < 0 else 0))
        b.limb((sign * flip * gap, f.hip), knee, 0.105 * h, 0.08 * h, cloth, shade)
        b.limb(knee, foot, 0.08 * h, 0.055 * h, cloth, shade)
        toes = (foot[0] + flip * (0.06 * h if f.side else 0.015 * h * sign), 0.02 * h)
        b.limb(foot, toes, 0.05 * h, 0.04 * h, f.shoes)


def draw_arm(b, f, sign, shade):
    """The far arm (sign -1) or the near one (1)."""
    h, flip, swing = f.h, f.flip, f.swing
    top_at = (sign * f.shoulder * 0.95, f.neck - 0.035 * h)
    elbow = (top_at[0] + sign * 0.02 * h - flip * swing * sign * 0.5, 0.655 * h)
    hand = (elbow[0] - flip * sign * swing * 0.7 + flip * 0.03 * h, 0.5 * h + swing * 0.3)
    b.limb(top_at, elbow, 0.065 * h, 0.055 * h, f.top, shade)
    b.limb(elbow, hand, 0.05 * h, 0.042 * h, f.skin if f.bare_arms else f.top, shade)
    b.disc(*hand, 0.024 * h, 0.028 * h, f.skin, shade)


def draw_clothes(b, f, rng):
    """What covers the trunk: perhaps a backpack, a top that may be a dress, a pattern on it, shade and belt."""
    h, flip, waist, neck, shoulder = f.h, f.flip, f.waist, f.neck, f.shoulder
    if rng.random() < 0.25:                                         # a backpack
        pack = paint(rng)
        b.limb((-flip * shoulder * 1.05, 0.78 * h), (-flip * shoulder * 1.1, 0.62 * h), 0.12 * h, 0.14 * h, pack, 0.85)
    hem = f.hip - (rng.uniform(0.1, 0.22) * h if f.dress or rng.random() < 0.2 else 0.02 * h)
    wide = shoulder * (1.25 if hem < f.hip - 0.05 * h else 0.92)
    b.limb((-shoulder * 0.75, neck - 0.03 * h), (shoulder * 0.75, neck - 0.03 * h), 0.07 * h, 0.07 * h, f.top)
    b.poly([(-shoulder, neck - 0.03 * h), (shoulder, neck - 0.03 * h), (shoulder * 0.8, waist), (wide, hem),
            (-wide, hem), (-shoulder * 0.8, waist)], f.top)
    style = rng.random()
    if style < 0.25:                                                # stripes
        other = paint(rng)
        for k in range(4):
            y = waist + k * (neck - waist) / 4.5
            b.rect(-shoulder * 0.82, y, shoulder * 0.82, y + 0.025 * h, other)
    elif style < 0.45:                                              # an open jacket
        b.poly([(-0.02 * h, neck), (0.03 * h, neck), (0.035 * h, waist), (-0.03 * h, waist)], paint(rng, 0.8))
    b.poly([(-flip * shoulder, neck - 0.03 * h), (-flip * shoulder * 0.45, neck - 0.03 * h),
            (-flip * shoulder * 0.4, hem), (-flip * wide, hem)], f.top, 0.78)    # the shaded side
    b.rect(-shoulder * 0.82, waist - 0.045 * h, shoulder * 0.82, waist - 0.03 * h, f.legs, 0.6)


def draw_head(b, f, rng):
    """Neck, head (with a face where there are pixels for it), hair and perhaps a cap."""
    h, flip = f.h, f.flip
    b.rect(-0.025 * h, f.neck - 0.02 * h, 0.025 * h, 0.88 * h, f.skin, 0.8)
    away = not f.side and rng.random() < 0.3
    b.disc(0, 0.93 * h, 0.052 * h, 0.066 * h, f.hair if away else f.skin)
    if not away and b.scale * h > 150:
        for eye in ((0.03,) if f.side else (-0.02, 0.022)):
            b.disc(flip * eye * h, 0.938 * h, 0.006 * h, 0.006 * h, (30, 25, 25))
        b.rect(flip * 0.005 * h, 0.898 * h, flip * (0.045 if f.side else 0.025) * h, 0.903 * h, (150, 70, 65))
    long = 0.07 * h if rng.random() < 0.4 else 0.0
    b.poly([(-flip * 0.055 * h, 0.9 * h - long), (-flip * 0.058 * h, 0.96 * h), (-flip * 0.02 * h, 1.0 * h),
            (flip * 0.035 * h, 0.99 * h), (flip * 0.052 * h, 0.95 * h), (-flip * 0.01 * h, 0.955 * h)], f.hair)
    if rng.random() < 0.2:                                          # a cap
        cap = paint(rng)
        b.poly([(-0.056 * h, 0.95 * h), (-0.04 * h, 1.0 * h), (0.03 * h, 1.005 * h), (0.056 * h, 0.95 * h)], cap)
        b.rect(0, 0.945 * h, flip * 0.095 * h, 0.96 * h, cap, 0.8)


# --- traffic lights and signs: the pole is scenery, the head is the object ------

def traffic_light(stage, x, z, label):
    """A head of two or three lamps on a pole or a mast arm; only the head carries `label`."""
    rng = stage.rng
    b = Board(stage, x, z, squeeze=rng.uniform(0.75, 1.0))
    height, lamps = rng.uniform(2.5, 3.9), 3 if rng.random() < 0.85 else 2
    unit, metal = rng.uniform(0.4, 0.5), pick(rng, ((70, 72, 74), (40, 44, 42), (120, 122, 120)))
    shell = pick(rng, ((26, 28, 28), (26, 28, 28), (30, 52, 42), (196, 158, 40), (96, 98, 100)))
    wide, half = unit * 0.6, lamps * unit / 2
    if rng.random() < 0.3:                                           # on an arm over the road
        away = pick(rng, (-1, 1)) * rng.uniform(2.0, 4.0)
        b.limb((away, 0), (away, height + half), 0.18, 0.14, metal)
        b.limb((away, height + half * 0.6), (0, height + half * 0.6), 0.1, 0.08, metal)
    else:
        b.limb((0, 0), (0, height - half), 0.14, 0.12, metal)
    stage.label = label
    if rng.random() < 0.3:
        b.rect(-wide * 1.35, height - half * 1.18, wide * 1.35, height + half * 1.18, (225, 225, 220))
        b.rect(-wide * 1.25, height - half * 1.13, wide * 1.25, height + half * 1.13, (20, 20, 22))
    b.rect(-wide, height - half, wide, height + half, shell)
    b.rect(wide * 0.72, height - half, wide, height + half, shell, 0.65)
    lit = int(rng.integers(lamps))
    colors = ((240, 40, 30), (255, 175, 30), (40, 230, 110)) if lamps == 3 else ((240, 40, 30), (40, 230, 110))
    for k, color in enumerate(colors):
        y = height + half - (k + 0.5) * unit
        b.disc(0, y + unit * 0.05, unit * 0.45, unit * 0.45, [c * 0.45 for c in shell])     # the visor
        b.disc(0, y, unit * 0.36, unit * 0.36, color if k == lit else [18 + c * 0.2 for c in color], glow=k == lit)
        if k == lit:
            b.disc(0, y + unit * 0.06, unit * 0.16, unit * 0.14, [min(255, c + 70) for c in color], glow=True)
    stage.label = 0
    if stage.light["lamps"]:
        b.halo(0, height + half - (lit + 0.5) * unit, unit * 1.6, colors[lit])


LETTERS = {                                                          # strokes in a unit square, no font needed
    "S": ((1, .9, .2, 1), (.2, 1, 0, .75), (0, .75, 1, .3), (1, .3, .8, 0), (.8, 0, 0, .1)),
    "T": ((0, 1, 1, 1), (.5, 1, .5, 0)),
    "O": ((.2, 0, 0, .5), (0, .5, .2, 1), (.2, 1, .8, 1), (.8, 1, 1, .5), (1, .5, .8, 0), (.8, 0, .2, 0)),
    "P": ((0, 0, 0, 1), (0, 1, .9, .95), (.9, .95, .9, .5), (.9, .5, 0, .45)),
}


def stop_sign(stage, x, z, label):
    """A red octagon that says STOP; only the plate carries `label`."""
    rng = stage.rng
    b = Board(stage, x, z, squeeze=rng.uniform(0.7, 1.0), lean=rng.uniform(-0.06, 0.06))
    height, radius = rng.uniform(1.9, 2.6), rng.uniform(0.45, 0.62)
    b.limb((0, 0), (0, height + radius * 0.5), 0.09, 0.09, (120, 122, 124))
    red, white = [c * rng.uniform(0.7, 1.0) for c in (205, 28, 36)], [rng.uniform(185, 245)] * 3

    def octagon(share, rgb):
        b.poly([(radius * share * math.cos(math.pi / 8 + k * math.pi / 4),
                 height + radius * share * math.sin(math.pi / 8 + k * math.pi / 4)) for k in range(8)], rgb)
    stage.label = label
    octagon(1.0, [c * 0.6 for c in white])
    octagon(0.97, white)
    octagon(0.88, red)
    size, stroke = radius * 0.3, radius * 0.11
    for k, letter in enumerate("STOP"):
        left, low = (k - 2) * radius * 0.38 + radius * 0.04, height - size * 0.8
        for x0, y0, x1, y1 in LETTERS[letter]:
            b.limb((left + x0 * size, low + y0 * size * 1.6), (left + x1 * size, low + y1 * size * 1.6),
                   stroke, stroke, white)
    stage.label = 0
