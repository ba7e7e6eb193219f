"""`lorabooth blend`: what it prints, its exit codes, and that errors write nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lorabooth.adapters import file
from lorabooth.adapters.metadata import Metadata
from lorabooth.cli.blend import blend

MODULES = ("denoiser.down_blocks.0.attentions.0.proj_in", "denoiser.mid_block.attentions.0.proj_in")
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"

app = typer.Typer()
app.command()(blend)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(path: Path, seed: int, rank: int, family: str = "sd1") -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in (*MODULES, TEXT):
        tensors[f"{module}.lora_A"] = torch.randn(rank, 20, generator=generator)
        tensors[f"{module}.lora_B"] = torch.randn(30, rank, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    file.write(path, tensors, Metadata(family=family, trigger_words=(path.stem,)), "diffusers")
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "dog.safetensors", 0, 4), write(tmp_path / "ink.safetensors", 1, 2)


def test_the_table_and_the_file(two, tmp_path):
    out = tmp_path / "mix é.safetensors"
    found = run(f"{two[0]}:0.7", f"{two[1]}:-0.5", "--method", "svd", "--rank", "3", "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0] == "svd of 2 adapters, strength 0.7, -0.5"
    assert [line.split()[:4] for line in lines[3:7]] == [
        ["down_blocks.0", "1", "2-4", "3"],
        ["mid_block", "1", "2-4", "3"],
        ["text_encoder", "1", "2-4", "3"],
        ["total", "3", "2-4", "3"],
    ]
    assert len({len(line) for line in lines[2:7]}) == 1
    assert lines[-1] == f"file  {out}"
    got = file.read(out)
    assert (got.layout, got.metadata.rank, got.metadata.trigger_words) == ("kohya", 3, ("dog", "ink"))


def test_json_has_every_module_and_only_json_is_on_stdout(two, tmp_path):
    out = tmp_path / "mix.safetensors"
    found = run(two[0], two[1], "--out", out, "--json", "--dtype", "fp16", "--layout", "diffusers")
    report = json.loads(found.stdout)
    assert (report["method"], report["strengths"], report["layout"]) == ("cat", [1.0, 1.0], "diffusers")
    assert {module["name"] for module in report["modules"]} == {*MODULES, TEXT}
    assert all(module["new_ranks"] == [6, 6] for module in report["modules"])
    assert 0 < report["total"]["relative_error"] < 1e-3
    assert report["bytes_after"] == out.stat().st_size
    assert file.read(out).tensors[f"{TEXT}.lora_A"].dtype == torch.float16


def test_the_seed_decides_dare(two, tmp_path):
    outs = [tmp_path / f"{name}.safetensors" for name in "xyz"]
    for out, seed in zip(outs, ("1", "1", "2"), strict=True):
        found = run(two[0], "--method", "dare", "--density", "0.4", "--seed", seed, "--out", out)
        assert found.exit_code == 0, found.output
    first, again, other = (out.read_bytes() for out in outs)
    assert first == again != other


def test_errors_are_one_message_and_write_nothing(two, tmp_path):
    a, b = two
    other = write(tmp_path / "xl.safetensors", 2, 4, "sdxl")
    new = tmp_path / "new.safetensors"
    before = sorted(tmp_path.iterdir())
    for arguments, code, message in [
        ([a, other, "--out", new], 5, "different families"),
        ([a, b, "--method", "ties", "--out", new], 5, "Use cat or svd"),
        ([a, b, "--out", a, "--overwrite"], 5, "one of the inputs"),
        ([a, b, "--out", other], 5, "add --overwrite"),
        ([a, tmp_path / "none.safetensors", "--out", new], 5, "none.safetensors"),
        ([a, "--rank", "3", "--out", new], 2, "only for svd"),
        ([a, "--method", "ties", "--density", "3", "--out", new], 2, "density"),
        ([f"{a}:nan", "--out", new], 2, "finite"),
        ([a, "--method", "mean", "--out", new], 2, "--method"),
        ([a], 2, "--out"),
        (["--out", new], 2, "FILE"),
    ]:
        found = run(*arguments)
        assert found.exit_code == code, (arguments, found.output)
        assert message in found.stderr
        assert (found.stdout, sorted(tmp_path.iterdir())) == ("", before)
