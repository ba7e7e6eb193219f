"""Every way a run can fail that is the user's to mend, each with its exit code.

An error's text is one message of three parts: what is wrong, where (file, key, photo), what to do.
"""

from __future__ import annotations

import sys


class LoraboothError(Exception):
    """Base of all errors shown to users as one message, without a traceback.

    Args:
        what: what is wrong, and where (file, recipe key, photo), in one sentence or a short list.
        fix: what the user can do about it; empty when `what` already says so.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.fix}" if self.fix else self.what


class RecipeError(LoraboothError):
    """The recipe, an override or a command line option is wrong, or an output cannot be written."""

    exit_code = 2


class DataError(LoraboothError):
    """Photos or captions cannot be used."""

    exit_code = 3


class BaseModelError(LoraboothError):
    """The base model is absent, broken, or of a kind that is not supported."""

    exit_code = 4


class AdapterError(LoraboothError):
    """An adapter file is broken, does not fit, or matches nothing."""

    exit_code = 5


class OutOfMemoryError(LoraboothError):
    """The device has too little memory; the message names the next thing to try."""

    exit_code = 6


class TrainingError(LoraboothError):
    """Training went wrong: non-finite numbers, or no space to save."""

    exit_code = 7


class InterruptedRunError(LoraboothError):
    """The user or the system asked the run to stop; its state is saved and it can go on."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch means that the device or the machine has too little memory."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # if it was never imported, it did not fail
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # torch has no exception class of its own for the CPU's and Apple's allocators.
    text = str(error)
    return "DefaultCPUAllocator" in text or "MPS backend out of memory" in text


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something; without one, the exception's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :300
    ]
