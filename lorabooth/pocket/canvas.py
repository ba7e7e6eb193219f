"""The canvas that bodies are painted on: a patch of the frame with object coordinates, light and a pattern.

In object coordinates u runs to the right and v up, and a body lies roughly in [-1, 1] squared.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorabooth.pocket.raster import (
    F32,
    Plane,
    Rgb,
    clip01,
    column,
    sd_box,
    sd_ellipse,
    sd_polygon,
    sd_segment,
)


@dataclass(frozen=True, slots=True)
class Light:
    """Light in object coordinates.

    Attributes:
        direction: unit vector (u, v, towards the viewer) to the lamp.
        ambient: share of the albedo seen without the lamp, in [0, 1].
        rim: colour added at grazing angles.
    """

    direction: tuple[float, float, float]
    ambient: float
    rim: Rgb


@dataclass(frozen=True, slots=True)
class Pattern:
    """A body's albedo: two colours and how they alternate.

    Attributes:
        kind: plain, striped, dotted or checkered.
        first, second: colours in [0, 1].
        frequency: repeats per object unit.
        phase: shift in repeats, in [0, 1].
        angle_rad: direction in which the pattern repeats.
    """

    kind: str
    first: Rgb
    second: Rgb
    frequency: float
    phase: float
    angle_rad: float


def pattern_albedo(pattern: Pattern, u: Plane, v: Plane, pixel: float) -> Plane:
    """Return the albedo, (3, h, w) or (3, 1, 1) if plain; `pixel` is a pixel's side in object units."""
    first = column(pattern.first)
    if pattern.kind == "plain":
        return first
    f = pattern.frequency
    cos, sin = math.cos(pattern.angle_rad) * f, math.sin(pattern.angle_rad) * f
    sharp = 1.0 / (f * pixel * 1.2)
    a = u * cos + v * sin + pattern.phase
    if pattern.kind == "striped":
        t = np.abs(a - np.floor(a) - 0.5)
        mask = clip01((t - 0.285) * sharp + 0.5)
    else:
        b = v * cos - u * sin + pattern.phase * 0.7
        row = np.floor(b)
        b = b - row - 0.5
        if pattern.kind == "dotted":
            a = a + 0.5 * (row - 2.0 * np.floor(row * 0.5))
            a = a - np.floor(a) - 0.5
            mask = clip01((0.29 - np.sqrt(a * a + b * b)) * sharp + 0.5)
        else:
            cell = np.floor(a)
            a = a - cell - 0.5
            parity = row + cell
            parity = parity - 2.0 * np.floor(parity * 0.5)
            mask = clip01((0.47 - np.maximum(np.abs(a), np.abs(b))) * sharp + 0.5) * parity
    return first + mask * (column(pattern.second) - first)


