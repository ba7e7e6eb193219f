"""Two processes on the CPU (gloo), started as a user would: the steps of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth.recipe import dump
from tests.training import referees, runs


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LORABOOTH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    env["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(runs.recipe(tiny_sd, photos)), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = ["-m", "lorabooth", "train", str(recipe), "--out", str(tmp_path / "two"), "--quiet"]
    done = subprocess.run([*launch, *train], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spoken = [line for line in done.stdout.splitlines() if line.startswith("adapter ")]
    assert len(spoken) == 1, "one process speaks"
    one = [
        sys.executable,
        *train[:-3],
        "--out",
        str(tmp_path / "one"),
        "--quiet",
        "--set",
        "optim.batch_size=2",
    ]
    done = subprocess.run(one, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two, one_ = runs.metrics(tmp_path / "two"), runs.metrics(tmp_path / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one_]
    for a, b in zip(two, one_, strict=True):
        for key in ("loss", "loss_instance", "loss_prior", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)


@pytest.mark.slow
def test_two_processes_choose_and_stop_together(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LORABOOTH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    env["ACCELERATE_USE_CPU"] = "true"
    measured = referees.real(tmp_path / "backbones")
    # CLIP-T of a small CLIP with random weights: whatever it says, one checkpoint after the best is worse.
    chosen = ("run.select=prompt", "run.stop_early=1", "run.checkpoint_every=1", "optim.steps=12")
    validated = ("run.validation_every=2", "run.validation_photos=1")
    recipe = tmp_path / "recipe.toml"
    wanted = runs.recipe(tiny_sd, photos, "prior.mode=none", *measured, *chosen, *validated)
    recipe.write_text(dump(wanted), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train = ["-m", "lorabooth", "train", str(recipe), "--out", str(tmp_path / "two"), "--quiet"]
    done = subprocess.run(
        [*launch, *train], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "two" / "run.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (tmp_path / "two" / "selection.jsonl").read_text().splitlines()]
    marks = [line["clip_t"] for line in lines]
    assert told["status"] == "finished"
    assert told["selection"]["chosen"] == marks.index(max(marks)) + 1
    assert len(runs.metrics(tmp_path / "two")) == len(lines)
    fell = [n for n in range(1, len(marks)) if marks[n] < max(marks[:n])]
    assert len(lines) == (fell[0] + 1 if fell else 12), "all stop at the first that is worse"
    assert ["val_loss" in line for line in runs.metrics(tmp_path / "two")][:2] == [False, True]
