"""report.html: one self-contained page about a run, to look at, keep and send on.

No script, no reference to anything outside the file. Pictures are embedded, shrunk and without their
metadata (a phone's photos carry places). Whatever is absent is left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth import durable
from lorabooth.evaluation.curves import Curves, SelectionCurve, draw_curves, draw_selection

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_SIDE_PX = 512
_SMALL_SIDE_PX = 160
_MOST_PHOTOS = 24
_MOST_STEPS = 12
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file with its caption.

    Attributes:
        path: the file; one that cannot be read becomes a grey square.
        prompt: what was drawn, or a photo's caption.
        seed: of a sample; None for a photo.
    """

    path: Path
    prompt: str = ""
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class StepSamples:
    """Samples drawn after a step, the same prompts and seeds each time.

    Attributes:
        step: finished optimizer steps.
        pictures: in the order of prompts and seeds.
    """

    step: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt and seed with the adapter off and on.

    Attributes:
        prompt: of both.
        seed: of both.
        before: adapter off.
        after: adapter on.
    """

    prompt: str
    seed: int
    before: Path
    after: Path


@dataclass(frozen=True, slots=True)
class Chosen:
    """A value that "auto" stood for, with its reason."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """What `lorabooth evaluate` measured, short.

    Attributes:
        headings: of the columns.
        subjects: of each: its name, and rows of (name, cells of mean and interval).
        backbones: what it was measured with, in one line.
        page: file name of the page that tells all, beside the report; "" if there is none.
    """

    headings: tuple[str, ...]
    subjects: tuple[tuple[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]], ...]
    backbones: str
    page: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows; plain values, all optional but the first three.

    Attributes:
        subject: what was learned, e.g. "sks dog".
        base: id of the base model.
        steps: optimizer steps done.
        seconds: the whole run, wall time.
        facts: further short facts for the headline, e.g. ("adapter", "adapter.safetensors, 3.2 MB").
        photos: the subject's photos.
        curves: losses, see `curves.read_curves`.
        validation: what the validation losses in them are of; "" without any.
        selection: measures of the checkpoints, where one was chosen by them.
        samples: drawn on the way.
        comparisons: subject prompts with the adapter off and on.
        class_check: plain class prompts with the adapter off and on: the class must survive.
        scores: what was measured of the finished run.
        recipe_toml: the effective recipe.
        choices: what "auto" became.
        timings_s: phase and seconds.
        peak_memory_bytes: where and how many.
        versions: package and version.
        warnings: what the user was warned of.
    """

    subject: str
    base: str
    steps: int
    seconds: float = 0.0
    facts: tuple[tuple[str, str], ...] = ()
    photos: tuple[Picture, ...] = ()
    curves: Curves | None = None
    validation: str = ""
    selection: SelectionCurve | None = None
    samples: tuple[StepSamples, ...] = ()
    comparisons: tuple[Pair, ...] = ()
    class_check: tuple[Pair, ...] = ()
    scores: ScoreTable | None = None
    recipe_toml: str = ""
    choices: tuple[Chosen, ...] = ()
    timings_s: tuple[tuple[str, float], ...] = ()
    peak_memory_bytes: tuple[tuple[str, int], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = field(default=())


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write report.html into a run's folder, whole or not at all.

    Args:
        run_dir: the folder, which exists.
        data: what to show.

    Returns:
        The file.

    Raises:
        RecipeError: it cannot be written.
        TrainingError: the disk is full.
    """
    path = run_dir / "report.html"
    durable.save(path, render_report(data).encode())
    return path


def render_report(data: ReportData) -> str:
    """The page's text; see `write_report`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(picture=embed_picture, duration=_duration, size=_size)
    template = files("lorabooth.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    # The curves are our own drawing and hold no text of the user's.
    drawn = [Markup(svg) for svg in draw_curves(data.curves)] if data.curves else []
    measured = [Markup(svg) for svg in draw_selection(data.selection)] if data.selection else []
    total_s = sum(seconds for _, seconds in data.timings_s)
    return environment.from_string(template).render(
        data=data,
        style=Markup(style()),
        curves=drawn,
        measured=measured,
        photos=data.photos[:_MOST_PHOTOS],
        photos_left_out=max(0, len(data.photos) - _MOST_PHOTOS),
        samples=_spread(data.samples),
        timings_total_s=total_s,
        # The home folder tells the user's name.
        recipe=data.recipe_toml.replace(str(Path.home()), "~"),
    )


def style() -> str:
    """The style sheet of our pages."""
    return files("lorabooth.evaluation").joinpath("page.css").read_text(encoding="utf-8").rstrip()


def embed_picture(path: Path, largest_side_px: int = _LARGEST_SIDE_PX) -> str:
    """An image file as a data: URI: upright, shrunk, without metadata; "" if it cannot be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (largest_side_px, largest_side_px))
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            image.thumbnail((largest_side_px, largest_side_px), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return _data_uri(image)


def _data_uri(image: Image) -> str:
    image.info.clear()
    kind = "png" if max(image.size) <= _SMALL_SIDE_PX else "webp"
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=88, method=4)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spread(samples: Sequence[StepSamples]) -> list[StepSamples]:
    """At most twelve steps, the first and the last among them, so that long runs stay small files."""
    if len(samples) <= _MOST_STEPS:
        return list(samples)
    last = len(samples) - 1
    return [samples[round(place * last / (_MOST_STEPS - 1))] for place in range(_MOST_STEPS)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(count: int) -> str:
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
