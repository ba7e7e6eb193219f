"""evaluation.html: an evaluation as one self-contained page, with the images behind the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from lorabooth import durable
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.report import embed_picture, style
from lorabooth.protocol.results import PER_PROMPT, Evaluation, Pictures, PromptScores, SubjectEvaluation
from lorabooth.protocol.tables import NOTHING, cell, number, rows_of

_SIDE_PX = 256
_MOST_PHOTOS = 24


@dataclass(frozen=True, slots=True)
class _Shown:
    """One prompt on the page."""

    prompt: str
    pictures: list[dict[str, object]]
    values: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Block:
    """One subject on the page."""

    subject: str
    rows: list[_Row]
    photos: list[Path]
    prompts: list[_Shown]
    class_prompts: tuple[str, ...]
    class_pictures: list[dict[str, object]]
    unrelated: list[_Shown]


def write_page(evaluation: Evaluation, photos: Sequence[Sequence[Path]]) -> Path:
    """Write the page of an evaluation, whole or not at all.

    Args:
        evaluation: with its images on disk.
        photos: of each subject.

    Returns:
        The file, `evaluation.page`.

    Raises:
        RecipeError: it cannot be written.
        TrainingError: the disk is full.
    """
    durable.save(evaluation.page, render_page(evaluation, photos).encode())
    return evaluation.page


def render_page(evaluation: Evaluation, photos: Sequence[Sequence[Path]]) -> str:
    """The page's text; see `write_page`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = partial(embed_picture, largest_side_px=_SIDE_PX)
    template = files("lorabooth.protocol").joinpath("evaluation.html.j2").read_text(encoding="utf-8")
    home = evaluation.path.parent
    return environment.from_string(template).render(
        data=evaluation,
        title=", ".join(one.subject for one in evaluation.subjects),
        style=Markup(style()),
        facts=_facts(evaluation),
        legend=METRICS,
        per_prompt=PER_PROMPT,
        blocks=[
            _block(one, own, evaluation.backbones, home)
            for one, own in zip(evaluation.subjects, photos, strict=True)
        ],
    )


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    sampler = evaluation.sampler
    facts = [
        ("base", evaluation.base),
        ("trained", f"{evaluation.facts.get('adapter_steps', 0)} steps"),
        ("images per prompt", str(evaluation.images_per_prompt)),
        (
            "sampler",
            f"{sampler.get('sampler')}, {sampler.get('steps')} steps, guidance {sampler.get('guidance')}",
        ),
        ("size", f"{sampler.get('size')} px"),
    ]
    strength = evaluation.facts.get("strength", 1.0)
    return facts if strength == 1.0 else [*facts, ("strength", f"{strength:g}")]


def _block(
    one: SubjectEvaluation, photos: Sequence[Path], backbones: Mapping[str, str], home: Path
) -> _Block:
    by_kind: dict[str, dict[str, list[dict[str, object]]]] = {"subject": {}, "class": {}, "unrelated": {}}
    for picture in one.pictures:
        by_kind[picture.kind].setdefault(picture.prompt, []).append(_picture(picture, home))
    rows = []
    for name, scores in rows_of(one):
        found = dict(scores.items())
        rows.append(_Row(name, [cell(legend, found[legend.key], backbones) for legend in METRICS]))
    return _Block(
        subject=one.subject,
        rows=rows,
        photos=list(photos[:_MOST_PHOTOS]),
        prompts=[_shown(each, by_kind["subject"].get(each.prompt, [])) for each in one.per_prompt],
        class_prompts=one.class_prompts,
        class_pictures=[picture for group in by_kind["class"].values() for picture in group],
        unrelated=[_Shown(prompt, group) for prompt, group in by_kind["unrelated"].items()],
    )


def _shown(each: PromptScores, pictures: list[dict[str, object]]) -> _Shown:
    cells = tuple(_change(each, legend.key) for legend in METRICS if legend.key in PER_PROMPT)
    short = [
        f"{legend.title} {_change(each, legend.key)}"
        for legend in METRICS
        if legend.key in ("dino", "clip_t") and each.adapter[legend.key] is not None
    ]
    return _Shown(each.prompt, pictures, ", ".join(short), cells)


def _change(each: PromptScores, key: str) -> str:
    before, after = each.without[key], each.adapter[key]
    if before is None or after is None:
        return NOTHING
    return f"{number(before)} → {number(after)}"


def _picture(picture: Pictures, home: Path) -> dict[str, object]:
    return {
        "prompt": picture.prompt,
        "seed": picture.seed,
        "adapter": home / picture.adapter,
        "without": home / picture.without,
    }
