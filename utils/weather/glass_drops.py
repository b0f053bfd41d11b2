"""Where water sits on a pane of glass: drops, clusters, running trails, wiper arcs, as one metaball field.

utils/weather/windshield.py turns the field into a picture. Everything here is geometry in pixels of the picture:
`place_drops` draws positions and shapes, `water_field` rasterises them.

A drop's kernel is (1 - q)^2, where q grows from 0 at its centre to 1 at its support's end (metaballs: Blinn,
"A Generalization of Algebraic Surface Drawing", 1982). Water stands where the sum exceeds EDGE^2; its surface,
sqrt(sum) - EDGE, is a paraboloid for a lone drop, that is a spherical cap near its centre, and neighbours grow
necks and merge.
"""

from dataclasses import dataclass

import numpy as np

EDGE = 0.45  # sqrt of the field at the waterline
SUPPORT = (1.0 - EDGE) ** -0.5  # kernel radius per drop radius: a lone drop's waterline is its radius
_SIZES = (0.006, 0.012, 0.024)  # radii that part the size classes, fractions of the short side
_BLOCK = 65536  # kernel samples computed at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Wiper:
    """An arc that a blade has cleared. Lengths are fractions of the height, angles degrees from straight up."""

    x: float  # pivot, fraction of the width
    y: float  # pivot, fraction of the height; 1 is the lower edge
    inner: float  # the blade's ends, distances from the pivot
    outer: float
    first: float  # the sweep, clockwise
    last: float


@dataclass(frozen=True)
class DropLayout:
    """How much water, how large, and where. Counts are for a 4:3 frame, lengths fractions of the short side."""

    drops: int  # standing drops
    size: float  # their median radius
    largest: float  # no radius is larger
    spread: float  # standard deviation of log(radius)
    specks: int  # fine spray between them
    trails: int  # drops that run and leave beads
    clustering: float  # 0..1, how uneven drops are spread, and the share that sits beside a larger one
    flow: float  # direction in which drops run, degrees from straight down; wind and speed turn it
    wipers: tuple[Wiper, ...]
    residue: float  # 0..1, share of drops that is back in the wiped arcs


