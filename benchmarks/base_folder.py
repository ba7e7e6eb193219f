"""A diffusers folder of a given size with random fp16 weights, and a copy in which every weight differs."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sdxl_size import Size, meta_modules, shapes_of, write_file

_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.36.0",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_XL_INDEX: dict[str, Any] = {
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


def write_folder(folder: Path, size: Size) -> int:
    """Write a base model as a diffusers folder that diffusers opens; returns its size in bytes."""
    from diffusers import EulerDiscreteScheduler

    from benchmarks.model_folder import _tokenizer

    for seed, (name, module) in enumerate(meta_modules(size).items()):
        directory = folder / name
        directory.mkdir(parents=True)
        if name.startswith("text_encoder"):
            module.config.dtype = "float16"
            module.config.save_pretrained(directory)
            path = directory / "model.safetensors"
        else:
            module.save_config(directory)
            path = directory / "diffusion_pytorch_model.safetensors"
        write_file(path, shapes_of(module), seed=seed, metadata={"format": "pt"})
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    two = size.text_encoder_2 is not None
    for name in ("tokenizer", "tokenizer_2")[: 2 if two else 1]:
        _tokenizer(folder / name).save_pretrained(folder / name)
    index = _XL_INDEX if two else _INDEX
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_tuned(folder: Path, tuned: Path, *, scale: float = 0.002, seed: int = 9) -> None:
    """A copy of a folder with noise added to every weight of its UNet and its text encoders."""
    shutil.copytree(folder, tuned)
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal(1 << 22, dtype=np.float32) * scale
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for path in (tuned / name).glob("*.safetensors"):
            _add_noise(path, noise)


def _add_noise(path: Path, noise: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Add a block of noise to an fp16 file's numbers, begun anew at other places."""
    (head,) = struct.unpack("<Q", path.open("rb").read(8))
    weights = np.memmap(path, dtype="<f2", mode="r+", offset=8 + head)
    at, shift = 0, 0
    while at < len(weights):
        part = weights[at : at + len(noise) - shift]
        part += noise[shift : shift + len(part)].astype(np.float16)
        at += len(part)
        shift = 0 if shift else 4096
    weights.flush()
