"""What the command line shows of long work: bars on a terminal, plain lines elsewhere, or nothing.

Progress and messages go to stderr, results to stdout, so that a result can be piped. Known secrets are taken
out of everything shown here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from lorabooth.progress import Reporter, Silent, Task
from lorabooth.secrets import redact

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

LINE_INTERVAL_S = 5.0
"""Plain progress lines are at least this far apart."""


def reporter_for(*, quiet: bool, stream: TextIO | None = None) -> Reporter:
    """The reporter that suits where stderr goes.

    Args:
        quiet: nothing but errors and results.
        stream: instead of stderr.
    """
    target = stream or sys.stderr
    if quiet:
        return Quiet()
    return Bars(target) if target.isatty() else Lines(target)


def duration_text(seconds: float) -> str:
    """A duration as a person reads it: "0:07", "1:02:03"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def dtype_text(dtype: str) -> str:
    """The customary name of a dtype of safetensors': "F16" -> "fp16"."""
    known = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    return known.get(dtype, dtype.lower().replace("f8", "fp8"))


def rate_text(count: int, seconds: float, unit: str) -> str:
    """A speed: "5.20 it/s", or "3.1 s/it" where that is the handier number; empty without data."""
    if count <= 0 or seconds <= 0:
        return ""
    per_s = count / seconds
    return f"{per_s:.2f} {unit}/s" if per_s >= 1 else f"{1 / per_s:.1f} s/{unit}"


# ---- a terminal ----


@dataclass(frozen=True)
class _BarTask:
    progress: Progress
    task_id: TaskID
    shown: dict[str, str]

    def advance(self, count: int = 1, **fields: str) -> None:
        """Move the bar, and show the fields beside it."""
        self.shown.update(fields)
        notes = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        self.progress.update(self.task_id, advance=count, notes=redact(notes))


class Bars:
    """Rich progress bars; messages appear above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _speed_column(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[notes]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:
        """A bar; one line of what was done remains when it is finished."""
        if self._open == 0:
            self._progress.start()
        self._open += 1
        task_id = self._progress.add_task(redact(label), total=total, completed=start, notes="", unit=unit)
        shown: dict[str, str] = {}
        try:
            yield _BarTask(self._progress, task_id, shown)
            done = self._progress.tasks[self._progress.task_ids.index(task_id)]
            self.say(_summary(label, int(done.completed), start, unit, done.elapsed or 0.0, shown))
        finally:
            self._progress.remove_task(task_id)
            self._open -= 1
            if self._open == 0:
                self._progress.stop()

    def say(self, message: str) -> None:
        """Print above the bars."""
        self._console.print(redact(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print above the bars, in yellow."""
        self._console.print(f"warning: {redact(message)}", style="yellow", soft_wrap=True)


def _speed_column() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            per_s = task.speed or 0.0
            return Text(rate_text(1, 1 / per_s, task.fields["unit"]) if per_s > 0 else "")

    return Speed()


# ---- a file, a pipe, a log ----


@dataclass
class _LineTask:
    label: str
    total: int
    unit: str
    start: int
    print_line: Callable[[str], None]
    clock: Callable[[], float]
    began_s: float
    last_s: float
    done: int
    shown: dict[str, str] = field(default_factory=dict)

    def advance(self, count: int = 1, **fields: str) -> None:
        """Count, and print a line if the last one is long enough ago."""
        self.done += count
        self.shown.update(fields)
        now_s = self.clock()
        if now_s - self.last_s >= LINE_INTERVAL_S and self.done < self.total:
            self.last_s = now_s
            self.print_line(self._line(now_s - self.began_s))

    def _line(self, elapsed_s: float) -> str:
        new = self.done - self.start
        parts = [
            f"{self.label}  {self.done}/{self.total}",
            *_fields(self.shown),
            rate_text(new, elapsed_s, self.unit),
        ]
        if new > 0:
            parts.append(f"ETA {duration_text(elapsed_s / new * (self.total - self.done))}")
        return "  ".join(filter(None, parts))


class Lines:
    """Plain lines, one every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:
        """Lines now and then, and one at the end."""
        now_s = self._clock()
        task = _LineTask(label, total, unit, start, self.say, self._clock, now_s, now_s, start)
        yield task
        self.say(_summary(label, task.done, start, unit, self._clock() - now_s, task.shown))

    def say(self, message: str) -> None:
        """Print."""
        print(redact(message), file=self._stream, flush=True)

    def warn(self, message: str) -> None:
        """Print with a mark."""
        self.say(f"warning: {message}")


class Quiet:
    """Nothing: errors and results are printed by the commands themselves."""

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:
        """Work without a bar."""
        with Silent().task(label, total, unit, start) as task:
            yield task

    def say(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Do nothing."""


def _summary(label: str, done: int, start: int, unit: str, elapsed_s: float, shown: dict[str, str]) -> str:
    plural = "" if done == 1 or unit in ("it", "MiB") else "s"
    parts = [
        f"{label}: {done} {unit}{plural} in {duration_text(elapsed_s)}",
        rate_text(done - start, elapsed_s, unit),
    ]
    return "  ".join(filter(None, [*parts, *_fields(shown)]))


def _fields(shown: dict[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in shown.items()]
