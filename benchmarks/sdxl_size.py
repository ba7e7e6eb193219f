"""Files of SDXL's size and names with random weights: a single-file checkpoint and adapters.

The module trees are built from the published configs without storage; only their names and shapes are used.
"""

from __future__ import annotations

import json
import re
import struct
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


def component_shapes() -> dict[str, Shapes]:
    """Names and shapes of SDXL base 1.0's parts, as diffusers and transformers have them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**UNET_CONFIG),
            "vae": AutoencoderKL(**VAE_CONFIG),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
        }
    return {
        name: {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for name, module in modules.items()
    }


def single_file_shapes() -> Shapes:
    """The same as one checkpoint in the original (LDM) layout; q, k and v of OpenCLIP are one matrix."""
    parts = component_shapes()
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
    rank: int, *, feed_forward: bool = True
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """UNet module path -> shapes of (lora_A, lora_B), as kohya's trainer adapts SDXL by default."""
    wanted = r".*\.(to_[qkv]|to_out\.0" + (
        r"|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)" if feed_forward else ")"
    )
    return {
        path: ((rank, shape[1]), (shape[0], rank))
        for path, shape in (
            (key.removesuffix(".weight"), shape)
            for key, shape in component_shapes()["unet"].items()
            if key.endswith(".weight") and len(shape) == 2
        )
        if re.fullmatch(wanted, path)
    }


def write_file(path: Path, shapes: Shapes, dtype: str = "F16", scale: float = 0.02, seed: int = 0) -> int:
    """Write random tensors as a .safetensors file, a few megabytes at a time; returns its size in bytes.

    Tensors without dimensions (alphas) come last and are 1.
    """
    width = {"F16": 2, "F32": 4}[dtype]
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    table: dict[str, Any] = {}
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


def write_single_file(path: Path) -> int:
    """SDXL as one fp16 checkpoint of 6.9 GB."""
    return write_file(path, single_file_shapes())


def write_adapter(path: Path, rank: int, *, dtype: str = "F16", seed: int = 1) -> int:
    """An adapter for it in kohya's layout."""
    from lorabooth.adapters import names

    shapes: Shapes = {}
    for module, (down, up) in lora_shapes(rank).items():
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
