"""When a process is killed, and the watching of it from outside until it has ended."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PATIENCE_S = 240.0
"""A process that neither ends nor changes anything on the disk for so long hangs."""
_NUMBERS = re.compile(r"(?<![0-9a-z])[0-9a-f]{2}(?![^.])|[0-9a-f]{16,}|\d+")


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        change: number of the change on the disk, from 1; 0 is never.
        delay_s: None: just before that change, half-way through it if it is a write. Else: so many seconds
            after it, wherever the process is then.
    """

    change: int = 0
    delay_s: float | None = None

    @property
    def die_at(self) -> int:
        """The change at which the process kills itself; 0 if it is killed from outside or not at all."""
        return self.change if self.delay_s is None else 0


NEVER = Moment()


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, -9 if it was killed.
        changes: what it changed on the disk, "KIND PATH" each; if it was killed, the last is where.
        said: on stderr.
    """

    code: int
    changes: tuple[str, ...]
    said: str = ""

    @property
    def killed(self) -> bool:
        """By SIGKILL."""
        return self.code == -signal.SIGKILL


def watch(pid: int, told: int, moment: Moment) -> tuple[int, list[str]]:
    """Read what a process tells until it ends; kill it when its moment has come.

    Args:
        pid: a child of this process.
        told: file descriptor to read from; closed here.
        moment: when.

    Returns:
        Exit code and changes.

    Raises:
        TimeoutError: it hung, and was killed.
    """
    text, due = b"", None
    while True:
        left_s = PATIENCE_S if due is None else max(0.0, due - time.monotonic())
        if not select.select([told], [], [], left_s)[0]:
            os.kill(pid, signal.SIGKILL)
            if due is None:
                os.waitpid(pid, 0)
                lines = text.decode().splitlines()
                raise TimeoutError(f"nothing happened for {PATIENCE_S:.0f} s after {lines[-1:]}")
            due = None
            continue
        piece = os.read(told, 1 << 16)
        if not piece:
            break
        text += piece
        if due is None and moment.delay_s is not None and text.count(b"\n") >= moment.change > 0:
            due = time.monotonic() + moment.delay_s
            moment = NEVER
    os.close(told)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), text.decode().splitlines()


def site(change: str) -> str:
    """A change without what differs from run to run: numbers and digests."""
    kind, _, path = change.partition(" ")
    plain = [_NUMBERS.sub("#", part) for part in path.split("/")]
    return f"{kind} {'/'.join(plain)}"


def places(changes: Sequence[str], chance: random.Random) -> list[int]:
    """Numbers of changes to die at, one for each change, but of many writes to one file in a row only one.

    Args:
        changes: of an undisturbed run.
        chance: which of those writes.
    """
    found, first = [], 0
    for number, change in enumerate(changes):
        following = changes[number + 1] if number + 1 < len(changes) else ""
        if change != following or not change.startswith("write "):
            found.append(chance.randint(first, number) + 1)
            first = number + 1
    return found


def one_of_each(changes: Sequence[str], chance: random.Random) -> list[int]:
    """Of `places`, one for each site, in the order of the run."""
    by_site: dict[str, list[int]] = {}
    for number in places(changes, chance):
        by_site.setdefault(site(changes[number - 1]), []).append(number)
    return sorted(chance.choice(numbers) for numbers in by_site.values())


def chains(changes: Sequence[str], chance: random.Random, longest: int = 4) -> Iterator[list[Moment]]:
    """Kills of one run after another, without end.

    The first of a chain goes through all `places` in random order, so that in time every change of a whole
    run has been died at; those after it are anywhere, every other one at a random moment after a change.
    """
    while True:
        numbers = places(changes, chance)
        chance.shuffle(numbers)
        for number in numbers:
            chain = [Moment(number)]
            for _ in range(chance.randrange(longest)):
                delay_s = chance.choice([None, chance.uniform(0, 0.5)])
                chain.append(Moment(chance.choice(numbers), delay_s))
            yield chain
