"""Curves of a run: its losses from metrics.jsonl, smoothed, and its checkpoints' measures; drawn as SVG."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Written by matplotlib where the page's own text colour is to stand.
_INK = "#010203"
_MOST_POINTS = 1200


@dataclass(frozen=True, slots=True)
class Curves:
    """What was logged, one entry per optimizer step; None where a step has no such number.

    Attributes:
        steps: increasing.
        instance: loss of the subject's examples.
        prior: loss of the class examples.
        learning_rate: of the first parameter group.
        validation_instance: the subject's loss at fixed noise and timesteps; empty without validation.
        validation_prior: the class's likewise.
    """

    steps: tuple[int, ...]
    instance: tuple[float | None, ...]
    prior: tuple[float | None, ...]
    learning_rate: tuple[float | None, ...] = ()
    validation_instance: tuple[float | None, ...] = ()
    validation_prior: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectionCurve:
    """What the checkpoints were measured with, and which became the result.

    Attributes:
        steps: of the checkpoints, increasing.
        score: what decided.
        criterion: what that is: "DINO x CLIP-T".
        dino: subject fidelity.
        clip_t: prompt fidelity.
        chosen: step of the result.
        why: it is, in a sentence.
        backbones: what measured, as ("dino", its name).
        images: drawn for each checkpoint and subject.
    """

    steps: tuple[int, ...]
    score: tuple[float, ...]
    criterion: str
    dino: tuple[float | None, ...]
    clip_t: tuple[float | None, ...]
    chosen: int
    why: str = ""
    backbones: tuple[tuple[str, str], ...] = ()
    images: int = 0


def read_curves(metrics: Path) -> Curves | None:
    """Read metrics.jsonl; None if it is absent or holds no step. A torn line is passed over."""
    rows: dict[int, dict[str, object]] = {}
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    if not rows:
        return None
    steps = tuple(sorted(rows))

    def column(*keys: str) -> tuple[float | None, ...]:
        return tuple(
            next((v for k in keys if (v := _number(rows[s].get(k))) is not None), None) for s in steps
        )

    def where_any(key: str) -> tuple[float | None, ...]:
        values = column(key)
        return values if any(value is not None for value in values) else ()

    return Curves(
        steps,
        column("loss_instance", "loss"),
        column("loss_prior"),
        column("lr"),
        where_any("val_loss_instance"),
        where_any("val_loss_prior"),
    )


def smooth(values: Sequence[float | None], half_life: float) -> list[float | None]:
    """Exponential moving average without the pull to zero at the start; None is passed over.

    Args:
        values: one per step.
        half_life: steps after which a value counts half, > 0.
    """
    keep = 0.5 ** (1 / half_life)
    total = weight = 0.0
    out: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight else None)
    return out


def draw_curves(curves: Curves) -> tuple[str, ...]:
    """Inline SVGs: a panel for the subject's loss and one for the class's, raw and smoothed, and validation.

    Text takes the page's colour ("currentColor"); nothing in them comes from the user or from outside.
    """
    panels = (
        ("Subject (instance loss)", curves.instance, curves.validation_instance, "#e4572e"),
        ("Class (prior loss)", curves.prior, curves.validation_prior, "#2e86ab"),
    )
    return tuple(
        _panel(title, curves.steps, values, validation, colour)
        for title, values, validation, colour in panels
        if any(value is not None for value in values)
    )


def draw_selection(curve: SelectionCurve) -> tuple[str, ...]:
    """Inline SVGs: a panel for what decided and one for each measure, the chosen step marked."""
    panels = [
        (curve.criterion, curve.score, "#7b5ea7"),
        ("DINO (subject fidelity)", curve.dino, "#e4572e"),
        ("CLIP-T (prompt fidelity)", curve.clip_t, "#2e86ab"),
    ]
    if curve.criterion in ("DINO", "CLIP-T"):
        del panels[0]
    return tuple(
        _marked_panel(title, curve.steps, values, curve.chosen, colour)
        for title, values, colour in panels
        if any(value is not None for value in values)
    )


def _panel(
    title: str,
    steps: Sequence[int],
    values: Sequence[float | None],
    validation: Sequence[float | None],
    colour: str,
) -> str:
    raw = _thinned(steps, values)
    soft = _thinned(steps, smooth(values, max(2.0, len(values) / 25)))
    held = _thinned(steps, validation) if validation else ([], [])

    def draw(axes: Axes) -> None:
        axes.plot(*raw, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(*soft, color=colour, linewidth=2)
        if held[0]:
            axes.plot(*held, color=_INK, linewidth=1.2, marker="o", markersize=3, label="validation")
            axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
        axes.set_ylim(bottom=0, top=_top([*raw[1], *held[1]]))
        if len(steps) > 1:
            axes.set_xlim(steps[0], steps[-1])

    return _svg(title, draw)


def _marked_panel(
    title: str, steps: Sequence[int], values: Sequence[float | None], chosen: int, colour: str
) -> str:
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=2, marker="o", markersize=4)
        axes.axvline(chosen, color=_INK, alpha=0.5, linewidth=1, linestyle="--")
        marked = [pair for pair in pairs if pair[0] == chosen]
        if marked:
            axes.plot(*marked[0], color=colour, marker="o", markersize=9)
        axes.margins(y=0.15)

    return _svg(title, draw)


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    """What is drawn on axes, as an SVG in the page's colours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    options = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10}
    with rc_context(options):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=11, loc="left", color=_INK)
        axes.set_xlabel("step", color=_INK)
        axes.patch.set_alpha(0)
        axes.tick_params(colors=_INK, length=0)
        axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Only the drawing: its own style sheet would apply to the whole page, its size is the page's to choose.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def _thinned(steps: Sequence[int], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Points without gaps; of many, the mean of each bin."""
    pairs = [(float(s), v) for s, v in zip(steps, values, strict=True) if v is not None]
    size = max(1, -(-len(pairs) // _MOST_POINTS))
    bins = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return (
        [sum(s for s, _ in points) / len(points) for points in bins],
        [sum(v for _, v in points) / len(points) for points in bins],
    )


def _top(values: Sequence[float]) -> float | None:
    """Upper end of the axis: single spikes may leave the picture, so that the curve keeps its shape."""
    ordered = sorted(values)
    top = ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))] * 1.1
    return top if top > 0 else None


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
