"""From exceptions to one message and an exit code; tracebacks only when `--debug` asks for them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar

import typer

from lorabooth.errors import (
    InterruptedRunError,
    LoraboothError,
    OutOfMemoryError,
    RecipeError,
    first_line,
    is_out_of_memory,
)
from lorabooth.secrets import redact

P = ParamSpec("P")
R = TypeVar("R")

DEBUG_VARIABLE = "LORABOOTH_DEBUG"
"""Set to 1 by `--debug`, so that worker processes show tracebacks too."""


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors become a message on stderr and an exit code.

    What is no LoraboothError, no interrupt and not a lack of memory is a defect of ours: it goes on to
    `report_defect`.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **options: P.kwargs) -> R:
        try:
            with _terminable():
                return function(*args, **options)
        except LoraboothError as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(
                InterruptedRunError(
                    "interrupted; nothing half-written is left.",
                    "The same command again begins anew, with what was finished and kept before.",
                )
            )
        except BrokenPipeError:
            # The reader of our output went away (`| head`); the rest of it has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (RuntimeError, MemoryError) as error:
            if debugging() or not is_out_of_memory(error):
                raise
            _fail(
                OutOfMemoryError(
                    f"memory ran out: {first_line(error)}",
                    "Try, in this order: --set memory.checkpointing=true, --set optim.batch_size=1, "
                    "--set optim.name=adamw8bit, a smaller --set images.resolution.",
                )
            )

    return guarded


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():  # as in a server that embeds us
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(DEBUG_VARIABLE) == "1"


def report_defect(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """`sys.excepthook` of the command line: an unexpected exception in two lines, or all of it to debug."""
    if debugging():
        print(_traceback(error), file=sys.stderr, end="")
        return
    text = redact(first_line(error))
    print(f"error: {kind.__name__}{': ' if text else ''}{text}", file=sys.stderr)
    print(
        "This is a defect of lorabooth, not of your input. Please report it, with the traceback",
        file=sys.stderr,
    )
    print("that the same command gives as `lorabooth --debug ...`.", file=sys.stderr)


def usage(message: str) -> RecipeError:
    """An error in how a command was called; exit code 2."""
    return RecipeError(message, "Add --help to see how the command is used.")


def _fail(error: LoraboothError) -> NoReturn:
    if debugging():
        print(_traceback(error), file=sys.stderr, end="")
    print(f"error: {redact(str(error))}", file=sys.stderr)
    raise typer.Exit(error.exit_code) from None


def _traceback(error: BaseException) -> str:
    return redact("".join(traceback.format_exception(error)))
