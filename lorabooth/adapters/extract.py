"""An adapter from the difference of two checkpoints: the best low-rank approximation of each weight's change.

The truncated singular value decomposition of W_tuned - W_base (Eckart and Young, 1936), computed by a
randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4
and 5.1), one weight at a time. Errors are those of what is written: the distance to the stored product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth import rng
from lorabooth.adapters import low_rank, outputs
from lorabooth.adapters.cores import on_all_cores
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.rank_table import RankRow, RankTable
from lorabooth.checkpoints import inventory, weights
from lorabooth.checkpoints.inventory import Base
from lorabooth.errors import AdapterError, BaseModelError
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OVERSAMPLING = 10
_POWER_ITERATIONS = 2
_EXACT_UP_TO = 128  # smaller sides are decomposed exactly


@dataclass(frozen=True, slots=True)
class Rest:
    """What changed between the checkpoints and no adapter can hold: norms, biases, embeddings.

    Attributes:
        tensors: how many changed.
        relative_norm: norm of their changes over the norm of all changes, the adapter's weights included.
        examples: canonical names of those that changed most.
    """

    tensors: int
    relative_norm: float
    examples: tuple[str, ...]


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` wrote.

    Attributes:
        out: the file.
        family: of base models, "" when it cannot be told.
        layout: "kohya" or "diffusers".
        table: ranks and errors per module; "rank before" is that of the whole difference.
        unchanged: modules that are equal in both checkpoints, and not in the adapter.
        rest: what the adapter does not hold.
        notes: what could not be compared, for the user.
        n_bytes: size of the file.
    """

    out: Path
    family: str
    layout: str
    table: RankTable
    unchanged: int
    rest: Rest
    notes: tuple[str, ...]
    n_bytes: int

    @property
    def relative_error(self) -> float:
        """Norm of all that merging the adapter misses, over the norm of the whole difference."""
        total, share = self.table.total, self.rest.relative_norm
        return math.hypot(total.relative_error * math.sqrt(max(0.0, 1 - share**2)), share)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "family": self.family,
            "layout": self.layout,
            "bytes": self.n_bytes,
            "relative_error": self.relative_error,
            "unchanged_modules": self.unchanged,
            "rest": {
                "tensors": self.rest.tensors,
                "relative_norm": self.rest.relative_norm,
                "examples": list(self.rest.examples),
            },
            "notes": list(self.notes),
            **self.table.to_dict(),
        }


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    rank: int,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExtractReport:
    """Write the adapter that, merged into `base`, comes nearest to `tuned`.

    Args:
        base: a diffusers folder or a .safetensors checkpoint.
        tuned: another of the same family; the layouts may differ.
        out: a new .safetensors file, in kohya's layout where the family has it.
        rank: largest rank of a module.
        energy: keep only as many singular values as hold this share of the squared norm, in (0, 1].
        dtype: of the factors; float32 when None.
        overwrite: replace `out` if it exists; inputs are never replaced.
        reporter: hears of the progress.

    Returns:
        Ranks, errors, and what an adapter cannot hold.

    Raises:
        BaseModelError: a checkpoint is broken, quantized or not supported, or the two do not fit together.
        AdapterError: the checkpoints are equal where adapters can differ, or a wrong output.
    """
    import torch

    say = reporter or Silent()
    first, second = inventory.open_base(base), inventory.open_base(tuned)
    for one in (first, second):
        inventory.require_unquantized(one)
    outputs.check_output(
        out, [item.path for one in (first, second) for item in one.files], overwrite=overwrite
    )
    if rank < 1 or (energy is not None and not 0 < energy <= 1):
        raise AdapterError("The rank must be at least 1, and the energy above 0 and at most 1.")
    modules = _common_modules(first, second)
    how = _How(rank, energy, dtype or torch.float32)
    tensors: dict[str, Tensor] = {}
    rows: list[RankRow] = []
    with say.task("Extracting", len(modules), "module") as task:
        for found in on_all_cores(lambda module: _extract_one(first, second, module, how), modules):
            if found is not None:
                tensors |= found[0]
                rows.append(found[1])
            task.advance()
    if not tensors:
        raise AdapterError(
            f"{second.path.name} has the weights of {first.path.name} wherever an adapter could differ.",
            "There is nothing to extract; check that these are the two checkpoints you mean.",
        )
    rest = _compare_rest(first, second, set(modules), RankTable(tuple(rows)).total.norm, say)
    layout = outputs.layout_for(second.family, [row.name for row in rows])
    outputs.write(out, tensors, Metadata(family=second.family), layout, how.dtype)
    notes = _not_compared(first, second)
    return ExtractReport(
        out=out,
        family=second.family,
        layout=layout,
        table=RankTable(tuple(rows)),
        unchanged=len(modules) - len(rows),
        rest=rest,
        notes=notes,
        n_bytes=out.stat().st_size,
    )


@dataclass(frozen=True, slots=True)
class _How:
    rank: int
    energy: float | None
    dtype: torch.dtype


