"""Cars and buses of a demo scene: a side profile that is extruded across, seen from any direction.

`car` and `bus` draw one on a `stage.Stage`; sizes and colours come from the stage's generator, in the order of the
calls: another order would draw other pictures.
"""

import math
from itertools import pairwise

from utils.demo.stage import paint, pick

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
    draw_vehicle(Vehicle(stage, profile, x, z, yaw, rng.uniform(3.7, 4.7), tall * rng.uniform(0.95, 1.06), 1.8, 0.14))


def bus(stage, x, z, yaw):
    rng = stage.rng
    tall = 4.1 if rng.random() < 0.2 else rng.uniform(2.9, 3.2)
    draw_vehicle(Vehicle(stage, COACH, x, z, yaw, rng.uniform(8.0, 11.0), tall, 2.5, 0.03))


class Vehicle:
    """One vehicle at (x, z): its geometry in metres, and its colours.

    yaw: direction of travel, 0 to the right, pi/2 away from the camera. taper: how much narrower the roof is.
    """

    def __init__(self, stage, profile, x, z, yaw, length, tall, width, taper):
        rng = stage.rng
        self.stage, self.profile, self.x, self.z = stage, profile, x, z
        self.length, self.tall, self.width, self.taper = length, tall, width, taper
        self.ahead = math.cos(yaw), math.sin(yaw)
        self.coat, self.trim = paint(rng, 0.55), paint(rng, 0.4)
        self.glass = pick(rng, ((36, 44, 54), (60, 72, 82), (20, 24, 30)))
        self.belt = 0.0 if rng.random() < 0.5 else rng.uniform(0.2, 0.34)      # height of a bus's stripe; 0: none
        self.night, self.big = stage.light["lamps"], profile is COACH
        self.near = 1 if (x * self.ahead[1] - z * self.ahead[0]) > 0 else -1    # the flank that faces the camera
        self.radius, self.axles = (0.48, (.2, .74)) if self.big else (0.33, (.19, .81))

    def place(self, along, y, across):
        """Shares of length (0 rear, 1 front) and height, and -1..1 across, as a world point."""
        a = (along - 0.5) * self.length
        c = across * self.width / 2 * (1 - self.taper * max(0.0, y - 0.6) / 0.4)
        cos, sin = self.ahead
        return self.x + a * cos - c * sin, y * self.tall, self.z + a * sin + c * cos

    def wheel(self, along, across, grow, rgb):
        """A disc around an axle, `grow` times as large as the tyre."""
        r = self.radius * grow
        self.stage.face([self.place(along + r * math.cos(k * 0.524) / self.length,
                                    (self.radius + r * math.sin(k * 0.524)) / self.tall, across)
                         for k in range(12)], rgb)

    def patch(self, edges, u0, v0, u1, v1, rgb, shade=1.0, glow=False):
        """A rectangle on a surface that runs across: u from -1 to 1, v from 0 to 1 along `edges` (a0, y0, a1, y1)."""
        a, y, a_end, y_end = edges
        rows = [(a + (a_end - a) * v, y + (y_end - y) * v) for v in (v0, v1)]
        self.stage.face([self.place(*rows[0], u0), self.place(*rows[0], u1),
                         self.place(*rows[1], u1), self.place(*rows[1], u0)], rgb, shade, glow)

    def panel(self, points, rgb, shade=1.0, glow=False):
        """A polygon on the near flank."""
        self.stage.face([self.place(a, y, self.near) for a, y in points], rgb, shade, glow)

    def box(self, a0, y0, a1, y1, rgb, shade=1.0, glow=False):
        """A rectangle on the near flank."""
        self.panel([(a0, y0), (a1, y0), (a1, y1), (a0, y1)], rgb, shade, glow)


def draw_vehicle(v):
    """From far to near: shadow and underside, the surfaces that run across, the flank, the wheels on it."""
    draw_underside(v)
    for edges, kind in visible_surfaces(v):
        draw_surface(v, edges, kind)
    flank = v.place(0.5, 0.4, v.near)
    if (flank[0] * -v.ahead[1] + flank[2] * v.ahead[0]) * v.near >= 0:
        return                                                       # seen exactly from the front or the rear
    v.panel([p[:2] for p in v.profile], v.coat)
    v.box(.01, v.profile[0][1], .99, v.profile[0][1] + .1, v.coat, 0.6)
    if v.big:
        draw_bus_flank(v)
    else:
        draw_car_flank(v)
    for along in v.axles:
        v.wheel(along, v.near * 0.99, 1.22, [c * 0.35 for c in v.coat])
        v.wheel(along, v.near, 1.0, (22, 22, 24))
        v.wheel(along, v.near, 0.62, (150, 150, 155))
        v.wheel(along, v.near, 0.2, (60, 60, 64))


