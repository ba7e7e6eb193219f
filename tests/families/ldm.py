"""A tiny diffusers folder written as one file in the original (LDM) key layout, by the published tables.

UNet: input_blocks.(n+1)*i+j+1 and output_blocks.(n+1)*i+j for block i, layer j, n layers a block. VAE: the
decoder's blocks are numbered from the other end. Text: SD1 keeps transformers' names; SD2 has OpenCLIP's,
with q, k and v in one matrix, as has SDXL's second encoder.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_key(key: str, layers: int, attended: set[str]) -> str:
    for ours, theirs in _UNET_TOP.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    parts = key.split(".")
    if parts[0] == "mid_block":
        n, rest = int(parts[2]), ".".join(parts[3:])
        place = f"middle_block.{2 * n}" if parts[1] == "resnets" else "middle_block.1"
        return f"{place}.{_resnet(rest) if parts[1] == 'resnets' else rest}"
    block, kind, n, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    width = layers + 1
    if parts[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{width * (block + 1)}.0.op.{parts[-1]}"
        place = f"input_blocks.{width * block + n + 1}"
    else:
        if kind == "upsamplers":
            slot = 2 if f"up_blocks.{block}" in attended else 1
            return f"output_blocks.{width * block + layers}.{slot}.conv.{parts[-1]}"
        place = f"output_blocks.{width * block + n}"
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _resnet(rest: str) -> str:
    name, _, leaf = rest.rpartition(".")
    return f"{_RESNET[name]}.{leaf}"


def unet_to_ldm(tensors: Tensors, layers: int) -> Tensors:
    attended = {".".join(k.split(".")[:2]) for k in tensors if ".attentions." in k}
    return {f"model.diffusion_model.{_unet_key(k, layers, attended)}": v for k, v in tensors.items()}


def vae_to_ldm(tensors: Tensors, blocks: int) -> Tensors:
    out: Tensors = {}
    for key, value in tensors.items():
        k = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        k = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", k)
        k = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", k)
        k = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", k
        )
        k = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", k)
        k = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", k)
        if "mid_block.attentions.0" in k:
            k = k.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            for ours, theirs in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
                k = k.replace(f".{ours}.", f".{theirs}.")
            if value.ndim == 2:
                value = value[:, :, None, None]  # LDM's attention is 1x1 convolutions
        out[f"first_stage_model.{k}"] = value
    return out


def text_to_ldm(tensors: Tensors, *, openclip: bool, stage: str = "cond_stage_model.") -> Tensors:
    tensors = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    if not openclip:
        return {f"{stage}transformer.text_model.{k}": v for k, v in tensors.items()}
    prefix = f"{stage}model."
    out = {
        prefix + "positional_embedding": tensors["embeddings.position_embedding.weight"],
        prefix + "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        prefix + "ln_final.weight": tensors["final_layer_norm.weight"],
        prefix + "ln_final.bias": tensors["final_layer_norm.bias"],
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"self_attn.out_proj": "attn.out_proj"}
    for layer in sorted({k.split(".")[2] for k in tensors if k.startswith("encoder.layers.")}):
        ours, theirs = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for leaf in ("weight", "bias"):
            for name, other in names.items():
                out[f"{theirs}{other}.{leaf}"] = tensors[f"{ours}{name}.{leaf}"]
            qkv = [tensors[f"{ours}self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            out[f"{theirs}attn.in_proj_{leaf}"] = torch.cat(qkv)
    if "text_projection.weight" in tensors:
        out[prefix + "text_projection"] = tensors["text_projection.weight"].T
    return out


def make_single_file(folder: Path, file: Path, *, openclip: bool = False, configs: bool = True) -> Path:
    """Write a diffusers folder as one LDM file, its configs and tokenizer in a folder beside it if asked."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    blocks = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    tensors = unet_to_ldm(unet, layers) | vae_to_ldm(vae, blocks)
    if (folder / "text_encoder_2").is_dir():  # SDXL
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        tensors |= text_to_ldm(text, openclip=False, stage="conditioner.embedders.0.")
        tensors |= text_to_ldm(second, openclip=True, stage="conditioner.embedders.1.")
    else:
        tensors |= text_to_ldm(text, openclip=openclip)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    if configs:
        shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file
