"""Randomly initialised Stable-Diffusion-shaped folders, photos and class images, for timing only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.published import configs

CHANNELS = (128, 256, 416, 416)


def make_sd_folder(
    folder: Path,
    *,
    resolution_px: int,
    seed: int = 0,
    channels: Sequence[int] = CHANNELS,
    vae_channels: int = 64,
) -> int:
    """Write the folder; SD1.5's structure at fewer channels, its VAE at half width.

    Returns:
        The number of UNet parameters.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=resolution_px // 8,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        cross_attention_dim=512,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(vae_channels * factor for factor in (1, 2, 4, 4)),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=resolution_px,
    )
    tokenizer = _tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return sum(parameter.numel() for parameter in unet.parameters())


def make_published_folder(folder: Path, name: str, *, dtype: torch.dtype, seed: int = 0) -> int:
    """Write a folder of a published size with random weights: the true memory and speed without a download.

    Args:
        folder: made.
        name: "sd15" or "sd21", see `published`.
        dtype: that weights are written in.
        seed: of the weights.

    Returns:
        The number of UNet parameters.
    """
    torch.manual_seed(seed)
    found = configs(name)
    unet = UNet2DConditionModel.from_config(found["unet"]).to(dtype)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(found["vae"]).to(dtype),
        text_encoder=CLIPTextModel(CLIPTextConfig(**found["text_encoder"])).to(dtype),
        tokenizer=_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=PNDMScheduler.from_config(found["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return sum(parameter.numel() for parameter in unet.parameters())


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte alphabet without merges: any text encodes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(
        json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )


def make_photos(folder: Path, count: int, side_px: int) -> None:
    """Photos a little larger than the training resolution, as JPEG."""
    _images(folder, count, side_px + 64, "jpg", 1)


def make_class_images(folder: Path, count: int, side_px: int) -> None:
    """Class images at the training resolution, as PNG."""
    _images(folder, count, side_px, "png", 2)


def _images(folder: Path, count: int, side_px: int, suffix: str, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        coarse = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC).save(
            folder / f"{index:03d}.{suffix}"
        )
