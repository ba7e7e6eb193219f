"""A folder of subjects: which ones, what they are, whether they live, and which prompts they are asked.

Each subfolder is a subject. What it is comes, in this order, from the caller, from a `class.txt` in it, or
from DreamBench's table beside the folders. Photos are looked at by name only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth.data import records
from lorabooth.data.records import natural_key, read_caption
from lorabooth.errors import DataError, LoraboothError, RecipeError
from lorabooth.protocol import dreambench
from lorabooth.protocol.prompts import is_live
from lorabooth.recipe.rules import printable
from lorabooth.types import Role

CLASS_FILE = "class.txt"
_NAME = re.compile(r"[^\W_][\w .+-]*")
_KINDS = {"live": True, "object": False}


@dataclass(frozen=True, slots=True)
class ProtocolSubject:
    """One subject of a protocol.

    Attributes:
        name: of its folder.
        noun: the class noun.
        live: whether it is asked the prompts for what lives.
        photos: the folder.
    """

    name: str
    noun: str
    live: bool
    photos: Path


@dataclass(frozen=True, slots=True)
class SubjectsFolder:
    """A folder of subjects.

    Attributes:
        subjects: in the order of their names.
        published: DreamBench's file, where it lies beside them.
    """

    subjects: tuple[ProtocolSubject, ...]
    published: dreambench.Published | None = None


def read_subjects(
    root: Path, *, only: Sequence[str] = (), told: Mapping[str, str] | None = None
) -> SubjectsFolder:
    """The subjects in a folder.

    Args:
        root: holds a folder of photos per subject, and perhaps DreamBench's prompts_and_classes.txt.
        only: names of the ones that are wanted; empty is all.
        told: name -> "NOUN" or "NOUN, live" or "NOUN, object"; goes before what files say. A class.txt is
            written likewise.

    Raises:
        DataError: no such folder, no subjects in it, or a subject whose noun nobody tells.
        RecipeError: `only` or `told` name a subject that is not there.
    """
    given = dict(told or {})
    names = _folders(root)
    for option, wanted in (("--only", only), ("--nouns", tuple(given))):
        if unknown := [name for name in wanted if name not in names]:
            raise RecipeError(
                f"{option}: {printable(str(root))} has no subject {', '.join(map(printable, unknown))}",
                f"There are {printable(', '.join(names), 400)}.",
            )
    file = root / dreambench.FILE_NAME
    published = dreambench.read(file) if file.is_file() else None
    found, silent = [], []
    for name in names:
        if only and name not in only:
            continue
        text = given.get(name) or _class_text(root / name)
        if text is not None:
            noun, live = parse_class(text, f'the class of "{printable(name)}"')
        elif published is not None and name in published.classes:
            noun = published.classes[name]
            live = noun in dreambench.LIVE_CLASSES
        else:
            silent.append(name)
            continue
        found.append(ProtocolSubject(name, noun, live, root / name))
    if silent:
        raise DataError(
            f"{printable(str(root))}: nobody says what these subjects are: "
            f"{printable(', '.join(silent), 400)}",
            f"Write the class noun into {silent[0]}/{CLASS_FILE} (and so on), give --nouns "
            f"{silent[0]}=NOUN, or put DreamBench's {dreambench.FILE_NAME} beside the folders.",
        )
    return SubjectsFolder(tuple(found), published)


def parse_class(text: str, where: str) -> tuple[str, bool]:
    """The noun, and whether it lives: "dog", "rag doll, object", "snail, live".

    Raises:
        RecipeError: it is not of this form.
    """
    noun, comma, kind = (part.strip() for part in text.partition(","))
    if not noun or (comma and kind.lower() not in _KINDS) or not printable(noun) == noun:
        raise RecipeError(
            f'{where}: "{printable(text, 60)}" is not understood',
            'Write the class noun, and if need be whether it lives: "snail, live" or "rag doll, object".',
        )
    return " ".join(noun.split()), _KINDS[kind.lower()] if comma else is_live(noun)


def photos_digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and bytes of a subject's photos: are they the same as they were?

    Raises:
        DataError: the folder is missing or without photos, or one cannot be read.
    """
    scan = records.scan(folder, role=Role.INSTANCE, subject="", prompt="", captions=False)
    state = hashlib.sha256()
    for record in scan.records:
        try:
            with record.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"{printable(str(record.path))}: cannot be read: {why}", "Check it.") from error
        state.update(f"{record.path.name}/{content}/".encode(errors="backslashreplace"))
    return state.hexdigest()


def _folders(root: Path) -> list[str]:
    """Names of the subject folders: hidden ones and those that are no folders are no subjects."""
    try:
        entries = [entry.name for entry in root.iterdir() if entry.is_dir()]
    except OSError as error:
        raise DataError(
            f"--subjects: {printable(str(root))} cannot be listed: {error.strerror or error}",
            "Give a folder that holds a folder of photos for each subject.",
        ) from error
    names = sorted((name for name in entries if not name.startswith(".")), key=natural_key)
    if odd := [name for name in names if not _NAME.fullmatch(name)]:
        # The names become those of run folders, and stand in tables.
        raise DataError(
            f"--subjects: these folders' names cannot be used: {printable(', '.join(odd), 400)}",
            "Rename them: letters, digits, spaces and . _ + - only, a letter or digit first.",
        )
    if not names:
        raise DataError(
            f"--subjects: there are no folders in {printable(str(root))}",
            "Give a folder that holds a folder of photos for each subject.",
        )
    return names


def _class_text(folder: Path) -> str | None:
    """What a subject's class.txt says, if there is one.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    path = folder / CLASS_FILE
    try:
        return read_caption(path) if path.is_file() else None
    except LoraboothError as error:
        raise DataError(error.what, "Write the class noun into it, such as: dog") from error
