"""`lorabooth plan` as a user runs it: what it prints, how it ends, and that it reads no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks.published import write_config_folder
from lorabooth.cli.app import app
from lorabooth.recipe import load
from tests.documents import ROOT
from tests.tiny import write_tokenizer

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PACKAGED = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15", "pocket": "pocket"}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)], env={"COLUMNS": "110"})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A recipe on the tiny base, without photos, class images and samples."""
    file = tmp_path_factory.mktemp("plans") / "r.toml"
    text = f'[model]\nbase = "{tiny_sd}"\n[[subjects]]\nimages = "none-yet"\nnoun = "dog"\n'
    file.write_text(text + '[prior]\nmode = "none"\n[run]\nsample_count = 0\n', encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5 by its configs: no weight is there."""
    folder = write_config_folder(tmp_path_factory.mktemp("bases") / "sd15", "sd15")
    write_tokenizer(folder / "tokenizer")
    assert not list(folder.rglob("*.safetensors"))
    return folder


def test_a_table_with_its_peak_and_a_verdict(written: Path) -> None:
    done = run(written, "--vram", "8GiB")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny-sd1 (sd1), 64 px, 1 subject example, rank ")
    assert lines[1] == "a card of 8.0 GiB, of which 538 MiB are left alone"
    assert sum("◀ peak" in line for line in lines) == 1
    assert any(line.startswith("fits 8.0 GiB as it stands: peak 52") for line in lines)
    assert any("none-yet is not there yet" in line for line in lines)


def test_json_and_this_machine(written: Path) -> None:
    done = run(written, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    read = json.loads(done.stdout)
    assert read["fits"] is True
    assert read["planned"]["device"]["kind"] == "cpu"
    assert {phase["name"] for phase in read["planned"]["phases"]} == {"caching", "training", "saving"}
    assert all(sum(phase["at_peak"].values()) == phase["peak_bytes"] for phase in read["planned"]["phases"])
    assert read["missing_photos"] == [str(written.parent / "none-yet")]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--vram", "8GiB", "--device", "0"], "Give one of them"),
        (["--vram", "8"], "--vram: '8' is no size"),
        (["--device", "99"], "--device 99: this machine has no such device"),
        (["--set", "memory.checkpoint_blocks=3"], "memory.checkpointing is false"),
        (["--set", "memory.budget=8GiB"], "only used with memory.fit = true"),
    ],
)
def test_bad_options_are_one_message(written: Path, options: list[str], told: str) -> None:
    done = run(written, *options)
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_nothing_fits_the_context_alone(written: Path) -> None:
    done = run(written, "--vram", "300MiB")
    assert done.exit_code == 6
    assert "◀ peak" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert told[0] == (
        "error: CUDA takes 520 MiB for itself, before anything is loaded; 157 MiB of 300 MiB can be used "
        "(a card of 300 MiB)."
    )


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[model]\nbase = "./none"\n[[subjects]]\nimages = "a"\nnoun = "dog"\n', encoding="utf-8")
    assert run(file, "--vram", "8GiB").exit_code == 4


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_planned(file: Path, tmp_path: Path, sd15: Path) -> None:
    """On the published configs of its base, for a card of 8 GiB."""
    base = load(file).model.base
    place = {"sd15": sd15, "pocket": "pocket"}.get(PACKAGED.get(base, ""))
    if place is None:
        place = write_config_folder(tmp_path / "sd21", "sd21")
    done = run(file, "--vram", "8GiB", "--set", f"model.base={place}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vram", "techniques"),
    [("12GiB", []), ("8GiB", []), ("6GiB", []), ("4GiB", ["checkpointing"])],
)
def test_sd15_on_cards(sd15: Path, vram: str, techniques: list[str]) -> None:
    done = run(
        ROOT / "recipes" / "sd15-subject.toml", "--vram", vram, "--set", f"model.base={sd15}", "--json"
    )
    assert done.exit_code == 0, done.output
    chosen = json.loads(done.stdout)["chosen"]
    assert [each["name"].split(",")[0] for each in chosen] == techniques
    assert all(each["saved_bytes"] > 0 for each in chosen)


@pytest.mark.slow
def test_sd15_does_not_fit_1_gib(sd15: Path) -> None:
    done = run(ROOT / "recipes" / "sd15-subject.toml", "--vram", "1GiB", "--set", f"model.base={sd15}")
    assert done.exit_code == 6
    assert "of 1.0 GiB can be used" in done.stderr
    assert "Even at 256 px it takes" in done.stderr
