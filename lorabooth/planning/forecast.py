"""How much memory each phase of a run will take on a device, told from the base's configs alone.

The run's own code is rehearsed on shapes (phases.py) under a counter (memory/meter.py): no weight is read,
and the device need not be here. What is modelled of CUDA, and what is not, is told in memory/meter_cuda.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorabooth.families.base import Family, Source
from lorabooth.memory import hollow
from lorabooth.memory.facts import Device
from lorabooth.memory.meter import Usage
from lorabooth.memory.meter_known import KnownOps
from lorabooth.memory.meter_shapes import ShapesOnly, Uninitialised
from lorabooth.planning.components import CONTEXT, Scene
from lorabooth.planning.phases import usages
from lorabooth.recipe import Recipe
from lorabooth.training.resolve import resolve

PHASES = ("class images", "caching", "training", "previews", "saving")
"""In the order of a run. Those that a recipe does not have are left out of its forecast.

Merging an adapter back into a base is none: it is another command, which streams weights through the CPU, a
few MiB at a time (adapters/merge.py), and takes nothing of the device.
"""


@dataclass(frozen=True, slots=True)
class Phase:
    """The highest moment of one phase.

    Attributes:
        name: one of `PHASES`.
        usage: bytes in the device's memory, by component.
    """

    name: str
    usage: Usage

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator should report as its maximum: all but the CUDA context."""
        return self.usage.peak_bytes - self.usage.at_peak.get(CONTEXT, 0)


@dataclass(frozen=True)
class Forecast:
    """The memory of a run.

    Attributes:
        device: that it is for.
        recipe: without "auto".
        phases: those that the recipe has, in order.
    """

    device: Device
    recipe: Recipe
    phases: tuple[Phase, ...]

    def phase(self, name: str) -> Phase:
        """The phase of that name.

        Raises:
            KeyError: the recipe does not have it, or it was not asked for.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.usage.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of all phases."""
        return self.peak.usage.peak_bytes

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "device": asdict(self.device),
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak.name,
            "phases": [
                {"name": p.name, "peak_bytes": p.usage.peak_bytes, "at_peak": dict(p.usage.at_peak)}
                for p in self.phases
            ],
        }


class Forecaster:
    """Rehearses runs on shapes; what one rehearsal has shown is not rehearsed again for another recipe.

    Every figure is that of a new one. Not for several threads at once.
    """

    def __init__(self) -> None:
        """Nothing has been rehearsed yet."""
        self._known = KnownOps()
        self._found: dict[tuple[Source, Device, str], dict[str, Usage]] = {}

    def __call__(
        self,
        recipe: Recipe,
        source: Source,
        family: Family,
        device: Device,
        *,
        phases: Collection[str] = PHASES,
    ) -> Forecast:
        """Rehearse a run.

        Args:
            recipe: "auto" in it is resolved for `device`.
            source: the base; configs are enough (`families.source.resolve(configs_only=True)`).
            family: of the base.
            device: to predict for: one of this machine's, or the description of any other.
            phases: to predict; training alone takes a few seconds for a base of SD's size.

        Raises:
            BaseModelError: a config is missing or broken.
            RecipeError: the recipe asks for what the base or the precision cannot do.
        """
        scene = Scene(prepared(recipe, source, family, device), source, family, device, self._known)
        found = self._found.setdefault((source, device, scene.recipe.model_dump_json()), {})
        missing = [name for name in phases if name not in found]
        if missing:
            found.update(usages(scene, missing))
        told = (
            Phase(name, scene.with_driver(found[name])) for name in PHASES if name in {*phases} & {*found}
        )
        return Forecast(device, scene.recipe, tuple(told))


def prepared(recipe: Recipe, source: Source, family: Family, device: Device) -> Recipe:
    """The recipe without "auto" as `device` resolves it, with what a rehearsal cannot prove replaced.

    Tokens do not matter for memory; xformers keeps for the backward pass what torch's own kernels keep.
    """

    def hollow_keep() -> tuple[int, str]:
        with ShapesOnly(), Uninitialised():
            return hollow.automatic_keep(family.skeleton(source, torch.float32).denoiser)

    resolved = resolve(
        recipe,
        source=source,
        defaults=family.defaults_for(source),
        device=device,
        find_token=lambda index: (f"token{index}", "any"),
        hollow_keep=hollow_keep,
    ).recipe
    return resolved.model_copy(update={"memory": resolved.memory.model_copy(update={"attention": "sdpa"})})
