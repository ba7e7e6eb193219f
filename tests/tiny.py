"""Small real things for tests, made in code: a Stable-Diffusion-shaped diffusers folder, and photos.

Nothing here is a mock: the folder holds a real CLIPTokenizer, CLIPTextModel, AutoencoderKL,
UNet2DConditionModel and scheduler config with random weights, as a download would.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

# Words that the tiny tokenizer knows as one token; all other text falls apart into bytes.
WORDS = (
    "a", "an", "the", "of", "in", "on", "with", "and", "photo", "painting", "style", "dog", "cat",
    "mug", "robot", "car", "boot", "house", "snow", "beach", "grass", "red", "blue", "green", "hat",
    "scarf", "wearing",
)  # fmt: skip
# Rare identifiers, each one token; never words.
RARE_TOKENS = ("sks", "zwx", "qxv", "ohwx", "xjy", "kvz", "bnh", "pfj")
MAX_TOKENS = 77


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of CLIP's vocabulary."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [code for first, last in spans for code in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def write_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> int:
    """Write the files of a CLIPTokenizer; returns the vocabulary size."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    pieces = alphabet + [c + "</w>" for c in alphabet]
    merges: list[str] = []
    for word in (*WORDS, *RARE_TOKENS):
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge, joined = f"{symbols[0]} {symbols[1]}", symbols[0] + symbols[1]
            if merge not in merges:
                merges.append(merge)
                pieces.append(joined)
            symbols = [joined, *symbols[2:]]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": MAX_TOKENS,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return len(vocab)


def make_sd_folder(
    path: Path,
    *,
    prediction: str = "epsilon",
    family: Literal["sd1", "sd2"] = "sd1",
    unet_channels: tuple[int, ...] = (32, 64),
    cross_dim: int = 32,
    resolution: int = 64,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised Stable-Diffusion-shaped diffusers folder, in well under a second.

    Args:
        path: the folder to make.
        prediction: scheduler's prediction_type, "epsilon" or "v_prediction".
        family: "sd1" (conv projections, one head count, PNDM) or "sd2" (linear projections, a head count
            for each block, pad token "!", DDIM).
        unet_channels: output channels of the UNet's blocks, multiples of 32; the last has no attention.
        cross_dim: width of the text encoder, a multiple of 4.
        resolution: trained image side in pixels; the VAE shrinks by 8.
        seed: of the weights.

    Returns:
        `path`.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd2 = family == "sd2"
    vocab_size = write_tokenizer(path / "tokenizer", pad_token="!" if sd2 else "<|endoftext|>")
    heads = [max(1, c // 16) for c in unet_channels] if sd2 else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=cross_dim,
            intermediate_size=2 * cross_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu" if sd2 else "quick_gelu",
            projection_dim=cross_dim,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=0 if sd2 else 1,
        )
        text_encoder = CLIPTextModel(text_config)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=resolution,
            scaling_factor=0.18215,
        )
        unet = UNet2DConditionModel(
            sample_size=resolution // 8,
            in_channels=4,
            out_channels=4,
            block_out_channels=unet_channels,
            layers_per_block=1,
            cross_attention_dim=cross_dim,
            attention_head_dim=heads,
            norm_num_groups=32,
            down_block_types=("CrossAttnDownBlock2D",) * (len(unet_channels) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(unet_channels) - 1),
            use_linear_projection=sd2,
        )
    betas = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    common = {**betas, "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction}
    scheduler = (
        DDIMScheduler(clip_sample=False, **common) if sd2 else PNDMScheduler(skip_prk_steps=True, **common)
    )
    text_encoder.save_pretrained(path / "text_encoder", safe_serialization=True)
    vae.save_pretrained(path / "vae")
    unet.save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return path


def make_photos(folder: Path, n: int = 3, size: tuple[int, int] = (80, 64), seed: int = 0) -> list[Path]:
    """Write `n` photos (JPEG and PNG by turns): one and the same object on different gradients.

    Args:
        folder: made if absent.
        n: how many.
        size: (width, height) in pixels.
        seed: of the backgrounds, the object's place and its colours.

    Returns:
        The files, sorted by name: 00.jpg, 01.png, 02.jpg ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, height = size
    body, trim = (tuple(int(v) for v in rng.integers(40, 255, 3)) for _ in range(2))
    files = []
    for i in range(n):
        corner_a, corner_b = rng.integers(0, 256, (2, 3))
        ramp = np.add.outer(np.linspace(0, 1, height), np.linspace(0, 1, width))[..., None] / 2
        pixels = corner_a * (1 - ramp) + corner_b * ramp + rng.normal(0, 6, (height, width, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        r = min(size) // 4
        cx, cy = int(rng.integers(r, width - r)), int(rng.integers(r, height - r))
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=body, outline=trim, width=2)
        draw.rectangle((cx - r // 2, cy - r // 4, cx + r // 2, cy + r // 4), fill=trim)
        file = folder / (f"{i:02d}.jpg" if i % 2 == 0 else f"{i:02d}.png")
        image.save(file, **({"quality": 95} if i % 2 == 0 else {}))
        files.append(file)
    return files
