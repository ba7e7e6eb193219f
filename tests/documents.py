"""Running what the documents tell users to type, in a folder as the documents suppose it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from tests import forked

ROOT = Path(__file__).resolve().parent.parent


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of a document's fenced blocks of these languages, in order; those in lists too."""
    found = re.findall(
        r"^( *)```(\w+)\n(.*?)^\1```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return [(language, textwrap.dedent(code)) for _, language, code in found if language in languages]


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, a line each."""
    return [shlex.split(line) for line in code.splitlines() if line.strip()]


def run_command(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run `lorabooth ...`, or a command of the system, there; offline, its own cache."""
    env = {"LORABOOTH_CACHE": str(home / "cache")}
    if command[0] == "lorabooth":
        return forked.run(command[1:], home, env)
    env = {**os.environ, **forked.OFFLINE, **env}
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


def run_python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python block there, with two sampler steps instead of 25."""
    shorter = code.replace("num_inference_steps=25", "num_inference_steps=2")
    return run_command([sys.executable, "-c", shorter], home)


def make_adapter(path: Path, base: Path, seed: int = 0) -> Path:
    """An adapter file of a base's UNet, attention only, as if trained there."""
    import torch

    from lorabooth.adapters import file, inject
    from lorabooth.adapters.metadata import Metadata
    from tests.adapters.conftest import ATTENTION, Base

    components = Base(base).load()
    attached = inject.attach(components, [inject.Target("denoiser", (ATTENTION,), 4, 4.0)], seed=seed)
    with torch.no_grad():
        for weight in attached.up_weights():
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed + 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(path, inject.tensors(components), Metadata(family="sd1", trigger_words=("zwx dog",)))
    return path
