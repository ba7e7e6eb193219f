"""Phases within phases, and what went wrong in which."""

from __future__ import annotations

import pytest

from lorabooth.training import clock as clocks
from lorabooth.training.clock import Clock


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock reads, set by hand."""
    now = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    return now


def test_a_phase_within_another_is_not_counted_twice(times: list[float]) -> None:
    clock = Clock()
    with clock.phase("training"):
        times[0] = 5
        with clock.phase("samples"):
            times[0] = 7
        times[0] = 8
        assert clock.so_far_s("training") == 6
    with clock.phase("samples"):
        times[0] = 18
    assert clock.seconds == {"training": 6, "samples": 12}
    assert list(clock.seconds) == ["training", "samples"]


def test_memory_is_that_of_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([99, 10, 30, 20, 5])
    monkeypatch.setattr(clocks, "_peak_bytes", lambda: next(peaks))
    clock = Clock()
    # Before: 99. Training until the samples: 10. The samples: 30. Training after them: 20.
    with clock.phase("training"), clock.phase("samples"):
        pass
    assert clock.peak_bytes == {"training": 20, "samples": 30}


def test_the_innermost_phase_that_failed_is_known() -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock.phase("training"), clock.phase("samples"):
        raise KeyError
    assert clock.failed == ["samples"]
