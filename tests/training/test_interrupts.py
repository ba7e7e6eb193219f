"""Signals, in the loop and in real processes: one finishes the step, a second quits and tears nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

import lorabooth
from lorabooth.errors import InterruptedRunError
from lorabooth.recipe import Recipe, dump
from lorabooth.training import state
from lorabooth.training.loop import Session
from tests.training import runs, sessions
from tests.training.sessions import Listener, run

PROGRAM = (sys.executable, "-m", "lorabooth")
LAUNCH = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    *("-m", "lorabooth"),
)
ENDLESS = """
import sys, time
from pathlib import Path
from lorabooth.training import update
micro_step, begun = update.micro_step, Path(sys.argv.pop(1))
steps = 0
def slow(*args, **kwargs):
    global steps
    steps += 1
    if steps == 3:
        begun.touch()
        time.sleep(600)
    return micro_step(*args, **kwargs)
update.micro_step = slow
from lorabooth.cli.app import main
main()
"""
"""The real command; its third step takes longer than any test."""


@pytest.fixture
def session(tiny_sd: Path, photos: Path, tmp_path: Path) -> Session:
    return sessions.session(tiny_sd, photos, tmp_path / "cache")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_with_one_line_and_the_step_is_finished(
    session: Session, tmp_path: Path, sent: signal.Signals
) -> None:
    steps: list[int] = []

    def predict(*args: Any) -> Tensor:
        if len(steps) == 2:
            os.kill(os.getpid(), sent)
            os.kill(os.getpid(), signal.SIGTERM)  # no second Ctrl-C: what started us may pass signals on
        steps.append(len(steps))
        return session.step_parts.predict(*args)

    saved: list[int] = []
    before, listener = signal.getsignal(sent), Listener()
    asked = replace(session, step_parts=replace(session.step_parts, predict=predict))
    with pytest.raises(InterruptedRunError, match=f"by {sent.name} after step 3 of 9"):
        run(asked, tmp_path, range(9), between=sessions.hooks(saved), reporter=listener)
    again = "again" if sent == signal.SIGINT else "Ctrl-C"
    assert listener.said == [f"finishing this step and saving; {again} to quit at once"]
    assert saved == [3]
    assert len(runs.metrics(tmp_path)) == 3
    assert signal.getsignal(sent) == before


def test_a_second_interrupt_quits_in_the_middle_of_saving_and_tears_nothing(
    session: Session, tmp_path: Path
) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"adapter")

    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def save(step: int) -> None:
        writer = write if step == 2 else interrupted
        state.save(tmp_path, step=step, adapter_writer=writer, optimizer=session.optimizer)

    between = replace(sessions.hooks([]), checkpoint=save, checkpoint_every=2)
    listener = Listener()
    with pytest.raises(KeyboardInterrupt):
        run(session, tmp_path, range(9), between=between, reporter=listener)
    assert len(runs.metrics(tmp_path)) == 4
    found = state.newest(tmp_path, listener)
    assert found is not None
    assert found.step == 2
    assert listener.warnings == [], "a torn checkpoint was left"
    assert len(listener.said) == 1


def _start(recipe: Recipe, out: Path, program: Sequence[str] = PROGRAM) -> subprocess.Popen[str]:
    """`lorabooth train` in processes of its own."""
    file = out.with_suffix(".toml")
    file.write_text(dump(recipe), encoding="utf-8")
    env = {**os.environ, "LORABOOTH_CACHE": str(out.parent / "cache"), "OMP_NUM_THREADS": "1"}
    if program is LAUNCH:
        env["ACCELERATE_USE_CPU"] = "true"
    command = [*program, "train", str(file), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)


def _wait(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.005)


def test_a_second_interrupt_quits_a_long_step_at_once(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step without an end: only a second signal ends it."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    recipe = runs.recipe(tiny_sd, photos, "prior.mode=none", "optim.steps=4", "run.checkpoint_every=1")
    out, begun = tmp_path / "run", tmp_path / "begun"
    process = _start(recipe, out, (sys.executable, "-c", ENDLESS, str(begun)))
    _wait(process, begun.exists)
    process.send_signal(signal.SIGINT)
    told = ""
    assert process.stderr is not None
    while "finishing this step" not in told:
        line = process.stderr.readline()
        assert line, f"no answer to the first signal: {told}"
        told += line
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "the state is saved" not in told
    assert "Traceback" not in told
    assert told.count("to quit at once") == 1
    assert len(runs.metrics(out)) == 2, "the step was finished after all"
    listener = Listener()
    found = state.newest(out, listener)
    assert found is not None
    assert (found.step, listener.warnings) == (2, [])
    resumed = lorabooth.train(recipe, out=out)
    whole = lorabooth.train(recipe, out=tmp_path / "whole")
    assert resumed.resumed_from == 2
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert runs.metrics(out) == runs.metrics(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_though_one_has_heard(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = runs.recipe(tiny_sd, photos, "prior.mode=none", "optim.steps=60", "run.checkpoint_every=0")
    out = tmp_path / "two"
    process = _start(recipe, out, LAUNCH)
    log = out / "metrics.jsonl"
    _wait(process, lambda: log.exists() and log.read_text("utf-8").count("\n") >= 5)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    done = len(runs.metrics(out))
    assert 5 <= done < 60, told
    assert f"interrupted by a signal to another process after step {done} of 60; the state is saved" in told
    found = state.newest(out, Listener())
    assert found is not None
    assert found.step == done
    for place in (out, tmp_path / "whole"):
        again = _start(recipe, place, LAUNCH)
        told = again.communicate(timeout=300)[1]
        assert again.returncode == 0, told
    adapters = [(place / "adapter.safetensors").read_bytes() for place in (out, tmp_path / "whole")]
    assert adapters[0] == adapters[1]
    assert runs.metrics(out) == runs.metrics(tmp_path / "whole")
