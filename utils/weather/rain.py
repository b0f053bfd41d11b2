"""Synthetic rain from layers that follow how rain forms in a photograph.

    from utils.weather import rain
    rainy = rain.add_rain(image, rain.rng_for(seed=0, name="000000000139.jpg"), "heavy")

The layers, in the order in which light meets them (own formulation; the physics is from
Garg & Nayar, "Vision and Rain", IJCV 2007; the veil is Koschmieder's law, 1924):

1. tone     a wet, overcast scene: darker, less contrast, less colour
2. veil     far rain and spray: I * t + A * (1 - t), where t falls with a pseudo-depth and A is the
            airlight, mixed with a blurred image because a veil scatters lamps and sky forward
3. streaks  falling drops during the exposure. A drop is a fish-eye lens, so it shows the mean light of
            the scene and not grey: streaks are alpha-blended towards blurred background plus airlight.
            They stand out on dark ground and vanish before a white sky, as in photographs.
            Four depth layers: far (many, short, thin) ... lens (few, long, wide, soft), and splashes.
4. noise    the sensor at higher gain

All layers of streaks add their optical depth in one float map; the colour channels are touched by a
handful of uint8 passes inside Pillow. Speed: benchmarks/rain.py.
"""

import dataclasses
import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

INTENSITIES = ("light", "medium", "heavy")
VERSION = 2  # raised whenever equal seeds give other pixels

# Ranges that each image draws from, uniformly. Wide, because variety is what generalises. Counts are streaks in a
# 4:3 frame, lengths and radii fractions of the image's short side. The values were tuned by eye against photographs.
_RANGES = {
    #       light       medium       heavy
    "far": ((250, 900), (900, 2400), (2400, 5200)),  # counts, per depth layer
    "mid": ((50, 220), (220, 600), (650, 1500)),
    "near": ((0, 14), (10, 45), (45, 130)),
    "lens": ((0, 2), (0, 5), (2, 12)),
    "splash": ((0, 60), (60, 400), (400, 1500)),
    "opacity": ((0.5, 0.9), (0.7, 1.15), (0.95, 1.4)),  # factor on the layers' peak opacity
    "veil": ((0.02, 0.25), (0.2, 0.6), (0.55, 1.1)),  # optical depth at the far end
    "spray": ((0.0, 0.12), (0.1, 0.45), (0.4, 0.9)),  # optical depth in patches above the ground
    "gain": ((0.88, 1.0), (0.78, 0.98), (0.7, 0.96)),
    "contrast": ((0.92, 1.0), (0.82, 0.95), (0.7, 0.88)),
    "saturation": ((0.82, 1.0), (0.62, 0.88), (0.4, 0.7)),
    "softness": ((0.0, 0.0), (0.0, 0.25), (0.0, 0.4)),
    "noise": ((0.0, 2.0), (1.0, 4.0), (2.0, 6.0)),  # grey levels
}
_DEPTHS = {
    #       length          radius            peak opacity  angle jitter in degrees
    "far": ((0.025, 0.055), (0.0014, 0.0022), (0.10, 0.26), 2.0),
    "mid": ((0.06, 0.13), (0.0022, 0.0036), (0.16, 0.38), 2.5),
    "near": ((0.14, 0.32), (0.004, 0.008), (0.18, 0.40), 3.0),
    "lens": ((0.30, 0.60), (0.011, 0.020), (0.06, 0.16), 3.5),
}


@dataclass(frozen=True)
class StreakLayer:
    """One depth layer of streaks. Lengths are fractions of the image's short side."""

    count: int  # streaks in a 4:3 frame; other frames get as many per square of the short side
    length: float  # mean length
    radius: float  # mean half width, to where the profile ends
    opacity: float  # mean peak opacity, 0..1
    jitter: float  # standard deviation of the angle, degrees
    top: float = 0.0  # streaks start below this fraction of the height (splashes: the ground)


