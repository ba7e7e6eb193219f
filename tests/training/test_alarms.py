"""Alarms speak when they should, say it once in a run's life, and hold their tongue otherwise."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from lorabooth.progress import Silent
from lorabooth.training.alarms import (
    DEAD_AFTER_STEPS,
    NO_GRADIENT_STEPS,
    SPIKE_RATIO,
    SPILL_RATIO,
    Alarms,
    StepFigures,
    Watch,
)


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def figures(loss: float = 0.5, **fields: Any) -> StepFigures:
    return StepFigures(line={"loss": loss}, **{"grad_norms": {"denoiser": 1.0}, **fields})


def told(alarms: Alarms, *steps: StepFigures, first: int = 1, seconds: float = 1.0) -> list[str]:
    listener = Listener()
    for step, one in enumerate(steps, start=first):
        alarms.judge(one, listener, step=step, seconds=seconds)
    return listener.warnings


def again(alarms: Alarms) -> Alarms:
    """As they come back from a checkpoint."""
    return Alarms(json.loads(json.dumps(alarms.state_dict(), allow_nan=False)))


def test_a_run_as_it_should_be_is_silent() -> None:
    draw = random.Random(0)
    alarms = Alarms()
    # A loss that differs a hundredfold by timestep, and a machine that sometimes takes twice as long.
    for step in range(1, 1001):
        one = figures(10 ** draw.uniform(-2, 0), grad_norms={"denoiser": draw.uniform(1e-6, 10)})
        assert told(alarms, one, first=step, seconds=draw.uniform(1, 2)) == []
    assert alarms.warnings == []


def test_dead_is_said_of_the_component_that_is() -> None:
    alarms = Alarms()
    asked = []
    for step in range(1, DEAD_AFTER_STEPS + 3):
        asked.append(alarms.want_up_norms)
        ups = {"denoiser": 0.3, "text_encoder": 0.0} if alarms.want_up_norms else {}
        told(alarms, figures(up_norms=ups), first=step)
    assert asked.index(True) == DEAD_AFTER_STEPS
    assert asked.count(True) == 1, "the weights were looked at more than once"
    assert len(alarms.warnings) == 1
    assert "every lora_B of text_encoder is still zero" in alarms.warnings[0]
    assert "denoiser" not in alarms.warnings[0]


def test_dead_counts_applied_steps_and_those_before_an_interruption() -> None:
    alarms = Alarms()
    told(alarms, *[figures(overflow=True)] * 15, *[figures()] * (DEAD_AFTER_STEPS - 1))
    assert not alarms.want_up_norms, "steps that were skipped cannot have moved lora_B"
    alarms = again(alarms)
    told(alarms, figures())
    assert alarms.want_up_norms


def test_a_component_without_gradient_is_named() -> None:
    alarms = Alarms()
    cut = figures(grad_norms={"denoiser": 1.0, "text_encoder": 0.0})
    assert told(alarms, *[cut] * (NO_GRADIENT_STEPS - 1), figures(grad_norms={"text_encoder": 1e-30})) == []
    assert told(alarms, *[cut] * (NO_GRADIENT_STEPS - 1)) == []
    alarms = again(alarms)
    assert told(alarms, figures(math.nan, wrong=["the loss"], grad_norms={"text_encoder": math.nan})) != []
    heard = told(alarms, cut, cut)
    assert len(heard) == 1
    assert "no gradient reached text_encoder in 5 steps" in heard[0]


def test_a_spike_is_far_above_all_before_it() -> None:
    alarms = Alarms()
    assert told(alarms, figures(100.0), *[figures(1.0)] * 100) == [], "the first loss is no measure"
    assert told(alarms, figures(SPIKE_RATIO * 0.99)) == []
    heard = told(again(alarms), figures(SPIKE_RATIO * 3), first=102)
    assert len(heard) == 1
    assert "the loss of step 102 is 9" in heard[0]
    assert "optim.lr" in heard[0]


def test_no_spike_is_seen_before_there_is_a_measure_nor_in_what_is_not_finite() -> None:
    alarms = Alarms()
    assert told(alarms, *[figures(1.0)] * 49, figures(1000.0)) == []
    alarms = Alarms()
    heard = told(alarms, *[figures(1.0)] * 60, figures(math.inf, wrong=["the loss"]), figures(1.0))
    assert [message for message in heard if "over three times" in message] == []
    assert math.inf not in alarms.state_dict()["losses"]


def test_a_slow_step_is_five_times_the_median() -> None:
    alarms = Alarms()
    assert told(alarms, figures(), seconds=60.0) == [], "the first step compiles"
    assert told(alarms, *[figures()] * 20, first=2) == []
    assert told(alarms, figures(), first=22, seconds=SPILL_RATIO - 0.01) == []
    heard = told(alarms, figures(), first=23, seconds=SPILL_RATIO + 0.1)
    assert heard == ["step 23 took 5.1 s, over five times the median of 1 s: is memory spilling?"]
    assert told(again(alarms), *[figures()] * 20) == []


def test_a_resumed_process_measures_its_own_times() -> None:
    alarms = Alarms()
    told(alarms, *[figures()] * 30)
    assert told(again(alarms), *[figures()] * 30, seconds=10.0) == []


def test_a_skipped_step_is_said_once_with_its_examples() -> None:
    alarms = Alarms()
    bad = figures(math.nan, wrong=["the subject's loss"], record_ids=["02.jpg", "02.jpg"])
    heard = told(alarms, bad, bad, first=7)
    assert len(heard) == 1
    assert "step 7 was skipped: the subject's loss not finite (examples: 02.jpg)" in heard[0]
    assert told(Alarms(), figures(overflow=True)) == [], "a loss scale that is found is no news"


@pytest.mark.parametrize("kind", ["spike", "slow", "dead", "gradient", "skipped"])
def test_each_is_said_once_over_an_interruption(kind: str) -> None:
    alarms = Alarms()
    told(alarms, *[figures(1.0)] * 60)
    bad = {
        "spike": figures(50.0),
        "slow": figures(),
        "dead": figures(up_norms={"denoiser": 0.0}),
        "gradient": figures(grad_norms={"denoiser": 0.0}),
        "skipped": figures(math.nan, wrong=["the loss"]),
    }[kind]
    seconds = 50.0 if kind == "slow" else 1.0
    first = told(alarms, *[bad] * NO_GRADIENT_STEPS, seconds=seconds)
    assert len(first) == 1
    resumed = again(alarms)
    told(resumed, *[figures(1.0)] * 120)
    worse = figures(5000.0) if kind == "spike" else bad
    assert told(resumed, *[worse] * NO_GRADIENT_STEPS, seconds=seconds) == []
    assert resumed.warnings == first, "run.json loses what was told before"


def test_a_watch_comes_back_from_a_checkpoint_and_from_one_that_has_none() -> None:
    watch = Watch()
    for step in (1, 2, 3):
        watch.note(
            figures(math.nan, wrong=["the loss"], record_ids=["03.jpg"]),
            Silent(),
            step=step,
            seconds=1.0,
            diagnosis="fp32 on cpu",
        )
    state = json.loads(json.dumps(watch.state_dict(), allow_nan=False))
    resumed = Watch.resumed(state)
    assert resumed.guard.in_a_row == 3
    assert resumed.warnings == watch.warnings != []
    assert resumed.state_dict() == state
    assert Watch.resumed({}).state_dict() == Watch().state_dict()
