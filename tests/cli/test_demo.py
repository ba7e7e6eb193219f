"""`lorabooth demo` of two steps: everything that the whole one leaves behind is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorabooth.cli.app import app

QUICK = [
    "--steps", "2", "--set", "prior.count=2", "--set", "prior.sampler_steps=1",
    "--set", "run.sample_count=1", "--set", "run.checkpoint_every=1", "--set", "optim.batch_size=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    home = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORABOOTH_CACHE", str(home / "cache"))
        return home / "run", CliRunner().invoke(app, ["demo", "--out", str(home / "run"), *QUICK])


def test_the_table_is_printed_beside_the_real_photos(shown: tuple[Path, Result]) -> None:
    run, result = shown
    assert result.exit_code == 0, result.output
    for title in ("DINO", "CLIP-T", "PRES", "DIV", "real images", "adapter off", "adapter on"):
        assert title in result.stdout
    assert f"in one picture: {run / 'story.png'}" in result.stdout


def test_its_run_is_measured_chosen_and_reported(shown: tuple[Path, Result]) -> None:
    run, _ = shown
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert found["backbones"]["dino"] != "not available"
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "PRES" in report
    assert "evaluation.html" in report
    # Of the whole run, whichever checkpoint was chosen.
    assert "<dt>steps</dt><dd>2</dd>" in report
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["selection"]["chosen"] in (1, 2)
    assert (run / "story.png").stat().st_size > 5_000


def test_it_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    words = ["demo", "--out", str(tmp_path / "run"), *QUICK, "--no-evaluate", "--set", "run.select=last"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert "DINO" not in result.stdout
