"""Plans: what is chosen, in which order, and that the forecast of a plan is that of its recipe."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorabooth.memory.facts import Device
from lorabooth.memory.meter import Usage
from lorabooth.planning.choose import Search, plan
from lorabooth.planning.forecast import PHASES, Forecast
from lorabooth.planning.keys import value_at, with_keys, written_keys
from lorabooth.planning.ladder import COUNTED, LADDER
from lorabooth.planning.memory_plan import MemoryPlan
from lorabooth.recipe import CHANGEABLE, Recipe, with_overrides
from tests.planning.cases import GIB, MIB, arithmetic, case, recipe

QUIET = ("prior.mode=none", "run.sample_count=0")


def of(base: Path, usable_mib: int, *overrides: str) -> MemoryPlan:
    return plan(recipe(base, *overrides), case(base, usable_mib * MIB, predict=arithmetic))


def names(made: MemoryPlan) -> list[str]:
    return [each.name for each in made.chosen]


def test_what_fits_is_left_alone(tiny_sd: Path) -> None:
    made = of(tiny_sd, 2700)
    assert made.fits
    assert made.chosen == ()
    assert made.passed_over == ()
    assert made.forecast.peak_bytes == made.plain.peak_bytes == 2700 * MIB


def test_class_images_cost_the_steps_nothing(tiny_sd: Path) -> None:
    made = of(tiny_sd, 1900)
    assert made.fits
    assert names(made) == ["4 images at once"]
    assert (made.chosen[0].phase, made.chosen[0].saved_bytes) == ("class images", 800 * MIB)
    assert not made.recipe.memory.checkpointing
    # One technique in place of the other, and all that was saved.
    less = of(tiny_sd, 1500, "run.sample_count=0", "memory.checkpointing=true")
    assert names(less)[0] == "2 images at once"
    assert less.chosen[0].saved_bytes == 1200 * MIB


def test_as_few_blocks_are_recomputed_as_fit(tiny_sd: Path) -> None:
    made = of(tiny_sd, 1500)
    assert made.fits
    (chosen,) = [each for each in made.chosen if COUNTED in each.keys]
    count = value_at(made.recipe, COUNTED)
    assert isinstance(count, int)
    assert chosen.keys == {"memory.checkpointing": True, COUNTED: count}
    assert chosen.name.startswith(f"checkpointing, {count} of ")
    here = case(tiny_sd, predict=arithmetic)
    fewer = here.forecast(with_keys(made.recipe, {COUNTED: count - 1}), ("training",)).peak_bytes
    assert made.forecast.phase("training").usage.peak_bytes <= 1500 * MIB < fewer
    assert chosen.saved_bytes == 1840 * MIB - made.forecast.phase("training").usage.peak_bytes


def test_what_turns_out_not_to_be_needed_is_given_back(tiny_sd: Path) -> None:
    made = of(tiny_sd, 700, *QUIET)
    # int8 leaves room for activations.
    assert made.fits
    assert names(made)[1:] == ["int8 base"]
    assert value_at(made.recipe, COUNTED) != "auto"


def test_what_a_later_technique_saves_as_well_is_given_back(tiny_sd: Path) -> None:
    """Class images fit when the base is streamed: then with more at once, and without coarser weights."""

    def predict(known: Recipe, *given: Any, phases: Collection[str] = PHASES) -> Forecast:
        told = arithmetic(known, *given, phases=phases)
        spared = 780 * MIB if known.memory.stream else 0
        phases_told = [
            replace(each, usage=Usage(each.usage.peak_bytes - spared, each.usage.at_peak))
            if each.name == "class images"
            else each
            for each in told.phases
        ]
        return replace(told, phases=tuple(phases_told))

    made = plan(recipe(tiny_sd), case(tiny_sd, 900 * MIB, predict=predict))
    assert made.fits
    assert names(made) == ["2 images at once", "checkpointing", "streamed base"]
    images = made.chosen[0]
    assert (images.phase, images.saved_bytes) == ("class images", 1200 * MIB)
    assert made.recipe.memory.images_at_once == 2
    assert (made.recipe.memory.base_precision, made.recipe.optim.name) == ("auto", "adamw")


def test_a_milder_technique_is_told_with_its_own_reason(tiny_sd: Path) -> None:
    written = recipe(tiny_sd, *QUIET, "memory.checkpointing=true")
    search = Search.begin(written, case(tiny_sd, 600 * MIB, predict=arithmetic))
    nf4 = next(rung for rung in LADDER if rung.name == "NF4 base")
    assert search._take(nf4, ("training",))
    search._give_back(search.chosen[0])
    (chosen,) = search.chosen
    int8 = next(rung for rung in LADDER if rung.name == "int8 base")
    assert (chosen.name, chosen.keys, chosen.reason) == (int8.name, int8.keys, int8.reason)
    assert (chosen.phase, chosen.saved_bytes) == ("training", 400 * MIB)
    assert search.recipe.memory.base_precision == "int8"


def test_techniques_are_in_the_ladders_order(tiny_sd: Path) -> None:
    made = of(tiny_sd, 510, *QUIET)
    assert made.fits
    assert [name.split(",")[0] for name in names(made)] == [
        "VAE tiling",
        "checkpointing",
        "8-bit optimizer",
        "int8 base",
    ]
    assert all(each.saved_bytes > 0 and each.reason for each in made.chosen)
    assert {each.name: each.why for each in made.passed_over} == {
        "VAE slicing": "saves nothing worth it in caching",
        "bf16": "on a GPU it is the default",
    }


def test_where_the_ladder_is_too_short_it_is_not_climbed(tiny_sd: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def predict(*given: Any, phases: Collection[str] = PHASES) -> Forecast:
        asked.append(tuple(phases))
        return arithmetic(*given, phases=phases)

    made = plan(recipe(tiny_sd), case(tiny_sd, 50 * MIB, predict=predict))
    assert not made.fits
    assert len(asked) <= 5
    (everything,) = made.chosen
    assert everything.name.startswith(
        "one part at a time + 1 image at once + VAE slicing + VAE tiling + checkpointing + "
    )
    assert everything.name.endswith(" + NF4 base + checkpoint offload + streamed base")
    assert everything.saved_bytes == 1400 * MIB
    assert made.recipe.memory.base_precision == "nf4"
    assert made.recipe.memory.stream


def test_what_would_fit_is_the_largest_picture(tiny_sd: Path) -> None:
    made = of(tiny_sd, 1230)
    assert not made.fits
    fitting = {each.options: each for each in made.would_fit if each.fits}
    assert fitting["--set images.resolution=48"].change == "at 48 px"
    assert "--set prior.mode=distill" in fitting
    assert all(each.peak_bytes <= 1230 * MIB for each in fitting.values())
    here = case(tiny_sd, predict=arithmetic)
    assert here.forecast(with_keys(made.recipe, {"images.resolution": 56})).peak_bytes > 1230 * MIB
    nothing = of(tiny_sd, 50)
    assert [(each.change, each.fits) for each in nothing.would_fit] == [("at 32 px", False)]


def test_what_the_recipe_gives_is_kept(tiny_sd: Path) -> None:
    made = of(tiny_sd, 1815, *QUIET, "memory.checkpointing=false")
    assert made.fits
    assert names(made) == ["8-bit optimizer"]
    assert made.passed_over[0].why == "the recipe gives memory.checkpointing"
    made = of(tiny_sd, 900, *QUIET, "memory.base_precision=bf16", "optim.name=adamw")
    assert made.fits
    told = {each.name: each.why for each in made.passed_over}
    assert told["8-bit optimizer"] == "the recipe gives optim.name"
    assert told["int8 base"] == told["NF4 base"] == "the recipe gives memory.base_precision"
    assert made.recipe.memory.base_precision == "bf16"
    assert names(made)[-1] == "checkpoint offload"


def test_what_the_device_cannot_do_is_passed_over(tiny_sd: Path) -> None:
    def problems(wanted: Recipe) -> list[str]:
        return ["bitsandbytes is missing"] if wanted.memory.base_precision == "nf4" else []

    here = case(tiny_sd, 505 * MIB, predict=arithmetic, problems=problems)
    made = plan(recipe(tiny_sd, *QUIET), here)
    assert made.fits
    assert names(made)[-2:] == ["int8 base", "checkpoint offload"]
    assert {each.name: each.why for each in made.passed_over}["NF4 base"] == "bitsandbytes is missing"


def test_phases_that_fit_are_not_forecast_again(tiny_sd: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def predict(*given: Any, phases: Collection[str] = PHASES) -> Forecast:
        asked.append(tuple(phases))
        return arithmetic(*given, phases=phases)

    made = plan(recipe(tiny_sd, "prior.mode=none"), case(tiny_sd, 1500 * MIB, predict=predict))
    assert made.fits
    assert asked[0] == PHASES
    assert {phases for phases in asked if "training" in phases} == {
        PHASES,
        ("training", "previews"),
        ("training",),
    }
    assert not any("caching" in phases for phases in asked[1:])


def test_auto_is_nothing_that_was_given(tiny_sd: Path) -> None:
    written = recipe(tiny_sd, "memory.base_precision=auto", "memory.attention=sdpa", "optim.name=adamw")
    assert written_keys(written) == {"memory.attention", "optim.name"}
    again = with_overrides(written, ["memory.fit=true"])
    assert written_keys(again) == {"memory.attention", "optim.name", "memory.fit"}


def test_every_rung_sets_keys_that_there_are() -> None:
    for rung in LADDER:
        assert set(rung.phases) <= set(PHASES)
        for key, value in rung.keys.items():
            assert value_at(with_keys(Recipe(), {key: value}), key) == value
            assert value_at(Recipe(), key) != value or key == COUNTED


def test_what_a_run_may_take_up_midway_is_what_it_may_go_on_with() -> None:
    for rung in LADDER:
        assert rung.exact is (rung.keys.keys() <= CHANGEABLE), rung.name


def test_a_plan_is_json(tiny_sd: Path) -> None:
    made = of(tiny_sd, 1230)
    read = json.loads(json.dumps(made.as_json()))
    assert read["fits"] is False
    assert [each["name"] for each in read["chosen"]] == names(made)
    assert read["planned"]["peak_bytes"] == made.forecast.peak_bytes
    assert read["would_fit"][0]["options"].startswith("--set images.resolution=")


@pytest.mark.slow
def test_the_forecast_of_a_plan_is_that_of_its_recipe(tiny_sd: Path) -> None:
    """Rehearsed, not by arithmetic: no phase changed that was not asked for again."""
    cpu = Device("cpu", "a CPU", GIB, GIB, "", False)
    here = case(tiny_sd, device=cpu)
    written = recipe(tiny_sd, "run.sample_count=0", "prior.mode=none")
    peaks = {phase.name: phase.usage.peak_bytes for phase in here.forecast(written).phases}
    made = plan(written, case(tiny_sd, peaks["training"] - 1, device=cpu))
    assert made.fits
    assert names(made)[0].startswith("checkpointing, 1 of ")
    assert made.forecast.phases == here.forecast(made.recipe).phases
