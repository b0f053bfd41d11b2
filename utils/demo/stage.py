"""Camera and canvas of the demo scenes.

World metres: X to the right, Y up from the ground, Z away from the camera. Everything is drawn twice with
the same calls: in colour, and as a number on `Stage.ids` (0 scenery, k the k-th object), so that the masks
are exactly what is seen. Distances dim colours into the haze; `glow` colours ignore the light of the day.
"""

import colorsys
import math

from PIL import Image, ImageDraw

SUPERSAMPLE = 3    # odd, so that no pixel is shared half and half between two objects


class Stage:
    """Canvas and pinhole camera. `light` is a dict of `scene.LIGHTS`; size is (width, height) in pixels."""

    def __init__(self, size, rng, light):
        self.rng, self.light = rng, light
        self.label, self.marked = 0, False                     # marked: there may be something to cover on ids
        self.width, self.height = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
        self.image = Image.new("RGB", (self.width, self.height))
        self.ids = Image.new("L", (self.width, self.height), 0)
        self.pen, self.id_pen = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.ids)
        self.focal = self.width * rng.uniform(0.85, 1.25)
        self.eye = rng.uniform(1.5, 2.8)                        # camera height, metres
        self.horizon = self.height * rng.uniform(0.38, 0.54)
        self.vanish = self.width * rng.uniform(0.3, 0.7)
        self.haze = light["haze_metres"] * rng.uniform(0.6, 1.4)
        self.nearest = self.focal * self.eye / (self.height - self.horizon)     # Z of the ground at the lower edge

    def point(self, x, y, z):
        """Pixel of a world point in front of the camera."""
        scale = self.focal / max(z, 0.3)
        return self.vanish + x * scale, self.horizon + (self.eye - y) * scale

    def color(self, rgb, z, shade=1.0, glow=False):
        """The colour as seen at distance z: lit by the day, then mixed with haze."""
        mix = 1.0 - math.exp(-z / self.haze)
        (hr, hg, hb), (ar, ag, ab), (r, g, b) = self.light["haze"], self.light["ambient"], rgb
        if glow:
            ar = ag = ab = shade = 1.0
            mix *= 0.5
        keep = (1.0 - mix) * shade
        return (min(255, int(r * ar * keep + hr * mix)), min(255, int(g * ag * keep + hg * mix)),
                min(255, int(b * ab * keep + hb * mix)))

    def flat(self, points, color):
        """A polygon of pixels; a colour with alpha (a shadow, a shine) changes no mask."""
        self.pen.polygon(points, fill=color)
        if len(color) == 3 and (self.label or self.marked):
            self.marked = True
            self.id_pen.polygon(points, fill=self.label)

    def face(self, corners, rgb, shade=1.0, glow=False, alpha=None):
        """A polygon of world points."""
        z = sum(c[2] for c in corners) / len(corners)
        color = self.color(rgb, z, shade, glow)
        self.flat([self.point(*c) for c in corners], color if alpha is None else color + (alpha,))

    def shadow(self, x, z, across, along):
        """A soft blob on the ground."""
        strength = self.light["shadow"]
        for grow, part in ((1.25, 0.4), (0.9, 0.6)):
            ring = [(x + across * grow * math.cos(a * 0.5236), 0, z + along * grow * math.sin(a * 0.5236))
                    for a in range(12)]
            self.flat([self.point(*p) for p in ring], (8, 8, 14, round(strength * part)))


class Board:
    """A flat cut-out that faces the camera at (x, z); its drawing calls take metres from its foot."""

    def __init__(self, stage, x, z, squeeze=1.0, lean=0.0):
        self.stage, self.z, self.squeeze, self.lean = stage, z, squeeze, lean
        self.scale = stage.focal / z
        self.foot = stage.point(x, 0, z)

    def at(self, x, y):
        return self.foot[0] + (x * self.squeeze + y * self.lean) * self.scale, self.foot[1] - y * self.scale

    def poly(self, points, rgb, shade=1.0, glow=False):
        self.stage.flat([self.at(*p) for p in points], self.stage.color(rgb, self.z, shade, glow))

    def rect(self, x0, y0, x1, y1, rgb, shade=1.0, glow=False):
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], rgb, shade, glow)

    def disc(self, x, y, rx, ry, rgb, shade=1.0, glow=False):
        cx, cy = self.at(x, y)
        rx, ry = max(0.7, rx * self.scale * self.squeeze), max(0.7, ry * self.scale)
        box = (cx - rx, cy - ry, cx + rx, cy + ry)
        self.stage.pen.ellipse(box, fill=self.stage.color(rgb, self.z, shade, glow))
        if self.stage.label or self.stage.marked:
            self.stage.marked = True
            self.stage.id_pen.ellipse(box, fill=self.stage.label)

    def halo(self, x, y, radius, rgb):
        """Light that spreads around a lamp; part of no mask."""
        cx, cy = self.at(x, y)
        for step in range(8, 0, -1):
            r = radius * step / 8 * self.scale
            self.stage.pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=tuple(rgb) + (30 - 3 * step,))

    def limb(self, p, q, wide, narrow, rgb, shade=1.0):
        """A tapered bar with round ends from p to q."""
        dx, dy = q[0] - p[0], q[1] - p[1]
        norm = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / norm / 2, dx / norm / 2
        self.poly([(p[0] + nx * wide, p[1] + ny * wide), (q[0] + nx * narrow, q[1] + ny * narrow),
                   (q[0] - nx * narrow, q[1] - ny * narrow), (p[0] - nx * wide, p[1] - ny * wide)], rgb, shade)
        self.disc(*p, wide / 2, wide / 2, rgb, shade)
        self.disc(*q, narrow / 2, narrow / 2, rgb, shade)


def pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def paint(rng, grey=0.5):
    """A random colour: with probability `grey` nearly colourless, else any hue, dull to vivid."""
    saturation = rng.uniform(0, 0.12) if rng.random() < grey else rng.uniform(0.2, 0.9)
    return [255 * c for c in colorsys.hsv_to_rgb(rng.random(), saturation, rng.uniform(0.15, 0.95))]
