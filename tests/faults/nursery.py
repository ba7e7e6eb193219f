"""Processes that are forked from one in which everything is imported already: a tenth of a start's cost.

The parent has run nothing of torch's, so it has no threads whose loss would matter to a child. Each child is
the command line from its first line to its end, in a process of its own that can be killed as any other.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tests import forked
from tests.faults import child
from tests.faults.moments import Ended, Moment, watch

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """Starts the command line by forking, as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Nursery:
        """Wait until it is ready."""
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(
        self, arguments: Sequence[str], roots: Sequence[Path], env: Mapping[str, str], moment: Moment
    ) -> Ended:
        """Run the command line once, see `harness.Start`."""
        request = {
            "arguments": list(arguments),
            "roots": [str(root) for root in roots],
            "env": dict(env),
            "change": moment.change,
            "delay_s": moment.delay_s,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise TimeoutError(answer["error"])
        return Ended(answer["code"], tuple(answer["changes"]), answer["said"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the parent of the forked processes is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve() -> None:
    """Answer requests, one a line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    importlib.import_module("tests.imported")
    gc.collect()
    gc.freeze()  # or every child's first collection would copy the parent's memory
    assert threading.active_count() == 1, threading.enumerate()
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        try:
            answer = _fork(json.loads(line))
        except TimeoutError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(request: Mapping[str, Any]) -> dict[str, Any]:
    told, tell = os.pipe()
    moment = Moment(request["change"], request["delay_s"])
    errors = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        _live(request, tell, moment.die_at)
    os.close(tell)
    try:
        code, changes = watch(pid, told, moment)
        os.lseek(errors, 0, os.SEEK_SET)
        said = os.read(errors, 1 << 20).decode(errors="replace")
    finally:
        os.close(errors)
    return {"code": code, "changes": changes, "said": said}


def _live(request: Mapping[str, Any], tell: int, die_at: int) -> NoReturn:
    """In the child, to its end."""
    os.environ.update(request["env"])
    child.Trap(tell, die_at, request["roots"]).install()
    forked.to_the_end(lambda: child.command_line(request["arguments"]))


if __name__ == "__main__":
    serve()