@dataclass(frozen=True)
class RainParameters:
    """Everything one rainy image needs besides the positions of its streaks."""

    intensity: str  # the name after "random" was resolved
    angle: float  # degrees from the vertical, positive leans right at the top
    fan: float  # degrees that the angle changes from the image's left to its right edge (perspective)
    layers: tuple[StreakLayer, ...]
    gain: float  # brightness factor, 0..1
    contrast: float  # 0..1, about the image's mean
    saturation: float  # 0..1
    veil: float  # beta: optical depth of the veil at pseudo-depth 1
    spray: float  # extra optical depth near the ground, in patches
    horizon: float  # fraction of the height where pseudo-depth reaches 1; negative: a smooth random depth map
    patchiness: float  # 0..1, share of the veil and of the far streaks that comes in drifting sheets
    airlight: float  # brightness of A relative to the image's bright regions
    tint: tuple[float, float, float]  # colour of A, factors about 1
    softness: float  # share of a blurred copy mixed in (wet lens), 0..1
    noise: float  # standard deviation of the sensor noise in grey levels
    densest: float = 1.5  # largest optical depth; at 1.5 a person still sees the object


def rng_for(seed: int, name: str) -> np.random.Generator:
    """Generator that depends only on (seed, file name): equal on every machine and in every process."""
    digest = hashlib.sha256(f"{int(seed)}\0{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def check_intensity(intensity: str) -> str:
    """Return the name, or raise ValueError with the valid ones."""
    if intensity != "random" and intensity not in INTENSITIES:
        raise ValueError(f"intensity {intensity!r} is unknown; valid: {', '.join(INTENSITIES)} or random")
    return intensity


def check_image(image: np.ndarray) -> None:
    """ValueError unless image is what the generators take: (H, W, 3) uint8 with at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"rain needs a uint8 array (H, W, 3), got {got}")
    if 0 in image.shape:
        raise ValueError(f"rain needs at least one pixel, got {image.shape}")


def sample_parameters(rng: np.random.Generator, intensity: str = "random") -> RainParameters:
    """Draw the look of one image. "random" picks light, medium or heavy with equal probability."""
    check_intensity(intensity)
    if intensity == "random":
        intensity = INTENSITIES[rng.integers(len(INTENSITIES))]
    column = INTENSITIES.index(intensity)

    def draw(key):
        return float(rng.uniform(*_RANGES[key][column]))

    exposure = float(np.clip(rng.lognormal(0.0, 0.35), 0.5, 2.0))  # shutter time: all layers share it
    strength = draw("opacity")
    layers = []
    for name, (length, radius, opacity, jitter) in _DEPTHS.items():
        layers.append(StreakLayer(
            count=round(draw(name)),
            length=float(rng.uniform(*length)) * exposure,
            radius=float(rng.uniform(*radius)),
            opacity=min(0.8, float(rng.uniform(*opacity)) * strength / exposure**0.5),  # longer = fainter
            jitter=jitter,
        ))
    horizon = float(rng.uniform(0.25, 0.55)) if rng.random() < 0.75 else -1.0
    layers.append(StreakLayer(round(draw("splash")), 0.008, 0.003, min(0.8, 0.22 * strength), 40.0,
                              top=max(horizon, 0.45) + 0.2))
    cool = float(rng.uniform(-0.01, 0.04))
    return RainParameters(
        intensity=intensity,
        angle=float(np.clip(rng.normal(0.0, 13.0), -40.0, 40.0)),
        fan=float(rng.uniform(-6.0, 6.0)),
        layers=tuple(layers),
        gain=draw("gain"),
        contrast=draw("contrast"),
        saturation=draw("saturation"),
        veil=draw("veil"),
        spray=draw("spray"),
        horizon=horizon,
        patchiness=float(rng.uniform(0.1, 0.6)),
        airlight=float(rng.uniform(0.85, 1.15)),
        tint=(1.0 - cool, 1.0, 1.0 + cool),
        softness=draw("softness"),
        noise=draw("noise"),
    )


def add_rain(image: np.ndarray, rng: np.random.Generator, intensity: str = "random") -> np.ndarray:
    """Rainy copy of an image.

    image: (H, W, 3) uint8 RGB, not modified. Returns a new (H, W, 3) uint8 array.
    Equal generator states give equal pixels; the generator is advanced.
    """
    return apply_rain(image, sample_parameters(rng, intensity), rng)


def mist_parameters(rng: np.random.Generator) -> RainParameters:
    """Mist or distant rain: a veil through which all is still to be seen, and no streak at all."""
    p = sample_parameters(rng)
    return dataclasses.replace(p, layers=(), veil=float(rng.uniform(0.35, 1.8)), spray=float(rng.uniform(0.0, 0.6)),
                               airlight=float(rng.uniform(0.9, 1.25)), softness=float(rng.uniform(0.0, 0.5)))


def add_mist(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Misty copy of an image: (H, W, 3) uint8 RGB -> the same shape and type."""
    return apply_rain(image, mist_parameters(rng), rng)


def fog_parameters(rng: np.random.Generator) -> RainParameters:
    """Dense fog as road photographs show it: what is far away is gone, light grey by day, dark or orange at dusk."""
    p = sample_parameters(rng)
    warm = float(rng.normal(0.0, 0.04)) + (0.3 if rng.random() < 0.08 else 0.0)  # the latter under sodium lamps
    return dataclasses.replace(
        p, layers=(), veil=float(np.exp(rng.uniform(np.log(0.8), np.log(4.0)))), spray=float(rng.uniform(0.0, 0.6)),
        densest=2.6, horizon=float(rng.uniform(0.2, 0.6)) if rng.random() < 0.8 else -1.0,
        patchiness=float(rng.uniform(0.0, 0.3)), airlight=float(rng.uniform(0.7, 1.3)),
        tint=(1.0 + warm, 1.0, 1.0 - warm), gain=float(rng.uniform(0.6, 1.0)), contrast=float(rng.uniform(0.65, 0.95)),
        saturation=float(rng.uniform(0.3, 0.9)), softness=float(rng.uniform(0.1, 0.8)),
        noise=float(rng.uniform(0.0, 3.0)))


def add_fog(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Foggy copy of an image: (H, W, 3) uint8 RGB -> the same shape and type."""
    return apply_rain(image, fog_parameters(rng), rng)


def apply_rain(image: np.ndarray, parameters: RainParameters, rng: np.random.Generator) -> np.ndarray:
    """Render given parameters: image (H, W, 3) uint8 -> (H, W, 3) uint8. rng places the streaks."""
    check_image(image)
    p = parameters
    height, width = image.shape[:2]
    scene = _tone(Image.fromarray(image), p)

    # The light that veil and drops send to the camera varies slowly: build it small, enlarge it once.
    small = scene.reduce(max(1, min(height, width) // 30)).filter(ImageFilter.GaussianBlur(1.5))
    background = np.asarray(small, dtype=np.float32)  # (h, w, 3)
    bright = np.percentile(background.mean(axis=2), 85)
    airlight = np.clip(p.airlight * (0.8 * bright + 58.0), 40.0, 245.0) * np.float32(p.tint)  # (3,)
    sheets = smooth_noise(rng, *background.shape[:2])  # (h, w) in 0..1
    veil = enlarge(0.85 * airlight + 0.15 * background, width, height)
    drops = enlarge(1.12 * airlight + 0.28 * background, width, height)

    haze = enlarge(255.0 * (1.0 - np.exp(-_veil_depth(p, sheets, rng))), width, height)
    streaks = np.zeros((height, width), dtype=np.float32)  # optical depth
    for layer in p.layers:
        _add_streaks(streaks, layer, p, sheets, rng)
    np.exp(np.negative(streaks, out=streaks), out=streaks)
    alpha = Image.fromarray((255.0 - 255.0 * streaks).astype(np.uint8))

    if p.softness > 0.0 and min(height, width) >= 8:
        half = scene.reduce(2).resize((width, height), Image.Resampling.BILINEAR)
        scene = Image.blend(scene, half, p.softness)
    scene = Image.composite(veil, scene, haze)
    scene = Image.composite(drops, scene, alpha)
    return np.array(add_noise(scene, p.noise, rng))


def _tone(scene: Image.Image, p: RainParameters) -> Image.Image:
    """Saturation, contrast and brightness as one 3x4 colour matrix."""
    luma = np.array([0.299, 0.587, 0.114])
    mean = float(luma @ np.asarray(scene.reduce(max(1, min(scene.size) // 30))).reshape(-1, 3).mean(axis=0))
    scale = p.gain * p.contrast
    matrix = np.empty((3, 4))
    matrix[:, :3] = scale * (p.saturation * np.eye(3) + (1.0 - p.saturation) * luma)
    matrix[:, 3] = p.gain * (1.0 - p.contrast) * mean
    return scene.convert("RGB", tuple(matrix.ravel()))


def _veil_depth(p: RainParameters, sheets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Optical depth of the veil, (h, w) float: beta * pseudo-depth plus patches of spray above the ground."""
    h, w = sheets.shape
    rows = ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None]  # 0 top .. 1 bottom
    if p.horizon < 0.0:
        distance = 0.35 + 0.65 * smooth_noise(rng, h, w)
        ground = 0.6
    else:
        # Flat ground: distance is proportional to 1 / (y - horizon); everything above counts as far.
        distance = 1.0 / (1.0 + 4.0 * np.clip(rows - p.horizon, 0.0, None) / (1.0 - p.horizon))
        ground = p.horizon + 0.15
    sheet = 1.0 + p.patchiness * (2.0 * sheets - 1.0)
    spray = p.spray * smooth_noise(rng, h, w) ** 2 * np.exp(-(((rows - ground) / 0.22) ** 2))
    return p.densest * np.tanh((p.veil * distance * sheet + spray) / p.densest)


def _add_streaks(depth: np.ndarray, layer: StreakLayer, p: RainParameters, sheets: np.ndarray,
                 rng: np.random.Generator) -> None:
    """Add one layer's optical depth to depth (H, W) float32, in place.

    A streak is a line segment with a soft profile: (1 - v^2)^2 across and 1 - q^4, uneven, along. Only the
    pixels near the N segments are computed: R image rows that a segment crosses, K columns about its axis.
    """
    height, width = depth.shape
    short = min(height, width)
    n = rng.poisson(layer.count * 0.75 * min(max(height, width) / short, 8.0))
    if n == 0:
        return
    x, y, lengths, radii, amounts, phases = (rng.random((6, n), dtype=np.float32))
    spread = rng.standard_normal(n, dtype=np.float32)
    # Each streak's own brightness: many faint, few bright; fewer where the rain's sheets are thin.
    h, w = sheets.shape
    local = sheets[(y * h).astype(np.intp), (x * w).astype(np.intp)]
    amounts = (0.25 + 1.5 * amounts * amounts) * (1.0 - p.patchiness + 2.0 * p.patchiness * local)
    tan = np.tan(np.radians(np.clip(p.angle + p.fan * (x - 0.5) + layer.jitter * spread, -65.0, 65.0)))
    cos = 1.0 / np.sqrt(1.0 + tan * tan)
    half = np.maximum(0.5 * layer.length * short * (0.5 + lengths), 1.5) * cos  # half length in rows
    wanted = layer.radius * short * (0.6 + 0.8 * radii[::-1])
    radius = np.maximum(wanted, 0.9)  # a streak thinner than a pixel is a fainter one
    opacity = np.minimum(layer.opacity * amounts * wanted / radius, 0.9)
    peak = -np.log1p(-opacity)
    margin = half.mean() if layer.top == 0.0 else 0.0  # streaks may begin above the picture and end below it
    y = layer.top * height - margin + y * ((1.0 - layer.top) * height + 2.0 * margin)
    reach = abs(np.tan(np.radians(p.angle))) * margin
    x = -reach + x * (width + 2.0 * reach)

    first = np.clip(np.ceil(y - half), 0, height).astype(np.int32)
    count = np.maximum(np.clip(np.floor(y + half) + 1, 0, height).astype(np.int32) - first, 0)
    columns = min(width, int(2.0 * (radius / cos).max()) + 2)  # K
    per_streak = np.stack([y, 1.0 / half, x, tan, cos / radius, peak, 6.28 * phases]).astype(np.float32)
    # Blocks of about 64k pixels stay in the processor's cache.
    block = np.cumsum(count) * columns // 65536
    for piece in np.split(np.arange(n), np.flatnonzero(np.diff(block)) + 1):
        _splat(depth, per_streak[:, piece], first[piece], count[piece], columns)


def _splat(depth: np.ndarray, per_streak: np.ndarray, first: np.ndarray, count: np.ndarray, columns: int) -> None:
    """Rasterise streaks: first, count (n,) int image rows of each; per_streak (7, n) float32, see the unpacking."""
    total = int(count.sum())  # R
    if total == 0:
        return
    y, inverse_half, x, tan, step, peak, phase = np.repeat(per_streak, count, axis=1)  # (R,) each
    row = np.arange(total, dtype=np.int32) + np.repeat(first - np.cumsum(count, dtype=np.int32) + count, count)
    down = row.astype(np.float32) - y
    q = down * inverse_half  # -1 top end .. 1 bottom end
    square = q * q
    along = peak * (1.0 - square * square) * (0.8 + 0.2 * np.sin(5.0 * q + phase))
    start = np.ceil(x - down * tan - 1.0 / step)  # first column inside the profile
    np.clip(start, 0, depth.shape[1] - columns, out=start)
    v = (start - x + down * tan) * step  # distance to the axis in radii
    v = v[:, None] + step[:, None] * np.arange(columns, dtype=np.float32)  # (R, K)
    v *= v
    np.subtract(1.0, v, out=v)
    np.maximum(v, 0.0, out=v)
    v *= v
    v *= along[:, None]
    index = (row * np.int64(depth.shape[1]) + start.astype(np.int64))[:, None] + np.arange(columns)
    np.add.at(depth.reshape(-1), index.reshape(-1), v.reshape(-1))


def smooth_noise(rng: np.random.Generator, h: int, w: int, cells: int = 5) -> np.ndarray:
    """Smooth random field (h, w) float32 in 0..1: a few random cells, enlarged bicubically."""
    grid = Image.fromarray(rng.random((cells, cells + 1), dtype=np.float32))
    return np.clip(np.asarray(grid.resize((w, h), Image.Resampling.BICUBIC)), 0.0, 1.0)


def enlarge(field: np.ndarray, width: int, height: int) -> Image.Image:
    """(h, w) or (h, w, 3) float in 0..255 -> uint8 picture of the full size."""
    small = Image.fromarray(np.clip(field, 0.0, 255.0).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


@functools.lru_cache(maxsize=1)
def _noise_tile() -> Image.Image:
    """1024 x 1024 RGB, Gaussian with mean 128 and deviation 32, made once per process from a fixed seed.

    Half of the variance is common to the channels, as demosaicked sensor noise is mostly luminance.
    """
    rng = np.random.default_rng(20240229)
    tile = rng.standard_normal((1024, 1024, 3), dtype=np.float32)
    tile += rng.standard_normal((1024, 1024, 1), dtype=np.float32)
    return Image.fromarray(np.clip(tile * (32.0 / 2.0**0.5) + 128.5, 0, 255).astype(np.uint8))


def add_noise(scene: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add the tile, shifted by a random offset and scaled to sigma grey levels; clipped to 0..255."""
    tile = _noise_tile()
    left, top = (int(v) for v in rng.integers(0, tile.width, 2))
    if sigma <= 0.0:
        return scene
    table = [round(128.0 + (v - 128) * sigma / 32.0) for v in range(256)] * 3
    noise = Image.new("RGB", scene.size)
    tile = tile.point(table)
    for y in range(-top, scene.height, tile.height):
        for x in range(-left, scene.width, tile.width):
            noise.paste(tile, (x, y))
    return ImageChops.add(scene, noise, 1.0, -128)
