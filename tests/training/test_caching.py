from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorabooth.data.cache import Store
from lorabooth.families import registry, source
from lorabooth.families.base import Family, Parts
from lorabooth.pocket.base import pocket_dir
from lorabooth.progress import Silent
from lorabooth.training.caching import Examples, encode_examples
from lorabooth.types import Record, Role
from tests.training import runs


def make_photos(folder: Path) -> tuple[list[Record], list[Record]]:
    """Five photos and three class images; deterministic."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(8):
        grain = np.random.default_rng(number).integers(0, 256, (80, 80, 3), np.uint8)
        Image.fromarray(grain).save(folder / f"{number}.png")
        role = Role.INSTANCE if number < 5 else Role.CLASS
        found.append(Record(folder / f"{number}.png", f"a photo of dog {number}", role, "dog"))
    return found[:5], found[5:]


def load() -> tuple[Family, Parts]:
    """The pocket base: on it, batches are known to round differently."""
    base = source.resolve("pocket", revision="", family="auto")
    family = registry.family(base.family)
    return family, family.load(base, torch.float32)


def encode(root: Path, photos: Path, base: tuple[Family, Parts]) -> Examples:
    """Everything that a run of the pocket base caches."""
    recipe = runs.recipe(pocket_dir(), photos, "images.resolution=64", "model.dtype=fp32", "images.flip=true")
    return encode_examples(*base, recipe, *make_photos(photos), store=Store(root), reporter=Silent())


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pocket() -> tuple[Family, Parts]:
    return load()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pocket: tuple[Family, Parts]) -> dict[str, bytes]:
    """The entries of an uninterrupted run: 5 photos twice, 3 class images, 8 captions."""
    place = tmp_path_factory.mktemp("whole")
    encode(place / "cache", place / "photos", pocket)
    entries = files(place / "cache")
    assert len(entries) == 5 * 2 + 3 + 8
    return entries


@pytest.mark.parametrize("missing", [1, 3, 21])
def test_entries_do_not_depend_on_what_was_there(tmp_path: Path, pocket, whole, missing: int) -> None:
    first = encode(tmp_path / "cache", tmp_path / "photos", pocket)
    for name in list(whole)[:missing]:
        next((tmp_path / "cache").rglob(name)).unlink()
    second = encode(tmp_path / "cache", tmp_path / "photos", pocket)
    assert files(tmp_path / "cache") == whole
    assert second.latents.computed + second.latents.reused == 13
    for record in first.instance:
        for variant in (0, 1):
            one, two = first.latents.of(record, variant), second.latents.of(record, variant)
            assert torch.equal(one.moments.mean, two.moments.mean)
            assert torch.equal(one.moments.std, two.moments.std)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_caching import encode, load

number, fsync, count = int(sys.argv[2]), os.fsync, 0

def half_written(descriptor):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = half_written
encode(Path(sys.argv[1]) / "cache", Path(sys.argv[1]) / "photos", load())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_caching_and_resumed_is_uninterrupted(tmp_path: Path, pocket, whole) -> None:
    for number in (7, 17):  # an entry syncs its file and its folder
        script = [sys.executable, "-c", KILLED, str(tmp_path), str(number)]
        done = subprocess.run(script, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == -signal.SIGKILL
    found = files(tmp_path / "cache")
    assert 3 <= len(found.keys() & whole.keys()) < len(whole)
    assert len(found.keys() - whole.keys()) == 1  # torn, of the second kill; the first one's is swept
    encode(tmp_path / "cache", tmp_path / "photos", pocket)
    assert files(tmp_path / "cache") == whole


def test_kinds_of_devices_have_entries_of_their_own(tmp_path: Path, pocket, whole, monkeypatch) -> None:
    from lorabooth.training import caching

    monkeypatch.setattr(caching, "_device_kind", lambda _: "cuda")
    encode(tmp_path / "cache", tmp_path / "photos", pocket)
    assert len(files(tmp_path / "cache")) == len(whole)
    assert not files(tmp_path / "cache").keys() & whole.keys()
