"""Exit codes and text of `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from lorabooth.cli import check as cli

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(cli.check)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "dog.safetensors", STEM)


def write(path: Path, *stems: str, value: float = 1.0) -> Path:
    tensors = {}
    for stem in stems:
        tensors[f"{stem}.lora_down.weight"] = torch.ones(4, 32)
        tensors[f"{stem}.lora_up.weight"] = torch.full((32, 4), value)
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


def test_sound_is_0(adapter: Path, tiny_sd: Path) -> None:
    result = run(str(adapter), "--base", str(tiny_sd), "--quiet")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "dog.safetensors: LoRA, 1 module, 3 tensors read",
        f"base: {tiny_sd.name} (sd1), 1 of 1 modules fit",
        "sound",
    ]
    assert not result.stderr


def test_broken_is_5_with_one_message(tmp_path: Path) -> None:
    result = run(str(write(tmp_path / "nan.safetensors", STEM, value=float("nan"))), "--quiet")
    assert result.exit_code == 5
    assert result.stderr.startswith("error: nan.safetensors: 1 tensor holds NaN or infinity: ")
    assert "sound" not in result.stdout


def test_several_problems_are_one_message(tmp_path: Path, tiny_sd: Path) -> None:
    absent = STEM.replace("blocks_0", "blocks_9", 1)
    path = write(tmp_path / "a.safetensors", STEM, absent, value=float("inf"))
    result = run(str(path), "--base", str(tiny_sd), "--quiet")
    assert result.exit_code == 5
    lines = result.stderr.splitlines()
    assert lines[0] == "error: a.safetensors has 2 problems:"
    assert "2 tensors hold NaN or infinity" in lines[1]
    assert "1 of 2 modules are not in the base: 'denoiser.down_blocks.9." in lines[2]


def test_a_bad_base_is_4(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run(str(adapter), "--base", str(tmp_path / "empty"), "--quiet").exit_code == 4


def test_absent_file_is_5(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nothing.safetensors"), "--quiet")
    assert result.exit_code == 5
    assert "no such file" in result.stderr


def test_json_lists_all_names_and_exits_5_all_the_same(tmp_path: Path, tiny_sd: Path) -> None:
    stems = [STEM.replace("attentions_0", f"attentions_{i}") for i in range(3, 15)]
    path = write(tmp_path / "a.safetensors", *stems)
    result = run(str(path), "--base", str(tiny_sd), "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 5
    assert facts["sound"] is False
    assert [problem["code"] for problem in facts["problems"]] == ["unmatched"]
    assert len(facts["problems"][0]["names"]) == 12
    assert "and 7 more" in result.stderr


def test_a_dead_adapter_is_a_warning(tmp_path: Path) -> None:
    result = run(str(write(tmp_path / "a.safetensors", STEM, value=0.0)), "--quiet")
    assert result.exit_code == 0
    assert "warning: lora_B is zero in 1 of 1 modules" in result.stdout


def test_the_base_may_be_pocket() -> None:
    weights = Path(__file__).parents[2] / "lorabooth" / "pocket" / "weights"
    assert run(str(weights), "--base", "pocket", "--quiet").exit_code == 5  # a base is no adapter
    assert run("nothing.safetensors", "--base", "nowhere", "--quiet").exit_code == 4
