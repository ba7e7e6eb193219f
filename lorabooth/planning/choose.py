"""Which techniques a run needs to fit: the ladder, climbed until every phase is within the budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorabooth.families.base import Family, Source
from lorabooth.memory.facts import Device
from lorabooth.planning.blocks import block_weights, fewest
from lorabooth.planning.forecast import Forecast, Phase, prepared
from lorabooth.planning.keys import value_at, with_keys, without_fit, written_keys
from lorabooth.planning.ladder import COUNTED, LADDER, Rung
from lorabooth.planning.memory_plan import Case, Chosen, MemoryPlan, PassedOver, driver_bytes
from lorabooth.progress import Reporter, Silent, Task
from lorabooth.recipe import Recipe

_MANY_FORECASTS = len(LADDER) + 4
"""About as many as a climb to the ladder's end takes."""
WORTH_SHARE = 0.01
"""A technique that makes no phase smaller by so much is not worth its cost."""


def plan(recipe: Recipe, case: Case, reporter: Reporter | None = None) -> MemoryPlan:
    """Choose techniques; keys that the recipe has already are kept as they are.

    Args:
        recipe: "auto" in it is resolved for the device.
        case: base, device and budget.
        reporter: hears of the progress: a large base on a small card takes more than a few seconds.

    Returns:
        A plan, which fits or says what would.

    Raises:
        BaseModelError: the base's configs are missing or broken.
        RecipeError: the recipe asks for what the base cannot do.
    """
    with (reporter or Silent()).task("planning", _MANY_FORECASTS, unit="forecast") as task:
        return _plan(recipe, replace(case, predict=_counting(case.predict, task)))


def _counting(predict: Callable[..., Forecast], task: Task) -> Callable[..., Forecast]:
    def counted(*args: Any, **options: Any) -> Forecast:
        made = predict(*args, **options)
        task.advance()
        return made

    return counted


def _plan(recipe: Recipe, case: Case) -> MemoryPlan:
    from lorabooth.planning.smaller import what_would_fit

    search = Search.begin(recipe, case)
    if driver_bytes(search.plain) < case.budget.usable_bytes and search.reaches():
        search.climb()
        search.descend()
    whole = Forecast(
        case.device,
        prepared(search.recipe, case.source, case.family, case.device),
        tuple(search.phases.values()),
    )
    made = MemoryPlan(
        case.source,
        case.budget,
        search.plain,
        tuple(search.chosen),
        tuple(search.passed_over),
        without_fit(search.recipe),
        whole,
    )
    over = search.too_large() if driver_bytes(whole) < case.budget.usable_bytes else []
    return replace(made, would_fit=what_would_fit(search.recipe, case, over)) if over else made


