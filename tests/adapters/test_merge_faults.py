"""A merge that is killed, interrupted or short of disk leaves the target as it was, and no litter to stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabooth.adapters import merge
from lorabooth.adapters.merge_match import Merging
from tests.adapters.test_merge import UNET, adapter, single  # noqa: F401 (a fixture)

SLOW = """
import os, sys, time
from pathlib import Path
from lorabooth.adapters import delta
make, mark = delta.chunk_function, Path(sys.argv.pop(1))
def slow(*args):
    change = make(*args)
    def step(chunk, offset):
        mark.touch()
        time.sleep(0.05)
        change(chunk, offset)
    return step
import lorabooth.adapters.merge as merge
merge.chunk_function = slow
from lorabooth.cli.app import main
main()
"""


def start(tmp_path: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """The real command, each chunk slowed down; returns when the first chunk is being written."""
    mark = tmp_path / "begun"
    mark.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(mark), "merge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in range(1200):
        if mark.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert mark.exists(), process.communicate()
    return process, mark


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interrupted_merge_leaves_nothing_and_exits_130(base, adapter, tmp_path, number, kind):  # noqa: F811
    source = base.folder if kind == "folder" else single(base, tmp_path / "base.safetensors")
    out = tmp_path / ("out" if kind == "folder" else "out.safetensors")
    options = ["--base", str(source), "--adapter", str(adapter), "--out", str(out)]
    process, mark = start(tmp_path, *options)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert mark.exists()


def test_a_killed_merge_leaves_the_earlier_result_and_the_next_one_tidies_up(base, adapter, tmp_path):  # noqa: F811
    checkpoint, out = single(base, tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    merge.merge(checkpoint, [Merging(adapter, 0.5)], out)
    before = out.read_bytes()
    options = ["--base", str(checkpoint), "--adapter", str(adapter), "--out", str(out), "--overwrite"]
    for _ in range(3):
        process, _ = start(tmp_path, *options)
        process.kill()
        process.communicate()
        assert out.read_bytes() == before
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    merge.merge(checkpoint, [Merging(adapter)], out, overwrite=True)
    assert out.read_bytes() != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_folder_that_was_moved_aside_when_the_process_died_comes_back(base, adapter, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    merge.merge(base.folder, [Merging(adapter)], out)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    out.rename(tmp_path / f".out.{process.pid}.old")
    from lorabooth import durable

    durable.sweep(out)
    assert (out / UNET).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "out"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 70 MiB, where this is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way(base, adapter, small_disk, tmp_path, monkeypatch):  # noqa: F811
    """The check before is fooled, so that the writing itself meets the full disk."""
    from lorabooth import durable
    from lorabooth.errors import TrainingError

    checkpoint = single(base, tmp_path / "base.safetensors")
    weights = load_file(checkpoint)
    save_file(weights | {"first_stage_model.ballast": torch.zeros(80 << 20, dtype=torch.uint8)}, checkpoint)
    with pytest.raises(TrainingError, match="are free"):
        merge.merge(checkpoint, [Merging(adapter)], small_disk / "out.safetensors")
    monkeypatch.setattr(durable, "require_space", lambda *_: None)
    with pytest.raises(TrainingError, match="No space left"):
        merge.merge(checkpoint, [Merging(adapter)], small_disk / "out.safetensors")
    assert list(small_disk.iterdir()) == []
