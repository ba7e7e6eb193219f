"""An adapter at lower ranks: module by module the best approximation of its delta.

Ranks follow from one rule: a rank for all, a share of each module's energy (its squared singular values) to
keep, or a size of the file, spent where it buys the most energy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabooth.adapters import formats, low_rank
from lorabooth.adapters.cores import on_all_cores
from lorabooth.adapters.rank_table import RankRow, RankTable
from lorabooth.errors import AdapterError, RecipeError
from lorabooth.progress import Reporter, Silent, Task

FileSize = Callable[[Mapping[str, Tensor]], int]
"""Bytes of the file that canonical tensors are written to; only shapes and dtypes matter."""

# Singular values below this share of the largest are rounding, not energy.
_NOISE = 1e-12


@dataclass(frozen=True)
class Resized:
    """The result of `resize`.

    Attributes:
        tensors: canonical; one alpha per component.
        table: ranks and errors against the input, of the tensors as they are.
    """

    tensors: dict[str, Tensor]
    table: RankTable


def resize(
    tensors: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    file_size: FileSize | None = None,
    reporter: Reporter | None = None,
) -> Resized:
    """Lower an adapter's ranks; exactly one of `rank`, `energy` and `max_bytes` says how far.

    Args:
        tensors: canonical.
        rank: of every module; one whose rank is lower keeps it.
        energy: the smallest rank of each module that holds this share of its squared singular values, in
            (0, 1].
        max_bytes: of the whole file. Every module keeps rank 1; the rest of the singular values are taken
            over all modules in the order of energy per byte.
        dtype: of the factors; None keeps the input's (float32 if it has several).
        file_size: how large a file of such tensors is, header included; None counts canonical names alone.
        reporter: hears of progress.

    Returns:
        Balanced factors U sqrt(S), sqrt(S) V^T.

    Raises:
        RecipeError: not exactly one rule, or out of range.
        AdapterError: non-finite or incomplete tensors, or a file that cannot be so small.
    """
    check_rule(rank, energy, max_bytes)
    formats.require_finite(tensors, "The adapter")
    old = {module: found[0] for module, found in formats.ranks_and_alphas(tensors).items()}
    if not old:
        raise AdapterError("There is nothing to resize: the adapter holds no tensors.")
    kind = dtype or dtype_of(tensors)
    passes = 1 if rank is not None else 2
    with (reporter or Silent()).task("Resizing", passes * len(old), "module") as task:
        if rank is not None:
            ranks = {module: min(rank, _largest_rank(tensors, module)) for module in old}
        else:
            spectra = _spectra(tensors, old, task)
            if energy is not None:
                ranks = {module: _rank_for_energy(values, energy) for module, values in spectra.items()}
            else:
                assert max_bytes is not None
                ranks = _ranks_for_size(tensors, spectra, kind, max_bytes, file_size or canonical_size)
        return _truncate(tensors, old, ranks, kind, task)


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all factors, or float32 when they have several."""
    found = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    return found.pop() if len(found) == 1 else torch.float32


def canonical_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a .safetensors file of these tensors, by these names, without metadata."""
    table, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        # "BF16" or "F16": no dtype's name in the header is longer than "F8_E4M3".
        table[key] = {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = len(json.dumps(table, separators=(",", ":")))
    return 8 + header + (-header) % 8 + end


def check_rule(rank: int | None, energy: float | None, max_bytes: int | None) -> None:
    """Refuse rules that say nothing or too much.

    Raises:
        RecipeError: see `resize`.
    """
    if sum(rule is not None for rule in (rank, energy, max_bytes)) != 1:
        raise RecipeError("Say how far to resize: exactly one of a rank, an energy and a largest size.")
    if rank is not None and rank < 1:
        raise RecipeError(f"The rank must be at least 1, not {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"The energy must be above 0 and at most 1, not {energy}.")


def _largest_rank(tensors: Mapping[str, Tensor], module: str) -> int:
    """The rank that a module's delta can have."""
    down, up = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    return min(down.shape[0], math.prod(down.shape[1:]), up.shape[0])


def _spectra(tensors: Mapping[str, Tensor], modules: Mapping[str, int], task: Task) -> dict[str, Tensor]:
    """Singular values of every module, float64, rounding noise set to zero."""

    def spectrum(module: str) -> Tensor:
        values = low_rank.singular_values(low_rank.delta(tensors, module))
        return torch.where(values > _NOISE * values[0], values, 0.0)

    out: dict[str, Tensor] = {}
    for module, values in zip(modules, on_all_cores(spectrum, list(modules)), strict=True):
        out[module] = values
        task.advance()
    return out


