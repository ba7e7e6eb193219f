"""The live bodies of the pocket world: cat, duck and fish, in object coordinates."""

from itertools import pairwise

import numpy as np

from lorabooth.pocket.canvas import Canvas
from lorabooth.pocket.parts import BEAK, INK, WHITE, Anchors, Look, darker, eye, limited
from lorabooth.pocket.raster import clip01, column, mix_rgb, sd_ellipse, smooth_union


def cat(c: Canvas, look: Look) -> Anchors:
    """Paint a sitting cat, seen from the front, tail to the right."""
    p = look.p
    wide, head = 0.44 + 0.10 * p[0], 0.50 + 0.08 * p[1]
    ear = 0.30 + 0.16 * p[2]
    iris = (0.95, 0.75, 0.2) if p[3] < 0.33 else ((0.35, 0.75, 0.4) if p[3] < 0.66 else (0.35, 0.62, 0.95))
    hv = 0.24
    tail = [(wide * 0.6, -0.72), (0.72, -0.66), (0.86, -0.36), (0.76, -0.02 + 0.2 * p[4])]
    for start, end in pairwise(tail):
        c.stroke(start, end, 0.095, look.body)
    c.disc(*tail[-1], 0.10, look.trim)
    c.ellipse(0.0, -0.46, wide, 0.48, None, 0.1)
    c.ellipse(0.0, -0.50, wide * 0.5, 0.30, mix_rgb(look.trim, WHITE, 0.4), 0.0)
    for side in (-1.0, 1.0):
        c.ellipse(side * 0.20, -0.82, 0.17, 0.105, look.trim, 0.1)
        c.poly(
            [
                (side * head * 0.98, hv + 0.18),
                (side * head * 0.16, hv + 0.34),
                (side * head * 0.84, hv + 0.38 + ear),
            ],
            0.04,
            look.body,
        )
        c.poly(
            [
                (side * head * 0.84, hv + 0.28),
                (side * head * 0.42, hv + 0.34),
                (side * head * 0.77, hv + 0.27 + ear),
            ],
            0.01,
            (0.98, 0.66, 0.68),
        )
    c.ellipse(0.0, hv, head + 0.06, 0.45, None, 0.12)
    c.ellipse(0.0, hv - 0.20, 0.23, 0.15, mix_rgb(look.trim, WHITE, 0.8), 0.0)
    for side in (-1.0, 1.0):
        eye(c, side * head * 0.46, hv + 0.05, 0.118, iris)
        for lift in (-0.04, 0.05):
            c.stroke(
                (side * 0.24, hv - 0.17 + lift * 0.4),
                (side * 0.60, hv - 0.18 + lift * 2.0),
                0.014,
                darker(WHITE, 0.4),
                flat=True,
            )
        c.stroke((0.0, hv - 0.25), (side * 0.10, hv - 0.225), 0.024, INK, flat=True)
    c.poly([(-0.055, hv - 0.12), (0.055, hv - 0.12), (0.0, hv - 0.18)], 0.02, (0.95, 0.45, 0.5), 0.0)
    return Anchors(
        (0.0, hv + 0.36, 0.42), (0.0, hv - 0.36, 0.42), (0.0, hv + 0.03, head + 0.02), (0.0, -0.46, 0.19)
    )


