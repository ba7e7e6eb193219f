"""What would fit where nothing does: smaller pictures and batches, and what changes what is learned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lorabooth.errors import RecipeError
from lorabooth.planning.forecast import PHASES, prepared
from lorabooth.planning.keys import set_text, with_keys
from lorabooth.planning.memory_plan import Case, WouldFit
from lorabooth.recipe import Recipe

STEP_PX = 64
LEAST_SHARE = 0.5
"""Of the resolution that was asked for; below it there is too little left to learn from."""


def what_would_fit(recipe: Recipe, case: Case, over: Sequence[str]) -> tuple[WouldFit, ...]:
    """Changes of what is learned that fit, each on top of the techniques that the recipe has already.

    Args:
        recipe: with every technique that helps.
        case: base, device and budget.
        over: phases that are too large.

    Returns:
        The largest resolution that fits (or the smallest tried, if none does), and other changes that fit.
    """
    found = [_try(change, keys, recipe, case) for change, keys in _others(recipe, over)]
    tried = [each for each in found if each is not None and each.fits]
    return (*_lower_resolution(recipe, case, over), *tried)


def _lower_resolution(recipe: Recipe, case: Case, over: Sequence[str]) -> Iterator[WouldFit]:
    """By bisection over multiples of 64 px, or of an eighth of a small picture: memory falls with each."""
    now_px = int(prepared(recipe, case.source, case.family, case.device).images.resolution)
    step_px = min(STEP_PX, max(8, now_px // 64 * 8))
    sides = list(range(-(-int(now_px * LEAST_SHARE) // step_px) * step_px, now_px, step_px))
    if not sides:
        return
    low, high = 0, len(sides)
    least_bytes = _peak_bytes(sides[0], recipe, case, over)
    if least_bytes > case.budget.usable_bytes:
        yield WouldFit(f"at {sides[0]} px", f"--set images.resolution={sides[0]}", least_bytes, fits=False)
        return
    while high - low > 1:
        middle = (low + high) // 2
        # Phases that fit in larger pictures fit in smaller ones.
        if _peak_bytes(sides[middle], recipe, case, over) <= case.budget.usable_bytes:
            low = middle
        else:
            high = middle
    peak_bytes = _peak_bytes(sides[low], recipe, case, PHASES)
    options = f"--set images.resolution={sides[low]}"
    yield WouldFit(f"at {sides[low]} px", options, peak_bytes, peak_bytes <= case.budget.usable_bytes)


def _peak_bytes(side_px: int, recipe: Recipe, case: Case, phases: Collection[str]) -> int:
    return case.forecast(with_keys(recipe, {"images.resolution": side_px}), phases).peak_bytes


def _others(recipe: Recipe, over: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """What can help all phases that are too large."""
    if set(over) == {"class images"}:
        yield "without class images of its own", {"prior.mode": "distill"}
    if not set(over) <= {"training", "saving"}:
        return
    if recipe.optim.batch_size > 1:
        accumulate = recipe.optim.accumulate * recipe.optim.batch_size
        keys = {"optim.batch_size": 1, "optim.accumulate": accumulate}
        yield f"one example at a time, {accumulate} to a step", keys
    if recipe.adapter.text_encoder:
        yield "with the text encoder frozen", {"adapter.text_encoder": False}
    elif not recipe.memory.hollow and not recipe.memory.stream:
        yield "with the deep middle of the U-Net out of memory", {"memory.hollow": True}


def _try(change: str, keys: Mapping[str, object], recipe: Recipe, case: Case) -> WouldFit | None:
    """None where the base cannot do it."""
    try:
        peak_bytes = case.forecast(with_keys(recipe, keys)).peak_bytes
    except RecipeError:
        return None
    return WouldFit(change, set_text(keys), peak_bytes, peak_bytes <= case.budget.usable_bytes)
