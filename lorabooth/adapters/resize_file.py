"""Resizing an adapter that lies on the disk (the mathematics is in resize.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth.adapters import outputs
from lorabooth.adapters.rank_table import RankTable
from lorabooth.adapters.resize import check_rule, dtype_of, resize
from lorabooth.adapters.stored import open_adapter
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ResizeReport:
    """What `resize_file` wrote.

    Attributes:
        out: the file.
        family: of base models, "" when it cannot be told.
        layout: "kohya" or "diffusers".
        table: ranks and errors against the input.
        bytes_before: size of the input.
        bytes_after: size of `out`.
    """

    out: Path
    family: str
    layout: str
    table: RankTable
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "family": self.family,
            "layout": self.layout,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **self.table.to_dict(),
        }


def resize_file(
    path: Path,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> ResizeReport:
    """Lower an adapter file's ranks; see `resize.resize` for the three rules, of which one must be given.

    Args:
        path: file or folder.
        out: a new .safetensors file, in diffusers' layout if the input is, else kohya's where the family has
            it.
        rank: of every module.
        energy: share of each module's squared singular values to keep.
        max_bytes: the largest size of `out`, header included.
        dtype: of the factors; None keeps the input's.
        overwrite: replace `out` if it exists; the input is never replaced.
        reporter: hears of progress and of what had to be assumed.

    Returns:
        Ranks, errors and sizes.

    Raises:
        RecipeError: not exactly one rule, or an output that cannot be written.
        AdapterError: an input that cannot be read, a size that cannot be reached, or a wrong output. Nothing
            is written then.
    """
    say = reporter or Silent()
    out = Path(out)
    check_rule(rank, energy, max_bytes)
    adapter = open_adapter(Path(path))
    files = outputs.files_of(adapter)
    outputs.check_output(out, files, overwrite=overwrite)
    metadata = adapter.metadata
    layout = outputs.layout_for(
        metadata.family, adapter.modules, "diffusers" if adapter.layout == "diffusers" else None
    )
    for note in adapter.notes:
        say.warn(f"{adapter.path.name}: {note}")
    tensors = adapter.tensors()
    kind = dtype or dtype_of(tensors)
    resized = resize(
        tensors,
        rank=rank,
        energy=energy,
        max_bytes=max_bytes,
        dtype=kind,
        file_size=lambda blank: outputs.written_size(blank, metadata, layout, kind),
        reporter=say,
    )
    bytes_before = sum(one.stat().st_size for one in files)
    outputs.write(out, resized.tensors, metadata, layout, kind)
    return ResizeReport(out, metadata.family, layout, resized.table, bytes_before, out.stat().st_size)
