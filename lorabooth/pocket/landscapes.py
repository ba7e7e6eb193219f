"""The places with a horizon: beach, snow, grass, night, desert; each draws a whole frame."""

import numpy as np

from lorabooth.pocket.raster import (
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
    clouds,
    dot,
    vertical_grade,
    wave_line,
)


def beach(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw sky, turquoise sea, a foam line and sand."""
    x, y = axes(size)
    horizon, shore = between(rng, 0.26, 0.42), between(rng, 0.10, 0.16)
    image = vertical_grade(size, y, (0.36, 0.66, 0.95), (0.80, 0.92, 0.99), horizon)
    clouds(rng, image, x, y, horizon, (1.0, 1.0, 1.0))
    deep, shallow = (0.04, 0.36, 0.64), (0.20, 0.72, 0.76)
    t = clip01((y - horizon) * (1.0 / shore))
    sea = column(deep) + t * (column(shallow) - column(deep))
    glint = np.sin(y * 240.0 + 3.0 * np.sin(x * 9.0 + between(rng, 0, 6)))
    blend(image, below_line(np.full_like(x, horizon), y, size), sea + 0.05 * np.maximum(glint, 0))
    line = wave_line(rng, x, horizon + shore, 0.012, 1.3)
    sand = mix_rgb((0.93, 0.83, 0.60), (0.96, 0.87, 0.70), between(rng, 0, 1))
    noise = smooth_noise(rng, size, 7, 9)
    ripples = np.sin((y - line) * (110.0 - 60.0 * y) + noise * 1.5) * 0.022
    wet = 1.0 - 0.22 * smoothstep(0.10, 0.0, y - line)
    blend(image, below_line(line, y, size), column(sand) * wet + ripples + noise * 0.02)
    blend(image, clip01((0.013 - np.abs(y - line + 0.004 * noise)) * size + 0.5), column((0.98, 0.99, 1.0)))
    return Backdrop(image, shadow=0.42)


def snow(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a pale sky, white hills, dark firs far off, large flakes."""
    x, y = axes(size)
    horizon = between(rng, 0.36, 0.5)
    warm = between(rng, 0, 1)
    image = vertical_grade(
        size, y, mix_rgb((0.56, 0.68, 0.84), (0.66, 0.68, 0.82), warm), (0.86, 0.90, 0.96), horizon
    )
    hill = wave_line(rng, x, horizon, 0.025, 0.7)
    for _ in range(int(rng.integers(3, 7))):
        cx, tall = between(rng, 0, 1), between(rng, 0.10, 0.22)
        base = horizon + 0.03
        step = (y - base + tall) * (3.0 / tall)
        width = (0.25 * step + 0.55 * (step - np.floor(step))) * tall * 0.30
        mask = clip01((width - np.abs(x - cx)) * size + 0.5) * (y > base - tall) * (y < base)
        blend(image, mask, column((0.30, 0.45, 0.48)))
    noise = smooth_noise(rng, size, 4, 6)
    white = column((0.95, 0.97, 1.0)) - column((0.14, 0.09, 0.03)) * (0.45 + 0.55 * noise)
    blend(image, below_line(hill, y, size), white)
    near = wave_line(rng, x, horizon + 0.22, 0.03, 0.5)
    blend(image, smoothstep(-0.05, 0.03, y - near) * 0.6, column((0.97, 0.98, 1.0)))
    for _ in range(16):
        cx, cy, r = between(rng, 0, 1), between(rng, 0, 0.9), between(rng, 0.008, 0.016)
        dot(image, cx, cy, r, (1.0, 1.0, 1.0), 0.95)
    return Backdrop(image, shadow=0.34, ambient=0.64)


def grass(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a blue sky, hills, a meadow with blades and flowers."""
    x, y = axes(size)
    horizon = between(rng, 0.36, 0.52)
    image = vertical_grade(size, y, (0.30, 0.60, 0.96), (0.74, 0.89, 0.99), horizon)
    clouds(rng, image, x, y, horizon, (1.0, 1.0, 1.0))
    blend(
        image, below_line(wave_line(rng, x, horizon - 0.05, 0.035, 0.8), y, size), column((0.36, 0.62, 0.40))
    )
    lush = between(rng, 0, 1)
    far, near = (
        mix_rgb((0.50, 0.76, 0.26), (0.40, 0.70, 0.26), lush),
        mix_rgb((0.22, 0.52, 0.12), (0.16, 0.48, 0.18), lush),
    )
    t = clip01((y - horizon) * (1.0 / (1.0 - horizon)))
    meadow = column(far) + t * (column(near) - column(far))
    noise = smooth_noise(rng, size, 5, 6)
    shift = between(rng, 0, 6)
    blades = np.abs(np.sin(x * (75.0 - 30.0 * y) + 2.5 * noise + shift))
    rows = (y + 0.02 * blades) * 16.0
    tuft = rows - np.floor(rows)
    image_mask = below_line(wave_line(rng, x, horizon, 0.012, 0.9), y, size)
    blend(image, image_mask, meadow * (0.90 + 0.20 * tuft * t + 0.10 * noise))
    petals: tuple[Rgb, ...] = ((1.0, 1.0, 1.0), (1.0, 0.86, 0.25), (0.98, 0.55, 0.72))
    for _ in range(int(rng.integers(6, 13))):
        depth = between(rng, 0.1, 1)
        cx, cy = between(rng, 0, 1), horizon + (1.0 - horizon) * depth
        r = 0.008 + 0.012 * depth
        dot(image, cx, cy, r * 1.3, petals[int(rng.integers(3))], 1.0)
        dot(image, cx, cy, r * 0.5, (0.98, 0.72, 0.15), 1.0)
    return Backdrop(image, shadow=0.5)


def night(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw a dark blue sky with moon and stars over a town with lit windows."""
    x, y = axes(size)
    horizon = between(rng, 0.46, 0.58)
    hue = between(rng, 0, 1)
    image = vertical_grade(
        size, y, (0.03, 0.04, 0.15), mix_rgb((0.13, 0.17, 0.42), (0.24, 0.15, 0.42), hue), horizon
    )
    for _ in range(18):
        dot(
            image,
            between(rng, 0, 1),
            between(rng, 0, horizon - 0.1),
            between(rng, 0.006, 0.012),
            (1.0, 0.98, 0.85),
            0.95,
        )
    mx, my, mr = between(rng, 0.1, 0.9), between(rng, 0.10, 0.22), between(rng, 0.065, 0.09)
    image += column((0.30, 0.29, 0.22)) * np.exp(-((x - mx) ** 2 + (y - my) ** 2) * 45.0)
    dot(image, mx, my, mr, (0.99, 0.96, 0.80), 1.0)
    dot(image, mx - mr * 0.3, my - mr * 0.2, mr * 0.24, (0.88, 0.84, 0.68), 1.0)
    dot(image, mx + mr * 0.35, my + mr * 0.3, mr * 0.18, (0.90, 0.86, 0.70), 1.0)
    at = 0.0
    while at < 1.0:
        wide, tall = between(rng, 0.10, 0.18), between(rng, 0.05, 0.17)
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
    blend(image, below_line(wave_line(rng, x, horizon, 0.006, 0.8), y, size), ground)
    return Backdrop(image, shadow=0.6, tint=(0.74, 0.77, 0.92), ambient=0.50, rim=(0.34, 0.40, 0.58))


def desert(rng: np.random.Generator, size: int) -> Backdrop:
    """Draw an evening sky with a low sun, ridged orange dunes, a cactus."""
    x, y = axes(size)
    horizon = between(rng, 0.42, 0.54)
    image = vertical_grade(
        size,
        y,
        mix_rgb((0.98, 0.66, 0.36), (0.95, 0.55, 0.42), between(rng, 0, 1)),
        (1.0, 0.90, 0.62),
        horizon,
    )
    sx, sy = between(rng, 0.12, 0.88), between(rng, 0.12, horizon - 0.12)
    image += column((0.12, 0.14, 0.10)) * np.exp(-((x - sx) ** 2 + (y - sy) ** 2) * 25.0)
    dot(image, sx, sy, between(rng, 0.06, 0.085), (1.0, 0.98, 0.84), 1.0)
    noise = smooth_noise(rng, size, 4, 6)
    if rng.random() < 0.75:
        cx, k = (
            (between(rng, 0.06, 0.22) if rng.random() < 0.5 else between(rng, 0.78, 0.94)),
            between(rng, 0.8, 1.2),
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
        line = wave_line(rng, x, horizon + lift, 0.035, 0.45 + 0.15 * index)
        shade = 1.0 - 0.20 * clip01((y - line) * 5.0) + 0.03 * noise
        ripple = 0.02 * np.sin((y - line) * 95.0 + 2.0 * noise) * (index / 2)
        blend(image, below_line(line, y, size), column(tone) * (shade + ripple))
    return Backdrop(image, shadow=0.45, tint=(1.03, 0.97, 0.90))
