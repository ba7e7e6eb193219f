"""What is wrong with a command for many subjects is one message and a code; a dry run writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lorabooth.cli.app import app
from tests.tiny import make_photos


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    make_photos(tmp_path / "subjects" / "rex", 2)
    (tmp_path / "subjects" / "rex" / "class.txt").write_text("dog")
    return tmp_path / "subjects"


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd: Path) -> Path:
    """Without a subject: every subject of the folder is one."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model.base = "{tiny_sd}"\noptim.steps = 2\nprior.count = 3\nevaluation.clip = "pocket"\n'
    )
    return path


def protocol(subjects: Path, recipe: Path, *words: str) -> Result:
    options = ["--subjects", str(subjects), "--recipe", str(recipe)]
    return CliRunner().invoke(app, ["evaluate", "protocol", *options, *words])


def test_a_dry_run_counts_and_writes_nothing(subjects: Path, recipe: Path, tmp_path: Path) -> None:
    make_photos(subjects / "max", 2)
    words = ["--nouns", "max=mug", "--out", str(tmp_path / "out"), "--dry-run"]
    found = protocol(subjects, recipe, *words)
    assert found.exit_code == 0, found.output
    assert "2 trainings of 2 steps = 4 steps" in found.stdout
    # 25 prompts x 4, the class x 16, 8 unrelated prompts x 2; with and without the adapter.
    assert f"{2 * 2 * (25 * 4 + 16 + 8 * 2)} images" in found.stdout
    assert "6 class images" in found.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_pocketbench(tmp_path: Path) -> None:
    words = ["evaluate", "pocketbench", "--quick", "--dry-run", "--out", str(tmp_path / "bench")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "4 trainings of 120 steps" in found.stdout
    assert not (tmp_path / "bench").exists()


def test_wrong_commands(subjects: Path, recipe: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("a dog in the snow\n")
    (tmp_path / "bare").mkdir()
    make_photos(tmp_path / "unknown" / "thing", 1)
    cases = [
        (subjects, tmp_path / "none.toml", [], 2, "no such recipe file"),
        (tmp_path / "nowhere", recipe, [], 3, "cannot be listed"),
        (tmp_path / "bare", recipe, [], 3, "no folders in"),
        (tmp_path / "unknown", recipe, [], 3, "nobody says what these subjects are: thing"),
        (subjects, recipe, ["--only", "max"], 2, "no subject max"),
        (subjects, recipe, ["--nouns", "rex"], 2, "write NAME=NOUN"),
        (subjects, recipe, ["--device", "abacus"], 2, "use auto, cpu or cuda"),
        (subjects, recipe, ["--prompts", str(tmp_path / "prompts.txt")], 2, "line 1"),
        (subjects, recipe, ["--set", "subjects.0.captions=true"], 2, "captions"),
        (subjects, recipe, ["--set", "model.base=./nothing"], 4, "nothing"),
        (subjects, recipe, ["--dino", str(tmp_path / "bare")], 2, "dino"),
    ]
    for place, file, words, code, told in cases:
        found = protocol(place, file, "--out", out, *words)
        assert (found.exit_code, told in found.stderr) == (code, True), (words, found.output)
        assert found.stderr.count("error: ") == 1
        assert not any(Path(out).glob("rex*"))


def test_a_subject_without_photos_is_told_with_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "subjects" / "rex").mkdir(parents=True)
    (tmp_path / "subjects" / "rex" / "class.txt").write_text("dog")
    found = protocol(tmp_path / "subjects", recipe, "--out", str(tmp_path / "out"))
    assert found.exit_code == 3, found.output
    assert "rex: rex: no photos in this folder" in found.stderr
    assert "rex: failed: rex: no photos" in (tmp_path / "out" / "protocol.md").read_text("utf-8")


def test_an_out_folder_that_holds_something_else(subjects: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    found = protocol(subjects, recipe, "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert "holds no protocol" in found.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