@dataclass(slots=True)
class Canvas:
    """A patch of the frame in object coordinates, painted in place.

    Attributes:
        u, v: object coordinates of the pixel centres, (h, w).
        rgb: colours so far, (3, h, w).
        alpha: coverage so far, (h, w).
        pixel: a pixel's side in object units.
        light: the lamp in object coordinates.
        pattern: the body's albedo.
        frame: (origin column, origin row, pixels a unit, cos, sin, mirror) of the placement.
    """

    u: Plane
    v: Plane
    rgb: Plane
    alpha: Plane
    pixel: float
    light: Light
    pattern: Pattern
    frame: tuple[float, float, float, float, float, float]

    def window(self, u0: float, u1: float, v0: float, v1: float) -> "Canvas":
        """Return the view of this canvas that holds the given box of object coordinates (perhaps empty)."""
        ox, oy, k, cos, sin, mirror = self.frame
        xs = [cos * mirror * u - sin * v for u in (u0, u1) for v in (v0, v1)]
        ys = [sin * mirror * u + cos * v for u in (u0, u1) for v in (v0, v1)]
        left, right = max(int(ox + k * min(xs)) - 2, 0), max(int(ox + k * max(xs)) + 3, 0)
        top, bottom = max(int(oy - k * max(ys)) - 2, 0), max(int(oy - k * min(ys)) + 3, 0)
        cut = (slice(top, bottom), slice(left, right))
        return Canvas(
            self.u[cut],
            self.v[cut],
            self.rgb[:, *cut],
            self.alpha[cut],
            self.pixel,
            self.light,
            self.pattern,
            (ox - left, oy - top, k, cos, sin, mirror),
        )

    def cover(self, distance: Plane) -> Plane:
        """Return the coverage in [0, 1] of the shape with this signed distance."""
        return clip01(0.5 - distance * (1.0 / self.pixel))

    def paint(self, mask: Plane, colour: Plane) -> None:
        """Lay a colour over the canvas where `mask` is set."""
        self.rgb += mask * (colour - self.rgb)
        np.maximum(self.alpha, mask, out=self.alpha)

    def lit(self, nu: Plane, nv: Plane, albedo: Plane, gloss: float = 0.25) -> Plane:
        """Return `albedo` lit for the normal whose in-plane part is (nu, nv): diffuse, highlight, rim."""
        lu, lv, lz = self.light.direction
        square = np.minimum(nu * nu + nv * nv, F32(1))
        nz = np.sqrt(1.0 - square)
        diffuse = np.maximum(nu * lu + nv * lv + nz * lz, 0)
        shade = (self.light.ambient + (1.12 - self.light.ambient) * diffuse) * (1.0 - 0.22 * square * square)
        out: Plane = albedo * shade
        if gloss > 0.0:
            norm = math.sqrt(lu * lu + lv * lv + (lz + 1.0) ** 2)
            half = np.maximum((nu * lu + nv * lv + nz * (lz + 1.0)) * (1.0 / norm), 0)
            half = half * half
            half = half * half
            half = half * half
            out = out + (gloss * half * half)
        rim = square * square
        out += (rim * rim) * column(self.light.rim)
        return out

    def body(self, u: Plane, v: Plane) -> Plane:
        """Return the body's albedo at pattern coordinates (u, v)."""
        return pattern_albedo(self.pattern, u, v, self.pixel)

    def _fill(self, distance: Plane, nu: Plane, nv: Plane, rgb: Rgb | None, gloss: float) -> None:
        albedo = self.body(self.u, self.v) if rgb is None else column(rgb)
        self.paint(self.cover(distance), self.lit(nu, nv, albedo, gloss))

    def ellipse(self, cu: float, cv: float, a: float, b: float, rgb: Rgb | None, gloss: float = 0.25) -> None:
        """Paint a round lit ellipse; `rgb` None means the body's pattern."""
        w = self.window(cu - a, cu + a, cv - b, cv + b)
        u, v = w.u - cu, w.v - cv
        w._fill(sd_ellipse(u, v, a, b), u * (0.95 / a), v * (0.95 / b), rgb, gloss)

    def disc(self, cu: float, cv: float, radius: float, rgb: Rgb) -> None:
        """Paint a flat disc."""
        w = self.window(cu - radius, cu + radius, cv - radius, cv + radius)
        u, v = w.u - cu, w.v - cv
        w.paint(w.cover(np.sqrt(u * u + v * v) - radius), column(rgb))

    def box(
        self,
        cu: float,
        cv: float,
        half_u: float,
        half_v: float,
        radius: float,
        rgb: Rgb | None,
        gloss: float = 0.15,
        flat: bool = False,
    ) -> None:
        """Paint a rounded box, lit as a slightly bulging front, or flat."""
        w = self.window(cu - half_u, cu + half_u, cv - half_v, cv + half_v)
        u, v = w.u - cu, w.v - cv
        distance = sd_box(u, v, half_u, half_v, radius)
        if flat and rgb is not None:
            w.paint(w.cover(distance), column(rgb))
        else:
            w._fill(distance, u * (0.6 / half_u), v * (0.5 / half_v), rgb, gloss)

    def stroke(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        radius: float,
        rgb: Rgb,
        flat: bool = False,
    ) -> None:
        """Paint a round-ended line, lit as a rod, or flat."""
        w = self.window(
            min(start[0], end[0]) - radius,
            max(start[0], end[0]) + radius,
            min(start[1], end[1]) - radius,
            max(start[1], end[1]) + radius,
        )
        distance = sd_segment(w.u, w.v, start, end) - radius
        if flat:
            w.paint(w.cover(distance), column(rgb))
            return
        du, dv = end[0] - start[0], end[1] - start[1]
        length = max(math.hypot(du, dv), 1e-6)
        across = ((w.u - start[0]) * dv - (w.v - start[1]) * du) * (1.0 / (length * radius))
        across = np.minimum(np.maximum(across, F32(-0.9)), F32(0.9))
        w._fill(distance, across * (dv / length), across * (-du / length), rgb, 0.15)

    def poly(
        self, points: list[tuple[float, float]], radius: float, rgb: Rgb | None, gloss: float = 0.15
    ) -> None:
        """Paint a polygon grown by `radius` with round corners, lit as a slightly bulging front."""
        us, vs = [p[0] for p in points], [p[1] for p in points]
        u0, u1, v0, v1 = min(us) - radius, max(us) + radius, min(vs) - radius, max(vs) + radius
        w = self.window(u0, u1, v0, v1)
        nu = (w.u - (u0 + u1) / 2) * (1.2 / (u1 - u0))
        nv = (w.v - (v0 + v1) / 2) * (1.0 / (v1 - v0))
        w._fill(sd_polygon(w.u, w.v, points) - radius, nu, nv, rgb, gloss)

    def ring(
        self, cu: float, cv: float, a: float, b: float, thickness: float, rgb: Rgb, flat: bool = False
    ) -> None:
        """Paint a ring of half width `thickness` along the ellipse (a, b), lit as a torus, or flat."""
        t = thickness
        w = self.window(cu - a - t, cu + a + t, cv - b - t, cv + b + t)
        u, v = w.u - cu, w.v - cv
        off = sd_ellipse(u, v, a, b)
        if flat:
            w.paint(w.cover(np.abs(off) - t), column(rgb))
            return
        radius = np.sqrt(u * u + v * v) + 1e-4
        across = np.minimum(np.maximum(off * (0.9 / t), F32(-0.9)), F32(0.9)) / radius
        w._fill(np.abs(off) - t, across * u, across * v, rgb, 0.25)


