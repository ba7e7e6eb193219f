"""The demo's photos are the renderings that they are said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import lorabooth.pocket
from lorabooth.pocket.photos import demo_scenes, write_photos

SHIPPED = Path(lorabooth.pocket.__file__).parent / "demo" / "photos"


def test_the_shipped_photos_are_made_by_the_code(tmp_path: Path) -> None:
    made = write_photos(tmp_path)
    assert [path.name for path in made] == sorted(path.name for path in SHIPPED.iterdir())
    for path in made:
        ours, shipped = (np.asarray(Image.open(p), np.int16) for p in (path, SHIPPED / path.name))
        # Another numpy may round a pixel differently.
        assert np.abs(ours - shipped).max() <= 2, path.name


def test_one_mug_in_five_places() -> None:
    scenes = list(demo_scenes())
    assert len({scene.specimen for scene in scenes}) == 1
    assert len({scene.place for scene in scenes}) == 5
