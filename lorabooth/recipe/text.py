"""A recipe's text -> plain values: the file, TOML, and what is wrong with either, with the line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from lorabooth.errors import RecipeError
from lorabooth.recipe.rules import printable

MAX_BYTES = 1 << 20
"""Larger files are no recipes, and are not read to their end."""
_SHOWN = 90
_LONG_INTEGER = re.compile(r"[0-9][0-9_]{4299,}")


def read(path: str | Path) -> str:
    """The text of a recipe file, UTF-8 with or without a byte order mark.

    Raises:
        RecipeError: it cannot be read, is too large, or is not UTF-8.
    """
    file = Path(path)
    name = printable(str(file))
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{name}: there is no such recipe file", "Check the path.") from None
    except IsADirectoryError:
        raise RecipeError(f"{name} is a folder", "Name a recipe file in it.") from None
    except OSError as error:
        raise RecipeError(f"{name}: the recipe file cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than {MAX_BYTES >> 10} KiB, so no recipe", "Name a TOML file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{name}: byte {error.start} is not UTF-8 text"
        raise RecipeError(what, "Save the recipe as UTF-8.") from None


def parse(text: str, where: str | Path) -> dict[str, Any]:
    """TOML as plain values.

    Args:
        text: TOML.
        where: named in errors.

    Raises:
        RecipeError: not TOML, nested too deeply, or an integer of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(_syntax_error(str(error), text, where)) from None
    except RecursionError:
        line = max(_lines(text), key=lambda each: each[1].count("[") + each[1].count("{"))[0]
        what = "lists or tables are nested too deeply"
        raise RecipeError(f"{printable(str(where))}: {what}, probably at line {line}") from None
    except ValueError:
        # tomllib lets Python's own limit on the digits of an integer through.
        raise RecipeError(_long_integer(text, where)) from None


def _syntax_error(message: str, text: str, where: str | Path) -> str:
    """The parser's message with the file, the line and a mark under the column."""
    place = re.search(r"\s*\((?:at line (\d+), column (\d+)|at end of document)\)$", message)
    plain = printable(message[: place.start()] if place else message, 200)
    lines = _lines(text)
    begin = f"{printable(str(where))}: not valid TOML"
    if place is None or place[1] is None:
        return f"{begin}: {plain} at the end of the file (line {len(lines)})"
    line, column = int(place[1]), int(place[2])
    whole = lines[line - 1][1] if line <= len(lines) else ""
    start = max(0, column - 1 - _SHOWN // 2) if len(whole) > _SHOWN else 0
    before, after = whole[start : column - 1], whole[column - 1 : start + _SHOWN]
    shown = printable(before.replace("\t", " "))
    mark = " " * len(shown) + "^"
    shown += printable(after.replace("\t", " "))
    return f"{begin} at line {line}, column {column}: {plain}\n  {shown}\n  {mark}"


def _long_integer(text: str, where: str | Path) -> str:
    begin = f"{printable(str(where))}: not valid TOML"
    for number, line in _lines(text):
        if found := _LONG_INTEGER.search(line):
            shown = printable(line[: found.start()].replace("\t", " ")[-_SHOWN // 2 :])
            digits = f"a number of {len(found[0]):,} digits"
            return f"{begin} at line {number}: {digits}\n  {shown}{found[0][:20]}..."
    return f"{begin}: a number has too many digits"


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines as TOML counts them, with their numbers from 1; never empty."""
    return list(enumerate(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), 1))
