"""A tiny SDXL-shaped diffusers folder, made in code: two text encoders, linear projections, text_time.

As in tests/tiny.py nothing is a mock: the folder opens as a StableDiffusionXLPipeline, with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.tiny import MAX_TOKENS, write_tokenizer

WIDTHS = (32, 48)
"""Of the two text encoders; cross-attention sees them side by side."""
TIME_DIM = 8
"""Width of each of the six numbers (sizes, crop, target) that the UNet is told."""


def make_sdxl_folder(path: Path, seed: int = 0) -> Path:
    """Write a randomly initialised SDXL-shaped diffusers folder, in about a second.

    The UNet has SDXL's blocks (DownBlock2D, two CrossAttnDownBlock2D of 2 transformer layers) of two
    layers each, so that its original (LDM) block numbers are those of the real one.

    Args:
        path: the folder to make.
        seed: of the weights.

    Returns:
        `path`.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab_size = write_tokenizer(path / "tokenizer")
    write_tokenizer(path / "tokenizer_2", pad_token="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configs = [
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                hidden_act=activation,
                projection_dim=width,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=pad,
            )
            for width, activation, pad in ((WIDTHS[0], "quick_gelu", 1), (WIDTHS[1], "gelu", 0))
        ]
        text_encoder = CLIPTextModel(configs[0])
        text_encoder_2 = CLIPTextModelWithProjection(configs[1])
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.13025,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            cross_attention_dim=sum(WIDTHS),
            attention_head_dim=(2, 2, 4),
            norm_num_groups=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=WIDTHS[1] + 6 * TIME_DIM,
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    text_encoder.save_pretrained(path / "text_encoder", safe_serialization=True)
    text_encoder_2.save_pretrained(path / "text_encoder_2", safe_serialization=True)
    vae.save_pretrained(path / "vae")
    unet.save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return path
