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
from lorabooth.progress import Silent
from lorabooth.recipe import from_mapping
from lorabooth.recipe.rules import printable
from lorabooth.training.setting import Clock, open_setting


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


def _huge_caption(home: Home) -> None:
    next(home.photos.glob("*.jpg")).with_suffix(".txt").write_bytes(b"dog " * 20_000)


def _captions_and_photos(home: Home) -> None:
    _empty_caption(home)
    _text_as_jpg(home)
    (home.photos / "leaflet.pdf").write_bytes(b"%PDF")


def _weights_that_cannot_be_read(home: Home) -> None:
    """Whatever is told with this base is told before the base is loaded."""
    real = (home.root / "base").resolve()
    (home.root / "base").unlink()
    shutil.copytree(real, home.root / "base")
    for file in (home.root / "base").rglob("*.safetensors"):
        file.write_bytes(b"no weights at all")


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
    ("a caption of 80 kB", _huge_caption, CAPTIONS, 3, (".txt", "larger than 64 KiB")),
    (
        "captions and photos at once",
        _captions_and_photos,
        CAPTIONS,
        3,
        ("notes.jpg: not an image", ".txt: the caption is empty", "leaflet.pdf: not a photo"),
    ),
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
    ("a user who does not exist", _nothing, ("--set", "model.base=~nouser/x"), 2, ("model.base", "~nouser")),
    ("lists without end", _nothing, ("--set", f"optim.lr={'[' * 5000}"), 2, ("optim.lr", "too deeply")),
    ("digits without end", _nothing, ("--set", f"optim.lr={'9' * 5000}"), 2, ("optim.lr", "many digits")),
    (
        "a subject that is a number",
        _nothing,
        ("--set", "subjects=[3]", "--set", "subjects.0.noun=x"),
        2,
        ("subjects[0].noun", "3"),
    ),
    (
        "previews without images",
        _nothing,
        ("--set", "run.sample_every=1", "--set", "run.sample_count=0"),
        2,
        ("run.sample_every",),
    ),
    (
        "a folder with control characters",
        _nothing,
        ("--set", "prior.mode=images", "--set", 'prior.images="a\\u001b[2J"'),
        2,
        ("prior.images", "\\u001b"),
    ),
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
    assert all(printable(line) == line for line in done.output.split("\n"))
    for part in told:
        assert part in done.output
    assert _files(home.root) == before, "something was written or lost"


@pytest.mark.parametrize("base", ["no/such/folder", "nowhere", "model.ckpt", "owner/name"])
def test_a_base_that_is_not_there(home: Home, base: str) -> None:
    done = home.train(base=base)
    assert done.exit_code == 4, done.output
    assert base.split("/")[-1] in done.output
    assert not home.out.exists()


BEFORE_THE_BASE: list[tuple[str, tuple[str, ...], int, tuple[str, ...]]] = [
    # On a CPU "auto" is fp32.
    ("a coarser base", ("--set", "memory.base_precision=bf16"), 2, ("memory.base_precision", "fp32")),
    (
        "a coarser base in so many words",
        ("--set", "memory.precision=fp32", "--set", "memory.base_precision=bf16"),
        2,
        ("memory.base_precision", "fp32"),
    ),
    (
        "no folder of class images",
        ("--set", "prior.mode=images", "--set", "prior.images=nowhere"),
        3,
        ("nowhere: there is no such folder",),
    ),
    (
        "bad class images",
        ("--set", "prior.mode=images", "--set", "prior.images=classes"),
        3,
        ("classes/notes.jpg: not an image", "1 of 4 photos"),
    ),
]


@pytest.mark.parametrize(
    ("extra", "code", "told"), [c[1:] for c in BEFORE_THE_BASE], ids=[c[0] for c in BEFORE_THE_BASE]
)
def test_what_is_told_before_the_base_is_loaded(
    home: Home, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], code: int, told: tuple[str, ...]
) -> None:
    _weights_that_cannot_be_read(home)
    monkeypatch.chdir(home.root)
    (home.root / "classes").mkdir()
    (home.root / "classes" / "notes.jpg").write_text("not a photo")
    if "classes" in extra[-1]:
        shutil.copy(next(home.photos.glob("*.png")), home.root / "classes" / "a.png")
        next(home.photos.glob("*.png")).unlink()
    done = home.train(*extra)
    assert done.exit_code == code, done.output
    for part in told:
        assert part in done.output
    assert home.train().exit_code == 4  # the weights alone are wrong now


def test_a_warmup_longer_than_the_steps_that_auto_stands_for(home: Home) -> None:
    _weights_that_cannot_be_read(home)
    words = ["train", "--base", str(home.root / "base"), "--images", str(home.photos), "--noun", "dog"]
    done = CliRunner().invoke(app, [*words, "--dry-run", "--set", "optim.warmup_steps=100000"])
    assert done.exit_code == 2, done.output
    assert "optim.warmup_steps: 100000 is more than optim.steps = " in done.output


def test_a_folder_name_of_300_characters(home: Home) -> None:
    base, name = str(home.root / "base"), "a" * 300
    for given, code in (
        (["--base", name, "--images", str(home.photos)], 2),
        (["--base", base, "--images", name], 3),
    ):
        done = CliRunner().invoke(app, ["train", *given, "--noun", "dog", "--dry-run"])
        assert done.exit_code == code, done.output
        assert "too long" in done.output


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = " + "[" * 5000, "nested too deeply"),
        ("[optim]\nlr = " + "9" * 5000, "line 2: a number of 5,000 digits"),
        ("[run]\nseed = 0x" + "f" * 5000, "run.seed: a whole number of 20,000 bits"),
        ("b = '\x1b[2J'", r"\x1b[2J"),
    ],
)
def test_recipe_files_that_python_stumbles_over(home: Home, text: str, told: str) -> None:
    file = home.root / "r.toml"
    file.write_text(text)
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 2, done.output
    assert told in done.output
    assert "\x1b" not in done.output


def test_captions_over_the_token_limit_are_listed(home: Home) -> None:
    first, second, *_ = sorted(home.photos.glob("*.*"))
    for photo in list(home.photos.iterdir()):
        (home.photos / f"{photo.stem}.txt").write_text("a {token} {noun}")
    first.with_suffix(".txt").write_text("a {token} \x1b[31m{noun} " + "in the deep snow " * 200)
    done = home.train("--dry-run", *CAPTIONS)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    table = done.output.split("these captions lose their ends at the text encoder's limit:\n")[1]
    row, after = table.split("\n")[:2]
    assert row.startswith(f"  {first.name}: ")
    assert r"tokens: a " in row
    assert r"\x1b[31mdog in the" in row
    assert second.name not in row
    assert "tokens" not in after
    raw = {
        "model": {"base": str(home.root / "base")},
        "subjects": [{"images": str(home.photos), "noun": "dog", "captions": True}],
    }
    (long,) = open_setting(from_mapping(raw, (), "test"), Clock(), Silent()).long_caption_facts
    assert long["photos"] == [first.name]
    assert f"{long['tokens']} of {long['limit']} tokens" in row
    assert long["tokens"] > 200 * 4 > long["limit"]


def test_captions_within_the_limit_are_not_listed(home: Home) -> None:
    for photo in list(home.photos.iterdir()):
        (home.photos / f"{photo.stem}.txt").write_text("a {token} {noun}")
    done = home.train("--dry-run", *CAPTIONS)
    assert done.exit_code == 0, done.output
    assert "lose their ends" not in done.output


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
