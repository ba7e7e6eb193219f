"""What was predicted for a run, beside what it took: memory by phase."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from lorabooth.training.clock import Clock

MISS_SHARE = 0.10
"""A prediction that is further off than this is told of."""
FORECAST_OF: Mapping[str, str] = MappingProxyType(
    {
        "class images": "class images",
        "caching": "caching",
        "setting up": "training",
        "pool": "training",
        "training": "training",
        "validation": "training",
        "samples": "previews",
        "selection": "previews",
        "checkpoints": "saving",
    }
)
"""A run's phase -> the phase of a forecast that it is part of."""
_BOTH_WAYS = ("training", "previews")
"""Always done in full. Class images and photos may be there already, and then take less."""


@dataclass(frozen=True)
class Planned:
    """What a plan says of a run.

    Attributes:
        facts: for run.json: techniques with reasons, forecast, budget.
        allocated_bytes: forecast phase -> most that torch's allocator should hold.
        stepped_down: techniques that were taken after memory ran out, for run.json, oldest first.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    allocated_bytes: Mapping[str, int] = field(default_factory=dict)
    stepped_down: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Miss:
    """A phase whose prediction was off.

    Attributes:
        phase: of the forecast.
        predicted_bytes: by the plan.
        measured_bytes: by torch's allocator.
    """

    phase: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def share(self) -> float:
        """(measured - predicted) / predicted."""
        return (self.measured_bytes - self.predicted_bytes) / self.predicted_bytes

    def text(self) -> str:
        """For the user."""
        more = "more" if self.share > 0 else "less"
        return (
            f"{self.phase} took {self.measured_bytes / 2**30:.2f} GiB, {abs(self.share):.0%} {more} than the "
            f"{self.predicted_bytes / 2**30:.2f} GiB that were predicted"
        )


def measured_by_phase(clock: Clock) -> dict[str, int]:
    """Forecast phase -> most that torch's allocator held; empty without CUDA."""
    found: dict[str, int] = {}
    for name, peak in clock.peak_bytes.items():
        phase = FORECAST_OF.get(name)
        if phase is not None:
            found[phase] = max(peak, found.get(phase, 0))
    return found


def misses(predicted: Mapping[str, int], measured: Mapping[str, int]) -> list[Miss]:
    """Predictions that were off by more than `MISS_SHARE`."""
    pairs = [Miss(name, predicted[name], measured[name]) for name in predicted if name in measured]
    return [
        each
        for each in pairs
        if each.share > MISS_SHARE or (each.phase in _BOTH_WAYS and each.share < -MISS_SHARE)
    ]


def memory_facts(planned: Planned | None, clock: Clock, device: torch.device) -> dict[str, Any]:
    """For run.json: {"peak_memory_by_phase_bytes", "plan", "stepped_down"}, empty values left out."""
    facts: dict[str, Any] = {}
    by_phase = measured_by_phase(clock)
    if by_phase:
        facts["peak_memory_by_phase_bytes"] = by_phase
    measured: dict[str, Any] = {"allocated_bytes": by_phase} if by_phase else process_facts(device)
    if planned is not None and planned.facts:
        wrong = misses(planned.allocated_bytes, by_phase)
        facts["plan"] = {
            **planned.facts,
            "measured": measured,
            "missed": [{"phase": miss.phase, "share": round(miss.share, 4)} for miss in wrong],
        }
    if planned is not None and planned.stepped_down:
        facts["stepped_down"] = [dict(each) for each in planned.stepped_down]
    return facts


def process_facts(device: torch.device) -> dict[str, Any]:
    """What is known without CUDA's counters: the whole process, all phases together."""
    peak = peak_memory_bytes(device)
    if peak is None:
        return {}
    what = "most that was resident in any phase, Python and libraries included"
    return {"process_bytes": peak, "what": what}


def miss_texts(planned: Planned | None, clock: Clock) -> Sequence[str]:
    """What to tell at the end of a run."""
    if planned is None:
        return ()
    return [miss.text() for miss in misses(planned.allocated_bytes, measured_by_phase(clock))]


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory so far: allocated on a GPU, else the resident set; None where neither is known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
