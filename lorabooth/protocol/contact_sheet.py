"""protocol.html: a row per subject, its photos and what was drawn for each prompt, with the numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth import durable
from lorabooth.data import records
from lorabooth.errors import DataError
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.report import embed_picture, style
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.results import Evaluation
from lorabooth.protocol.summary import WARNING, ProtocolResult, SubjectResult, published_rows
from lorabooth.protocol.tables import cell, number, rows_of
from lorabooth.types import Role

if TYPE_CHECKING:
    from PIL.Image import Image

TILE_PX = 96
"""Largest side of an image in a prompt's tile: a sheet of 3,000 images stays a file that opens."""
_PHOTO_PX = 128
_MOST_PHOTOS = 5
_MOST_IMAGES = 4

Cells = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One prompt of a subject: up to four images as one picture, and its numbers."""

    prompt: str
    picture: str
    values: str


@dataclass(frozen=True, slots=True)
class _Subject:
    """One row of the sheet; a subject without numbers has a reason instead."""

    name: str
    noun: str
    page: str
    photos: list[Path]
    rows: list[tuple[str, Cells]]
    prompts: list[_Prompt]
    reason: str


def write_sheet(result: ProtocolResult) -> Path:
    """Write the sheet, whole or not at all.

    Args:
        result: with the images of its evaluations on the disk; those that are gone stay grey.

    Returns:
        The file, `result.page`.

    Raises:
        RecipeError: it cannot be written.
        TrainingError: the disk is full.
    """
    durable.save(result.page, render_sheet(result).encode())
    return result.page


def render_sheet(result: ProtocolResult) -> str:
    """The sheet's text; see `write_sheet`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = partial(embed_picture, largest_side_px=_PHOTO_PX)
    template = files("lorabooth.protocol").joinpath("protocol.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=result.job.settings.title,
        style=Markup(style()),
        facts=_facts(result),
        notes=result.notes,
        legend=METRICS,
        backbones=result.backbones,
        rows=[(name, _cells(scores, result.backbones)) for name, scores in result.rows()],
        means=3 if result.done else 0,
        subjects=[_subject(one, result) for one in result.subjects],
        warning=WARNING,
        published=list(published_rows()),
    )


def _facts(result: ProtocolResult) -> list[tuple[str, str]]:
    evaluations = [one.evaluation for one in result.done if one.evaluation is not None]
    facts = [("subjects", f"{len(result.done)} of {len(result.subjects)}")]
    if evaluations:
        first = evaluations[0]
        steps = sorted({int(each.facts.get("adapter_steps", 0)) for each in evaluations})
        facts += [
            ("base", first.base),
            ("trained", " to ".join(str(end) for end in dict.fromkeys((steps[0], steps[-1]))) + " steps"),
            ("images per prompt", str(first.images_per_prompt)),
            ("size", f"{first.sampler.get('size')} px"),
        ]
    return facts


def _subject(one: SubjectResult, result: ProtocolResult) -> _Subject:
    evaluation = one.evaluation
    reason = "" if evaluation else f"failed: {one.reason}" if one.status == "failed" else "not finished"
    rows = []
    if evaluation is not None:
        rows = [(name, _cells(scores, result.backbones)) for name, scores in rows_of(evaluation.subjects[0])]
    return _Subject(
        name=one.name,
        noun=one.asked.subject.noun,
        page=f"{one.name}/evaluation.html" if evaluation else "",
        photos=_photos(one.asked.subject.photos),
        rows=rows,
        prompts=[] if evaluation is None else _prompts(evaluation),
        reason=reason,
    )


def _photos(folder: Path) -> list[Path]:
    try:
        scan = records.scan(folder, role=Role.INSTANCE, subject="", prompt="", captions=False)
    except DataError:
        return []
    return [record.path for record in scan.records[:_MOST_PHOTOS]]


def _prompts(evaluation: Evaluation) -> list[_Prompt]:
    home, one = evaluation.path.parent, evaluation.subjects[0]
    paths: dict[str, list[Path]] = {}
    for picture in one.pictures:
        if picture.kind == "subject":
            paths.setdefault(picture.prompt, []).append(home / picture.adapter)
    found = []
    for each in one.per_prompt:
        values = [
            f"{legend.title} {number(value)}"
            for legend in METRICS
            if legend.key in ("dino", "clip_t") and (value := each.adapter[legend.key]) is not None
        ]
        found.append(
            _Prompt(each.caption, tile(paths.get(each.prompt, [])[:_MOST_IMAGES]), ", ".join(values))
        )
    return found


def tile(paths: Sequence[Path], side_px: int = TILE_PX) -> str:
    """Up to four images as one picture, two in a row, as a data: URI; what cannot be read stays grey.

    Args:
        paths: of the images; none gives "".
        side_px: largest side of each.
    """
    from PIL import Image

    if not paths:
        return ""
    images = list(_opened(paths, side_px))
    side = max((max(image.size) for image in images if image is not None), default=side_px)
    columns = min(2, len(paths))
    whole = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side), (128, 128, 128))
    for index, image in enumerate(images):
        if image is not None:
            whole.paste(image, (index % columns * side, index // columns * side))
    buffer = io.BytesIO()
    whole.save(buffer, "WEBP", quality=85, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _opened(paths: Sequence[Path], side_px: int) -> Iterable[Image | None]:
    from PIL import Image, UnidentifiedImageError

    for path in paths:
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            yield image
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            yield None


def _cells(scores: Scores, backbones: Mapping[str, str]) -> Cells:
    found = dict(scores.items())
    return [cell(legend, found[legend.key], backbones) for legend in METRICS]
