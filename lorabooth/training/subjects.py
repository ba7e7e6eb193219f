"""What is learned, in words: each subject's prompts, its photos, and the prompts of the previews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorabooth.data import records
from lorabooth.data.images import PhotoReport
from lorabooth.data.records import Scan
from lorabooth.errors import DataError
from lorabooth.prompts import class_prompt, instance_prompt
from lorabooth.recipe import Recipe
from lorabooth.recipe.rules import printable
from lorabooth.types import Record, Role


@dataclass(frozen=True, slots=True)
class Subject:
    """One subject with its prompts filled in.

    Attributes:
        name: "token noun", e.g. "qzx dog"; also the trigger words of the adapter.
        prompt: "a photo of a qzx dog".
        class_prompt: "a photo of a dog".
        folder: of its photos.
        captions: whether .txt files are read.
        placeholders: what "{token}" and "{noun}" stand for.
    """

    name: str
    prompt: str
    class_prompt: str
    folder: Path
    captions: bool
    placeholders: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Photos:
    """The subjects' photos, found and checked.

    Attributes:
        scans: by subject, in the recipe's order.
        report: of decoding all of them.
    """

    scans: tuple[Scan, ...]
    report: PhotoReport

    @property
    def records(self) -> tuple[Record, ...]:
        """All subjects' records."""
        return tuple(record for scan in self.scans for record in scan.records)

    def summary(self) -> str:
        """Used N of M per folder, and why."""
        return "\n".join(
            f"{scan.records[0].path.parent.name}: {scan.summary()}" for scan in self.scans if scan.records
        )


def subjects_of(recipe: Recipe) -> tuple[Subject, ...]:
    """Fill in the prompts of a recipe whose tokens are resolved."""
    found = []
    for section in recipe.subjects:
        own = recipe.prior.prompt
        found.append(
            Subject(
                name=f"{section.token} {section.noun}",
                prompt=instance_prompt(section.template, section.token, section.noun),
                class_prompt=class_prompt(section.template if own == "auto" else own, section.noun),
                folder=Path(section.images),
                captions=section.captions,
                placeholders={"token": section.token, "noun": section.noun},
            )
        )
    return tuple(found)


def scan_all(subjects: Sequence[Subject]) -> tuple[Scan, ...]:
    """List every subject's photos with their captions; reads no pixels.

    Raises:
        DataError: a folder is missing or empty, or a caption cannot be used.
    """
    return tuple(
        records.scan(
            subject.folder,
            role=Role.INSTANCE,
            subject=subject.name,
            prompt=subject.prompt,
            captions=subject.captions,
            placeholders=subject.placeholders,
        )
        for subject in subjects
    )


def as_class_examples(photos: Sequence[Record], subjects: Sequence[Subject]) -> tuple[Record, ...]:
    """The subject's own photos under the class prompt: what `distill` holds the model to."""
    prompts = {subject.name: subject.class_prompt for subject in subjects}
    return tuple(replace(photo, role=Role.CLASS, caption=prompts[photo.subject]) for photo in photos)


def class_records(folder_of: Mapping[str, Sequence[Path]], subjects: Sequence[Subject]) -> tuple[Record, ...]:
    """Records of generated class images.

    Args:
        folder_of: class prompt -> its images.
        subjects: those whose classes they are; two subjects of one class share one pool.
    """
    owner = {subject.class_prompt: subject.name for subject in reversed(subjects)}
    return tuple(
        Record(path=path, caption=prompt, role=Role.CLASS, subject=owner[prompt])
        for prompt, paths in folder_of.items()
        for path in paths
    )


def own_class_images(folder: Path, subjects: Sequence[Subject]) -> Scan:
    """The user's folder of class images (prior mode "images"), under the first subject's class prompt.

    Captions beside the images are not read: prior preservation is about the class prompt.
    """
    first = subjects[0]
    return records.scan(
        folder, role=Role.CLASS, subject=first.name, prompt=first.class_prompt, captions=False
    )


def preview_prompts(recipe: Recipe, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """The prompts that show how the run goes: the recipe's, or each subject's prompt and its class prompt."""
    if not recipe.run.sample_prompts:
        pairs = [prompt for subject in subjects for prompt in (subject.prompt, subject.class_prompt)]
        return tuple(dict.fromkeys(pairs))
    filled = []
    for template in recipe.run.sample_prompts:
        owners = subjects if "{token}" in template or "{noun}" in template else subjects[:1]
        for subject in owners:
            if "{token}" in template:
                filled.append(
                    instance_prompt(template, subject.placeholders["token"], subject.placeholders["noun"])
                )
            else:
                filled.append(class_prompt(template, subject.placeholders["noun"]))
    return tuple(dict.fromkeys(filled))


SELECTION_TEMPLATES = (
    "a photo of a {token} {noun} on the beach",
    "a photo of a {token} {noun} in the snow",
    "a photo of a {token} {noun} at night",
    "a painting of a {token} {noun}",
)
"""What every base can draw: three places and one other style."""


def selection_templates(recipe: Recipe) -> tuple[str, ...]:
    """The prompts that checkpoints are measured with; empty where the last one is taken."""
    if recipe.run.select == "last":
        return ()
    return recipe.run.select_prompts or SELECTION_TEMPLATES


def selection_prompts(recipe: Recipe, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """`selection_templates` filled in for every subject."""
    templates = selection_templates(recipe)
    filled = [filled_in(template, subject) for subject in subjects for template in templates]
    return tuple(dict.fromkeys(filled))


def filled_in(template: str, subject: Subject) -> str:
    """A template with a subject's token and noun."""
    return instance_prompt(template, subject.placeholders["token"], subject.placeholders["noun"])


def held_out(records: Sequence[Record], count: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(kept for training, kept from it): the last `count` of each subject, but never all of them.

    Args:
        records: of one role, in their order.
        count: per subject.
    """
    taken: set[Record] = set()
    for name in dict.fromkeys(record.subject for record in records):
        own = [record for record in records if record.subject == name]
        taken.update(own[len(own) - min(count, len(own) - 1) :])
    kept = tuple(record for record in records if record not in taken)
    return kept, tuple(record for record in records if record in taken)


def require_left_over(photos: Photos, held: int) -> None:
    """Whether something is left to train on.

    Args:
        photos: of all subjects.
        held: run.validation_photos.

    Raises:
        DataError: it holds all photos of a subject out.
    """
    for scan in photos.scans:
        if scan.records and held >= len(scan.records):
            folder, count = scan.records[0].path.parent.name, len(scan.records)
            raise DataError(
                f"run.validation_photos = {held} leaves none of the {count} photo(s) in {printable(folder)} "
                "to train on.",
                f"Give at most {count - 1}, add photos, or set it to 0: then the training photos serve.",
            )
