"""What a run will write is predicted, and refused before the first step where it does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lorabooth.errors import TrainingError
from lorabooth.training import space
from lorabooth.training.space import Amounts
from tests.training import runs

MIB = 2**20
SMALL = Amounts(
    checkpoint_bytes=MIB,
    adapter_bytes=MIB,
    steps=100,
    checkpoint_every=10,
    keep=2,
    sample_every=50,
    images=4,
    side_px=64,
)


def with_(**changes: int) -> Amounts:
    return Amounts(**{**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}, **changes})


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(path.parent).free == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if shutil.which("mount") is None or os.name != "posix":
        pytest.skip("no mount here")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 3),  # two kept, and the new one before an old one goes
        ({"keep": 0}, 10),
        ({"checkpoint_every": 0}, 1),
        ({"checkpoint_every": 0, "keep": 0}, 1),
        ({"checkpoint_every": 60}, 2),
        ({"checkpoint_every": 30, "keep": 0}, 4),
        ({"steps": 1}, 1),
        ({"chosen": True}, 4),  # the best one as well
    ],
)
def test_how_many_checkpoints_there_are_at_most(changes: dict[str, int], most: int) -> None:
    assert with_(**changes).checkpoints == most


@pytest.mark.parametrize(
    ("changes", "folders"), [({}, 3), ({"sample_every": 0}, 2), ({"sample_every": 30}, 5), ({"images": 0}, 0)]
)
def test_how_many_previews_there_are(changes: dict[str, int], folders: int) -> None:
    assert with_(**changes).previews == folders


def test_a_run_writes_no_more_than_was_predicted(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    told: list[Amounts] = []
    require = space.require

    def note(folder: Path, amounts: Amounts) -> None:
        told.append(amounts)
        require(folder, amounts)

    monkeypatch.setattr(space, "require", note)
    out = tmp_path / "run"
    runs.train(tiny_sd, photos, out, "run.keep=0", "run.sample_count=2", "run.sample_every=3")
    (amounts,) = told
    assert (amounts.checkpoints, amounts.previews) == (3, 3)
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert len(list((out / "samples").iterdir())) == 3
    for place, size in space.predict(out, amounts).items():
        files = place.iterdir() if place == out else place.rglob("*")
        written = sum(path.stat().st_size for path in files if path.is_file())
        assert 0 < written <= size, place


def test_what_is_there_already_counts_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3 * MIB})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)
    amounts = with_(images=0, adapter_bytes=0)
    with pytest.raises(TrainingError, match=r"3 checkpoints of 1\.0 MiB"):
        space.require(tmp_path, amounts)
    for step in (10, 20, 30):
        place = tmp_path / "checkpoints" / f"step-{step:06d}"
        place.mkdir(parents=True)
        (place / "adapter.safetensors").write_bytes(bytes(MIB))
    (tmp_path / "adapter.safetensors").write_bytes(bytes(2 * MIB))
    space.require(tmp_path, amounts)


def test_each_disk_is_counted_by_itself(small_disk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (small_disk / "checkpoints").mkdir()
    (run / "checkpoints").symlink_to(small_disk / "checkpoints")
    space.require(run, with_(checkpoint_bytes=6 * MIB, adapter_bytes=30 * MIB))
    with pytest.raises(TrainingError, match=r"3 checkpoints of 9\.0 MiB") as caught:
        space.require(run, with_(checkpoint_bytes=9 * MIB))
    assert "previews" not in caught.value.what, "they go to the other disk"


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    small_disk: Path, tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TrainingError, match="No step was done") as caught:
        runs.train(tiny_sd, photos, small_disk / "run", "run.keep=0", "optim.steps=60")
    assert caught.value.exit_code == 7
    assert "run.keep" in caught.value.fix
    assert not (small_disk / "run" / "checkpoints").exists()
    assert not (small_disk / "run" / "metrics.jsonl").exists()
    # What may change goes on in the same folder.
    done = runs.train(tiny_sd, photos, small_disk / "run", "run.keep=1", "optim.steps=60")
    assert done.steps == 60


def test_a_full_disk_at_the_first_write_is_exit_7(
    small_disk: Path, tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    (small_disk / "run").mkdir()
    fill(small_disk / "other")
    with pytest.raises(TrainingError, match="No space left") as caught:
        runs.train(tiny_sd, photos, small_disk / "run")
    assert caught.value.exit_code == 7
    assert "Free some space" in caught.value.fix
    (small_disk / "other").unlink()
    assert runs.train(tiny_sd, photos, small_disk / "run").steps == 6
