"""Rows of scores as a table: for the terminal, for Markdown, and cell by cell for pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lorabooth.evaluation.cells import (
    NOT_MEASURED,
    NOTHING,
    ROW_TITLES,
    backbone_line,
    cell,
    interval,
    number,
)
from lorabooth.evaluation.legend import METRICS
from lorabooth.evaluation.scoring import Scores
from lorabooth.protocol.results import SubjectEvaluation

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "NOTHING",
    "NOT_MEASURED",
    "Row",
    "backbone_line",
    "cell",
    "interval",
    "markdown_table",
    "number",
    "rows_of",
    "terminal_table",
]

Row = tuple[str, Scores]
"""A row's name and its numbers."""


def rows_of(subject: SubjectEvaluation) -> list[Row]:
    """The three rows of one subject."""
    rows = {"real": subject.real, "without": subject.without, "adapter": subject.adapter}
    return [(title, rows[key]) for key, title in ROW_TITLES.items()]


def terminal_table(
    rows: Sequence[Row],
    backbones: Mapping[str, str],
    *,
    title: str = "",
    sign_from: int | None = None,
    strong: Iterable[int] = (),
) -> Table:
    """A table for rich.

    Args:
        rows: names and scores.
        backbones: as `Backbones.names()`; a column whose backbone is missing says so in every cell.
        title: above it.
        sign_from: rows from this one on are differences.
        strong: rows to print bold.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    bold = set(strong)
    # 80 columns are enough for all metrics.
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("")
    for legend in METRICS:
        table.add_column(legend.heading, justify="right")
    for index, (name, scores) in enumerate(rows):
        found = dict(scores.items())
        style = "bold" if index in bold else ""
        signed = sign_from is not None and index >= sign_from
        cells = []
        for legend in METRICS:
            mean, ends = cell(legend, found[legend.key], backbones, sign=signed)
            is_number = found[legend.key] is not None
            text = Text(mean, style=style if is_number else "dim")
            cells.append(text.append(f"\n{ends}", style="dim not bold") if ends else text)
        table.add_row(Text(name, style=style), *cells)
    return table


def markdown_table(rows: Sequence[Row], backbones: Mapping[str, str], *, sign_from: int | None = None) -> str:
    """A table in Markdown; see `terminal_table`."""
    lines = [
        "| | " + " | ".join(legend.heading for legend in METRICS) + " |",
        "|---|" + "---:|" * len(METRICS),
    ]
    for index, (name, scores) in enumerate(rows):
        found = dict(scores.items())
        signed = sign_from is not None and index >= sign_from
        cells = []
        for legend in METRICS:
            mean, ends = cell(legend, found[legend.key], backbones, sign=signed)
            cells.append(f"{mean} ({ends})" if ends else mean)
        escaped = name.replace("|", "\\|")
        lines.append(f"| {escaped} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
