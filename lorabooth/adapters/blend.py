"""Several adapters into one: strength_1 * delta_1 + strength_2 * delta_2 + ..., exactly or nearly.

`cat` is exact at the sum of the ranks; `svd` is the best approximation at a chosen rank. The others combine
the factors themselves, as PEFT's `add_weighted_adapter` does, and are only as good as the factors are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lorabooth import rng
from lorabooth.adapters import formats, low_rank, tree
from lorabooth.adapters.cores import on_all_cores
from lorabooth.adapters.low_rank import Factors
from lorabooth.adapters.rank_table import RankRow, RankTable
from lorabooth.errors import AdapterError, RecipeError
from lorabooth.progress import Reporter, Silent

Method: TypeAlias = Literal["linear", "cat", "svd", "ties", "dare", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
PRUNING: tuple[Method, ...] = ("ties", "dare", "magnitude_prune")
DENSITY = 0.5
"""Share of each factor's numbers that the pruning methods keep, unless told otherwise."""


@dataclass(frozen=True)
class Part:
    """One adapter of a blend.

    Attributes:
        tensors: canonical.
        strength: factor on its effect, finite; negative takes it away.
    """

    tensors: Mapping[str, Tensor]
    strength: float = 1.0


@dataclass(frozen=True)
class Blended:
    """The result of `blend`.

    Attributes:
        tensors: canonical; one alpha per component.
        table: ranks and errors against the exact weighted sum, of the tensors as they are.
    """

    tensors: dict[str, Tensor]
    table: RankTable


@dataclass(frozen=True)
class _Module:
    """What is known of a module before its numbers are read.

    Attributes:
        name: canonical.
        out: rows of lora_B.
        kernel: shape of a row of lora_A.
        held: part -> its rank, of the parts that have the module.
    """

    name: str
    out: int
    kernel: tuple[int, ...]
    held: Mapping[int, int]

    def result_rank(self, method: Method, rank: int | None) -> int:
        """The rank that the blend gives it."""
        total, largest = sum(self.held.values()), max(self.held.values())
        if method == "svd":
            return min(rank or largest, total, self.out, math.prod(self.kernel))
        return total if method == "cat" else largest


@dataclass(frozen=True)
class _Piece:
    """What one part has for a module: bare factors, and strength * alpha / rank."""

    part: int
    factors: Factors
    scale: float


def blend(
    parts: Sequence[Part],
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    reporter: Reporter | None = None,
) -> Blended:
    """Combine adapters; a module that only some of them have gets only theirs.

    Args:
        parts: at least one; one alone is rescaled.
        method: "cat" stacks the factors: exact, at the sum of the ranks. "svd" is the best approximation of
            the sum in the Frobenius norm (Eckart and Young, 1936). "linear" adds the factors, each weighted
            by sqrt(|strength * alpha / rank|). "magnitude_prune" first keeps the largest numbers of each
            factor, "ties" moreover only those that agree with the elected sign and averages them (TIES,
            arXiv 2306.01708, with PEFT's total-magnitude election), "dare" keeps random ones, enlarged
            (DARE, arXiv 2311.03099). The last four need equal ranks.
        rank: of every module, for "svd" only; None takes the largest rank that the module has in a part.
        density: share of numbers kept by ties, dare and magnitude_prune, in (0, 1]; None is 0.5.
        seed: of dare's random choice.
        dtype: of the factors.
        reporter: hears of progress.

    Raises:
        RecipeError: options that do not go together or are out of range.
        AdapterError: no parts, non-finite tensors or strengths, modules that are shaped differently, or
            unequal ranks where the method needs equal ones.
    """
    keep = check_options(method, rank, density)
    modules = _modules(parts)
    if method not in ("cat", "svd"):
        _require_equal_ranks(modules, method)
    ranks = {module.name: module.result_rank(method, rank) for module in modules}
    alphas = low_rank.common_alphas(ranks)

    def one(module: _Module) -> tuple[dict[str, Tensor], RankRow]:
        return _blend_one(parts, module, method, ranks[module.name], alphas[module.name], keep, seed, dtype)

    tensors: dict[str, Tensor] = {}
    rows: list[RankRow] = []
    with (reporter or Silent()).task("Blending", len(modules), "module") as task:
        for made, row in on_all_cores(one, modules):
            tensors |= made
            rows.append(row)
            task.advance()
    return Blended(tensors, RankTable(tuple(rows)))


def _blend_one(
    parts: Sequence[Part],
    module: _Module,
    method: Method,
    rank: int,
    alpha: float,
    density: float,
    seed: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], RankRow]:
    """One module's tensors, and how far they are from the exact sum."""
    name = module.name
    pieces = [_piece(parts[part], part, name) for part in module.held]
    exact = low_rank.stack([piece.factors.scaled(piece.scale) for piece in pieces])
    if method == "cat":
        result = exact
    elif method == "svd":
        result = low_rank.best(exact, rank, dtype)
    else:
        result = _combine_factors(pieces, method, density, seed, name)
    made = low_rank.stored(name, result, module.kernel, alpha, dtype, keep_down=method == "cat")
    norm, error = low_rank.compare(exact, low_rank.delta(made, name))
    held = module.held.values()
    return made, RankRow(name, 1, (min(held), max(held)), (rank, rank), norm, error)


