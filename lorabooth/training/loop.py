"""Runs the optimizer steps of a composed session. Knows no family, prior mode or memory technique.

Progress is one integer, the optimizer step; everything drawn in step s is a function of (seed, s).
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from lorabooth.errors import InterruptedRunError
from lorabooth.progress import Reporter, Task
from lorabooth.recipe import OptimSection
from lorabooth.training import optim
from lorabooth.training.log import FiniteGuard, MetricsLog
from lorabooth.training.step import StepParts, class_rows, draw_noise, micro_step
from lorabooth.types import Batch

SPILL_RATIO = 5.0
"""A step this many times slower than the median says that memory is spilling."""
DEAD_AFTER_STEPS = 20
"""After this many steps an adapter that is still exactly zero learns nothing."""


class Batches(Protocol):
    """What the loop draws from: micro-batches of one step, for this rank."""

    def __call__(self, step: int) -> Sequence[Sequence[Batch]]:
        """`accumulate` micro-batches, each a list of same-shape batches, on the CPU."""
        ...


@dataclass(frozen=True)
class Session:
    """Everything composed for a run; the loop only runs it.

    Attributes:
        accelerator: devices, processes and trackers.
        step_parts: the pure step's functions.
        batches: examples of a step.
        optimizer: over the adapter's float32 parameters; groups carry "base_lr" and "name".
        parameters: all trained parameters.
        up_weights: the adapter's lora_B parameters (zero at the start).
        autocast: context of the forward pass.
        randomness: (step, micro-batch) -> context in which layers may draw (dropout): a function of the
            two, and the global random state is put back.
        scaler: for fp16; disabled otherwise.
        section: the recipe's optim section, without "auto".
        seed: the run's.
        n_instance: subject examples in an optimizer step, over ranks and accumulation.
        n_class: class examples likewise; 0 without prior preservation.
        diagnosis: what a non-finite step is reported with (dtype, base).
    """

    accelerator: Accelerator
    step_parts: StepParts
    batches: Batches
    optimizer: torch.optim.Optimizer
    parameters: Sequence[torch.nn.Parameter]
    up_weights: Sequence[torch.nn.Parameter]
    autocast: Callable[[], AbstractContextManager[Any]]
    randomness: Callable[[int, int], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler
    section: OptimSection
    seed: int
    n_instance: int
    n_class: int
    diagnosis: str


@dataclass(frozen=True)
class Hooks:
    """What happens between steps; each is called with the number of finished steps.

    Attributes:
        checkpoint: saves the state; called when due, at the end, and when interrupted.
        preview: draws sample images; called when due. Cannot change the run.
        checkpoint_every: 0 is off (the end is still saved).
        preview_every: 0 is off.
    """

    checkpoint: Callable[[int], None]
    preview: Callable[[int], object]
    checkpoint_every: int
    preview_every: int


@dataclass
class StepLog:
    """What the loop tells of its steps (not part of its state)."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    warned: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def once(self, kind: str, message: str, reporter: Reporter) -> None:
        """Warn, but only the first time for a kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            self.warnings.append(message)
            reporter.warn(message)


def run_steps(
    session: Session, hooks: Hooks, metrics: MetricsLog, *, start: int, stop: int, reporter: Reporter
) -> StepLog:
    """Run optimizer steps `start` .. `stop - 1`.

    Raises:
        InterruptedRunError: SIGINT or SIGTERM came; the step was finished and the state saved.
        TrainingError: the loss stayed non-finite, or there is no space to save.
    """
    log = StepLog()
    guard = FiniteGuard()
    with _signals() as asked, reporter.task("Training", stop, "step", start) as task:
        for step in range(start, stop):
            began_s = time.perf_counter()
            lr = optim.set_lr(session.optimizer, session.section, step, stop)
            line, finite = _one_step(session, step)
            record_ids = line.pop("record_ids")
            if not finite:
                line.update(skipped=True, record_ids=record_ids)
            line.update(lr=lr, step_s=time.perf_counter() - began_s)
            if session.accelerator.is_main_process:
                metrics.append({"step": step + 1, **line})
            guard.check(
                step=step + 1, finite=finite, record_ids=record_ids, diagnosis=session.diagnosis, figures=line
            )
            _tell(session, line, step + 1, task, log, reporter)
            done = step + 1
            saved = done == stop or (hooks.checkpoint_every > 0 and done % hooks.checkpoint_every == 0)
            if saved:
                metrics.sync()
                hooks.checkpoint(done)
            if hooks.preview_every > 0 and done % hooks.preview_every == 0 and done < stop:
                hooks.preview(done)
            if asked and done < stop:
                if not saved:
                    metrics.sync()
                    hooks.checkpoint(done)
                raise InterruptedRunError(
                    f"interrupted by {signal.Signals(asked[0]).name} after step {done} of {stop}; "
                    "the state is saved.",
                    "The same command again goes on from here.",
                )
    return log


def _one_step(session: Session, step: int) -> tuple[dict[str, Any], bool]:
    """Forward, backward and update of one optimizer step. One host synchronisation."""
    device = session.accelerator.device
    sums = torch.zeros(3, device=device)
    record_ids: list[str] = []
    for turn, micro_batch in enumerate(session.batches(step)):
        for batch in micro_batch:
            record_ids.extend(batch.record_ids)
            rows = class_rows(batch)
            moved = to_device(batch, device)
            eps, level = draw_noise(
                session.step_parts.path,
                session.seed,
                step,
                batch.positions,
                batch.latents.shape[1:],
                device=device,
            )
            with session.autocast(), session.randomness(step, turn):
                terms = micro_step(
                    session.step_parts,
                    moved,
                    eps,
                    level,
                    class_rows=rows,
                    n_instance=session.n_instance,
                    n_class=session.n_class,
                )
            session.scaler.scale(terms.total).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([terms.total.detach(), terms.instance.detach(), terms.prior.detach()])
    if session.accelerator.num_processes > 1:
        _sum_over_ranks(session, sums)
    session.scaler.unscale_(session.optimizer)
    grad_norm = optim.clip(session.parameters, session.section.max_grad_norm)
    total, instance, prior, norm = torch.cat([sums, grad_norm.reshape(1)]).tolist()
    finite = math.isfinite(total) and math.isfinite(norm)
    if finite:
        session.scaler.step(session.optimizer)
    session.scaler.update()
    session.optimizer.zero_grad(set_to_none=True)
    line: dict[str, Any] = {"loss": total, "loss_instance": instance}
    if session.n_class:
        line["loss_prior"] = prior
    line.update(grad_norm=norm, record_ids=record_ids)
    return line, finite


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    return Batch(
        latents=batch.latents.to(device, non_blocking=True),
        cond={name: tensor.to(device, non_blocking=True) for name, tensor in batch.cond.items()},
        geometry=batch.geometry,
        weight=batch.weight.to(device, non_blocking=True),
        is_instance=batch.is_instance.to(device, non_blocking=True),
        record_ids=batch.record_ids,
        positions=batch.positions,
    )


def _sum_over_ranks(session: Session, sums: torch.Tensor) -> None:
    """Gradients add up: each rank's loss is already divided by the counts over all ranks."""
    for parameter in session.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(session.accelerator.reduce(parameter.grad, reduction="sum"))
    sums.copy_(session.accelerator.reduce(sums, reduction="sum"))


def _tell(
    session: Session, line: Mapping[str, Any], done: int, task: Task, log: StepLog, reporter: Reporter
) -> None:
    """Progress, trackers and the alarms that cost nothing."""
    task.advance(1, loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.1e}")
    session.accelerator.log(
        {key: value for key, value in line.items() if isinstance(value, float)}, step=done
    )
    seconds = float(line["step_s"])
    if len(log.seconds) >= 20 and seconds > SPILL_RATIO * statistics.median(log.seconds):
        log.once(
            "slow",
            f"step {done} took {seconds:.1f} s, over five times the median: is memory spilling?",
            reporter,
        )
    log.seconds.append(seconds)
    if done == DEAD_AFTER_STEPS and not any(bool(weight.detach().any()) for weight in session.up_weights):
        log.once(
            "dead",
            f"after {done} steps every lora_B is still zero: no gradient reaches the adapter",
            reporter,
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; a second SIGINT quits at once.

    Outside the main thread Python cannot install handlers; there the caller's own handling stays.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signum)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
