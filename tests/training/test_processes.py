"""Two processes on the CPU (gloo), started as a user would: the steps of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabooth.recipe import dump
from tests.training import referees, runs

FIGURES = {"loss", "loss_instance", "loss_prior", "grad_norm"}
DIVIDED = {
    "class images": (),
    "class images in every second step": ("prior.every=2",),
    "distilled in every third step": ("prior.mode=distill", "prior.every=3"),
    "a pool": ("prior.mode=distill", "prior.pool=2"),
    "a pool in every second step": ("prior.mode=distill", "prior.pool=2", "prior.every=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", DIVIDED.values(), ids=DIVIDED)
def test_two_processes_are_one_with_twice_the_batch(
    overrides: tuple[str, ...], tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(runs.recipe(tiny_sd, photos, *overrides)), encoding="utf-8")
    spoken = _train(recipe, tmp_path / "two", processes=2)
    assert len([line for line in spoken if line.startswith("adapter ")]) == 1, "one process speaks"
    _train(recipe, tmp_path / "one", "--set", "optim.batch_size=2")
    two, one = runs.metrics(tmp_path / "two"), runs.metrics(tmp_path / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        # Steps without class examples have no "loss_prior".
        assert FIGURES & a.keys() == FIGURES & b.keys()
        for key in FIGURES & a.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    _assert_one_adapter(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_pool_is_that_of_one_process(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """Tuples are found by what they hold: what two processes have computed, one finds, and computes none."""
    overrides = ("prior.mode=distill", "prior.pool=2", "optim.steps=3")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(runs.recipe(tiny_sd, photos, *overrides)), encoding="utf-8")
    _train(recipe, tmp_path / "two", processes=2)
    _train(recipe, tmp_path / "one", "--set", "optim.batch_size=2")
    two, one = (json.loads((tmp_path / name / "run.json").read_text("utf-8")) for name in ("two", "one"))
    assert two["pool"]["tuples"] == two["pool"]["computed"] == one["pool"]["tuples"] > 0
    assert one["pool"]["computed"] == 0


def _train(recipe: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    """Train as a user would on a CPU, in one cache; the lines that were spoken."""
    env = {**os.environ, "LORABOOTH_CACHE": str(out.parent / "cache"), "OMP_NUM_THREADS": "1"}
    env["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` does
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    train = ["-m", "lorabooth", "train", str(recipe), "--out", str(out), "--quiet", *more]
    done = subprocess.run([*launch, *train], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _assert_one_adapter(a: Path, b: Path) -> None:
    """Equal but for the order of sums, which AdamW makes more of where a gradient is next to nothing."""
    first, second = (load_file(folder / "adapter.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        apart = torch.linalg.vector_norm(first[name].float() - tensor.float())
        assert apart <= 1e-2 * torch.linalg.vector_norm(tensor.float()), name


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
