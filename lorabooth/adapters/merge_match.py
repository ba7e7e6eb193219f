"""Which weights of a base an adapter's modules are, and by which factor each is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorabooth.adapters import names
from lorabooth.adapters.delta import Contribution
from lorabooth.adapters.stored import StoredAdapter
from lorabooth.checkpoints.inventory import Base
from lorabooth.errors import AdapterError


@dataclass(frozen=True)
class Merging:
    """One adapter to merge.

    Attributes:
        path: of the adapter.
        strength: factor on its effect; negative ones take it out.
        block_strengths: further factors for parts of it: a canonical module name, or the beginning of one
            ("text_encoder", "denoiser.down_blocks.1"; "denoiser." may be left out). The longest match counts.
    """

    path: Path
    strength: float = 1.0
    block_strengths: Mapping[str, float] = field(default_factory=dict)


FAMILY_HINT = "It was made for another family of base models."

Wanted = dict[str, list[Contribution]]
"""Canonical module -> what is added to its weight."""


def factor_of(merging: Merging, sign: float) -> Callable[[str], float]:
    """A canonical module -> the whole factor on its adapter's effect."""
    blocks = {_whole_name(key): value for key, value in merging.block_strengths.items()}

    def factor(module: str) -> float:
        matching = [key for key in blocks if _is_within(module, key)]
        block = blocks[max(matching, key=len)] if matching else 1.0
        return sign * merging.strength * block

    return factor


def _whole_name(block: str) -> str:
    """With the component, which may be left out for the denoiser."""
    return block if block.split(".")[0] in names.COMPONENTS else f"denoiser.{block}"


def _is_within(module: str, block: str) -> bool:
    return module == block or module.startswith(f"{block}.")


def require_blocks(adapters: Sequence[Merging], stored: Sequence[StoredAdapter]) -> None:
    """A part that does not exist is a slip of the pen, and would silently have no effect.

    Raises:
        AdapterError: names the part and those that there are; or a strength is not finite.
    """
    for merging, adapter in zip(adapters, stored, strict=True):
        if not all(map(math.isfinite, (merging.strength, *merging.block_strengths.values()))):
            raise AdapterError(f"{adapter.path.name}: strengths must be finite numbers.")
        for block in merging.block_strengths:
            if not any(_is_within(module, _whole_name(block)) for module in adapter.modules):
                parts = dict.fromkeys(".".join(module.split(".")[:3]) for module in adapter.modules)
                raise AdapterError(
                    f"{adapter.path.name} has no part {block!r}.", f"Its parts are {', '.join(parts)}."
                )


def match(
    base: Base, stored: Sequence[StoredAdapter], factors: Sequence[Callable[[str], float]]
) -> tuple[Wanted, tuple[str, ...]]:
    """What is added to each module's weight, and the modules that the base lacks or shapes otherwise.

    Args:
        base: opened.
        stored: the adapters.
        factors: of each adapter, from `factor_of`.
    """
    wanted: Wanted = {}
    leftovers: dict[str, None] = {}
    for adapter, factor in zip(stored, factors, strict=True):
        for module, found in adapter.modules.items():
            shape = base.weight_shape(module)
            if shape is None or not _fits(shape, found.down.shape, found.up.shape):
                leftovers[module] = None
                continue
            scale = factor(module) * found.alpha / found.rank
            if scale:
                wanted.setdefault(module, []).append(Contribution(found.down, found.up, scale))
    return wanted, tuple(leftovers)


def _fits(weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Whether factors fit a weight; a 1x1 convolution and a linear layer are the same matrix."""
    inner = (down[1], *(() if down[2:] == (1, 1) else down[2:]))
    return (up[0], *inner) == (weight[0], weight[1], *(() if weight[2:] == (1, 1) else weight[2:]))


def require_family(base: Base, stored: Sequence[StoredAdapter]) -> None:
    """Refuse adapters of another family that do not fit as a whole.

    Raises:
        AdapterError: names both families.
    """
    for adapter in stored:
        if adapter.family and base.family and adapter.family != base.family:
            fitting = sum(base.weight_shape(module) is not None for module in adapter.modules)
            if fitting < len(adapter.modules):
                raise AdapterError(
                    f"{adapter.path.name} is an adapter for {adapter.family}, but {base.path.name} is "
                    f"{base.family}.",
                    "Merge it into a base of its own family.",
                )


def does_not_fit(base: Base, stored: Sequence[StoredAdapter], leftovers: Sequence[str]) -> AdapterError:
    """The error that lists what is left over, and says what can be done."""
    total = len({module for adapter in stored for module in adapter.modules})
    listed = ", ".join(leftovers[:5]) + (f" and {len(leftovers) - 5} more" if len(leftovers) > 5 else "")
    return AdapterError(
        f"{len(leftovers)} of the adapter's {total} modules are absent from {base.path.name} or have another "
        f"shape there: {listed}.",
        "--allow-partial merges the others." if len(leftovers) < total else FAMILY_HINT,
    )
