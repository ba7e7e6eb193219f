"""The published configs of well-known bases: full-size models by architecture, without a download.

SD1.5 and SD2.1 are those that the package loads single-file checkpoints by.
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

PACKAGED = {"sd15": "sd1", "sd21": "sd2"}
"""Name here -> folder of configs within the package."""
COMPONENTS = ("unet", "vae", "text_encoder", "scheduler")


def configs(name: str) -> dict[str, dict[str, Any]]:
    """Component -> its config."""
    root = resources.files("lorabooth.families") / "configs" / PACKAGED[name]
    found = {}
    for component in COMPONENTS:
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        found[component] = json.loads((root / component / file).read_text(encoding="utf-8"))
    return found


def write_config_folder(folder: Path, name: str) -> Path:
    """A diffusers folder of configs alone: no weights, and no vocabulary.

    Args:
        folder: made anew.
        name: "sd15" or "sd21".

    Returns:
        `folder`.
    """
    with resources.as_file(resources.files("lorabooth.families") / "configs" / PACKAGED[name]) as packaged:
        shutil.copytree(packaged, folder)
    return folder
