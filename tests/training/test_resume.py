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
from lorabooth.training.folder import read_json
from tests import forked
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


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_exits_130(
    started: subprocess.Popen[str], tiny_sd: Path, photos: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    started.send_signal(sent)
    _, told = started.communicate(timeout=120)
    assert started.returncode == 130, told
    assert "goes on from here" in told
    assert f"lorabooth train {tmp_path / 'run' / 'recipe.toml'}" in told
    assert "Traceback" not in told
    assert read_json(tmp_path / "run" / "run.json")["status"] == "interrupted"
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


# The real command; what is named is replaced by its own death (or by an interrupt) before it does anything.
DIES = """
import os, signal, sys
import {module} as module
kill = signal.Signals["{sent}"]
before = module.{owner}{name}
def dies(*args, **options):
    if {when}:
        os.kill(os.getpid(), kill)
    return before(*args, **options)
module.{owner}{name} = dies
"""
PREVIEW = {
    "module": "lorabooth.training.previews",
    "owner": "Previews.",
    "name": "draw",
    "when": "args[1] == 4",
}
GRID = {
    "module": "lorabooth.durable",
    "owner": "",
    "name": "replace",
    "when": "args[0].name == 'grid.png' and args[0].parent.name == 'step-000004'",
}
RECIPE = {"module": "os", "owner": "", "name": "fsync", "when": "True"}
CACHING = {"module": "lorabooth.training.caching", "owner": "", "name": "encode_examples", "when": "True"}
LAST = {"module": "lorabooth.training.going_on", "owner": "", "name": "deliver", "when": "True"}


def run_command(place: dict[str, str], sent: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run([*map(str, arguments)], Path.cwd(), first=DIES.format(**place, sent=sent))


def contents(out: Path) -> dict[str, bytes]:
    """All that must be the same in a run that was never stopped: the adapter, the previews, checkpoints."""
    kept = [out / "adapter.safetensors", *out.glob("samples/**/*"), *out.glob("checkpoints/**/*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept if path.is_file()}


@pytest.fixture
def previewed(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, bytes]]:
    """A recipe with previews, and what its uninterrupted run leaves."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    recipe = runs.recipe(tiny_sd, photos, "run.sample_count=1", "run.sample_every=2")
    path = tmp_path / "recipe.toml"
    path.write_text(dump(recipe), encoding="utf-8")
    whole = lorabooth.train(recipe, out=tmp_path / "whole")
    found = contents(whole.out)
    # What the loop remembers has the losses, and no clock.
    return path, found


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(PREVIEW, id="preview", marks=pytest.mark.slow),
        pytest.param(GRID, id="grid", marks=pytest.mark.slow),
        pytest.param(LAST, id="adapter"),
    ],
)
def test_killed_between_a_checkpoint_and_what_follows_it(
    previewed: tuple[Path, dict[str, bytes]], tmp_path: Path, place: dict[str, str]
) -> None:
    recipe, whole = previewed
    out = tmp_path / "run"
    command = ("train", recipe, "--out", out, "--quiet")
    done = run_command(place, "SIGKILL", *command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "samples/step-000004/grid.png" in whole
    if place is not LAST:
        assert not (out / "samples" / "step-000004" / "grid.png").exists()
    assert read_json(out / "run.json")["status"] == "running"
    resumed = lorabooth.train(lorabooth.Recipe.from_toml(out / "recipe.toml"))
    assert resumed.resumed_from == (6 if place is LAST else 4)
    assert contents(out) == whole
    assert not [path for path in out.rglob(".*") if not path.name.startswith(".lock")]


def test_killed_in_the_very_first_write_the_same_command_goes_on(
    previewed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    recipe, whole = previewed
    out = tmp_path / "run"
    command = ("train", recipe, "--out", out, "--quiet")
    in_recipe = {
        **RECIPE,
        "when": "os.path.exists(sys.argv[4]) and any('.recipe.toml' in n for n in os.listdir(sys.argv[4]))",
    }
    assert run_command(in_recipe, "SIGKILL", *command).returncode == -signal.SIGKILL
    left = [path.name for path in out.iterdir() if path.name.startswith(".recipe.toml.")]
    assert len(left) == 1, "killed elsewhere"
    assert not (out / "recipe.toml").exists()
    lorabooth.train(lorabooth.Recipe.from_toml(recipe), out=out)
    assert contents(out) == whole
    assert not (out / left[0]).exists()


@pytest.mark.parametrize("sent", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_an_interrupt_before_the_steps_says_how_to_go_on(
    previewed: tuple[Path, dict[str, bytes]], tmp_path: Path, sent: str
) -> None:
    recipe, whole = previewed
    out = tmp_path / "run"
    done = run_command(CACHING, sent, "train", recipe, "--out", out, "--quiet")
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("error: interrupted")
    assert f"lorabooth train {out / 'recipe.toml'}" in done.stderr
    assert read_json(out / "run.json")["status"] == "interrupted"
    lorabooth.train(lorabooth.Recipe.from_toml(out / "recipe.toml"))
    assert contents(out) == whole


def test_an_interrupt_before_the_first_write_says_so_too(
    previewed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    recipe, _ = previewed
    loading = {"module": "lorabooth.training.run", "owner": "", "name": "open_setting", "when": "True"}
    done = run_command(loading, "SIGINT", "train", recipe, "--out", tmp_path / "run", "--quiet")
    assert done.returncode == 130, done.stderr
    assert "same command again" in done.stderr
    assert not (tmp_path / "run").exists()
