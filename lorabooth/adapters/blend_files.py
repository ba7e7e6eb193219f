"""Blending adapters that lie on the disk (the mathematics is in blend.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth.adapters import outputs
from lorabooth.adapters.blend import Method, Part, blend, check_options
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.rank_table import RankTable
from lorabooth.adapters.stored import StoredAdapter, open_adapter
from lorabooth.errors import AdapterError
from lorabooth.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlendReport:
    """What `blend_files` wrote.

    Attributes:
        out: the file.
        method: as in `blend.blend`.
        strengths: of the inputs, in order.
        family: of base models, "" when it cannot be told.
        layout: "kohya" or "diffusers".
        table: ranks and errors against the exact weighted sum.
        bytes_before: size of the inputs together.
        bytes_after: size of `out`.
    """

    out: Path
    method: Method
    strengths: tuple[float, ...]
    family: str
    layout: str
    table: RankTable
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "method": self.method,
            "strengths": list(self.strengths),
            "family": self.family,
            "layout": self.layout,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **self.table.to_dict(),
        }


def blend_files(
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    method: Method = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> BlendReport:
    """Combine adapter files into one; see `blend.blend` for the methods.

    Args:
        adapters: (file or folder, strength) of each.
        out: a new .safetensors file.
        method: how.
        rank: for "svd".
        density: for "ties", "dare" and "magnitude_prune".
        seed: for "dare".
        dtype: of the factors; float32 when None.
        layout: "kohya" or "diffusers"; None is kohya's where the family has it.
        overwrite: replace `out` if it exists; inputs are never replaced.
        reporter: hears of progress and of what had to be assumed.

    Returns:
        Ranks, errors and sizes.

    Raises:
        RecipeError: options that do not go together, or an output that cannot be written.
        AdapterError: an input that cannot be read or does not fit the others, or a wrong output. Nothing is
            written then.
    """
    say = reporter or Silent()
    out = Path(out)
    check_options(method, rank, density)
    if not adapters:
        raise AdapterError("There is nothing to blend: no adapter was given.")
    opened = [open_adapter(Path(path)) for path, _ in adapters]
    files = [path for adapter in opened for path in outputs.files_of(adapter)]
    outputs.check_output(out, files, overwrite=overwrite)
    metadata = _joined(opened)
    modules = {module for adapter in opened for module in adapter.modules}
    written = outputs.layout_for(metadata.family, modules, layout)
    for adapter in opened:
        for note in adapter.notes:
            say.warn(f"{adapter.path.name}: {note}")
    parts = [Part(a.tensors(), strength) for a, (_, strength) in zip(opened, adapters, strict=True)]
    kind = {} if dtype is None else {"dtype": dtype}
    blended = blend(parts, method, rank=rank, density=density, seed=seed, reporter=say, **kind)
    sizes = {path: path.stat().st_size for path in files}
    outputs.write(out, blended.tensors, metadata, written, dtype)
    return BlendReport(
        out=out,
        method=method,
        strengths=tuple(strength for _, strength in adapters),
        family=metadata.family,
        layout=written,
        table=blended.table,
        bytes_before=sum(sizes[path] for path in files),
        bytes_after=out.stat().st_size,
    )


def _joined(adapters: Sequence[StoredAdapter]) -> Metadata:
    """What is true of the blend: facts that all share, and everybody's trigger words."""
    known = [adapter.metadata for adapter in adapters]

    def shared(field: str) -> str:
        values = {getattr(metadata, field) for metadata in known}
        return str(values.pop()) if len(values) == 1 else ""

    return Metadata(
        family=outputs.common_family(adapters),
        base_id=shared("base_id"),
        base_sha256=shared("base_sha256"),
        targets=shared("targets"),
        trigger_words=tuple(dict.fromkeys(word for metadata in known for word in metadata.trigger_words)),
    )
