"""The harness sees what it is there to see: torn files, lost checkpoints, another end, deaths at a change."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.faults import child, harness
from tests.faults.moments import NEVER, Ended, Moment, chains, one_of_each, places, site, watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; needs fork and SIGKILL")


def in_child(root: Path, work: Callable[[], object], moment: Moment = NEVER) -> Ended:
    """Do something in a forked process that is watched."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        child.Trap(tell, moment.die_at, [str(root)]).install()
        work()
        os._exit(0)
    os.close(tell)
    code, changes = watch(pid, told, moment)
    return Ended(code, tuple(changes))


def save(root: Path) -> None:
    """Every way of changing a disk that the trap knows."""
    with (root / "plain.tmp").open("wb") as file:
        file.write(b"0123456789")
        file.flush()
        os.fsync(file.fileno())
    (root / "plain.tmp").replace(root / "plain")
    (root / "text").write_text("0123456789", encoding="utf-8")
    descriptor = os.open(root / "raw", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"0123456789")
    os.close(descriptor)
    (root / "folder").mkdir()
    (root / "folder").rmdir()
    (root / "raw").unlink()


CHANGES = ("open plain.tmp", "write plain.tmp", "fsync plain.tmp", "rename plain", "open text", "write text")
LATER = ("open raw", "write raw", "mkdir folder", "rmdir folder", "remove raw")


def test_every_change_is_seen_and_those_elsewhere_are_not(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    def work() -> None:
        save(tmp_path / "in")
        save(tmp_path)

    assert in_child(tmp_path / "in", work) == Ended(0, CHANGES + LATER)


def test_dies_at_the_change_that_it_is_told(tmp_path: Path) -> None:
    for number, change in enumerate(CHANGES + LATER, start=1):
        place = tmp_path / str(number)
        place.mkdir()
        ended = in_child(place, partial(save, place), Moment(number))
        assert ended.killed
        assert ended.changes[-1] == change
    assert (tmp_path / "2" / "plain.tmp").read_bytes() == b"01234", "a write is half done"
    assert not (tmp_path / "4" / "plain").exists(), "a renaming is not begun"
    assert (tmp_path / "6" / "text").read_bytes() == b"01234"
    assert (tmp_path / "8" / "raw").read_bytes() == b"01234"
    assert (tmp_path / "11" / "raw").read_bytes() == b"0123456789"


def test_is_killed_from_outside_after_a_change(tmp_path: Path) -> None:
    def work() -> None:
        save(tmp_path)
        signal.pause()

    ended = in_child(tmp_path, work, Moment(3, delay_s=0.05))
    assert ended.killed
    assert ended.changes == CHANGES + LATER


def test_each_of_many_writes_in_a_row_counts_as_one_place() -> None:
    changes = ["open a", "write a", "write a", "write a", "rename b", "open a", "write a", "rename b"]
    for seed in range(20):
        chance = random.Random(seed)
        assert [changes[number - 1] for number in places(changes, chance)] == [
            "open a", "write a", "rename b", "open a", "write a", "rename b"
        ]  # fmt: skip
        assert len(one_of_each(changes, chance)) == 3
    plan = chains(changes, random.Random(0))
    first = [next(plan)[0] for _ in range(6)]
    assert len(set(first)) == 6
    assert all(moment.delay_s is None for moment in first)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("open run/.run.json.123.tmp", "open run/.run.json.9.tmp"),
        ("mkdir cache/latents/0a", "mkdir cache/latents/ff"),
        (f"rename cache/text/1b/1b{'0' * 62}.safetensors", f"rename cache/text/ab/ab{'f' * 62}.safetensors"),
    ],
)
def test_sites_are_the_same_in_every_run(change: str, same: str) -> None:
    assert site(change) == site(same)
    assert site("write run/adapter.safetensors") == "write run/adapter.safetensors"


Fault = Callable[[Path], object]


def tortured(tmp_path: Path, after_kill: Fault, at_end: Fault) -> harness.Story:
    """A story of processes that only pretend."""
    reference = tmp_path / "reference"
    calls: list[Moment] = []

    def whole(place: Path) -> None:
        (place / "run" / "checkpoints" / "step-000002").mkdir(parents=True, exist_ok=True)
        (place / "run" / "run.json").write_text('{"status": "finished"}')
        (place / "run" / "metrics.jsonl").write_text(f'{{"step": 1, "step_s": {len(calls)}}}\n')

    def start(
        arguments: Sequence[str], roots: Sequence[Path], env: Mapping[str, str], moment: Moment
    ) -> Ended:
        calls.append(moment)
        whole(roots[0])
        (after_kill if moment.change else at_end)(roots[0])
        return Ended(-signal.SIGKILL if moment.change else 0, ("write x",))

    whole(reference)
    return harness.Bench(tmp_path, start).torture("run-1", [Moment(1), Moment(2)])


def nothing(place: Path) -> None:
    """No fault."""


def tear(place: Path) -> None:
    (place / "run" / "x.json").write_text("{")


def mend(place: Path) -> None:
    (place / "run" / "x.json").unlink()


@pytest.mark.parametrize(
    ("after_kill", "at_end", "torn", "left", "different"),
    [
        (nothing, nothing, 0, 0, 0),
        (tear, mend, 2, 0, 0),
        (nothing, lambda place: (place / "run" / ".x.9.tmp").touch(), 0, 1, 0),
        (nothing, lambda place: (place / "run" / "metrics.jsonl").unlink(), 0, 0, 1),
        (nothing, lambda place: (place / "run" / "metrics.jsonl").write_text('{"step": 2}\n'), 0, 0, 1),
        (nothing, lambda place: (place / "run" / "run.json").write_text('{"status": "running"}'), 0, 0, 1),
    ],
    ids=["sound", "torn after each kill", "left behind", "missing", "another step", "unfinished"],
)  # fmt: skip
def test_faults_are_told_apart(
    tmp_path: Path, after_kill, at_end, torn: int, left: int, different: int
) -> None:
    story = tortured(tmp_path, after_kill, at_end)
    assert len(story.kills) == 2
    assert (len(story.torn), len(story.left), len(story.differences)) == (torn, left, different), story


def test_a_checkpoint_that_is_lost_is_found_out(tmp_path: Path) -> None:
    calls = []

    def start(arguments, roots, env, moment: Moment) -> Ended:
        calls.append(moment)
        folder = roots[0] / "run" / "checkpoints"
        (folder / "step-000004").mkdir(parents=True, exist_ok=True)
        if len(calls) == 2:
            (folder / "step-000004").rename(folder / "step-000002")
        return Ended(-signal.SIGKILL, ("write x",))

    (tmp_path / "reference").mkdir()
    story = harness.Bench(tmp_path, start).torture("a", [Moment(1), Moment(2)])
    assert any("checkpoint 4 is gone, 2 is the newest" in line for line in story.torn)
