"""What wrong input gets: one message (what, where, what to do), its exit code, nothing written or lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lorabooth.cli.app import app


@dataclass(frozen=True)
class Home:
    """A folder with a base and photos, which each case spoils in its own way."""

    root: Path

    @property
    def photos(self) -> Path:
        return self.root / "dog"

    @property
    def out(self) -> Path:
        return self.root / "run"

    def train(self, *extra: str, base: str = "base") -> Result:
        where = {"base": str(self.root / "base")}.get(base, base)
        words = [
            "train",
            "--base",
            where,
            "--images",
            str(self.photos),
            "--noun",
            "dog",
            "--out",
            str(self.out),
        ]
        return CliRunner().invoke(app, [*words, "--steps", "2", *extra])


@pytest.fixture
def home(tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base").symlink_to(tiny_sd)
    shutil.copytree(photos, tmp_path / "dog")
    return Home(tmp_path)


def _no_photos(home: Home) -> None:
    for photo in home.photos.iterdir():
        photo.unlink()


def _no_folder(home: Home) -> None:
    shutil.rmtree(home.photos)


def _torn(home: Home) -> None:
    photo = next(home.photos.glob("*.jpg"))
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])


def _text_as_jpg(home: Home) -> None:
    (home.photos / "notes.jpg").write_text("not a photo")


def _tiny(home: Home) -> None:
    Image.new("RGB", (4, 4), "red").save(home.photos / "tiny.png")


def _empty_caption(home: Home) -> None:
    photo = next(home.photos.glob("*.jpg"))
    photo.with_suffix(".txt").write_text("")


def _other_base(home: Home) -> None:
    (home.root / "base").unlink()
    (home.root / "base").mkdir()
    (home.root / "base" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def _unwritable(home: Home) -> None:
    home.out.write_text("a file, not a folder")


def _nothing(home: Home) -> None:
    """The command line alone is wrong."""


CAPTIONS = ("--set", "subjects.0.captions=true")
CASES: list[tuple[str, Callable[[Home], None], tuple[str, ...], int, tuple[str, ...]]] = [
    ("no photos", _no_photos, (), 3, ("dog", ".jpg")),
    ("no folder", _no_folder, (), 3, ("dog",)),
    ("a torn photo", _torn, (), 3, (".jpg", "Replace")),
    ("a text file named .jpg", _text_as_jpg, (), 3, ("notes.jpg", "Replace")),
    ("a photo of 4 pixels", _tiny, (), 3, ("tiny.png", "4")),
    ("an empty caption", _empty_caption, CAPTIONS, 3, (".txt", "empty")),
    ("an unknown key", _nothing, ("--set", "optim.learningrate=1"), 2, ("optim.learningrate", "optim.lr")),
    ("rank 0", _nothing, ("--set", "adapter.rank=0"), 2, ("adapter.rank", "1")),
    (
        "an unknown preset",
        _nothing,
        ("--set", "adapter.targets=everything"),
        2,
        ("adapter.targets", "attn+ff"),
    ),
    ("another kind of base", _other_base, (), 4, ("FLUX", "Supported")),
    ("an output that is a file", _unwritable, (), 2, ("run", "folder")),
]


@pytest.mark.parametrize(
    ("spoil", "extra", "code", "told"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_one_message_and_the_right_code(
    home: Home, spoil: Callable[[Home], None], extra: tuple[str, ...], code: int, told: tuple[str, ...]
) -> None:
    spoil(home)
    before = _files(home.root)
    done = home.train(*extra)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    for part in told:
        assert part in done.output
    assert _files(home.root) == before, "something was written or lost"


@pytest.mark.parametrize("base", ["no/such/folder", "nowhere", "model.ckpt", "owner/name"])
def test_a_base_that_is_not_there(home: Home, base: str) -> None:
    done = home.train(base=base)
    assert done.exit_code == 4, done.output
    assert base.split("/")[-1] in done.output
    assert not home.out.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(home: Home) -> None:
    home.out.mkdir(mode=0o500)
    assert home.train().exit_code == 2


def test_all_bad_photos_are_named_at_once(home: Home) -> None:
    _text_as_jpg(home)
    _tiny(home)
    done = home.train()
    assert "notes.jpg" in done.output
    assert "tiny.png" in done.output


def test_a_broken_adapter_is_told_before_the_base_is_loaded(home: Home) -> None:
    broken = home.root / "adapter.safetensors"
    broken.write_bytes(b"\xff" * 64)
    words = ["sample", "--base", str(home.root / "base"), "--adapter", str(broken), "--prompt", "a dog"]
    done = CliRunner().invoke(app, [*words, "--out", str(home.root / "samples")])
    assert done.exit_code == 5, done.output
    assert "adapter.safetensors" in done.output
    assert not (home.root / "samples").exists()


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "cache" not in path.parts
    }
