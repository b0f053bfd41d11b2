"""Rain on a windshield: drops on glass as lenses over any photograph, with a wet film and distant streaks.

    from utils.weather import rain, windshield
    rainy = windshield.add_windshield_rain(image, rain.rng_for(seed=0, name="000000000139.jpg"), "medium")
    wet = windshield.add_drops(image, rain.rng_for(0, "000000000139.jpg"), "heavy")    # the lens alone, no streaks

The layers, in the order in which light meets them (own formulation):

1. streaks  rain between the camera and the scene: the far and middle layers of utils/weather/rain.py
2. film     a wet pane bends the picture in slow waves, blurs it and veils it; wiped arcs are clearer, with fine
            rings where the blade smeared
3. drops    plano-convex lenses of some millimetres: each shows the whole scene, small and upside-down, because a
            surface of slope s deflects a ray by about (n - 1) s towards the drop's axis (Snell, n = 1.33). Towards
            the rim the surface steepens and light is lost (Fresnel, total reflection): a dark rim
4. focus    a camera that looks at the road sees the pane out of focus: the premultiplied layer of drops is blurred
            with a disc, the circle of confusion. One that looks at the glass sees sharp drops and a soft road
5. noise    the sensor at higher gain, over everything

Where the drops are is utils/weather/glass_drops.py; what is physical and what is not is in docs/windshield.md. Lenses
are computed at the pixels under water only; the rest is a dozen uint8 passes inside Pillow. Speed:
benchmarks/windshield.py.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from utils.weather import rain
from utils.weather.glass_drops import EDGE, SUPPORT, DropLayout, Wiper, place_drops, polar, swept_by, water_field

INTENSITIES = rain.INTENSITIES
VERSION = f"{rain.VERSION}.1"  # of the streaks and of the pane; raised whenever equal seeds give other pixels

# Ranges that each image draws from, uniformly; lengths are fractions of the image's short side. Tuned by eye against
# photographs through wet panes.
_RANGES = {
    #         light            medium          heavy
    "drops": ((25, 90), (70, 210), (180, 520)),  # counts in a 4:3 frame
    "size": ((0.006, 0.015), (0.007, 0.017), (0.008, 0.020)),  # median radius
    "specks": ((0, 120), (40, 450), (150, 1300)),
    "trails": ((0.0, 1.5), (0.3, 5.0), (3.0, 12.0)),  # mean number
    "film": ((0.0, 0.10), (0.05, 0.28), (0.15, 0.42)),  # opacity of the veil where the film is thickest
    "soften": ((0.0, 0.3), (0.1, 0.7), (0.4, 1.0)),  # share of the blurred copy
    "warp": ((0.0, 0.001), (0.0, 0.004), (0.001, 0.008)),  # how far the film bends the picture
    "streaks": ((0.2, 0.7), (0.2, 0.65), (0.2, 0.6)),  # share of utils/weather/rain.py's streaks and veil
    "noise": ((0.0, 2.0), (0.5, 3.0), (1.0, 4.0)),  # grey levels
}
_RIM_SLOPE = 2.0 / SUPPORT  # slope of water_field's surface at a lone drop's waterline, per kernel radius
# Copies of the scene that drops show, by their short side in pixels, and the largest kernel radius, as a fraction of
# the picture's short side, that uses each: a small drop shows the scene smaller, so from a coarser copy.
_LENS_GRIDS = ((14, 0.018), (36, 0.04), (96, math.inf))
_FILM_GRID = 96  # short side of the maps of the film
_MESH = 16  # cells along the short side of the mesh that bends the picture


@dataclass(frozen=True)
class PaneParameters:
    """Everything one picture needs besides the places of its drops. Lengths are fractions of the short side."""

    intensity: str  # the name after "random" was resolved
    layout: DropLayout
    defocus: float  # radius of the circle of confusion of the drops
    scene_blur: float  # deviation of the scene's blur: more than 0 where the camera looks at the glass
    bend: float  # how far a ray at a drop's rim lands from the drop, fraction of the long side
    rim: float  # 0..1, light lost at the rim
    glow: float  # 0..1, share of light from outside the picture in a drop
    highlight: float  # 0..1, strength of the spot of light in a drop
    light: tuple[float, float]  # where on the drop the spot is, in drop radii from its centre
    film: float  # 0..1, opacity of the veil where the film is thickest
    soften: float  # 0..1, share of a blurred copy of the scene there
    warp: float  # how far the film bends the picture
    streaks: float  # 0..1, share of utils/weather/rain.py's streaks, veil and spray behind the pane
    airlight: float  # brightness of veil and glow relative to the scene's bright regions
    noise: float  # standard deviation in grey levels


def sample_parameters(rng: np.random.Generator, intensity: str = "random") -> PaneParameters:
    """Draw the look of one image. "random" picks light, medium or heavy with equal probability."""
    rain.check_intensity(intensity)
    if intensity == "random":
        intensity = INTENSITIES[rng.integers(len(INTENSITIES))]
    column = INTENSITIES.index(intensity)

    def draw(key):
        return float(rng.uniform(*_RANGES[key][column]))

    on_glass = rng.random() < 0.4  # what the camera focuses on
    near = 1.0 if on_glass else float(rng.uniform(1.0, 2.4))  # the nearer the pane, the larger and softer its drops
    wipers = _sample_wipers(rng) if rng.random() < 0.35 else ()
    layout = DropLayout(
        drops=round(draw("drops") / near**0.5),
        size=draw("size") * near,
        largest=0.055 * near**0.5,
        spread=float(rng.uniform(0.35, 0.7)),
        specks=round(draw("specks")),
        trails=draw("trails"),
        clustering=float(rng.uniform(0.1, 0.9)),
        flow=float(np.clip(rng.normal(0.0, 14.0), -50.0, 50.0)),
        wipers=wipers,
        residue=float(rng.uniform(0.15, 0.5)),
    )
    return PaneParameters(
        intensity=intensity,
        layout=layout,
        defocus=float(rng.uniform(0.0, 0.0025) if on_glass else rng.uniform(0.006, 0.014)) * near,
        scene_blur=float(rng.uniform(0.0, 0.006)) if on_glass else 0.0,
        bend=float(rng.uniform(0.25, 0.5)),
        rim=float(rng.uniform(0.2, 0.7) if on_glass else rng.uniform(0.0, 0.3)),  # photographs of the road show little
        glow=float(rng.uniform(0.2, 0.55)),
        highlight=float(rng.uniform(0.0, 0.7)),
        light=(float(rng.uniform(-0.4, 0.4)), float(rng.uniform(0.35, 0.7) * (1 if rng.random() < 0.7 else -1))),
        film=draw("film"),
        soften=draw("soften"),
        warp=draw("warp"),
        streaks=draw("streaks"),
        airlight=float(rng.uniform(0.85, 1.1)),
        noise=draw("noise"),
    )


def _sample_wipers(rng: np.random.Generator) -> tuple[Wiper, ...]:
    """One or two blades that move in parallel, with the pivots below the picture."""
    first, last = float(rng.uniform(-95.0, -40.0)), float(rng.uniform(-10.0, 75.0))
    inner, outer = float(rng.uniform(0.1, 0.35)), float(rng.uniform(0.8, 1.2))
    y, left = float(rng.uniform(1.02, 1.3)), float(rng.uniform(0.15, 0.6))
    one = Wiper(left, y, inner, outer, first, last)
    return (one, replace(one, x=left + float(rng.uniform(0.4, 0.6)))) if rng.random() < 0.6 else (one,)


def add_windshield_rain(image: np.ndarray, rng: np.random.Generator, intensity: str = "random") -> np.ndarray:
    """The image through a rainy windshield: distant streaks, wet film, drops.

    image: (H, W, 3) uint8 RGB, not modified. Returns a new (H, W, 3) uint8 array.
    Equal generator states give equal pixels; the generator is advanced. ValueError for other images or intensities.
    """
    rain.check_image(image)
    p = sample_parameters(rng, intensity)
    far = rain.sample_parameters(rng, p.intensity)
    layers = tuple(replace(layer, count=round(layer.count * p.streaks**depth))  # the nearer layer is thinned more
                   for depth, layer in enumerate(far.layers[:2], start=1))
    far = replace(far, layers=layers, veil=far.veil * p.streaks, spray=far.spray * p.streaks, softness=0.0, noise=0.0)
    return apply_drops(rain.apply_rain(image, far, rng), p, rng)[0]


def add_drops(image: np.ndarray, rng: np.random.Generator, intensity: str = "random") -> np.ndarray:
    """The image through a wet pane or lens, without falling rain; otherwise as add_windshield_rain."""
    return apply_drops(image, sample_parameters(rng, intensity), rng)[0]


def add_drops_with_mask(image: np.ndarray, rng: np.random.Generator,
                        intensity: str = "random") -> tuple[np.ndarray, np.ndarray]:
    """-> (what add_drops returns, (H, W) uint8 opacity of the drops: 255 where only the drop's light arrives)."""
    return apply_drops(image, sample_parameters(rng, intensity), rng)


def apply_drops(image: np.ndarray, parameters: PaneParameters,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Render film, drops and noise: image (H, W, 3) uint8 -> (picture (H, W, 3), drop opacity (H, W)), uint8.

    rng places the drops.
    """
    rain.check_image(image)
    p = parameters
    height, width = image.shape[:2]
    short = min(height, width)
    scene = Image.fromarray(image)
    small = scene.reduce(max(1, short // 30))
    bright = np.percentile(np.asarray(small).mean(axis=2), 85)
    mean = np.asarray(small, dtype=np.float32).mean(axis=(0, 1))
    # Grey light of the sky, tinted a little by the scene.
    airlight = np.clip(p.airlight * (0.85 * bright + 0.15 * mean + 18.0), 20.0, 245.0).astype(np.float32)  # (3,)

    density = rain.smooth_noise(rng, 24, 32)
    drops = place_drops(p.layout, width, height, density, rng)
    behind = _blur(scene, p.scene_blur * short)
    behind = _film(behind, p, airlight, rng)
    layer = _lenses(scene, drops, p, airlight)
    layer = _disc_blur(layer, p.defocus * short)
    opacity = layer.getchannel(3)
    through = ImageChops.invert(opacity)
    picture = ImageChops.multiply(behind, Image.merge("RGB", (through,) * 3))
    picture = ImageChops.add(picture, Image.merge("RGB", layer.split()[:3]))
    return np.array(rain.add_noise(picture, p.noise, rng)), np.array(opacity)


def _blur(scene: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur, sigma in pixels; below a quarter pixel the scene itself."""
    return scene.filter(ImageFilter.GaussianBlur(sigma)) if sigma > 0.25 else scene


def _film(scene: Image.Image, p: PaneParameters, airlight: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The scene through the wet film: bent, softened, veiled."""
    width, height = scene.size
    short = min(width, height)
    h, w = (max(1, round(side * min(1.0, _FILM_GRID / short))) for side in (height, width))
    patches = rain.smooth_noise(rng, h, w)
    fine = rain.smooth_noise(rng, h, w, cells=17)
    thickness = (0.25 + 0.75 * patches) * (0.6 + 0.4 * fine)  # (h, w) in 0..1
    rows, columns = (np.arange(h)[:, None] + 0.5) * height / h, (np.arange(w) + 0.5) * width / w
    for wiper in p.layout.wipers:
        distance, angle = polar(wiper, columns, rows, width, height)
        swept = swept_by(wiper, distance, angle)
        rings = rng.random(512) ** 3  # where the rubber is worn the blade leaves fine arcs
        ring = rings[np.clip(distance / wiper.outer * 511, 0, 511).astype(np.intp)]
        thickness = np.where(swept, thickness * 0.2 + 0.4 * ring * fine, thickness)

    if p.warp * short > 0.3:
        scene = _bend(scene, p.warp * short, thickness, rng)
    if p.soften > 0.02:
        soft = _blur(scene, 0.005 * short)
        scene = Image.composite(soft, scene, rain.enlarge(255.0 * p.soften * np.sqrt(thickness), width, height))
    veil = Image.new("RGB", scene.size, tuple(int(v) for v in airlight))
    return Image.composite(veil, scene, rain.enlarge(255.0 * p.film * thickness, width, height))


def _bend(scene: Image.Image, shift: float, thickness: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Displace the scene by up to about shift pixels in slow waves, more where the film is thick."""
    width, height = scene.size
    step = max(4, min(width, height) // _MESH)
    xs, ys = list(range(0, width, step)) + [width], list(range(0, height, step)) + [height]
    moves = np.stack([rain.smooth_noise(rng, len(ys), len(xs), cells=max(2, len(ys) // 2)) for _ in range(2)])
    depth = np.asarray(Image.fromarray(thickness.astype(np.float32)).resize((len(xs), len(ys))))
    moves = shift * (2.0 * moves - 1.0) * (0.3 + depth)
    moves[:, (0, -1)] = 0.0  # the picture's edges stay where they are
    moves[:, :, (0, -1)] = 0.0
    node_x, node_y = moves[0] + xs, moves[1] + np.array(ys)[:, None]
    corners = np.stack([node_x, node_y], axis=2)  # (rows, columns, 2)
    quads = np.concatenate([corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], axis=2).tolist()
    mesh = [((xs[j], ys[i], xs[j + 1], ys[i + 1]), quads[i][j]) for i in range(len(ys) - 1) for j in range(len(xs) - 1)]
    return scene.transform(scene.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _lenses(scene: Image.Image, drops: np.ndarray, p: PaneParameters, airlight: np.ndarray) -> Image.Image:
    """What the drops show, sharp: premultiplied colour and opacity, mode RGBa of the scene's size."""
    width, height = scene.size
    field, radius = water_field(drops, width, height)
    layer = np.zeros((height * width, 4), dtype=np.uint8)
    wet = np.flatnonzero(field > (0.5 * EDGE) ** 2)  # (N,) a little more than the water, for the smooth edge
    if wet.size == 0:
        return Image.fromarray(layer.reshape(height, width, 4), "RGBa")
    surface = np.pad(np.sqrt(field) - np.float32(EDGE), 1, mode="edge")
    row, column = np.divmod(wet, width)
    at = (row + 1) * (width + 2) + column + 1
    flat = surface.reshape(-1)
    slope_x = 0.5 * (flat[at + 1] - flat[at - 1])
    slope_y = 0.5 * (flat[at + width + 2] - flat[at - width - 2])
    steep = np.sqrt(slope_x * slope_x + slope_y * slope_y) + 1e-6
    opacity = np.clip(flat[at] / steep + 0.5, 0.0, 1.0)  # height / slope is the distance to the waterline in pixels

    scale = radius.reshape(-1)[wet] / np.float32(_RIM_SLOPE)
    slope_x, slope_y = slope_x * scale, slope_y * scale  # 0 at a lone drop's top .. 1 at its rim, pointing inwards
    steep = np.minimum(steep * scale, 1.4)
    # A ray lands (n - 1) x slope away, across the axis; more where the surface is steep, as tan and Snell have it.
    reach = np.float32(p.bend * max(width, height)) * (0.7 + 0.3 * steep * steep)
    x, y = column + reach * slope_x, row + reach * slope_y
    light = np.empty((wet.size, 3), dtype=np.float32)
    size = radius.reshape(-1)[wet] / min(width, height)
    smallest = 0.0
    for grid, largest in _LENS_GRIDS:
        members = np.flatnonzero((size >= smallest) & (size < largest))
        light[members] = _look_up(scene, x[members], y[members], grid)
        smallest = largest
    # Where the ray leaves the picture upwards there is sky, and some of that reaches every part of the drop.
    sky = np.clip(p.glow - 1.5 * np.minimum(y, 0.0) / height, 0.0, 0.85).astype(np.float32)
    light += sky[:, None] * (airlight - light)
    light *= (1.0 - p.rim * np.minimum(steep, 1.0) ** 5)[:, None]
    spot = (slope_x + p.light[0]) ** 2 + (slope_y + p.light[1]) ** 2
    light += (p.highlight * np.exp(-spot / 0.03))[:, None] * (np.minimum(1.5 * airlight, 255.0) - light)
    layer[wet, :3] = np.clip(light * opacity[:, None], 0.0, 255.0)
    layer[wet, 3] = 255.0 * opacity
    return Image.fromarray(layer.reshape(height, width, 4), "RGBa")


def _look_up(scene: Image.Image, x: np.ndarray, y: np.ndarray, grid: int) -> np.ndarray:
    """Colours (N, 3) float32 at pixels x, y (N,): bilinear in a copy of the scene reduced to grid pixels (its short
    side), mirrored at the edges."""
    width, height = scene.size
    factor = max(1, min(width, height) // grid)
    table = np.asarray(scene.reduce(factor).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
    h, w = table.shape[:2]
    u = _mirror((x + 0.5) / factor - 0.5, w)
    v = _mirror((y + 0.5) / factor - 0.5, h)
    j, i = u.astype(np.intp), v.astype(np.intp)
    u, v = (u - j)[:, None].astype(np.float32), (v - i)[:, None].astype(np.float32)
    right, below = np.minimum(j + 1, w - 1) - j, (np.minimum(i + 1, h - 1) - i) * w
    table, at = table.reshape(-1, 3), i * w + j
    upper = table[at] * (1.0 - u) + table[at + right] * u
    lower = table[at + below] * (1.0 - u) + table[at + below + right] * u
    return upper * (1.0 - v) + lower * v


def _mirror(x: np.ndarray, size: int) -> np.ndarray:
    """Fold coordinates into 0..size - 1."""
    period = max(2.0 * (size - 1), 1e-3)
    x = np.mod(x, period)
    return np.clip(np.minimum(x, period - x), 0.0, size - 1)


def _disc_blur(layer: Image.Image, radius: float) -> Image.Image:
    """Convolve an RGBa layer with a disc of the given radius in pixels; below half a pixel the layer itself.

    The disc is a 5 x 5 kernel on a copy that is reduced until the radius fits.
    """
    if radius < 0.5:
        return layer
    factor = math.ceil(radius / 2.3)
    offsets = np.arange(-2, 3)
    distance = np.hypot(offsets, offsets[:, None])
    weights = np.clip(radius / factor + 0.5 - distance, 0.0, 1.0)
    kernel = ImageFilter.Kernel((5, 5), weights.ravel().tolist(), weights.sum())
    small = np.pad(np.asarray(layer.reduce(factor)), ((2, 2), (2, 2), (0, 0)), mode="edge")  # Pillow skips the edge
    small = Image.fromarray(small, "RGBa").filter(kernel).crop((2, 2, small.shape[1] - 2, small.shape[0] - 2))
    if factor == 1:
        return small
    width, height = layer.size
    return small.resize(layer.size, Image.Resampling.BICUBIC, box=(0, 0, width / factor, height / factor))
