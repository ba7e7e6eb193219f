"""The bodies of the pocket world: one drawing function a class, in object coordinates.

A body fills roughly [-1, 1] squared, stands on v = -0.9 and faces or points its handle to +u. Every function
paints a `Canvas` and returns where accessories and the mark go.
"""

import math
from collections.abc import Callable

import numpy as np

from lorabooth.pocket.canvas import Canvas
from lorabooth.pocket.creatures import cat, duck, fish
from lorabooth.pocket.parts import GLASS, INK, WHITE, WOOD, Anchors, Look, darker, limited
from lorabooth.pocket.raster import (
    Rgb,
    clip01,
    column,
    mix_rgb,
    sd_box,
    sd_ellipse,
    sd_polygon,
    smooth_union,
)


def mug(c: Canvas, look: Look) -> Anchors:
    """Paint a mug: tapered cylinder, ring handle to the right, open top."""
    p = look.p
    half, top, taper = 0.50 + 0.16 * p[0], 0.55 + 0.3 * p[1], 0.16 * (p[2] - 0.4)
    cu, bulge = -0.2, 0.13
    reach = 0.30 + 0.14 * p[3]
    c.ring(
        cu + half * 0.95,
        (top - 0.95) / 2 + 0.05,
        reach,
        reach * (1.0 + 0.5 * p[4]),
        0.085 + 0.04 * p[5],
        look.trim,
    )
    u = c.u - cu
    width = half * (1.0 + taper * c.v)
    nu = limited(u / width)
    curve = bulge * np.sqrt(1.0 - nu * nu)
    d = np.maximum(np.abs(u) - width, np.maximum(-0.78 - (c.v + curve), c.v - top))
    c.paint(c.cover(d), c.lit(nu * 0.95, 0.08 * nu, c.body(np.arcsin(nu) * half, c.v + curve)))
    rim = half * (1.0 + taper * top)
    c.ellipse(cu, top, rim + 0.02, bulge + 0.02, look.trim, gloss=0.1)
    c.ellipse(
        cu, top - 0.01, rim - 0.09, bulge - 0.045, darker(mix_rgb(look.body, WOOD, 0.5), 0.45), gloss=0.0
    )
    return Anchors((cu, top, rim), (cu, top - 0.42, half), (cu, 0.1, half), (cu, -0.2, 0.27))


def ball(c: Canvas, look: Look) -> Anchors:
    """Paint a ball with a belt in the trim colour."""
    p = look.p
    r = 0.88
    nu, nv = c.u * (1 / r), c.v * (1 / r)
    square = nu * nu + nv * nv
    stretch = 1.0 + 0.32 * np.minimum(square, 1) ** 2
    albedo = c.body(c.u * stretch, c.v * stretch)
    tilt = 0.9 * (p[0] - 0.5)
    across = (
        c.v * math.cos(tilt) + c.u * math.sin(tilt) + (p[1] - 0.5) * 0.7 * np.sqrt(np.maximum(1 - square, 0))
    )
    belt = c.cover(np.abs(across) - (0.07 + 0.10 * p[2]))
    albedo = albedo + belt * (column(look.trim) - albedo)
    if p[3] > 0.5:
        cap = c.cover(sd_ellipse(c.u, c.v - 0.72, 0.33, 0.14))
        albedo = albedo + cap * (column(look.trim) - albedo)
    c.paint(
        c.cover(np.sqrt(c.u * c.u + c.v * c.v) - r),
        c.lit(limited(nu) * 0.97, limited(nv) * 0.97, albedo, 0.5),
    )
    return Anchors(
        (0.0, 0.74, 0.55), (0.0, -0.42, 0.76), (0.0, 0.2, 0.7), (0.0, 0.36 - 0.5 * p[1] * 0.4, 0.27)
    )


