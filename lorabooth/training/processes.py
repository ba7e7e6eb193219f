"""Which of several processes this one is: accelerate's state, as its launcher or torchrun has set it."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Device, rank and number of processes.

    `accelerate launch --cpu` tells by ACCELERATE_USE_CPU that several processes are on the CPU; accelerate's
    own first look does not read it.
    """
    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")))
