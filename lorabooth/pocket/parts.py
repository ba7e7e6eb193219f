"""What the shape functions share: a specimen's look, anchor points, common colours and parts."""

from dataclasses import dataclass

import numpy as np

from lorabooth.pocket.canvas import Canvas
from lorabooth.pocket.raster import Plane, Rgb, mix_rgb

INK: Rgb = (0.10, 0.09, 0.11)
WHITE: Rgb = (0.97, 0.97, 0.95)
GLASS: Rgb = (0.62, 0.83, 0.95)
WOOD: Rgb = (0.47, 0.31, 0.19)
BEAK: Rgb = (0.98, 0.60, 0.10)


@dataclass(frozen=True, slots=True)
class Look:
    """What a shape function may use of a specimen: six proportions in [0, 1] and its colours."""

    p: tuple[float, ...]
    body: Rgb
    second: Rgb
    trim: Rgb


@dataclass(frozen=True, slots=True)
class Anchors:
    """Where things are attached, as (u, v, half width) in object coordinates."""

    top: tuple[float, float, float]
    neck: tuple[float, float, float]
    face: tuple[float, float, float]
    mark: tuple[float, float, float]


def darker(rgb: Rgb, amount: float = 0.35) -> Rgb:
    """Return the colour `amount` of the way to near black."""
    return mix_rgb(rgb, (0.05, 0.04, 0.07), amount)


def limited(values: Plane) -> Plane:
    """Return `values` limited to what a normal's part may be."""
    return np.minimum(np.maximum(values, np.float32(-0.98)), np.float32(0.98))


def eye(c: Canvas, u: float, v: float, radius: float, iris: Rgb | None = None) -> None:
    """Paint an eye with a glint; with an iris it has a white, too."""
    if iris is not None:
        c.disc(u, v, radius * 1.35, WHITE)
        c.disc(u, v, radius * 1.05, iris)
        c.disc(u, v, radius * 0.72, INK)
    else:
        c.disc(u, v, radius, INK)
    c.disc(u + radius * 0.32, v + radius * 0.36, radius * 0.36, WHITE)
