"""From a base's name to files: what is found, and what each wrong name gets."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.families import source
from tests.families.ldm import make_single_file
from tests.tiny import make_sd_folder


def test_a_folder_is_named_by_its_own_name_and_not_by_its_path(tiny_sd: Path) -> None:
    found = source.resolve(str(tiny_sd))
    assert (found.path, found.base_id, found.family, found.revision) == (tiny_sd, tiny_sd.name, "sd1", "")


def test_a_trailing_slash_and_a_relative_path_change_nothing(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_sd)
    assert source.resolve(".").base_id == tiny_sd.name
    assert source.resolve(f"{tiny_sd}/").base_id == tiny_sd.name


def test_paths_with_spaces_and_umlauts(tiny_sd: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_sd, tmp_path / "mein Ordner ü" / "basis 猫")
    assert source.resolve(str(moved)).base_id == "basis 猫"


def test_a_misspelt_path_is_told_what_lies_beside_it(tiny_sd: Path) -> None:
    with pytest.raises(BaseModelError, match="no such base model") as caught:
        source.resolve(str(tiny_sd.with_name("tiny-sd11")))
    assert str(tiny_sd) in caught.value.fix


def test_a_path_in_an_absent_folder_says_that_the_folder_is_absent(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        source.resolve(str(tmp_path / "nowhere" / "deep" / "model"))
    assert f"{tmp_path / 'nowhere' / 'deep'} does not exist" in caught.value.fix


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.CKPT"])
@pytest.mark.parametrize("there", [True, False])
def test_pickles_are_refused_unopened_with_a_way_out(tmp_path: Path, name: str, there: bool) -> None:
    file = tmp_path / name
    if there:
        file.write_bytes(b"never read")
    with pytest.raises(BaseModelError, match="pickle") as caught:
        source.resolve(str(file))
    assert "save_pretrained" in caught.value.fix


def test_a_revision_of_a_local_base_is_an_error(tiny_sd: Path) -> None:
    with pytest.raises(RecipeError, match="revision"):
        source.resolve(str(tiny_sd), revision="main")


def test_an_unknown_family_is_an_error_before_anything_is_looked_for() -> None:
    with pytest.raises(RecipeError, match="'sdd1'") as caught:
        source.resolve("/nowhere", family="sdd1")
    assert "'sd1'" in caught.value.fix


def test_unusual_widths_may_be_overruled_but_the_published_ones_not(tiny_sd: Path, tmp_path: Path) -> None:
    assert source.resolve(str(tiny_sd), family="sd2").family == "sd2"
    real = make_sd_folder(tmp_path / "wide", cross_dim=768)
    assert source.resolve(str(real)).family == "sd1"
    with pytest.raises(BaseModelError, match="this base is sd1"):
        source.resolve(str(real), family="sd2")


def test_a_folder_with_only_pickled_weights_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "old")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match="pickle"):
        source.resolve(str(folder))


def test_the_digest_is_the_weight_files_own_sha256(tiny_sd: Path) -> None:
    found = source.resolve(str(tiny_sd))
    for component, name in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        data = (tiny_sd / component / f"{name}.safetensors").read_bytes()
        assert source.weights_digest(found, component) == hashlib.sha256(data).hexdigest()


def test_the_digest_follows_the_weights_and_not_the_name(tiny_sd: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    before = source.weights_digest(source.resolve(str(tiny_sd)))
    assert source.weights_digest(source.resolve(str(copy))) == before
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert source.weights_digest(source.resolve(str(copy))) != before


def test_a_single_file_resolves_and_needs_a_vocabulary(tiny_sd: Path, tmp_path: Path) -> None:
    file = make_single_file(tiny_sd, tmp_path / "my.v1.safetensors")
    found = source.resolve(str(file))
    assert (found.base_id, found.family) == ("my.v1.safetensors", "sd1")
    assert source.weights_digest(found) == hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.rmtree(tmp_path / "my.v1" / "tokenizer")
    with pytest.raises(BaseModelError, match="vocabulary") as caught:
        source.resolve(str(file))
    assert str(tmp_path / "tokenizer") in caught.value.fix