def boot(c: Canvas, look: Look) -> Anchors:
    """Paint a boot pointing right: shaft, foot, sole, cuff, laces."""
    p = look.p
    half, top = 0.30 + 0.10 * p[0], 0.65 + 0.25 * p[1]
    toe, height = 0.58 + 0.32 * p[2], 0.24 + 0.08 * p[3]
    cu = -0.38
    shaft = sd_box(c.u - cu, c.v - (top - 0.75) / 2, half, (top + 0.75) / 2, 0.06)
    middle = (cu - half + toe) / 2
    foot = sd_box(c.u - middle, c.v + 0.75 - height, toe - middle, height, height * 0.85)
    d = smooth_union(shaft, np.maximum(foot, -0.78 - c.v), 0.28)
    nu = limited(np.where(c.v > -0.25, (c.u - cu) * (0.8 / half), (c.u - middle) * (0.7 / (toe - middle))))
    nv = limited((c.v + 0.3) * 0.4)
    c.paint(c.cover(d), c.lit(nu * 0.85, nv, c.body(c.u, c.v)))
    sole = darker(look.trim, 0.15)
    c.box(middle + 0.02, -0.81, toe - middle + 0.05, 0.10, 0.07, sole)
    if p[4] > 0.5:
        c.box(cu - half + 0.16, -0.84, 0.18, 0.13, 0.03, sole)
    c.box(cu, top - 0.06, half + 0.07, 0.13, 0.09, look.trim)
    for step in range(3):
        v = -0.32 + 0.22 * step
        c.stroke((cu + half * 0.35, v), (cu + half * 0.98, v + 0.05), 0.04, look.trim, flat=True)
    return Anchors(
        (cu, top + 0.05, half), (cu, 0.1, half), (cu, top - 0.35, half), (cu - half * 0.25, 0.12, 0.22)
    )


def vase(c: Canvas, look: Look) -> Anchors:
    """Paint a vase: a turned profile with belly, neck and flared lip."""
    p = look.p
    belly, at = 0.46 + 0.20 * p[0], -0.45 + 0.4 * p[1]
    neck, lip, spread = 0.15 + 0.10 * p[2], 0.08 + 0.2 * p[3], 0.40 + 0.15 * p[4]
    rise = (c.v - at) * (1.0 / spread)
    width = neck + (belly - neck) * np.exp(-rise * rise) + lip * clip01((c.v - 0.5) * 2.6) ** 2
    width = width + 0.06 * clip01((-0.72 - c.v) * 6.0)
    nu = limited(c.u / width)
    curve = 0.09 * np.sqrt(1.0 - nu * nu)
    d = np.maximum((np.abs(c.u) - width) * 0.8, np.maximum(-0.82 - (c.v + curve * 0.8), c.v - 0.86))
    slope = (belly - neck) * np.exp(-rise * rise) * rise * (1.2 / spread)
    albedo = c.body(np.arcsin(nu) * (0.5 * belly + 0.25), c.v + curve)
    band = c.cover(np.minimum(0.70 - (c.v + curve * 0.5), np.abs(c.v + curve + 0.78) - 0.09))
    albedo = albedo + band * (column(look.trim) - albedo)
    c.paint(c.cover(d), c.lit(nu * 0.93, limited(slope * 0.6), albedo, 0.45))
    rim = neck + lip * 0.9
    c.ellipse(0.0, 0.85, rim + 0.05, 0.085, look.trim, gloss=0.1)
    c.ellipse(0.0, 0.85, rim - 0.03, 0.045, darker(look.body, 0.7), gloss=0.0)
    return Anchors((0.0, 0.86, rim + 0.05), (0.0, 0.5, neck + 0.07), (0.0, at + 0.15, belly), (0.0, at, 0.25))


