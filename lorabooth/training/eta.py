"""How long a run will still take: a few measured steps, then one line for all phases."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorabooth.progress import Reporter, duration

SETTLING_STEPS = 3
"""The first steps of a process are slow (kernels are chosen, caches fill) and are not counted."""
MEASURED_STEPS = 7
"""Their median is what a step takes."""


@dataclass
class Eta:
    """Estimates a run's remaining time once, and keeps it to be held against the truth.

    Attributes:
        stop: steps of the whole run.
        checkpoint_every: 0 is off; the end is saved anyway.
        preview_every: 0 is off; the end is drawn anyway if there are previews.
        previews: whether there are any.
        once_s: what one draw of all previews ("samples") and one checkpoint ("checkpoints") take, as far as
            that is known.
        reporter: hears of the estimate.
        measured: checkpoints are measured; what that takes is not known before it is done.
        estimated_s: seconds by phase, from the first step of this process on; empty before the estimate.
    """

    stop: int
    checkpoint_every: int
    preview_every: int
    previews: bool
    once_s: Mapping[str, float]
    reporter: Reporter
    measured: bool = False
    estimated_s: dict[str, float] = field(default_factory=dict)
    _steps_s: list[float] = field(default_factory=list)
    _seen: int = 0
    _passed_s: float = 0.0

    def __call__(self, done: int, seconds: float) -> None:
        """A step is done.

        Args:
            done: finished steps.
            seconds: that it took.
        """
        self._seen += 1
        self._passed_s += seconds
        if self.estimated_s or self._seen <= SETTLING_STEPS:
            return
        self._steps_s.append(seconds)
        if len(self._steps_s) == MEASURED_STEPS:
            self._estimate(done)

    def _estimate(self, done: int) -> None:
        left = {"training": statistics.median(self._steps_s) * (self.stop - done)}
        counts = {
            "samples": self._times(done, self.preview_every) if self.previews else 0,
            "checkpoints": self._times(done, self.checkpoint_every),
            "selection": self._times(done, self.checkpoint_every) if self.measured else 0,
        }
        left |= {name: self.once_s[name] * count for name, count in counts.items() if name in self.once_s}
        self.estimated_s |= {**left, "training": left["training"] + self._passed_s}
        told = {name: seconds for name, seconds in left.items() if seconds >= 1}
        if told:
            parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in told.items())
            unknown = [name for name, count in counts.items() if count and name not in self.once_s]
            without = f" ({_listed(unknown)} not measured yet)" if unknown else ""
            self.reporter.say(f"about {duration(sum(told.values()))} to go: {parts}{without}")

    def _times(self, done: int, every: int) -> int:
        """How often something happens that is due every so many steps, and at the end."""
        due = len(range(done // every * every + every, self.stop, every)) if every else 0
        return due + 1


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
