"""Memory that runs out in a run: what is told, and the run that goes on by itself.

There is no GPU here: a step raises torch's own exception, once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import lorabooth
from lorabooth.errors import OutOfMemoryError
from lorabooth.planning import after, fit
from lorabooth.planning.memory_plan import Case
from lorabooth.training import class_images, update
from lorabooth.training.ran_out import LastStep, Updating, watched_updates
from tests.planning.cases import arithmetic
from tests.training import runs
from tests.training.sessions import Listener

SHORT = ("prior.mode=none", "optim.steps=5", "adapter.rank=16")
SAID = "CUDA out of memory. Tried to allocate 20.00 MiB"


def fail_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Let these forward passes of training, counted from 1, run out of memory."""
    real, seen = update.micro_step, [0]

    def step(*args: Any, **options: Any) -> Any:
        seen[0] += not isinstance(args[2], FakeTensor)  # a prediction takes the same way
        if seen[0] in calls and not isinstance(args[2], FakeTensor):
            raise torch.OutOfMemoryError(f"{SAID}\nGPU 0 has a total capacity of ...")
        return real(*args, **options)

    monkeypatch.setattr(update, "micro_step", step)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts by arithmetic; the first test rehearses."""

    def case_of(*given: Any) -> Case:
        return replace(fit.case_of(*given), predict=arithmetic)

    monkeypatch.setattr(after, "case_of", case_of)


@pytest.fixture(scope="module")
def plain(tiny_sd: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> lorabooth.RunResult:
    return runs.train(tiny_sd, photos, tmp_path_factory.mktemp("plain") / "run", *SHORT)


def test_it_goes_on_with_the_next_technique(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    plain: lorabooth.RunResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 4)
    listener = Listener()
    recipe = runs.recipe(tiny_sd, photos, *SHORT, "memory.on_oom=step_down")
    done = lorabooth.train(recipe, out=tmp_path / "run", reporter=listener)
    assert done.resumed_from == 3  # between two checkpoints: what was reached is saved
    assert done.recipe.memory.checkpointing
    assert done.adapter.read_bytes() == plain.adapter.read_bytes()
    assert runs.metrics(tmp_path / "run") == runs.metrics(plain.out)
    told = [text for text in listener.warnings if "memory ran out" in text]
    assert len(told) == 1
    assert "checkpointing" in told[0]
    facts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    (step,) = facts["stepped_down"]
    assert (step["step"], step["phase"], step["technique"]) == (3, "training", "checkpointing")
    assert step["keys"]["memory.checkpointing"] is True
    assert facts["status"] == "finished"


@pytest.mark.usefixtures("quick")
def test_it_stops_with_the_numbers_and_what_to_try(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    plain: lorabooth.RunResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 4)
    with pytest.raises(OutOfMemoryError) as error:
        runs.train(tiny_sd, photos, tmp_path / "run", *SHORT)
    text = str(error.value)
    assert error.value.exit_code == 6
    assert text.startswith(f"memory ran out in training after step 3 of 5: {SAID}.")
    assert "were predicted" in text
    assert "--set memory.checkpointing=true" in text
    assert "memory.on_oom=step_down" in text
    # And that is what mends it.
    done = runs.train(tiny_sd, photos, tmp_path / "run", *SHORT, "memory.checkpointing=true")
    assert done.resumed_from == 3
    assert done.adapter.read_bytes() == plain.adapter.read_bytes()


@pytest.mark.usefixtures("quick")
def test_the_first_step_may_be_the_one(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    plain: lorabooth.RunResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 1)
    done = runs.train(tiny_sd, photos, tmp_path / "run", *SHORT, "memory.on_oom=step_down")
    assert done.resumed_from == 0
    assert done.adapter.read_bytes() == plain.adapter.read_bytes()
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_at_the_end_of_the_ladder_it_stops(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, *range(1, 9))
    with pytest.raises(OutOfMemoryError) as error:
        runs.train(tiny_sd, photos, tmp_path / "run", *SHORT, "memory.on_oom=step_down")
    assert "memory.checkpointing" not in str(error.value)


@pytest.mark.usefixtures("quick")
def test_class_images_that_do_not_fit_are_told_of(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))

    def no_room(*_: object, **__: object) -> None:
        raise OutOfMemoryError("one image does not fit", "smaller")

    monkeypatch.setattr(class_images, "ensure_class_images", no_room)
    with pytest.raises(OutOfMemoryError) as error:
        runs.train(tiny_sd, photos, tmp_path / "run")
    assert str(error.value).startswith("memory ran out in class images: one image does not fit.")
    # Groups of images have been halved by then.
    assert "images_at_once" not in str(error.value)
    assert 'smaller images.resolution or with prior.mode = "distill"' in str(error.value)


def test_a_torn_update_is_not_saved() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    saved: list[int] = []
    with watched_updates(optimizer) as updating:
        last = LastStep(saved.append, updating, steps=3)
        weight.grad = torch.ones(2)
        optimizer.step()
        assert not updating.now
        with pytest.raises(torch.OutOfMemoryError), last.kept():
            raise torch.OutOfMemoryError("in the forward pass")
        assert saved == [3]
        updating.now = True  # as the hook leaves it when the update itself fails
        with pytest.raises(torch.OutOfMemoryError), last.kept():
            raise torch.OutOfMemoryError("in the update")
        assert saved == [3]


def test_an_update_that_fails_is_seen() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with watched_updates(optimizer) as updating:
        weight.grad = torch.ones(2)

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("no room")

        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert updating.now
        handle.remove()
        optimizer.step()
        assert not updating.now


def test_other_errors_save_nothing() -> None:
    saved: list[int] = []
    with pytest.raises(RuntimeError), LastStep(saved.append, Updating(), steps=3).kept():
        raise RuntimeError("a defect")
    assert saved == []