def duck(c: Canvas, look: Look) -> Anchors:
    """Paint a duck from the side, looking right."""
    p = look.p
    head, hu, hv = 0.30 + 0.06 * p[0], 0.36 + 0.10 * p[1], 0.40 + 0.10 * p[2]
    for u in (-0.12, 0.2):
        c.ellipse(u + 0.08, -0.86, 0.17, 0.07, BEAK, 0.1)
    c.poly([(-0.6, -0.3), (-0.98, 0.02 + 0.2 * p[3]), (-0.35, 0.0)], 0.07, look.body)
    body = sd_ellipse(c.u + 0.1, c.v + 0.36, 0.80, 0.46 + 0.06 * p[4])
    neck = sd_ellipse(c.u - hu + 0.06, c.v - 0.02, 0.25, 0.46)
    d = smooth_union(smooth_union(body, neck, 0.3), np.sqrt((c.u - hu) ** 2 + (c.v - hv) ** 2) - head, 0.10)
    nu = np.where(c.v > 0.1, (c.u - hu) * (0.9 / head), (c.u + 0.1) * 1.15)
    nv = np.where(c.v > 0.1, (c.v - hv) * (0.6 / head), (c.v + 0.25) * 1.3)
    c.paint(c.cover(d), c.lit(limited(nu) * 0.85, limited(nv) * 0.85, c.body(c.u, c.v), 0.12))
    c.ring(hu - 0.04, hv - head * 0.98, head * 0.62, 0.07, 0.04, look.trim, flat=True)
    wing = look.second if p[5] > 0.5 else mix_rgb(look.body, look.trim, 0.55)
    c.poly([(0.2, -0.22), (-0.25, -0.52), (-0.72, -0.2), (-0.2, -0.12)], 0.09, darker(wing, 0.12), 0.1)
    c.poly(
        [(hu + head * 0.80, hv + 0.06), (hu + head * 0.80, hv - 0.14), (hu + head + 0.28, hv - 0.06)],
        0.05,
        BEAK,
        0.2,
    )
    eye(c, hu + head * 0.36, hv + 0.10, 0.085, INK)
    return Anchors(
        (hu - 0.02, hv + head - 0.08, head * 0.92),
        (hu - 0.04, hv - head * 0.95, head * 0.85),
        (hu + 0.06, hv + 0.09, head * 0.9),
        (-0.02, -0.5, 0.19),
    )


def fish(c: Canvas, look: Look) -> Anchors:
    """Paint a fish from the side, swimming right."""
    p = look.p
    long, tall = 0.70 + 0.08 * p[0], 0.44 + 0.18 * p[1]
    cu, cv = 0.18, -0.22
    fork = 0.36 + 0.16 * p[2]
    root = cu - long * 0.86
    c.poly([(root, cv), (-0.92, cv + fork), (-0.78, cv), (-0.92, cv - fork)], 0.06, look.trim)
    c.poly(
        [
            (cu - 0.36, cv + tall * 0.7),
            (cu - 0.30 - 0.2 * p[3], cv + tall + 0.26),
            (cu + 0.30, cv + tall * 0.75),
        ],
        0.05,
        look.trim,
    )
    c.poly(
        [(cu - 0.1, cv - tall * 0.8), (cu - 0.22, cv - tall - 0.13), (cu + 0.16, cv - tall * 0.85)],
        0.04,
        look.trim,
    )
    u, v = c.u - cu, c.v - cv
    nu, nv = limited(u * (1 / long)), limited(v * (1 / tall))
    albedo = c.body(u, v)
    belly = 0.30 * clip01(-nv * 1.4)
    albedo = albedo + belly * (column(WHITE) - albedo)
    c.paint(c.cover(sd_ellipse(u, v, long, tall)), c.lit(nu * 0.85, nv * 0.93, albedo, 0.5))
    gill = cu + long * 0.34
    c.stroke((gill, cv + tall * 0.40), (gill - 0.07, cv), 0.03, darker(look.body), flat=True)
    c.stroke((gill - 0.07, cv), (gill, cv - tall * 0.40), 0.03, darker(look.body), flat=True)
    c.poly(
        [(gill - 0.16, cv - 0.05), (gill - 0.42, cv + 0.05), (gill - 0.40, cv - 0.20)],
        0.05,
        look.second if p[4] > 0.5 else look.trim,
    )
    eye(c, cu + long * 0.58, cv + tall * 0.24, 0.10, (0.25, 0.25, 0.3))
    c.stroke((cu + long * 0.72, cv - tall * 0.34), (cu + long * 0.88, cv - tall * 0.26), 0.03, INK, flat=True)
    return Anchors(
        (cu + 0.22, cv + tall - 0.08, 0.36),
        (gill - 0.12, cv, tall * 0.9),
        (cu + long * 0.5, cv + tall * 0.26, 0.42),
        (cu - long * 0.36, cv, 0.19),
    )