def house(c: Canvas, look: Look) -> Anchors:
    """Paint a house front: wall, gable roof, chimney, door and window."""
    p = look.p
    half, eaves, ridge = 0.60 + 0.14 * p[0], 0.0 + 0.2 * p[1], 0.66 + 0.26 * p[2]
    side = 0.36 if p[3] > 0.5 else -0.36
    c.box(side, (eaves + ridge) / 2 + 0.12, 0.10, 0.30, 0.02, darker(look.body, 0.3))
    c.box(side, (eaves + ridge) / 2 + 0.42, 0.14, 0.05, 0.02, darker(look.trim, 0.3))
    w = c.window(-half, half, -0.9, eaves + 0.1)
    w.paint(
        w.cover(sd_box(w.u, w.v - (eaves - 0.8) / 2, half, (eaves + 1.0) / 2, 0.02)),
        w.lit(w.u * (0.5 / half), w.v * 0.2, w.body(w.u, w.v), 0.0),
    )
    roof = half + 0.18
    c.box(0.0, eaves - 0.03, half, 0.06, 0.0, darker(look.body, 0.55), flat=True)
    c.poly([(-roof, eaves), (roof, eaves), (0.06 * (p[4] - 0.5), ridge)], 0.05, look.trim)
    c.stroke((-roof, eaves - 0.02), (roof, eaves - 0.02), 0.045, darker(look.trim, 0.3), flat=True)
    frame = WHITE
    c.box(-side * 0.9, -0.58, 0.19, 0.34, 0.05, frame, flat=True)
    c.box(-side * 0.9, -0.60, 0.145, 0.30, 0.04, darker(look.trim, 0.45))
    c.disc(-side * 0.9 + 0.08, -0.6, 0.035, (0.95, 0.8, 0.3))
    c.box(side * 0.95, -0.42, 0.20, 0.19, 0.03, frame, flat=True)
    c.box(side * 0.95, -0.42, 0.15, 0.14, 0.02, GLASS if p[5] < 0.6 else (1.0, 0.88, 0.45), flat=True)
    c.stroke((side * 0.95, -0.55), (side * 0.95, -0.29), 0.025, frame, flat=True)
    return Anchors(
        (0.0, ridge - 0.12, 0.34),
        (0.0, eaves - 0.12, half + 0.02),
        (0.0, -0.36, half * 0.9),
        (0.0, eaves + (ridge - eaves) * 0.34, 0.22),
    )


def car(c: Canvas, look: Look) -> Anchors:
    """Paint a car from the side, driving right."""
    p = look.p
    hood, roof, back = 0.18 + 0.08 * p[0], 0.46 + 0.22 * p[1], -0.72 + 0.3 * p[2]
    front = 0.22 + 0.3 * p[3]
    radius = 0.24 + 0.05 * p[4]
    base, belt = -0.70, -0.36 + hood
    body = sd_box(c.u, c.v - (base + belt) / 2, 1.06, (belt - base) / 2, 0.17)
    cabin = (
        sd_polygon(
            c.u,
            c.v,
            [(back - 0.12, belt - 0.1), (front + 0.34, belt - 0.1), (front, roof), (back + 0.14, roof)],
        )
        - 0.06
    )
    d = smooth_union(body, cabin, 0.12)
    c.paint(c.cover(d), c.lit(limited(c.u * 0.45), limited((c.v + 0.15) * 0.85), c.body(c.u, c.v), 0.45))
    middle = (front + back) / 2 + 0.05
    low, high = belt + 0.04, roof - 0.05
    c.poly(
        [(back + 0.04, low), (middle - 0.06, low), (middle - 0.06, high), (back + 0.17, high)],
        0.02,
        GLASS,
        0.3,
    )
    c.poly(
        [(middle + 0.08, low), (front + 0.20, low), (front - 0.01, high), (middle + 0.08, high)],
        0.02,
        GLASS,
        0.3,
    )
    c.stroke((-0.98, base + 0.1), (0.98, base + 0.1), 0.06, look.trim)
    c.disc(0.96, belt - 0.13, 0.095, (1.0, 0.93, 0.55))
    c.disc(-0.99, belt - 0.12, 0.07, (0.85, 0.1, 0.1))
    for u in (-0.57, 0.57):
        c.ellipse(u, -0.68, radius + 0.02, radius + 0.02, (0.13, 0.13, 0.15), 0.1)
        c.ellipse(u, -0.68, radius * 0.55, radius * 0.55, look.trim if p[5] > 0.5 else (0.8, 0.8, 0.82), 0.3)
    return Anchors(
        (middle, roof, 0.42),
        (middle, belt - 0.06, 0.62),
        (middle, (low + high) / 2, 0.55),
        (0.0, (base + belt) / 2 + 0.06, 0.20),
    )


