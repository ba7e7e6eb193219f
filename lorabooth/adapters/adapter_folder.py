"""Where a converted adapter may go: a file, or a folder that is replaced only if it holds nothing but one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorabooth.adapters import layouts, lora_config
from lorabooth.adapters.folders import CONFIG_NAME, WEIGHTS_NAME
from lorabooth.checkpoints.header import read_header
from lorabooth.errors import AdapterError

SUFFIX = ".safetensors"


def is_file(out: Path) -> bool:
    """Whether an output is a file, by its name."""
    return out.suffix == SUFFIX


def check(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Args:
        out: a file ending in .safetensors, or a folder.
        inputs: files and folders that are read.
        overwrite: replace what is there, if that is an adapter; an input is never replaced.

    Raises:
        AdapterError: an input, taken, or a folder with other files.
    """
    for path in inputs:
        same = out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path))
        if same or (not is_file(out) and path.resolve().is_relative_to(out.resolve())):
            raise AdapterError(
                f"The output {out} is the input or holds it, and an input is never changed.",
                "Name another.",
            )
    if is_file(out) and out.is_dir():
        raise AdapterError(f"{out} is a folder, but its name is a file's.", "Name another.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise AdapterError(f"{out} exists already; --overwrite replaces it.")
    if not is_file(out) and not out.is_dir():
        raise AdapterError(f"{out} is a file, but its name is a folder's.", "Name another.")
    if out.is_dir() and (others := _others(out)):
        raise AdapterError(
            f"{out} is not replaced, as it holds more than an adapter: {layouts.some(sorted(others))}.",
            "Name another folder.",
        )


def _others(folder: Path) -> list[str]:
    """What in a folder is no file of an adapter."""
    out: list[str] = []
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name in lora_config.COMPONENTS:
            out += [
                f"{path.name}/{inner.name}"
                for inner in path.iterdir()
                if inner.name not in (CONFIG_NAME, WEIGHTS_NAME) or not inner.is_file()
            ]
        elif path.is_dir() or (path.name != CONFIG_NAME and not _is_adapter(path)):
            out.append(path.name)
    return out


def _is_adapter(path: Path) -> bool:
    if path.suffix != SUFFIX:
        return False
    try:
        return layouts.kind_of(read_header(path).entries) == "LoRA"
    except AdapterError:
        return False
