"""What is there is opened and named; what is not is a note or one error, and never stops the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorabooth.errors import RecipeError
from lorabooth.evaluation.backbones import NOT_AVAILABLE, Backbones, open_backbones
from lorabooth.pocket.base import pocket_dir
from tests.evaluation.tiny_backbones import images, make_clip, make_lpips, make_resnet, make_vit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each."""
    folder = tmp_path_factory.mktemp("made")
    make_vit(folder / "my-vit")
    make_resnet(folder / "my-resnet")
    make_clip(folder / "my-clip")
    make_lpips(folder / "my-lpips")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_local_folders(made: Path) -> None:
    found = open_backbones(
        str(made / "my-vit"), str(made / "my-clip"), str(made / "my-lpips"), base="someone/base", strict=True
    )
    assert found.names() == {
        "dino": "folder my-vit",
        "clip": "folder my-clip",
        "lpips": "LPIPS (AlexNet)",
    }
    assert found.notes == ()
    assert found.metrics() == ("DINO", "PRES", "CLIP-I", "CLIP-T", "DIV", "drift")
    assert found.distance is not None
    assert found.distance(images(1, 64), images(1, 64, seed=1))[0] > 0


@pytest.mark.parametrize(
    ("dino", "expected"),
    [
        ("my-resnet", "unweighted LPIPS formula on the stages of folder my-resnet"),
        ("my-vit", "1 - cosine of folder my-vit (no LPIPS)"),
    ],
)
def test_what_stands_in_for_lpips_is_named(made: Path, dino: str, expected: str) -> None:
    found = open_backbones(str(made / dino), str(made / "my-clip"), base="someone/base")
    assert found.names()["lpips"] == expected
    assert found.distance is not None
    (note,) = found.notes
    assert expected in note
    assert "docs/evaluation.md" in note
    same, other = images(2)
    assert found.distance([same], [same])[0] == pytest.approx(0, abs=1e-6)
    assert found.distance([same], [other])[0] > 1e-4


def test_nothing_to_be_had_is_notes(cache: Path) -> None:
    found = open_backbones(base="someone/base", strict=True)  # strict is about what is given
    assert set(found.names().values()) == {NOT_AVAILABLE}
    dino, clip, remains = found.notes
    assert "facebook/dino-vits16: not a folder here, and not in the local hub cache (offline)" in dino
    assert "Go online once" in dino
    assert "openai/clip-vit-base-patch32" in clip
    assert "nothing is measured" in remains


def test_one_that_is_missing_leaves_the_others(made: Path, cache: Path) -> None:
    found = open_backbones("some/model", str(made / "my-clip"), str(made / "my-lpips"), base="x")
    assert (found.subject, found.metrics()) == (None, ("CLIP-I", "CLIP-T", "DIV", "drift"))
    assert found.notes[-1] == "Not measured: DINO, PRES; measured: CLIP-I, CLIP-T, DIV, drift."
    without_clip = open_backbones(str(made / "my-resnet"), "some/model", base="x")
    assert without_clip.metrics() == ("DINO", "PRES", "DIV", "drift")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dino", "{tmp}/nowhere", "there is no such folder"),
        ("dino", "{made}/my-clip", "cannot be used as a vision model"),
        ("clip", "{made}/my-vit", "cannot be used as a CLIP"),
        ("clip", "some/model", "not in the local hub cache (offline)"),
        ("lpips", "{made}/nowhere.safetensors", "there is no such file or folder"),
        ("lpips", "{made}/my-vit", "not the weights of LPIPS with AlexNet"),
    ],
)
def test_what_was_asked_for_and_is_not_there(
    made: Path, cache: Path, tmp_path: Path, key: str, value: str, expected: str
) -> None:
    value = value.format(tmp=tmp_path, made=made)
    given = {"dino": str(made / "my-resnet"), "clip": str(made / "my-clip"), "lpips": "auto"} | {key: value}
    with pytest.raises(RecipeError) as caught:
        open_backbones(**given, base="x", strict=True)
    assert caught.value.what.startswith(f'evaluation.{key} = "{value}": ')
    assert expected in caught.value.what
    assert caught.value.fix
    lenient = open_backbones(**given, base="x")
    assert any(note.startswith(f"evaluation.{key}: ") and expected in note for note in lenient.notes)
    assert str(tmp_path) not in " ".join(lenient.notes)  # they are written into evaluation.json
    assert str(made) not in " ".join(lenient.notes)


def test_lpips_that_is_missing_is_stood_in_for(made: Path, cache: Path) -> None:
    found = open_backbones(str(made / "my-resnet"), str(made / "my-clip"), "some/lpips", base="x")
    assert found.names()["lpips"].startswith("unweighted LPIPS formula")
    assert "some/lpips" in found.notes[0]


def pocket_copy(folder: Path) -> Path:
    """A pocket base elsewhere, with a small subject encoder of the same class."""
    for part in ("clip", "text_encoder", "tokenizer"):
        shutil.copytree(pocket_dir() / part, folder / part)
    make_resnet(folder / "subject_encoder")
    return folder


def test_a_base_that_brings_its_own(tmp_path: Path, cache: Path) -> None:
    base = pocket_copy(tmp_path / "base")
    found = open_backbones(base=str(base), strict=True)
    assert found.names() == {
        "dino": "the pocket subject encoder",
        "clip": "the pocket CLIP",
        "lpips": "unweighted LPIPS formula on the stages of the pocket subject encoder",
    }
    assert found.notes == ()  # in the pocket world that is the design
    shutil.rmtree(base / "subject_encoder")
    assert open_backbones(base=str(base)).metrics() == ("CLIP-I", "CLIP-T")


def test_the_pocket_worlds_own_by_name(made: Path) -> None:
    for found in (
        open_backbones(str(made / "my-resnet"), base="pocket"),
        open_backbones(str(made / "my-resnet"), "pocket", base="someone/base"),
    ):
        assert found.names()["clip"] == "the pocket CLIP"


@pytest.mark.parametrize("converted", [False, True])
def test_a_hub_model_in_the_cache_is_used_and_named_with_its_commit(
    made: Path, cache: Path, converted: bool
) -> None:
    for repo, name in (("some/vit", "my-vit"), ("some/clip", "my-clip"), ("some/lpips", "my-lpips")):
        root = cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(made / name, root / "snapshots" / COMMIT)
        if not converted:
            (root / "refs").mkdir()
            (root / "refs" / "main").write_text(COMMIT)
    found = open_backbones("some/vit", "some/clip", "some/lpips", base="x", strict=True)
    assert found.names() == {
        "dino": "some/vit@0123456789",
        "clip": "some/clip@0123456789",
        "lpips": "LPIPS (AlexNet)",
    }


def test_names_of_nothing() -> None:
    assert Backbones(None, None, None).metrics() == ()
