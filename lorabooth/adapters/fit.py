"""Whether an adapter's modules are in a base, with the shapes that they were trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth.adapters import layouts
from lorabooth.adapters.gather import FoundModule
from lorabooth.checkpoints.identify import FAMILY_NAMES
from lorabooth.checkpoints.inventory import Base, open_base

Remark = tuple[str, str, tuple[str, ...]]
"""A finding's code, its message, the names that it is about."""


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a base.

    Attributes:
        base: the base's name.
        family: the base's.
        matched: modules that are in the base with the right shape.
        problems: what does not fit.
        warnings: what is odd, though all fits.
    """

    base: str = ""
    family: str = ""
    matched: int = 0
    problems: tuple[Remark, ...] = ()
    warnings: tuple[Remark, ...] = ()


def against(modules: Mapping[str, FoundModule], family: str, path: Path) -> Fit:
    """Hold an adapter's modules against a base.

    Args:
        modules: canonical name -> module.
        family: the adapter's, "" where it cannot be told.
        path: the base.

    Raises:
        BaseModelError: the base is absent, broken, or of a layout that is not known.
    """
    base = open_base(path)
    absent, misfits = [], []
    for name, module in modules.items():
        shape = base.weight_shape(name)
        if shape is None:
            absent.append(name)
        elif not fits(module, shape):
            misfits.append(f"{name} (adapter {_shape_text(module)}, base {list(shape)})")
    matched = len(modules) - len(absent) - len(misfits)
    other = bool(family and base.family and family != base.family)
    families = f"This adapter is for {_named(family)}, the base is {_named(base.family)}"
    problems: list[Remark] = []
    warnings: list[Remark] = []
    if other and (absent or misfits):
        # One line: what else does not fit follows from it.
        problems.append(("family", f"{families}.", (*absent, *misfits)))
    else:
        problems += _remarks(absent, misfits, len(modules), base)
        if other:
            warnings.append(("family", f"{families}, though every module fits.", ()))
    return Fit(path.name or path.resolve().name, base.family, matched, tuple(problems), tuple(warnings))


def fits(module: FoundModule, weight: Sequence[int]) -> bool:
    """Whether a module's effect has a weight's shape; 1x1 convolutions and linear layers are one.

    Args:
        module: whole; of one that is not, or of a kind that does not tell, nothing is said.
        weight: [out,in] or [out,in,k,k].
    """
    if "lora_A" in module.parts and "lora_B" in module.parts:
        down, up = module.parts["lora_A"].shape, module.parts["lora_B"].shape
        kernel = module.parts["lora_mid"].shape[2:] if "lora_mid" in module.parts else down[2:]
        return _flat((*up[:1], *down[1:2], *kernel)) == _flat(weight)
    if "diff" in module.parts:
        return _flat(module.parts["diff"].shape) == _flat(weight)
    dims = module.dims
    return dims is None or (dims[0] == weight[0] and dims[1] in (weight[1], math.prod(weight[1:])))


def _remarks(absent: Sequence[str], misfits: Sequence[str], total: int, base: Base) -> list[Remark]:
    out: list[Remark] = []
    if absent:
        none = len(absent) == total
        some = f"{len(absent)} of {total} modules are not"
        which = f"None of the adapter's {total} modules is" if none else some
        out.append(("unmatched", f"{which} in the base: {layouts.some(absent)}.", tuple(absent)))
    if misfits:
        what = f"{len(misfits)} of {total} modules are of another shape than the base's layers"
        out.append(("misfit", f"{what}: {layouts.some(misfits, 3)}.", tuple(misfits)))
    if out and not base.modules:
        out.append(("unmatched", "The base has no layers of known names.", ()))
    return out


def _shape_text(module: FoundModule) -> str:
    if "lora_A" in module.parts and "lora_B" in module.parts:
        return str([*module.parts["lora_B"].shape[:1], *module.parts["lora_A"].shape[1:]])
    return str(list(module.dims)) if module.dims else "?"


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _named(family: str) -> str:
    return FAMILY_NAMES.get(family, family)
