"""Adding low-rank products to raw weight bytes, chunk by chunk, and measuring what that changed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorabooth.checkpoints.rewrite import ChunkFunction
from lorabooth.checkpoints.tensors import torch_dtype
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorabooth.adapters.stored import StoredFactor


@dataclass(frozen=True, slots=True)
class Contribution:
    """One adapter's part in a weight: scale * up @ down.

    Attributes:
        down: lora_A [r,in] or [r,in,k,k].
        up: lora_B [out,r] or [out,r,1,1].
        scale: strength * alpha / rank.
    """

    down: StoredFactor
    up: StoredFactor
    scale: float


@dataclass
class Change:
    """What was added to one weight, gathered by the threads that add it.

    Attributes:
        weight: sum of squares of the weight before.
        change: sum of squares of what is added, before rounding.
        lost: sum of squares of what rounding lost, over `n_lost` of the `n_all` numbers.
        n_all: numbers of the weight.
        n_lost: numbers over which `lost` was measured, a quarter of a large weight.
        overflows: some sum is beyond the weight's dtype.
    """

    weight: float = 0.0
    change: float = 0.0
    lost: float = 0.0
    n_all: int = 0
    n_lost: int = 0
    overflows: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(
        self, *, weight: float = 0.0, change: float = 0.0, n_all: int = 0, overflows: bool = False
    ) -> None:
        """Add sums over a part of the weight."""
        with self._lock:
            self.weight += weight
            self.change += change
            self.n_all += n_all
            self.overflows |= overflows

    def add_lost(self, lost: float, count: int) -> None:
        """Add what rounding lost over `count` numbers."""
        with self._lock:
            self.lost += lost
            self.n_lost += count

    def relative(self) -> float:
        """Norm of the change over that of the weight; NaN if the weight holds NaN."""
        if self.weight == 0:
            return math.inf if self.change else 0.0
        return math.sqrt(self.change / self.weight)

    def rounding(self) -> float:
        """Norm of what the cast lost over that of the change."""
        if not self.change or not self.n_lost:
            return 0.0
        return math.sqrt(self.lost * self.n_all / self.n_lost / self.change)


def chunk_function(
    contributions: Sequence[Contribution], dtype: str, columns: int, transposed: bool, change: Change
) -> ChunkFunction:
    """A function that adds the contributions to consecutive rows of a weight, in place.

    Args:
        contributions: read now, in float32 (float64 for a float64 weight).
        dtype: of the weight's bytes, by safetensors' name.
        columns: numbers a row of the stored weight, its kernel flattened.
        transposed: the weight is stored as its transpose.
        change: is told what was changed.

    Raises:
        AdapterError: a factor holds NaN or infinity, or cannot be read any more.
    """
    import torch

    held_in = torch_dtype(dtype)
    computed_in = torch.float64 if held_in == torch.float64 else torch.float32
    up, down = _stacked(contributions, computed_in, transposed)
    added = float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))  # ||up down||^2, by Gram matrices
    change.add(change=added)
    largest, row_bytes = torch.finfo(held_in).max, columns * held_in.itemsize
    n_chunks = 0

    def add(chunk: memoryview, offset: int) -> None:
        nonlocal n_chunks
        memory = torch.frombuffer(chunk, dtype=torch.uint8)
        # A file may have its numbers at any byte; arithmetic wants them at multiples of their size.
        aligned = memory if memory.data_ptr() % held_in.itemsize == 0 else memory.clone()
        raw = aligned.view(held_in).view(-1, columns)
        n_rows, begin, n_chunks = raw.shape[0], offset // row_bytes, n_chunks + 1
        merged = _space(raw.numel(), computed_in).view_as(raw).copy_(raw)
        squares = _square_sum(merged)
        merged.addmm_(up[begin : begin + n_rows], down)
        # No number is larger than the norm of all, so that most chunks need no closer look.
        unsure = not math.sqrt(squares) + math.sqrt(added) < largest
        overflows = unsure and bool((merged.abs() > largest).any())
        raw.copy_(merged)
        change.add(weight=squares, n_all=raw.numel(), overflows=overflows)
        if aligned is not memory:
            memory.copy_(aligned)
        if held_in != computed_in and n_chunks % 4 == 1:
            change.add_lost(_square_sum(merged.sub_(raw)), raw.numel())

    return add


_spaces = threading.local()


def _space(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers to compute with, a thread's own, always the same: fresh memory costs more than the sums."""
    import torch

    found: Tensor | None = getattr(_spaces, "numbers", None)
    if found is None or found.numel() < count or found.dtype != dtype:
        found = _spaces.numbers = torch.empty(count, dtype=dtype)
    return found[:count]


def _stacked(
    contributions: Sequence[Contribution], dtype: torch.dtype, transposed: bool
) -> tuple[Tensor, Tensor]:
    """All contributions as one pair up [rows,R], down [R,columns] for the stored weight, scales in `up`."""
    import torch

    up = torch.cat([_read(one.up, dtype) * one.scale for one in contributions], dim=1)
    down = torch.cat([_read(one.down, dtype) for one in contributions])
    return (down.T.contiguous(), up.T.contiguous()) if transposed else (up, down)


def _read(factor: StoredFactor, dtype: torch.dtype) -> Tensor:
    """A factor as a matrix."""
    found = factor.read().to(dtype).flatten(1)
    if not math.isfinite(_square_sum(found)) and not bool(found.isfinite().all()):
        raise AdapterError(
            f"{factor.path.name}: {factor.key} holds NaN or infinity.",
            "Such an adapter gives black images; use an earlier checkpoint.",
        )
    return found


def _square_sum(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(flat.dot(flat))