def check_options(method: Method, rank: int | None, density: float | None) -> float:
    """Refuse options that do not go together.

    Returns:
        The density in effect.

    Raises:
        RecipeError: see `blend`.
    """
    if method not in METHODS:
        raise RecipeError(f"{method!r} is not a way to blend.", f"Choose one of {', '.join(METHODS)}.")
    if rank is not None and method != "svd":
        raise RecipeError(f"A rank cannot be chosen for {method}, only for svd.")
    if rank is not None and rank < 1:
        raise RecipeError(f"The rank must be at least 1, not {rank}.")
    if density is not None and method not in PRUNING:
        raise RecipeError(f"A density means nothing to {method}; it is for {', '.join(PRUNING)}.")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"The density must be above 0 and at most 1, not {density}.")
    return DENSITY if density is None else density


def _modules(parts: Sequence[Part]) -> list[_Module]:
    """Every module of every part, in the order in which they first appear.

    Raises:
        AdapterError: see `blend`.
    """
    if not parts:
        raise AdapterError("There is nothing to blend: no adapter was given.")
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    held: dict[str, dict[int, int]] = {}
    misfits: list[str] = []
    for index, part in enumerate(parts):
        where = f"Adapter {index + 1} of the blend"
        if not math.isfinite(part.strength):
            raise AdapterError(f"{where}: its strength {part.strength} is not a finite number.")
        if not part.tensors:
            raise AdapterError(f"{where} holds no tensors.")
        formats.require_finite(part.tensors, where)
        for name, (rank, _) in formats.ranks_and_alphas(part.tensors).items():
            down, up = part.tensors[f"{name}.lora_A"], part.tensors[f"{name}.lora_B"]
            shape = (up.shape[0], tuple(down.shape[1:]))
            if _flat(shapes.setdefault(name, shape)) != _flat(shape):
                misfits.append(name)
            held.setdefault(name, {})[index] = rank
    if misfits:
        raise AdapterError(
            f"The adapters do not belong together: {len(misfits)} modules are shaped differently, "
            f"e.g. {tree.examples(misfits)}.",
            "They were made for different families of base models.",
        )
    return [_Module(name, *shapes[name], ranks) for name, ranks in held.items()]


def _flat(shape: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Rows and row shape; a 1x1 convolution and a linear layer are the same map."""
    out, kernel = shape
    return (out, kernel[0]) if kernel[1:] == (1, 1) else (out, *kernel)


def _require_equal_ranks(modules: Sequence[_Module], method: Method) -> None:
    unequal = [module for module in modules if len(set(module.held.values())) > 1]
    if unequal:
        ranks = " and ".join(map(str, unequal[0].held.values()))
        raise AdapterError(
            f"{method} combines the factors number by number, so every adapter must have the same rank: "
            f"{unequal[0].name!r} has ranks {ranks} ({len(unequal)} such modules).",
            "Use cat or svd, which take any ranks.",
        )


def _piece(part: Part, index: int, module: str) -> _Piece:
    factors, scale = low_rank.read(part.tensors, module)
    return _Piece(index, factors, part.strength * scale)


def _combine_factors(
    pieces: Sequence[_Piece], method: Method, density: float, seed: int, module: str
) -> Factors:
    """Add up the factors of equal ranks, as PEFT does (`_generalized_task_arithmetic_weighted_adapter`).

    Each factor has the weight sqrt(|scale|); a negative scale's sign is on lora_A alone. In float32, as PEFT.
    """
    held = [piece.factors.to(torch.float32) for piece in pieces]
    roots = [math.sqrt(abs(piece.scale)) for piece in pieces]
    signed = [math.copysign(root, piece.scale) for root, piece in zip(roots, pieces, strict=True)]
    sides = {
        "lora_A": ([one.down for one in held], signed),
        "lora_B": ([one.up for one in held], roots),
    }
    combined: dict[str, Tensor] = {}
    for kind, (factors, weights) in sides.items():
        if method in ("ties", "magnitude_prune"):
            factors = [_keep_largest(factor, density) for factor in factors]
        elif method == "dare":
            purpose = f"dare/{module}.{kind}"
            factors = [
                _keep_random(factor, density, seed, purpose, piece.part)
                for factor, piece in zip(factors, pieces, strict=True)
            ]
        combined[kind] = _weighted_sum(factors, weights, elect=method == "ties")
    return Factors(up=combined["lora_B"], down=combined["lora_A"]).to(torch.float64)


def _weighted_sum(factors: Sequence[Tensor], weights: Sequence[float], *, elect: bool) -> Tensor:
    """Sum of weight * factor; with `elect` the mean over those of the elected sign (TIES, section 3.1)."""
    if not elect:
        return torch.stack([factor * weight for factor, weight in zip(factors, weights, strict=True)]).sum(0)
    stacked = torch.stack(list(factors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    weighted = stacked * stacked.new_tensor(weights).view(-1, 1, 1) * agrees
    return weighted.sum(0) / agrees.sum(0).clamp(min=1)


def _keep_largest(factor: Tensor, density: float) -> Tensor:
    """All but the largest share of the numbers set to zero."""
    if density >= 1:
        return factor
    flat = factor.flatten()
    kept = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(factor)


def _keep_random(factor: Tensor, density: float, seed: int, purpose: str, index: int) -> Tensor:
    """Each number kept with the probability `density` and divided by it, or set to zero."""
    if density >= 1:
        return factor
    generator = rng.generator_for(seed, 0, 0, purpose, index)
    mask = torch.rand(factor.shape, generator=generator) < density
    return factor * mask / density
