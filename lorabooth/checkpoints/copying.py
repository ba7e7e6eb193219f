"""Which files of a base model a changed copy consists of, and where such a copy may go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth.checkpoints.header import PICKLE_SUFFIXES
from lorabooth.checkpoints.inventory import COMPONENT_FOLDERS, Base
from lorabooth.errors import AdapterError

_OTHER_WEIGHTS = (*PICKLE_SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml", ".gguf")


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The files of a changed copy of a base.

    Attributes:
        files: (file of the base, its path within the copy), in name order; of a single file, that one.
        n_bytes: their sizes together.
        left_out: files of the base that the copy does not have.
    """

    files: tuple[tuple[Path, Path], ...]
    n_bytes: int
    left_out: tuple[str, ...]


def plan_copy(base: Base, components: Collection[str]) -> CopyPlan:
    """What a copy of a base with changed components consists of.

    Weights of those components in formats that are not changed along (pickles, ONNX, ...), and whole
    checkpoints beside the component folders, are left out: they would still be the old model.

    Args:
        base: the base.
        components: canonical names of those whose weights change.
    """
    if base.kind == "file":
        return CopyPlan(((base.path, Path(base.path.name)),), base.path.stat().st_size, ())
    changed = {folder for folder, component in COMPONENT_FOLDERS.items() if component in components}
    files: list[tuple[Path, Path]] = []
    left_out: list[str] = []
    for relative in sorted(_walk(base.path)):
        if _is_stale(relative, changed):
            left_out.append(relative.as_posix())
        else:
            files.append((base.path / relative, relative))
    return CopyPlan(tuple(files), sum(source.stat().st_size for source, _ in files), tuple(left_out))


def require_output(base: Base, out: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that is an input, that is there already, or that is of another kind than the base.

    Raises:
        AdapterError: says which.
    """
    for given in (base.path, *inputs):
        if out.exists() and given.exists() and out.samefile(given):
            raise AdapterError(f"The output {out} is one of the inputs.", "Inputs are never written.")
    if base.kind == "file":
        if out.suffix.lower() != ".safetensors" or out.is_dir():
            raise AdapterError(
                f"{base.path.name} is one file, so the output must be a .safetensors file too, not {out}."
            )
    else:
        if out.suffix.lower() == ".safetensors":
            raise AdapterError(f"{base.path} is a folder, so the output must be a folder, not {out.name}.")
        _require_apart(base.path, out)
        if out.exists() and not _may_be_replaced(out):
            raise AdapterError(
                f"{out} exists and is not a base model folder, so it is not replaced.",
                "Choose another folder.",
            )
    if out.exists() and not overwrite and not _is_empty_folder(out):
        raise AdapterError(f"{out} exists already.", "Choose another output, or give --overwrite.")


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, relative; hidden ones (.git, .cache) are not part of the model."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(root) / name).relative_to(folder)


def _is_stale(relative: Path, changed: Collection[str]) -> bool:
    top = relative.parts[0]
    if len(relative.parts) == 1:
        return relative.suffix.lower() in (*_OTHER_WEIGHTS, ".safetensors")
    if top not in changed:
        return False
    name = relative.name.lower()
    return relative.suffix.lower() in _OTHER_WEIGHTS or (".bin.index" in name and name.endswith(".json"))


def _require_apart(base: Path, out: Path) -> None:
    inner, outer = out.resolve(), base.resolve()
    if outer in inner.parents or inner in outer.parents:
        raise AdapterError(
            f"The output {out} and the base {base} lie one inside the other.", "Choose a folder beside it."
        )


def _may_be_replaced(out: Path) -> bool:
    return out.is_dir() and ((out / "model_index.json").is_file() or _is_empty_folder(out))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
