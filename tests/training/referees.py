"""What measures checkpoints in tests: real small models, or figures that a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lorabooth.api
from lorabooth.training.studio import Marks, Referee
from tests.evaluation.tiny_backbones import make_clip, make_vit

# One prompt, one image: what is drawn costs a sampler step.
FEW = ("run.select_prompts=['a photo of a {token} {noun} in the snow']", "run.select_images=1")


def real(folder: Path) -> tuple[str, ...]:
    """Overrides: a small ViT and a small CLIP, made once in a folder."""
    for name, make in (("vit", make_vit), ("clip", make_clip)):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            make(folder / name)
    return (f"evaluation.dino={folder / 'vit'}", f"evaluation.clip={folder / 'clip'}", *FEW)


def scripted(monkeypatch: pytest.MonkeyPatch, dino: Sequence[float], clip_t: float = 0.5) -> list[int]:
    """From now on checkpoints get these marks, in order; the list that is returned counts them."""
    given: list[int] = []

    def marks(photos: Sequence[Any], shots: Sequence[Any], images: Sequence[Any]) -> Marks:
        assert len(shots) == len(images) > 0
        assert photos
        given.append(1)
        return Marks(dino[len(given) - 1], clip_t)

    names = {"dino": "script", "clip": "script"}
    monkeypatch.setattr(lorabooth.api, "referee", lambda recipe, reporter: Referee(names, marks))
    return given
