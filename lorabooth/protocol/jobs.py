"""What a protocol folder is about: recipe, subjects, prompts; written down, so that it can go on.

    OUT/NAME/                       the run of one subject, with its evaluation
    OUT/protocol.json, .md, .html   the table
    OUT/.protocol/                  job.json, the base's own images, each subject's lock and ending

The second command in a folder must be about the same thing; more subjects may come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.errors import RecipeError
from lorabooth.protocol.measuring import CLASS_IMAGES, UNRELATED_IMAGES
from lorabooth.protocol.prompts import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    EvaluationPrompts,
    default_prompts,
    is_pocket,
    read_prompts,
)
from lorabooth.protocol.subjects import ProtocolSubject, SubjectsFolder, read_subjects
from lorabooth.recipe import CHANGEABLE, Recipe, SubjectSection, differences, from_mapping, load
from lorabooth.recipe.rules import printable
from lorabooth.recipe.text import parse, read

_FORMAT = 1
_ANY = SubjectSection(images="photos", noun="subject")
# What a recipe says of its subject, and each subject of the protocol says of itself.
_OF_SUBJECTS = ("subjects.images", "subjects.noun")


@dataclass(frozen=True, slots=True)
class Settings:
    """How subjects are measured.

    Attributes:
        images_per_prompt: seeds of each of a subject's prompts.
        class_images: seeds of the class prompt, for PRES.
        unrelated_images: seeds of each unrelated prompt, for drift.
        device: of the images and the measuring; training goes where accelerate says.
        title: of the table.
    """

    images_per_prompt: int = 4
    class_images: int = CLASS_IMAGES
    unrelated_images: int = UNRELATED_IMAGES
    device: str = "auto"
    title: str = "DreamBooth protocol"


@dataclass(frozen=True, slots=True)
class Asked:
    """A subject and the templates that it is asked."""

    subject: ProtocolSubject
    templates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A protocol.

    Attributes:
        out: its folder.
        recipe: with one subject, whose photos and noun stand for those of each.
        asked: all subjects that the folder is about.
        wanted: names of those that this command is about.
        settings: how they are measured.
    """

    out: Path
    recipe: Recipe
    asked: tuple[Asked, ...]
    wanted: tuple[str, ...]
    settings: Settings

    @property
    def state(self) -> Path:
        """Where job.json, locks and endings are."""
        return self.out / ".protocol"

    @property
    def todo(self) -> tuple[Asked, ...]:
        """The subjects that this command is about."""
        return tuple(one for one in self.asked if one.subject.name in self.wanted)

    def run_folder(self, subject: ProtocolSubject) -> Path:
        """Of one subject."""
        return self.out / subject.name

    def recipe_for(self, subject: ProtocolSubject) -> Recipe:
        """The recipe with its subject replaced."""
        section = self.recipe.subjects[0].model_copy(
            update={"images": str(subject.photos.absolute()), "noun": subject.noun}
        )
        return self.recipe.model_copy(update={"subjects": (section,)})

    def prompts_for(self, asked: Asked) -> EvaluationPrompts:
        """What a subject is asked, what PRES and drift need included."""
        rest = default_prompts(self.recipe.model.base, asked.subject.noun)
        return EvaluationPrompts(asked.templates, rest.classes, rest.unrelated)

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        s = self.settings
        return {
            "format": _FORMAT,
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "settings": {name: getattr(s, name) for name in Settings.__dataclass_fields__},
            "subjects": [
                {
                    "name": one.subject.name,
                    "noun": one.subject.noun,
                    "live": one.subject.live,
                    "photos": str(one.subject.photos.absolute()),
                    "templates": list(one.templates),
                }
                for one in self.asked
            ],
        }


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe for `make_job`; it may leave [[subjects]] out.

    Raises:
        RecipeError: it cannot be read, or is wrong.
    """
    raw = parse(read(path), path)
    filler = [] if raw.get("subjects") else ["subjects.0.images=photos", "subjects.0.noun=subject"]
    return load(path, [*filler, *overrides])


def make_job(
    root: Path,
    recipe: Recipe,
    out: Path,
    *,
    settings: Settings | None = None,
    only: Sequence[str] = (),
    told: Mapping[str, str] | None = None,
    prompts: Path | None = None,
    templates: Sequence[str] = (),
) -> Job:
    """Put a protocol together; nothing is written.

    Args:
        root: folder of subject folders.
        recipe: see `load_recipe`.
        out: folder of the protocol: free, or of the same one.
        settings: how subjects are measured.
        only: names of the subjects that are wanted; empty is all.
        told: name -> "NOUN" or "NOUN, live".
        prompts: file of templates for every subject. None: DreamBench's file beside the subjects, else what
            the base is asked by default.
        templates: instead of a file.

    Raises:
        RecipeError: the recipe does not fit many subjects, or the folder holds something else.
        DataError: subjects cannot be read.
    """
    require_for_many(recipe)
    found = read_subjects(root, only=only, told=told)
    given = tuple(templates) or (() if prompts is None else read_prompts(prompts, recipe.model.base).subject)
    asked = tuple(
        Asked(subject, given or _templates(found, subject, recipe.model.base)) for subject in found.subjects
    )
    section = _ANY.model_copy(
        update={"token": recipe.subjects[0].token, "template": recipe.subjects[0].template}
    )
    recipe = recipe.model_copy(update={"subjects": (section,)})
    names = tuple(subject.name for subject in found.subjects)
    return _joined(Job(out, recipe, asked, names, settings or Settings()))


def require_for_many(recipe: Recipe) -> None:
    """Whether a recipe's other keys can be those of any subject.

    Raises:
        RecipeError: it has several subjects, captions, or class images or a class prompt of one class.
    """
    subjects, prior = recipe.subjects, recipe.prior
    problems = []
    if len(subjects) > 1:
        problems.append(f"it has {len(subjects)} subjects: leave one, or none")
    if any(subject.captions for subject in subjects):
        problems.append("subjects.captions is on: photos of a protocol have no captions")
    if prior.mode == "images":
        problems.append('prior.mode is "images": one folder of class images cannot serve every class')
    if prior.prompt != "auto" and "{noun}" not in prior.prompt and prior.mode != "none":
        problems.append('prior.prompt has no "{noun}": it would be the prompt of every class')
    if problems:
        raise RecipeError(
            "\n".join(["the recipe cannot be used for many subjects:", *(f"  {text}" for text in problems)]),
            "Every subject is trained with this recipe, its own photos and its own noun in place of the "
            "recipe's.",
        )


def read_job(out: Path) -> Job | None:
    """The protocol in a folder, or None if there is none.

    Raises:
        RecipeError: job.json cannot be read.
    """
    path = out / ".protocol" / "job.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != _FORMAT:
            raise ValueError(f"its format is {raw['format']}")
        asked = tuple(
            Asked(
                ProtocolSubject(one["name"], one["noun"], one["live"], Path(one["photos"])),
                tuple(one["templates"]),
            )
            for one in raw["subjects"]
        )
        names = tuple(one.subject.name for one in asked)
        recipe = from_mapping(raw["recipe"], (), "the protocol's recipe")
        return Job(out, recipe, asked, names, Settings(**raw["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}).", "Delete it to begin anew there; the runs stay."
        ) from error


def write_job(job: Job) -> None:
    """Write job.json.

    Raises:
        RecipeError, TrainingError: they cannot be written.
    """
    with durable.user_errors(job.out):
        durable.make_folder(job.state)
        durable.sweep_temporaries(job.state)
        durable.sweep_temporaries(job.out)
    text = json.dumps(job.to_json(), indent=1, ensure_ascii=False) + "\n"
    durable.save(job.state / "job.json", text.encode())


def require_free(out: Path) -> None:
    """Whether a folder is free for a protocol, or holds one.

    Raises:
        RecipeError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out: {printable(str(out))} is a file", "Give a folder.")
    if out.is_dir() and not (out / ".protocol").is_dir() and any(out.iterdir()):
        raise RecipeError(
            f"--out: {printable(str(out))} is not empty and holds no protocol", "Give another --out."
        )


