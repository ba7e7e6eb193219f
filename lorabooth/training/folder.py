"""The run folder: where things are in it, whether it is this run's, another's or free, and writing there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.prompts import slug
from lorabooth.recipe import Recipe
from lorabooth.recipe.io import differences, dump, load
from lorabooth.training import identity as identities
from lorabooth.training.identity import Identity
from lorabooth.training.lock import RunLock


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run's files; design.md section 2 says what each is."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The effective recipe."""
        return self.root / "recipe.toml"

    @property
    def identity(self) -> Path:
        """Digests of what it is trained on."""
        return self.root / "identity.json"

    @property
    def facts(self) -> Path:
        """Versions, device, choices, timings, peak memory."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """A line per step."""
        return self.root / "metrics.jsonl"

    @property
    def selection(self) -> Path:
        """A line per measured checkpoint; absent where the last one is taken."""
        return self.root / "selection.jsonl"

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


def out_of(out: Path | None, recipe: Recipe, *, fresh: bool = False) -> Path:
    """The folder of a run: the one that is given, else the recipe's, else `default_out`.

    Args:
        out: given beside the recipe.
        recipe: the effective one.
        fresh: if it is taken, the next free one beside it.
    """
    if out is None:
        out = default_out(recipe) if recipe.run.out == "auto" else Path(recipe.run.out)
    return fresh_beside(out) if fresh else out


def fresh_beside(out: Path) -> Path:
    """`out` if nothing is there, else out-2, out-3, ..."""
    place, number = out, 1
    while place.exists() and (not place.is_dir() or _contents(place)):
        number += 1
        place = out.with_name(f"{out.name}-{number}")
    return place


def check(out: Path, recipe: Recipe, identity: Identity) -> RunFolder:
    """Whether the folder is free, or holds a run of this recipe on these photos and this base.

    Nothing in it is touched.

    Args:
        out: the run's folder; need not exist.
        recipe: the effective recipe, without "auto".
        identity: of what it is trained on.

    Raises:
        RecipeError: the folder holds another run (the differences are named), or files that are no run.
    """
    folder = RunFolder(out)
    if folder.recipe.is_file():
        _require_same(folder, recipe, identity)
    elif out.exists() and not out.is_dir():
        raise RecipeError(f"run.out: {out} is a file", "Give a folder.")
    elif out.is_dir() and _contents(out):
        raise RecipeError(f"run.out: {out} is not empty and holds no run", "Give another --out, or empty it.")
    return folder


def changed_keys(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What a run goes on with that was different when it began, in words; empty for a new run."""
    if not folder.recipe.is_file():
        return []
    found = differences(load(folder.recipe), recipe, changeable=True)
    return [f"{key}: {old!r} before, {new!r} now" for key, old, new in found if key != "run.out"]


def _require_same(folder: RunFolder, recipe: Recipe, identity: Identity) -> None:
    then = identities.parse(read_json(folder.identity))
    found = differences(load(folder.recipe), recipe)
    if then is not None:  # where photos and base lie may change; what they are may not
        found = [change for change in found if not identities.is_place(change[0], then, identity)]
    lines = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in found]
    if lines:
        raise RecipeError(
            "\n".join([f"{folder.root} holds a run of another recipe:", *lines]),
            "Give another --out, or --fresh to start beside it, or take the changes back to go on.",
        )
    changes = identities.changes(then, identity) if then is not None else []
    if changes:
        told = [f"  {line}" for line in identities.short(changes)]
        raise RecipeError(
            "\n".join([f"{folder.root} holds a run on other files than are there now:", *told]),
            "Give another --out, or --fresh to start beside it, or put the files back to go on.",
        )


def _contents(out: Path) -> list[Path]:
    """What is in a folder, without the lock and without what a killed process had only begun to write."""
    return [
        entry
        for entry in out.iterdir()
        if not entry.name.startswith(".lock") and not durable.is_temporary(entry.name)
    ]


def check_writable(out: Path) -> None:
    """Create the folder and prove that a file can be written there.

    Raises:
        RecipeError: it cannot.
        TrainingError: the disk is full.
    """
    # The name of a temporary of ours, so that a process killed here leaves nothing that is in the way.
    probe = out / f".writable.{os.getpid()}.tmp"
    try:
        durable.make_folder(out)
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if durable.is_full(error):
            raise not_written(out, error) from error
        raise RecipeError(
            f"run.out: {out} cannot be written ({error.strerror or error})", "Give another --out."
        ) from error


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """The run folder, for this process alone.

    Raises:
        RecipeError: another process holds it, or it cannot be written.
        TrainingError: the disk is full.
    """
    lock = ExitStack()
    try:
        lock.enter_context(RunLock(folder.root))
    except RecipeError as error:
        if durable.is_full(error):
            raise not_written(folder.root, error) from error
        raise
    with lock:
        yield


def sweep(folder: RunFolder) -> None:
    """Remove what killed processes had only begun to write. The caller holds the folder.

    Raises:
        TrainingError: it cannot be removed.
    """
    with saving(folder.root):
        for place in (folder.root, folder.root / "checkpoints", folder.samples):
            durable.sweep_temporaries(place)
        for place in folder.samples.glob("*"):
            durable.sweep_temporaries(place)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """What the file system refuses while a run's file is written, as a training error.

    Raises:
        TrainingError: says which file, why, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: BaseException) -> TrainingError:
    """A run's file that cannot be written, and what to do about it."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = (root.strerror if isinstance(root, OSError) else "") or str(root)
    fix = "Free some space on its disk" if durable.is_full(error) else "Make it writable"
    return TrainingError(
        f"{path} cannot be written: {reason}.",
        f"{fix}; the same command then goes on from the last checkpoint, which is whole.",
    )


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write the effective recipe; paths within the run folder are written relative to it.

    Raises:
        TrainingError: it cannot be written.
    """
    own = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"out": str(folder.root.absolute())})}
    )
    with saving(folder.recipe):
        durable.replace(folder.recipe, dump(own, folder.root.absolute()).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        TrainingError: it cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with saving(path):
        durable.replace(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where the file is torn."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
