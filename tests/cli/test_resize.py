"""`lorabooth resize`: what it prints, its exit codes, and that errors write nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lorabooth.adapters import file
from lorabooth.cli.rank_table import error_text, size_text
from lorabooth.cli.resize import parse_size, resize
from lorabooth.errors import RecipeError
from tests.cli.test_blend import write

app = typer.Typer()
app.command()(resize)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "dog.safetensors", 0, 16)


def test_the_table_and_the_file(source, tmp_path):
    out = tmp_path / "small.safetensors"
    found = run(source, "--rank", "4", "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["block", "modules", "rank", "before", "rank", "after", "error"]
    assert lines[4].split()[:4] == ["total", "3", "16", "4"]
    assert lines[-2:] == [
        f"size  {size_text(source.stat().st_size)} -> {size_text(out.stat().st_size)}",
        f"file  {out}",
    ]
    assert file.read(out).metadata.rank == 4


@pytest.mark.parametrize("limit", ["9kB", "0.008 MB", "9000"])
def test_the_size_is_kept(source, tmp_path, limit):
    out = tmp_path / "small.safetensors"
    found = run(source, "--max-size", limit, "--out", out, "--json")
    report = json.loads(found.stdout)
    assert report["bytes_after"] == out.stat().st_size <= parse_size(limit) < source.stat().st_size
    assert report["total"]["new_ranks"][1] > 1


def test_energy(source, tmp_path):
    out = tmp_path / "small.safetensors"
    found = run(source, "--energy", "0.9", "--out", out, "--json", "--dtype", "bf16")
    report = json.loads(found.stdout)
    assert 0.1 < report["total"]["relative_error"] <= 0.1**0.5 + 1e-3
    assert report["total"]["new_ranks"][1] < 16


def test_errors_are_one_message_and_write_nothing(source, tmp_path):
    new = tmp_path / "new.safetensors"
    for arguments, code, message in [
        ([source, "--out", new], 2, "exactly one of --rank"),
        ([source, "--rank", "2", "--energy", "0.5", "--out", new], 2, "exactly one of --rank"),
        ([source, "--rank", "0", "--out", new], 2, "--rank"),
        ([source, "--energy", "95", "--out", new], 2, "such as 0.95"),
        ([source, "--max-size", "big", "--out", new], 2, "such as 20MB"),
        ([source, "--max-size", "1kB", "--out", new], 5, "cannot be as small as 1,000 bytes"),
        ([source, "--rank", "2", "--out", source, "--overwrite"], 5, "one of the inputs"),
        ([source, "--rank", "2", "--out", tmp_path / "new.pt"], 5, "ends in .safetensors"),
        ([tmp_path / "none.safetensors", "--rank", "2", "--out", new], 5, "none.safetensors"),
    ]:
        found = run(*arguments)
        assert found.exit_code == code, (arguments, found.output)
        assert message in found.stderr
        assert (found.stdout, list(tmp_path.iterdir())) == ("", [source])


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("20mib", 20 * 2**20), ("1.5 GB", 1_500_000_000), ("800k", 800_000), ("77", 77)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "20TB", "1e6", "0", "0.0001kB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(RecipeError, match="--max-size"):
        parse_size(text)


def test_numbers_are_written_short():
    assert [size_text(n) for n in (0, 999, 1000, 20_000_000, 6_900_000_000)] == [
        *("0 B", "999 B", "1.0 kB", "20.0 MB", "6.90 GB"),
    ]
    assert [error_text(e) for e in (0.0, 3.2e-7, 0.1234)] == ["0", "3e-07", "12.34 %"]
