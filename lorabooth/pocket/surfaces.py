"""The places that are mostly one surface: wooden floor, brick wall, water, fabric, cobblestones."""

import math

import numpy as np

from lorabooth.pocket.raster import (
    F32,
    Rgb,
    blend,
    clip01,
    column,
    mix_rgb,
    sd_box,
    smooth_noise,
    smoothstep,
)
from lorabooth.pocket.settings import (
    Backdrop,
    axes,
    below_line,
    between,
    vertical_grade,
)


def wooden_floor(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a plain wall with a skirting board and planks that run to a vanishing point."""
    x, y = axes(size)
    horizon = between(rng, 0.34, 0.5)
    walls: tuple[Rgb, ...] = ((0.90, 0.86, 0.78), (0.80, 0.86, 0.84), (0.88, 0.82, 0.84), (0.84, 0.86, 0.90))
    wall = walls[int(rng.integers(len(walls)))]
    image = vertical_grade(size, y, mix_rgb(wall, (0.6, 0.56, 0.5), 0.25), wall, horizon)
    lamp = np.exp(-((x - between(rng, 0, 1)) ** 2) * 6.0 - (y - 0.1) ** 2 * 8.0)
    image += lamp * 0.07
    blend(image, clip01((0.035 - np.abs(y - horizon + 0.035)) * size), column((0.97, 0.96, 0.93)))
    wood = mix_rgb((0.66, 0.42, 0.22), (0.78, 0.56, 0.34), between(rng, 0, 1))
    depth = np.maximum(y - horizon, 0) + 0.28
    across = (x - 0.5 + between(rng, -0.1, 0.1)) / depth * 2.7 + between(rng, 0, 1)
    plank = np.floor(across)
    inside = across - plank - 0.5
    tone = np.sin(plank * 12.9 + between(rng, 0, 6))
    along = 0.55 / depth + 0.37 * tone
    part = along - np.floor(along) - 0.5
    gap = np.maximum(np.abs(inside) - 0.5 + 0.016 / depth, (np.abs(part) - 0.5) * depth * 0.9 + 0.013)
    grain = np.sin(inside * 14.0 + 4.0 * np.sin(along * 5.0 + plank)) * 0.022
    floor = column(wood) * (0.94 + 0.10 * tone + grain + 0.12 * (y - horizon))
    floor = floor * (1.0 - 0.45 * smoothstep(-0.02, 0.02, gap))
    blend(image, below_line(np.full_like(x, horizon), y, size), floor)
    return Backdrop(image, shadow=0.48)


def brick_wall(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a wall of bricks in running bond over a pavement."""
    x, y = axes(size)
    base = between(rng, 0.74, 0.84)
    brick = mix_rgb((0.72, 0.30, 0.20), (0.60, 0.27, 0.22), between(rng, 0, 1))
    mortar = (0.84, 0.79, 0.72)
    rows = between(rng, 8.5, 10.5)
    b = y * rows + between(rng, 0, 1)
    row = np.floor(b)
    a = x * (rows * 0.46) + 0.5 * (row - 2.0 * np.floor(row * 0.5)) + between(rng, 0, 1)
    cell = np.floor(a)
    tone = np.sin(cell * 7.3 + row * 3.7 + np.sin(row * 5.1 + cell) * 3.0)
    d = sd_box((a - cell - 0.5) * (1 / 0.46), b - row - 0.5, 0.5 / 0.46 - 0.07, 0.42, 0.12)
    light = 1.0 - 0.16 * (b - row - 0.5)
    bricks = column(brick) * (light * (0.96 + 0.14 * tone)) + column((0.03, 0.02, 0.0)) * tone
    image = np.broadcast_to(column(mortar), (3, size, size)).copy()
    blend(image, clip01(0.5 - d * (size / rows)), bricks)
    image *= 0.94 + 0.10 * smooth_noise(rng, size, 3, 3)
    t = clip01((y - base) * 5.0)
    blend(image, below_line(np.full_like(x, base), y, size), column((0.46, 0.45, 0.46)) + 0.16 * t)
    blend(image, clip01((0.010 - np.abs(y - base)) * size + 0.5) * 0.6, column((0.25, 0.22, 0.22)))
    return Backdrop(image, shadow=0.5)


def water(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw open water seen from above: bands of waves that widen towards the viewer, with glints."""
    x, y = axes(size)
    teal = between(rng, 0, 1)
    image = vertical_grade(
        size,
        y,
        mix_rgb((0.10, 0.40, 0.78), (0.08, 0.48, 0.72), teal),
        mix_rgb((0.03, 0.22, 0.58), (0.03, 0.32, 0.56), teal),
        1.0,
    )
    depth = 0.35 + y
    noise = smooth_noise(rng, size, 5, 7)
    phase = between(rng, 0, 6)
    swell = np.sin(x * (20.0 / depth) + 1.6 * noise + phase) * 0.9
    ridge = np.sin(26.0 * np.log(depth) * 2.0 + swell + 1.2 * noise)
    image += column((0.05, 0.11, 0.12)) * ridge
    crest = smoothstep(0.74, 0.98, ridge) * smoothstep(-0.15, 0.35, noise + 0.5 * np.sin(x * 11.0 + phase))
    blend(image, crest * 0.8, column((0.75, 0.92, 1.0)))
    return Backdrop(image, shadow=0.35, floats=True)


def pink_fabric(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw pink cloth with soft diagonal folds."""
    x, y = axes(size)
    pink = mix_rgb((0.98, 0.66, 0.80), (0.95, 0.58, 0.72), between(rng, 0, 1))
    angle = between(rng, 0.35, 1.1) * (1.0 if rng.random() < 0.5 else -1.0)
    noise = smooth_noise(rng, size, 3, 3)
    across = x * math.cos(angle) + y * math.sin(angle) + 0.10 * noise
    folds = np.sin(across * between(rng, 20.0, 28.0) + between(rng, 0, 6))
    wide = np.sin(across * 9.0 + between(rng, 0, 6))
    sheen = 0.5 + 0.5 * folds
    shade = 0.93 + 0.09 * folds + 0.05 * wide
    image = column(pink) * shade + column((0.07, 0.09, 0.08)) * (sheen**4)
    image = image - column((0.02, 0.08, 0.05)) * (1.0 - sheen) ** 3
    return Backdrop(np.broadcast_to(image, (3, size, size)).astype(F32), shadow=0.40, ambient=0.6)


def cobblestones(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw rows of rounded grey stones that grow towards the viewer."""
    x, y = axes(size)
    depth = 0.55 + y * 0.75
    b = 17.0 * np.log(depth) + between(rng, 0, 1) + 0.10 * np.sin(x * 7.0 + between(rng, 0, 6))
    row = np.floor(b)
    a = (
        (x - 0.5) * (5.2 / depth)
        + 0.5 * (row - 2.0 * np.floor(row * 0.5))
        + 0.18 * np.sin(row * 4.1)
        + between(rng, 0, 1)
    )
    cell = np.floor(a)
    fu, fv = a - cell - 0.5, b - row - 0.5
    tone = np.sin(cell * 5.7 + row * 9.1 + 2.0 * np.sin(row * 3.3 + cell * 1.7) + between(rng, 0, 6))
    d = sd_box(fu * 1.25, fv, 0.56, 0.44, 0.30)
    stone = mix_rgb((0.54, 0.54, 0.57), (0.58, 0.54, 0.51), between(rng, 0, 1))
    dome = clip01(-d * 3.2)
    shade = 0.72 + 0.36 * dome - 0.22 * fv + 0.11 * tone
    image = np.broadcast_to(column((0.22, 0.21, 0.21)), (3, size, size)).copy()
    blend(image, clip01(0.5 - d * (size * 0.065)), column(stone) * shade + column((0.02, 0.0, -0.02)) * tone)
    image *= 0.92 + 0.12 * y
    return Backdrop(image, shadow=0.55)
