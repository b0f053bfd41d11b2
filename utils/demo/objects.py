"""What is labelled in a demo scene: people, cars, buses, traffic lights and stop signs.

Each function draws one of them on a `demo_stage.Stage`, with sizes, colours and poses from the stage's generator.
"""

import math
from itertools import pairwise

from utils.demo.stage import Board, paint, pick

# --- people ------------------------------------------------------------------

SKINS = ((238, 200, 175), (222, 170, 135), (190, 135, 100), (140, 95, 65), (95, 62, 45))
HAIRS = ((30, 24, 20), (70, 45, 28), (125, 85, 45), (190, 160, 100), (150, 148, 145))


def person(stage, x, z, tall=1.72):
    """Someone who stands or walks, from the front or the side, in random clothes."""
    rng = stage.rng
    stage.shadow(x, z, 0.3 * tall / 1.7, 0.2)
    b = Board(stage, x, z, squeeze=rng.choice([-1, 1]) * rng.uniform(1.0, 1.2), lean=rng.uniform(-0.03, 0.03))
    b.squeeze, flip = abs(b.squeeze), -1 if b.squeeze < 0 else 1
    skin, hair, top, legs = pick(rng, SKINS), pick(rng, HAIRS), paint(rng), paint(rng, 0.7)
    shoes = paint(rng, 0.8)
    side, stride, swing = rng.random() < 0.5, rng.uniform(0.03, 0.2), rng.uniform(0.02, 0.16)
    h = tall
    hip, waist, neck = 0.49 * h, 0.56 * h, 0.83 * h
    gap, shoulder = (0.02 * h, 0.075 * h) if side else (0.055 * h, 0.115 * h)
    dress = rng.random() < 0.18
    for sign, shade in ((-1, 0.75), (1, 1.0)):                      # far leg, near leg
        knee = (sign * flip * (gap + stride * 0.6), 0.27 * h)
        foot = (sign * flip * (gap + stride * (1.0 if sign > 0 else 1.2)), 0.035 * h + (0.05 if sign < 0 else 0))
        cloth = skin if dress else legs
        b.limb((sign * flip * gap, hip), knee, 0.105 * h, 0.08 * h, cloth, shade)
        b.limb(knee, foot, 0.08 * h, 0.055 * h, cloth, shade)
        b.limb(foot, (foot[0] + flip * (0.06 * h if side else 0.015 * h * sign), 0.02 * h), 0.05 * h, 0.04 * h, shoes)
    arm_skin = rng.random() < 0.35
    def arm(sign, shade):
        top_at = (sign * shoulder * 0.95, neck - 0.035 * h)
        elbow = (top_at[0] + sign * 0.02 * h - flip * swing * sign * 0.5, 0.655 * h)
        hand = (elbow[0] - flip * sign * swing * 0.7 + flip * 0.03 * h, 0.5 * h + swing * 0.3)
        b.limb(top_at, elbow, 0.065 * h, 0.055 * h, top, shade)
        b.limb(elbow, hand, 0.05 * h, 0.042 * h, skin if arm_skin else top, shade)
        b.disc(*hand, 0.024 * h, 0.028 * h, skin, shade)
    arm(-1, 0.7)
    if rng.random() < 0.25:                                         # a backpack
        pack = paint(rng)
        b.limb((-flip * shoulder * 1.05, 0.78 * h), (-flip * shoulder * 1.1, 0.62 * h), 0.12 * h, 0.14 * h, pack, 0.85)
    hem = hip - (rng.uniform(0.1, 0.22) * h if dress or rng.random() < 0.2 else 0.02 * h)
    wide = shoulder * (1.25 if hem < hip - 0.05 * h else 0.92)
    b.limb((-shoulder * 0.75, neck - 0.03 * h), (shoulder * 0.75, neck - 0.03 * h), 0.07 * h, 0.07 * h, top)
    b.poly([(-shoulder, neck - 0.03 * h), (shoulder, neck - 0.03 * h), (shoulder * 0.8, waist), (wide, hem),
            (-wide, hem), (-shoulder * 0.8, waist)], top)
    style = rng.random()
    if style < 0.25:                                                # stripes
        other = paint(rng)
        for k in range(4):
            y = waist + k * (neck - waist) / 4.5
            b.rect(-shoulder * 0.82, y, shoulder * 0.82, y + 0.025 * h, other)
    elif style < 0.45:                                              # an open jacket
        b.poly([(-0.02 * h, neck), (0.03 * h, neck), (0.035 * h, waist), (-0.03 * h, waist)], paint(rng, 0.8))
    b.poly([(-flip * shoulder, neck - 0.03 * h), (-flip * shoulder * 0.45, neck - 0.03 * h),
            (-flip * shoulder * 0.4, hem), (-flip * wide, hem)], top, 0.78)      # the shaded side
    b.rect(-shoulder * 0.82, waist - 0.045 * h, shoulder * 0.82, waist - 0.03 * h, legs, 0.6)
    arm(1, 1.0)
    b.rect(-0.025 * h, neck - 0.02 * h, 0.025 * h, 0.88 * h, skin, 0.8)
    away = not side and rng.random() < 0.3
    b.disc(0, 0.93 * h, 0.052 * h, 0.066 * h, hair if away else skin)
    if not away and b.scale * h > 150:                              # a face, where there are pixels for it
        for eye in ((0.03,) if side else (-0.02, 0.022)):
            b.disc(flip * eye * h, 0.938 * h, 0.006 * h, 0.006 * h, (30, 25, 25))
        b.rect(flip * 0.005 * h, 0.898 * h, flip * (0.045 if side else 0.025) * h, 0.903 * h, (150, 70, 65))
    long = 0.07 * h if rng.random() < 0.4 else 0.0
    b.poly([(-flip * 0.055 * h, 0.9 * h - long), (-flip * 0.058 * h, 0.96 * h), (-flip * 0.02 * h, 1.0 * h),
            (flip * 0.035 * h, 0.99 * h), (flip * 0.052 * h, 0.95 * h), (-flip * 0.01 * h, 0.955 * h)], hair)
    if rng.random() < 0.2:                                          # a cap
        cap = paint(rng)
        b.poly([(-0.056 * h, 0.95 * h), (-0.04 * h, 1.0 * h), (0.03 * h, 1.005 * h), (0.056 * h, 0.95 * h)], cap)
        b.rect(0, 0.945 * h, flip * 0.095 * h, 0.96 * h, cap, 0.8)


