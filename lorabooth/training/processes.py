"""Which of several processes this one is: accelerate's state, as its launcher or torchrun has set it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from lorabooth.errors import LoraboothError

R = TypeVar("R")


def process_state() -> PartialState:
    """Device, rank and number of processes.

    `accelerate launch --cpu` tells by ACCELERATE_USE_CPU that several processes are on the CPU; accelerate's
    own first look does not read it.
    """
    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")))


def together(decide: Callable[[], R]) -> R:
    """What the main process decides, in all processes: a decision that depends on the machine's state.

    Raises:
        LoraboothError: the main process's, in all of them.
    """
    state = process_state()
    if state.num_processes == 1:
        return decide()
    found: list[R | LoraboothError | None] = [None]
    if state.is_main_process:
        try:
            found = [decide()]
        except LoraboothError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], LoraboothError):
        raise found[0]
    return found[0]  # type: ignore[return-value]
