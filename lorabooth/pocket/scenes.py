"""The pocket world: specimens, scenes, their captions and their pictures.

A specimen is one particular thing (this mug, that cat): its proportions, two colours, pattern, trim and mark. A caption
names its class, main colour and pattern at most, so which specimen it is must be learned from pictures. A scene puts a
specimen into a place, a style, a pose and perhaps an accessory. Everything is a pure function of the scene.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorabooth.pocket.backdrops import BACKDROPS, Backdrop
from lorabooth.pocket.fittings import paint_accessory, paint_mark
from lorabooth.pocket.parts import Look
from lorabooth.pocket.raster import F32, Light, Pattern, Plane, Rgb, clip01, column, make_canvas, smoothstep
from lorabooth.pocket.shapes import SHAPES
from lorabooth.pocket.styles import paint_over, sketch_over

CLASSES: tuple[str, ...] = tuple(SHAPES)
LIVE_CLASSES: tuple[str, ...] = ("cat", "duck", "fish")
COLOURS: dict[str, Rgb] = {
    "red": (0.88, 0.13, 0.13),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.18, 0.66, 0.22),
    "teal": (0.05, 0.66, 0.66),
    "blue": (0.15, 0.33, 0.90),
    "purple": (0.52, 0.20, 0.75),
    "pink": (0.98, 0.48, 0.72),
    "brown": (0.48, 0.28, 0.14),
    "black": (0.13, 0.13, 0.15),
    "white": (0.95, 0.95, 0.94),
}
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
PLACES: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "wooden floor": "on a wooden floor",
    "brick wall": "in front of a brick wall",
    "night": "at night",
    "desert": "in the desert",
    "water": "floating on water",
    "pink fabric": "on pink fabric",
    "cobblestones": "on cobblestones",
}
ACCESSORIES: tuple[str, ...] = ("none", "red hat", "striped scarf", "sunglasses")
STYLES: tuple[str, ...] = ("photo", "pencil sketch", "painting")
POSES: tuple[str, ...] = ("upright", "tilted", "upside down")
MARKS: tuple[str, ...] = ("none", "star", "heart", "ring", "bolt")


@dataclass(frozen=True, slots=True)
class Specimen:
    """One particular thing, the same in every scene it is in.

    Attributes:
        class_name: one of `CLASSES`.
        colour, second_colour, trim: names in `COLOURS`; main, pattern and trim colour.
        pattern: one of `PATTERNS`.
        proportions: six numbers in [0, 1] that the class's shape reads.
        pattern_scale, pattern_phase: size and shift of the pattern, in [0, 1].
        pattern_angle_rad: direction of the pattern.
        mark, mark_colour: the emblem, one of `MARKS`, and its colour's name.
        mark_offset: shift of the emblem in object units.
        body_rgb, second_rgb, trim_rgb, mark_rgb: the exact colours, in [0, 1].
    """

    class_name: str
    colour: str
    second_colour: str
    trim: str
    pattern: str
    proportions: tuple[float, ...]
    pattern_scale: float
    pattern_phase: float
    pattern_angle_rad: float
    mark: str
    mark_colour: str
    mark_offset: tuple[float, float]
    body_rgb: Rgb
    second_rgb: Rgb
    trim_rgb: Rgb
    mark_rgb: Rgb


@dataclass(frozen=True, slots=True)
class Scene:
    """A specimen in a place, and how it is shown.

    Attributes:
        specimen: what is shown.
        place, style, accessory, pose: names from the vocabulary.
        x: the object's middle across the frame, in [0, 1].
        y: the line on which the object stands, from the top, in [0, 1].
        scale: the object's height as a share of the frame's.
        rotation_rad: turn, counter-clockwise.
        flip: mirrored left to right.
        light: (angle from the right over the top in radians, strength in [0, 1]).
        place_seed: seed of the place's own variety.
    """

    specimen: Specimen
    place: str
    style: str
    accessory: str
    pose: str
    x: float
    y: float
    scale: float
    rotation_rad: float
    flip: bool
    light: tuple[float, float]
    place_seed: int


def _contrast(first: Rgb, second: Rgb) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)))


def _contrasting(rng: np.random.Generator, against: tuple[str, ...], least: float = 0.55) -> str:
    names = [n for n in COLOURS if all(_contrast(COLOURS[n], COLOURS[a]) >= least for a in against)]
    return names[int(rng.integers(len(names)))]


def _jittered(rng: np.random.Generator, name: str) -> Rgb:
    shift = rng.uniform(-0.035, 0.035, 3)
    r, g, b = (min(max(part + float(s), 0.06), 0.99) for part, s in zip(COLOURS[name], shift, strict=True))
    return r, g, b


def sample_specimen(rng: np.random.Generator, class_name: str | None = None) -> Specimen:
    """Draw a specimen, of the given class or of any."""
    class_name = CLASSES[int(rng.integers(len(CLASSES)))] if class_name is None else class_name
    colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
    pattern = PATTERNS[int(rng.choice(4, p=[0.37, 0.21, 0.21, 0.21]))]
    # a neutral second colour leaves no doubt which colour the caption names
    neutral = colour not in ("black", "white") and rng.random() < 0.5
    second = (
        ("white" if rng.random() < 0.65 or colour == "brown" else "black")
        if neutral
        else _contrasting(rng, (colour,))
    )
    if _contrast(COLOURS[colour], COLOURS[second]) < 0.5:
        second = _contrasting(rng, (colour,))
    trim = _contrasting(rng, (colour,), 0.45)
    mark = MARKS[int(rng.choice(5, p=[0.45, 0.1375, 0.1375, 0.1375, 0.1375]))]
    mark_colour = _contrasting(rng, (colour,), 0.7)
    angle = (0.0, 0.0, math.pi / 2, math.pi / 4, -math.pi / 4)[int(rng.integers(5))]
    if pattern != "striped":
        angle = 0.0 if abs(angle) > 1.0 else angle
    return Specimen(
        class_name=class_name,
        colour=colour,
        second_colour=second,
        trim=trim,
        pattern=pattern,
        proportions=tuple(float(v) for v in rng.random(6)),
        pattern_scale=float(rng.random()),
        pattern_phase=float(rng.random()),
        pattern_angle_rad=angle + float(rng.uniform(-0.12, 0.12)),
        mark=mark,
        mark_colour=mark_colour,
        mark_offset=(float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.05))),
        body_rgb=_jittered(rng, colour),
        second_rgb=_jittered(rng, second),
        trim_rgb=_jittered(rng, trim),
        mark_rgb=_jittered(rng, mark_colour),
    )


def sample_scene(
    rng: np.random.Generator,
    specimen: Specimen | None = None,
    *,
    class_name: str | None = None,
    place: str | None = None,
    style: str | None = None,
    accessory: str | None = None,
    pose: str | None = None,
) -> Scene:
    """Draw a scene; what is given is kept, the rest is drawn (80 % photos, 75 % bare, 80 % upright)."""
    specimen = sample_specimen(rng, class_name) if specimen is None else specimen
    place = tuple(PLACES)[int(rng.integers(len(PLACES)))] if place is None else place
    style = STYLES[int(rng.choice(3, p=[0.8, 0.1, 0.1]))] if style is None else style
    accessory = (
        ACCESSORIES[int(rng.choice(4, p=[0.75, 0.09, 0.08, 0.08]))] if accessory is None else accessory
    )
    pose = POSES[int(rng.choice(3, p=[0.8, 0.12, 0.08]))] if pose is None else pose
    rotation = float(rng.uniform(-0.09, 0.09))
    side = 1.0 if rng.random() < 0.5 else -1.0
    tilt = float(rng.uniform(0.40, 0.65))
    if pose == "tilted":
        rotation = side * tilt
    elif pose == "upside down":
        rotation += math.pi
    scale = float(rng.uniform(0.56, 0.80))
    if accessory == "red hat":
        scale *= 0.88
    if pose == "tilted":
        scale *= 0.92
    room = max(0.5 - scale * 0.56, 0.0)
    x = 0.5 + float(rng.uniform(-1.0, 1.0)) * min(room, 0.15)
    low, high = max(0.78, min(scale * 1.24, 0.92)), 0.95
    return Scene(
        specimen=specimen,
        place=place,
        style=style,
        accessory=accessory,
        pose=pose,
        x=x,
        y=float(rng.uniform(low, high)),
        scale=scale,
        rotation_rad=rotation,
        flip=bool(rng.random() < 0.5),
        light=(float(rng.uniform(0.7, 2.45)), float(rng.uniform(0.75, 1.0))),
        place_seed=int(rng.integers(2**31)),
    )


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
    """Lay the contact shadow, or the dark water, under a body that covers columns `span` and ends at row `foot`."""
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
    """Put the body into the frame, its lowest covered row on the scene's ground line; return its coverage there."""
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
        drop: probability, in [0, 1], that colour, pattern and place are each left out; the words "a photo of" go half
            as often, an accessory or a pose with probability 0.1 at most, another style never.
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
