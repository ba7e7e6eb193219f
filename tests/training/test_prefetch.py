"""Batches made on a thread: in order, ahead by so many, the same as without, and gone when the loop ends."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from lorabooth.training.loop import Session
from lorabooth.training.prefetch import ahead, make
from tests.training import sessions


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_steps_come_in_order_and_only_so_many_are_made_ahead() -> None:
    made: list[int] = []

    def note(step: int) -> int:
        made.append(step)
        return step * step

    with ahead(note, range(3, 10), depth=2) as give:
        for step in range(3, 10):
            assert give() == step * step
            time.sleep(0.002)
            assert made[-1] <= step + 2
            assert len(made) <= step - 3 + 1 + 2
    assert made == list(range(3, 10))
    assert not _threads()


def test_the_next_step_is_made_while_this_one_runs() -> None:
    began = threading.Event()

    def note(step: int) -> int:
        if step == 1:
            began.set()
        return step

    with ahead(note, range(5)) as give:
        assert give() == 0
        assert began.wait(10), "step 1 was not begun before it was asked for"


def test_what_goes_wrong_is_raised_where_its_step_is_asked_for() -> None:
    def broken(step: int) -> int:
        if step == 2:
            raise OSError("gone")
        return step

    with ahead(broken, range(5)) as give:
        assert [give(), give()] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            give()
    assert not _threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_early_ends_the_thread(error: type[BaseException]) -> None:
    made: list[int] = []

    def slow(step: int) -> int:
        time.sleep(0.01)
        made.append(step)
        return step

    with pytest.raises(error), ahead(slow, range(1000)) as give:  # noqa: PT012 - what ends is the block
        give()
        raise error
    assert not _threads()
    assert len(made) <= 3


def test_the_thread_computes_alone_and_has_no_team_that_slows_the_step() -> None:
    """More OpenMP threads than cores wait asleep, all of them, between any two operations."""

    def busy(step: int) -> tuple[int, int]:
        return int(torch.full((2_000_000,), step).add_(1).max()), torch.get_num_threads()

    number = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        busy(0)
        before = psutil.Process().num_threads()
        with ahead(busy, range(3)) as give:
            assert [give() for _ in range(3)] == [(1, 1), (2, 1), (3, 1)]
            assert psutil.Process().num_threads() == before + 1
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as others:
            assert others.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(number)


def test_an_empty_range_makes_nothing() -> None:
    with ahead(lambda step: step, range(0)):
        pass
    assert not _threads()


@pytest.mark.parametrize("overrides", [(), ("optim.accumulate=2", "images.buckets=true")])
def test_what_is_made_on_the_thread_is_what_is_made_without(
    tiny_sd: Path, photos: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    session = sessions.session(tiny_sd, photos, tmp_path / "cache", *overrides)

    def at(step: int) -> Any:
        return make(session.batches, session.step_parts.path, session.seed, step, pin=False)

    torch.manual_seed(0)
    with ahead(at, range(4)) as give:
        threaded = [give() for _ in range(4)]
        torch.rand(3)  # the global state is nobody's business
    for step in reversed(range(4)):
        _assert_equal(threaded[step], at(step), session)


def _assert_equal(some: Any, others: Any, session: Session) -> None:
    assert len(some) == len(others) == session.section.accumulate
    for turn, other_turn in zip(some, others, strict=True):
        for one, other in zip(turn, other_turn, strict=True):
            assert one.class_rows == other.class_rows
            assert one.batch.record_ids == other.batch.record_ids
            for a, b in (
                (one.eps, other.eps),
                (one.level, other.level),
                (one.batch.latents, other.batch.latents),
                *((one.batch.cond[name], other.batch.cond[name]) for name in one.batch.cond),
            ):
                assert torch.equal(a, b)
