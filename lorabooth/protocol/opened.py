"""A finished run, opened to be measured: everything that can be wrong with it is said before a base loads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from lorabooth.data.images import decode
from lorabooth.errors import AdapterError, DataError, RecipeError
from lorabooth.evaluation.sample import adapter_digest
from lorabooth.recipe import Recipe, load
from lorabooth.training import identity
from lorabooth.training.folder import RunFolder, read_json
from lorabooth.training.subjects import Subject, scan_all, subjects_of
from lorabooth.types import Record


@dataclass(frozen=True)
class OpenRun:
    """A run that can be measured.

    Attributes:
        folder: of the run.
        recipe: effective.
        facts: run.json.
        subjects: with their prompts.
        photos: by subject, in the recipe's order.
        photo_digests: of each subject's photos together; tells whether two runs learned from the same.
        adapter: digest of the adapter's file.
        metadata: what the file says about itself.
        notes: what is not as it was when the run was trained.
    """

    folder: RunFolder
    recipe: Recipe
    facts: Mapping[str, Any]
    subjects: tuple[Subject, ...]
    photos: tuple[tuple[Record, ...], ...]
    photo_digests: tuple[str, ...]
    adapter: str
    metadata: Metadata
    notes: tuple[str, ...]

    def pixels(self, index: int) -> list[Image.Image]:
        """The photos of a subject, upright, RGB.

        Raises:
            DataError: one cannot be decoded.
        """
        return [Image.fromarray(decode(record.path)) for record in self.photos[index]]


def open_run(run: Path, *, base: str | None = None, images: Path | None = None) -> OpenRun:
    """Read a run folder, and require that it is finished and that its photos are there.

    Args:
        run: the folder.
        base: where the base is now, if not where the recipe says.
        images: where the photos are now, likewise; for a run of one subject.

    Raises:
        RecipeError: it is no run folder, the run is not finished, or its recipe cannot be read.
        AdapterError: its adapter is gone or broken.
        DataError: its photos are gone or cannot be read.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise RecipeError(
            f"{run} is no run folder: it has no recipe.toml.", "Give the folder that `lorabooth train` wrote."
        )
    recipe = _moved(load(folder.recipe), base, images)
    facts = read_json(folder.facts)
    if facts.get("status") != "finished":
        told = f"its run.json says {facts['status']!r}" if "status" in facts else "it has no run.json yet"
        raise RecipeError(
            f"{run} is not finished: {told}.",
            f"Let it come to its end first: lorabooth train {folder.recipe}",
        )
    if not folder.adapter.is_file():
        raise AdapterError(
            f"{folder.adapter} is gone.",
            f"Put it back, or write it again from the last checkpoint: lorabooth train {folder.recipe}",
        )
    stored = open_adapter(folder.adapter)
    stored.tensors()  # broken files and NaN, before anything else is loaded
    subjects = subjects_of(recipe)
    photos, digests, notes = _photos(folder, subjects)
    return OpenRun(
        folder=folder,
        recipe=recipe,
        facts=facts,
        subjects=subjects,
        photos=photos,
        photo_digests=digests,
        adapter=adapter_digest(folder.adapter),
        metadata=stored.metadata,
        notes=notes,
    )


def _moved(recipe: Recipe, base: str | None, images: Path | None) -> Recipe:
    if base is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": base})})
    if images is not None:
        if len(recipe.subjects) != 1:
            raise RecipeError(
                f"--images: the run has {len(recipe.subjects)} subjects; one folder cannot be all of them.",
                "Put the photos where the run's recipe.toml says.",
            )
        moved = recipe.subjects[0].model_copy(update={"images": str(images)})
        recipe = recipe.model_copy(update={"subjects": (moved,)})
    return recipe


def _photos(
    folder: RunFolder, subjects: tuple[Subject, ...]
) -> tuple[tuple[tuple[Record, ...], ...], tuple[str, ...], tuple[str, ...]]:
    """The photos that the run was trained on, a digest of each subject's, and notes.

    Raises:
        DataError: some are gone.
    """
    then = identity.parse(read_json(folder.identity))
    known = {} if then is None else then.photos
    photos: list[tuple[Record, ...]] = []
    digests: list[str] = []
    notes: list[str] = []
    for number, scan in enumerate(scan_all(subjects)):
        own = {key: digest for key, digest in known.items() if key.startswith(f"{number}/")}
        by_name = {identity.photo_name(number, record.path): record for record in scan.records}
        place = subjects[number].folder
        if lost := [key.partition("/")[2] for key in own if key not in by_name]:
            raise DataError(
                f"{place}: photos that the run was trained on are gone: {', '.join(lost)}",
                "Put them back, or say where they are now: --images FOLDER.",
            )
        # A photo that came later is none that the subject was learned from.
        chosen = {key: record for key, record in by_name.items() if not own or key in own}
        contents = {key: identity.file_digest(record.path) for key, record in chosen.items()}
        if changed := [key.partition("/")[2] for key in own if contents[key] != own[key]]:
            notes.append(f"photos have changed since the run was trained: {', '.join(changed)}")
        photos.append(tuple(chosen.values()))
        digests.append(hashlib.sha256("".join(sorted(contents.values())).encode()).hexdigest()[:16])
    return tuple(photos), tuple(digests), tuple(notes)
