"""The places of the pocket world: one function a place, each drawing a whole frame.

Frame coordinates run from 0 to 1, x to the right and y down. Textures are smooth or made of large crisp pieces, since a
small autoencoder must carry them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorabooth.pocket.raster import (
    F32,
    Plane,
    Rgb,
    blend,
    clip01,
    column,
    mix_rgb,
    sd_box,
    smooth_noise,
    smoothstep,
)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A place without its object.

    Attributes:
        rgb: (3, size, size) in [0, 1].
        shadow: darkness of the contact shadow in [0, 1].
        tint: factor on the object's colours.
        ambient: share of light without a lamp.
        rim: light at the object's edges.
        floats: True where the object's foot is under water.
    """

    rgb: Plane
    shadow: float = 0.5
    tint: Rgb = (1.0, 1.0, 1.0)
    ambient: float = 0.55
    rim: Rgb = (0.06, 0.06, 0.06)
    floats: bool = False


def _axes(size: int) -> tuple[Plane, Plane]:
    at = (np.arange(size, dtype=F32) + F32(0.5)) * F32(1 / size)
    return at[None, :], at[:, None]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _vertical(size: int, y: Plane, top: Rgb, bottom: Rgb, end: float) -> Plane:
    """Return a fresh frame graded from `top` at y = 0 to `bottom` at y = `end`."""
    t = clip01(y * (1.0 / end))
    rows = column(top) + t * (column(bottom) - column(top))
    return np.broadcast_to(rows, (3, size, size)).copy()


def _above(line: Plane, y: Plane, size: int) -> Plane:
    """Return the coverage of the region below `line` (a y for each column)."""
    return clip01((y - line) * size + 0.5)


def _wave(rng: np.random.Generator, x: Plane, base: float, height: float, cycles: float) -> Plane:
    """Return a smooth line over x: a sum of two sines with random phases."""
    a, b = _between(rng, 0, math.tau), _between(rng, 0, math.tau)
    return base + height * (
        np.sin(x * (cycles * math.tau) + a) + 0.4 * np.sin(x * (cycles * 2.3 * math.tau) + b)
    )


def _clouds(rng: np.random.Generator, image: Plane, x: Plane, y: Plane, horizon: float, rgb: Rgb) -> None:
    for _ in range(int(rng.integers(1, 4))):
        cx, cy, w = (
            _between(rng, 0.05, 0.95),
            _between(rng, 0.06, max(horizon - 0.14, 0.1)),
            _between(rng, 0.10, 0.19),
        )
        d = np.full(np.broadcast_shapes(x.shape, y.shape), 9.0, dtype=F32)
        for shift, grow in ((-0.6, 0.30), (0.0, 0.46), (0.62, 0.26)):
            d = np.minimum(d, np.sqrt((x - cx - shift * w) ** 2 + (y - cy) ** 2) - w * grow)
        mask = smoothstep(0.012, -0.012, np.maximum(d, y - cy - w * 0.16)) * 0.9
        blend(image, mask, column(rgb))


