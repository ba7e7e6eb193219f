"""What the places share: the finished backdrop and the parts that landscapes are made of.

Frame coordinates run from 0 to 1, x to the right and y down.
"""

import math
from dataclasses import dataclass

import numpy as np

from lorabooth.pocket.raster import F32, Plane, Rgb, blend, clip01, column, smoothstep


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


def axes(size: int) -> tuple[Plane, Plane]:
    """Return x (1, size) and y (size, 1) of the pixel centres, in [0, 1]."""
    at = (np.arange(size, dtype=F32) + F32(0.5)) * F32(1 / size)
    return at[None, :], at[:, None]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number between `low` and `high`."""
    return low + (high - low) * float(rng.random())


def vertical_grade(size: int, y: Plane, top: Rgb, bottom: Rgb, end: float) -> Plane:
    """Return a fresh frame graded from `top` at y = 0 to `bottom` at y = `end`."""
    t = clip01(y * (1.0 / end))
    rows = column(top) + t * (column(bottom) - column(top))
    return np.broadcast_to(rows, (3, size, size)).copy()


def below_line(line: Plane, y: Plane, size: int) -> Plane:
    """Return the coverage of the region below `line` (a y for each column)."""
    return clip01((y - line) * size + 0.5)


def wave_line(rng: np.random.Generator, x: Plane, base: float, height: float, cycles: float) -> Plane:
    """Return a smooth line over x: a sum of two sines with random phases."""
    a, b = between(rng, 0, math.tau), between(rng, 0, math.tau)
    swing = np.sin(x * (cycles * math.tau) + a) + 0.4 * np.sin(x * (cycles * 2.3 * math.tau) + b)
    line: Plane = base + height * swing
    return line


def clouds(rng: np.random.Generator, image: Plane, x: Plane, y: Plane, horizon: float, rgb: Rgb) -> None:
    """Blend one to three clouds into the sky above `horizon`."""
    for _ in range(int(rng.integers(1, 4))):
        cx, cy, w = (
            between(rng, 0.05, 0.95),
            between(rng, 0.06, max(horizon - 0.14, 0.1)),
            between(rng, 0.10, 0.19),
        )
        d = np.full(np.broadcast_shapes(x.shape, y.shape), 9.0, dtype=F32)
        for shift, grow in ((-0.6, 0.30), (0.0, 0.46), (0.62, 0.26)):
            d = np.minimum(d, np.sqrt((x - cx - shift * w) ** 2 + (y - cy) ** 2) - w * grow)
        mask = smoothstep(0.012, -0.012, np.maximum(d, y - cy - w * 0.16)) * 0.9
        blend(image, mask, column(rgb))


def dot(image: Plane, cx: float, cy: float, radius: float, rgb: Rgb, strength: float) -> None:
    """Blend a small disc into the frame, touching only its own pixels."""
    size = image.shape[1]
    x0, x1 = max(int((cx - radius) * size) - 1, 0), max(int((cx + radius) * size) + 2, 0)
    y0, y1 = max(int((cy - radius) * size) - 1, 0), max(int((cy + radius) * size) + 2, 0)
    patch = image[:, y0:y1, x0:x1]
    dx = (np.arange(patch.shape[2], dtype=F32) + F32(x0 + 0.5 - cx * size))[None, :]
    dy = (np.arange(patch.shape[1], dtype=F32) + F32(y0 + 0.5 - cy * size))[:, None]
    blend(patch, clip01(radius * size + 0.5 - np.sqrt(dx * dx + dy * dy)) * strength, column(rgb))
