"""How `inspect` reads in a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from lorabooth.adapters.inspection import BlockFacts, ComponentFacts, Inspection
from lorabooth.cli import inspect as cli


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(cli.inspect)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {}
    for name, scale in (("down_blocks_0_attentions_0", 1.0), ("mid_block_attentions_0", 0.5)):
        for leaf in ("q", "k", "v"):
            stem = f"lora_unet_{name}_transformer_blocks_0_attn1_to_{leaf}"
            tensors[f"{stem}.lora_down.weight"] = torch.eye(4)
            tensors[f"{stem}.lora_up.weight"] = scale * torch.eye(4)
            tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    path = tmp_path / "dog.safetensors"
    save_file(tensors, path, metadata={"ss_steps": "1200", "ss_base_model_version": "sd_v1"})
    return path


def test_text_of_an_adapter(adapter: Path) -> None:
    result = run(str(adapter))
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[:2] == ["dog.safetensors", "LoRA for Stable Diffusion 1, kohya layout"]
    assert "steps       1,200" in lines
    assert "targets     attention q k v 6" in lines
    full, half = next(line for line in lines if line.startswith("down_blocks.0")), "mid_block"
    short = next(line for line in lines if line.startswith(half))
    assert full.split()[1:5] == ["3", "4", "4", "2.00"]
    assert short.split()[1:5] == ["3", "4", "4", "1.00"]
    assert full.count("█") == cli.BAR_WIDTH
    assert short.count("█") == cli.BAR_WIDTH // 2
    assert lines[-1].endswith("all 6 modules")
    assert all(line == line.rstrip() for line in lines)


def test_json(adapter: Path) -> None:
    facts = json.loads(run(str(adapter), "--json").stdout)
    assert (facts["kind"], facts["steps"], facts["modules"]) == ("LoRA", 1200, 6)
    assert facts["targets"] == {"attention q": 2, "attention k": 2, "attention v": 2}


def test_a_file_that_cannot_be_read_is_an_adapter_s_error(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04")
    result = run(str(tmp_path / "a.ckpt"))
    assert result.exit_code == 5
    assert "pickled checkpoint" in result.stderr
    assert not result.stdout


def test_sampled_problems_and_notes_are_told() -> None:
    found = Inspection(
        name="x",
        kind="LoRA",
        is_adapter=True,
        modules=50,
        sampled=7,
        blocks=(
            BlockFacts("down_blocks.0", 25, 4, 8, -1.0, 4.0, 7, 0.0123456),
            BlockFacts("mid_block", 25, 0, 0, None, None, 0, None),
        ),
        problems=("A tensor is broken.",),
        notes=("Something was assumed.",),
    )
    text = cli.inspection_text(found, blocks=False)
    assert "sampled 7 of 50 modules" in text
    assert "4-8" in text
    assert "-1 to 4" in text
    assert "0.0123  ########################" in text
    assert "mid_block           25\n" in text
    assert "problems:\n  A tensor is broken." in text
    assert "notes:\n  Something was assumed." in text


def test_long_values_go_on_below_themselves() -> None:
    found = Inspection(name="x", kind="LoRA", is_adapter=True, tags=tuple((f"tag {i}", i) for i in range(30)))
    lines = cli.inspection_text(found).splitlines()
    assert max(map(len, lines)) <= cli.LINE_WIDTH
    below = [line for line in lines if line.startswith("               ")]
    assert len(below) >= 2


def test_components_are_aligned() -> None:
    parts = (
        ComponentFacts("unet", "UNet2DConditionModel", 686, 859_520_964, 1_719_041_928, {"F16": 859_520_964},
                       "", ("full precision",), 2),
        ComponentFacts("vae", "AutoencoderKL", 248, 83_653_863, 334_615_452, {"F32": 83_653_863},
                       "fp8", (), 1),
    )  # fmt: skip
    found = Inspection(name="base", kind="checkpoint", family="sd1", family_name="Stable Diffusion 1",
                       variant="inpainting", layout="diffusers", components=parts, ema=True)  # fmt: skip
    text = cli.inspection_text(found)
    assert "checkpoint, Stable Diffusion 1 (inpainting), diffusers layout" in text
    assert "EMA weights  yes" in text
    assert "unet           686    859.52 M  fp16    1.72 GB  UNet2DConditionModel, 2 files, also full" in text
    assert "vae            248     83.65 M  fp32   334.6 MB  AutoencoderKL, fp8" in text


@pytest.mark.parametrize(
    ("count", "text"), [(318_464, "318,464"), (85_100_000, "85.10 M"), (2_567_463_684, "2.57 B")]
)
def test_parameters(count: int, text: str) -> None:
    assert cli.parameters_text(count) == text


@pytest.mark.parametrize(("share", "text"), [(0, ""), (1, "████"), (0.5, "██"), (1 / 32, "▏")])
def test_bar(share: float, text: str) -> None:
    assert cli.bar(share, width=4) == text


def test_without_block_characters_there_are_marks(adapter: Path) -> None:
    code = (
        "import sys, typer\nfrom lorabooth.cli import inspect\napp = typer.Typer()\n"
        "app.command()(inspect.inspect)\napp()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter)],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert b"#" * cli.BAR_WIDTH in done.stdout
