"""The figure of benchmarks/prior_preservation.py: the paper's findings, one panel each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODES = ("generated", "images", "distill", "none")
_COLOURS = {"dino": "#3b6ea8", "clip_t": "#c8702a", "pres": "#8a3b5e", "div": "#4b8b4f"}
_NAMES = {"dino": "DINO", "clip_t": "CLIP-T", "pres": "PRES", "div": "DIV"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure; a panel without rows stays empty."""
    from matplotlib.figure import Figure

    by_name = {row["configuration"]: row for row in rows}
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels: Any = figure.subplots(2, 3)
    _modes(panels[0][0], by_name)
    _sweep(
        panels[0][1],
        _series(by_name, r"steps: (\d+)"),
        ("dino", "clip_t"),
        "steps, with class images",
        log=True,
    )
    _sweep(
        panels[0][2], _series(by_name, r"steps, none: (\d+)"), ("dino", "clip_t"), "steps, without", log=True
    )
    whole = {"generated": 5.0}
    _sweep(panels[1][0], _series(by_name, r"photos (\d+)", whole), ("dino", "clip_t"), "number of photos")
    _sweep(
        panels[1][1],
        _series(by_name, r"rank (\d+)", {"generated": 16.0}),
        ("dino", "clip_t"),
        "rank",
        log=True,
    )
    weights = {"none": 0.0, "generated": 1.0}
    _sweep(
        panels[1][2], _series(by_name, r"weight ([\d.]+)", weights), ("dino", "pres", "div"), "prior weight"
    )
    figure.savefig(path, dpi=110)


def _series(
    by_name: Mapping[str, Any], pattern: str, others: Mapping[str, float] | None = None
) -> list[tuple[float, Any]]:
    """(value, row) of rows whose name tells it, and of others whose value is known; on the same specimens."""
    found = [(float(m[1]), row) for name, row in by_name.items() if (m := re.fullmatch(pattern, name))]
    if not found:
        return []
    few = min(len(row["specimens"]) for _, row in found)
    found += [(value, by_name[name]) for name, value in (others or {}).items() if name in by_name]
    return sorted(((value, _first(row, few)) for value, row in found), key=lambda pair: pair[0])


def _first(row: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A row over its first specimens only, so that all points of a line are of the same ones."""
    from lorabooth.evaluation.metrics import measured

    first: dict[str, Any] = {}
    for metric in _COLOURS:
        if metric in row:
            over = measured(row[metric]["values"][:count])
            first[metric] = {"mean": over.mean, "low": over.low, "high": over.high}
    return first


def _modes(axes: Axes, by_name: Mapping[str, Any]) -> None:
    modes = [mode for mode in _MODES if mode in by_name]
    for place, metric in enumerate(("dino", "pres", "div")):
        at = [index + 0.26 * (place - 1) for index in range(len(modes))]
        rows = [by_name[mode].get(metric) for mode in modes]
        if any(row is None for row in rows):
            continue
        axes.bar(at, [row["mean"] for row in rows], 0.24, color=_COLOURS[metric], label=_NAMES[metric])
        _whiskers(axes, at, rows, "#333333")
    axes.set_xticks(range(len(modes)), modes)
    axes.set_title("prior preservation", fontsize=10)
    axes.legend(fontsize=8)


def _sweep(
    axes: Axes, series: Sequence[tuple[float, Any]], metrics: Sequence[str], title: str, *, log: bool = False
) -> None:
    axes.set_title(title, fontsize=10)
    for metric in metrics:
        points = [(value, row[metric]) for value, row in series if metric in row]
        if not points:
            continue
        at = [value for value, _ in points]
        axes.plot(at, [m["mean"] for _, m in points], "o-", color=_COLOURS[metric], label=_NAMES[metric])
        _whiskers(axes, at, [m for _, m in points], _COLOURS[metric])
    if series:
        if log:
            axes.set_xscale("log")
        axes.set_xticks([value for value, _ in series], [f"{value:g}" for value, _ in series])
        axes.minorticks_off()
        axes.legend(fontsize=8)


def _whiskers(axes: Axes, at: Sequence[float], rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    """The 95 % intervals over the specimens."""
    for x, row in zip(at, rows, strict=True):
        if row["low"] is not None:
            axes.plot([x, x], [row["low"], row["high"]], color=colour, linewidth=1.2)
