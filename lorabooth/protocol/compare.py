"""Evaluations side by side: what differs from the first, image by image of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth.errors import RecipeError
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.metrics import Measured, difference
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.results import Evaluation, SubjectEvaluation, read_evaluation
from lorabooth.protocol.tables import Row, backbone_line, markdown_table, terminal_table

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = 1


@dataclass(frozen=True)
class SubjectComparison:
    """One subject in all runs.

    Attributes:
        subject: as the first run calls it.
        real: of the first run's photos.
        scores: of each run, with the adapter on.
        differences: of each run but the first, from the first.
    """

    subject: str
    real: Scores
    scores: tuple[Scores, ...]
    differences: tuple[Scores, ...]


@dataclass(frozen=True)
class Comparison:
    """Several evaluations side by side.

    Attributes:
        names: of the runs, all different.
        subjects: one entry per subject.
        backbones: that all were measured with.
        notes: what differs besides the adapter.
    """

    names: tuple[str, ...]
    subjects: tuple[SubjectComparison, ...]
    backbones: Mapping[str, str]
    notes: tuple[str, ...]

    def rows(self, subject: SubjectComparison) -> tuple[list[Row], int]:
        """A table's rows, and from which of them on they are differences."""
        first = [("real images", subject.real), *zip(self.names, subject.scores, strict=True)]
        later = [
            (f"{name} − {self.names[0]}", scores)
            for name, scores in zip(self.names[1:], subject.differences, strict=True)
        ]
        return [*first, *later], len(first)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "schema": SCHEMA,
            "kind": "lorabooth comparison",
            "runs": list(self.names),
            "backbones": dict(self.backbones),
            "notes": list(self.notes),
            "subjects": [
                {
                    "subject": one.subject,
                    "real": one.real.to_json(),
                    "scores": [scores.to_json() for scores in one.scores],
                    "differences": [scores.to_json() for scores in one.differences],
                }
                for one in self.subjects
            ],
        }

    def markdown(self) -> str:
        """Tables in Markdown."""
        parts = []
        for one in self.subjects:
            rows, sign_from = self.rows(one)
            parts += [f"**{one.subject}**", markdown_table(rows, self.backbones, sign_from=sign_from)]
        parts.append(f"{backbone_line(self.backbones)}. {_INTERVALS}")
        parts += [f"Note: {note}" for note in self.notes]
        return "\n\n".join(parts)

    def terminal(self) -> Group:
        """Tables for rich."""
        from rich.console import Group
        from rich.text import Text

        tables = []
        for one in self.subjects:
            rows, sign_from = self.rows(one)
            tables.append(terminal_table(rows, self.backbones, title=one.subject, sign_from=sign_from))
        notes = [Text(f"note: {note}", style="yellow") for note in self.notes]
        return Group(*tables, Text(f"{backbone_line(self.backbones)}\n{_INTERVALS}", style="dim"), *notes)


_INTERVALS = "Differences are of the same prompts and seeds; 95 % bootstrap intervals over prompts."


def compare(runs: Sequence[Path | str | Evaluation]) -> Comparison:
    """Put evaluations side by side; differences are from the first.

    Args:
        runs: run folders, evaluation.json files, or evaluations; at least two.

    Raises:
        RecipeError: fewer than two; one was not evaluated; they were asked other prompts, drew other numbers
            of images, or measured with other backbones: the message names the difference.
    """
    if len(runs) < 2:
        raise RecipeError("A comparison needs at least two runs.", "Give run folders: A B ...")
    found = [one if isinstance(one, Evaluation) else read_evaluation(Path(one)) for one in runs]
    names = _names(found)
    first = found[0]
    notes: list[str] = []
    for name, other in zip(names[1:], found[1:], strict=True):
        if wrong := _differences(first, other):
            raise RecipeError(
                "\n".join([f"{names[0]} and {name} cannot be compared:", *(f"  {line}" for line in wrong)]),
                "Evaluate both with the same options, such as --prompts and --images-per-prompt.",
            )
        notes += [f"{names[0]} and {name}: {line}" for line in _remarks(first, other)]
    return Comparison(
        names=names,
        subjects=tuple(
            _compared([each.subjects[index] for each in found]) for index in range(len(first.subjects))
        ),
        backbones=first.backbones,
        notes=tuple(notes),
    )


