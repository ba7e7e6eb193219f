"""When memory has run out: the numbers, the next technique to try, and the recipe with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from lorabooth.errors import LoraboothError, OutOfMemoryError
from lorabooth.families import registry
from lorabooth.memory.facts import describe_device
from lorabooth.planning.blocks import block_weights
from lorabooth.planning.budget import budget_for, gib_text
from lorabooth.planning.fit import case_of
from lorabooth.planning.keys import set_text, value_at, with_keys
from lorabooth.planning.ladder import COUNTED, LADDER, Rung
from lorabooth.planning.memory_plan import Case
from lorabooth.recipe import Recipe
from lorabooth.training.planned import Planned
from lorabooth.training.ran_out import Shortage

_SMALLER: Mapping[str, str] = MappingProxyType(
    {
        "class images": 'images.resolution or with prior.mode = "distill", which draws none',
        "training": "images.resolution or optim.batch_size",
    }
)


@dataclass(frozen=True)
class Next:
    """The technique to try after memory ran out.

    Attributes:
        rung: of the ladder.
        keys: that it sets.
        before_bytes: forecast of the phase as it was.
        after_bytes: forecast with the technique.
    """

    rung: Rung
    keys: Mapping[str, object]
    before_bytes: int
    after_bytes: int


def next_technique(shortage: Shortage, *, exact: bool) -> Next | None:
    """The first rung of the ladder above the recipe that makes the phase smaller.

    Args:
        shortage: what ran out where.
        exact: only rungs that a run may take up midway.

    Returns:
        None at the ladder's end.

    Raises:
        LoraboothError: the run cannot be forecast.
    """
    case, recipe, phase = _case(shortage), shortage.recipe, shortage.phase
    before = case.forecast(recipe, (phase,)).phase(phase).usage.peak_bytes
    for rung in LADDER:
        if phase not in rung.phases or (exact and not rung.exact) or rung.problem(recipe, case.device):
            continue
        # Drawing halves its groups by itself when memory runs out.
        if "memory.images_at_once" in rung.keys:
            continue
        for keys in _steps(rung, recipe, case):
            changed = with_keys(recipe, keys)
            if case.problems(changed):
                break
            after = case.forecast(changed, (phase,)).phase(phase).usage.peak_bytes
            if after < before:
                return Next(rung, keys, before, after)
    return None


def explained(shortage: Shortage) -> OutOfMemoryError:
    """The phase, the numbers and what to do, as an error."""
    device = describe_device(shortage.device)
    free = f"{device.name} has {gib_text(device.total_bytes)}, {gib_text(device.free_bytes)} free now"
    where = f" after step {shortage.steps} of {shortage.recipe.optim.steps}" if shortage.steps else ""
    what = f"memory ran out in {shortage.phase}{where}: {shortage.detail}."
    try:
        midway = next_technique(shortage, exact=True)
        found = midway or next_technique(shortage, exact=False)
    except LoraboothError as error:
        return OutOfMemoryError(f"{what}\n{free}. It cannot be predicted here: {error.what}")
    if found is None:
        smaller = _SMALLER.get(shortage.phase, "images.resolution")
        return OutOfMemoryError(
            f"{what}\n{free}. Every technique that helps is on.",
            f"Start anew (--fresh) with a smaller {smaller}, or on a smaller base.",
        )
    numbers = f"{gib_text(found.before_bytes)} were predicted; {free}."
    options = set_text(found.keys)
    again = "The same command goes on with it" if midway else "It needs a new run (--fresh)"
    itself = ", or let a run do so: --set memory.on_oom=step_down" if midway else ""
    return OutOfMemoryError(
        f"{what}\n{numbers}",
        f"Next technique: {found.rung.name} ({found.rung.reason}), predicted {gib_text(found.after_bytes)}.\n"
        f"{again}:\n  {options}{itself}",
    )


def stepped_down(shortage: Shortage, planned: Planned | None) -> tuple[Recipe, Planned, str]:
    """The recipe with the next technique that a run may take up midway.

    Returns:
        Recipe, plan with the step down noted, and what to tell.

    Raises:
        OutOfMemoryError: there is none, or several processes share the run.
    """
    found = next_technique(shortage, exact=True) if shortage.alone else None
    if found is None:
        raise explained(shortage)
    fact: dict[str, Any] = {
        "step": shortage.steps,
        "phase": shortage.phase,
        "technique": found.rung.name,
        "keys": dict(found.keys),
        "predicted_bytes": found.after_bytes,
        "error": shortage.detail,
    }
    told = (
        f"memory ran out in {shortage.phase} after step {shortage.steps} ({shortage.detail}); going on with "
        f"{found.rung.name}: {gib_text(found.after_bytes)} predicted, not {gib_text(found.before_bytes)}"
    )
    # What was predicted before is for other techniques: it is no measure for the rest of the run.
    earlier = planned or Planned()
    after = replace(earlier, allocated_bytes={}, stepped_down=(fact,))
    return with_keys(shortage.recipe, found.keys), after, told


def _case(shortage: Shortage) -> Case:
    device = describe_device(shortage.device)
    family = registry.family(shortage.source.family)
    return case_of(shortage.source, family, device, budget_for(device), shortage.device)


def _steps(rung: Rung, recipe: Recipe, case: Case) -> Iterator[Mapping[str, object]]:
    """The rung's keys, unless the recipe has them already; of recomputed blocks, half of the rest."""
    changed = {key: value for key, value in rung.keys.items() if value_at(recipe, key) != value}
    if not changed:
        return
    if COUNTED in rung.keys and recipe.memory.checkpointing and COUNTED in changed:
        total = len(block_weights(case.family, case.source))
        now = int(recipe.memory.checkpoint_blocks)
        more = now + -(-(total - now) // 2)
        yield {COUNTED: "auto" if more >= total else more}
        return
    yield changed