def _common_modules(first: Base, second: Base) -> list[str]:
    """Modules that both have, in the base's order; they must have all the denoiser's in common.

    Without the text projection of SDXL's second encoder, of which ComfyUI says "lora key not loaded".
    """
    if first.family and second.family and first.family != second.family:
        raise BaseModelError(
            f"{first.path.name} is {first.family}, {second.path.name} is {second.family}.",
            "An adapter can only be extracted from two checkpoints of one family.",
        )
    others = set(second.modules)
    common = [module for module in first.modules if module in others]
    unlike = [module for module in common if first.weight_shape(module) != second.weight_shape(module)]
    unlike += [m for m in set(first.modules) ^ others if m.startswith("denoiser.")]
    if unlike or not common:
        listed = ", ".join(sorted(unlike)[:5])
        raise BaseModelError(
            f"{first.path.name} and {second.path.name} are not built alike: {len(unlike)} modules are in one "
            f"alone or have other shapes ({listed}).",
            "An adapter can only be extracted from two checkpoints of one architecture.",
        )
    return [module for module in common if not module.endswith(".text_projection")]


def _extract_one(
    first: Base, second: Base, module: str, how: _How
) -> tuple[dict[str, Tensor], RankRow] | None:
    """A module's tensors and errors; None when its weight did not change."""
    name = f"{module}.weight"
    difference = weights.read(second, name).sub_(weights.read(first, name))
    norm = _norm(difference)
    if not math.isfinite(norm):
        raise BaseModelError(
            f"The weight of {module} holds NaN or infinity in one of the checkpoints.", "Download it again."
        )
    if norm == 0:
        return None
    kernel = difference.shape[1:]
    flat = difference.flatten(1)
    factors = _low_rank(flat, how, module)
    made = low_rank.stored(module, factors.to(flat.dtype), tuple(kernel), float(how.rank), how.dtype)
    up, down = made[f"{module}.lora_B"].float().flatten(1), made[f"{module}.lora_A"].float().flatten(1)
    left = flat.addmm_(up, down, alpha=-how.rank / factors.rank)
    whole = min(flat.shape)
    return made, RankRow(module, 1, (whole, whole), (factors.rank, factors.rank), norm, _norm(left))


def _low_rank(flat: Tensor, how: _How, module: str) -> low_rank.Factors:
    """The best approximation [out,in] ~ up @ down of at most a rank."""
    import torch

    rank = min(how.rank, *flat.shape)
    if min(flat.shape) <= max(_EXACT_UP_TO, rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
        found = low_rank.Decomposition(left, values, right)
    else:
        found = _randomised(flat, rank, module)
    if how.energy is not None:
        held = found.values.double().square().cumsum(0) / flat.double().square().sum()
        rank = min(rank, int((held < how.energy).sum()) + 1)
    return found.truncated(rank)


def _randomised(flat: Tensor, rank: int, module: str) -> low_rank.Decomposition:
    """The leading singular values and vectors, from a random projection refined by power iterations."""
    import torch

    generator = rng.generator_for(0, 0, 0, f"extract/{module}")
    width = min(rank + _OVERSAMPLING, *flat.shape)
    probe = torch.randn(flat.shape[1], width, generator=generator, dtype=flat.dtype)
    basis = torch.linalg.qr(flat @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(flat @ torch.linalg.qr(flat.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ flat, full_matrices=False)
    return low_rank.Decomposition(basis @ left, values, right)


def _compare_rest(first: Base, second: Base, modules: set[str], held: float, reporter: Reporter) -> Rest:
    """How much the tensors that no adapter holds have changed."""
    names = [
        name for name in first.slots if name in second.slots and name.removesuffix(".weight") not in modules
    ]
    changed: dict[str, float] = {}
    with reporter.task("Comparing norms, biases and embeddings", len(names), "tensor") as task:
        for name in names:
            norm = math.sqrt(sum(_norm(part) ** 2 for part in _difference_parts(first, second, name)))
            if norm:
                changed[name] = norm
            task.advance()
    total = math.hypot(*changed.values()) if changed else 0.0
    largest = sorted(changed, key=lambda name: -changed[name])[:5]
    return Rest(len(changed), total / math.hypot(total, held) if total else 0.0, tuple(largest))


def _difference_parts(first: Base, second: Base, name: str) -> Iterator[Tensor]:
    if first.slots[name][0].shape != second.slots[name][0].shape:
        raise BaseModelError(f"{name} has other shapes in the two checkpoints.")
    for ours, theirs in zip(weights.read_parts(first, name), weights.read_parts(second, name), strict=True):
        yield theirs.sub_(ours)


def _not_compared(first: Base, second: Base) -> tuple[str, ...]:
    alone = sorted({name.split(".")[0] for name in set(first.slots) ^ set(second.slots)})
    notes = [
        f"{component} is not whole in both checkpoints; what is in one alone was left out."
        for component in alone
    ]
    vae = weights.same_vae(first, second)
    if vae is None:
        notes.append(
            "The VAEs were not compared, as they are stored differently; an adapter does not hold them."
        )
    elif not vae:
        notes.append("The VAEs differ, and an adapter does not hold that.")
    return tuple(notes)


def _norm(values: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
