"""A run is known by the content of its photos, captions, class images and base, not by where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import lorabooth
from lorabooth.errors import RecipeError
from lorabooth.training import identity
from lorabooth.training.folder import read_json
from lorabooth.training.identity import Identity
from tests.tiny import make_photos
from tests.training import runs

KINDS = ("photos", "captions", "class_images", "base")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Photos with captions that a test may change."""
    folder = tmp_path / "dog"
    folder.mkdir()
    make_photos(folder)
    for photo in sorted(folder.iterdir()):
        photo.with_suffix(".txt").write_text(f"a {{token}} {{noun}} in {photo.stem}", encoding="utf-8")
    return folder


def made(**digests: dict[str, str]) -> Identity:
    return Identity({kind: digests.get(kind, {}) for kind in KINDS})


def photo_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


def test_the_same_is_the_same_and_survives_json() -> None:
    one = made(photos={"0/a.jpg": "1"}, base={"unet": "2"})
    assert identity.changes(one, one) == []
    assert identity.parse(one.to_json()) == one


@pytest.mark.parametrize(
    "value", [{}, {"format": 2}, {"format": 1, "photos": {}}, {**made().to_json(), "base": "x"}]
)
def test_what_is_no_identity_is_none(value: dict[str, object]) -> None:
    assert identity.parse(value) is None


def test_every_difference_is_named_once() -> None:
    old = made(
        photos={"0/a.jpg": "1", "0/b.jpg": "2", "1/a.jpg": "3"},
        captions={"0/a.jpg": "c", "0/b.jpg": "c", "1/a.jpg": "c"},
        class_images={"x.png": "1"},
        base={"unet": "1", "vae": "1"},
    )
    new = made(
        photos={"0/a.jpg": "1", "0/c.jpg": "2", "1/a.jpg": "4"},
        captions={"0/a.jpg": "d", "0/c.jpg": "c", "1/a.jpg": "c"},
        base={"unet": "1", "vae": "2"},
    )
    assert identity.changes(old, new) == [
        "photo b.jpg is gone",
        "photo a.jpg (of subjects[1]) has changed",
        "photo c.jpg is new",
        "the caption of a.jpg has changed",
        "class image x.png is gone",
        "the base model's vae has changed",
    ]


def test_a_place_may_change_if_what_is_there_is_the_same() -> None:
    one, other = made(photos={"0/a.jpg": "1"}), made(photos={"0/a.jpg": "2"})
    assert identity.is_place("subjects[0].images", one, one)
    assert not identity.is_place("subjects[0].images", one, other)
    assert identity.is_place("model.base", one, other)
    assert not identity.is_place("subjects[0].noun", one, one)


def test_many_changes_are_cut() -> None:
    assert identity.short([str(n) for n in range(20)], 3) == ["0", "1", "2", "and 17 more"]


def test_changed_photos_and_captions_are_refused_by_name(
    tiny_sd: Path, own_photos: Path, tmp_path: Path
) -> None:
    captions = "subjects.0.captions=true"
    out = tmp_path / "run"
    runs.train(tiny_sd, own_photos, out, captions)
    first, second, third = photo_names(own_photos)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    shutil.copy(own_photos / first, own_photos / second)
    (own_photos / third).rename(own_photos / f"new-{third}")
    (own_photos / first).with_suffix(".txt").write_text("another", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        runs.train(tiny_sd, own_photos, out, captions, "optim.steps=8")
    assert caught.value.exit_code == 2
    for line in (
        f"photo {second} has changed",
        f"photo {third} is gone",
        f"photo new-{third} is new",
        f"the caption of {first} has changed",
    ):
        assert f"  {line}" in caught.value.what.splitlines()
    assert f"caption of {second}" not in caught.value.what
    assert "--fresh" in caught.value.fix
    assert before == {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_changed_class_images_are_refused_by_name(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "dogs"
    shutil.copytree(photos, own)
    prior = ("prior.mode=images", f"prior.images={own}")
    runs.train(tiny_sd, photos, tmp_path / "run", *prior)
    first, second, _ = photo_names(own)
    shutil.copy(own / first, own / second)
    with pytest.raises(RecipeError, match=f"class image {second} has changed"):
        runs.train(tiny_sd, photos, tmp_path / "run", *prior)


def test_changed_base_weights_are_refused_by_name(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd, base)
    runs.train(base, photos, tmp_path / "run")
    (weights,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RecipeError, match="the base model's vae has changed"):
        runs.train(base, photos, tmp_path / "run", "optim.steps=8")


def test_content_decides_where_photos_and_base_have_moved(
    tiny_sd: Path, own_photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    straight = runs.train(tiny_sd, own_photos, tmp_path / "straight", "optim.steps=8")
    runs.train(tiny_sd, own_photos, out)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_sd, elsewhere / tiny_sd.name)
    shutil.copytree(own_photos, elsewhere / "hund")
    shutil.move(out, elsewhere / "run")
    moved = runs.train(elsewhere / tiny_sd.name, elsewhere / "hund", elsewhere / "run", "optim.steps=8")
    assert moved.resumed_from == 6
    assert moved.adapter.read_bytes() == straight.adapter.read_bytes()
    again = lorabooth.Recipe.from_toml(elsewhere / "run" / "recipe.toml")
    assert again.subjects[0].images == str(elsewhere / "hund"), "bound to the new place from now on"
    assert lorabooth.train(again).finished_before


def test_no_folder_and_no_caption_is_in_it(tiny_sd: Path, own_photos: Path, tmp_path: Path) -> None:
    runs.train(tiny_sd, own_photos, tmp_path / "run", "subjects.0.captions=true")
    text = (tmp_path / "run" / "identity.json").read_text("utf-8")
    assert str(tmp_path) not in text
    assert str(tiny_sd) not in text
    assert "sks dog in" not in text
    found = identity.parse(read_json(tmp_path / "run" / "identity.json"))
    assert found is not None
    assert [name.partition("/")[2] for name in found.digests["photos"]] == photo_names(own_photos)
    assert set(found.digests["base"]) == {"unet", "vae", "text_encoder", "scheduler"}


def test_a_run_from_before_there_were_identities_goes_on_with_a_warning(
    tiny_sd: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs.train(tiny_sd, photos, tmp_path / "run")
    (tmp_path / "run" / "identity.json").unlink()
    assert runs.train(tiny_sd, photos, tmp_path / "run", "optim.steps=8").resumed_from == 6
    assert "does not say which photos" in caplog.text
    assert (tmp_path / "run" / "identity.json").is_file()
