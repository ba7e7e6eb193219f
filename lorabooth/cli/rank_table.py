"""How `blend`, `resize` and others show ranks, errors and sizes in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from lorabooth.adapters.rank_table import RankRow, RankTable

Dtype = Literal["fp32", "fp16", "bf16"]


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    """The dtype of a name on the command line."""
    import torch

    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return None if name is None else known[name]


def table_text(table: RankTable) -> str:
    """Modules, ranks and errors of every block and of all together, aligned."""
    head = ("block", "modules", "rank before", "rank after", "error")
    rows = [head, *(_cells(row) for row in (*table.blocks(), table.total))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def size_text(n_bytes: int) -> str:
    """A size as a person reads it, in decimal units: "850 B", "12.3 kB", "20.0 MB"."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 999.95:
            return f"{size:.1f} {unit}" if unit != "B" else f"{n_bytes} B"
        size /= 1000
    return f"{size:.2f} GB"


def error_text(relative: float) -> str:
    """A relative error: "12.34 %", or "3e-07" where a percentage would hide it."""
    if relative == 0:
        return "0"
    return f"{relative:.0e}" if relative < 1e-4 else f"{100 * relative:.2f} %"


def _cells(row: RankRow) -> tuple[str, ...]:
    old, new = _span_text(row.old_ranks), _span_text(row.new_ranks)
    return (row.name, str(row.modules), old, new, error_text(row.relative_error))


def _span_text(span: tuple[int, int]) -> str:
    return f"{span[0]}" if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others])
