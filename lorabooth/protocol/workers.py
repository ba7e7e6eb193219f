"""Several processes at one protocol: each takes the next free subject, under a lock, and trains alone.

Nothing is sent between them. What is done is on the disk, a lock ends with its process, and whoever has
nothing left to take waits for the others: so any of them may be killed at any time.

Under `accelerate launch` (or torchrun) every process is such a worker. Training would take the launcher's
processes for one run's and share the batch between them, so the launcher's variables are forgotten first;
each keeps the one GPU that its local rank names.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from lorabooth.errors import RecipeError

WAIT_S = 0.5
"""Between two looks for a subject that has become free."""

_RANK, _WORLD, _LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
# Of the launchers and their MPI cousins; ACCELERATE_USE_CPU stays, it says where and not how many.
_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|"
    r"(OMPI_COMM_WORLD|PMI|MV2_COMM_WORLD|MPI)_\w+|MPI_LOCAL(RANKID|NRANKS)|"
    r"ACCELERATE_USE_(DEEPSPEED|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)"
)


@dataclass(frozen=True, slots=True)
class Position:
    """Which of several workers this process is."""

    index: int
    count: int


def leave_launch(environment: MutableMapping[str, str] | None = None) -> Position:
    """Where a launcher has put this process; from now on it is a single one, on its own GPU.

    Must come before anything asks accelerate or CUDA where it is.

    Args:
        environment: os.environ.

    Raises:
        RecipeError: accelerate has been asked already, and has joined the processes.
    """
    environment = os.environ if environment is None else environment
    count = _number(environment, _WORLD, 1)
    position = Position(_number(environment, _RANK, 0), count)
    if count <= 1:
        return position
    from accelerate import PartialState

    if PartialState._shared_state and PartialState().num_processes > 1:
        raise RecipeError(
            "this process is one of several that accelerate has joined: they would train one run together.",
            "Start a protocol from the command line, or before anything asks accelerate for its processes.",
        )
    local = _number(environment, _LOCAL_RANK, position.index)
    for name in [name for name in environment if _LAUNCHER.fullmatch(name)]:
        del environment[name]
    environment.update(_one_gpu(environment, local))
    return position


@contextlib.contextmanager
def taken(lock: Path) -> Iterator[bool]:
    """Whether a subject is this process's now; it is free again when the block, or the process, ends."""
    held = filelock.FileLock(lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def start_workers(words: Sequence[str], count: int) -> list[int]:
    """Run a command in several processes, and wait for all of them; if we end, however, so do they.

    Args:
        words: arguments of `python -m lorabooth`; "{worker}" in them becomes 0, 1, ...
        count: how many.

    Returns:
        Their exit codes; a negative one is the signal that ended it.
    """
    processes = []
    cores = os.cpu_count() or 1
    for index in range(count):
        environment = {**os.environ, **_one_gpu(os.environ, index)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
        command = [sys.executable, "-m", "lorabooth", *(w.replace("{worker}", str(index)) for w in words)]
        # A group of their own: Ctrl-C in a terminal reaches us, and we tell them, once.
        processes.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
        )
    try:
        return [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait()
        raise


def end_with_parent() -> None:
    """Interrupt this process when the one that started it is gone, or asks for it: its stdin then ends."""

    def listen() -> None:
        # Not through sys.stdin, whose lock a thread must not hold when Python ends.
        while os.read(0, 1):
            pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=listen, name="lorabooth-parent", daemon=True).start()


def wait() -> None:
    """Give the others time."""
    time.sleep(WAIT_S)


def _number(environment: MutableMapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default


def _one_gpu(environment: MutableMapping[str, str], index: int) -> dict[str, str]:
    """The variable that leaves worker `index` one of the GPUs that are visible; nothing with one or none."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = [
        part.strip() for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()
    ]
    names = visible or [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[index % len(names)]}
