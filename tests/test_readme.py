"""Every command and every Python block of the README runs, in order, as a new user would type them.

What the README supposes (a checkpoint in models/sd15, photos in photos/dog) is put there: a tiny base.
Steps and class images are cut down by overrides; nothing else is changed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_photos, make_sd_folder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["--set", "optim.steps=2", "--set", "prior.count=2", "--set", "prior.sampler_steps=2"]
SHORT += ["--set", "run.sample_count=1", "--set", "run.sample_every=0"]
# In Python there is no --set: the same, on the recipe that was read.
SHORT_PYTHON = f"recipe = __import__('lorabooth').recipe.with_overrides(recipe, {SHORT[1::2]!r})"


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every shell command."""
    return [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README supposes it."""
    home = tmp_path_factory.mktemp("home")
    make_sd_folder(home / "models" / "sd15")
    make_photos(home / "photos" / "dog")
    shutil.copytree(ROOT / "recipes", home / "recipes")
    demo = Path("lorabooth/pocket/demo/photos")
    shutil.copytree(ROOT / demo, home / demo)
    return home


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run it there, offline, with a cache of its own."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LORABOOTH_CACHE": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {command[0] for command in commands()} == {"make", "lorabooth"}
    assert len(blocks("python")) == 3


@pytest.mark.parametrize("target", [command[1] for command in commands() if command[0] == "make"])
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"demo": "lorabooth demo", "test": "pytest"}[target] in done.stdout


def test_commands_and_python_run_in_order(home: Path) -> None:
    for command in commands():
        if command[0] != "lorabooth":
            continue
        words = command[1:] + (SHORT if command[1] == "train" else [])
        done = run([sys.executable, "-m", "lorabooth", *words], home)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        if "--out" in command and command[1] == "train":
            out = home / command[command.index("--out") + 1]
            assert (out / "adapter.safetensors").is_file(), shlex.join(command)
            assert (out / "report.html").is_file(), shlex.join(command)
        elif command[1] == "sample":
            assert (home / command[command.index("--out") + 1] / "grid.png").is_file()
    for block in blocks("python"):
        code = re.sub(r"(recipe = .*\n)", rf"\1{SHORT_PYTHON}\n", block).replace(
            "num_inference_steps=25", "num_inference_steps=2"
        )
        done = run([sys.executable, "-c", code], home)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert (home / "runs/dog/peft/unet/adapter_config.json").is_file()