def tree(c: Canvas, look: Look) -> Anchors:
    """Paint a tree: a round crown of three lobes, or a layered fir, on a trunk."""
    p = look.p
    trunk = 0.10 + 0.07 * p[1]
    c.poly([(-trunk * 1.4, -0.88), (trunk * 1.4, -0.88), (trunk, -0.1), (-trunk, -0.1)], 0.02, WOOD)
    if p[0] > 0.4:
        side, low = 0.34 + 0.12 * p[2], -0.05 + 0.12 * p[3]
        radius = 0.40 + 0.06 * p[4]
        d = sd_ellipse(c.u, c.v - 0.42, 0.48 + 0.08 * p[5], 0.47)
        for u in (-side, side):
            d = smooth_union(d, np.sqrt((c.u - u) ** 2 + (c.v - low) ** 2) - radius, 0.12)
        nu, nv = limited(c.u * 0.95), limited((c.v - 0.2) * 1.1)
        top, crown = 0.84, 0.5
    else:
        half = 0.62 + 0.14 * p[2]
        d = np.full_like(c.u, 9.0)
        for index in range(3):
            base, tip = -0.42 + 0.36 * index, 0.22 + 0.345 * index
            width = half * (1.0 - 0.24 * index)
            slope = width / (tip - base)
            d = np.minimum(
                d, np.maximum((np.abs(c.u) - (tip - c.v) * slope) * 0.7, base - c.v + 0.12 * np.abs(c.u))
            )
        d = d - 0.03
        nu = limited(c.u / (0.2 + half * clip01((0.95 - c.v) * 0.7)))
        nv = np.full_like(nu, 0.15)
        top, crown = 0.86, 0.22
    c.paint(c.cover(d), c.lit(nu * 0.9, nv * 0.8, c.body(c.u, c.v), 0.1))
    for u, v in (
        ((-0.36, 0.0), (0.34, 0.14), (0.0, 0.56))
        if p[0] > 0.4
        else ((-0.3, -0.34), (0.26, -0.06), (-0.05, 0.38))
    ):
        c.ellipse(u, v, 0.095, 0.095, look.trim, 0.4)
    return Anchors(
        (0.0, top - 0.05, crown),
        (0.0, -0.36, trunk + 0.12),
        (0.0, 0.22, 0.55 if p[0] > 0.4 else 0.4),
        (0.0, 0.14, 0.2),
    )


