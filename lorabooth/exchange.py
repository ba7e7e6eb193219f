"""The public functions on adapter files that take a base model: whatever names a base is found first.

Those that take files alone are the rooms' own: `inspect_path`, `convert_file`, `blend_files`, `resize_file`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.adapters.check import CheckReport, check_adapter
from lorabooth.adapters.merge import merge as merge_files
from lorabooth.adapters.merge_match import Merging
from lorabooth.adapters.merge_report import MergeReport
from lorabooth.families import source
from lorabooth.progress import Reporter

if TYPE_CHECKING:
    import torch

    from lorabooth.adapters.extract import ExtractReport


def merge(
    base: str | Path,
    adapters: Sequence[Merging | tuple[Path | str, float] | Path | str],
    out: Path | str,
    *,
    reverse: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> MergeReport:
    """Write a base model with adapters merged into its weights, or taken out again.

    Args:
        base: a diffusers folder, a .safetensors checkpoint in the original layout, "pocket" or a hub id.
        adapters: files or folders, alone, with a strength, or as `Merging` with strengths by block.
        out: a folder for a folder, a .safetensors file for a file.
        reverse: subtract instead of add: takes adapters out of a base that they were merged into.
        allow_partial: merge what fits, and list the rest; otherwise a single leftover is an error.
        overwrite: replace an earlier result at `out`.
        reporter: hears of the progress.

    Raises:
        AdapterError, BaseModelError, RecipeError, TrainingError: see there.
    """
    found, _ = source.locate(str(base), reporter=reporter)
    return merge_files(
        found,
        [_merging(one) for one in adapters],
        Path(out),
        reverse=reverse,
        allow_partial=allow_partial,
        overwrite=overwrite,
        reporter=reporter,
    )


def check(
    path: Path | str, base: str | Path | None = None, *, reporter: Reporter | None = None
) -> CheckReport:
    """Whether an adapter is sound, and whether it fits a base.

    Args:
        path: file or folder.
        base: as for `merge`; None looks at the adapter alone.
        reporter: hears of the progress.

    Raises:
        AdapterError: the file cannot be read at all. What is merely wrong with it is in the report.
        BaseModelError: the base is absent or broken.
    """
    if base is None:
        return check_adapter(Path(path), None, reporter)
    found, _ = source.locate(str(base), reporter=reporter)
    report = check_adapter(Path(path), found, reporter)
    return report if Path(base).exists() else replace(report, base=str(base))


def extract(
    base: str | Path,
    tuned: str | Path,
    out: Path | str,
    *,
    rank: int,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ExtractReport:
    """Write the adapter that, merged into `base`, comes nearest to `tuned`.

    Args:
        base: as for `merge`.
        tuned: another base model of the same family; the layouts may differ.
        out: a new .safetensors file.
        rank: largest rank of a module.
        energy: lowers a module's rank to what holds this share of its squared change, in (0, 1].
        dtype: of the factors; float32 when None.
        overwrite: replace `out` if it exists; inputs are never replaced.
        reporter: hears of the progress.

    Raises:
        AdapterError, BaseModelError, RecipeError, TrainingError: see `adapters.extract.extract`.
    """
    from lorabooth.adapters import extract as extracting  # torch, which the others do without until they read

    found, _ = source.locate(str(base), reporter=reporter)
    other, _ = source.locate(str(tuned), reporter=reporter)
    return extracting.extract(
        found,
        other,
        Path(out),
        rank=rank,
        energy=energy,
        dtype=dtype,
        overwrite=overwrite,
        reporter=reporter,
    )


def _merging(one: Merging | tuple[Path | str, float] | Path | str) -> Merging:
    if isinstance(one, Merging):
        return one
    if isinstance(one, tuple):
        return Merging(Path(one[0]), float(one[1]))
    return Merging(Path(one))
