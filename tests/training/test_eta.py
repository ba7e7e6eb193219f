"""One line about how long it will take, after a few steps."""

from __future__ import annotations

from lorabooth.progress import duration
from lorabooth.training.eta import MEASURED_STEPS, SETTLING_STEPS, Eta
from tests.training.sessions import Listener


def estimate(once_s: dict[str, float], *, stop: int = 1000, start: int = 0) -> tuple[Eta, list[str]]:
    listener = Listener()
    eta = Eta(stop, 200, 100, True, once_s, listener)
    for done in range(start + 1, start + 50):
        eta(done, 60.0 if done <= start + SETTLING_STEPS else 0.5)
    return eta, listener.said


def test_it_is_told_once_and_without_the_slow_first_steps() -> None:
    eta, said = estimate({"samples": 20.0, "checkpoints": 1.0})
    seen = SETTLING_STEPS + MEASURED_STEPS
    # Previews at 100, 200 ... 900 and the end; checkpoints at 200 ... 800 and the end.
    assert said == ["about 12 min to go: training 8 min, samples 3 min, checkpoints 5 s"]
    assert eta.estimated_s["samples"] == 20.0 * 10
    assert eta.estimated_s["checkpoints"] == 1.0 * 5
    passed = 60.0 * SETTLING_STEPS + 0.5 * MEASURED_STEPS
    assert eta.estimated_s["training"] == 0.5 * (1000 - seen) + passed


def test_what_was_not_measured_is_said_and_left_out() -> None:
    eta, said = estimate({}, start=900)
    assert said == ["about 45 s to go: training 45 s (samples and checkpoints not measured yet)"]
    assert set(eta.estimated_s) == {"training"}


def test_measuring_checkpoints_is_not_known_before() -> None:
    listener = Listener()
    eta = Eta(1000, 200, 0, False, {}, listener, measured=True)
    for done in range(1, 50):
        eta(done, 0.5)
    assert listener.said == ["about 8 min to go: training 8 min (checkpoints and selection not measured yet)"]


def test_a_run_of_a_few_steps_has_no_estimate() -> None:
    listener = Listener()
    eta = Eta(5, 0, 0, False, {}, listener)
    for done in range(1, 6):
        eta(done, 1.0)
    assert not listener.said
    assert not eta.estimated_s


def test_durations() -> None:
    assert [duration(s) for s in (0.1, 40, 89.4, 90, 540, 3600, 7800, 7200)] == [
        "1 s",
        "40 s",
        "89 s",
        "2 min",
        "9 min",
        "60 min",
        "2 h 10 min",
        "2 h",
    ]
