"""Stable Diffusion's own rules: targets, defaults, loading variants, the prediction probe, precisions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorabooth.errors import BaseModelError
from lorabooth.families import registry, source
from lorabooth.families.base import Parts
from lorabooth.families.sd_load import _told_by_probe, probe_prediction

SD1 = registry.family("sd1")


def load(path: Path, dtype: torch.dtype = torch.float32) -> Parts:
    found = source.resolve(str(path))
    return registry.family(found.family).load(found, dtype)


def matched(parts: Parts, preset: str) -> set[str]:
    patterns = [re.compile(p) for p in SD1.targets[preset]]
    return {name for name, _ in parts.denoiser.named_modules() if any(p.fullmatch(name) for p in patterns)}


def test_presets_grow_and_name_only_layers_with_weights(tiny_sd: Path, tiny_sd2: Path) -> None:
    for folder in (tiny_sd, tiny_sd2):
        parts = load(folder)
        modules = dict(parts.denoiser.named_modules())
        attention, ff, everything = (matched(parts, p) for p in ("attn", "attn+ff", "attn+ff+conv"))
        blocks = sum(name.endswith((".attn1", ".attn2")) for name in modules)
        assert len(attention) == 4 * blocks
        assert attention < ff < everything
        assert {type(modules[name]) for name in attention} == {nn.Linear}
        assert all(hasattr(modules[name], "weight") and modules[name].weight.ndim > 1 for name in everything)
        weights = {n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
        left = {n for n in weights - everything if not n.endswith((".conv1.conv",))}
        assert {n.split(".")[0] for n in left} == {"conv_in", "conv_out", "time_embedding"}


def test_text_targets_match_canonical_names(tiny_sd: Path) -> None:
    encoder = load(tiny_sd).text_encoders["text_encoder"]
    names = [f"text_model.{name.removeprefix('text_model.')}" for name, _ in encoder.named_modules()]
    found = [n for n in names if any(re.fullmatch(p, n) for p in SD1.text_targets)]
    assert len(found) == 4 * 2


def test_the_resolution_is_the_bases_own(tiny_sd: Path, tmp_path: Path) -> None:
    found = source.resolve(str(tiny_sd))
    assert SD1.defaults_for(found).resolution_px == 64
    assert SD1.defaults_for(load(tiny_sd)).resolution_px == 64
    folder = shutil.copytree(tiny_sd, tmp_path / "large")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 96}))
    assert SD1.defaults_for(source.resolve(str(folder))).resolution_px == 768


def test_everything_is_frozen_and_in_eval_mode(tiny_sd: Path) -> None:
    parts = load(tiny_sd)
    for module in (parts.denoiser, parts.vae, *parts.text_encoders.values()):
        assert not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_vae_exact_and_the_pipeline_working(
    tiny_sd: Path, dtype: torch.dtype
) -> None:
    parts, exact = load(tiny_sd, dtype), load(tiny_sd)
    assert {parts.denoiser.dtype, parts.text_encoders["text_encoder"].dtype, parts.dtype} == {dtype}
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        ours = SD1.encode_images(parts, pixels)
    for a, b in zip(ours, SD1.encode_images(exact, pixels), strict=True):
        torch.testing.assert_close((a.mean, a.std), (b.mean, b.std), rtol=0, atol=0)
    image = SD1.pipeline(parts)("a dog", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(image.float()).all()


def test_the_fp16_variant_is_loaded_when_it_is_all_there_is(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "half")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        tensors = load_file(folder / f"{name}.safetensors")
        (folder / f"{name}.safetensors").unlink()
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(half, folder / f"{name}.fp16.safetensors", metadata={"format": "pt"})
    ours, exact = load(folder), load(tiny_sd)
    weight = exact.denoiser.conv_in.weight
    torch.testing.assert_close(ours.denoiser.conv_in.weight, weight.half().float(), rtol=0, atol=0)


def test_text_encoders_saved_with_the_old_prefix_load_too(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "old")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    ours, theirs = (SD1.encode_prompts(load(f), ["a red mug"])[0] for f in (folder, tiny_sd))
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def test_truncated_weights_are_one_message(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "cut")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load(folder)


def test_parts_of_different_models_are_found_out(tiny_sd: Path, tmp_path: Path) -> None:
    from tests.tiny import make_sd_folder

    other = make_sd_folder(tmp_path / "other", cross_dim=64)
    folder = shutil.copytree(tiny_sd, tmp_path / "mixed")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(other / "text_encoder", folder / "text_encoder")
    with pytest.raises(BaseModelError, match="width 32, the text encoder makes 64"):
        load(folder)


def test_padding_is_the_tokenizers_own(tiny_sd: Path, tiny_sd2: Path) -> None:
    """SD1 pads with its end token, SD2 with "!", which is 0."""
    for folder, pad in ((tiny_sd, 605), (tiny_sd2, 0)):
        parts = load(folder)
        tokenizer = parts.tokenizers["tokenizer"]
        ids = SD1.tokenize(parts, ["a dog"])[0]["input_ids"]
        assert (ids.shape, ids.dtype) == ((77,), torch.int64)
        assert int(ids[3]) == tokenizer.eos_token_id
        assert set(ids[4:].tolist()) == {tokenizer.pad_token_id}
        assert tokenizer.pad_token_id == (tokenizer.eos_token_id if pad else 0)


def test_tokens_over_the_limit_are_counted_and_cut(tiny_sd: Path) -> None:
    parts = load(tiny_sd)
    assert SD1.count_tokens(parts, ["a dog", "a dog " * 60]) == [(4, 77), (122, 77)]
    assert SD1.tokenize(parts, ["a dog " * 60])[0]["input_ids"].shape == (77,)


def test_an_attention_mask_goes_along_where_the_encoder_uses_one(tiny_sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd, tmp_path / "masked")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_attention_mask": True}))
    plain, masked = load(tiny_sd), load(folder)
    assert set(SD1.tokenize(plain, ["a dog"])[0]) == {"input_ids"}
    assert set(SD1.tokenize(masked, ["a dog"])[0]) == {"input_ids", "attention_mask"}
    assert int(SD1.tokenize(masked, ["a dog"])[0]["attention_mask"].sum()) == 4


def test_decoding_undoes_the_scaling_of_encoding(tiny_sd: Path) -> None:
    parts = load(tiny_sd)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    by_hand = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(SD1.decode_latents(parts, latents), by_hand)


class GaussianDenoiser(nn.Module):
    """The best possible predictor for latents that are normal around a mean: x = a x0 + s eps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mean = kind, nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, level: Tensor, hidden: Tensor, return_dict: bool) -> tuple[Tensor]:
        a, s = 0.068, 0.998
        eps, x0 = s * (x - a * self.mean), self.mean + a * (x - a * self.mean)
        return (eps if self.kind == "epsilon" else a * eps - s * x0,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_probe_tells_a_noise_predictor_from_a_v_predictor(kind: str, dtype: torch.dtype) -> None:
    unet = GaussianDenoiser(kind).to(dtype)
    assert probe_prediction(unet, torch.zeros(1, 77, 32)) == kind
    assert unet.mean.dtype == dtype


def test_what_a_single_file_sd2_predicts_is_probed_and_noted(
    tiny_sd2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny random UNet follows nothing: slope 0. One that returns its input predicts noise, at 512 px."""
    parts = load(tiny_sd2)
    scheduler = dict(parts.scheduler_config) | {"prediction_type": "unknown"}
    unet, encoder = parts.denoiser, parts.text_encoders["text_encoder"]
    tokenizer = parts.tokenizers["tokenizer"]
    told, notes = _told_by_probe(scheduler, unet, encoder, tokenizer)
    assert told["prediction_type"] == "v_prediction"
    assert unet.config.sample_size == 8
    assert "v_prediction" in notes[0]
    monkeypatch.setattr(unet, "forward", lambda x, level, hidden, return_dict: (x,))
    told, notes = _told_by_probe(scheduler, unet, encoder, tokenizer)
    assert told["prediction_type"] == "epsilon"
    assert unet.config.sample_size == 64