# --- vehicles ----------------------------------------------------------------
# Side profiles, from the lower front corner over the roof to the lower rear corner:
# (share of the length from the rear, share of the height, name of the surface up to the next corner).

SEDAN = ((1.0, .2, "nose"), (1.0, .5, "body"), (.95, .6, "body"), (.72, .66, "glass"), (.57, 1, "roof"),
         (.3, 1, "glass"), (.14, .68, "body"), (.02, .63, "tail"), (0, .2, ""))
HATCH = ((1.0, .2, "nose"), (1.0, .48, "body"), (.94, .58, "body"), (.74, .64, "glass"), (.58, 1, "roof"),
         (.12, 1, "glass"), (.02, .66, "tail"), (0, .2, ""))
VAN = ((1.0, .18, "nose"), (1.0, .44, "body"), (.95, .52, "body"), (.85, .57, "glass"), (.7, 1, "roof"),
       (.05, 1, "glass"), (.01, .58, "tail"), (0, .18, ""))
COACH = ((1.0, .1, "nose"), (1.0, .36, "glass"), (.985, .86, "board"), (.975, 1, "roof"), (.01, 1, "board"),
         (0, .84, "glass"), (0, .5, "tail"), (0, .1, ""))


def car(stage, x, z, yaw):
    rng = stage.rng
    profile, tall = pick(rng, ((SEDAN, 1.45), (HATCH, 1.52), (HATCH, 1.7), (VAN, 1.85)))
    vehicle(stage, profile, x, z, yaw, rng.uniform(3.7, 4.7), tall * rng.uniform(0.95, 1.06), 1.8, 0.14)


