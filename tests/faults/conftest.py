"""One undisturbed run and one parent of forked processes for all tests of kills."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults.harness import Bench, prepare, real
from tests.faults.nursery import Nursery


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The run that nobody kills, in a process as a user starts it; real processes."""
    return prepare(tmp_path_factory.mktemp("faults") / "bench", real)


@pytest.fixture(scope="session")
def forked(bench: Bench) -> Iterator[Bench]:
    """The same with processes that are forked, which saves their imports."""
    with Nursery() as nursery:
        yield replace(bench, start=nursery.start)


@pytest.fixture
def chance() -> random.Random:
    """The same moments in every run of the tests."""
    return random.Random(7)