def beach(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw sky, turquoise sea, a foam line and sand."""
    x, y = _axes(size)
    horizon, shore = _between(rng, 0.26, 0.42), _between(rng, 0.10, 0.16)
    image = _vertical(size, y, (0.36, 0.66, 0.95), (0.80, 0.92, 0.99), horizon)
    _clouds(rng, image, x, y, horizon, (1.0, 1.0, 1.0))
    deep, shallow = (0.04, 0.36, 0.64), (0.20, 0.72, 0.76)
    t = clip01((y - horizon) * (1.0 / shore))
    sea = column(deep) + t * (column(shallow) - column(deep))
    glint = np.sin(y * 240.0 + 3.0 * np.sin(x * 9.0 + _between(rng, 0, 6)))
    blend(image, _above(np.full_like(x, horizon), y, size), sea + 0.05 * np.maximum(glint, 0))
    line = _wave(rng, x, horizon + shore, 0.012, 1.3)
    sand = mix_rgb((0.93, 0.83, 0.60), (0.96, 0.87, 0.70), _between(rng, 0, 1))
    noise = smooth_noise(rng, size, 7, 9)
    ripples = np.sin((y - line) * (110.0 - 60.0 * y) + noise * 1.5) * 0.022
    wet = 1.0 - 0.22 * smoothstep(0.10, 0.0, y - line)
    blend(image, _above(line, y, size), column(sand) * wet + ripples + noise * 0.02)
    blend(image, clip01((0.013 - np.abs(y - line + 0.004 * noise)) * size + 0.5), column((0.98, 0.99, 1.0)))
    return Backdrop(image, shadow=0.42)


def snow(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a pale sky, white hills, dark firs far off, large flakes."""
    x, y = _axes(size)
    horizon = _between(rng, 0.36, 0.5)
    warm = _between(rng, 0, 1)
    image = _vertical(
        size, y, mix_rgb((0.56, 0.68, 0.84), (0.66, 0.68, 0.82), warm), (0.86, 0.90, 0.96), horizon
    )
    hill = _wave(rng, x, horizon, 0.025, 0.7)
    for _ in range(int(rng.integers(3, 7))):
        cx, tall = _between(rng, 0, 1), _between(rng, 0.10, 0.22)
        base = horizon + 0.03
        step = (y - base + tall) * (3.0 / tall)
        width = (0.25 * step + 0.55 * (step - np.floor(step))) * tall * 0.30
        mask = clip01((width - np.abs(x - cx)) * size + 0.5) * (y > base - tall) * (y < base)
        blend(image, mask, column((0.30, 0.45, 0.48)))
    noise = smooth_noise(rng, size, 4, 6)
    white = column((0.95, 0.97, 1.0)) - column((0.14, 0.09, 0.03)) * (0.45 + 0.55 * noise)
    blend(image, _above(hill, y, size), white)
    near = _wave(rng, x, horizon + 0.22, 0.03, 0.5)
    blend(image, smoothstep(-0.05, 0.03, y - near) * 0.6, column((0.97, 0.98, 1.0)))
    for _ in range(16):
        cx, cy, r = _between(rng, 0, 1), _between(rng, 0, 0.9), _between(rng, 0.008, 0.016)
        _dot(image, cx, cy, r, (1.0, 1.0, 1.0), 0.95)
    return Backdrop(image, shadow=0.34, ambient=0.64)


def _dot(image: Plane, cx: float, cy: float, radius: float, rgb: Rgb, strength: float) -> None:
    """Blend a small disc into the frame, touching only its own pixels."""
    size = image.shape[1]
    x0, x1 = max(int((cx - radius) * size) - 1, 0), max(int((cx + radius) * size) + 2, 0)
    y0, y1 = max(int((cy - radius) * size) - 1, 0), max(int((cy + radius) * size) + 2, 0)
    patch = image[:, y0:y1, x0:x1]
    dx = (np.arange(patch.shape[2], dtype=F32) + F32(x0 + 0.5 - cx * size))[None, :]
    dy = (np.arange(patch.shape[1], dtype=F32) + F32(y0 + 0.5 - cy * size))[:, None]
    blend(patch, clip01(radius * size + 0.5 - np.sqrt(dx * dx + dy * dy)) * strength, column(rgb))


def grass(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a blue sky, hills, a meadow with blades and flowers."""
    x, y = _axes(size)
    horizon = _between(rng, 0.36, 0.52)
    image = _vertical(size, y, (0.30, 0.60, 0.96), (0.74, 0.89, 0.99), horizon)
    _clouds(rng, image, x, y, horizon, (1.0, 1.0, 1.0))
    blend(image, _above(_wave(rng, x, horizon - 0.05, 0.035, 0.8), y, size), column((0.36, 0.62, 0.40)))
    lush = _between(rng, 0, 1)
    far, near = (
        mix_rgb((0.50, 0.76, 0.26), (0.40, 0.70, 0.26), lush),
        mix_rgb((0.22, 0.52, 0.12), (0.16, 0.48, 0.18), lush),
    )
    t = clip01((y - horizon) * (1.0 / (1.0 - horizon)))
    meadow = column(far) + t * (column(near) - column(far))
    noise = smooth_noise(rng, size, 5, 6)
    shift = _between(rng, 0, 6)
    blades = np.abs(np.sin(x * (75.0 - 30.0 * y) + 2.5 * noise + shift))
    rows = (y + 0.02 * blades) * 16.0
    tuft = rows - np.floor(rows)
    image_mask = _above(_wave(rng, x, horizon, 0.012, 0.9), y, size)
    blend(image, image_mask, meadow * (0.90 + 0.20 * tuft * t + 0.10 * noise))
    petals: tuple[Rgb, ...] = ((1.0, 1.0, 1.0), (1.0, 0.86, 0.25), (0.98, 0.55, 0.72))
    for _ in range(int(rng.integers(6, 13))):
        depth = _between(rng, 0.1, 1)
        cx, cy = _between(rng, 0, 1), horizon + (1.0 - horizon) * depth
        r = 0.008 + 0.012 * depth
        _dot(image, cx, cy, r * 1.3, petals[int(rng.integers(3))], 1.0)
        _dot(image, cx, cy, r * 0.5, (0.98, 0.72, 0.15), 1.0)
    return Backdrop(image, shadow=0.5)


def wooden_floor(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a plain wall with a skirting board and planks that run to a vanishing point."""
    x, y = _axes(size)
    horizon = _between(rng, 0.34, 0.5)
    walls: tuple[Rgb, ...] = ((0.90, 0.86, 0.78), (0.80, 0.86, 0.84), (0.88, 0.82, 0.84), (0.84, 0.86, 0.90))
    wall = walls[int(rng.integers(len(walls)))]
    image = _vertical(size, y, mix_rgb(wall, (0.6, 0.56, 0.5), 0.25), wall, horizon)
    lamp = np.exp(-((x - _between(rng, 0, 1)) ** 2) * 6.0 - (y - 0.1) ** 2 * 8.0)
    image += lamp * 0.07
    blend(image, clip01((0.035 - np.abs(y - horizon + 0.035)) * size), column((0.97, 0.96, 0.93)))
    wood = mix_rgb((0.66, 0.42, 0.22), (0.78, 0.56, 0.34), _between(rng, 0, 1))
    depth = np.maximum(y - horizon, 0) + 0.28
    across = (x - 0.5 + _between(rng, -0.1, 0.1)) / depth * 2.7 + _between(rng, 0, 1)
    plank = np.floor(across)
    inside = across - plank - 0.5
    tone = np.sin(plank * 12.9 + _between(rng, 0, 6))
    along = 0.55 / depth + 0.37 * tone
    part = along - np.floor(along) - 0.5
    gap = np.maximum(np.abs(inside) - 0.5 + 0.016 / depth, (np.abs(part) - 0.5) * depth * 0.9 + 0.013)
    grain = np.sin(inside * 14.0 + 4.0 * np.sin(along * 5.0 + plank)) * 0.022
    floor = column(wood) * (0.94 + 0.10 * tone + grain + 0.12 * (y - horizon))
    floor = floor * (1.0 - 0.45 * smoothstep(-0.02, 0.02, gap))
    blend(image, _above(np.full_like(x, horizon), y, size), floor)
    return Backdrop(image, shadow=0.48)


def brick_wall(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a wall of bricks in running bond over a pavement."""
    x, y = _axes(size)
    base = _between(rng, 0.74, 0.84)
    brick = mix_rgb((0.72, 0.30, 0.20), (0.60, 0.27, 0.22), _between(rng, 0, 1))
    mortar = (0.84, 0.79, 0.72)
    rows = _between(rng, 8.5, 10.5)
    b = y * rows + _between(rng, 0, 1)
    row = np.floor(b)
    a = x * (rows * 0.46) + 0.5 * (row - 2.0 * np.floor(row * 0.5)) + _between(rng, 0, 1)
    cell = np.floor(a)
    tone = np.sin(cell * 7.3 + row * 3.7 + np.sin(row * 5.1 + cell) * 3.0)
    d = sd_box((a - cell - 0.5) * (1 / 0.46), b - row - 0.5, 0.5 / 0.46 - 0.07, 0.42, 0.12)
    light = 1.0 - 0.16 * (b - row - 0.5)
    bricks = column(brick) * (light * (0.96 + 0.14 * tone)) + column((0.03, 0.02, 0.0)) * tone
    image = np.broadcast_to(column(mortar), (3, size, size)).copy()
    blend(image, clip01(0.5 - d * (size / rows)), bricks)
    image *= 0.94 + 0.10 * smooth_noise(rng, size, 3, 3)
    t = clip01((y - base) * 5.0)
    blend(image, _above(np.full_like(x, base), y, size), column((0.46, 0.45, 0.46)) + 0.16 * t)
    blend(image, clip01((0.010 - np.abs(y - base)) * size + 0.5) * 0.6, column((0.25, 0.22, 0.22)))
    return Backdrop(image, shadow=0.5)


def night(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a dark blue sky with moon and stars over a town with lit windows."""
    x, y = _axes(size)
    horizon = _between(rng, 0.46, 0.58)
    hue = _between(rng, 0, 1)
    image = _vertical(
        size, y, (0.03, 0.04, 0.15), mix_rgb((0.13, 0.17, 0.42), (0.24, 0.15, 0.42), hue), horizon
    )
    for _ in range(18):
        _dot(
            image,
            _between(rng, 0, 1),
            _between(rng, 0, horizon - 0.1),
            _between(rng, 0.006, 0.012),
            (1.0, 0.98, 0.85),
            0.95,
        )
    mx, my, mr = _between(rng, 0.1, 0.9), _between(rng, 0.10, 0.22), _between(rng, 0.065, 0.09)
    image += column((0.30, 0.29, 0.22)) * np.exp(-((x - mx) ** 2 + (y - my) ** 2) * 45.0)
    _dot(image, mx, my, mr, (0.99, 0.96, 0.80), 1.0)
    _dot(image, mx - mr * 0.3, my - mr * 0.2, mr * 0.24, (0.88, 0.84, 0.68), 1.0)
    _dot(image, mx + mr * 0.35, my + mr * 0.3, mr * 0.18, (0.90, 0.86, 0.70), 1.0)
    at = 0.0
    while at < 1.0:
        wide, tall = _between(rng, 0.10, 0.18), _between(rng, 0.05, 0.17)
        left, right = int(at * size), int(min(at + wide, 1.0) * size)
        image[:, int((horizon - tall) * size) : int((horizon + 0.02) * size), left:right] = column(
            (0.06, 0.07, 0.17)
        )
        for step in range(2):
            if rng.random() < 0.7:
                wx, wy = int((at + wide * (0.22 + 0.4 * step)) * size), int((horizon - tall + 0.03) * size)
                side = max(int(size * 0.025), 1)
                image[:, wy : wy + side, wx : wx + side] = column((1.0, 0.80, 0.35))
        at += wide
    noise = smooth_noise(rng, size, 4, 5)
    ground = column((0.11, 0.14, 0.27)) + column((0.05, 0.06, 0.08)) * noise
    ground = ground + column((0.16, 0.17, 0.22)) * np.exp(-((x - mx) ** 2) * 7.0) * clip01(
        (y - horizon) * 2.0
    )
    blend(image, _above(_wave(rng, x, horizon, 0.006, 0.8), y, size), ground)
    return Backdrop(image, shadow=0.6, tint=(0.74, 0.77, 0.92), ambient=0.50, rim=(0.34, 0.40, 0.58))


def desert(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw an evening sky with a low sun, ridged orange dunes, a cactus."""
    x, y = _axes(size)
    horizon = _between(rng, 0.42, 0.54)
    image = _vertical(
        size,
        y,
        mix_rgb((0.98, 0.66, 0.36), (0.95, 0.55, 0.42), _between(rng, 0, 1)),
        (1.0, 0.90, 0.62),
        horizon,
    )
    sx, sy = _between(rng, 0.12, 0.88), _between(rng, 0.12, horizon - 0.12)
    image += column((0.12, 0.14, 0.10)) * np.exp(-((x - sx) ** 2 + (y - sy) ** 2) * 25.0)
    _dot(image, sx, sy, _between(rng, 0.06, 0.085), (1.0, 0.98, 0.84), 1.0)
    noise = smooth_noise(rng, size, 4, 6)
    if rng.random() < 0.75:
        cx, k = (
            (_between(rng, 0.06, 0.22) if rng.random() < 0.5 else _between(rng, 0.78, 0.94)),
            _between(rng, 0.8, 1.2),
        )
        d = sd_box(x - cx, y - horizon + 0.04, 0.026 * k, 0.16 * k, 0.026 * k)
        for side in (-1.0, 1.0):
            top = horizon - (0.06 + 0.03 * side) * k
            d = np.minimum(d, sd_box(x - cx - side * 0.045 * k, y - top, 0.055 * k, 0.018 * k, 0.018 * k))
            d = np.minimum(
                d, sd_box(x - cx - side * 0.085 * k, y - top + 0.035 * k, 0.018 * k, 0.05 * k, 0.018 * k)
            )
        blend(image, clip01(0.5 - d * size), column((0.24, 0.44, 0.24)))
    for index, (tone, lift) in enumerate(
        (((0.86, 0.54, 0.28), 0.0), ((0.93, 0.62, 0.30), 0.13), ((0.96, 0.69, 0.36), 0.30))
    ):
        line = _wave(rng, x, horizon + lift, 0.035, 0.45 + 0.15 * index)
        shade = 1.0 - 0.20 * clip01((y - line) * 5.0) + 0.03 * noise
        ripple = 0.02 * np.sin((y - line) * 95.0 + 2.0 * noise) * (index / 2)
        blend(image, _above(line, y, size), column(tone) * (shade + ripple))
    return Backdrop(image, shadow=0.45, tint=(1.03, 0.97, 0.90))


def water(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw open water seen from above: bands of waves that widen towards the viewer, with glints."""
    x, y = _axes(size)
    teal = _between(rng, 0, 1)
    image = _vertical(
        size,
        y,
        mix_rgb((0.10, 0.40, 0.78), (0.08, 0.48, 0.72), teal),
        mix_rgb((0.03, 0.22, 0.58), (0.03, 0.32, 0.56), teal),
        1.0,
    )
    depth = 0.35 + y
    noise = smooth_noise(rng, size, 5, 7)
    phase = _between(rng, 0, 6)
    swell = np.sin(x * (20.0 / depth) + 1.6 * noise + phase) * 0.9
    ridge = np.sin(26.0 * np.log(depth) * 2.0 + swell + 1.2 * noise)
    image += column((0.05, 0.11, 0.12)) * ridge
    crest = smoothstep(0.74, 0.98, ridge) * smoothstep(-0.15, 0.35, noise + 0.5 * np.sin(x * 11.0 + phase))
    blend(image, crest * 0.8, column((0.75, 0.92, 1.0)))
    return Backdrop(image, shadow=0.35, floats=True)


def pink_fabric(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw pink cloth with soft diagonal folds."""
    x, y = _axes(size)
    pink = mix_rgb((0.98, 0.66, 0.80), (0.95, 0.58, 0.72), _between(rng, 0, 1))
    angle = _between(rng, 0.35, 1.1) * (1.0 if rng.random() < 0.5 else -1.0)
    noise = smooth_noise(rng, size, 3, 3)
    across = x * math.cos(angle) + y * math.sin(angle) + 0.10 * noise
    folds = np.sin(across * _between(rng, 20.0, 28.0) + _between(rng, 0, 6))
    wide = np.sin(across * 9.0 + _between(rng, 0, 6))
    sheen = 0.5 + 0.5 * folds
    shade = 0.93 + 0.09 * folds + 0.05 * wide
    image = column(pink) * shade + column((0.07, 0.09, 0.08)) * (sheen**4)
    image = image - column((0.02, 0.08, 0.05)) * (1.0 - sheen) ** 3
    return Backdrop(np.broadcast_to(image, (3, size, size)).astype(F32), shadow=0.40, ambient=0.6)


def cobblestones(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw rows of rounded grey stones that grow towards the viewer."""
    x, y = _axes(size)
    depth = 0.55 + y * 0.75
    b = 17.0 * np.log(depth) + _between(rng, 0, 1) + 0.10 * np.sin(x * 7.0 + _between(rng, 0, 6))
    row = np.floor(b)
    a = (
        (x - 0.5) * (5.2 / depth)
        + 0.5 * (row - 2.0 * np.floor(row * 0.5))
        + 0.18 * np.sin(row * 4.1)
        + _between(rng, 0, 1)
    )
    cell = np.floor(a)
    fu, fv = a - cell - 0.5, b - row - 0.5
    tone = np.sin(cell * 5.7 + row * 9.1 + 2.0 * np.sin(row * 3.3 + cell * 1.7) + _between(rng, 0, 6))
    d = sd_box(fu * 1.25, fv, 0.56, 0.44, 0.30)
    stone = mix_rgb((0.54, 0.54, 0.57), (0.58, 0.54, 0.51), _between(rng, 0, 1))
    dome = clip01(-d * 3.2)
    shade = 0.72 + 0.36 * dome - 0.22 * fv + 0.11 * tone
    image = np.broadcast_to(column((0.22, 0.21, 0.21)), (3, size, size)).copy()
    blend(image, clip01(0.5 - d * (size * 0.065)), column(stone) * shade + column((0.02, 0.0, -0.02)) * tone)
    image *= 0.92 + 0.12 * y
    return Backdrop(image, shadow=0.55)


BACKDROPS: dict[str, Callable[[np.random.Generator, int], Backdrop]] = {
    "beach": beach,
    "snow": snow,
    "grass": grass,
    "wooden floor": wooden_floor,
    "brick wall": brick_wall,
    "night": night,
    "desert": desert,
    "water": water,
    "pink fabric": pink_fabric,
    "cobblestones": cobblestones,
}