def bus(stage, x, z, yaw):
    rng = stage.rng
    tall = 4.1 if rng.random() < 0.2 else rng.uniform(2.9, 3.2)
    vehicle(stage, COACH, x, z, yaw, rng.uniform(8.0, 11.0), tall, 2.5, 0.03)


def vehicle(stage, profile, x, z, yaw, length, tall, width, taper):
    """An extruded profile at (x, z); `yaw` is the direction of travel, 0 to the right, pi/2 away from the camera."""
    rng, big = stage.rng, profile is COACH
    ahead = math.cos(yaw), math.sin(yaw)
    coat, trim, glass = paint(rng, 0.55), paint(rng, 0.4), pick(rng, ((36, 44, 54), (60, 72, 82), (20, 24, 30)))
    night, belt = stage.light["lamps"], 0.0 if rng.random() < 0.5 else rng.uniform(0.2, 0.34)

    def place(along, y, across):
        """Shares of length (0 rear, 1 front) and height, and -1..1 across, as a world point."""
        a, c = (along - 0.5) * length, across * width / 2 * (1 - taper * max(0.0, y - 0.6) / 0.4)
        return x + a * ahead[0] - c * ahead[1], y * tall, z + a * ahead[1] + c * ahead[0]

    stage.face([place(a, 0, c) for a, c in ((-.03, -1.12), (1.03, -1.12), (1.03, 1.12), (-.03, 1.12))],
               (6, 6, 10), alpha=min(255, round(stage.light["shadow"] * 1.3)))
    near = 1 if (x * ahead[1] - z * ahead[0]) > 0 else -1            # the flank that faces the camera
    radius, axles = (0.48, (.2, .74)) if big else (0.33, (.19, .81))

    def wheel(along, across, grow, rgb):
        r = radius * grow
        stage.face([place(along + r * math.cos(k * 0.524) / length, (radius + r * math.sin(k * 0.524)) / tall, across)
                    for k in range(12)], rgb)

    for along in axles:                                              # tyres seen under the body
        for across in (-near, near):
            wheel(along, across * 0.72, 1.0, (14, 14, 16))
    stage.face([place(a, profile[0][1] * 0.75, c) for a, c in ((.03, -.9), (.97, -.9), (.97, .9), (.03, .9))],
               (14, 14, 16))

    surfaces = []
    for (a0, y0, kind), (a1, y1, _) in pairwise(profile):
        middle = place((a0 + a1) / 2, (y0 + y1) / 2, 0)
        up, out = (a0 - a1) * length, (y1 - y0) * tall               # the outward normal: `out` ahead, `up` upward
        towards = -out * (ahead[0] * middle[0] + ahead[1] * middle[2]) + up * (stage.eye - middle[1])
        if towards > 0:
            surfaces.append((math.hypot(middle[0], middle[2]), a0, y0, a1, y1, kind))
    for _, a0, y0, a1, y1, kind in sorted(surfaces, reverse=True):
        def patch(u0, v0, u1, v1, rgb, shade=1.0, glow=False, edges=(a0, y0, a1, y1)):
            a, y, a_end, y_end = edges
            rows = [(a + (a_end - a) * v, y + (y_end - y) * v) for v in (v0, v1)]
            stage.face([place(*rows[0], u0), place(*rows[0], u1), place(*rows[1], u1), place(*rows[1], u0)],
                       rgb, shade, glow)
        flat_top = abs(y1 - y0) < 0.12
        patch(-1, 0, 1, 1, coat, 1.12 if flat_top else 0.85)
        if kind == "glass":
            patch(-.88, .06, .88, .94, glass)
            patch(-.5, .1, -.1, .9, [c + 40 for c in glass])
        elif kind == "board":
            patch(-.7, .2, .7, .8, (24, 22, 20))
            patch(-.5, .35, .4, .65, (250, 170, 50), glow=True)
        elif kind in ("nose", "tail"):
            front = kind == "nose"
            low, high = (.35, .6) if big else (.55, .92)
            lamp = (255, 250, 225) if front else (235, 30, 25)
            for u in (-1, 1):
                patch(u * .94, low, u * .6, high, lamp if night else [c * 0.85 for c in lamp], glow=night)
            patch(-.5, low + .05, .5, high, (28, 28, 30) if front else [c * 0.9 for c in coat])
            patch(-.24, .14, .24, .36, (225, 225, 215))
            patch(-1, 0, 1, .12, (30, 30, 32))

    flank = place(0.5, 0.4, near)
    if (flank[0] * -ahead[1] + flank[2] * ahead[0]) * near >= 0:
        return                                                       # seen exactly from the front or the rear
    def panel(points, rgb, shade=1.0, glow=False):
        stage.face([place(a, y, near) for a, y in points], rgb, shade, glow)
    def box(a0, y0, a1, y1, rgb, shade=1.0, glow=False):
        panel([(a0, y0), (a1, y0), (a1, y1), (a0, y1)], rgb, shade, glow)
    panel([p[:2] for p in profile], coat)
    box(.01, profile[0][1], .99, profile[0][1] + .1, coat, 0.6)
    if big:
        if belt:
            box(0, belt - .06, 1, belt + .06, trim)
        lit = (250, 225, 160) if night else [c + 12 for c in glass]
        for low, high in (((.44, .84),) if tall < 3.5 else ((.3, .5), (.62, .84))):
            box(.02, low - .015, .97, high + .015, glass, 0.8)
            for k in range(7):
                box(.035 + k * .134, low, .15 + k * .134, high, lit, 0.7 + 0.08 * (k % 4), glow=night and k % 3 < 2)
        for a in (.42, .86):
            box(a, .12, a + .085, .84 if tall < 3.5 else .5, glass, 0.6)
            box(a + .012, .16, a + .036, .8 if tall < 3.5 else .48, glass, 1.5)
            box(a + .048, .16, a + .074, .8 if tall < 3.5 else .48, glass, 1.5)
    else:
        panes = [p for k, p in enumerate(profile) if p[2] == "glass" or (k and profile[k - 1][2] == "glass")]
        (f0, base, _), (f1, _, _), (r1, _, _), (r0, rear, _) = panes[:4]
        panel([(f0 - .04, base + .02), (f1 - .01, .95), (r1 + .01, .95), (r0 + .05, rear + .02)], glass)
        shine = [c + 45 for c in glass]
        panel([(f0 - .09, base + .03), (f1 - .02, .93), (f1 - .08, .93), (f0 - .17, base + .03)], shine)
        for a in ((f1 + r1) / 2 + .03, r1 + .03):
            box(a - .012, base, a + .012, .97, coat, 0.9)
        for a in (f0 - .03, (f1 + r1) / 2 + .03):
            box(a - .004, .28, a + .004, base, coat, 0.55)
        box((f1 + r1) / 2 - .03, .54, (f1 + r1) / 2 + .0, .58, coat, 0.5)
        box(.95, .46, 1.0, .56, (255, 250, 225), glow=night)
        box(.0, .48, .035, .6, (200, 30, 25), glow=night)
    for along in axles:
        wheel(along, near * 0.99, 1.22, [c * 0.35 for c in coat])
        wheel(along, near, 1.0, (22, 22, 24))
        wheel(along, near, 0.62, (150, 150, 155))
        wheel(along, near, 0.2, (60, 60, 64))


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