def draw_underside(v):
    """Shadow, tyres seen under the body, floor."""
    v.stage.face([v.place(a, 0, c) for a, c in ((-.03, -1.12), (1.03, -1.12), (1.03, 1.12), (-.03, 1.12))],
                 (6, 6, 10), alpha=min(255, round(v.stage.light["shadow"] * 1.3)))
    for along in v.axles:
        for across in (-v.near, v.near):
            v.wheel(along, across * 0.72, 1.0, (14, 14, 16))
    v.stage.face([v.place(a, v.profile[0][1] * 0.75, c) for a, c in ((.03, -.9), (.97, -.9), (.97, .9), (.03, .9))],
                 (14, 14, 16))


def visible_surfaces(v):
    """-> [((a0, y0, a1, y1), kind)] of the profile's surfaces that face the camera, far to near."""
    surfaces = []
    for (a0, y0, kind), (a1, y1, _) in pairwise(v.profile):
        middle = v.place((a0 + a1) / 2, (y0 + y1) / 2, 0)
        up, out = (a0 - a1) * v.length, (y1 - y0) * v.tall           # the outward normal: `out` ahead, `up` upward
        towards = -out * (v.ahead[0] * middle[0] + v.ahead[1] * middle[2]) + up * (v.stage.eye - middle[1])
        if towards > 0:
            surfaces.append((math.hypot(middle[0], middle[2]), (a0, y0, a1, y1), kind))
    return [(edges, kind) for _, edges, kind in sorted(surfaces, reverse=True)]


def draw_surface(v, edges, kind):
    """One surface that runs across: coat, and by its kind panes, a bus's destination board, or lamps and plates."""
    flat_top = abs(edges[3] - edges[1]) < 0.12
    v.patch(edges, -1, 0, 1, 1, v.coat, 1.12 if flat_top else 0.85)
    if kind == "glass":
        v.patch(edges, -.88, .06, .88, .94, v.glass)
        v.patch(edges, -.5, .1, -.1, .9, [c + 40 for c in v.glass])
    elif kind == "board":
        v.patch(edges, -.7, .2, .7, .8, (24, 22, 20))
        v.patch(edges, -.5, .35, .4, .65, (250, 170, 50), glow=True)
    elif kind in ("nose", "tail"):
        front = kind == "nose"
        low, high = (.35, .6) if v.big else (.55, .92)
        lamp = (255, 250, 225) if front else (235, 30, 25)
        for u in (-1, 1):
            v.patch(edges, u * .94, low, u * .6, high, lamp if v.night else [c * 0.85 for c in lamp], glow=v.night)
        v.patch(edges, -.5, low + .05, .5, high, (28, 28, 30) if front else [c * 0.9 for c in v.coat])
        v.patch(edges, -.24, .14, .24, .36, (225, 225, 215))
        v.patch(edges, -1, 0, 1, .12, (30, 30, 32))


def draw_bus_flank(v):
    """Stripe, one or two rows of windows, doors."""
    if v.belt:
        v.box(0, v.belt - .06, 1, v.belt + .06, v.trim)
    lit = (250, 225, 160) if v.night else [c + 12 for c in v.glass]
    for low, high in (((.44, .84),) if v.tall < 3.5 else ((.3, .5), (.62, .84))):
        v.box(.02, low - .015, .97, high + .015, v.glass, 0.8)
        for k in range(7):
            v.box(.035 + k * .134, low, .15 + k * .134, high, lit, 0.7 + 0.08 * (k % 4), glow=v.night and k % 3 < 2)
    for a in (.42, .86):
        v.box(a, .12, a + .085, .84 if v.tall < 3.5 else .5, v.glass, 0.6)
        v.box(a + .012, .16, a + .036, .8 if v.tall < 3.5 else .48, v.glass, 1.5)
        v.box(a + .048, .16, a + .074, .8 if v.tall < 3.5 else .48, v.glass, 1.5)


def draw_car_flank(v):
    """Side windows with a reflection, pillars, doors, a handle, lamps at both ends."""
    profile, coat = v.profile, v.coat
    panes = [p for k, p in enumerate(profile) if p[2] == "glass" or (k and profile[k - 1][2] == "glass")]
    (f0, base, _), (f1, _, _), (r1, _, _), (r0, rear, _) = panes[:4]
    v.panel([(f0 - .04, base + .02), (f1 - .01, .95), (r1 + .01, .95), (r0 + .05, rear + .02)], v.glass)
    shine = [c + 45 for c in v.glass]
    v.panel([(f0 - .09, base + .03), (f1 - .02, .93), (f1 - .08, .93), (f0 - .17, base + .03)], shine)
    for a in ((f1 + r1) / 2 + .03, r1 + .03):
        v.box(a - .012, base, a + .012, .97, coat, 0.9)
    for a in (f0 - .03, (f1 + r1) / 2 + .03):
        v.box(a - .004, .28, a + .004, base, coat, 0.55)
    v.box((f1 + r1) / 2 - .03, .54, (f1 + r1) / 2 + .0, .58, coat, 0.5)
    v.box(.95, .46, 1.0, .56, (255, 250, 225), glow=v.night)
    v.box(.0, .48, .035, .6, (200, 30, 25), glow=v.night)
