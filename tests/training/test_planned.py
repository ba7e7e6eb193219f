"""Predictions beside measurements."""

from __future__ import annotations

import torch

from lorabooth.training.clock import Clock
from lorabooth.training.planned import Planned, measured_by_phase, memory_facts, miss_texts, misses

PREDICTED = {"class images": 1000, "training": 1000, "previews": 1000, "saving": 1000}


def clock(**peaks: int) -> Clock:
    return Clock(peak_bytes={name.replace("_", " "): peak for name, peak in peaks.items()})


def test_a_runs_phases_are_those_of_a_forecast() -> None:
    found = measured_by_phase(clock(class_images=1, setting_up=7, training=5, samples=3, photos=9))
    assert found == {"class images": 1, "training": 7, "previews": 3}


def test_what_is_off_by_a_tenth_is_told() -> None:
    here = clock(training=1101, samples=899, checkpoints=800, class_images=0)
    wrong = misses(PREDICTED, measured_by_phase(here))
    # Class images may have been there already: less than was predicted is no miss.
    assert [miss.phase for miss in wrong] == ["training", "previews"]
    assert misses(PREDICTED, measured_by_phase(clock(training=1099, samples=901, class_images=1099))) == []
    texts = miss_texts(Planned(allocated_bytes=PREDICTED), here)
    assert "training took 0.00 GiB, 10% more than the 0.00 GiB that were predicted" in texts
    assert miss_texts(None, here) == ()


def test_facts_of_a_run() -> None:
    cpu = torch.device("cpu")
    planned = Planned({"fits": True}, PREDICTED, ({"step": 3},))
    facts = memory_facts(planned, clock(training=2000), cpu)
    assert facts["plan"]["measured"] == {"allocated_bytes": {"training": 2000}}
    assert facts["plan"]["missed"] == [{"phase": "training", "share": 1.0}]
    assert facts["stepped_down"] == [{"step": 3}]
    assert memory_facts(planned, Clock(), cpu)["plan"]["measured"]["process_bytes"] > 0
    assert memory_facts(None, Clock(), cpu) == {}