def place_drops(p: DropLayout, width: int, height: int, density: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw all drops of one picture.

    density: (h, w) float in 0..1 over the picture, where drops like to be.
    Returns (6, n) float32 rows x, y, radius in pixels, stretch along the flow (1 round), the flow's angle in
    radians from straight down, taper (0 symmetric, positive: the downstream end is wider).
    """
    short = min(width, height)
    frames = 0.75 * min(max(width, height) / short, 8.0)  # picture area in 4:3 frames
    standing = _standing(p, width, height, density, round(p.drops * frames), rng)
    specks = _scatter(width, height, round(p.specks * frames), rng)
    specks[2] = short * rng.uniform(0.0016, 0.0045, specks.shape[1])
    swept = _in_wipers(p.wipers, standing[0], standing[1], width, height)
    fresh = rng.random(swept.size) < p.residue
    standing[2, swept] *= 0.6  # what fell since the last sweep has not grown yet
    standing = standing[:, ~swept | fresh]
    swept = _in_wipers(p.wipers, specks[0], specks[1], width, height)
    specks = specks[:, ~swept | (rng.random(swept.size) < 0.3 + 0.7 * p.residue)]

    groups = [_edge_beads(wiper, width, height, rng) for wiper in p.wipers]
    still = np.concatenate([standing, specks], axis=1)
    for _ in range(rng.poisson(p.trails * frames)):
        trail = _trail(p, width, height, rng)
        still = still[:, ~_near_path(still, trail)]  # a running drop takes the others with it
        groups.append(trail)
    drops = np.concatenate([still, *groups, _lobes(still, rng)], axis=1)
    visible = drops[2] > 0.7  # pixels; finer spray belongs to the film
    return drops[:, visible].astype(np.float32)


def _scatter(width, height, n, rng):
    """-> (6, n) round drops at random places; the radius is left to the caller."""
    drops = np.zeros((6, n))
    drops[0], drops[1] = rng.uniform(-0.03, 1.03, (2, n)) * [[width], [height]]
    drops[3] = 1.0
    return drops


def _standing(p, width, height, density, n, rng):
    """-> (6, m) drops that cling where they fell, denser where density is high, some beside larger ones."""
    drops = _scatter(width, height, 2 * n, rng)
    h, w = density.shape
    rows = np.clip(drops[1] / height * h, 0, h - 1).astype(np.intp)
    columns = np.clip(drops[0] / width * w, 0, w - 1).astype(np.intp)
    like = 0.5 * (1.0 - p.clustering) + p.clustering * density[rows, columns] ** 2
    drops = drops[:, rng.random(2 * n) < like]
    m = drops.shape[1]
    short = min(width, height)
    median = max(p.size * short, 1.8)  # pixels: in small pictures drops that can still be seen
    drops[2] = np.minimum(median * np.exp(p.spread * rng.standard_normal(m)), p.largest * short)
    drops[3] = 1.0 + 0.25 * rng.random(m) ** 2 + np.minimum(8.0 * drops[2] / short, 0.4) * rng.random(m)
    drops[4] = np.radians(p.flow) + 0.5 * rng.standard_normal(m)
    drops[5] = 0.3 * rng.random(m)
    guests = np.flatnonzero(rng.random(m) < 0.4 * p.clustering)
    if guests.size:
        hosts = rng.integers(0, m, guests.size)
        drops[2, guests] *= 0.5
        away = (drops[2, hosts] + drops[2, guests]) * rng.uniform(0.95, 2.5, guests.size)
        around = rng.uniform(0.0, 2.0 * np.pi, guests.size)
        drops[0, guests] = drops[0, hosts] + away * np.cos(around)
        drops[1, guests] = drops[1, hosts] + away * np.sin(around)
    return drops


def _lobes(drops, rng):
    """-> (6, m) a bulge at the side of most larger drops: a waterline on real glass is no circle."""
    bulges = drops[:, (drops[2] > 2.0) & (rng.random(drops.shape[1]) < 0.7)]
    n = bulges.shape[1]
    around = rng.uniform(0.0, 2.0 * np.pi, n)
    share = rng.uniform(0.5, 0.8, n)
    away = bulges[2] * (1.15 - share) * rng.uniform(0.8, 1.4, n)  # wide and near: further off it would be its own drop
    bulges[0] += away * np.cos(around)
    bulges[1] += away * np.sin(around)
    bulges[2] *= share
    bulges[3:] = [[1.0], [0.0], [0.0]]
    return bulges


def _trail(p, width, height, rng):
    """-> (6, n) one running drop, the thread of water behind it, and the beads into which the thread breaks."""
    short = min(width, height)
    head = short * min(p.size * rng.uniform(1.0, 2.0), 0.6 * p.largest)
    length = rng.uniform(0.3, 1.2) * height
    steps = int(np.clip(length / (0.22 * head), 4, 1500))
    along = np.linspace(0.0, 1.0, steps)  # 0 head .. 1 oldest
    back = along * length
    # Drops run straight, then dodge: slow waves plus a random walk with rare steps, smoothed.
    walk = np.cumsum(rng.standard_normal(steps) * (rng.random(steps) < 0.06))
    walk = np.convolve(np.pad(walk, 4, mode="edge"), np.full(9, 1.0 / 9.0), mode="valid")
    side = head * (0.8 * walk + rng.uniform(0.2, 1.2) * np.sin(back / head * rng.uniform(0.04, 0.16)))
    side -= side[0]
    flow = np.radians(p.flow + rng.normal(0.0, 4.0))
    trail = np.zeros((6, steps))
    x0, y0 = rng.uniform(0.0, width), rng.uniform(0.2, 1.15) * height
    trail[0] = x0 - back * np.sin(flow) + side * np.cos(flow)
    trail[1] = y0 - back * np.cos(flow) - side * np.sin(flow)
    broken = 0.01 + 0.5 * rng.random() ** 3  # share of the trail that is still one thread
    thread = along < broken
    trail[2] = head * np.where(thread, rng.uniform(0.2, 0.3) * (1.0 - 0.4 * along / broken),
                               (0.15 + 0.5 * rng.random(steps) ** 2) * (1.0 - 0.4 * along))
    trail[3] = np.where(thread, 1.3, rng.uniform(1.0, 1.6, steps))
    trail[4] = flow
    trail[2, 0], trail[3, 0], trail[5, 0] = head, rng.uniform(1.15, 1.5), 0.35
    kept = thread | (rng.random(steps) < rng.uniform(0.08, 0.3))
    kept[0] = True
    return trail[:, kept]


def _near_path(drops, trail):
    """-> (n,) bool: drops (6, n) that the head of trail (6, m) ran over."""
    head = trail[2, 0]
    near = np.zeros(drops.shape[1], dtype=bool)
    order = np.argsort(trail[1])
    path_y, path_x = trail[1, order], trail[0, order]
    inside = (drops[1] > path_y[0]) & (drops[1] < path_y[-1])
    near[inside] = abs(np.interp(drops[1, inside], path_y, path_x) - drops[0, inside]) < head
    return near & (drops[2] < head)


def polar(wiper: Wiper, x: np.ndarray, y: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels x, y -> (distance from the pivot in heights, degrees from straight up, clockwise)."""
    dx, dy = x - wiper.x * width, y - wiper.y * height
    return np.hypot(dx, dy) / height, np.degrees(np.arctan2(dx, -dy))


def swept_by(wiper: Wiper, distance: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """-> bool, whether polar coordinates lie in the wiped arc."""
    return (distance > wiper.inner) & (distance < wiper.outer) & (angle > wiper.first) & (angle < wiper.last)


def _in_wipers(wipers, x, y, width, height):
    swept = np.zeros(x.shape, dtype=bool)
    for wiper in wipers:
        swept |= swept_by(wiper, *polar(wiper, x, y, width, height))
    return swept


def _edge_beads(wiper, width, height, rng):
    """-> (6, n) the water that a blade leaves at the outer end of its arc, and a little along its last position."""
    n = int(rng.integers(30, 110))
    beads = _scatter(width, height, n, rng)
    at_blade = rng.random(n) < 0.3
    distance = np.where(at_blade, rng.uniform(wiper.inner, wiper.outer, n), rng.normal(wiper.outer, 0.006, n))
    angle = np.radians(np.where(at_blade, wiper.last + rng.normal(0.0, 0.5, n),
                                rng.uniform(wiper.first, wiper.last, n)))
    beads[0] = wiper.x * width + distance * height * np.sin(angle)
    beads[1] = wiper.y * height - distance * height * np.cos(angle)
    beads[2] = min(width, height) * rng.uniform(0.003, 0.009, n)
    beads[3] = rng.uniform(1.0, 1.7, n)
    beads[4] = np.where(at_blade, -angle, np.pi / 2.0 - angle)
    return beads


def water_field(drops: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Rasterise drops (6, n) as place_drops returns them -> (field, radius), both (H, W) float32.

    field: the sum of all kernels; water stands where it exceeds EDGE**2.
    radius: the local mean of the kernels' radii in pixels, weighted by the kernels; 0 where there is none.
    """
    field = np.zeros((height, width), dtype=np.float32)
    weighted = np.zeros((height, width), dtype=np.float32)
    x, y, radius, stretch, angle, taper = drops
    support = radius * np.float32(SUPPORT)
    shape = np.stack([x, y, 1.0 / (support * stretch), 1.0 / support, np.sin(angle), np.cos(angle), taper, support])
    # From large to small; a drop that would lie inside a larger one is part of it.
    size = np.digitize(radius, np.array(_SIZES) * min(width, height))
    for members in (size == step for step in range(len(_SIZES), -1, -1)):
        column = np.clip(x[members], 0, width - 1).astype(np.intp)
        row = np.clip(y[members], 0, height - 1).astype(np.intp)
        _splat_all(field, weighted, shape[:, members][:, field[row, column] < EDGE**2])
    return field, np.divide(weighted, field, out=weighted, where=field > 0.0)


def _splat_all(field, weighted, shape):
    """Add the kernels of shape (8, n), see water_field, to field and, times their support, to weighted, in place."""
    height, width = field.shape
    # Windows of K x K pixels: drops of similar size share one K. A tapered drop is wider than its radius.
    per_length, taper, support = shape[2], shape[6], shape[7]
    reach = np.maximum(1.0 / per_length, support / (1.0 - 0.5 * taper))
    window = np.ceil(2.0 * reach).astype(np.int64) + 1
    window = np.where(window > 12, -(-window // 6) * 6, window)
    for size in np.unique(window):
        members = np.flatnonzero(window == size)
        for piece in np.array_split(members, -(-members.size * size * size // _BLOCK)):
            _splat(field, weighted, shape[:, piece, None, None], min(int(size), width), min(int(size), height))


def _splat(field, weighted, shape, columns, rows):
    """One block of _splat_all: shape (8, n, 1, 1), computed in windows of rows x columns pixels."""
    x, y, per_length, per_width, sin, cos, taper, support = shape
    height, width = field.shape
    left = np.clip(np.ceil(x - 0.5 * columns), 0, width - columns).astype(np.int64)
    top = np.clip(np.ceil(y - 0.5 * rows), 0, height - rows).astype(np.int64)
    column, row = np.arange(columns), np.arange(rows)[:, None]
    dx, dy = (left + column - x).astype(np.float32), (top + row - y).astype(np.float32)  # (n, 1, K), (n, K, 1)
    u = (dx * sin + dy * cos) * per_length  # (n, K, K) downstream
    v = (dx * cos - dy * sin) * per_width
    v *= 1.0 - taper * np.clip(u, -1.0, 1.0) * 0.5
    u *= u
    v *= v
    u += v
    np.subtract(1.0, u, out=u)
    np.maximum(u, 0.0, out=u)
    u *= u
    index = ((top + row) * width + left + column).reshape(-1)
    np.add.at(field.reshape(-1), index, u.reshape(-1))
    u *= support
    np.add.at(weighted.reshape(-1), index, u.reshape(-1))
