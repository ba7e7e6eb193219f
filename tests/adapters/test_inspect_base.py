"""Base models as `inspect` sees them: folders, shards and variants, single files, parts alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabooth.adapters.inspect import inspect_path
from tests.families.ldm import make_single_file


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def test_diffusers_folder(tiny_sd2: Path) -> None:
    found = inspect_path(tiny_sd2)
    parts = {part.name: part for part in found.components}
    assert (found.kind, found.family, found.layout) == ("checkpoint", "sd2", "diffusers")
    assert found.prediction == "v_prediction"
    assert parts.keys() == {"unet", "vae", "text_encoder"}
    assert parts["unet"].class_name == "UNet2DConditionModel"
    stored = load_file(tiny_sd2 / "unet" / "diffusion_pytorch_model.safetensors")
    assert parts["unet"].parameters == sum(value.numel() for value in stored.values())
    assert parts["unet"].dtypes == {"F32": parts["unet"].parameters}
    assert found.parameters == sum(part.parameters for part in found.components)
    assert not found.problems


def copy_with_shards(folder: Path, out: Path) -> Path:
    """The UNet in two shards and an fp16 variant; everything else linked."""
    out.mkdir()
    for item in folder.iterdir():
        if item.name != "unet":
            (out / item.name).symlink_to(item)
    (out / "unet").mkdir()
    (out / "unet" / "config.json").write_bytes((folder / "unet" / "config.json").read_bytes())
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    keys = sorted(stored)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    table: dict[str, str] = {}
    for name, own in zip(names, (keys[::2], keys[1::2]), strict=True):
        write(out / "unet" / name, {key: stored[key] for key in own})
        table |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": table}
    (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    half = {key: value.half() for key, value in stored.items()}
    write(out / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    return out


def test_shards_and_variants(tiny_sd: Path, tmp_path: Path) -> None:
    folder = copy_with_shards(tiny_sd, tmp_path / "base")
    whole, found = inspect_path(tiny_sd), inspect_path(folder)
    unet = next(part for part in found.components if part.name == "unet")
    assert (unet.files, unet.variants) == (2, ("fp16",))
    assert found.parameters == whole.parameters
    assert not found.problems
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert any("shards are missing" in problem for problem in inspect_path(folder).problems)


def test_a_component_s_folder(tiny_sd: Path) -> None:
    assert inspect_path(tiny_sd / "unet").kind == "UNet"
    assert inspect_path(tiny_sd / "vae").kind == "VAE"
    assert inspect_path(tiny_sd / "text_encoder").kind == "text encoder"


def test_single_file_with_ema_and_what_a_yaml_says(tiny_sd: Path, tmp_path: Path) -> None:
    path = make_single_file(tiny_sd, tmp_path / "model.safetensors", configs=False)
    found = inspect_path(path)
    assert [part.name for part in found.components] == ["denoiser", "vae", "text_encoder"]
    assert (found.kind, found.layout, found.ema, found.prediction) == ("checkpoint", "original", False, "")
    stored = load_file(path)
    stored["model_ema.diffusion_modelout2bias"] = torch.zeros(4)
    write(path, stored)
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n    timesteps: 1\n')
    found = inspect_path(path)
    assert (found.ema, found.prediction) == (True, "v_prediction")


def test_broken_numbers_of_a_base_are_seen(tiny_sd: Path, tmp_path: Path) -> None:
    path = make_single_file(tiny_sd, tmp_path / "model.safetensors", configs=False)
    stored = {key: torch.full_like(value, math.nan) for key, value in load_file(path).items()}
    assert inspect_path(write(path, stored)).problems


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"emb_params": (4, 768)}, "textual inversion"),
        ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "VAE"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9, 3)}, "transformer"),
    ],
)
def test_other_files_are_named(shapes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    assert inspect_path(write(tmp_path / "a.safetensors", tensors)).kind == kind
