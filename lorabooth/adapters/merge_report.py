"""What a merge changed, and what it lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MergedModule:
    """How one weight was changed.

    Attributes:
        module: canonical name.
        relative_change: Frobenius norm of the change over that of the weight.
        rounding: norm of what the cast to the base's dtype lost, over that of the change.
    """

    module: str
    relative_change: float
    rounding: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the merged base.
        family: of the base, "" where it is not known.
        n_modules: how many weights were changed.
        n_bytes: size of the result.
        seconds: that it took.
        waited_s: of these, waiting for the disk after everything was computed and written.
        dtypes: of the changed weights, by safetensors' names.
        modules: each of them.
        leftovers: modules of the adapters that the base does not have (only with `allow_partial`).
        left_out: files of a base folder that were not copied, because they hold the unmerged model.
        notes: what had to be assumed, for the user.
    """

    out: Path
    family: str
    n_modules: int
    n_bytes: int
    seconds: float
    waited_s: float
    dtypes: tuple[str, ...]
    modules: tuple[MergedModule, ...]
    leftovers: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_change(self) -> MergedModule:
        """The module whose weight changed most."""
        return max(self.modules, key=lambda module: module.relative_change)

    @property
    def mean_change(self) -> float:
        """Mean over the modules of the relative change."""
        return sum(module.relative_change for module in self.modules) / len(self.modules)

    @property
    def mean_rounding(self) -> float:
        """Mean over the modules of the share that the cast lost."""
        return sum(module.rounding for module in self.modules) / len(self.modules)

    @property
    def worst_rounding(self) -> MergedModule:
        """The module that lost most of its change to the base's dtype."""
        return max(self.modules, key=lambda module: module.rounding)
