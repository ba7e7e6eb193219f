"""The demo's five photos: one mug, rendered in five places. Kept as PNG files; this is how they are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lorabooth.pocket.scenes import Scene, Specimen, render, sample_scene, sample_specimen

SPECIMEN_SEED = 1015
PLACES = ("wooden floor", "grass", "brick wall", "pink fabric", "cobblestones")
SIDE_PX = 256


def demo_specimen() -> Specimen:
    """The mug that the demo learns."""
    return sample_specimen(np.random.default_rng(SPECIMEN_SEED), "mug")


def demo_scenes() -> Iterator[Scene]:
    """The mug, standing upright in each place; scale, light and angle differ."""
    specimen = demo_specimen()
    for index, place in enumerate(PLACES):
        rng = np.random.default_rng((SPECIMEN_SEED, index))
        yield sample_scene(rng, specimen, place=place, style="photo", accessory="none", pose="upright")


def write_photos(folder: Path) -> list[Path]:
    """Write 01.png ... 05.png, 256 x 256.

    Args:
        folder: made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, scene in enumerate(demo_scenes(), start=1):
        path = folder / f"{index:02d}.png"
        Image.fromarray(render(scene, SIDE_PX)).save(path, optimize=True)
        paths.append(path)
    return paths
