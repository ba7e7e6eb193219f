"""What a change of ranks did to every module: ranks before and after, and the error it made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorabooth.adapters import names

# A UNet's parts in the order of its forward pass; other denoisers' blocks come after them.
_TOPS = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
_NUMBERED = re.compile(r"(?:down|up)_blocks\.\d+")


@dataclass(frozen=True, slots=True)
class RankRow:
    """One module, or several together.

    Attributes:
        name: canonical module, or what the modules have in common.
        modules: how many.
        old_ranks: smallest and largest rank before.
        new_ranks: smallest and largest rank after.
        norm: Frobenius norm of the exact delta.
        error: Frobenius norm of the difference between the written delta and the exact one.
    """

    name: str
    modules: int
    old_ranks: tuple[int, int]
    new_ranks: tuple[int, int]
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """`error` as a share of `norm`; 0 where both are zero."""
        if self.norm:
            return self.error / self.norm
        return math.inf if self.error else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "modules": self.modules,
            "old_ranks": list(self.old_ranks),
            "new_ranks": list(self.new_ranks),
            "norm": self.norm,
            "relative_error": self.relative_error if math.isfinite(self.relative_error) else None,
        }


@dataclass(frozen=True)
class RankTable:
    """The rows of all modules, in the adapter's order."""

    rows: tuple[RankRow, ...]

    @property
    def total(self) -> RankRow:
        """All modules together; norms and errors add up in squares."""
        return _together("total", self.rows)

    def blocks(self) -> tuple[RankRow, ...]:
        """Modules gathered by block, in the order of the forward pass, then the text encoders."""
        gathered: dict[str, list[RankRow]] = {}
        for row in self.rows:
            gathered.setdefault(block_of(row.name), []).append(row)
        return tuple(_together(name, gathered[name]) for name in sorted(gathered, key=_block_order))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the total, the blocks and every module."""
        return {
            "total": self.total.to_dict(),
            "blocks": [row.to_dict() for row in self.blocks()],
            "modules": [row.to_dict() for row in self.rows],
        }


def block_of(module: str) -> str:
    """The block of a canonical module: a text encoder is one, a denoiser has many."""
    component, path = names.split_module(module)
    if component != "denoiser":
        return component
    match = _NUMBERED.match(path)
    return match[0] if match else path.partition(".")[0]


def _block_order(block: str) -> tuple[bool, int, str, int]:
    top, _, number = block.partition(".")
    place = _TOPS.index(top) if top in _TOPS else len(_TOPS)
    return top in names.COMPONENTS, place, top, int(number or 0)


def _together(name: str, rows: Iterable[RankRow]) -> RankRow:
    listed = list(rows)
    return RankRow(
        name,
        sum(row.modules for row in listed),
        (min(row.old_ranks[0] for row in listed), max(row.old_ranks[1] for row in listed)),
        (min(row.new_ranks[0] for row in listed), max(row.new_ranks[1] for row in listed)),
        math.hypot(*(row.norm for row in listed)),
        math.hypot(*(row.error for row in listed)),
    )
