"""A run folder belongs to one process, and to nobody after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth.errors import RecipeError
from lorabooth.training.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from lorabooth.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_by_name_and_a_crashed_one_holds_nothing(tmp_path):
    folder = tmp_path / "runs" / "größe"
    process = holder(folder)
    try:
        with pytest.raises(RecipeError, match=f"process {process.pid} on ") as caught, RunLock(folder):
            pass
        assert caught.value.exit_code == 2
        assert str(folder) in caught.value.what
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert (folder / ".lock-owner.json").exists()  # it could not tidy up
    with RunLock(folder):
        assert str(os.getpid()) in (folder / ".lock-owner.json").read_text()
    assert not (folder / ".lock-owner.json").exists()


def test_the_same_process_cannot_hold_it_twice_but_again(tmp_path):
    with RunLock(tmp_path), pytest.raises(RecipeError, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_an_error_inside_gives_the_lock_back(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        pass


def test_an_output_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock-owner.json").mkdir()
    with pytest.raises(RecipeError, match="cannot be written"), RunLock(tmp_path / "run"):
        pass
    (tmp_path / "run" / ".lock-owner.json").rmdir()
    with RunLock(tmp_path / "run"):
        pass
