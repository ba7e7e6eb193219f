"""The documents under docs/hosts: every block of them runs, in order."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.documents import ROOT, blocks, commands, make_adapter, run_command, run_python
from tests.families.ldm import make_single_file
from tests.tiny import make_sd_folder

HOSTS = ROOT / "docs" / "hosts"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in models/, as folder and as one file, and an adapter of its UNet in runs/dog."""
    home = tmp_path_factory.mktemp("home")
    folder = make_sd_folder(home / "models" / "sd15")
    make_single_file(folder, home / "models" / "v1-5.safetensors")
    make_adapter(home / "runs" / "dog" / "adapter.safetensors", folder)
    return home


@pytest.mark.parametrize("name", ["diffusers", "comfyui", "a1111", "peft"])
def test_every_block_of_a_host_runs(name: str, home: Path) -> None:
    found = blocks(HOSTS / f"{name}.md", "sh", "python")
    assert found
    for language, code in found:
        if language == "python":
            done = run_python(code, home)
            assert done.returncode == 0, f"{code}\n{done.stderr}"
            continue
        for command in commands(code):
            assert command[0] in ("lorabooth", "cp", "mkdir")
            done = run_command(command, home)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    PROMISES[name](home)


def _images(home: Path) -> None:
    snow, less, beach, merged = (Image.open(home / f"{n}.png") for n in ("snow", "less", "beach", "merged"))
    assert snow.size == less.size == beach.size == merged.size
    assert snow.tobytes() != less.tobytes()


def _same_adapter(home: Path, name: str) -> None:
    ours, theirs = (load_file(home / path) for path in ("runs/dog/adapter.safetensors", name))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _comfyui(home: Path) -> None:
    _same_adapter(home, "ComfyUI/models/loras/zwx-dog.safetensors")
    assert (home / "models/v1-5-dog.safetensors").stat().st_size == (
        home / "models/v1-5.safetensors"
    ).stat().st_size


PROMISES = {
    "diffusers": _images,
    "comfyui": _comfyui,
    "a1111": lambda home: _same_adapter(home, "stable-diffusion-webui/models/Lora/zwx-dog.safetensors"),
    "peft": lambda home: _same_adapter(home, "runs/dog/again.safetensors"),
}


def test_comfyui_s_graph_is_whole() -> None:
    """Every input names a node that is there, and image and prompt go through the LoRA node."""
    graph = json.loads((HOSTS / "comfyui-workflow.json").read_text(encoding="utf-8"))
    links = [
        (node, value[0])
        for node, body in graph.items()
        for value in body["inputs"].values()
        if isinstance(value, list)
    ]
    assert all(target in graph for _, target in links)
    assert {node for node, target in links if target == "adapter"} == {"prompt", "negative", "sampler"}
    assert graph["adapter"]["class_type"] == "LoraLoader"
    named = (HOSTS / "comfyui.md").read_text(encoding="utf-8")
    assert graph["adapter"]["inputs"]["lora_name"] in named


def test_a1111_s_body_names_the_file_that_was_copied() -> None:
    ((_, body),) = blocks(HOSTS / "a1111.md", "json")
    assert "<lora:zwx-dog:1>" in json.loads(body)["prompt"]
    assert "Lora/zwx-dog.safetensors" in (HOSTS / "a1111.md").read_text(encoding="utf-8")
