"""Where the embedded base model lies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lorabooth.errors import BaseModelError


def pocket_dir() -> Path:
    """The folder of the embedded base: a `StableDiffusionPipeline` that diffusers opens.

    Raises:
        BaseModelError: this installation was made without the weights.
    """
    folder = Path(str(files("lorabooth.pocket"))) / "weights"
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            "The pocket base's weights are not in this installation.",
            "Reinstall the package, or make them with: lorabooth pocket build",
        )
    return folder