@dataclass
class Search:
    """A plan in the making.

    Attributes:
        case: base, device, budget.
        recipe: with what was chosen so far.
        written: keys that are kept.
        plain: forecast of the recipe as it stands.
        phases: the newest forecast of every phase, by name.
        chosen: so far.
        passed_over: so far.
        stale: phases that a technique made smaller, and that were within the budget without it.
    """

    case: Case
    recipe: Recipe
    written: frozenset[str]
    plain: Forecast
    phases: dict[str, Phase]
    chosen: list[Chosen] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)

    @classmethod
    def begin(cls, recipe: Recipe, case: Case) -> Search:
        """Forecast the recipe as it stands."""
        plain = case.forecast(recipe)
        return cls(case, recipe, written_keys(recipe), plain, {each.name: each for each in plain.phases})

    def too_large(self) -> list[str]:
        """Phases over the budget."""
        usable = self.case.budget.usable_bytes
        return [name for name, phase in self.phases.items() if phase.usage.peak_bytes > usable]

    def reaches(self) -> bool:
        """Whether the whole ladder is enough; where it is not, it is taken at once and no rung is weighed."""
        over = self.too_large()
        if not over:
            return True
        taken: dict[tuple[str, ...], Rung] = {}
        recipe = self.recipe
        for rung in LADDER:
            if set(over) & set(rung.phases) and not (self._kept(rung) or self._problem(rung)):
                taken[tuple(rung.keys)] = rung
                recipe = with_keys(recipe, rung.keys)
        after = self._phases_of(recipe, over)
        if all(phase.usage.peak_bytes <= self.case.budget.usable_bytes for phase in after.values()):
            return True
        phase = max(after, key=lambda name: after[name].usage.peak_bytes)
        saved = self.phases[phase].usage.peak_bytes - after[phase].usage.peak_bytes
        keys = {key: value for rung in taken.values() for key, value in rung.keys.items()}
        name = " + ".join(rung.name for rung in taken.values())
        if taken:
            self.chosen = [Chosen(name, keys, "every technique that there is for it", phase, saved)]
        self.recipe = recipe
        rest = [name for name in self.phases if name not in after]
        self.phases.update({**after, **(self._phases_of(recipe, rest) if rest else {})})
        return False

    def climb(self) -> None:
        """Take rung after rung, until all phases fit or the ladder ends."""
        for rung in LADDER:
            over = self.too_large() or self._refreshed()
            if not over:
                return
            helped = [name for name in over if name in rung.phases]
            if not helped:
                continue
            why = self._kept(rung) or self._problem(rung)
            if not why and not self._take(rung, helped):
                why = f"saves nothing worth it in {' and '.join(helped)}"
            if why:
                self.passed_over.append(PassedOver(rung.name, why))
        self._refreshed()

    def descend(self) -> None:
        """Give back what turned out not to be needed: blocks to recompute first, then whole techniques."""
        if self.too_large():
            return
        for each in reversed(self.chosen[:-1]):
            # What it saved may be more than what is free now, and yet be saved again by what came later.
            if not self._is_needed_by_others(each):
                self._give_back(each)
        self._fewest_blocks()

    def _kept(self, rung: Rung) -> str:
        given = [
            key
            for key, value in rung.keys.items()
            if key in self.written and value_at(self.recipe, key) != value
        ]
        return f"the recipe gives {' and '.join(given)}" if given else ""

    def _problem(self, rung: Rung) -> str:
        """Why a rung does not apply to the recipe as it is now, or cannot be done on the device."""
        now = prepared(self.recipe, self.case.source, self.case.family, self.case.device)
        if why := rung.problem(now, self.case.device):
            return why
        changed = prepared(with_keys(self.recipe, rung.keys), *self._place)
        return "; ".join(self.case.problems(changed))

    @property
    def _place(self) -> tuple[Source, Family, Device]:
        return self.case.source, self.case.family, self.case.device

    def _take(self, rung: Rung, helped: Sequence[str]) -> bool:
        """Whether the rung makes a phase smaller that is too large; then it is chosen."""
        changed = with_keys(self.recipe, rung.keys)
        after = self._phases_of(changed, helped)
        saved = {name: self.phases[name].usage.peak_bytes - after[name].usage.peak_bytes for name in helped}
        phase = max(helped, key=lambda name: saved[name])
        if saved[phase] < WORTH_SHARE * self.phases[phase].usage.peak_bytes:
            return False
        replaced = [each for each in self.chosen if each.keys.keys() == rung.keys.keys()]
        total = saved[phase] + sum(each.saved_bytes for each in replaced if each.phase == phase)
        self.chosen = [each for each in self.chosen if each not in replaced]
        self.chosen.append(Chosen(rung.name, rung.keys, rung.reason, phase, total, rung.phases))
        self.recipe = changed
        self.phases.update(after)
        self.stale |= set(rung.phases) - set(helped)
        return True

    def _refreshed(self) -> list[str]:
        """Phases over the budget, all of them forecast anew that have changed."""
        if self.stale:
            self.phases.update(self._phases_of(self.recipe, self.stale))
            self.stale.clear()
        return self.too_large()

    def _phases_of(self, recipe: Recipe, names: Collection[str]) -> dict[str, Phase]:
        wanted = [name for name in names if name in self.phases]
        return {phase.name: phase for phase in self.case.forecast(recipe, wanted).phases}

    def _is_needed_by_others(self, each: Chosen) -> bool:
        """Offloading and streaming need checkpointing."""
        further = ("memory.checkpoint_offload", "memory.stream")
        return "memory.checkpointing" in each.keys and any(
            key in other.keys for other in self.chosen for key in further
        )

    def _give_back(self, each: Chosen) -> None:
        """Go without a technique, or with a milder one that sets the same keys, if all still fits."""
        alike = [rung for rung in LADDER if rung.keys.keys() == each.keys.keys()]
        milder = alike[: [rung.name for rung in alike].index(each.name)]
        without = {key: value_at(Recipe(), key) for key in each.keys}
        for rung in (None, *milder):
            changed = with_keys(self.recipe, rung.keys if rung else without)
            after = self._phases_of(changed, each.phases)
            if any(phase.usage.peak_bytes > self.case.budget.usable_bytes for phase in after.values()):
                continue
            more = after[each.phase].usage.peak_bytes - self.phases[each.phase].usage.peak_bytes
            saved = each.saved_bytes - more
            place = self.chosen.index(each)
            self.chosen[place : place + 1] = (
                [Chosen(rung.name, rung.keys, rung.reason, each.phase, saved, rung.phases)] if rung else []
            )
            self.recipe = changed
            self.phases.update(after)
            return

    def _fewest_blocks(self) -> None:
        """The smallest number of recomputed blocks that fits."""
        place = next((i for i, each in enumerate(self.chosen) if COUNTED in each.keys), None)
        if place is None or self._is_needed_by_others(self.chosen[place]):
            return
        each, weights = self.chosen[place], block_weights(self.case.family, self.case.source)
        all_phase = self.phases["training"]
        best = {len(weights): all_phase}

        def peak_bytes(count: int) -> int:
            tried = self._phases_of(with_keys(self.recipe, {COUNTED: count}), ("training",))["training"]
            best[count] = tried
            return tried.usage.peak_bytes

        most = all_phase.usage.peak_bytes + each.saved_bytes
        count = fewest(peak_bytes, weights, most, all_phase.usage.peak_bytes, self.case.budget.usable_bytes)
        value: object = "auto" if count == len(weights) else count
        given_back = best[count].usage.peak_bytes - all_phase.usage.peak_bytes
        self.chosen[place] = replace(
            each,
            name=f"{each.name}, {count} of {len(weights)} blocks",
            keys={**each.keys, COUNTED: value},
            saved_bytes=each.saved_bytes - given_back,
        )
        self.recipe = with_keys(self.recipe, {COUNTED: value})
        self.phases["training"] = best[count]
