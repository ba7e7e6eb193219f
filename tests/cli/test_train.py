"""`lorabooth train` and `sample` from photos to images, as a user runs them, on a tiny base."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorabooth.recipe import load
from tests import forked

QUICK = ["--set", "prior.count=2", "--set", "prior.sampler_steps=1", "--set", "images.resolution=32"]
FEW = ["--set", "run.sample_count=1", "--steps", "2"]


def lorabooth(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run([*map(str, arguments)], cwd)


def started(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "lorabooth", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def quick(tiny_sd: Path, photos: Path) -> list[str]:
    return ["train", "--base", str(tiny_sd), "--images", str(photos), "--noun", "dog", *QUICK, *FEW]


@pytest.fixture(scope="module")
def trained(home: Path, quick: list[str]) -> subprocess.CompletedProcess[str]:
    return started(*quick, "--out", "run", cwd=home)


def test_a_dry_run_prints_the_recipe_and_what_trains_and_writes_nothing(home: Path, quick: list[str]) -> None:
    found = lorabooth(*quick, "--dry-run", "--out", "dry", cwd=home)
    assert found.returncode == 0, found.stderr
    for expected in ("[optim]", "# Trains", "denoiser", "32 modules", "rank 16", "parameters", "# Parts"):
        assert expected in found.stdout
    assert not (home / "dry").exists()


def test_training_ends_with_where_everything_is(
    home: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    assert trained.returncode == 0, trained.stderr
    lines = trained.stdout.splitlines()
    for line, name in zip(lines, ("adapter", "samples", "report"), strict=False):
        kind, _, path = line.partition(" ")
        assert kind == name
        assert (home / path.strip()).is_file()
    told = [line.strip() for line in lines if line.startswith("  lorabooth")]
    assert [line.split(" ")[1] for line in told] == ["sample", "evaluate"]
    assert "Training" in trained.stderr
    assert "loss" in trained.stderr
    for noise in ("bitsandbytes", "kernels-community", "FutureWarning", "Traceback"):
        assert noise not in trained.stderr


def test_the_run_s_own_recipe_loads_and_goes_on(
    home: Path, trained: subprocess.CompletedProcess[str]
) -> None:
    assert trained.returncode == 0, trained.stderr
    recipe = load(home / "run" / "recipe.toml")
    assert recipe.optim.steps == 2
    assert recipe.subjects[0].token != "auto"
    assert recipe.run.out == str(home / "run")
    again = lorabooth("train", "run/recipe.toml", "--quiet", cwd=home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0].split()[0] == "adapter"
    assert again.stderr == ""


def test_another_recipe_s_run_is_not_touched(home: Path, quick: list[str], trained) -> None:
    before = (home / "run" / "adapter.safetensors").read_bytes()
    found = lorabooth(*quick, "--out", "run", "--set", "optim.lr=0.5", cwd=home)
    assert found.returncode == 2
    assert "optim.lr" in found.stderr
    assert (home / "run" / "adapter.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_moved_run_goes_on_with_its_photos_and_base_named_beside_its_recipe(
    home: Path, tiny_sd: Path, photos: Path, trained
) -> None:
    place = home / "it's elsewhere"
    for source, name in ((home / "run", "run"), (photos, "dögs"), (tiny_sd, tiny_sd.name)):
        shutil.copytree(source, place / name)
    before = (place / "run" / "metrics.jsonl").read_text("utf-8")
    longer = ("train", "run/recipe.toml", "--images", "dögs", "--base", f"./{tiny_sd.name}")
    found = lorabooth(*longer, "--set", "optim.steps=3", cwd=place)
    assert found.returncode == 0, found.stderr
    assert "going on from step 2 of 3" in found.stderr
    assert (place / "run" / "metrics.jsonl").read_text("utf-8").startswith(before)
    own = load(place / "run" / "recipe.toml")
    assert own.subjects[0].images == str(place / "dögs")
    assert own.model.base == str(place / tiny_sd.name)
    # Other photos are other photos, wherever they lie.
    next((place / "dögs").glob("*.*")).unlink()
    found = lorabooth(*longer, "--set", "optim.steps=4", cwd=place)
    assert found.returncode == 2
    assert "is gone" in found.stderr


@pytest.mark.slow
def test_a_dry_run_with_fresh_shows_the_free_folder(home: Path, quick: list[str], trained) -> None:
    found = lorabooth(*quick, "--out", "run", "--fresh", "--dry-run", cwd=home)
    assert found.returncode == 0, found.stderr
    assert "written to run-2" in found.stdout
    found = lorabooth(*quick, "--out", "run", "--dry-run", "--set", "optim.lr=0.5", cwd=home)
    assert found.returncode == 2
    assert "optim.lr" in found.stderr


def test_images_beside_a_recipe_of_several_subjects_is_not_guessed(home: Path, photos: Path, trained) -> None:
    found = lorabooth(
        *("train", "run/recipe.toml", "--images", photos, "--set", f"subjects.1.images={photos}"),
        *("--set", "subjects.1.noun=cat", "--set", "subjects.1.token=qrs", "--dry-run"),
        cwd=home,
    )
    assert found.returncode == 2
    assert "several subjects" in found.stderr


@pytest.mark.slow
def test_sampling_a_strength_sweep(home: Path, tiny_sd: Path, trained) -> None:
    found = lorabooth(
        *("sample", "--base", tiny_sd, "--adapter", "run/adapter.safetensors:0.8", "--prompt", "a dog"),
        *("--seeds", "0-1", "--strengths", "0,1", "--steps", "1", "--out", "samples"),
        cwd=home,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("4 images in samples\n")
    assert (home / "samples" / "grid.png").is_file()
    assert len(list((home / "samples").glob("*.png"))) == 5


def test_no_photos_is_exit_code_3_and_no_base_is_4(home: Path, tiny_sd: Path, photos: Path) -> None:
    (home / "empty").mkdir()
    found = lorabooth("train", "--base", tiny_sd, "--images", "empty", "--noun", "dog", cwd=home)
    assert found.returncode == 3
    assert "empty" in found.stderr
    found = lorabooth("train", "--base", "./none", "--images", photos, "--noun", "dog", cwd=home)
    assert found.returncode == 4
    assert "none" in found.stderr
    assert "Traceback" not in found.stderr
