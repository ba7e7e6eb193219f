"""The pocket world's vocabulary, its specimens and scenes, and how they are drawn by chance.

A specimen is one particular thing (this mug, that cat): its proportions, two colours, pattern, trim and mark.
A caption names its class, main colour and pattern at most, so which specimen it is must be learned from
pictures. A scene puts a specimen into a place, a style, a pose and perhaps an accessory.
"""

import math
from dataclasses import dataclass

import numpy as np

from lorabooth.pocket.raster import Rgb
from lorabooth.pocket.shapes import SHAPES

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
