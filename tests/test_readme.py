"""Every command and every Python block of the README runs, in order, as a new user would type them.

What the README supposes (a checkpoint in models/sd15, photos in photos/dog) is put there: a tiny base.
Steps and class images are cut down by overrides; nothing else is changed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, commands, make_adapter, run_command, run_python
from tests.tiny import make_photos, make_sd_folder

README = ROOT / "README.md"
SHORT = ["--set", "optim.steps=2", "--set", "prior.count=2", "--set", "prior.sampler_steps=2"]
SHORT += ["--set", "run.sample_count=1", "--set", "run.sample_every=0"]
FEW_IMAGES = ["--images-per-prompt", "1", "--class-images", "1", "--unrelated-images", "0", "--steps", "1"]
# In Python there is no --set: the same, on the recipe that was read.
SHORT_PYTHON = f"recipe = __import__('lorabooth').recipe.with_overrides(recipe, {SHORT[1::2]!r})"


def readme_commands() -> list[list[str]]:
    """Every shell command of the README."""
    return [command for _, code in blocks(README, "sh") for command in commands(code)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README supposes it."""
    home = tmp_path_factory.mktemp("home")
    make_adapter(home / "loras" / "style.safetensors", make_sd_folder(home / "models" / "sd15"), seed=3)
    make_photos(home / "photos" / "dog")
    shutil.copytree(ROOT / "recipes", home / "recipes")
    demo = Path("lorabooth/pocket/demo/photos")
    shutil.copytree(ROOT / demo, home / demo)
    return home


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {command[0] for command in readme_commands()} == {"make", "lorabooth"}
    assert len(blocks(README, "python")) == 2


@pytest.mark.parametrize("target", [command[1] for command in readme_commands() if command[0] == "make"])
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"demo": "lorabooth demo", "test": "pytest"}[target] in done.stdout


def test_commands_and_python_run_in_order(home: Path) -> None:
    for command in readme_commands():
        if command[0] != "lorabooth":
            continue
        words = command[1:] + (SHORT if command[1] == "train" else [])
        words += FEW_IMAGES if command[1] == "evaluate" and command[2] != "compare" else []
        done = run_command(["lorabooth", *words], home)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        if "--out" in command and command[1] == "train":
            out = home / command[command.index("--out") + 1]
            assert (out / "adapter.safetensors").is_file(), shlex.join(command)
            assert (out / "report.html").is_file(), shlex.join(command)
        elif command[1] == "sample":
            assert (home / command[command.index("--out") + 1] / "grid.png").is_file()
    for _, block in blocks(README, "python"):
        code = re.sub(r"(recipe = .*\n)", rf"\1{SHORT_PYTHON}\n", block)
        done = run_python(code, home)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    written = ["converted/dog/pytorch_lora_weights.safetensors", "models/sd15-again/unet/config.json"]
    written += [
        "mix.safetensors",
        "small.safetensors",
        "extracted.safetensors",
        "models/pocket-mug/model_index.json",
    ]
    assert all((home / name).is_file() for name in written)