def _templates(found: SubjectsFolder, subject: ProtocolSubject, base: str) -> tuple[str, ...]:
    if found.published is not None:
        return found.published.prompts(live=subject.live)
    if is_pocket(base):
        return default_prompts(base, subject.noun).subject
    return LIVE_PROMPTS if subject.live else OBJECT_PROMPTS


def _joined(job: Job) -> Job:
    """With the subjects that the folder is about already, in the order of their names.

    Raises:
        RecipeError: it is about something else.
    """
    before = read_job(job.out)
    if before is None or not any(before.run_folder(one.subject).exists() for one in before.asked):
        require_free(job.out)
        return job  # where nothing was trained, nothing can be mixed up
    lines = [
        f"  {key}: {old!r} there, {new!r} now"
        for key, old, new in differences(before.recipe, job.recipe, changeable=True, ignore=_OF_SUBJECTS)
        # How long a run trains decides what it is compared with; what else may change, may change here.
        if key == "optim.steps" or key not in CHANGEABLE
    ]
    for name in ("images_per_prompt", "class_images", "unrelated_images"):
        old, new = getattr(before.settings, name), getattr(job.settings, name)
        lines += [f"  {name}: {old} there, {new} now"] if old != new else []
    known = {one.subject.name: one for one in before.asked}
    for one in job.asked:
        lines += _changes(known.get(one.subject.name), one)
    if lines:
        raise RecipeError(
            "\n".join([f"{printable(str(job.out))} holds another protocol:", *lines]),
            "Give another --out, or take the changes back to go on.",
        )
    known |= {one.subject.name: one for one in job.asked}
    return replace(job, asked=tuple(known[name] for name in sorted(known)))


def _changes(old: Asked | None, new: Asked) -> list[str]:
    if old is None:
        return []
    name = new.subject.name
    lines = []
    if old.subject.noun != new.subject.noun:
        lines.append(f"  {name}: a {old.subject.noun} there, a {new.subject.noun} now")
    if old.templates != new.templates:
        lines.append(f"  {name}: {len(old.templates)} prompts there, {len(new.templates)} others now")
    return lines
