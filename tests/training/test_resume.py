"""Real processes, interrupted and killed for real: the run that goes on is the run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorabooth
from lorabooth.recipe import dump
from tests.training import runs

STEPS = "optim.steps=60"


@pytest.fixture
def started(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[str]:
    """`lorabooth train` in a process of its own, past its fifth step."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(_recipe(tiny_sd, photos)), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "lorabooth",
        "train",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and (not log.exists() or log.read_text("utf-8").count("\n") < 5):
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    return process


def _recipe(tiny_sd: Path, photos: Path) -> lorabooth.Recipe:
    return runs.recipe(tiny_sd, photos, STEPS, "run.checkpoint_every=2", "optim.name=adamw")


def _goes_on_to_the_same_end(tiny_sd: Path, photos: Path, tmp_path: Path) -> int:
    resumed = lorabooth.train(_recipe(tiny_sd, photos), out=tmp_path / "run")
    whole = lorabooth.train(_recipe(tiny_sd, photos), out=tmp_path / "whole")
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert runs.metrics(resumed.out) == runs.metrics(whole.out)
    return resumed.resumed_from


def test_killed_and_resumed_is_never_stopped(
    started: subprocess.Popen[str], tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    started.kill()
    started.wait()
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert 0 < _goes_on_to_the_same_end(tiny_sd, photos, tmp_path) < 60


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_130(
    started: subprocess.Popen[str], tiny_sd: Path, photos: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    started.send_signal(sent)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 130, told
    assert "goes on from here" in told
    assert "Traceback" not in told
    done = len(runs.metrics(tmp_path / "run"))
    assert _goes_on_to_the_same_end(tiny_sd, photos, tmp_path) == done, "a step was done twice or lost"


def test_a_second_process_is_refused(
    started: subprocess.Popen[str], tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    try:
        with pytest.raises(lorabooth.LoraboothError, match="in use by another run"):
            lorabooth.train(_recipe(tiny_sd, photos), out=tmp_path / "run")
    finally:
        started.kill()
        started.wait()
