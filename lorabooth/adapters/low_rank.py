"""Products of two thin matrices: norms, distances and best approximations, without forming the product.

A module's delta is `up @ down` with up [out, r] and down [r, in]; a convolution's kernel is flattened into
`in` (LoRA, arXiv 2106.09685, section 4.1). Everything here costs O((out + in) r^2). Norms are taken in
float64, as they are differences of large numbers; bases need no more than float32, whose error is 1e-6 of the
delta. A 1280 x 5120 delta of rank 64 is decomposed by QR in 6 ms in float32 and 8 ms in float64 (two cores,
best of 15). Eigenvectors of Gram matrices in float64 take 4 ms, but square the condition number, so small
singular values and dependent columns are lost; QR is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabooth.adapters import names

# A squared norm is a sum of terms of both signs; below this share of their absolute sum it is rounding.
_ROUNDING = 1e-15


@dataclass(frozen=True)
class Factors:
    """A delta `up @ down`.

    Attributes:
        up: [out, r], float64 unless said otherwise.
        down: [r, in], of the same dtype.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Inner dimension r; the product's own rank may be lower."""
        return self.down.shape[0]

    def to(self, dtype: torch.dtype) -> Factors:
        """The factors in another dtype."""
        return Factors(self.up.to(dtype), self.down.to(dtype))

    def scaled(self, strength: float) -> Factors:
        """The product times a number, which goes into `up`."""
        return self if strength == 1 else Factors(self.up * strength, self.down)


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a delta: `left @ diag(values) @ right`.

    Attributes:
        left: [out, k] with orthonormal columns; k = min(out, r, in).
        values: [k], falling.
        right: [k, in] with orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def truncated(self, rank: int) -> Factors:
        """The best approximation of a rank (Eckart and Young, 1936), balanced: U sqrt(S) and sqrt(S) V^T.

        Its squared Frobenius distance to the delta is the sum of the squared values from `rank` on.
        """
        root = self.values[:rank].sqrt()
        return Factors(self.left[:, :rank] * root, root[:, None] * self.right[:rank])


def read(tensors: Mapping[str, Tensor], module: str) -> tuple[Factors, float]:
    """A canonical module's bare factors, flattened, and its scale alpha / rank."""
    down = tensors[f"{module}.lora_A"].detach().double()
    up = tensors[f"{module}.lora_B"].detach().double()
    return Factors(up.flatten(1), down.flatten(1)), float(tensors[f"{module}.alpha"]) / down.shape[0]


def delta(tensors: Mapping[str, Tensor], module: str) -> Factors:
    """A canonical module's effect (alpha / rank) * B A."""
    factors, scale = read(tensors, module)
    return factors.scaled(scale)


def stored(
    module: str,
    factors: Factors,
    kernel: Sequence[int],
    alpha: float,
    dtype: torch.dtype,
    *,
    keep_down: bool = False,
) -> dict[str, Tensor]:
    """Canonical tensors whose effect is the product.

    Args:
        module: canonical name.
        factors: the whole effect.
        kernel: shape of one row of lora_A: (in,) for a linear layer, (in, k, k) for a convolution.
        alpha: to be written; the factor rank / alpha that undoes it is shared by both factors.
        dtype: of the factors.
        keep_down: put that factor into lora_B alone, so that lora_A keeps its values.
    """
    undo = factors.rank / alpha
    on_down = 1.0 if keep_down else math.sqrt(undo)
    ones = (1,) * (len(kernel) - 1)
    up, down = factors.up * (undo / on_down), factors.down * on_down
    return {
        f"{module}.lora_A": down.reshape(factors.rank, *kernel).to(dtype).contiguous(),
        f"{module}.lora_B": up.reshape(*up.shape, *ones).to(dtype).contiguous(),
        f"{module}.alpha": torch.tensor(alpha, dtype=torch.float32),
    }


def common_alphas(ranks: Mapping[str, int]) -> dict[str, float]:
    """One alpha for every module of a component: the component's most frequent rank, the larger of equals.

    diffusers applies a single alpha to a component of a kohya file (see formats.level_alphas).

    Args:
        ranks: canonical module -> rank.

    Returns:
        Canonical module -> alpha.
    """
    owners = {module: names.split_module(module)[0] for module in ranks}
    chosen: dict[str, float] = {}
    for component in set(owners.values()):
        counts = Counter(rank for module, rank in ranks.items() if owners[module] == component)
        chosen[component] = float(max(counts, key=lambda rank: (counts[rank], rank)))
    return {module: chosen[component] for module, component in owners.items()}


def stack(parts: Sequence[Factors]) -> Factors:
    """The sum of deltas, exactly, at the sum of their ranks."""
    return Factors(torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts], 0))


def norm(factors: Factors) -> float:
    """Frobenius norm of the product."""
    total, absolute = _inner(factors, factors)
    return _root(total, absolute)


def compare(exact: Factors, made: Factors) -> tuple[float, float]:
    """Frobenius norms of a product, and of its difference to another.

    Through Gram matrices: |X - Y|^2 = <X, X> - 2 <X, Y> + <Y, Y>. A difference below some 1e-8 of the norm is
    lost in that and reads as zero, except where only `up` differs.
    """
    xx, xx_absolute = _inner(exact, exact)
    if exact.down.shape == made.down.shape and torch.equal(exact.down, made.down):
        # Nothing large cancels here, so float32 will do, at half the time.
        rounding = Factors(exact.up - made.up, exact.down).to(torch.float32)
        return _root(xx, xx_absolute), norm(rounding)
    xy, xy_absolute = _inner(exact, made)
    yy, yy_absolute = _inner(made, made)
    distance = _root(xx - 2 * xy + yy, xx_absolute + 2 * xy_absolute + yy_absolute)
    return _root(xx, xx_absolute), distance


def _inner(a: Factors, b: Factors) -> tuple[float, float]:
    """Frobenius inner product of two products, the sum of (B_a^T B_b) * (A_a A_b^T), and the sum of sizes."""
    terms = (a.up.T @ b.up) * (a.down @ b.down.T)
    return float(terms.sum()), float(terms.abs().sum())


def _root(total: float, absolute: float) -> float:
    return math.sqrt(total) if total > _ROUNDING * absolute else 0.0


def decompose(factors: Factors) -> Decomposition:
    """Singular values and vectors of the product, from the QR of both factors and the SVD of an r x r core.

    Computed in the factors' dtype: float32 is enough for bases.
    """
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Decomposition(q_up @ left, values, right @ q_down.T)


def best(factors: Factors, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    """The best approximation of a rank, for storing in a dtype; float64 like its input."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return decompose(factors.to(work)).truncated(rank).to(torch.float64)


def singular_values(factors: Factors) -> Tensor:
    """Only the values [min(out, r, in)] of `decompose`, at less than half of its cost."""
    r_up = torch.linalg.qr(factors.up, mode="r").R
    r_down = torch.linalg.qr(factors.down.T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_up @ r_down.T)
    return values
