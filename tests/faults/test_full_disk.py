"""A disk that fills up stops the run cleanly, and with space again it goes on to the same end.

On a real small file system where mounting one is permitted; else with the limit on the size of one file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.harness import Bench, differences, last_checkpoint, left_behind, torn_files
from tests.faults.moments import Ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs or RLIMIT_FSIZE")

DISK_BYTES = 24 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    size = f"size={DISK_BYTES}"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def on_disk(forked: Bench, small_disk: Path) -> Bench:
    """Photos, recipe, runs and caches all on the small disk; the undisturbed run stays where it is."""
    shutil.copytree(forked.folder / "photos", small_disk / "photos")
    shutil.copy(forked.folder / "recipe.toml", small_disk)
    return replace(forked, folder=small_disk)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Somebody else's file takes the disk but for so many bytes."""
    ballast = disk / "ballast"
    ballast.touch()
    with ballast.open("ab", buffering=0) as file:
        while (free := shutil.disk_usage(disk).free - leave_bytes) > 0:
            try:
                file.write(bytes(min(free, 1 << 16)))
            except OSError:
                break
    return ballast


def stopped_cleanly(ended: Ended, place: Path) -> None:
    """Exit code 7, one message that says what to free, nothing torn."""
    assert ended.code == 7, (ended.code, ended.said)
    assert "Free some" in ended.said, ended.said
    assert str(place) in ended.said, "it says where"
    assert "Traceback" not in ended.said
    assert not torn_files(place)


def same_end(bench: Bench, reference: Path, name: str) -> None:
    """Started again, with space, it ends as if nothing had been."""
    ended = bench.attempt(name)
    assert ended.code == 0, ended.said
    assert not differences(reference, bench.folder / name)
    assert not left_behind(reference, bench.folder / name)


def test_too_little_space_at_the_start_is_told_in_time(forked: Bench, on_disk: Bench) -> None:
    """However little is free: before the first step, or in the caches, never a torn file or a defect."""
    place = on_disk.folder / "start"
    for leave_bytes in (0, 40 << 10, 400 << 10, 1 << 20):
        ballast = fill(on_disk.folder, leave_bytes)
        stopped_cleanly(on_disk.attempt("start"), place)
        assert not (place / "run" / "metrics.jsonl").exists(), "no step is done in vain"
        ballast.unlink()
    same_end(on_disk, forked.folder / "reference", "start")


def test_a_disk_that_fills_up_in_the_middle(forked: Bench, on_disk: Bench) -> None:
    """Filled to the last byte as soon as the first checkpoint is there."""
    place = on_disk.folder / "middle"
    over = threading.Event()

    def neighbour() -> None:
        while not last_checkpoint(place / "run") and not over.is_set():
            time.sleep(0.002)
        fill(on_disk.folder)

    thread = threading.Thread(target=neighbour)
    thread.start()
    ended = on_disk.attempt("middle")
    over.set()
    thread.join()
    stopped_cleanly(ended, place)
    assert last_checkpoint(place / "run") >= 2
    again = on_disk.attempt("middle")  # still no space: the same message, and nothing is lost by trying
    stopped_cleanly(again, place)
    assert last_checkpoint(place / "run") >= 2
    (on_disk.folder / "ballast").unlink()
    same_end(on_disk, forked.folder / "reference", "middle")


@pytest.mark.parametrize("limit_bytes", [60_000, 150_000], ids=["in the adapter", "in the optimizer's state"])
def test_files_that_cannot_grow(forked: Bench, limit_bytes: int) -> None:
    """What a quota does: the system refuses more bytes in one file than so many."""
    name = f"limit-{limit_bytes}"
    limited = replace(forked, environment={"FAULTS_LIMIT_BYTES": str(limit_bytes)})
    ended = limited.attempt(name)
    stopped_cleanly(ended, forked.folder / name)
    assert last_checkpoint(forked.folder / name / "run") == 0
    same_end(forked, forked.folder / "reference", name)
