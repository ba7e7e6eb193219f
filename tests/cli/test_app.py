"""The command line as a process: exit codes, one message on stderr, no traceback unless asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorabooth", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | environment,
    )


def test_version_and_help() -> None:
    version = run("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "lorabooth")
    bare = run("--help")
    assert bare.returncode == 0
    for name in ("train", "sample", "demo", "doctor", "pocket"):
        assert name in bare.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "give a recipe file, or --base, --images, --noun are needed"),
        (["train", "--base", "pocket"], "without a recipe, --images, --noun are needed"),
        (["train", "r.toml", "--noun", "dog"], "give a recipe or --noun, not both"),
        (["train", "none.toml"], "none.toml: there is no such recipe file"),
        (
            ["train", "--base", "pocket", "--images", "x", "--noun", "dog", "--set", "lr=3"],
            "`lr` belongs to [optim]",
        ),
        (
            ["train", "--base", "pocket", "--images", "x", "--noun", "dog", "--steps", "0"],
            "optim.steps: 0 is not",
        ),
        (["trian"], "No such command"),
        (["sample", "--prompt", "a"], "Missing option"),
        (
            ["sample", "--base", "pocket", "--prompt", "a", "--out", "o", "--seeds", "a"],
            "--seeds a: write whole",
        ),
        (
            ["sample", "--base", "pocket", "--prompt", "a", "--out", "o", "--strengths", "1"],
            "needs an --adapter",
        ),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(arguments: list[str], expected: str) -> None:
    found = run(*arguments)
    assert found.returncode == 2
    assert expected in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


def test_all_mistakes_of_a_recipe_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "r é.toml"
    file.write_text("[optim]\nlr = '1'\n[adapter]\nrank = 0\n", encoding="utf-8")
    found = run("train", file)
    assert found.returncode == 2
    lines = found.stderr.splitlines()
    assert lines[0] == f"error: {file}: 3 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["adapter.rank", "optim.lr", "subjects"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    found = run("--debug", "train", tmp_path / "none.toml")
    assert found.returncode != 0
    assert "Traceback" in found.stderr


def test_a_missing_adapter_is_exit_code_5(tmp_path: Path) -> None:
    found = run(
        "sample", "--base", "pocket", "--adapter", "a.safetensors:0.5", "--prompt", "x", "--out", tmp_path
    )
    assert found.returncode == 5
    assert found.stderr.startswith("error: there is no adapter file a.safetensors\n")


DEFECT = """
import sys
import lorabooth.cli.app as app
import lorabooth.recipe as r
sys.argv = ["lorabooth", "train", "x.toml"]
"""


def _main_with_a_failing_recipe(raised: str, *, before: str = "") -> subprocess.CompletedProcess[str]:
    """The real `main` where reading a recipe raises what a defect or a full machine would raise."""
    code = f"{DEFECT}{before}\ndef load(*_):\n    raise {raised}\nr.load = load\napp.main()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_defect_is_two_lines_and_exit_code_1() -> None:
    found = _main_with_a_failing_recipe("ZeroDivisionError('no such\\nluck')")
    assert found.returncode == 1
    assert found.stderr.startswith("error: ZeroDivisionError: no such\n")
    assert "--debug" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "raised",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')",
        "MemoryError()",
    ],
)
def test_a_lack_of_memory_is_exit_code_6_and_says_what_to_try(raised: str) -> None:
    found = _main_with_a_failing_recipe(raised, before="import torch" if "torch" in raised else "")
    assert found.returncode == 6
    assert found.stderr.startswith("error: memory ran out")
    assert "memory.checkpointing=true" in found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_is_exit_code_130() -> None:
    slow = "import time\ndef load(*_):\n    print('ready', flush=True)\n    time.sleep(30)\n"
    code = f"{DEFECT}{slow}r.load = load\napp.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.startswith("error: interrupted")


def test_libraries_say_nothing_when_they_are_imported() -> None:
    code = "import lorabooth, lorabooth.api, lorabooth.protocol.run, bitsandbytes"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_output_into_a_closed_pipe_is_no_defect() -> None:
    command = f"{sys.executable} -m lorabooth doctor --json | head -c 5"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    assert "defect" not in found.stderr
