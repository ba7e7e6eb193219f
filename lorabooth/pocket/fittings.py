"""What a body wears: its emblem, and accessories."""

import math

import numpy as np

from lorabooth.pocket.canvas import Canvas
from lorabooth.pocket.parts import Anchors, darker, limited
from lorabooth.pocket.raster import Rgb, clip01, column, sd_box, sd_polygon


def paint_mark(c: Canvas, kind: str, at: tuple[float, float, float], rgb: Rgb, backing: Rgb) -> None:
    """Paint an emblem (star, heart, ring or bolt) of half width at[2] on a thin backing."""
    cu, cv, size = at
    reach = size * 1.3
    w = c.window(cu - reach, cu + reach, cv - reach, cv + reach)
    u, v = (w.u - cu) * (1 / size), (w.v - cv) * (1 / size)
    if kind == "ring":
        d = np.abs(np.sqrt(u * u + v * v) - 0.66) - 0.26
    elif kind == "heart":
        a, b = np.abs(u), v * 0.95 + 0.12 - 0.28 * np.sqrt(np.abs(u) + 0.02)
        d = np.sqrt(a * a * 0.85 + b * b * 1.25) - 0.78
    elif kind == "star":
        points = [
            (math.sin(k * math.pi / 5) * s, math.cos(k * math.pi / 5) * s)
            for k, s in ((k, 1.0 if k % 2 == 0 else 0.46) for k in range(10))
        ]
        d = sd_polygon(u, v, points)
    else:
        d = sd_polygon(
            u, v, [(0.25, 1.0), (-0.6, -0.12), (-0.05, -0.12), (-0.25, -1.0), (0.6, 0.2), (0.05, 0.2)]
        )
    d = d * size
    w.paint(w.cover(d - 0.05) * w.alpha, column(backing))
    w.paint(w.cover(d) * w.alpha, w.lit(u * 0.3, v * 0.3, column(rgb), 0.1))


def paint_accessory(c: Canvas, kind: str, at: Anchors) -> None:
    """Paint a red hat, a striped scarf or sunglasses on a body with these anchors."""
    if kind == "red hat":
        u, v, w = at.top
        w = max(min(w, 0.56), 0.30)
        red: Rgb = (0.90, 0.10, 0.12)
        crown = w * 0.72
        c.poly(
            [
                (u - crown * 0.95, v + 0.02),
                (u + crown * 0.95, v + 0.02),
                (u + crown * 0.72, v + 0.16 + w * 0.6),
                (u - crown * 0.72, v + 0.16 + w * 0.6),
            ],
            0.07,
            red,
            0.3,
        )
        c.stroke((u - crown, v + 0.10), (u + crown, v + 0.10), 0.06, (0.98, 0.94, 0.88), flat=True)
        c.ellipse(u, v + 0.01, w * 1.28, 0.085, darker(red, 0.12), 0.2)
    elif kind == "striped scarf":
        u, v, w = at.neck
        w = max(min(w, 0.80), 0.26)
        thick = 0.11
        cream: Rgb = (0.98, 0.95, 0.85)
        navy: Rgb = (0.13, 0.22, 0.60)
        win = c.window(u - w - 0.2, u + w + 0.2, v - 0.62, v + 0.25)
        a, b = win.u - u, win.v - v
        sag = 0.10 * (1.0 - (a * (1 / w)) ** 2)
        loop = sd_box(a, b + sag, w + 0.07, thick, thick * 0.9)
        tail = sd_box(a - w * 0.42, b + 0.36, 0.12, 0.24, 0.03)
        for d, q, nu, nv in (
            (tail, b, a * 0.5 - w * 0.2, b * 0.0),
            (loop, a, a * (0.7 / w), (b + sag) * 5.0),
        ):
            stripe = np.abs(q * 3.6 - np.floor(q * 3.6) - 0.5)
            albedo = column(cream) + clip01((stripe - 0.25) * 6.0 + 0.5) * (column(navy) - column(cream))
            win.paint(win.cover(d), win.lit(limited(nu), limited(nv), albedo, 0.0))
    elif kind == "sunglasses":
        u, v, w = at.face
        w = max(min(w, 0.62), 0.30)
        black: Rgb = (0.05, 0.05, 0.07)
        c.stroke((u - w, v + 0.08), (u + w, v + 0.08), 0.045, black, flat=True)
        for side in (-1.0, 1.0):
            cu = u + side * w * 0.52
            c.box(
                cu, v - 0.01, w * 0.45 + 0.03, max(w * 0.30, 0.13) + 0.03, 0.14, (0.80, 0.80, 0.84), flat=True
            )
            c.box(cu, v - 0.01, w * 0.45, max(w * 0.30, 0.13), 0.11, black)
            c.stroke(
                (cu - w * 0.2, v - 0.04), (cu + w * 0.02, v + 0.08), 0.028, (0.75, 0.85, 0.95), flat=True
            )
