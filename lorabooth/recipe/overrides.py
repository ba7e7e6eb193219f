"""`--set section.key=value`: replaces a key of a recipe's plain values, before they are checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Any

from lorabooth.errors import RecipeError
from lorabooth.recipe.rules import Key, key_text, printable, value_text
from lorabooth.recipe.schema import expanded_memory

_INDEX_DIGITS = 6
"""A longer number is no subject's index."""


def override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set keys in plain values, in place.

    Raises:
        RecipeError: one line per override that is not KEY=VALUE, whose value cannot be read, or whose key
            leads nowhere.
    """
    wrong: list[str] = []
    for text in overrides:
        key_part, equals, value_part = text.partition("=")
        key = _parse_key(key_part)
        if not equals or not key:
            wrong.append(f"  {printable(text, 60)}: is not KEY=VALUE, such as optim.lr=1e-4")
            continue
        try:
            value = _parse_value(value_part)
        except (RecursionError, ValueError):
            # Lists in lists in lists, or an integer of more digits than Python reads.
            value_shown = printable(value_part.strip(), 40)
            wrong.append(f"  {key_text(key)}: {value_shown} is nested too deeply, or has too many digits")
            continue
        if problem := _set(raw, key, value):
            wrong.append(f"  {key_text(key)}: {problem}")
    if wrong:
        raise RecipeError("\n".join([f"--set: {len(wrong)} problem{'s' * (len(wrong) > 1)}", *wrong]))


def _parse_key(text: str) -> Key:
    """Read "subjects.0.noun" or "subjects[0].noun" as ("subjects", 0, "noun"); empty if it is no key."""
    parts = re.sub(r"\[(\d+)\]", r".\1", text.strip()).split(".")
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts):
        return ()
    return tuple(int(p) if p.isdecimal() and len(p) <= _INDEX_DIGITS else p for p in parts)


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
        return _set_in_subject(raw, key, value)
    if len(key) > 2 or any(isinstance(part, int) for part in key):
        return "a key is section.key, such as optim.lr"
    if len(key) == 1:
        raw[key[0]] = value
        return ""
    if key[0] == "memory":
        raw["memory"] = expanded_memory(raw.get("memory", {}))
    table = raw.setdefault(key[0], {})
    if not isinstance(table, dict):
        return f"{key[0]} is {value_text(table)} in the recipe, not a section"
    table[str(key[1])] = value
    return ""


def _set_in_subject(raw: dict[str, Any], key: Key, value: object) -> str:
    given = raw.get("subjects", ())
    if not isinstance(given, list | tuple):
        return f"subjects is {value_text(given)} in the recipe, not a list of tables"
    if len(key) != 3 or not isinstance(key[1], int):
        return "name one subject by its number: subjects.0.noun"
    entries = raw["subjects"] = list(given)
    if key[1] > len(entries):
        return f"there are {len(entries)} subjects; the next is number {len(entries)}"
    if key[1] == len(entries):
        entries.append({})
    if not isinstance(entries[key[1]], dict):
        return f"subjects[{key[1]}] is {value_text(entries[key[1]])}, not a table"
    entries[key[1]][str(key[2])] = value
    return ""
