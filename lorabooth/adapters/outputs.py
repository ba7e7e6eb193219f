"""The file that a command writes from other adapters: where it may go, in which layout, how large it is."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth import durable
from lorabooth.adapters import file, formats, names
from lorabooth.adapters.family import naming_family
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import StoredAdapter
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def files_of(adapter: StoredAdapter) -> tuple[Path, ...]:
    """The files that an adapter's factors lie in."""
    factors = (factor for module in adapter.modules.values() for factor in (module.down, module.up))
    return tuple(dict.fromkeys(factor.path for factor in factors))


def check_output(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Args:
        out: file to be written, ending in .safetensors.
        inputs: files that are read.
        overwrite: replace `out` if it exists; an input is never replaced.

    Raises:
        AdapterError: not a .safetensors file, one of the inputs, or taken.
    """
    if out.suffix != ".safetensors":
        raise AdapterError(f"The output {out} must be a file that ends in .safetensors.")
    if any(out.resolve() == path.resolve() or (out.exists() and out.samefile(path)) for path in inputs):
        raise AdapterError(
            f"The output {out} is one of the inputs, which are never changed.", "Name another."
        )
    if out.is_dir():
        raise AdapterError(f"The output {out} is a folder.", "Name a file.")
    if out.exists() and not overwrite:
        raise AdapterError(f"The output {out} exists.", "Name another, or add --overwrite.")


def write(
    out: Path,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    layout: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the result; folders on the way to it are made.

    Raises:
        RecipeError: it cannot be written there.
        TrainingError: the disk is full.
    """
    with durable.user_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    file.write(out, tensors, described(metadata, tensors), layout, dtype)


def common_family(adapters: Sequence[StoredAdapter]) -> str:
    """The family of base models that all adapters fit; those that do not say go with any.

    Raises:
        AdapterError: they belong to different families.
    """
    found = {adapter.family: adapter.path.name for adapter in adapters if adapter.family}
    if len(found) > 1:
        told = ", ".join(f"{name} is for {family}" for family, name in found.items())
        raise AdapterError(f"The adapters are for different families of base models: {told}.")
    return next(iter(found), "")


def layout_for(family: str, modules: Collection[str], wanted: str | None = None) -> str:
    """The layout to write: kohya's, which most tools open, unless the modules have no such names."""
    return wanted or ("kohya" if naming_family(family, modules) in names.KOHYA_PREFIXES else "diffusers")


def described(metadata: Metadata, tensors: Mapping[str, Tensor]) -> Metadata:
    """Metadata with the denoiser's most frequent rank and alpha, and this program's version."""
    from lorabooth.version import __version__

    modules = formats.ranks_and_alphas(tensors)
    denoiser = [v for name, v in modules.items() if name.startswith("denoiser.")] or list(modules.values())
    rank, alpha = max(denoiser, key=denoiser.count)
    return replace(metadata, rank=rank, alpha=alpha, lorabooth_version=__version__)


def written_size(
    tensors: Mapping[str, Tensor], metadata: Metadata, layout: str, dtype: torch.dtype | None = None
) -> int:
    """Bytes of the file that `file.write` makes; found by writing it to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lorabooth-") as folder:
        path = Path(folder) / "size.safetensors"
        file.write(path, tensors, described(metadata, tensors), layout, dtype)
        return path.stat().st_size
