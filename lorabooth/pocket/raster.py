"""Raster primitives of the pocket renderer: signed distances, blending, smooth noise.

Everything works on float32 planes. Colours are (r, g, b) in [0, 1]; colour planes are (3, h, w).
"""

import functools
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Plane: TypeAlias = NDArray[np.floating[Any]]
Rgb: TypeAlias = tuple[float, float, float]

F32 = np.float32


def clip01(values: Plane) -> Plane:
    """Return `values` limited to [0, 1]."""
    return np.minimum(np.maximum(values, F32(0)), F32(1))


def smoothstep(low: float, high: float, values: Plane) -> Plane:
    """Return the cubic step from 0 at `low` to 1 at `high` (low < high, or reversed for a falling step)."""
    t = clip01((values - low) * (1.0 / (high - low)))
    return t * t * (3.0 - 2.0 * t)


def mix_rgb(first: Rgb, second: Rgb, amount: float) -> Rgb:
    """Return the colour `amount` of the way from `first` to `second`."""
    r, g, b = (a + (z - a) * amount for a, z in zip(first, second, strict=True))
    return r, g, b


def column(rgb: Rgb) -> Plane:
    """Return a colour as a (3, 1, 1) array."""
    return np.asarray(rgb, dtype=F32).reshape(3, 1, 1)


def blend(image: Plane, mask: Plane, colour: Plane) -> None:
    """Lay `colour` ((3, 1, 1) or (3, h, w)) over `image` (3, h, w) where `mask` (h, w) is set, in place."""
    image += mask * (colour - image)


@functools.lru_cache(maxsize=256)
def _upsampling(size: int, cells: int) -> Plane:
    """Return the (size, cells + 1) matrix of smoothstep interpolation of cell corners to pixels."""
    at = (np.arange(size, dtype=F32) + F32(0.5)) * F32(cells / size)
    low = np.minimum(at.astype(np.int64), cells - 1)
    t = at - low
    t = t * t * (3 - 2 * t)
    weights = np.zeros((size, cells + 1), dtype=F32)
    rows = np.arange(size)
    weights[rows, low] = 1 - t
    weights[rows, low + 1] = t
    weights.setflags(write=False)
    return weights


def smooth_noise(rng: np.random.Generator, size: int, cells_x: int, cells_y: int) -> Plane:
    """Return value noise (size, size) in [-1, 1] with the given number of cells across and down."""
    corners = rng.random((cells_y + 1, cells_x + 1), dtype=F32) * F32(2) - F32(1)
    noise: Plane = _upsampling(size, cells_y) @ corners @ _upsampling(size, cells_x).T
    return noise


def sd_box(u: Plane, v: Plane, half_u: float, half_v: float, radius: float = 0.0) -> Plane:
    """Return the distance to a rounded box at the origin."""
    a = np.abs(u) - (half_u - radius)
    b = np.abs(v) - (half_v - radius)
    outside = np.sqrt(np.maximum(a, 0) ** 2 + np.maximum(b, 0) ** 2)
    distance: Plane = outside + np.minimum(np.maximum(a, b), F32(0)) - radius
    return distance


def sd_ellipse(u: Plane, v: Plane, a: float, b: float) -> Plane:
    """Return the first order distance to an ellipse at the origin with half axes `a` and `b`."""
    x, y = u * (1.0 / a), v * (1.0 / b)
    k0 = np.sqrt(x * x + y * y)
    x, y = x * (1.0 / a), y * (1.0 / b)
    k1 = np.sqrt(x * x + y * y) + 1e-4
    distance: Plane = k0 * (k0 - 1.0) / k1
    return distance


def sd_segment(u: Plane, v: Plane, start: tuple[float, float], end: tuple[float, float]) -> Plane:
    """Return the distance to a line segment."""
    du, dv = end[0] - start[0], end[1] - start[1]
    pu, pv = u - start[0], v - start[1]
    t = clip01((pu * du + pv * dv) * (1.0 / max(du * du + dv * dv, 1e-9)))
    pu, pv = pu - t * du, pv - t * dv
    distance: Plane = np.sqrt(pu * pu + pv * pv)
    return distance


def sd_polygon(u: Plane, v: Plane, points: list[tuple[float, float]]) -> Plane:
    """Return the exact signed distance to a simple polygon (winding rule after I. Quilez)."""
    nearest = np.full(np.broadcast_shapes(u.shape, v.shape), 1e9, dtype=F32)
    inside = np.zeros(nearest.shape, dtype=bool)
    for (u0, v0), (u1, v1) in zip(points, points[1:] + points[:1], strict=True):
        eu, ev = u1 - u0, v1 - v0
        wu, wv = u - u0, v - v0
        t = clip01((wu * eu + wv * ev) * (1.0 / max(eu * eu + ev * ev, 1e-9)))
        bu, bv = wu - t * eu, wv - t * ev
        nearest = np.minimum(nearest, bu * bu + bv * bv)
        if ev != 0.0:
            crosses = (v >= v0) != (v >= v1)
            left = (wu * ev < wv * eu) if ev > 0 else (wu * ev > wv * eu)
            inside ^= crosses & left
    return np.sqrt(nearest) * np.where(inside, F32(-1), F32(1))


def smooth_union(first: Plane, second: Plane, width: float) -> Plane:
    """Return the union of two distances with a fillet of the given width."""
    h = np.maximum(width - np.abs(first - second), 0) * (1.0 / width)
    return np.minimum(first, second) - h * h * (width * 0.25)
