"""How long work tells what it is doing, without knowing who listens.

The command line shows rich bars or plain lines (cli/console.py); the library's default is silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One long piece of work under way."""

    def advance(self, count: int = 1, **fields: str) -> None:
        """Count further units done; `fields` are shown beside the bar (loss="0.123")."""
        ...


class Reporter(Protocol):
    """Where progress and messages go."""

    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> AbstractContextManager[Task]:
        """Begin a piece of work of `total` units, `start` of them done already."""
        ...

    def say(self, message: str) -> None:
        """One line (or a short block) of information."""
        ...

    def warn(self, message: str) -> None:
        """Something the user should know, though work goes on."""
        ...


class _SilentTask:
    def advance(self, count: int = 1, **fields: str) -> None:
        """Do nothing."""


class Silent:
    """A reporter that says nothing; warnings go to `logging` under "lorabooth"."""

    @contextmanager
    def task(self, label: str, total: int, unit: str = "it", start: int = 0) -> Iterator[Task]:  # noqa: ARG002
        """Work without a bar."""
        yield _SilentTask()

    def say(self, message: str) -> None:
        """Do nothing."""

    def warn(self, message: str) -> None:
        """Hand the warning to `logging`."""
        import logging

        logging.getLogger("lorabooth").warning(message)


def duration(seconds: float) -> str:
    """As a person says it: "40 s", "9 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"
