"""Recipes in and out: TOML files, overrides, and the comparison of two recipes.

Paths in a recipe file are relative to that file; once read, they are absolute.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os.path
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Float, Item, Table, Trivia

from lorabooth.recipe.check import build
from lorabooth.recipe.overrides import override
from lorabooth.recipe.rules import Key, key_text, printable
from lorabooth.recipe.schema import EvaluationSection, Recipe, Section
from lorabooth.recipe.text import parse, read

CHANGEABLE = frozenset(
    {
        "memory.fit",
        "memory.budget",
        "memory.on_oom",
        "memory.checkpointing",
        "memory.checkpoint_blocks",
        "memory.checkpoint_offload",
        "memory.stream",
        "memory.in_turn",
        "memory.vae_slicing",
        "memory.vae_tiling",
        "speed.compile",
        "optim.steps",
        "evaluation.dino",
        "evaluation.clip",
        "evaluation.lpips",
        "run.sample_prompts",
        "run.sample_every",
        "run.sample_count",
        "run.sample_steps",
        "run.sample_guidance",
        "run.checkpoint_every",
        "run.keep",
        "run.select",
        "run.select_prompts",
        "run.select_images",
        "run.stop_early",
        "run.validation_every",
        "run.tracker",
        "run.out",
    }
)
"""Keys that may differ when a run goes on: none of them changes what the steps already done have learned.

Those of [memory] and speed.compile leave the gradient equal (within the rounding of another order of
additions): a run that ran out of memory goes on with the next technique, one that is slow goes on compiled.
speed.cuda_graph is none of them: it keeps the optimizer's counters elsewhere.
"""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: a TOML file, UTF-8, with or without a byte order mark.
        overrides: "section.key=value" texts that replace what the file says; paths in them are relative to
            the current directory.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or the recipe is wrong.
    """
    return loads(read(path), path, overrides)


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
    raw = parse(text, where)
    _resolve_paths(raw, Path(where).parent)
    _override(raw, overrides)
    return build(raw, printable(str(where)))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some keys replaced.

    Args:
        recipe: where to start from.
        overrides: "optim.lr=1e-4", "subjects.0.noun=dog", "run.sample_prompts=['a','b']": the value is TOML,
            or else a plain word or text. The index after the last subject adds a subject.

    Raises:
        RecipeError: an override cannot be understood or the result is wrong; all errors at once.
    """
    # What nobody wrote stays unwritten: `memory.fit` may choose it.
    raw = recipe.model_dump(exclude_unset=True)
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


def differences(
    old: Recipe, new: Recipe, *, changeable: bool = False, ignore: Collection[str] = ()
) -> list[tuple[str, object, object]]:
    """What differs between two recipes.

    Args:
        old: for instance the recipe in a run folder.
        new: for instance the recipe that is asked for now.
        changeable: also list keys that may change when a run goes on.
        ignore: further keys that are not compared: "model.base", "subjects[0].images", or "subjects.images"
            for that of every subject.

    Returns:
        (key, old value, new value) in the recipe's order; a subject that only one of them has gives None for
        the other's values. Empty if and only if the fingerprints are equal (without `changeable` and
        `ignore`).
    """
    left_out = frozenset(ignore) | (frozenset() if changeable else CHANGEABLE)
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        (key_text(key), before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
        and key_text(key) not in left_out
        and f"{key[0]}.{key[-1]}" not in left_out
    ]


# ---- reading ----


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths of a freshly parsed recipe absolute; wrong types are left for the check to report."""
    subjects = raw.get("subjects")
    for table in subjects if isinstance(subjects, list) else []:
        _resolve(table, "images", folder)
    _resolve(raw.get("prior"), "images", folder)
    _resolve(raw.get("run"), "out", folder)
    _resolve_named(raw.get("model"), "base", folder)
    for key in EvaluationSection.model_fields:
        _resolve_named(raw.get("evaluation"), key, folder)


def _resolve_named(table: object, key: str, folder: Path) -> None:
    """Likewise, where a value may also be a hub id or "pocket".

    A hub id looks like a relative path; what exists beside the recipe, or is written as a path, is a path.
    """
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, str) or value.strip() in ("", "auto", "pocket"):
        return
    # os.path.exists, because Path.exists raises for names that are too long; `rules` tells of those.
    if value.startswith((".", "~")) or os.path.exists(folder / value):  # noqa: PTH110
        _resolve(table, key, folder)


def _resolve(table: object, key: str, folder: Path) -> None:
    if not isinstance(table, dict):
        return
    value = table.get(key)
    if isinstance(value, str) and value.strip() not in ("", "auto"):
        table[key] = absolute(value.strip(), folder)


def absolute(path: str, folder: Path) -> str:
    """A path as an absolute one, relative ones taken from `folder`; symbolic links are kept as they are.

    One that begins with the home of a user who does not exist stays, for `rules` to tell of.
    """
    try:
        home = Path(path).expanduser()
    except RuntimeError:
        return path
    return os.path.abspath(folder / home)  # noqa: PTH100 - resolve() would follow links


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `--set`, in place; paths that are still relative are taken from the current directory.

    Raises:
        RecipeError: as `overrides.override`.
    """
    override(raw, overrides)
    _resolve_paths(raw, Path())


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


_PATHS = frozenset(
    {
        ("model", "base"),
        ("subjects", "images"),
        ("prior", "images"),
        ("evaluation", "dino"),
        ("evaluation", "clip"),
        ("evaluation", "lpips"),
        ("run", "out"),
    }
)


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
        return array.multiline(len(value) > 1 and any(isinstance(one, str) for one in value))
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
