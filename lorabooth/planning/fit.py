"""`memory.fit`: a recipe with the techniques that it needs here; the same ones when the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorabooth.errors import OutOfMemoryError, RecipeError
from lorabooth.families import registry, tokens
from lorabooth.families.base import Family, Source
from lorabooth.families.source import resolve
from lorabooth.memory.facts import Device, describe_device
from lorabooth.memory.meter_shapes import ShapesOnly
from lorabooth.memory.techniques import technique_problems
from lorabooth.planning.budget import Budget, budget_for, card, device_named, size_of
from lorabooth.planning.choose import plan
from lorabooth.planning.components import CONTEXT
from lorabooth.planning.keys import value_at, with_keys, without_fit, written_keys
from lorabooth.planning.ladder import LADDER
from lorabooth.planning.memory_plan import Case, MemoryPlan
from lorabooth.planning.show import fits_text, too_little_text
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe, from_mapping, load
from lorabooth.training import folder as folders
from lorabooth.training.folder import RunFolder
from lorabooth.training.planned import Planned
from lorabooth.training.processes import process_state


def fitted(
    recipe: Recipe, *, out: Path | None, fresh: bool, reporter: Reporter
) -> tuple[Recipe, Planned | None]:
    """The recipe to run: with `memory.fit`, the techniques are chosen for the device that is found.

    A run that has begun keeps the techniques that it began with.

    Args:
        recipe: as the user wrote it.
        out: run folder given beside it.
        fresh: whether another folder is taken if that is not free.
        reporter: hears of what was chosen.

    Raises:
        OutOfMemoryError: nothing fits; says what would.
        BaseModelError: the base's configs cannot be had.
    """
    if not recipe.memory.fit:
        return recipe, None
    written = written_keys(recipe)
    recipe = from_mapping(recipe.model_dump(mode="json", exclude_unset=True), (), "the recipe")
    source, family = _base(recipe, reporter)
    begun = None if fresh else _begun(recipe, out, source, family)
    if begun is not None:
        reporter.say("memory: the techniques that the run began with")
        return _as_begun(recipe, begun, written), _told_then(begun)
    device = describe_device(process_state().device)
    budget = budget_for(device, recipe.memory.budget)
    made = plan(recipe, case_of(source, family, device, budget, process_state().device), reporter)
    if not made.fits:
        raise OutOfMemoryError(*too_little_text(made))
    lines = [fits_text(made), *(f"  {each.name}: {each.reason}" for each in made.chosen)]
    reporter.say("memory: " + "\n".join(lines))
    return made.recipe, planned_of(made)


def plan_for(recipe: Recipe, *, vram: str | None, device: str | None, reporter: Reporter) -> MemoryPlan:
    """The plan of a recipe on a card of some size, or on a device of this machine.

    Args:
        recipe: keys of [memory] that it gives are kept.
        vram: memory of a CUDA card that need not be here: "8GiB".
        device: "cpu", or the number of a GPU of this machine; None is where a run would go.
        reporter: hears of downloads (of configs).

    Raises:
        RecipeError: both are given, or one of them makes no sense.
        BaseModelError: the base's configs cannot be had.
    """
    if vram is not None and device is not None:
        what = "--vram is for a card that is not here, --device for one that is."
        raise RecipeError(what, "Give one of them.")
    place: torch.device | None = None
    if vram is not None:
        facts = card(size_of(vram, "--vram"))
        budget = budget_for(facts, vram)
    else:
        place = device_named(device or "")
        facts = describe_device(place)
        budget = budget_for(facts, recipe.memory.budget)
    recipe = from_mapping(recipe.model_dump(mode="json", exclude_unset=True), (), "the recipe")
    source, family = _base(recipe, reporter)
    return plan(recipe, case_of(source, family, facts, budget, place), reporter)


def _base(recipe: Recipe, reporter: Reporter) -> tuple[Source, Family]:
    """The base, by its configs."""
    model = recipe.model
    source = resolve(
        model.base, revision=model.revision, family=model.family, reporter=reporter, configs_only=True
    )
    return source, registry.family(source.family)


def case_of(
    source: Source, family: Family, device: Device, budget: Budget, place: torch.device | None
) -> Case:
    """What is planned for; techniques are tried on the device if it is here.

    Args:
        source: the base.
        family: of the base.
        device: facts of the device.
        budget: that may be used.
        place: the device itself; None if it is not here.
    """
    if place is None:
        return Case(source, family, device, budget)
    return Case(source, family, device, budget, partial(_problems, place))


def planned_of(made: MemoryPlan) -> Planned:
    """What a run is told of its plan."""
    return Planned(
        facts=made.as_json(),
        allocated_bytes={phase.name: phase.allocated_bytes for phase in made.forecast.phases},
    )


def _problems(place: torch.device, recipe: Recipe) -> list[str]:
    return technique_problems(recipe.memory, place)


def _begun(recipe: Recipe, out: Path | None, source: Source, family: Family) -> RunFolder | None:
    """The folder of this recipe's run if that has begun."""
    if out is None and recipe.run.out == "auto" and recipe.subjects[0].token == "auto":
        token = _token(recipe, source, family)
        if token is None:
            return None
        first = recipe.subjects[0].model_copy(update={"token": token})
        recipe = recipe.model_copy(update={"subjects": (first, *recipe.subjects[1:])})
    folder = RunFolder(folders.out_of(out, recipe))
    return folder if folder.recipe.is_file() else None


def _token(recipe: Recipe, source: Source, family: Family) -> str | None:
    """What "auto" will become for the first subject; it names the folder."""
    with ShapesOnly():
        tokenizers = family.skeleton(source, torch.float32).tokenizers
    if "tokenizer" not in tokenizers:
        return None
    taken = [section.token for section in recipe.subjects if section.token != "auto"]
    return tokens.find_identifier(tokenizers["tokenizer"], avoid=[*taken, recipe.subjects[0].noun]).text


def _as_begun(recipe: Recipe, begun: RunFolder, written: frozenset[str]) -> Recipe:
    """The recipe with the techniques of the run's own; what the user writes now is for `run` to compare."""
    then = load(begun.recipe)
    keys = {key for rung in LADDER for key in rung.keys if key not in written}
    return without_fit(with_keys(recipe, {key: value_at(then, key) for key in sorted(keys)}))


def _allocated(phase: Mapping[str, Any]) -> int:
    return int(phase["peak_bytes"]) - int(phase["at_peak"].get(CONTEXT, 0))


def _told_then(begun: RunFolder) -> Planned | None:
    facts: Mapping[str, Any] = folders.read_json(begun.facts).get("plan", {})
    phases = facts.get("planned", {}).get("phases", [])
    if not phases:
        return None
    kept = {key: value for key, value in facts.items() if key not in ("measured", "missed")}
    return Planned(kept, {phase["name"]: _allocated(phase) for phase in phases})