def _compared(subjects: Sequence[SubjectEvaluation]) -> SubjectComparison:
    """The token may have another name in each run: pairs are made by caption."""
    named = [_by_caption(one) for one in subjects]
    differences = []
    for other in named[1:]:
        before, after = dict(named[0].items()), dict(other.items())
        differences.append(
            Scores(**{legend.key: _difference(after[legend.key], before[legend.key]) for legend in METRICS})
        )
    return SubjectComparison(
        subjects[0].subject,
        subjects[0].real,
        tuple(one.adapter for one in subjects),
        tuple(differences),
    )


def _difference(after: Measured | None, before: Measured | None) -> Measured | None:
    if after is None or before is None:
        return None
    return difference(after, before, paired=True)


def _by_caption(one: SubjectEvaluation) -> Scores:
    captions = dict(one.prompts)
    moved: dict[str, Measured | None] = {}
    for key, metric in one.adapter.items():
        if metric is None:
            moved[key] = None
        else:
            moved[key] = replace(metric, groups=tuple(captions.get(name, name) for name in metric.groups))
    return Scores(**moved)


def _differences(first: Evaluation, other: Evaluation) -> list[str]:
    """What makes numbers of two evaluations incomparable, a line each."""
    lines = []
    for key in sorted({*first.backbones, *other.backbones}):
        names = first.backbones.get(key, "none"), other.backbones.get(key, "none")
        if names[0] != names[1]:
            lines.append(f"{key} was measured with {names[0]}, and with {names[1]}")
    for what, one, two in (
        ("images per prompt", first.images_per_prompt, other.images_per_prompt),
        ("class images", first.class_images, other.class_images),
        ("images per unrelated prompt", first.unrelated_images, other.unrelated_images),
        ("subjects", len(first.subjects), len(other.subjects)),
    ):
        if one != two:
            lines.append(f"{what}: {one}, and {two}")
    for one_subject, two_subject in zip(first.subjects, other.subjects, strict=False):
        for what, ours, theirs in (
            ("prompt", _captions(one_subject), _captions(two_subject)),
            ("class prompt", one_subject.class_prompts, two_subject.class_prompts),
            ("unrelated prompt", one_subject.unrelated, two_subject.unrelated),
        ):
            lines += _unlike(what, ours, theirs)
    return lines


def _captions(one: SubjectEvaluation) -> tuple[str, ...]:
    return tuple(caption for _, caption in one.prompts)


def _unlike(what: str, ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The first prompt that only one side has, and how many more there are."""
    if tuple(ours) == tuple(theirs):
        return []
    lines = []
    for side, own, other in (("first", ours, theirs), ("second", theirs, ours)):
        lone = [prompt for prompt in own if prompt not in other]
        if lone:
            more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
            lines.append(f'only the {side} was asked the {what} "{lone[0]}"{more}')
    return lines or [f"the {what}s are the same in another order"]


def _remarks(first: Evaluation, other: Evaluation) -> list[str]:
    """What may be meant to differ, and should be known."""
    lines = []
    if first.base != other.base:
        lines.append(f"the bases differ: {first.base}, and {other.base}")
    for key in sorted({*first.sampler, *other.sampler}):
        if first.sampler.get(key) != other.sampler.get(key):
            lines.append(f"sampled with {key} {first.sampler.get(key)}, and {other.sampler.get(key)}")
    photos = [one.photos for one in first.subjects], [one.photos for one in other.subjects]
    if photos[0] != photos[1]:
        lines.append("they learned from different photos, so fidelity is to different things")
    return lines


def _names(found: Sequence[Evaluation]) -> tuple[str, ...]:
    """The runs' names; where two are the same, with as much of the folder as tells them apart."""
    names = [one.run for one in found]
    if len(set(names)) == len(names):
        return tuple(names)
    parents = [f"{one.path.absolute().parent.parent.name}/{one.run}" for one in found]
    if len(set(parents)) == len(parents):
        return tuple(parents)
    return tuple(f"{name} ({number})" for number, name in enumerate(names, start=1))
