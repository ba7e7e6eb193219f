"""Runs the optimizer steps of a composed session. Knows no family, prior mode or memory technique.

Progress is one integer, the optimizer step; everything drawn in step s is a function of (seed, s).
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from lorabooth.errors import InterruptedRunError
from lorabooth.progress import Reporter, Task
from lorabooth.recipe import OptimSection
from lorabooth.training import optim
from lorabooth.training.alarms import Watch
from lorabooth.training.log import MetricsLog
from lorabooth.training.prefetch import Forwards, ahead, make
from lorabooth.training.ran_out import LastStep, watched_updates
from lorabooth.training.step import StepParts
from lorabooth.training.update import Launched, launch
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
        n_class: class examples likewise, of a step that has them; 0 without prior preservation.
        diagnosis: what a non-finite step is reported with; the compute dtype ("fp16") is its first word.
        prior_every: steps 0, `prior_every`, 2 `prior_every` ... have class examples.
        late: a step's figures are read while the next one runs; see `update`.
        graph: a step's examples -> its numbers, by a captured step; None runs the operations one by one.
        pace: told (finished steps, of so many, seconds of the last one); may switch compiled blocks.
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
    prior_every: int = 1
    late: bool = False
    graph: Callable[[Forwards], torch.Tensor] | None = None
    pace: Callable[[int, int, float], object] | None = None


@dataclass(frozen=True)
class Hooks:
    """What happens between steps; each is called with the number of finished steps.

    Attributes:
        checkpoint: saves the state; called when due, at the end, and when interrupted.
        preview: draws sample images; called when due. Cannot change the run.
        checkpoint_every: 0 is off (the end is still saved).
        preview_every: 0 is off.
        paced: told of each step and the seconds it took.
        ends: called after each checkpoint that is due or the last: whether the run ends there, though steps
            are left; the same in all processes. None goes on to the last step.
        validate: computes losses on what is not drawn at random, for the line of the step that is done; takes
            no part in the step. Called when due.
        validate_every: 0 is off.
    """

    checkpoint: Callable[[int], None]
    preview: Callable[[int], object]
    checkpoint_every: int
    preview_every: int
    paced: Callable[[int, float], object] | None = None
    ends: Callable[[int], bool] | None = None
    validate: Callable[[], Mapping[str, float]] | None = None
    validate_every: int = 0

    def validated(self, done: int) -> bool:
        """Whether validation is due after `done` steps."""
        return self.validate is not None and self.validate_every > 0 and done % self.validate_every == 0


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
    with ExitStack() as opened:
        asked = opened.enter_context(_signals(reporter))
        task = opened.enter_context(reporter.task("Training", stop, "step", start))
        coming = opened.enter_context(ahead(_maker(session), range(start, stop)))
        told = _Told(session, metrics, task, watch, reporter)

        def save(step: int) -> None:
            told.tell(since_s=time.perf_counter(), hold=0)
            metrics.sync()
            hooks.checkpoint(step)

        last = LastStep(save, opened.enter_context(watched_updates(session.optimizer)), start, saved=start)
        for step in range(start, stop):
            began_s = time.perf_counter()
            done, lr = step + 1, optim.set_lr(session.optimizer, session.section, step, stop)
            with last.kept():
                launched = launch(
                    session,
                    step,
                    coming(),
                    asked=asked,
                    want_up_norms=watch.alarms.want_up_norms,
                )
            last.steps = done
            extra, aside_s = _validation(hooks, done)
            began_s += aside_s
            told.add(done, lr, launched, extra)
            saved = done == stop or (hooks.checkpoint_every > 0 and done % hooks.checkpoint_every == 0)
            drawn = hooks.preview_every > 0 and done % hooks.preview_every == 0 and done < stop
            # What is saved has been judged: a step's figures come late only between two saves.
            told.tell(since_s=began_s, hold=int(session.late and not saved and not drawn))
            if session.pace is not None:
                session.pace(done, stop, time.perf_counter() - began_s)
            if hooks.paced is not None:
                hooks.paced(done, time.perf_counter() - began_s)
            if saved:
                metrics.sync()
                hooks.checkpoint(done)
                last.saved = done
                # Who was asked to stop does not wait for a measurement: the next process makes up for it.
                waits = not (alone and asked and done < stop)
                if waits and hooks.ends is not None and hooks.ends(done):
                    break
            if drawn:
                hooks.preview(done)
            # Several ranks must stop at the same step: only what all of them have heard counts.
            if (bool(asked) if alone else told.stopping) and done < stop:
                told.tell(since_s=began_s, hold=0)
                if not saved:
                    metrics.sync()
                    hooks.checkpoint(done)
                by = signal.Signals(asked[0]).name if asked else "a signal to another process"
                raise InterruptedRunError(
                    f"interrupted by {by} after step {done} of {stop}; the state is saved.",
                    "The same command again goes on from here.",
                )
    return watch


def _validation(hooks: Hooks, done: int) -> tuple[Mapping[str, float], float]:
    """The step's validation losses if they are due, and the seconds they took, which are not the step's."""
    if hooks.validate is None or not hooks.validated(done):
        return {}, 0.0
    began_s = time.perf_counter()
    return hooks.validate(), time.perf_counter() - began_s


def _maker(session: Session) -> Callable[[int], Forwards]:
    """Step -> all that it needs from the host; runs on a thread."""
    pin = session.accelerator.device.type == "cuda"
    path, seed = session.step_parts.path, session.seed
    return lambda step: make(session.batches, path, seed, step, pin=pin)


@dataclass
class _Told:
    """Steps that run or are done, and what is told of them: metrics, progress, trackers, alarms, the guard.

    Attributes:
        session: what runs.
        metrics: gets a line per step.
        task: the progress bar.
        watch: alarms and the guard.
        reporter: hears the alarms.
        stopping: some rank had been asked to stop before the last told step ended.
    """

    session: Session
    metrics: MetricsLog
    task: Task
    watch: Watch
    reporter: Reporter
    stopping: bool = False
    waiting: deque[tuple[int, float, Launched, Mapping[str, float]]] = field(default_factory=deque)

    def add(self, step: int, lr: float, launched: Launched, extra: Mapping[str, float]) -> None:
        """A step was launched; `step` counts it, and `extra` belongs to its line."""
        self.waiting.append((step, lr, launched, extra))

    def tell(self, *, since_s: float, hold: int) -> None:
        """Tell of all steps but the last `hold`; waits until they are done.

        Raises:
            TrainingError: the run does not learn any more.
        """
        while len(self.waiting) > hold:
            step, lr, launched, extra = self.waiting.popleft()
            figures = launched()
            seconds = time.perf_counter() - since_s
            line = {"step": step, **figures.line, **extra, "lr": lr, "step_s": seconds}
            if self.session.accelerator.is_main_process:
                self.metrics.append(line)
            self.task.advance(1, loss=f"{line['loss']:.4f}", lr=f"{lr:.1e}")
            numbers = {key: value for key, value in line.items() if isinstance(value, float)}
            self.session.accelerator.log(numbers, step=step)
            self.watch.note(
                figures, self.reporter, step=step, seconds=seconds, diagnosis=self.session.diagnosis
            )
            self.stopping = figures.stopping


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
