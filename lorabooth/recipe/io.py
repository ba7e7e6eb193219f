"""Recipes in and out: TOML files, overrides, and the comparison of two recipes.

Paths in a recipe file are relative to that file; once read, they are absolute.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os.path
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Float, Item, Table, Trivia

from lorabooth.errors import RecipeError
from lorabooth.recipe.check import build
from lorabooth.recipe.rules import Key, key_text, value_text
from lorabooth.recipe.schema import Recipe, Section

CHANGEABLE = frozenset(
    {
        "optim.steps",
        "run.sample_prompts",
        "run.sample_every",
        "run.sample_count",
        "run.checkpoint_every",
        "run.keep",
        "run.tracker",
        "run.out",
    }
)
"""Keys that may differ when a run goes on: none of them changes what the steps already done have learned."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a TOML file, UTF-8, with or without a byte order mark.
        overrides: "section.key=value" texts that replace what the file says; paths in them are relative to
            the current directory.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or the recipe is wrong.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"{file}: there is no such recipe file", "Check the path.") from None
    except IsADirectoryError:
        raise RecipeError(f"{file} is a folder", "Name a recipe file in it.") from None
    except OSError as error:
        raise RecipeError(f"{file}: the recipe file cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"{file}: byte {error.start} is not UTF-8 text"
        raise RecipeError(what, "Save the recipe as UTF-8.") from None
    return loads(text, file, overrides)


def loads(text: str, where: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe from TOML text.

    Args:
        text: TOML.
        where: the file that the text is from (need not exist): names errors, and its folder is what paths
            are relative to.
        overrides: as for `load`.

    Raises:
        RecipeError: not TOML, or the recipe is wrong; all errors at once.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(_syntax_error(str(error), text, where)) from None
    _resolve_paths(raw, Path(where).parent)
    _override(raw, overrides)
    return build(raw, str(where))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some keys replaced.

    Args:
        recipe: where to start from.
        overrides: "optim.lr=1e-4", "subjects.0.noun=dog", "run.sample_prompts=['a','b']": the value is TOML,
            or else a plain word or text. The index after the last subject adds a subject.

    Raises:
        RecipeError: an override cannot be understood or the result is wrong; all errors at once.
    """
    raw = recipe.model_dump()
    _override(raw, overrides)
    return build(raw, "--set")


def from_mapping(raw: Mapping[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """A checked recipe from plain values (command line options), paths relative to the current directory.

    Raises:
        RecipeError: all errors at once.
    """
    values = copy.deepcopy(dict(raw))
    _resolve_paths(values, Path())
    _override(values, overrides)
    return build(values, where)


def dump(recipe: Recipe, folder: Path | None = None) -> str:
    """The recipe as TOML with every key, and a comment for each; `loads` reads back an equal recipe.

    Args:
        recipe: any recipe, its paths absolute, as every way of loading one leaves them.
        folder: where the text will lie: paths within it are written relative to it, so that a run folder
            can be moved. None writes paths as they are.
    """
    document = tomlkit.document()
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, Section):
            document.add(tomlkit.nl())
            document.add(name, _table(value, (name,), folder))
        elif value:
            tables = tomlkit.aot()
            for entry in value:
                tables.append(_table(entry, (name,), folder))
            document.add(tomlkit.nl())
            document.add(name, tables)
    return tomlkit.dumps(document).lstrip("\n")


def fingerprint(recipe: Recipe) -> str:
    """A digest (hex, 16 digits) of everything that may not change when a run goes on; see `CHANGEABLE`."""
    kept = {key_text(key): value for key, value in _leaves(recipe) if key_text(key) not in CHANGEABLE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Recipe, new: Recipe, *, changeable: bool = False) -> list[tuple[str, object, object]]:
    """What differs between two recipes.

    Args:
        old: for instance the recipe in a run folder.
        new: for instance the recipe that is asked for now.
        changeable: also list keys that may change when a run goes on.

    Returns:
        (key, old value, new value) in the recipe's order; a subject that only one of them has gives None for
        the other's values. Empty if and only if the fingerprints are equal (without `changeable`).
    """
    before = {key_text(key): value for key, value in _leaves(old)}
    after = {key_text(key): value for key, value in _leaves(new)}
    keys = [key for key in dict.fromkeys([*before, *after]) if changeable or key not in CHANGEABLE]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


# ---- reading ----


def _syntax_error(message: str, text: str, where: str | Path) -> str:
    """The parser's message with the file, the line and a mark under the column."""
    place = re.search(r"\s*\((?:at line (\d+), column (\d+)|at end of document)\)$", message)
    plain = message[: place.start()] if place else message
    lines = text.splitlines() or [""]
    if place is None or place[1] is None:
        return f"{where}: not valid TOML: {plain} at the end of the file (line {len(lines)})"
    line, column = int(place[1]), int(place[2])
    shown = lines[line - 1] if line <= len(lines) else ""
    mark = " " * (column - 1) + "^"
    return f"{where}: not valid TOML at line {line}, column {column}: {plain}\n  {shown}\n  {mark}"


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths of a freshly parsed recipe absolute; wrong types are left for the check to report."""
    subjects = raw.get("subjects")
    for table in subjects if isinstance(subjects, list) else []:
        _resolve(table, "images", folder)
    _resolve(raw.get("prior"), "images", folder)
    _resolve(raw.get("run"), "out", folder)
    model = raw.get("model")
    base = model.get("base") if isinstance(model, dict) else None
    # A hub id looks like a relative path; what exists beside the recipe, or is written as a path, is a path.
    if not isinstance(base, str) or base in ("", "pocket"):
        return
    if base.startswith((".", "~")) or (folder / base).exists():
        _resolve(model, "base", folder)


def _resolve(table: object, key: str, folder: Path) -> None:
    if not isinstance(table, dict):
        return
    value = table.get(key)
    if isinstance(value, str) and value.strip() not in ("", "auto"):
        table[key] = absolute(value.strip(), folder)


def absolute(path: str, folder: Path) -> str:
    """A path as an absolute one, relative ones taken from `folder`; symbolic links are kept as they are."""
    return os.path.abspath(folder / Path(path).expanduser())  # noqa: PTH100 - resolve() would follow links


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set keys in plain values, in place; paths that are still relative are taken from the current directory.

    Raises:
        RecipeError: one line per override that is not KEY=VALUE or whose key leads nowhere.
    """
    wrong: list[str] = []
    for override in overrides:
        key_part, equals, value_part = override.partition("=")
        key = _parse_key(key_part)
        if not equals or not key:
            wrong.append(f"  {override}: is not KEY=VALUE, such as optim.lr=1e-4")
            continue
        if problem := _set(raw, key, _parse_value(value_part)):
            wrong.append(f"  {key_text(key)}: {problem}")
    if wrong:
        raise RecipeError("\n".join([f"--set: {len(wrong)} problem{'s' * (len(wrong) > 1)}", *wrong]))
    _resolve_paths(raw, Path())


def _parse_key(text: str) -> Key:
    """Read "subjects.0.noun" or "subjects[0].noun" as ("subjects", 0, "noun"); empty if it is no key."""
    parts = re.sub(r"\[(\d+)\]", r".\1", text.strip()).split(".")
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts):
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _parse_value(text: str) -> object:
    """A TOML value, or the text itself where it is none: `dog`, `a photo of a {token} dog`."""
    try:
        parsed = tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return parsed["value"] if len(parsed) == 1 else text.strip()


def _set(raw: dict[str, Any], key: Key, value: object) -> str:
    """Put a value at a key; returns what is wrong, or ""."""
    if isinstance(key[0], int):
        return "a key begins with a section, such as optim.lr"
    if key[0] == "subjects" and len(key) > 1:
        entries = raw.setdefault("subjects", [])
        if not isinstance(entries, list):
            entries = raw["subjects"] = list(entries) if isinstance(entries, tuple) else []
        if len(key) != 3 or not isinstance(key[1], int):
            return "name one subject by its number: subjects.0.noun"
        if key[1] > len(entries):
            return f"there are {len(entries)} subjects; the next is number {len(entries)}"
        if key[1] == len(entries):
            entries.append({})
        entries[key[1]][key[2]] = value
        return ""
    if len(key) > 2 or any(isinstance(part, int) for part in key):
        return "a key is section.key, such as optim.lr"
    if len(key) == 1:
        raw[key[0]] = value
        return ""
    table = raw.setdefault(key[0], {})
    if not isinstance(table, dict):
        return f"{key[0]} is {value_text(table)} in the recipe, not a section"
    table[str(key[1])] = value
    return ""


# ---- writing and comparing ----


def _table(section: Section, prefix: Key, folder: Path | None) -> Table:
    table = tomlkit.table()
    if section.__doc__:
        table.comment(section.__doc__.splitlines()[0])
    for name, field in type(section).model_fields.items():
        for line in (field.description or "").splitlines():
            table.add(tomlkit.comment(line.strip()))
        value = getattr(section, name)
        if folder is not None and (*prefix, name) in _PATHS:
            value = _relative(value, folder)
        table.add(name, _item(value))
    return table


_PATHS = frozenset({("model", "base"), ("subjects", "images"), ("prior", "images"), ("run", "out")})


def _relative(path: str, folder: Path) -> str:
    """A path within `folder` as "./path", which no hub id looks like; other paths as they are."""
    try:
        inside = Path(path).relative_to(absolute(".", folder))
    except ValueError:
        return path
    return f"./{inside.as_posix()}" if inside.parts else "."


def _item(value: object) -> Item:
    if isinstance(value, float):
        return Float(value, Trivia(), _float_text(value))
    if isinstance(value, tuple):
        array = tomlkit.array()
        array.extend(value)
        return array.multiline(len(value) > 1)
    return tomlkit.item(value)


def _float_text(value: float) -> str:
    """The shortest text that reads back as the same number: 0.0001 as 1e-4, 0.01 as it is."""
    text = repr(value)
    if value == 0 or (abs(value) >= 1e-3 and "e" not in text):
        return text
    sign, digits, exponent = Decimal(text).normalize().as_tuple()
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    mantissa = f"{first}.{rest}" if rest else first
    return f"{'-' * sign}{mantissa}e{int(exponent) + len(digits) - 1}"


def _leaves(recipe: Recipe) -> Iterator[tuple[Key, object]]:
    """Every key with its value, in the schema's order."""
    for name, part in recipe.model_dump().items():
        if isinstance(part, dict):
            yield from (((name, key), value) for key, value in part.items())
        else:
            for i, entry in enumerate(part):
                yield from (((name, i, key), value) for key, value in entry.items())
