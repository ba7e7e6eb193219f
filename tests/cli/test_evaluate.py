"""`lorabooth evaluate` as a user runs it, on a real run of a few steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorabooth.cli.app import app
from lorabooth.protocol.results import Evaluation
from tests.protocol.conftest import encoder, evaluated, trained_run  # noqa: F401 (fixtures)

SMALL = ["--images-per-prompt", "2", "--class-images", "2", "--unrelated-images", "0", "--steps", "1"]


def lorabooth(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "two.txt"
    file.write_text("a photo of a {token} {noun} in the snow\na painting of a {0} {1}\n")
    return file


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("cli") / "run"))


@pytest.fixture(scope="module")
def shown(run: Path, prompts: Path, encoder: Path) -> Result:  # noqa: F811
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    return lorabooth("evaluate", run, "--prompts", prompts, *SMALL, "--dino", encoder)


def test_a_run_is_measured_and_a_table_shown(shown: Result, run: Path) -> None:
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    for row in ("real images", "adapter off", "adapter on"):
        assert any(line.strip().startswith(row) for line in lines), shown.stdout
    assert "DINO ↑" in shown.stdout
    assert "the pocket CLIP" in shown.stdout
    assert lines[-2:] == [f"numbers  {run / 'evaluation.json'}", f"page     {run / 'evaluation.html'}"]
    assert "12 images of 64 px to draw, 1 step each, on cpu" in shown.stderr
    assert (run / "evaluation.html").is_file()


def test_again_and_as_json_nothing_is_drawn_and_stdout_is_the_file(
    shown: Result,
    run: Path,
    prompts: Path,
    encoder: Path,  # noqa: F811
) -> None:
    again = lorabooth("evaluate", "run", run, "--prompts", prompts, *SMALL, "--dino", encoder, "--json")
    assert again.exit_code == 0, again.output
    assert "all 12 images are there already" in again.stderr
    assert json.loads(again.stdout) == json.loads((run / "evaluation.json").read_text("utf-8"))


def test_compare_prints_differences_in_three_forms(shown: Result, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    raw = json.loads((other / "evaluation.json").read_text("utf-8"))
    (other / "evaluation.json").write_text(json.dumps({**raw, "run": "other"}), "utf-8")
    table = lorabooth("evaluate", "compare", run, other)
    assert table.exit_code == 0, table.output
    assert "other − run" in table.stdout
    marked = lorabooth("evaluate", "compare", run, other / "evaluation.json", "--markdown")
    assert "| other − run | 0.000 (0.00…0.00) |" in marked.stdout.replace("+0.00", "0.00")
    raw = json.loads(lorabooth("evaluate", "compare", run, other, "--json").stdout)
    assert raw["runs"] == ["run", "other"]
    assert raw["subjects"][0]["differences"][0]["dino"]["mean"] == 0
    assert lorabooth("evaluate", "compare", run, other, "--json", "--markdown").exit_code == 2


def test_runs_that_were_asked_different_things_are_not_compared(
    shown: Result,
    run: Path,
    evaluated: Evaluation,  # noqa: F811
) -> None:
    found = lorabooth("evaluate", "compare", run, evaluated.path)
    assert found.exit_code == 2
    assert "cannot be compared" in found.stderr
    assert "unrelated" in found.stderr


def test_mistakes_are_one_message_and_an_exit_code(run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("a dog\n")
    for words, code, told in (
        ((tmp_path,), 2, "is no run folder"),
        ((run, "--prompts", bad), 2, "line 1"),
        ((run, "--images", tmp_path / "none"), 3, "none"),
        ((run, "--base", tmp_path / "none"), 4, "there is no such base model"),
        ((run, "--dino", tmp_path / "none"), 2, "evaluation.dino"),
        (("compare", run), 2, "at least two"),
        ((run, "--device", "abacus"), 2, "abacus"),
    ):
        found = lorabooth("evaluate", *words)
        assert found.exit_code == code, (words, found.output)
        assert told in found.stderr
        assert "Traceback" not in found.output


def test_help_tells_of_the_run_and_of_the_subcommands() -> None:
    assert "evaluate RUN" in lorabooth("evaluate", "--help").stdout
    for name in ("run", "compare"):
        assert name in lorabooth("evaluate", "--help").stdout
    assert "--images-per-prompt" in lorabooth("evaluate", "RUN", "--help").stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_whole_images_and_the_same_command_goes_on(
    run: Path, prompts: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "lorabooth", "evaluate", str(run), "--prompts", str(prompts)]
    words += ["--images-per-prompt", "6", "--class-images", "2", "--unrelated-images", "0", "--steps", "10"]
    words += ["--out", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 300
    while not list(tmp_path.rglob("*.png")) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "images are drawn and kept" in told
    assert "goes on from there" in told
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert 0 < len(kept) < 28
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    assert not (tmp_path / "evaluation.json").exists()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 28 are there already" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
