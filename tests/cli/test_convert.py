"""`lorabooth convert`: what it prints, its exit codes, and that it needs no model library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorabooth.cli.convert import convert

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"

app = typer.Typer()
app.command()(convert)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    tensors = {}
    for name, rank, alpha in ((UNET, 8, 4.0), (TEXT, 4, 4.0)):
        tensors[f"{name}.lora_down.weight"] = torch.ones(rank, 768, dtype=torch.float16)
        tensors[f"{name}.lora_up.weight"] = torch.ones(320, rank, dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    path = tmp_path / "dög.safetensors"
    save_file(tensors, path, {"ss_base_model_version": "sd_v1"})
    return path


def test_what_it_was_and_what_was_written(dog, tmp_path):
    out = tmp_path / "out"
    found = run(dog, "--to", "diffusers", "--out", out, "--quiet")
    assert found.exit_code == 0, found.output
    written = out / "pytorch_lora_weights.safetensors"
    size = written.stat().st_size / 1000
    assert found.stdout.splitlines() == [
        "from  kohya, sd1, 2 modules of denoiser, text_encoder, rank 4-8, fp16",
        f"to    diffusers, {size:.1f} kB",
        f"file  {written}",
    ]
    again = run(dog, "--to", "diffusers", "--out", out)
    assert again.exit_code == 5
    assert "exists already; --overwrite" in again.stderr
    assert run(dog, "--to", "kohya", "--out", out, "--overwrite", "--dtype", "bf16").exit_code == 0
    (only,) = out.iterdir()
    assert only.name == dog.name
    assert {value.dtype for value in load_file(only).values()} == {torch.bfloat16}


def test_json(dog, tmp_path):
    out = tmp_path / "peft"
    found = run(dog, "--to", "peft", "--out", out, "--json", "--quiet")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert sorted(report["files"]) == sorted(
        str(out / component / name)
        for component in ("unet", "text_encoder")
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert (report["layout"], report["to"], report["ranks"]) == ("kohya", "peft", [4, 8])
    assert report["n_bytes"] == sum(Path(path).stat().st_size for path in report["files"])


def test_uneven_alphas_are_told(dog, tmp_path):
    tensors = load_file(dog) | {f"{UNET.replace('to_k', 'to_v')}.alpha": torch.tensor(2.0)}
    for kind in ("lora_down.weight", "lora_up.weight"):
        tensors[f"{UNET.replace('to_k', 'to_v')}.{kind}"] = tensors[f"{UNET}.{kind}"].clone()
    save_file(tensors, dog, {"ss_base_model_version": "sd_v1"})
    found = run(dog, "--to", "kohya", "--out", tmp_path / "k.safetensors")
    assert "--level-alphas" in found.stderr
    found = run(dog, "--to", "kohya", "--out", tmp_path / "l.safetensors", "--level-alphas")
    assert found.exit_code == 0
    assert "--level-alphas" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{dog}", "--to", "kohya", "--out", "{dog}", "--overwrite"], 5, "never changed"),
        (["{dog}", "--to", "peft", "--out", "{dog}2.safetensors"], 5, "Give a folder"),
        (["{dog}", "--to", "comfyui", "--out", "x"], 2, "comfyui"),
        (["nothing.safetensors", "--to", "peft", "--out", "x"], 5, "nothing.safetensors"),
        (["model.ckpt", "--to", "peft", "--out", "x"], 5, "never opened"),
        (["{dog}", "--to", "peft"], 2, "--out"),
    ],
)
def test_errors(dog, arguments, code, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = run(*(argument.replace("{dog}", str(dog)) for argument in arguments))
    assert found.exit_code == code
    assert words in found.output
    assert "Traceback" not in found.output
    assert sorted(tmp_path.rglob("*")) == before


def test_no_model_library_is_imported(dog, tmp_path):
    code = (
        "import sys, typer\n"
        "from lorabooth.cli.convert import convert\n"
        "print('torch' in sys.modules)\n"
        "app = typer.Typer(); app.command()(convert)\n"
        "app(standalone_mode=False)\n"
        "print(*{'diffusers', 'transformers', 'peft', 'accelerate', 'PIL'} & set(sys.modules), 'none')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(dog), "--to", "peft", "--out", str(tmp_path / "o"), "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = found.stdout.splitlines()
    assert lines[0] == "False"
    assert lines[-1] == "none"
