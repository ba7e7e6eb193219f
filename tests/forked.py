"""The command line in a process of its own, forked from one that has imported everything: no import, no wait.

What is not tested so is what a fresh interpreter does: tests/cli starts that.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import NoReturn

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of the process that is forked; what is read when modules are imported."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.imported"])


def run(
    arguments: Sequence[str],
    home: Path,
    env: Mapping[str, str] = MappingProxyType({}),
    *,
    first: str = "",
) -> CompletedProcess[str]:
    """Run `lorabooth ARGUMENTS` in the folder `home`, with these variables beside this process's own.

    `first` is Python code that is run in the process before.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        given = (list(arguments), home, {**before, **OFFLINE, **env}, first, out, err)
        child = _context.Process(target=_live, args=given)
        os.environ.update(OFFLINE)  # the first one starts the process that is forked
        try:
            child.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        child.join()
        code = child.exitcode
        assert code is not None
        return CompletedProcess(list(arguments), code, out.read_text("utf-8"), err.read_text("utf-8"))


def _live(arguments: list[str], home: Path, env: dict[str, str], first: str, out: Path, err: Path) -> None:
    """In the child, to its end."""
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(home)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["lorabooth", *arguments]

    def work() -> None:
        exec(first, {})
        importlib.import_module("lorabooth.cli.app").main()

    to_the_end(work)


def to_the_end(work: Callable[[], object]) -> NoReturn:
    """Do it as a program does, and end this process: a forked one must not go on as its parent would."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
