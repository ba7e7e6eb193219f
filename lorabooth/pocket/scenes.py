"""The pocket world: scenes, their pictures and their captions.

Pictures and full captions are pure functions of the scene; see `lorabooth.pocket.world` for what a scene is.
"""

import math

import numpy as np
from numpy.typing import NDArray

from lorabooth.pocket.backdrops import BACKDROPS
from lorabooth.pocket.canvas import Light, Pattern, make_canvas
from lorabooth.pocket.fittings import paint_accessory, paint_mark
from lorabooth.pocket.parts import Look
from lorabooth.pocket.raster import F32, Plane, clip01, column, smoothstep
from lorabooth.pocket.settings import Backdrop
from lorabooth.pocket.shapes import SHAPES
from lorabooth.pocket.styles import paint_over, sketch_over
from lorabooth.pocket.world import (
    ACCESSORIES,
    CLASSES,
    COLOURS,
    LIVE_CLASSES,
    MARKS,
    PATTERNS,
    PLACES,
    POSES,
    STYLES,
    Scene,
    Specimen,
    sample_scene,
    sample_specimen,
)

__all__ = [
    "ACCESSORIES",
    "CLASSES",
    "COLOURS",
    "LIVE_CLASSES",
    "MARKS",
    "PATTERNS",
    "PLACES",
    "POSES",
    "STYLES",
    "Scene",
    "Specimen",
    "body_mask",
    "caption",
    "full_caption",
    "render",
    "sample_scene",
    "sample_specimen",
]


def _draw_body(scene: Scene, backdrop: Backdrop, pixels_per_unit: float) -> tuple[Plane, Plane]:
    """Return the lit body's colours (3, h, w) and coverage (h, w) on its own patch."""
    s = scene.specimen
    angle, strength = scene.light
    turned = angle - scene.rotation_rad
    lu, lv = 0.62 * math.cos(turned) * (-1.0 if scene.flip else 1.0), 0.62 * math.sin(turned)
    ambient = min(backdrop.ambient + 0.2 * (1.0 - strength), 0.9)
    plain = s.pattern == "plain"
    frequency = (2.3 if s.pattern == "checkered" else 1.6) + 0.7 * s.pattern_scale
    if s.pattern == "dotted":
        frequency += 0.35
    canvas = make_canvas(
        (-1.16, 1.16, -1.0, 1.5 if scene.accessory == "red hat" else 1.1),
        pixels_per_unit,
        scene.rotation_rad,
        scene.flip,
        light=Light((lu, lv, math.sqrt(1.0 - lu * lu - lv * lv)), ambient, backdrop.rim),
        pattern=Pattern(
            s.pattern,
            s.body_rgb,
            s.body_rgb if plain else s.second_rgb,
            frequency,
            s.pattern_phase,
            s.pattern_angle_rad,
        ),
    )
    anchors = SHAPES[s.class_name](canvas, Look(s.proportions, s.body_rgb, s.second_rgb, s.trim_rgb))
    if s.mark != "none":
        u, v, size = anchors.mark
        paint_mark(canvas, s.mark, (u + s.mark_offset[0], v + s.mark_offset[1], size), s.mark_rgb, s.body_rgb)
    if scene.accessory != "none":
        paint_accessory(canvas, scene.accessory, anchors)
    return canvas.rgb * column(backdrop.tint), canvas.alpha


def _contact(image: Plane, scene: Scene, backdrop: Backdrop, span: tuple[float, float], foot: float) -> None:
    """Lay the contact shadow, or dark water, under a body over columns `span` that ends at row `foot`."""
    size = image.shape[1]
    wide = max((span[1] - span[0]) * 0.5, 2.0)
    shift = -math.cos(scene.light[0]) * wide * 0.30
    tall = wide * 0.24 + 1.0
    y0, y1 = max(int(foot - 2.2 * tall), 0), min(int(foot + 2.2 * tall) + 1, size)
    x = ((np.arange(size, dtype=F32) + F32(0.5 - (span[0] + span[1]) / 2 - shift)) * F32(1 / (wide * 1.12)))[
        None, :
    ]
    y = ((np.arange(y0, y1, dtype=F32) + F32(0.5 - foot + tall * 0.35)) * F32(1 / tall))[:, None]
    falloff = smoothstep(1.35, 0.15, np.sqrt(x * x + y * y)) * backdrop.shadow
    if backdrop.floats:
        ring = np.abs(np.sqrt(x * x + y * y) - 1.22)
        falloff = falloff * 1.2
        patch = image[:, y0:y1]
        patch += falloff * (column((0.02, 0.14, 0.36)) - patch)
        patch += smoothstep(0.17, 0.0, ring) * 0.6 * (column((0.82, 0.95, 1.0)) - patch)
    else:
        image[:, y0:y1] *= 1.0 - falloff


