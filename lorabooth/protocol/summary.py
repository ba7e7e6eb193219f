"""One table over all subjects: protocol.json and protocol.md, from the evaluations that are on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorabooth import durable
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.metrics import measured
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.jobs import Asked, Job
from lorabooth.protocol.results import Evaluation
from lorabooth.protocol.tables import Row, backbone_line, markdown_table

SCHEMA = 1
_KIND = "lorabooth protocol"

WARNING = (
    "Numbers of different pipelines do not compare: subjects, base model, backbones, image size and prompts "
    "decide them as much as the method does. Compare rows of one table, each with its real-image row."
)
PUBLISHED: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("real images", {"dino": 0.774, "clip_i": 0.885}),
    ("DreamBooth, Imagen", {"dino": 0.696, "clip_i": 0.812, "clip_t": 0.306}),
    ("DreamBooth, Stable Diffusion", {"dino": 0.668, "clip_i": 0.803, "clip_t": 0.305}),
    ("Textual Inversion, Stable Diffusion", {"dino": 0.569, "clip_i": 0.780, "clip_t": 0.255}),
    (
        "with prior preservation (Imagen, 15 subjects)",
        {"dino": 0.684, "clip_i": 0.815, "clip_t": 0.308, "pres": 0.493, "div": 0.391},
    ),
    (
        "without prior preservation",
        {"dino": 0.712, "clip_i": 0.828, "clip_t": 0.306, "pres": 0.664, "div": 0.371},
    ),
)
"""Tables 1 and 3 of the paper (arXiv 2208.12242)."""

ROW_NAMES = {"real": "real images", "without": "without adapter", "adapter": "with adapter"}


@dataclass(frozen=True)
class SubjectResult:
    """How one subject ended.

    Attributes:
        asked: the subject and its templates.
        status: "done", "failed" or "unfinished".
        reason: why it failed.
        exit_code: of the error that it failed with; 0 otherwise.
        evaluation: of a subject that is done.
    """

    asked: Asked
    status: str
    reason: str = ""
    exit_code: int = 0
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """Of the subject."""
        return self.asked.subject.name


@dataclass(frozen=True)
class ProtocolResult:
    """A protocol's table.

    Attributes:
        job: what it is about.
        subjects: in the order of their names.
        means: "real", "without", "adapter" -> the mean over the subjects that are done, each counting once,
            with its interval over the subjects.
        path: protocol.json.
        page: protocol.html.
    """

    job: Job
    subjects: tuple[SubjectResult, ...]
    means: Mapping[str, Scores]
    path: Path
    page: Path

    @property
    def done(self) -> tuple[SubjectResult, ...]:
        """Those with numbers."""
        return tuple(one for one in self.subjects if one.evaluation is not None)

    @property
    def failed(self) -> tuple[SubjectResult, ...]:
        """Those with a reason."""
        return tuple(one for one in self.subjects if one.status == "failed")

    @property
    def backbones(self) -> Mapping[str, str]:
        """What everything was measured with; empty while nothing is."""
        return self.done[0].evaluation.backbones if self.done and self.done[0].evaluation else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the evaluations note, each once, and where they were not measured alike."""
        evaluations = [one.evaluation for one in self.done if one.evaluation is not None]
        found = dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes)
        if len({json.dumps(dict(each.backbones), sort_keys=True) for each in evaluations}) > 1:
            found["not all subjects were measured with the same backbones: the means mix them"] = None
        return tuple(found)

    def rows(self) -> list[Row]:
        """A row per subject, with the adapter; then the three means."""
        rows: list[Row] = [(one.name, one.evaluation.adapter) for one in self.done if one.evaluation]
        if self.done:
            rows += [(f"mean, {name}", self.means[side]) for side, name in ROW_NAMES.items()]
        return rows


def gather(job: Job, subjects: Sequence[SubjectResult]) -> ProtocolResult:
    """The table of what is there; nothing is written."""
    evaluations = {one.name: one.evaluation for one in subjects if one.evaluation is not None}
    means = {
        side: _mean({name: getattr(each, side) for name, each in evaluations.items()}) for side in ROW_NAMES
    }
    return ProtocolResult(job, tuple(subjects), means, job.out / "protocol.json", job.out / "protocol.html")


