from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabooth.errors import AdapterError, BaseModelError, RecipeError
from lorabooth.evaluation.sample import SampleResult, Shot, file_name, plan_shots, sample
from tests.evaluation.test_apply import make_adapter

PROMPTS = ("a photo of a dog", "a red mug: ./../x")


@pytest.fixture(scope="module")
def adapter(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "dog.safetensors", tiny_sd, seed=1)


def draw(base: Path, out: Path, adapters=(), prompts=PROMPTS, seeds=(0, 5), **more) -> SampleResult:
    options = {"steps": 2, "guidance": 3.0, "resolution_px": 32, "device": "cpu", **more}
    return sample(base, adapters, prompts, seeds, out=out, **options)


def test_images_names_grid_and_facts(tiny_sd: Path, tmp_path: Path) -> None:
    result = draw(tiny_sd, tmp_path / "new" / "out")
    assert [path.name for path in result.paths] == [
        "00-a-photo-of-a-dog-seed0.png",
        "01-a-photo-of-a-dog-seed5.png",
        "02-a-red-mug-x-seed0.png",
        "03-a-red-mug-x-seed5.png",
    ]
    assert sorted((tmp_path / "new" / "out").iterdir()) == sorted([*result.paths, result.grid_path])
    with Image.open(result.paths[3]) as image:
        facts = dict(image.text)
        assert (np.asarray(image) == np.asarray(result.images[3])).all()
    assert facts["prompt"] == PROMPTS[1]
    assert facts["seed"] == "5"
    assert facts["steps"] == "2"
    assert facts["guidance"] == "3"
    assert facts["base"] == "tiny-sd1"
    assert facts["software"].startswith("lorabooth")
    assert str(tmp_path) not in str(facts)
    assert str(tiny_sd) not in str(facts)
    assert Image.open(result.grid_path).size == result.grid.size
    assert result.grid.width > 2 * 128


def test_again_into_the_same_folder_and_never_over_other_images(tiny_sd: Path, tmp_path: Path) -> None:
    first = draw(tiny_sd, tmp_path)
    before = [path.read_bytes() for path in first.paths]
    assert [path.read_bytes() for path in draw(tiny_sd, tmp_path).paths] == before
    with pytest.raises(RecipeError, match=r"00-a-photo-of-a-dog-seed0\.png is there already"):
        draw(tiny_sd, tmp_path, guidance=4.0)
    with pytest.raises(RecipeError, match=r"grid\.png is there already"):
        draw(tiny_sd, tmp_path, prompts=["a cat"], seeds=[1])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "grid.png").write_bytes(b"my own file")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"grid\.png is there already"):
        draw(tiny_sd, tmp_path / "b")
    assert (tmp_path / "b" / "grid.png").read_bytes() == b"my own file"
    assert [path.read_bytes() for path in first.paths] == before


def test_adapter_changes_images_and_strength_zero_does_not(
    tiny_sd: Path, adapter: Path, tmp_path: Path
) -> None:
    plain = draw(tiny_sd, tmp_path / "plain", seeds=[0])
    with_it = draw(tiny_sd, tmp_path / "with", [(adapter, 1.0)], seeds=[0])
    sweep = draw(tiny_sd, tmp_path / "sweep", [(adapter, 1.0)], seeds=[0], strengths=[0.0, 0.5, 1.0])
    assert [shot.strength for shot in sweep.shots] == [0.0, 0.5, 1.0] * 2
    assert sweep.paths[2].name == "02-a-photo-of-a-dog-seed0-strength1.00.png"
    pixels = [np.asarray(image).astype(int) for image in sweep.images]
    for row in range(2):
        zero, half, one = pixels[3 * row : 3 * row + 3]
        assert (zero == np.asarray(plain.images[row])).all()
        assert (one == np.asarray(with_it.images[row])).all()
        assert np.abs(one - zero).max() > 2
        assert (half != one).any()
        assert (half != zero).any()
    facts = Image.open(sweep.paths[1]).text
    assert facts["strength"] == "0.5"
    assert "dog.safetensors" not in str(facts)


def test_a_sweep_multiplies_the_given_strength(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    one = draw(tiny_sd, tmp_path / "a", [(adapter, 0.5)], PROMPTS[:1], [0])
    two = draw(tiny_sd, tmp_path / "b", [(adapter, 1.0)], PROMPTS[:1], [0], strengths=[0.5])
    assert (np.asarray(one.images[0]) == np.asarray(two.images[0])).all()


def test_another_adapter_of_the_same_name_does_not_overwrite(
    tiny_sd: Path, adapter: Path, tmp_path: Path
) -> None:
    draw(tiny_sd, tmp_path / "out", [(adapter, 1.0)], PROMPTS[:1], [0])
    other = make_adapter(tmp_path / "dog.safetensors", tiny_sd, seed=2)
    with pytest.raises(RecipeError, match="is there already"):
        draw(tiny_sd, tmp_path / "out", [(other, 1.0)], PROMPTS[:1], [0])


def test_defaults_come_from_the_family_and_the_base(tiny_sd: Path, tmp_path: Path) -> None:
    result = sample(tiny_sd, (), PROMPTS[:1], [0], out=tmp_path, steps=1, device="cpu")
    assert result.images[0].size == (64, 64)
    assert Image.open(result.paths[0]).text["guidance"] == "7.5"


def test_nothing_is_loaded_or_written_for_wrong_input(tiny_sd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError):
        draw(tiny_sd, out, [(tmp_path / "no.safetensors", 1.0)])
    with pytest.raises(BaseModelError):
        draw(tmp_path / "no-base", out)
    with pytest.raises(RecipeError, match="sweep needs an adapter"):
        draw(tiny_sd, out, strengths=[0.0])
    with pytest.raises(RecipeError, match="nothing to draw"):
        draw(tiny_sd, out, prompts=["  "])
    with pytest.raises(RecipeError, match="seed 3 is given twice"):
        draw(tiny_sd, out, seeds=[3, 3])
    with pytest.raises(RecipeError, match="device 'warp'"):
        draw(tiny_sd, tmp_path / "other", device="warp")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be made"):
        draw(tiny_sd, tmp_path / "file" / "out")


def test_plan_of_shots() -> None:
    assert plan_shots(["a", "b"], [1, 2], None, False) == (
        Shot("a", 1),
        Shot("a", 2),
        Shot("b", 1),
        Shot("b", 2),
    )
    assert plan_shots(["a"], [1], [0.0, 1.0], True) == (Shot("a", 1, 0.0), Shot("a", 1, 1.0))
    with pytest.raises(RecipeError):
        plan_shots(["a"], [-1], None, False)


def test_file_names_never_collide_over_close_strengths() -> None:
    assert file_name("x", 1, 3, 0.5) == "03-x-seed1-strength0.50.png"
    assert file_name("x", 1, 3, 0.333) != file_name("x", 1, 3, 0.334)
