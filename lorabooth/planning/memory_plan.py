"""What a memory plan is made for, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorabooth.families.base import Family, Source
from lorabooth.memory.facts import Device
from lorabooth.planning.budget import Budget
from lorabooth.planning.components import CONTEXT, LIBRARIES
from lorabooth.planning.forecast import PHASES, Forecast, Forecaster
from lorabooth.planning.keys import set_text
from lorabooth.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """What is planned for.

    Attributes:
        source: the base; its configs are looked at.
        family: of the base.
        device: to plan for; need not be here.
        budget: that the run may use.
        problems: (recipe without "auto") -> what the device or its packages cannot do of it; nothing is tried
            for a device that is not here.
        predict: a `planning.forecast.Forecaster`; it remembers what it has rehearsed for this case.
    """

    source: Source
    family: Family
    device: Device
    budget: Budget
    problems: Callable[[Recipe], Sequence[str]] = lambda recipe: ()  # noqa: ARG005
    predict: Callable[..., Forecast] = field(default_factory=Forecaster)

    def forecast(self, recipe: Recipe, phases: Collection[str] = PHASES) -> Forecast:
        """The memory of a recipe here."""
        return self.predict(recipe, self.source, self.family, self.device, phases=phases)


@dataclass(frozen=True)
class Chosen:
    """A technique that a plan takes.

    Attributes:
        name: of the technique, with its number: "checkpointing, 12 of 44 blocks".
        keys: what it sets in the recipe.
        reason: what it does and costs.
        phase: that it makes most smaller, of those that were too large.
        saved_bytes: there; the difference of two forecasts.
        phases: all that it can make smaller.
    """

    name: str
    keys: Mapping[str, object]
    reason: str
    phase: str
    saved_bytes: int
    phases: tuple[str, ...] = ()

    def set_text(self) -> str:
        """The same as options: "--set memory.checkpointing=true"."""
        return set_text(self.keys)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A technique that a plan looked at and does not take."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class WouldFit:
    """Another recipe that fits, or would need less, where nothing else helps.

    Attributes:
        change: in words: "at 448 px".
        options: as options: "--set images.resolution=448".
        peak_bytes: its forecast, with the plan's techniques.
        fits: whether that is within the budget.
    """

    change: str
    options: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Techniques for a run, and its memory with them.

    Attributes:
        source: the base.
        budget: that it was made for.
        plain: forecast of the recipe as it stands.
        chosen: in the order of their cost in speed.
        passed_over: techniques that do not apply or do not help, as far up as the plan went.
        recipe: the recipe with what was chosen, and without `memory.fit`.
        forecast: of that.
        would_fit: where it does not fit, what would.
    """

    source: Source
    budget: Budget
    plain: Forecast
    chosen: tuple[Chosen, ...]
    passed_over: tuple[PassedOver, ...]
    recipe: Recipe
    forecast: Forecast
    would_fit: tuple[WouldFit, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every phase stays within the budget, margin kept."""
        return self.forecast.peak_bytes <= self.budget.usable_bytes

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "fits": self.fits,
            "base": {"id": self.source.base_id, "family": self.source.family},
            "budget": asdict(self.budget),
            "as_written": self.plain.as_json(),
            "chosen": [
                {
                    "name": each.name,
                    "keys": dict(each.keys),
                    "reason": each.reason,
                    "phase": each.phase,
                    "saved_bytes": each.saved_bytes,
                }
                for each in self.chosen
            ],
            "passed_over": [asdict(each) for each in self.passed_over],
            "planned": self.forecast.as_json(),
            "would_fit": [asdict(each) for each in self.would_fit],
        }


def driver_bytes(found: Forecast) -> int:
    """What the device takes for itself, whatever is run on it."""
    at_peak = found.peak.usage.at_peak
    return at_peak.get(CONTEXT, 0) + at_peak.get(LIBRARIES, 0)
