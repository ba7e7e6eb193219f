"""Memory that ran out: in which phase, how far the run was, and that what was reached is saved."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lorabooth.errors import OutOfMemoryError, first_line, is_out_of_memory
from lorabooth.families.base import Source
from lorabooth.recipe import Recipe
from lorabooth.training.folder import RunFolder
from lorabooth.training.planned import FORECAST_OF


@dataclass(frozen=True)
class Shortage:
    """Memory ran out. Holds no tensor and no model.

    Attributes:
        phase: of a forecast: "class images", "caching", "training", "previews", "saving".
        steps: finished steps that are saved, from which the run can go on.
        recipe: the run's, without "auto".
        source: the base.
        device: where it ran.
        folder: of the run.
        detail: what the allocator said.
        alone: whether there is one process only.
    """

    phase: str
    steps: int
    recipe: Recipe
    source: Source
    device: torch.device
    folder: RunFolder
    detail: str
    alone: bool


class RanOutError(OutOfMemoryError):
    """Memory ran out in a run; `shortage` says where."""

    def __init__(self, shortage: Shortage) -> None:
        where = f" after step {shortage.steps}" if shortage.phase == "training" and shortage.steps else ""
        super().__init__(
            f"memory ran out in {shortage.phase}{where}: {shortage.detail}",
            'Try --set memory.checkpointing=true, or memory = "auto".',
        )
        self.shortage = shortage


def is_shortage(error: BaseException) -> bool:
    """Whether it is a lack of memory, torch's or one that was found out before."""
    return isinstance(error, OutOfMemoryError) or is_out_of_memory(error)


def detail_of(error: BaseException) -> str:
    """What the allocator said, on one line."""
    return (error.what if isinstance(error, OutOfMemoryError) else first_line(error)).rstrip(".")


def forecast_phase(clock_phase: str) -> str:
    """The phase of a forecast that a run's phase is part of; the base is loaded as part of the first."""
    return FORECAST_OF.get(clock_phase, "class images")


@dataclass
class Updating:
    """Whether an optimizer's update is under way, after which the weights are neither the old nor the new.

    Attributes:
        now: it is.
    """

    now: bool = False


@contextmanager
def watched_updates(optimizer: torch.optim.Optimizer) -> Iterator[Updating]:
    """Follow the updates of an optimizer."""
    state = Updating()

    def begins(*_: object) -> None:
        state.now = True

    def ends(*_: object) -> None:
        state.now = False

    handles = [optimizer.register_step_pre_hook(begins), optimizer.register_step_post_hook(ends)]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class LastStep:
    """The last finished step, to be saved when memory runs out in the next.

    Attributes:
        save: saves a step.
        updating: of the optimizer.
        steps: finished.
        saved: steps of the last checkpoint.
    """

    save: Callable[[int], None]
    updating: Updating
    steps: int
    saved: int = field(default=-1)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a lack of memory saves what was reached before it goes on its way.

        Unless it came in the middle of an update: then the checkpoint before is what the run goes on from.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and not self.updating.now and self.steps > self.saved:
                # The failed step's tensors live in its frames; saving needs room.
                traceback.clear_frames(error.__traceback__)
                self._save()
            raise

    def _save(self) -> None:
        try:
            self.save(self.steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
