"""The family, told from names and widths, or from what a file says."""

from __future__ import annotations

import pytest

from lorabooth.adapters.family import family_from_metadata, family_of

FLUX = "denoiser.transformer_blocks.{}.attn.to_q"
SINGLE = "denoiser.single_transformer_blocks.{}.attn.to_q"
DEEP = "denoiser.down_blocks.1.attentions.0.transformer_blocks.{}.attn{}.to_k"
CLIP = "{}.text_model.encoder.layers.0.self_attn.q_proj"
T5 = "{}.encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        ({DEEP.format(0, 2): 768}, "sd1"),
        ({DEEP.format(0, 2): 1024}, "sd2"),
        ({DEEP.format(0, 2): 2048}, "sdxl"),
        ({DEEP.format(0, 1): 320}, ""),
        ({DEEP.format(1, 1): 640}, "sdxl"),
        ({CLIP.format("text_encoder"): 768, CLIP.format("text_encoder_2"): 1280}, "sdxl"),
        ({CLIP.format("text_encoder"): 1024}, "sd2"),
        ({CLIP.format("text_encoder"): 768}, ""),
        ({FLUX.format(0): 3072}, "flux"),
        ({FLUX.format(0): 1536}, "sd3"),
        ({FLUX.format(0): 2432}, "sd3"),
        ({FLUX.format(0): 64}, ""),
        ({FLUX.format(19): 3072}, ""),  # HunyuanVideo, Qwen-Image have more blocks
        ({SINGLE.format(37): 64, FLUX.format(3): 64}, "flux"),
        ({SINGLE.format(38): 3072}, ""),
        ({FLUX.format(0): 3072, "denoiser.transformer_blocks.0.img_mlp.net.2": 3072}, ""),
        ({"denoiser.transformer_blocks.0.attn2.to_q": 64}, "sd3"),
        ({"denoiser.transformer_blocks.0.attn1.to_q": 64}, ""),  # LTX, PixArt
        ({SINGLE.format(0): 64, CLIP.format("text_encoder"): 768, T5.format("text_encoder_2"): 4096}, "flux"),
        ({FLUX.format(0): 64, CLIP.format("text_encoder_2"): 1280}, ""),
        ({T5.format("text_encoder_2"): 4096}, "flux"),
        ({T5.format("text_encoder_3"): 4096}, "sd3"),
        ({}, ""),
    ],
)
def test_from_names_and_widths(modules, family):
    assert family_of({name: ((4, width), (width, 4)) for name, width in modules.items()}) == family


@pytest.mark.parametrize(
    ("entries", "family"),
    [
        ({"lorabooth.family": "sd2", "ss_base_model_version": "sd_v1"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "sd3"),
        ({"modelspec.architecture": "stable-diffusion-v3.5/lora"}, "sd3"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "Flux.2/lora"}, ""),
        ({"modelspec.architecture": "stable-cascade-v1-prior/lora"}, ""),
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sdxl_1.0"}, "sdxl"),
        ({"ss_base_model_version": "sd3_m"}, "sd3"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"ss_base_model_version": "chroma", "ss_v2": "False"}, ""),
        ({"ss_v2": "True"}, "sd2"),
        ({}, ""),
    ],
)
def test_from_metadata(entries, family):
    assert family_from_metadata(entries) == family
