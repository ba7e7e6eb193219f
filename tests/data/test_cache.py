from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorabooth.data.cache import CachedLatent, Store, default_root, latents_key, text_key
from lorabooth.data.images import Variant
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.progress import Silent
from lorabooth.recipe import ImagesSection
from lorabooth.types import Geometry, Moments


class Listening(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def key(sha: str = "ab", **changed: object) -> str:
    facts: dict[str, object] = {
        "variant": Variant(0, False),
        "images": ImagesSection(),
        "resolution_px": 64,
        "multiple_px": 8,
        "encoder_id": "vae",
        "seed": 0,
        **changed,
    }
    return latents_key(sha, **facts)  # type: ignore[arg-type]


def latent() -> CachedLatent:
    draw = torch.Generator().manual_seed(0)
    mean, std = torch.randn(4, 8, 6, generator=draw), torch.rand(4, 8, 6, generator=draw)
    return CachedLatent(Moments(mean, std), Geometry((300, 200), (3, 5), (64, 48), True))


def test_a_key_tells_apart_what_changes_the_pixels_and_nothing_else() -> None:
    random = ImagesSection(crop="random")
    keys = [
        key(),
        key("cd"),
        key(variant=Variant(0, True)),
        key(images=ImagesSection(buckets=True)),
        key(images=random),
        key(images=random, seed=1),
        key(images=random, variant=Variant(1, False)),
        key(resolution_px=128),
        key(multiple_px=16),
        key(encoder_id="other vae"),
        text_key("ab", "vae"),
        text_key("ab", "other"),
        text_key("ab ", "vae"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(seed=7) == key()  # center crops draw nothing
    assert key(images=ImagesSection(flip=True)) == key()  # the plain half of a flipped set is the same
    assert all(len(each) == 64 and int(each, 16) >= 0 for each in keys)


def test_moments_come_back_bit_for_bit(tmp_path: Path) -> None:
    store, put = Store(tmp_path), latent()
    assert store.moments(key()) is None
    store.put_moments(key(), put)
    got = store.moments(key())
    assert got is not None
    assert torch.equal(got.moments.mean, put.moments.mean)
    assert torch.equal(got.moments.std, put.moments.std)
    assert got.geometry == put.geometry
    assert got.geometry.flipped is True


def test_conds_keep_names_and_types(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cond = {
        "tokens": torch.randn(7, 5).to(torch.bfloat16),
        "mask": torch.ones(7, dtype=torch.bool),
        "size": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }
    store.put_cond("0" * 64, cond)
    got = store.cond("0" * 64)
    assert got is not None
    assert got.keys() == cond.keys()
    assert all(got[name].dtype == cond[name].dtype and torch.equal(got[name], cond[name]) for name in cond)
    store.put_cond("1" * 64, {})
    assert store.cond("1" * 64) == {}


@pytest.mark.parametrize("length", [0, 5, 8, 100, 300, -1])
def test_a_torn_entry_counts_as_absent_with_a_warning(tmp_path: Path, length: int) -> None:
    store, said = Store(tmp_path), Listening()
    store.put_moments(key(), latent())
    path = store.path("latents", key())
    path.write_bytes(path.read_bytes()[:length])
    assert store.moments(key(), said) is None
    assert len(said.warned) == 1
    assert path.name in said.warned[0]
    store.put_moments(key(), latent())
    assert store.moments(key(), said) is not None


def test_altered_misplaced_and_foreign_entries_are_not_trusted(tmp_path: Path) -> None:
    store, said = Store(tmp_path), Listening()
    store.put_moments(key(), latent())
    path = store.path("latents", key())
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert store.moments(key(), said) is None

    store.put_moments(key("cd"), latent())  # right content under another photo's key
    store.path("latents", key("cd")).replace(path)
    assert store.moments(key(), said) is None

    save_file({"mean": torch.zeros(4, 8, 8), "std": torch.zeros(4, 8, 8)}, path)
    assert store.moments(key(), said) is None

    store.put_cond(key(), {"other": torch.zeros(3)})  # a valid entry of another kind
    store.path("text", key()).replace(path)
    assert store.moments(key(), said) is None

    path.unlink()
    path.mkdir()
    assert store.moments(key(), said) is None
    assert len(said.warned) == 5


HEADERS = {
    "null metadata": lambda header: header | {"__metadata__": None},
    "no metadata": lambda header: {name: told for name, told in header.items() if name != "__metadata__"},
    "other metadata": lambda header: header | {"__metadata__": {"digest": "", "more": "x"}},
    "metadata a list": lambda header: header | {"__metadata__": []},
    "metadata a number": lambda header: header | {"__metadata__": {"digest": 3}},
    "unknown type": lambda header: header | {"mean": header["mean"] | {"dtype": "F5"}},
    "half bytes": lambda header: header | {"mean": header["mean"] | {"dtype": "F4", "shape": [4, 8, 48]}},
    "other type": lambda header: header | {"mean": header["mean"] | {"dtype": "I32"}},
    "other shape": lambda header: header | {"mean": header["mean"] | {"shape": [192]}},
    "negative shape": lambda header: header | {"mean": header["mean"] | {"shape": [-4, -8, 6]}},
    "complex": lambda header: header | {"mean": header["mean"] | {"dtype": "C64", "shape": [4, 8, 3]}},
    "a list": lambda header: list(header),
    "a name less": lambda header: {name: told for name, told in header.items() if name != "std"},
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_broken_header_counts_as_absent_with_a_warning_and_is_rewritten(
    tmp_path: Path, change: str
) -> None:
    store, said = Store(tmp_path), Listening()
    store.put_moments(key(), latent())
    path = store.path("latents", key())
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(HEADERS[change](json.loads(whole[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    assert store.moments(key(), said) is None
    assert len(said.warned) == 1
    store.put_moments(key(), latent())
    assert path.read_bytes() == whole
    assert store.moments(key(), said) is not None
    assert len(said.warned) == 1


@given(st.data())
def test_no_mutation_of_an_entry_is_believed_or_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "mutated"
    store, said = Store(root), Listening()
    store.put_moments(key(), latent())
    path = store.path("latents", key())
    whole = path.read_bytes()
    # Mostly in the header, where there is something to misread.
    start = data.draw(st.integers(0, min(400, len(whole) - 1)) | st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 20))
    put = data.draw(
        st.binary(max_size=20) | st.sampled_from([b"null", b"{", b'"__metadata__":null,', b"[]", b"-1"])
    )
    changed = whole[:start] + put + whole[start + length :]
    path.write_bytes(changed)
    got = store.moments(key(), said)
    if got is None:
        assert len(said.warned) == 1
    else:  # the same bytes again, or white space and the like in the header
        assert torch.equal(got.moments.mean, latent().moments.mean)
        assert torch.equal(got.moments.std, latent().moments.std)
        assert got.geometry == latent().geometry


@pytest.mark.parametrize("geometry", [torch.tensor(3), torch.zeros(7), torch.zeros(8, dtype=torch.int64)])
def test_an_entry_with_a_right_checksum_and_wrong_content_is_not_used(
    tmp_path: Path, geometry: torch.Tensor
) -> None:
    store, said = Store(tmp_path), Listening()
    store.put_cond(key(), {"mean": torch.zeros(4, 8, 6), "std": torch.ones(4, 8, 6), "geometry": geometry})
    target = store.path("latents", key())
    target.parent.mkdir(parents=True)
    store.path("text", key()).replace(target)
    assert store.moments(key(), said) is None
    assert "geometry" in said.warned[0]


def test_sweeping_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    store = Store(tmp_path)
    store.sweep()  # of nothing at all
    store.put_moments(key(), latent())
    store.put_cond("ab" * 32, {"x": torch.ones(3)})
    drawn = tmp_path / "class-images" / "a-dog-0123"
    drawn.mkdir(parents=True)
    (drawn / "000000.png").write_bytes(b"png")
    entries = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    torn = [path.with_name(f".{path.name}.{dead.pid}.tmp") for path in entries]
    written = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in entries]
    for path in (*torn, *written):
        path.write_bytes(b"half")
    store.sweep()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*entries, *written])


def test_a_process_killed_while_writing_leaves_no_entry(tmp_path: Path) -> None:
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from lorabooth.data.cache import Store\n"
        "os.fsync = lambda fd: os._exit(9)\n"
        "Store(Path(sys.argv[1])).put_cond('ab' * 32, {'x': torch.ones(9)})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == 9
    store, said = Store(tmp_path), Listening()
    assert store.cond("ab" * 32, said) is None
    assert len(list(tmp_path.rglob(".*.tmp"))) == 1
    store.sweep()
    assert list(tmp_path.rglob(".*.tmp")) == []
    store.put_cond("ab" * 32, {"x": torch.ones(9)})
    assert store.cond("ab" * 32, said) is not None
    assert said.warned == []


def test_a_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left") as caught:
        Store(tmp_path).put_moments(key(), latent())
    assert str(tmp_path) in caught.value.fix  # what to free
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, where this is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_that_fills_up_keeps_whole_entries_only(small_disk: Path) -> None:
    store, said = Store(small_disk), Listening()
    cond = {"x": torch.randn(8000)}
    kept = []

    def fill() -> None:
        for number in range(10):
            store.put_cond(f"{number:064x}", cond)
            kept.append(f"{number:064x}")

    with pytest.raises(TrainingError, match="No space left") as caught:
        fill()
    assert caught.value.exit_code == 7
    assert 1 <= len(kept) < 10
    files = sorted(path.stem for path in small_disk.rglob("*") if path.is_file())
    assert files == kept
    for entry in kept:
        got = store.cond(entry, said)
        assert got is not None
        assert torch.equal(got["x"], cond["x"])
    assert said.warned == []


def test_a_root_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RecipeError, match="LORABOOTH_CACHE"):
        Store(tmp_path / "file").put_moments(key(), latent())


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.delenv("LORABOOTH_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == tmp_path / ".cache" / "lorabooth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "lorabooth"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_root() == tmp_path / "Library" / "Caches" / "lorabooth"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_root() == tmp_path / "local" / "lorabooth" / "Cache"


def test_file_names_are_fit_for_windows(tmp_path: Path) -> None:
    relative = Store(tmp_path).path("latents", key()).relative_to(tmp_path)
    assert not set(str(relative).replace(os.sep, "")) & set(':*?"<>|\\')
