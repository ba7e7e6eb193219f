"""A recipe's keys by their dotted names: read, replaced, and those that somebody has written."""

from __future__ import annotations

from collections.abc import Mapping

from lorabooth.recipe import Recipe


def without_fit(recipe: Recipe) -> Recipe:
    """What a run keeps: the techniques, not the wish for them, so that it goes on with the same ones."""
    return recipe.model_copy(
        update={"memory": recipe.memory.model_copy(update={"fit": False, "budget": "auto"})}
    )


def with_keys(recipe: Recipe, keys: Mapping[str, object]) -> Recipe:
    """A recipe with some keys replaced: {"memory.checkpointing": True}."""
    for key, value in keys.items():
        section, name = key.split(".")
        changed = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: changed})
    return recipe


def set_text(keys: Mapping[str, object]) -> str:
    """Keys as options: "--set memory.checkpointing=true"."""
    return " ".join(f"--set {key}={str(value).lower()}" for key, value in keys.items())


def value_at(recipe: Recipe, key: str) -> object:
    """The value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def written_keys(recipe: Recipe) -> frozenset[str]:
    """Keys that somebody has given a value; "auto" is none."""
    return frozenset(
        f"{name}.{key}"
        for name in ("memory", "optim")
        for key in getattr(recipe, name).model_fields_set
        if getattr(getattr(recipe, name), key) != "auto"
    )
