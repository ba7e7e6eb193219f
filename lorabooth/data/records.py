"""Folders of photos and captions -> records. No pixel is read here; see `images.check` for that."""

from __future__ import annotations

import codecs
import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lorabooth.errors import DataError
from lorabooth.recipe.rules import printable
from lorabooth.types import Record, Role

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""File name endings that are read as photos, lower case; upper case is taken too."""

MAX_CAPTION_BYTES = 1 << 16
"""Text encoders take some hundred words: a larger file is no caption, and is not read to its end."""

_NO_PLACEHOLDERS: Mapping[str, str] = MappingProxyType({})
_NOT_READ = frozenset(
    {".heic", ".heif", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".jxl", ".psd", ".svg"}
)
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A directory entry that is not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What a folder of photos holds.

    Attributes:
        records: one per photo, in natural order ("2.jpg" before "10.jpg").
        skipped: every other entry of the folder, in the same order.
        notes: sentences worth showing, e.g. photos that have no caption file.
    """

    records: tuple[Record, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Used N of M files, with the reason for each that is not."""
        total = len(self.records) + len(self.skipped)
        lines = [f"used {len(self.records)} of {total} files"]
        lines += shown_skips(self.skipped)
        return "\n".join([*lines, *self.notes])


class CaptionError(DataError):
    """One caption file that cannot be used.

    Attributes:
        path: of it, as it is; the message shows it in printable form.
        reason: why.
    """

    def __init__(self, path: Path, reason: str, fix: str = "") -> None:
        super().__init__(f"{printable(str(path))}: {reason}", fix)
        self.path = path
        self.reason = reason


class CaptionsError(DataError):
    """All caption files of a folder that cannot be used.

    Attributes:
        problems: each with its reason.
        scan: the folder as it would be with the prompt instead of these captions.
    """

    def __init__(self, problems: Sequence[Skipped], scan: Scan, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.problems = tuple(problems)
        self.scan = scan


def scan(
    folder: Path,
    *,
    role: Role,
    subject: str,
    prompt: str,
    captions: bool,
    placeholders: Mapping[str, str] = _NO_PLACEHOLDERS,
) -> Scan:
    """List the photos of a flat folder with their captions.

    Args:
        folder: searched itself, not its subfolders.
        role: of every record.
        subject: name of the subject, in every record.
        prompt: caption of photos without a caption file, and of all photos if `captions` is off.
        captions: read same-named .txt files ("01.jpg" and "01.txt").
        placeholders: e.g. {"token": "sks", "noun": "dog"}; "{token}" and "{noun}" in captions and in the
            prompt are replaced literally. Other braces stay as they are.

    Returns:
        The records, and everything else in the folder with the reason why it is not used.

    Raises:
        DataError: the folder is missing, unreadable or without photos.
        CaptionsError: captions are empty, too large or not text: all of them, in one error.
    """
    entries = _entries(folder)
    photos, texts, skipped = _sort_out(folder, entries)
    if not photos:
        raise _no_photos(folder, skipped)
    by_stem = {_stem(path): path for path in texts} if captions else {}
    default = _fill(prompt, placeholders)
    records, bare = [], []
    problems: dict[Path, CaptionError] = {}
    for photo in photos:
        text_path = by_stem.get(_stem(photo))
        caption = default
        if text_path is not None:
            try:
                caption = _fill(read_caption(text_path), placeholders)
            except CaptionError as error:
                problems[text_path] = error
        elif captions:
            bare.append(printable(photo.name))
        records.append(Record(path=photo, caption=caption, role=role, subject=subject))
    skipped += _unused_texts(texts, photos, captions)
    skipped.sort(key=lambda skip: natural_key(skip.path.name))
    notes = (f"no caption file for {', '.join(bare)}: the prompt is used, {default!r}",) if bare else ()
    found = Scan(records=tuple(records), skipped=tuple(skipped), notes=notes)
    if problems:
        refused = [Skipped(path, error.reason) for path, error in problems.items()]
        raise CaptionsError(refused, found, [str(error) for error in problems.values()])
    return found


def record_id(record: Record) -> str:
    """A short stable printable name for logs: folder and file ("dog/01.jpg"), never an absolute path."""
    return printable(f"{record.path.absolute().parent.name}/{record.path.name}")


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key: numbers by value, letters without case, in Unicode NFC; ties by the name itself."""
    normal = unicodedata.normalize("NFC", name)
    pieces = [piece for piece in re.split(r"([0-9]+)", normal.casefold()) if piece]
    return tuple((0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in pieces), name


def read_caption(path: Path) -> str:
    """The caption in a text file: UTF-8 (with or without BOM) or UTF-16 with BOM, white space collapsed.

    Raises:
        CaptionError: the file cannot be read, is too large, is not text (the byte is named), or holds no
            caption.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise CaptionError(path, f"cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_CAPTION_BYTES:
        size = f"larger than {MAX_CAPTION_BYTES >> 10} KiB"
        raise CaptionError(path, f"{size}, so no caption", "Shorten it, or delete it to use the prompt.")
    caption = " ".join(_decode_text(path, data).split())
    if not caption:
        fix = "Write a caption into it, or delete it to use the prompt."
        raise CaptionError(path, "the caption is empty", fix)
    return caption


def _decode_text(path: Path, data: bytes) -> str:
    encoding, skip = "utf-8", 0
    if data.startswith(_UTF32):
        raise _not_text(path, 0, "UTF-32")
    for bom, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(bom):
            encoding, skip = name, len(bom)
    try:
        text = data[skip:].decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, skip + error.start, f"not {encoding.upper()}") from error
    if "\0" in text:
        before = text[: text.index("\0")].encode(encoding)
        raise _not_text(path, skip + len(before), "a zero byte; UTF-16 without a byte order mark?")
    return text


def _not_text(path: Path, offset: int, why: str) -> CaptionError:
    reason = f"not a caption in UTF-8 or UTF-16 with a byte order mark; byte {offset} ({why})"
    return CaptionError(path, reason, "Save the file as UTF-8.")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    name = printable(str(folder))
    try:
        mode = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{name}: there is no such folder of photos",
            "Check the path; a recipe's paths start at the recipe.",
        ) from None
    except OSError as error:
        what = f"{name}: this folder of photos cannot be opened: {error.strerror or error}"
        raise DataError(what, "Check the path and its permissions.") from error
    if not stat.S_ISDIR(mode):
        raise DataError(
            f"{name}: is a file, not a folder of photos", "Give the folder that holds the photos."
        )
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(
            f"{name}: cannot be listed: {error.strerror or error}", "Check its permissions."
        ) from error


def _sort_out(
    folder: Path, entries: Sequence[os.DirEntry[str]]
) -> tuple[list[Path], list[Path], list[Skipped]]:
    """Photos, .txt files and the rest."""
    photos: list[Path] = []
    texts: list[Path] = []
    skipped: list[Skipped] = []
    root = folder.resolve()
    for entry in entries:
        path = folder / entry.name
        suffix = path.suffix.lower()
        reason = _refusal(entry, path, root)
        if reason:
            skipped.append(Skipped(path, reason))
        elif suffix == ".txt":
            texts.append(path)
        elif suffix in SUFFIXES:
            photos.append(path)
        else:
            why = f"{suffix} is not read; convert it to PNG or JPEG" if suffix in _NOT_READ else "not a photo"
            skipped.append(Skipped(path, why))
    return photos, texts, skipped


def _refusal(entry: os.DirEntry[str], path: Path, root: Path) -> str:
    """Why an entry is not even looked at by its suffix; empty if it may be."""
    if entry.name.startswith("."):
        return "hidden"
    if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
        return "its name is not valid Unicode; rename it"
    if entry.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
            return "a link that leads nowhere"
        if not target.is_relative_to(root):
            return "a link that leads out of the folder; put the file itself here"
    if entry.is_dir():
        return "a folder; only the folder itself is searched"
    if not entry.is_file():
        return "not a regular file"
    return ""


def _unused_texts(texts: Sequence[Path], photos: Sequence[Path], captions: bool) -> list[Skipped]:
    if not captions:
        return [Skipped(path, "a text file, and captions are off") for path in texts]
    stems = {_stem(photo) for photo in photos}
    return [Skipped(path, "no photo has this name") for path in texts if _stem(path) not in stems]


def _no_photos(folder: Path, skipped: Sequence[Skipped]) -> DataError:
    fix = f"Put photos into it; read are {' '.join(SUFFIXES)}."
    lines = [f"{printable(str(folder))}: no photos in this folder", *shown_skips(skipped[:10])]
    return DataError("\n".join(lines), fix)


def shown_skips(skipped: Sequence[Skipped], *, whole_path: bool = False) -> list[str]:
    """One indented line per entry, its name in printable form: a name may hold line breaks."""
    return [
        f"  {printable(str(skip.path) if whole_path else skip.path.name)}: {skip.reason}" for skip in skipped
    ]


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)


def _fill(text: str, placeholders: Mapping[str, str]) -> str:
    # One pass, so that a value which looks like a placeholder stays as it is; not str.format, which
    # would trip over other braces and reach attributes.
    if not placeholders:
        return text
    pattern = "|".join(re.escape("{" + name + "}") for name in placeholders)
    return re.sub(pattern, lambda match: placeholders[match[0][1:-1]], text)
