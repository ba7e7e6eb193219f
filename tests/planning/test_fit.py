"""`memory = "auto"`: planned before a run, the same when it goes on, and held against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorabooth
from lorabooth.errors import OutOfMemoryError, RecipeError
from lorabooth.memory.facts import Device
from lorabooth.planning import fit
from lorabooth.planning.budget import Budget
from lorabooth.planning.memory_plan import Case
from lorabooth.recipe import Recipe, dump, load, loads
from tests.planning.cases import MIB, arithmetic
from tests.training import runs
from tests.training.sessions import Listener

SHORT = ("optim.steps=3", "prior.mode=none")


def facts(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "run.json").read_text("utf-8"))
    return read


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device of 1500 MiB, where steps take 1840 MiB by arithmetic; the size can be changed."""
    usable = [1500 * MIB]

    def budget_for(device: Device, size: str = "auto") -> Budget:
        return Budget(usable[0], 0, "free now")

    def case_of(*given: Any) -> Case:
        return replace(real(*given), predict=arithmetic)

    real = fit.case_of
    monkeypatch.setattr(fit, "budget_for", budget_for)
    monkeypatch.setattr(fit, "case_of", case_of)
    return usable


def test_a_run_takes_what_was_planned_and_keeps_it(
    tiny_sd: Path, photos: Path, tmp_path: Path, small: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.recipe(tiny_sd, photos, *SHORT, "memory=auto", "adapter.rank=16")
    listener = Listener()
    done = lorabooth.train(recipe, out=tmp_path / "run", reporter=listener)
    assert done.recipe.memory.checkpointing
    assert any(line.startswith("memory: fits") for line in listener.said)
    own = load(tmp_path / "run" / "recipe.toml")
    assert own.memory.checkpointing
    assert not own.memory.fit
    plan = facts(tmp_path / "run")["plan"]
    assert "memory.checkpointing" in plan["chosen"][0]["keys"]
    assert plan["chosen"][0]["reason"]
    assert plan["chosen"][0]["saved_bytes"] > 0
    assert {phase["name"] for phase in plan["planned"]["phases"]} == {"caching", "training", "saving"}
    assert plan["measured"]["process_bytes"] > 1 << 27
    assert plan["missed"] == []
    assert "memory plan" in (tmp_path / "run" / "report.html").read_text("utf-8")
    # There is room now: the run that has begun keeps its techniques, and goes on with more steps.
    small[0] = 1 << 40
    again = lorabooth.train(
        runs.recipe(tiny_sd, photos, "optim.steps=4", "prior.mode=none", "memory=auto", "adapter.rank=16"),
        out=tmp_path / "run",
        reporter=listener,
    )
    assert again.resumed_from == 3
    assert again.recipe.memory == done.recipe.memory
    assert facts(tmp_path / "run")["plan"]["chosen"] == plan["chosen"]


def test_the_techniques_change_no_byte_of_the_result(
    tiny_sd: Path, photos: Path, tmp_path: Path, small: list[int]
) -> None:
    plain = runs.train(tiny_sd, photos, tmp_path / "plain", *SHORT, "adapter.rank=16")
    planned = runs.train(tiny_sd, photos, tmp_path / "auto", *SHORT, "memory=auto", "adapter.rank=16")
    assert planned.recipe.memory.checkpointing
    assert planned.adapter.read_bytes() == plain.adapter.read_bytes()


@pytest.mark.slow
def test_nothing_is_begun_where_nothing_fits(
    tiny_sd: Path, photos: Path, tmp_path: Path, small: list[int]
) -> None:
    small[0] = 50 * MIB
    with pytest.raises(OutOfMemoryError) as error:
        runs.train(tiny_sd, photos, tmp_path / "run", *SHORT, "memory=auto")
    assert error.value.exit_code == 6
    assert "can be used" in error.value.what
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_techniques(
    tiny_sd: Path, photos: Path, tmp_path: Path, small: list[int]
) -> None:
    recipe = runs.recipe(tiny_sd, photos, *SHORT, "memory=auto", "adapter.rank=16")
    assert lorabooth.train(recipe, out=tmp_path / "run", dry_run=True).recipe.memory.checkpointing
    assert not (tmp_path / "run").exists()


def test_the_short_form_is_the_section() -> None:
    text = '{}\n[[subjects]]\nimages = "a"\nnoun = "dog"\n'
    short = loads(text.format('memory = "auto"'), "r.toml")
    long = loads(text.format("[memory]\nfit = true"), "r.toml")
    assert short == long
    assert short.memory.fit
    assert loads(dump(short), "r.toml") == short
    assert loads(text.format('memory = "auto"'), "r.toml", ["memory.precision=bf16"]).memory.fit
    assert Recipe.model_validate({"memory": "auto"}).memory.fit


def test_a_run_is_rehearsed_where_it_goes(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    done = runs.train(tiny_sd, photos, tmp_path / "run", *SHORT, "memory=auto")
    plan = facts(tmp_path / "run")["plan"]
    assert plan["fits"]
    assert plan["chosen"] == []
    assert plan["planned"]["device"]["kind"] == "cpu"
    assert not done.recipe.memory.checkpointing


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        ('memory = "automatic"', "must be a section"),
        ('[memory]\nfit = true\nbudget = "8"', 'memory.budget: "8" is no size'),
        ('[memory]\nbudget = "8GiB"', "memory.budget: is only used with memory.fit = true"),
        ('[memory]\non_oom = "retry"', '"stop" or "step_down"'),
    ],
)
def test_wrong_memory_keys_are_one_message(memory: str, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        loads(f'{memory}\n[[subjects]]\nimages = "a"\nnoun = "dog"\n', "r.toml")
    assert told in str(error.value)
