"""Runs the optimizer steps of a composed session. Knows no family, prior mode or memory technique.

Progress is one integer, the optimizer step; everything drawn in step s is a function of (seed, s).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lorabooth.errors import InterruptedRunError
from lorabooth.progress import Reporter, Task
from lorabooth.recipe import OptimSection
from lorabooth.training import optim
from lorabooth.training.alarms import StepFigures, Watch
from lorabooth.training.log import MetricsLog, wrong_parts
from lorabooth.training.step import StepParts, class_rows, draw_noise, micro_step
from lorabooth.types import Batch


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
        diagnosis: what a non-finite step is reported with; the compute dtype ("fp16") is its first word.
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


def run_steps(
    session: Session,
    hooks: Hooks,
    metrics: MetricsLog,
    *,
    start: int,
    stop: int,
    reporter: Reporter,
    watch: Watch | None = None,
) -> Watch:
    """Run optimizer steps `start` .. `stop - 1`.

    Args:
        session: what to run.
        hooks: what happens between steps; `checkpoint` should save `watch.state_dict()` too.
        metrics: gets a line per step.
        start: finished steps.
        stop: steps of the whole run.
        reporter: hears of progress and alarms.
        watch: alarms and the guard, as the checkpoint had them; None for a new run.

    Returns:
        The watch; its warnings are those of the whole run.

    Raises:
        InterruptedRunError: SIGINT or SIGTERM came; the step was finished and the state saved.
        TrainingError: the loss stayed non-finite, or there is no space to save.
    """
    watch = watch or Watch()
    alone = session.accelerator.num_processes == 1
    with _signals(reporter) as asked, reporter.task("Training", stop, "step", start) as task:
        for step in range(start, stop):
            began_s = time.perf_counter()
            lr = optim.set_lr(session.optimizer, session.section, step, stop)
            figures = _one_step(session, step, asked, watch)
            done, seconds = step + 1, time.perf_counter() - began_s
            line = {"step": done, **figures.line, "lr": lr, "step_s": seconds}
            _tell(session, metrics, line, task)
            watch.note(figures, reporter, step=done, seconds=seconds, diagnosis=session.diagnosis)
            saved = done == stop or (hooks.checkpoint_every > 0 and done % hooks.checkpoint_every == 0)
            if saved:
                metrics.sync()
                hooks.checkpoint(done)
            if hooks.preview_every > 0 and done % hooks.preview_every == 0 and done < stop:
                hooks.preview(done)
            # Several ranks must stop at the same step: only what all of them have heard counts.
            if (bool(asked) if alone else figures.stopping) and done < stop:
                if not saved:
                    metrics.sync()
                    hooks.checkpoint(done)
                by = signal.Signals(asked[0]).name if asked else "a signal to another process"
                raise InterruptedRunError(
                    f"interrupted by {by} after step {done} of {stop}; the state is saved.",
                    "The same command again goes on from here.",
                )
    return watch


def _one_step(session: Session, step: int, asked: Sequence[int], watch: Watch) -> StepFigures:
    """Forward, backward and update of one optimizer step. One host synchronisation."""
    sums, record_ids = _accumulate(session, step)
    if asked:
        sums[3] = 1.0
    if session.accelerator.num_processes > 1:
        _sum_over_ranks(session, sums)
    session.scaler.unscale_(session.optimizer)
    names = [str(group["name"]) for group in session.optimizer.param_groups]
    by_component = _grad_norms(session) if len(names) > 1 else []
    ups = _up_norms(session) if watch.alarms.want_up_norms else []
    norm = optim.clip(session.parameters, session.section.max_grad_norm)
    read = torch.cat([sums, torch.stack([norm, *(by_component or [norm]), *ups])]).tolist()
    total, instance, prior, stopping, grad_norm = read[:5]
    line: dict[str, Any] = {"loss": total, "loss_instance": instance}
    if session.n_class:
        line["loss_prior"] = prior
    line["grad_norm"] = grad_norm
    grad_norms = dict(zip(names, read[5 : 5 + len(names)], strict=True))
    wrong = wrong_parts(line, grad_norms)
    overflow = False
    if wrong:
        record_ids = gather_object(record_ids) if session.accelerator.num_processes > 1 else record_ids
        overflow = _skip(session, line, wrong, record_ids)
    else:
        session.scaler.step(session.optimizer)
        session.scaler.update()
    session.optimizer.zero_grad(set_to_none=True)
    return StepFigures(
        line=line,
        record_ids=record_ids,
        wrong=() if overflow else wrong,
        overflow=overflow,
        grad_norms=grad_norms,
        up_norms=dict(zip(names, read[5 + len(names) :], strict=True)) if ups else {},
        stopping=stopping > 0,
    )


def _accumulate(session: Session, step: int) -> tuple[torch.Tensor, list[str]]:
    """Gradients of all micro-batches of this rank.

    Returns:
        [4] loss, the subject's, the class images', and 0; and the examples.
    """
    device = session.accelerator.device
    sums = torch.zeros(4, device=device)
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
            sums[:3] += torch.stack([terms.total.detach(), terms.instance.detach(), terms.prior.detach()])
    return sums, record_ids


def _skip(session: Session, line: dict[str, Any], wrong: Sequence[str], record_ids: Sequence[str]) -> bool:
    """Mark a step that is not applied; whether lowering the loss scale can mend it.

    A loss that is not finite says nothing about the scale: halving it for a bad photo in every epoch would
    bring it to 0. Below 1 the scale does not help any more.
    """
    scaler = session.scaler
    scale = float(scaler.get_scale())
    line.update(skipped=True, record_ids=list(record_ids), not_finite=list(wrong))
    if not math.isfinite(line["loss"]):
        scaler.update(scale)
        return False
    scaler.update()
    overflow = scaler.is_enabled() and scale > 1.0
    if overflow:
        line.update(overflow=True, loss_scale=scale)
    return overflow


def _grad_norms(session: Session) -> list[torch.Tensor]:
    """2-norm of the gradient of each component; 0 where there is none."""
    zero = torch.zeros((), device=session.accelerator.device)
    norms = []
    for group in session.optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients) if gradients else zero)
    return norms


def _up_norms(session: Session) -> list[torch.Tensor]:
    """2-norm of all lora_B of each component."""
    ups = {id(weight) for weight in session.up_weights}
    return [
        torch.nn.utils.get_total_norm([p.detach() for p in group["params"] if id(p) in ups])
        for group in session.optimizer.param_groups
    ]


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


def _tell(session: Session, metrics: MetricsLog, line: Mapping[str, Any], task: Task) -> None:
    """Metrics, progress, trackers."""
    if session.accelerator.is_main_process:
        metrics.append(line)
    task.advance(1, loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.1e}")
    figures = {key: value for key, value in line.items() if isinstance(value, float)}
    session.accelerator.log(figures, step=line["step"])


@contextmanager
def _signals(reporter: Reporter) -> Iterator[list[int]]:
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
        if len(asked) == 1:
            again = "again" if signum == signal.SIGINT else "Ctrl-C"
            # Python refuses to print within a print that the signal came into: then the line is lost.
            with suppress(RuntimeError):
                reporter.say(f"finishing this step and saving; {again} to quit at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
