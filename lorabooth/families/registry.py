"""Which families there are, and which one a base on disk belongs to. A new family is one row here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.families.base import Family
from lorabooth.families.folder import PICKLE_SUFFIXES, Detected, detect_folder, pickle_error
from lorabooth.families.sd import SD1, SD2
from lorabooth.families.single_file import detect_file

FAMILIES: Mapping[str, Family] = MappingProxyType({"sd1": SD1, "sd2": SD2})


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        RecipeError: there is none; the message lists them.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    close = get_close_matches(name.casefold(), FAMILIES, n=1, cutoff=0.5)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    raise RecipeError(
        f"model.family = {name!r}: no such family of base models.",
        f"{guess}There are {', '.join(repr(n) for n in FAMILIES)}, and 'auto' reads it from the base.",
    )


def detect(path: Path) -> str:
    """Name of the family of a diffusers folder or a .safetensors checkpoint, from configs or header only.

    Raises:
        BaseModelError: absent, incomplete, or of a kind that is not supported.
    """
    return inspect(path).family


def inspect(path: Path) -> Detected:
    """As `detect`, and whether the files leave no doubt."""
    if path.is_dir():
        return detect_folder(path)
    if not path.is_file():
        raise BaseModelError(f"{path}: there is no such file or folder.")
    if path.suffix.casefold() in PICKLE_SUFFIXES or _looks_pickled(path):
        raise pickle_error(path)
    if path.suffix.casefold() != ".safetensors":
        raise BaseModelError(
            f"{path}: not a base model file.", "A base is a diffusers folder or one .safetensors checkpoint."
        )
    return detect_file(path)


def _looks_pickled(path: Path) -> bool:
    """A renamed pickle: a zip archive (torch.save) or pickle protocol 2 and up."""
    with path.open("rb") as file:
        start = file.read(9)
    # Safetensors starts with a length, which may look like a pickle's first bytes, but then comes "{".
    return (start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")) and (
        start[8:9] != b"{"
    )
