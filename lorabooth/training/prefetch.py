"""What a step needs from the host, made on a thread while the step before it runs.

All of it is a function of the step alone (which examples, their latents, noise and timesteps), so that it
does not matter when it is made, and nothing of it need be saved. For a GPU it waits in page-locked memory,
from where it is copied without anybody waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from lorabooth.objective.paths import NoisePath
from lorabooth.training.step import class_rows, noise_of
from lorabooth.types import Batch

DEPTH = 2
"""Steps that are made ahead: one is enough for an even pace, the other for a slow disk."""

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Ready:
    """Examples of one forward, with all that is drawn for them.

    Attributes:
        batch: the examples.
        eps: [B,C,h,w] noise.
        level: [B] noise levels.
        class_rows: rows of the class examples.
    """

    batch: Batch
    eps: Tensor
    level: Tensor
    class_rows: tuple[int, ...]

    def on(self, device: torch.device) -> Ready:
        """The same on a device; from pinned memory without waiting."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            batch=to_device(self.batch, device),
            eps=self.eps.to(device, non_blocking=True),
            level=self.level.to(device, non_blocking=True),
        )

    def pinned(self) -> Ready:
        """The same in page-locked memory."""
        return replace(
            self,
            batch=_with_tensors(self.batch, Tensor.pin_memory),
            eps=self.eps.pin_memory(),
            level=self.level.pin_memory(),
        )


Forwards = Sequence[Sequence[Ready]]
"""An optimizer step of one rank: micro-batches, each of as many batches as there are latent shapes."""


def make(
    batches: Callable[[int], Sequence[Sequence[Batch]]],
    path: NoisePath,
    seed: int,
    step: int,
    *,
    pin: bool,
) -> Forwards:
    """All that step `step` needs, on the CPU: a pure function of it.

    Args:
        batches: the step's examples.
        path: where levels are drawn from.
        seed: the run's.
        step: optimizer step.
        pin: put it into page-locked memory.
    """
    made: list[list[Ready]] = []
    for micro_batch in batches(step):
        ready = []
        for batch in micro_batch:
            eps, level = noise_of(path, batch, seed, step)
            one = Ready(batch, eps, level, class_rows(batch))
            ready.append(one.pinned() if pin else one)
        made.append(ready)
    return made


@contextmanager
def ahead(make_step: Callable[[int], Made], steps: range, depth: int = DEPTH) -> Iterator[Callable[[], Made]]:
    """Make the steps of a range in order, on one thread, at most `depth` before they are asked for.

    Args:
        make_step: a pure function of the step; what it raises is raised where that step is asked for.
        steps: in this order.
        depth: steps that may lie ready.

    Yields:
        A function that gives the next step's. On leaving (however) the thread has ended: it finishes what it
        is at, and nothing after that.
    """
    waiting: deque[Future[Made]] = deque()
    coming = iter(steps)
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    _keep_to_one_core(executor)

    def give() -> Made:
        for step in islice(coming, depth + 1 - len(waiting)):
            waiting.append(executor.submit(make_step, step))
        return waiting.popleft().result()

    try:
        yield give
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _keep_to_one_core(executor: Executor) -> None:
    """Let an executor's one thread compute alone; the others keep their number of threads.

    Otherwise it has a team of OpenMP threads of its own. With more threads than cores libgomp lets all of
    them wait asleep: every small operation of the step then waits to be woken, and a step on two cores takes
    a quarter to a half longer.
    """
    number = torch.get_num_threads()
    executor.submit(_compute_alone).result()
    # What is set last is what threads begin with that have computed nothing yet.
    torch.set_num_threads(number)


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread that has not been asked takes over the common number later
    torch.set_num_threads(1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Every tensor that the step reads, changed; the pool's own noise has been taken already."""
    return replace(
        batch,
        latents=change(batch.latents),
        cond={name: change(tensor) for name, tensor in batch.cond.items()},
        weight=change(batch.weight),
        is_instance=change(batch.is_instance),
        taught=None if batch.taught is None else change(batch.taught),
    )
