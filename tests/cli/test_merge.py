"""`lorabooth merge` and `extract` as a user types them: texts, JSON, exit codes; errors write nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorabooth import exchange
from lorabooth.adapters.merge_match import Merging
from lorabooth.cli.app import app
from lorabooth.cli.merge import report_text
from tests.documents import make_adapter
from tests.families.ldm import make_single_file

UNET = "unet/diffusion_pytorch_model.safetensors"


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def adapter(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "dog.safetensors", tiny_sd)


def test_merge_says_what_changed(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(
        "merge", "--base", tiny_sd, "--adapter", f"{adapter}:0.5", "--out", tmp_path / "out", "--quiet"
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("merged    32 weights of sd1 in 0:0")
    assert lines[1].startswith("change    mean ")
    assert lines[2] == "rounding  to fp32: nothing lost"
    assert lines[3].startswith(f"written   {tmp_path / 'out'} (")
    assert (tmp_path / "out" / UNET).is_file()


def test_a_long_wait_for_the_disk_is_told_apart(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    report = exchange.merge(tiny_sd, [Merging(adapter)], tmp_path / "out")
    short, long = (replace(report, seconds=9.0, waited_s=waited_s) for waited_s in (0.4, 5.0))
    assert report_text(short).splitlines()[0] == "merged    32 weights of sd1 in 0:09"
    assert report_text(long).splitlines()[0] == "merged    32 weights of sd1 in 0:09, 0:05 of it for the disk"


def test_merge_as_json_and_in_half_precision(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    full = make_single_file(tiny_sd, tmp_path / "full.safetensors")
    half = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(full).items()}, half)
    out = tmp_path / "folder that is new" / "out.safetensors"
    result = run("merge", "--base", half, "--adapter", adapter, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["n_modules"] == len(facts["modules"]) == 32
    assert facts["dtypes"] == ["F16"]
    assert 0 < facts["mean_rounding"] < 0.1
    assert 0 <= facts["waited_s"] <= facts["seconds"]
    assert facts["n_bytes"] == out.stat().st_size == half.stat().st_size
    assert not result.stderr


def test_blocks_and_reverse(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    options = ["--adapter", adapter, "--block", "up_blocks=0", "--block", "mid_block=2", "--quiet"]
    assert run("merge", "--base", tiny_sd, *options, "--out", tmp_path / "a").exit_code == 0
    assert (
        run("merge", "--base", tmp_path / "a", *options, "--reverse", "--out", tmp_path / "b").exit_code == 0
    )
    before, merged, after = (load_file(folder / UNET) for folder in (tiny_sd, tmp_path / "a", tmp_path / "b"))
    key = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(before[key], merged[key])
    assert not torch.equal(
        before[key.replace("up_blocks.1", "mid_block")], merged[key.replace("up_blocks.1", "mid_block")]
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--base", "nowhere", "--adapter", "ADAPTER", "--out", "OUT"], 4, "no such base model"),
        (["--base", "model.ckpt", "--adapter", "ADAPTER", "--out", "OUT"], 4, "pickle"),
        (["--base", "BASE", "--adapter", "nothing.safetensors", "--out", "OUT"], 5, "cannot be read"),
        (["--base", "BASE", "--adapter", "ADAPTER", "--out", "BASE", "--overwrite"], 5, "one of the inputs"),
        (["--base", "BASE", "--adapter", "ADAPTER", "--out", "out.safetensors"], 5, "must be a folder"),
        (
            ["--base", "BASE", "--adapter", "ADAPTER", "--out", "OUT", "--block", "up_blocks"],
            2,
            "NAME=STRENGTH",
        ),
        (["--base", "BASE", "--adapter", "ADAPTER", "--out", "OUT", "--block", "x=1"], 5, "no part 'x'"),
        (["--base", "BASE", "--adapter", "ADAPTER:nan", "--out", "OUT"], 2, "finite"),
        (["--base", "BASE", "--out", "OUT"], 2, "--adapter"),
    ],
)
def test_a_slip_is_one_message(
    options: list[str], code: int, message: str, tiny_sd: Path, adapter: Path, tmp_path: Path
) -> None:
    known = {"BASE": str(tiny_sd), "OUT": str(tmp_path / "out")}
    words = [known.get(word, word.replace("ADAPTER", str(adapter))) for word in options]
    result = run("merge", *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_extract_says_what_is_lost_and_merges_back(tiny_sd: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", "--base", tiny_sd, "--adapter", adapter, "--out", tmp_path / "tuned").exit_code == 0
    options = [
        "--base",
        tiny_sd,
        "--tuned",
        tmp_path / "tuned",
        "--out",
        tmp_path / "e.safetensors",
        "--quiet",
    ]
    result = run("extract", *options, "--rank", "2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["block", "modules", "rank", "before", "rank", "after", "error"]
    assert any(
        line.startswith("error  ") and "of the whole change is not in the adapter" in line for line in lines
    )
    assert run("extract", *options, "--rank", "2").exit_code == 5  # it exists
    assert run("extract", *options, "--rank", "0").exit_code == 2
    assert run("extract", *options, "--rank", "4", "--energy", "2", "--overwrite").exit_code == 2
    result = run("extract", *options, "--rank", "4", "--overwrite", "--json")
    assert json.loads(result.stdout)["relative_error"] < 1e-5
    back = ["merge", "--base", tiny_sd, "--adapter", tmp_path / "e.safetensors", "--out", tmp_path / "back"]
    assert run(*back).exit_code == 0
    tuned, again = load_file(tmp_path / "tuned" / UNET), load_file(tmp_path / "back" / UNET)
    torch.testing.assert_close(again, tuned, rtol=0, atol=1e-6)
