"""The recipe that training benchmarks share; what a benchmark is about, it sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit


def write_recipe(path: Path, base: Path, photos: Path, settings: Mapping[str, object]) -> Path:
    """Write a recipe: one subject, rank 4, a fixed rate, nothing written on the way.

    Args:
        path: of the file.
        base: a diffusers folder.
        photos: of the subject.
        settings: dotted keys, as in {"optim.steps": 12}; paths as texts.

    Returns:
        `path`.
    """
    recipe: dict[str, Any] = {
        "model": {"base": base.as_posix()},
        "subjects": [{"images": photos.as_posix(), "noun": "dog", "token": "sks"}],
        "adapter": {"rank": 4},
        "optim": {"lr": 1e-4},
        "run": {"checkpoint_every": 0, "sample_count": 0},
    }
    for key, value in settings.items():
        section, name = key.split(".")
        recipe.setdefault(section, {})[name] = value
    path.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return path


def own_class_images(folder: Path) -> dict[str, object]:
    """Settings for class images that are there already: nothing is drawn while others are timed."""
    return {"prior.mode": "images", "prior.images": folder.as_posix()}
