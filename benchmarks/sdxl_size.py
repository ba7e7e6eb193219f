"""Files of SDXL's size and names with random weights: a single-file checkpoint and adapters.

The module trees are built from the published configs without storage; only their names and shapes are used.
Other sizes: Stable Diffusion 1.5, and a tiny SDXL that shows in seconds that a benchmark runs.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorabooth.checkpoints import ldm

Shapes = dict[str, tuple[int, ...]]

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


TINY_UNET: dict[str, Any] = UNET_CONFIG | {
    "block_out_channels": (64, 128, 128),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 160,
    "projection_class_embeddings_input_dim": 96 + 6 * 256,
}
TINY_VAE: dict[str, Any] = VAE_CONFIG | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
TINY_CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "vocab_size": 600,
    "bos_token_id": 598,
    "eos_token_id": 599,
}
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class Size:
    """Configs of a base model's parts; without a second text encoder it is a Stable Diffusion 1 model.

    Attributes:
        unet: of UNet2DConditionModel.
        vae: of AutoencoderKL.
        text_encoder: of CLIPTextConfig.
        text_encoder_2: of the second one, with projection; None where there is none.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any] | None = None


SDXL = Size(UNET_CONFIG, VAE_CONFIG, CLIP_L, CLIP_G)
TINY_SDXL = Size(
    TINY_UNET,
    TINY_VAE,
    TINY_CLIP,
    TINY_CLIP | {"hidden_size": 96, "projection_dim": 96, "hidden_act": "gelu"},
)
SD15 = Size(SD15_UNET, VAE_CONFIG | {"sample_size": 512, "scaling_factor": 0.18215}, CLIP_L)
TINY_SD15 = Size(SD15_UNET | {"block_out_channels": (32, 64, 64, 64)}, TINY_VAE, TINY_CLIP)


def meta_modules(size: Size = SDXL) -> dict[str, Any]:
    """The parts of a base model without storage, by the names of their folders."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(**size.unet),
            "vae": AutoencoderKL(**size.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**size.text_encoder)),
        }
        if size.text_encoder_2 is not None:
            modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**size.text_encoder_2))
    return modules


def shapes_of(module: Any) -> Shapes:
    """Names and shapes of a module's tensors."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def component_shapes(size: Size = SDXL) -> dict[str, Shapes]:
    """Names and shapes of a base model's parts, as diffusers and transformers have them."""
    return {name: shapes_of(module) for name, module in meta_modules(size).items()}


def single_file_shapes(size: Size = SDXL) -> Shapes:
    """SDXL as one checkpoint in the original (LDM) layout; q, k and v of OpenCLIP are one matrix."""
    parts = component_shapes(size)
    out: Shapes = {}
    for key, shape in parts["unet"].items():
        module, _, leaf = key.rpartition(".")
        out[f"{ldm.UNET}{ldm.sdxl_unet_to_ldm(module)}.{leaf}"] = shape
    for key, shape in parts["vae"].items():
        out[f"first_stage_model.{_vae_key(key)}"] = (
            (*shape, 1, 1) if ".attentions." in key and len(shape) == 2 else shape
        )
    for key, shape in parts["text_encoder"].items():
        out[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = shape
    for key, shape in parts["text_encoder_2"].items():
        out[f"conditioner.embedders.1.model.{_openclip_key(key.removeprefix('text_model.'))}"] = (
            (3 * shape[0], *shape[1:]) if re.search(r"\.[qkv]_proj\.", key) else shape
        )
    return out


def lora_shapes(
    rank: int, *, feed_forward: bool = True, size: Size = SDXL
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """UNet module path -> shapes of (lora_A, lora_B), as kohya's trainer adapts SDXL by default."""
    wanted = r".*\.(to_[qkv]|to_out\.0" + (
        r"|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)" if feed_forward else ")"
    )
    return {
        path: ((rank, shape[1]), (shape[0], rank))
        for path, shape in (
            (key.removesuffix(".weight"), shape)
            for key, shape in component_shapes(size)["unet"].items()
            if key.endswith(".weight") and len(shape) == 2
        )
        if re.fullmatch(wanted, path)
    }


def write_file(
    path: Path,
    shapes: Shapes,
    dtype: str = "F16",
    scale: float = 0.02,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write random tensors as a .safetensors file, a few megabytes at a time; returns its size in bytes.

    Tensors without dimensions (alphas) come last and are 1.
    """
    width = {"F16": 2, "F32": 4}[dtype]
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    ones = sum(shape == () for shape in shapes.values())
    for key, shape in sorted(shapes.items(), key=lambda item: item[1] == ()):
        size = int(np.prod(shape, dtype=np.int64)) * width
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    # One block of normal numbers, begun anew at other places: as random as timing needs, made in seconds.
    noise = (np.random.default_rng(seed).standard_normal(1 << 22, dtype=np.float32) * scale).astype(kind)
    raw = noise.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        left, shift = at - ones * width, 0
        while left:
            count = min(left, len(raw) - shift)
            file.write(raw[shift : shift + count])
            left -= count
            shift = 0 if shift else 4096 * width
        file.write(np.ones(ones, kind).tobytes())
    return path.stat().st_size


def write_single_file(path: Path, size: Size = SDXL) -> int:
    """SDXL as one fp16 checkpoint of 6.9 GB."""
    return write_file(path, single_file_shapes(size))


def write_adapter(path: Path, rank: int, *, dtype: str = "F16", seed: int = 1, size: Size = SDXL) -> int:
    """An adapter for it in kohya's layout."""
    from lorabooth.adapters import names

    shapes: Shapes = {}
    for module, (down, up) in lora_shapes(rank, size=size).items():
        name = names.kohya_name(f"denoiser.{module}", "sdxl")
        shapes |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": ()}
    return write_file(path, shapes, dtype, seed=seed)


def _vae_key(key: str) -> str:
    """Diffusers' name of a VAE tensor -> the original one; the decoder's blocks count from the other end."""
    key = re.sub(r"(quant_conv|post_quant_conv)\.", r"\1.", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", key)
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}", key
    )
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", key
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    for ours, theirs in {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key.replace("conv_shortcut", "nin_shortcut")


def _openclip_key(key: str) -> str:
    """transformers' name of a text encoder tensor (without `text_model.`) -> OpenCLIP's."""
    tops = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
        "text_projection.weight": "text_projection",
    }
    if key in tops:
        return tops[key]
    key = key.replace("encoder.layers.", "transformer.resblocks.")
    key = re.sub(r"self_attn\.[qkv]_proj\.(weight|bias)", r"attn.in_proj_\1", key)
    for ours, theirs in {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }.items():
        key = key.replace(ours, theirs)
    return key
