"""The run folder: where things are in it, and whether it is this recipe's, another's, or free."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.errors import RecipeError
from lorabooth.prompts import slug
from lorabooth.recipe import Recipe
from lorabooth.recipe.io import differences, dump, load


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run's files; design.md section 2 says what each is."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The effective recipe."""
        return self.root / "recipe.toml"

    @property
    def facts(self) -> Path:
        """Versions, device, choices, timings, peak memory."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """A line per step."""
        return self.root / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.root / "adapter.safetensors"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.root / "report.html"

    @property
    def samples(self) -> Path:
        """Sample images, a folder per step."""
        return self.root / "samples"

    def step_samples(self, step: int) -> Path:
        """Folder of the images drawn after `step`."""
        return self.samples / f"step-{step:06d}"

    def is_finished(self) -> bool:
        """Whether run.json says that the run came to its end."""
        return self.facts.is_file() and read_json(self.facts).get("status") == "finished"


def default_out(recipe: Recipe) -> Path:
    """runs/NOUN-TOKEN in the current folder, named after the first subject."""
    first = recipe.subjects[0]
    return Path("runs") / slug(f"{first.noun} {first.token}")


def fresh_beside(out: Path) -> Path:
    """`out` if nothing is there, else out-2, out-3, ..."""
    place, number = out, 1
    while place.exists() and any(place.iterdir()):
        number += 1
        place = out.with_name(f"{out.name}-{number}")
    return place


def claim(out: Path, recipe: Recipe) -> RunFolder:
    """Make the folder this recipe's, or find that it already is.

    Args:
        out: the run's folder; created with its parents.
        recipe: the effective recipe, without "auto".

    Raises:
        RecipeError: the folder cannot be written, holds another recipe's run (the differences are named),
            or holds files that are no run at all. Nothing in it is touched.
    """
    folder = RunFolder(out)
    if folder.recipe.is_file():
        changed = differences(load(folder.recipe), recipe)
        if changed:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in changed]
            raise RecipeError(
                "\n".join([f"{out} holds a run of another recipe:", *lines]),
                "Give another --out, or --fresh to start beside it, or take the changes back to go on.",
            )
    elif out.exists() and not out.is_dir():
        raise RecipeError(f"run.out: {out} is a file", "Give a folder.")
    elif out.is_dir() and any(not entry.name.startswith(".lock") for entry in out.iterdir()):
        raise RecipeError(f"run.out: {out} is not empty and holds no run", "Give another --out, or empty it.")
    check_writable(out)
    return folder


def check_writable(out: Path) -> None:
    """Create the folder and prove that a file can be written there.

    Raises:
        RecipeError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RecipeError(
            f"run.out: {out} cannot be written ({error.strerror or error})", "Give another --out."
        ) from error


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write the effective recipe; paths within the run folder are written relative to it."""
    own = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"out": str(folder.root.absolute())})}
    )
    durable.replace(folder.recipe, dump(own, folder.root.absolute()).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    durable.replace(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where the file is torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
