"""Images in files that tell what they show: prompt, seed and what else decides them, as PNG text chunks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth import durable

if TYPE_CHECKING:
    from PIL.Image import Image


def has_facts(path: Path, facts: Mapping[str, str]) -> bool:
    """Whether a file is a PNG image that tells exactly these facts about itself."""
    from PIL import Image as Pillow
    from PIL import PngImagePlugin, UnidentifiedImageError

    try:
        with Pillow.open(path, formats=("PNG",)) as image:
            return isinstance(image, PngImagePlugin.PngImageFile) and dict(image.text) == dict(facts)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False


def save_image(path: Path, image: Image, facts: Mapping[str, str]) -> None:
    """Write a PNG image that tells facts about itself, whole or not at all.

    Raises:
        RecipeError, TrainingError: see `durable.save`.
    """
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key, text in facts.items():
        texts.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    durable.save(path, buffer.getvalue())