def robot(c: Canvas, look: Look) -> Anchors:
    """Paint a robot: head with antenna and lamp eyes, chest, arms, legs."""
    p = look.p
    half, head = 0.42 + 0.10 * p[0], 0.30 + 0.10 * p[1]
    tall = 0.22 + 0.05 * p[2]
    shoulder = 0.12
    metal: Rgb = (0.55, 0.57, 0.62)
    hv = shoulder + 0.08 + tall
    c.stroke((0.0, hv + tall), (0.0, hv + tall + 0.16), 0.035, metal)
    c.disc(0.0, hv + tall + 0.20, 0.085, look.trim)
    for side in (-1.0, 1.0):
        reach = half + 0.14
        hand = -0.42 if (p[3] < 0.5 or side < 0) else 0.42
        c.stroke((side * half, shoulder - 0.12), (side * reach, shoulder - 0.14), 0.085, look.trim)
        c.stroke((side * reach, shoulder - 0.14), (side * (reach + 0.06), hand), 0.085, look.trim)
        c.disc(side * (reach + 0.06), hand, 0.12, metal)
        c.box(side * half * 0.5, -0.72, 0.12, 0.15, 0.03, look.trim)
        c.box(side * (half * 0.5 + 0.03), -0.84, 0.18, 0.08, 0.06, metal)
    c.box(0.0, shoulder + 0.05, 0.12, 0.10, 0.0, metal)
    c.box(0.0, (shoulder - 0.64) / 2, half, (shoulder + 0.64) / 2, 0.05 + 0.12 * p[4], None)
    c.box(0.0, hv, head, tall, 0.05 + 0.12 * p[5], None)
    c.box(0.0, hv + 0.03, head * 0.82, tall * 0.48, 0.08, (0.16, 0.18, 0.24))
    for side in (-1.0, 1.0):
        c.disc(side * head * 0.42, hv + 0.03, 0.085, (0.55, 0.95, 1.0))
        c.disc(side * head * 0.42, hv + 0.03, 0.04, WHITE)
    c.stroke((-head * 0.35, hv - tall * 0.70), (head * 0.35, hv - tall * 0.70), 0.03, INK, flat=True)
    return Anchors(
        (0.0, hv + tall - 0.02, head),
        (0.0, shoulder + 0.0, half * 0.85),
        (0.0, hv + 0.03, head * 0.9),
        (0.0, -0.22, 0.24),
    )


def clock(c: Canvas, look: Look) -> Anchors:
    """Paint a clock: a thick frame round a white dial, feet, and bells on some."""
    p = look.p
    r, cv = 0.74, -0.05
    inner = 0.40 + 0.10 * p[0]
    for side in (-1.0, 1.0):
        c.stroke((side * 0.4, -0.5), (side * 0.56, -0.82), 0.085, look.trim)
        if p[1] > 0.5:
            c.ellipse(side * 0.43, 0.68, 0.24, 0.20, look.trim, 0.4)
    if p[1] > 0.5:
        c.stroke((0.0, 0.6), (0.0, 0.84), 0.06, look.trim)
    u, v = c.u, c.v - cv
    if p[2] > 0.6:
        d = sd_box(u, v, r, r, 0.22)
    else:
        d = np.sqrt(u * u + v * v) - r
    c.paint(c.cover(d), c.lit(limited(u * 0.95), limited(v * 0.95), c.body(u, v), 0.35))
    c.ring(0.0, cv, inner + 0.02, inner + 0.02, 0.045, look.trim)
    c.disc(0.0, cv, inner, WHITE)
    for step in range(12 if p[3] > 0.5 else 4):
        angle = math.tau * step / (12 if p[3] > 0.5 else 4)
        c.disc(math.sin(angle) * inner * 0.80, cv + math.cos(angle) * inner * 0.80, 0.035, INK)
    for angle, length, width in ((p[4] * math.tau, 0.42, 0.05), (p[5] * math.tau, 0.66, 0.034)):
        c.stroke(
            (0.0, cv),
            (math.sin(angle) * inner * length, cv + math.cos(angle) * inner * length),
            width,
            INK,
            flat=True,
        )
    c.disc(0.0, cv, 0.065, look.trim)
    top = 0.84 if p[1] > 0.5 else 0.66
    return Anchors(
        (0.0, top - 0.06, 0.46),
        (0.0, cv - r * 0.80, 0.52),
        (0.0, cv + 0.12, 0.62),
        (0.0, cv - inner * 0.42, 0.13),
    )


SHAPES: dict[str, Callable[[Canvas, Look], Anchors]] = {
    "mug": mug,
    "ball": ball,
    "boot": boot,
    "vase": vase,
    "house": house,
    "car": car,
    "tree": tree,
    "robot": robot,
    "clock": clock,
    "cat": cat,
    "duck": duck,
    "fish": fish,
}