def make_canvas(
    bounds: tuple[float, float, float, float],
    pixels_per_unit: float,
    rotation_rad: float,
    mirror: bool,
    **fields: Any,
) -> Canvas:
    """Return an empty canvas just large enough for `bounds` (u0, u1, v0, v1) turned by `rotation_rad`."""
    u0, u1, v0, v1 = bounds
    cos, sin, f = math.cos(rotation_rad), math.sin(rotation_rad), -1.0 if mirror else 1.0
    k = pixels_per_unit
    xs = [cos * f * u - sin * v for u in (u0, u1) for v in (v0, v1)]
    ys = [sin * f * u + cos * v for u in (u0, u1) for v in (v0, v1)]
    ox, oy = math.ceil(-k * min(xs)) + 2, math.ceil(k * max(ys)) + 2
    width, height = ox + math.ceil(k * max(xs)) + 2, oy + math.ceil(-k * min(ys)) + 2
    x = ((np.arange(width, dtype=F32) + F32(0.5 - ox)) * F32(1 / k))[None, :]
    y = ((F32(oy - 0.5) - np.arange(height, dtype=F32)) * F32(1 / k))[:, None]
    return Canvas(
        u=(x * cos + y * sin) * f,
        v=y * cos - x * sin,
        rgb=np.zeros((3, height, width), dtype=F32),
        alpha=np.zeros((height, width), dtype=F32),
        pixel=1.0 / k,
        frame=(float(ox), float(oy), k, cos, sin, f),
        **fields,
    )
