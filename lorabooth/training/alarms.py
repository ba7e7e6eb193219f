"""Alarms that cost nothing: judged from numbers that the loop reads anyway, each told once in a run's life.

"Once" holds over interruptions too: the state goes into the checkpoint, and what was told comes back.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorabooth.progress import Reporter
from lorabooth.training.log import FiniteGuard

DEAD_AFTER_STEPS = 20
"""After this many applied steps a component whose every lora_B is still exactly zero learns nothing."""
NO_GRADIENT_STEPS = 5
"""A component whose gradient is exactly zero in so many steps in a row gets none."""
SPILL_RATIO = 5.0
"""A step this many times slower than the median says that memory is spilling."""
SPIKE_RATIO = 3.0
"""A loss this many times the highest of the last 100 is no matter of which timesteps were drawn."""
_SEEN_STEPS = 100
# Fewer steps say little: the first ones of a process are slow, and the loss differs by timestep.
_FEWEST_SECONDS = 20
_FEWEST_LOSSES = 50
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step, as read from the device in one go.

    Attributes:
        line: its figures for the metrics: "loss" (total; may be non-finite), "grad_norm", ...
        grad_norms: 2-norm of the gradient by component.
        up_norms: 2-norm of all lora_B by component before this step's update, where `Alarms.want_up_norms`.
        record_ids: its examples; those of all ranks if something was not finite.
        wrong: parts that were not finite, in words; then the step was not applied.
        overflow: nothing is wrong but the fp16 loss scale, which was halved; not applied either.
        stopping: some rank was asked to stop before the step ended.
    """

    line: Mapping[str, Any]
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    up_norms: Mapping[str, float] = field(default_factory=dict)
    record_ids: Sequence[str] = ()
    wrong: Sequence[str] = ()
    overflow: bool = False
    stopping: bool = False

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""
        return not (self.wrong or self.overflow)


class Alarms:
    """Watches a run's steps.

    Args:
        state: from `state_dict` of the run that is gone on with; empty for a new one.
    """

    def __init__(self, state: Mapping[str, Any] = _NOTHING) -> None:
        self._told: dict[str, str] = dict(state.get("told", {}))
        self._applied = int(state.get("applied", 0))
        self._without_gradient: dict[str, int] = dict(state.get("without_gradient", {}))
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=_SEEN_STEPS)
        # Not in the state: a resumed run may be on another machine, and its first steps are slow anyway.
        self._seconds: deque[float] = deque(maxlen=_SEEN_STEPS)

    @property
    def warnings(self) -> list[str]:
        """Everything told so far, in order, before an interruption too."""
        return list(self._told.values())

    @property
    def want_up_norms(self) -> bool:
        """Whether the coming step's figures should have `up_norms`; so in one step of a run."""
        return self._applied == DEAD_AFTER_STEPS

    def state_dict(self) -> dict[str, Any]:
        """JSON values that go into the checkpoint."""
        return {
            "told": dict(self._told),
            "applied": self._applied,
            "without_gradient": dict(self._without_gradient),
            "losses": list(self._losses),
        }

    def judge(self, figures: StepFigures, reporter: Reporter, *, step: int, seconds: float) -> None:
        """Look at one step, and warn of what was not told before.

        Args:
            figures: the step's.
            reporter: hears the warnings.
            step: finished steps, this one included.
            seconds: that it took.
        """
        found = {
            **self._not_finite(figures, step),
            **self._dead(figures),
            **self._no_gradient(figures),
            **self._spike(float(figures.line["loss"]), step),
            **self._slow(seconds, step),
        }
        self._applied += figures.applied
        for kind, message in found.items():
            if kind not in self._told:
                self._told[kind] = message
                reporter.warn(message)

    def _not_finite(self, figures: StepFigures, step: int) -> dict[str, str]:
        if not figures.wrong:
            return {}
        examples = ", ".join(dict.fromkeys(figures.record_ids))
        return {
            "not finite": f"step {step} was skipped: {', '.join(figures.wrong)} not finite "
            f"(examples: {examples}); metrics.jsonl marks every such step"
        }

    def _dead(self, figures: StepFigures) -> dict[str, str]:
        return {
            f"dead {component}": f"after {self._applied} steps every lora_B of {component} is still zero: "
            "it learns nothing; is its learning rate 0?"
            for component, norm in figures.up_norms.items()
            if norm == 0.0
        }

    def _no_gradient(self, figures: StepFigures) -> dict[str, str]:
        if not figures.applied:
            return {}
        for component, norm in figures.grad_norms.items():
            self._without_gradient[component] = self._without_gradient.get(component, 0) + 1
            if norm != 0.0:
                self._without_gradient[component] = 0
        return {
            f"no gradient {component}": f"no gradient reached {component} in {count} steps in a row: "
            "its adapter does not train"
            for component, count in self._without_gradient.items()
            if count >= NO_GRADIENT_STEPS
        }

    def _spike(self, loss: float, step: int) -> dict[str, str]:
        if not math.isfinite(loss):
            return {}
        seen = list(self._losses)
        self._losses.append(loss)
        if len(seen) < _FEWEST_LOSSES or loss <= SPIKE_RATIO * max(seen):
            return {}
        return {
            "spike": f"the loss of step {step} is {loss:.3g}, over three times the highest of the "
            f"{len(seen)} steps before it ({max(seen):.3g}); if it stays high, lower optim.lr"
        }

    def _slow(self, seconds: float, step: int) -> dict[str, str]:
        seen = list(self._seconds)
        self._seconds.append(seconds)
        if len(seen) < _FEWEST_SECONDS or seconds <= SPILL_RATIO * statistics.median(seen):
            return {}
        return {
            "slow": f"step {step} took {seconds:.1f} s, over five times the median of "
            f"{statistics.median(seen):.2g} s: is memory spilling?"
        }


@dataclass(frozen=True)
class Watch:
    """What the loop remembers of a run beside weights and optimizer; lives on in the checkpoint.

    Attributes:
        alarms: told once each.
        guard: ends a run that no longer learns.
    """

    alarms: Alarms = field(default_factory=Alarms)
    guard: FiniteGuard = field(default_factory=FiniteGuard)

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Watch:
        """The watch of a checkpoint; a new one from an empty state (an older checkpoint)."""
        return cls(Alarms(state.get("alarms", {})), FiniteGuard(state=state.get("guard", {})))

    @property
    def warnings(self) -> list[str]:
        """For run.json."""
        return self.alarms.warnings

    def state_dict(self) -> dict[str, Any]:
        """JSON values that go into the checkpoint."""
        return {"alarms": self.alarms.state_dict(), "guard": self.guard.state_dict()}

    def note(
        self, figures: StepFigures, reporter: Reporter, *, step: int, seconds: float, diagnosis: str
    ) -> None:
        """Take in one step; arguments as of `Alarms.judge` and `FiniteGuard.check`.

        Raises:
            TrainingError: the run does not learn any more.
        """
        self.alarms.judge(figures, reporter, step=step, seconds=seconds)
        self.guard.check(
            step=step,
            wrong=figures.wrong,
            record_ids=figures.record_ids,
            diagnosis=diagnosis,
            overflow=figures.overflow,
        )
