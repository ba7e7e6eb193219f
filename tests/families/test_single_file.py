"""A checkpoint in the original key layout is the same model as the folder it was made from."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from lorabooth.errors import BaseModelError
from lorabooth.families import registry, single_file, source
from lorabooth.families.base import Parts
from tests.families.ldm import make_single_file
from tests.tiny import write_tokenizer


def load(path: Path, dtype: torch.dtype = torch.float32) -> Parts:
    found = source.resolve(str(path))
    return registry.family(found.family).load(found, dtype)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_weight_comes_out_as_in_the_folder(
    family: str, tiny_sd: Path, tiny_sd2: Path, tmp_path: Path
) -> None:
    folder = tiny_sd if family == "sd1" else tiny_sd2
    file = make_single_file(folder, tmp_path / "checkpoint.safetensors", openclip=family == "sd2")
    ours, theirs = load(file), load(folder)
    assert ours.source.family == family
    for a, b in (
        (ours.denoiser, theirs.denoiser),
        (ours.vae, theirs.vae),
        (ours.text_encoders["text_encoder"], theirs.text_encoders["text_encoder"]),
    ):
        torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)
    assert dict(ours.scheduler_config) == dict(theirs.scheduler_config)


def test_the_vae_stays_float32_and_unrounded_when_the_rest_is_half(tiny_sd: Path, tmp_path: Path) -> None:
    file = make_single_file(tiny_sd, tmp_path / "checkpoint.safetensors")
    parts = load(file, torch.float16)
    exact = load(tiny_sd)
    assert parts.denoiser.dtype == parts.text_encoders["text_encoder"].dtype == torch.float16
    torch.testing.assert_close(dict(parts.vae.state_dict()), dict(exact.vae.state_dict()), rtol=0, atol=0)


def test_a_vocabulary_beside_the_file_or_in_the_hub_cache_is_found(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_single_file(tiny_sd, tmp_path / "m" / "checkpoint.safetensors")
    shutil.rmtree(tmp_path / "m" / "checkpoint" / "tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert single_file.find_vocabulary(file) is None
    root = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    write_tokenizer(root / "snapshots" / "abc")
    assert single_file.find_vocabulary(file) == root / "snapshots" / "abc"
    write_tokenizer(tmp_path / "m" / "tokenizer")
    assert single_file.find_vocabulary(file) == tmp_path / "m" / "tokenizer"
    assert (
        load(file).tokenizers["tokenizer"]("a dog")["input_ids"]
        == load(tiny_sd).tokenizers["tokenizer"]("a dog")["input_ids"]
    )


@pytest.mark.parametrize(
    "gone",
    ["model.diffusion_model.middle_block.1.proj_in.weight", "first_stage_model.decoder.conv_in.weight"],
)
def test_a_missing_tensor_is_named_and_not_left_empty(tiny_sd: Path, tmp_path: Path, gone: str) -> None:
    file = make_single_file(tiny_sd, tmp_path / "checkpoint.safetensors")
    tensors = load_file(file)
    del tensors[gone]
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match=r"missing|cannot be read"):
        load(file)


def test_configs_of_another_size_are_one_message(tiny_sd: Path, tmp_path: Path) -> None:
    file = make_single_file(tiny_sd, tmp_path / "checkpoint.safetensors")
    config = tmp_path / "checkpoint" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [64, 128]}))
    with pytest.raises(BaseModelError, match="sd1 checkpoint") as caught:
        load(file)
    assert "configs beside it" in caught.value.fix


@pytest.mark.parametrize(
    ("family", "unet_m", "text_m", "side_px"), [("sd1", 860, 123, 512), ("sd2", 866, 340, 768)]
)
def test_the_shipped_configs_build_the_published_sizes(
    family: str, unet_m: int, text_m: int, side_px: int
) -> None:
    """Parameter counts (millions) of the published checkpoints: 859.5 and 865.9, 123.1 and 340.4."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = resources.files("lorabooth.families") / "configs" / family
    with resources.as_file(configs) as folder, torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    millions = [round(sum(p.numel() for p in m.parameters()) / 1e6) for m in (unet, text, vae)]
    assert millions == [unet_m, text_m, 84]
    assert unet.config.sample_size * 8 == side_px