def _composite(image: Plane, scene: Scene, backdrop: Backdrop) -> Plane:
    """Put the body into the frame, its lowest row on the scene's ground line; return its coverage."""
    size = image.shape[1]
    rgb, alpha = _draw_body(scene, backdrop, scene.scale * size / 2)
    frame_alpha = np.zeros((size, size), dtype=F32)
    rows, columns = np.flatnonzero(alpha.max(axis=1) > 0.5), np.flatnonzero(alpha.max(axis=0) > 0.5)
    sink = 0.085 * scene.scale * size if backdrop.floats else 0.0
    top = round(scene.y * size + sink) - int(rows[-1]) - 1
    left = round(scene.x * size - (int(columns[0]) + int(columns[-1]) + 1) / 2)
    foot = scene.y * size
    if backdrop.floats:
        y = np.arange(alpha.shape[0], dtype=F32)[:, None] + top
        x = np.arange(alpha.shape[1], dtype=F32)[None, :]
        line = foot + np.sin(x * (30.0 / size)) * (0.006 * size)
        alpha = alpha * (1.0 - 0.86 * smoothstep(-0.008 * size, 0.012 * size, y - line))
    _contact(image, scene, backdrop, (left + float(columns[0]), left + float(columns[-1]) + 1.0), foot)
    y0, y1 = max(top, 0), min(top + alpha.shape[0], size)
    x0, x1 = max(left, 0), min(left + alpha.shape[1], size)
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    patch = image[:, y0:y1, x0:x1]
    patch += alpha[cut] * (rgb[:, *cut] - patch)
    frame_alpha[y0:y1, x0:x1] = alpha[cut]
    return frame_alpha


def render(scene: Scene, size_px: int = 64) -> NDArray[np.uint8]:
    """Return the scene's picture, uint8 (size_px, size_px, 3); the same for the same scene.

    Drawn with analytic edges at twice the size and averaged down.

    Raises:
        ValueError: `size_px` is odd or less than 16.
    """
    if size_px < 16 or size_px % 2:
        raise ValueError(f"size_px must be even and at least 16, not {size_px}")
    size = 2 * size_px
    backdrop = BACKDROPS[scene.place](np.random.default_rng(scene.place_seed), size)
    image = backdrop.rgb
    ground = image.copy() if scene.style == "painting" else image
    alpha = _composite(image, scene, backdrop)
    if scene.style == "pencil sketch":
        image = sketch_over(image, alpha)
    elif scene.style == "painting":
        image = paint_over(image, ground, alpha)
    small = image.reshape(3, size_px, 2, size_px, 2)
    mean = (small[:, :, 0, :, 0] + small[:, :, 0, :, 1] + small[:, :, 1, :, 0] + small[:, :, 1, :, 1]) * F32(
        255 / 4
    )
    return np.ascontiguousarray((np.clip(mean, 0, 255) + F32(0.5)).astype(np.uint8).transpose(1, 2, 0))


def body_mask(scene: Scene, size_px: int = 64) -> Plane:
    """Return where the body is in the scene's picture: coverage in [0, 1], float32 (size_px, size_px)."""
    size = 2 * size_px
    backdrop = BACKDROPS[scene.place](np.random.default_rng(scene.place_seed), size)
    alpha = _composite(backdrop.rgb, scene, backdrop)
    return clip01(alpha.reshape(size_px, 2, size_px, 2).mean(axis=(1, 3), dtype=F32))


def _compose(
    scene: Scene, *, style: bool, pose: bool, colour: bool, pattern: bool, accessory: bool, place: bool
) -> str:
    s = scene.specimen
    words = [scene.pose] if pose and scene.pose != "upright" else []
    words += [s.colour] if colour else []
    words += [s.pattern] if pattern and s.pattern != "plain" else []
    words.append(s.class_name)
    text = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    if style:
        text = f"a {scene.style} of {text}"
    if accessory and scene.accessory != "none":
        text += " wearing " + ("" if scene.accessory == "sunglasses" else "a ") + scene.accessory
    return f"{text} {PLACES[scene.place]}" if place else text


def caption(scene: Scene, rng: np.random.Generator, *, drop: float = 0.35) -> str:
    """Return a caption that leaves out some of what is seen.

    Args:
        scene: what is described.
        rng: decides what is left out.
        drop: probability, in [0, 1], that colour, pattern and place are each left out; the words "a photo of"
            go half as often, an accessory or a pose with probability 0.1 at most, another style never.
    """
    keep = rng.random(6)
    rare = min(drop, 0.1)
    return _compose(
        scene,
        style=scene.style != "photo" or keep[0] >= drop * 0.5,
        pose=keep[1] >= rare,
        colour=keep[2] >= drop,
        pattern=keep[3] >= drop,
        accessory=keep[4] >= rare,
        place=keep[5] >= drop,
    )


def full_caption(scene: Scene) -> str:
    """Return the caption that names everything a caption can name."""
    return _compose(scene, style=True, pose=True, colour=True, pattern=True, accessory=True, place=True)