def write(result: ProtocolResult) -> None:
    """Write protocol.json and protocol.md.

    Raises:
        RecipeError, TrainingError: they cannot be written.
    """
    text = json.dumps(to_json(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    durable.save(result.path, text.encode())
    durable.save(result.path.with_suffix(".md"), markdown(result).encode())


def to_json(result: ProtocolResult) -> dict[str, Any]:
    """As it is written: no path of this machine, nothing that a clock decides but under "timings_s"."""
    job = result.job
    first = result.done[0].evaluation if result.done else None
    return {
        "schema": SCHEMA,
        "kind": _KIND,
        "title": job.settings.title,
        "base": first.base if first else "",
        "recipe": _recipe(job),
        "images_per_prompt": job.settings.images_per_prompt,
        "class_images": job.settings.class_images,
        "unrelated_images": job.settings.unrelated_images,
        "sampler": dict(first.sampler) if first else {},
        "backbones": dict(result.backbones),
        "notes": list(result.notes),
        "means": {side: scores.to_json() for side, scores in result.means.items()},
        "subjects": [_subject_json(one) for one in result.subjects],
        "published": {"warning": WARNING, "rows": [{"name": name, **row} for name, row in PUBLISHED]},
        "versions": dict(first.versions) if first else {},
        "timings_s": {one.name: round(one.evaluation.seconds, 1) for one in result.done if one.evaluation},
    }


def markdown(result: ProtocolResult) -> str:
    """The same for people."""
    job = result.job
    blocks = [f"# {job.settings.title}"]
    if result.done:
        count = len(result.done)
        about = (
            f"{count} subject{'s' * (count != 1)}, {job.settings.images_per_prompt} images a prompt. "
            "The intervals of a subject's row are over its prompts, those of the means over the subjects "
            "(bootstrap, 95 %)."
        )
        blocks += [about, markdown_table(result.rows(), result.backbones)]
        blocks += [f"Measured with: {backbone_line(result.backbones)}."]
    blocks += ["\n".join(f"- {note}" for note in result.notes)] if result.notes else []
    if missing := [one for one in result.subjects if one.evaluation is None]:
        blocks += ["\n".join(["Not in the table:", "", *(f"- {_missing(one)}" for one in missing)])]
    blocks += ["## The paper's numbers, for reference", WARNING, _published_table()]
    return "\n\n".join(blocks) + "\n"


def published_rows() -> Iterable[tuple[str, list[str]]]:
    """The paper's table: names and cells, in the order of METRICS."""
    for name, row in PUBLISHED:
        yield name, [f"{row[legend.key]:.3f}" if legend.key in row else "" for legend in METRICS]


def _published_table() -> str:
    lines = [
        "| | " + " | ".join(legend.heading for legend in METRICS) + " |",
        "|---|" + "---:|" * len(METRICS),
    ]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in published_rows()]
    return "\n".join(lines)


def _missing(one: SubjectResult) -> str:
    return f"{one.name}: failed: {one.reason}" if one.status == "failed" else f"{one.name}: not finished"


def _mean(rows: Mapping[str, Scores]) -> Scores:
    """Each subject's mean counts once; the interval is over the subjects."""
    found = {}
    for field in fields(Scores):
        values = {
            name: one.mean for name, row in rows.items() if (one := getattr(row, field.name)) is not None
        }
        if values:
            found[field.name] = measured(list(values.values()), tuple(values))
    return Scores(**found)


def _recipe(job: Job) -> dict[str, Any]:
    """What was written in it, without what only this machine understands."""
    raw = job.recipe.model_dump(mode="json", exclude_unset=True)
    section = job.recipe.subjects[0]
    raw["subjects"] = [{"token": section.token, "template": section.template}]
    for table, key in (("model", "base"), ("prior", "images"), ("run", "out")):
        if isinstance(raw.get(table), dict):
            raw[table].pop(key, None)
    for key, value in list(raw.get("evaluation", {}).items()):
        if Path(value).is_absolute():
            raw["evaluation"][key] = Path(value).name
    return raw


def _subject_json(one: SubjectResult) -> dict[str, Any]:
    subject, evaluation = one.asked.subject, one.evaluation
    found: dict[str, Any] = {
        "name": one.name,
        "noun": subject.noun,
        "live": subject.live,
        "status": one.status,
        "prompts": len(one.asked.templates),
    }
    if one.reason:
        found["reason"] = one.reason
    if evaluation is not None:
        found |= {"trained_steps": evaluation.facts.get("adapter_steps")}
        found |= {side: getattr(evaluation, side).to_json() for side in ROW_NAMES}
    return found