def _rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, whose dropped values hold no more than 1 - energy of the squares."""
    squares = values.square()
    tails = squares.flip(0).cumsum(0).flip(0)  # tails[k]: what rank k drops
    return max(1, int((tails > (1 - energy) * tails[0]).sum()))


def _ranks_for_size(
    tensors: Mapping[str, Tensor],
    spectra: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_bytes: int,
    file_size: FileSize,
) -> dict[str, int]:
    """The ranks that keep the most energy in a file of at most `max_bytes`.

    Raises:
        AdapterError: rank 1 everywhere is larger already.
    """
    shapes = {module: _Shape.of(tensors, module, dtype) for module in spectra}
    overhead = 0  # of the header, which grows with the ranks' and offsets' digits, and of the alphas
    while True:
        ranks = _spend(
            spectra, {module: shape.step for module, shape in shapes.items()}, max_bytes - overhead
        )
        alphas = low_rank.common_alphas(ranks)
        blank = [shapes[module].blank(module, rank, alphas[module]) for module, rank in ranks.items()]
        size = file_size({key: tensor for tensors in blank for key, tensor in tensors.items()})
        if size <= max_bytes:
            return ranks
        if max(ranks.values()) == 1:
            raise AdapterError(
                f"The adapter cannot be as small as {max_bytes:,} bytes: with rank 1 in each of its "
                f"{len(ranks)} modules it is {size:,} bytes.",
                "Allow a larger size, or store it as fp16.",
            )
        data = sum(shapes[module].step * rank for module, rank in ranks.items())
        overhead = max(overhead + 1, size - data)


@dataclass(frozen=True)
class _Shape:
    """How large a module is: rows of lora_B, one row of lora_A, the dtype; `step` bytes a rank."""

    out: int
    kernel: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], module: str, dtype: torch.dtype) -> _Shape:
        return cls(tensors[f"{module}.lora_B"].shape[0], tuple(tensors[f"{module}.lora_A"].shape[1:]), dtype)

    @property
    def step(self) -> int:
        return (self.out + math.prod(self.kernel)) * self.dtype.itemsize

    def blank(self, module: str, rank: int, alpha: float) -> dict[str, Tensor]:
        """Canonical tensors of zeros."""
        ones = (1,) * (len(self.kernel) - 1)
        return {
            f"{module}.lora_A": torch.zeros(rank, *self.kernel, dtype=self.dtype),
            f"{module}.lora_B": torch.zeros(self.out, rank, *ones, dtype=self.dtype),
            f"{module}.alpha": torch.tensor(alpha),
        }


def _spend(spectra: Mapping[str, Tensor], steps: Mapping[str, int], budget: int) -> dict[str, int]:
    """Take singular values by energy per byte until the budget of bytes is spent; one per module is free."""
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(steps.values())
    offers = sorted(
        (
            (value * value / steps[module], module)
            for module, values in spectra.items()
            for value in values[1:].tolist()
            if value > 0
        ),
        key=lambda offer: -offer[0],
    )
    full: set[str] = set()
    for _, module in offers:
        # A module whose next value is too dear is done: its later ones cost the same.
        if module in full or steps[module] > left:
            full.add(module)
            continue
        ranks[module] += 1
        left -= steps[module]
    return ranks


def _truncate(
    tensors: Mapping[str, Tensor],
    old: Mapping[str, int],
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    task: Task,
) -> Resized:
    """Bring every module to its rank, and measure what that changed."""
    alphas = low_rank.common_alphas(ranks)

    def truncate(module: str) -> tuple[dict[str, Tensor], RankRow]:
        exact, rank = low_rank.delta(tensors, module), ranks[module]
        kernel = tensors[f"{module}.lora_A"].shape[1:]
        made = low_rank.stored(module, low_rank.best(exact, rank, dtype), kernel, alphas[module], dtype)
        norm, error = low_rank.compare(exact, low_rank.delta(made, module))
        return made, RankRow(module, 1, (old[module], old[module]), (rank, rank), norm, error)

    out: dict[str, Tensor] = {}
    rows: list[RankRow] = []
    for made, row in on_all_cores(truncate, list(ranks)):
        out |= made
        rows.append(row)
        task.advance()
    return Resized(out, RankTable(tuple(rows)))
