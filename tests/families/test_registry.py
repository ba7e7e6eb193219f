"""Which family a base is, told without loading it; and what everything that is no base is called."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabooth.errors import BaseModelError, RecipeError
from lorabooth.families import registry
from tests.families.ldm import make_single_file


def test_every_family_is_registered_under_its_own_name() -> None:
    assert {name: registry.family(name).name for name in registry.FAMILIES} == {"sd1": "sd1", "sd2": "sd2"}


def test_an_unknown_family_lists_the_known() -> None:
    with pytest.raises(RecipeError) as caught:
        registry.family("SD1.5")
    assert "Did you mean 'sd1'" in caught.value.fix


def test_folders_are_told_apart(tiny_sd: Path, tiny_sd2: Path) -> None:
    assert (registry.detect(tiny_sd), registry.detect(tiny_sd2)) == ("sd1", "sd2")


@pytest.mark.parametrize(
    ("width", "linear", "family"), [(768, True, "sd1"), (1024, False, "sd2"), (96, True, "sd2")]
)
def test_the_published_widths_decide_and_else_the_projections(
    tiny_sd: Path, tmp_path: Path, width: int, linear: bool, family: str
) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "base")
    _edit(folder / "unet" / "config.json", cross_attention_dim=width, use_linear_projection=linear)
    assert registry.detect(folder) == family


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("FluxPipeline", "FLUX"),
        ("StableDiffusionInpaintPipeline", "inpainting"),
        ("WuerstchenPipeline", "a WuerstchenPipeline"),
    ],
)
def test_another_pipeline_is_named(tiny_sd: Path, tmp_path: Path, name: str, text: str) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "base")
    _edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(BaseModelError, match=text) as caught:
        registry.detect(folder)
    assert "1.x and 2.x" in caught.value.fix


def test_an_inpainting_unet_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "base")
    _edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(BaseModelError, match="takes 9 channels"):
        registry.detect(folder)


def test_missing_parts_are_listed(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "base")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BaseModelError, match="vae, tokenizer"):
        registry.detect(folder)


def test_broken_json_names_the_file(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "base")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"unet.config\.json"):
        registry.detect(folder)


def test_a_folder_without_index_is_told_what_was_probably_meant(tiny_sd: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    inner = shutil.copytree(tiny_sd, outer / "snapshots" / "abc")
    assert _fix_for(outer) == f"Did you mean {inner}?"
    assert str(inner) in _fix_for(inner / "unet")
    (inner / "model_index.json").unlink()
    assert "incomplete download" in _fix_for(inner)
    single = tmp_path / "single"
    single.mkdir()
    assert "hub id" in _fix_for(single)
    (single / "model.safetensors").touch()
    assert str(single / "model.safetensors") in _fix_for(single)


def test_single_files_are_told_apart_by_their_headers(tiny_sd: Path, tiny_sd2: Path, tmp_path: Path) -> None:
    assert registry.detect(make_single_file(tiny_sd, tmp_path / "a.safetensors")) == "sd1"
    assert registry.detect(make_single_file(tiny_sd2, tmp_path / "b.safetensors", openclip=True)) == "sd2"


def test_published_widths_need_no_configs_beside_the_file(tmp_path: Path) -> None:
    for width, text, family in ((768, "transformer", "sd1"), (1024, "model", "sd2")):
        file = _file(tmp_path / "x.safetensors", **_checkpoint(width, text))
        assert registry.detect(file) == family
    with pytest.raises(BaseModelError, match="different families"):
        registry.detect(_file(tmp_path / "x.safetensors", **_checkpoint(768, "model")))
    with pytest.raises(BaseModelError, match="width 32") as caught:
        registry.detect(_file(tmp_path / "x.safetensors", **_checkpoint(32, "model")))
    assert "model_index.json" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", (4, 8), "LoRA file"),
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", (4, 8), "LoRA file"),
        ("conditioner.embedders.1.model.ln_final.weight", (8,), "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x", (8,), "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", (8,), "FLUX"),
        ("control_model.time_embed.0.weight", (8,), "ControlNet"),
        ("first_stage_model.encoder.conv_in.weight", (8,), "VAE alone"),
        ("down_blocks.0.resnets.0.conv1.weight", (8,), "UNet of a diffusers folder"),
        ("text_model.encoder.layers.0.x", (8,), "text encoder alone"),
        ("emb_params", (8,), "textual inversion"),
    ],
)
def test_other_safetensors_are_called_what_they_are(
    tmp_path: Path, key: str, shape: tuple[int, ...], text: str
) -> None:
    others = {f"{key}.{i}": torch.zeros(1) for i in range(3)} if key != "emb_params" else {}
    file = _file(tmp_path / "x.safetensors", **{key: torch.zeros(shape)}, **others)
    with pytest.raises(BaseModelError, match=text):
        registry.detect(file)


def test_incomplete_checkpoints_say_what_is_missing(tmp_path: Path) -> None:
    whole = _checkpoint(768, "transformer")
    for prefix, text in (("cond_stage", "text encoder"), ("first_stage", "VAE")):
        part = {k: v for k, v in whole.items() if not k.startswith(prefix)}
        with pytest.raises(BaseModelError, match=f"holds no {text}"):
            registry.detect(_file(tmp_path / "x.safetensors", **part))


def test_the_unet_file_of_a_folder_points_to_the_folder(tiny_sd: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        registry.detect(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert str(tiny_sd) in caught.value.fix


def test_truncated_and_renamed_files(tiny_sd: Path, tmp_path: Path) -> None:
    whole = make_single_file(tiny_sd, tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("not a model at all, just words")
    for name in ("cut", "empty", "text"):
        with pytest.raises(BaseModelError, match=r"not a whole \.safetensors"):
            registry.detect(tmp_path / f"{name}.safetensors")
    (tmp_path / "disguised.safetensors").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(2)}, tmp_path / "zipped.safetensors")
    for name in ("disguised", "zipped"):
        with pytest.raises(BaseModelError, match="pickle"):
            registry.detect(tmp_path / f"{name}.safetensors")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(BaseModelError, match="not a base model file"):
        registry.detect(tmp_path / "photo.jpg")


def _checkpoint(width: int, text: str) -> dict[str, torch.Tensor]:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
            8, width
        ),
        f"cond_stage_model.{text}.x": torch.zeros(1),
        "first_stage_model.x": torch.zeros(1),
    }


def _file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _fix_for(path: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        registry.detect(path)
    return caught.value.fix
