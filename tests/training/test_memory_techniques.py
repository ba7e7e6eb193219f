"""Whole runs with each memory technique: they draw, save what fits the plain base, and go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorabooth
from lorabooth.adapters import file
from lorabooth.errors import RecipeError
from lorabooth.memory import in_turn
from tests.training import runs

EXACT = {
    "some blocks, offloaded": (
        "memory.checkpointing=true",
        "memory.checkpoint_blocks=3",
        "memory.checkpoint_offload=true",
    ),
    "streamed": ("memory.checkpointing=true", "memory.stream=true", "memory.vae_slicing=true"),
}
FEW_BITS = {
    "int8": ("memory.base_precision=int8",),
    "nf4": ("memory.base_precision=nf4", "memory.checkpointing=true"),
    "fp8, streamed": ("memory.base_precision=fp8", "memory.checkpointing=true", "memory.stream=true"),
}
# A streamed base draws class images in its own precision, on every CPU.
QUICK = ("optim.steps=4", "prior.count=2", "model.dtype=fp32")


@pytest.fixture(scope="module")
def plain(tiny_sd: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> lorabooth.RunResult:
    return runs.train(tiny_sd, photos, tmp_path_factory.mktemp("plain") / "run", *QUICK)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_technique_gives_the_plain_runs_adapter_through_an_interruption(
    tiny_sd: Path, photos: Path, tmp_path: Path, plain: lorabooth.RunResult, name: str
) -> None:
    overrides = (*QUICK, *EXACT[name])
    runs.train(tiny_sd, photos, tmp_path / "run", *overrides, "optim.steps=2")
    resumed = runs.train(tiny_sd, photos, tmp_path / "run", *overrides, "run.sample_count=1")
    assert resumed.resumed_from == 2
    assert runs.metrics(tmp_path / "run") == runs.metrics(plain.adapter.parent)
    ours, theirs = file.read(resumed.adapter).tensors, file.read(plain.adapter).tensors
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (tmp_path / "run" / "samples" / "step-000004" / "grid.png").is_file()


def test_one_part_at_a_time_gives_the_plain_runs_adapter(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    plain: lorabooth.RunResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This CPU plays a card: in class images and samples, denoiser and VAE go and come."""
    moved: list[int] = []
    come = in_turn._Waiting.come

    def coming(waiting: Any) -> None:
        moved.append(sum(tensor.numel() for tensor in waiting._tensors))
        come(waiting)

    monkeypatch.setattr(in_turn, "has_own_memory", lambda device: True)
    monkeypatch.setattr(in_turn._Waiting, "come", coming)
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    run = runs.train(tiny_sd, photos, tmp_path / "run", *QUICK, "memory.in_turn=true", "run.sample_count=1")
    ours, theirs = file.read(run.adapter).tensors, file.read(plain.adapter).tensors
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (tmp_path / "run" / "samples" / "step-000004" / "grid.png").is_file()
    denoisers = [numel for numel in moved if numel != min(moved)]
    assert len(denoisers) == 5  # a group of class images, samples of two prompts before and after training
    assert moved.count(min(moved)) >= 5


@pytest.mark.parametrize("name", FEW_BITS)
def test_a_run_on_few_bits_goes_on_as_if_never_interrupted(
    tiny_sd: Path, photos: Path, tmp_path: Path, plain: lorabooth.RunResult, name: str
) -> None:
    overrides = (*QUICK, *FEW_BITS[name])
    straight = runs.train(tiny_sd, photos, tmp_path / "straight", *overrides)
    runs.train(tiny_sd, photos, tmp_path / "run", *overrides, "optim.steps=2")
    resumed = runs.train(tiny_sd, photos, tmp_path / "run", *overrides, "run.sample_count=1")
    assert resumed.resumed_from == 2
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "straight")
    assert resumed.adapter.read_bytes() == straight.adapter.read_bytes()
    assert (tmp_path / "run" / "samples" / "step-000004" / "grid.png").is_file()
    assert '\nprecision = "bf16"' in (tmp_path / "run" / "recipe.toml").read_text("utf-8")

    ours, theirs = file.read(resumed.adapter).tensors, file.read(plain.adapter).tensors
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in theirs.items()
    }
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert not all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_this_machine_or_base_cannot_do_stops_before_anything_is_drawn(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    for override, told in (
        (("memory.checkpointing=true", "memory.checkpoint_blocks=400"), "this base has"),
        (("memory.attention=xformers",), "xformers"),
    ):
        with pytest.raises(RecipeError, match=told):
            runs.train(tiny_sd, photos, tmp_path / "run", *override)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()
