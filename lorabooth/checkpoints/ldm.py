"""Names of tensors in the original (LDM) layout <-> diffusers' and transformers' names: literal tables.

The layout that A1111 and ComfyUI read: SD1, SD2 and SDXL as one file. A UNet of n layers a block numbers its
parts through: input_blocks.(n+1)i+j+1 and output_blocks.(n+1)i+j for layer j of block i, a sampler after each
block. OpenCLIP text encoders (SD2, SDXL's second) hold q, k and v in one matrix. No torch here.

Source: CompVis/stable-diffusion `openaimodel.py`, mlfoundations/open_clip `transformer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

UNET = "model.diffusion_model."

_RESNET = MappingProxyType(
    {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
)
_TOP = MappingProxyType(
    {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
)
RESNET_FROM_LDM = MappingProxyType({theirs: ours for ours, theirs in _RESNET.items()})
TOP_FROM_LDM = MappingProxyType({theirs: ours for ours, theirs in _TOP.items()})

_OPENCLIP_LAYER = MappingProxyType(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
)
_OPENCLIP_TOP = MappingProxyType(
    {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
)
# Where a single file keeps a text encoder -> (component, whether its names are OpenCLIP's).
TEXT_PREFIXES = MappingProxyType(
    {
        "cond_stage_model.transformer.": ("text_encoder", False),
        "cond_stage_model.model.": ("text_encoder", True),
        "conditioner.embedders.0.transformer.": ("text_encoder", False),
        "conditioner.embedders.0.model.": ("text_encoder_2", True),  # SDXL's refiner has only this one
        "conditioner.embedders.1.model.": ("text_encoder_2", True),
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of a stored tensor a tensor is.

    Attributes:
        name: canonical tensor name, `<component>.<module path>.weight` or `.bias`.
        third: 0, 1 or 2 where it is that third of the stored tensor's rows (q, k, v); None for all of it.
        transposed: stored as the transpose.
    """

    name: str
    third: int | None = None
    transposed: bool = False


def layers_per_block(keys: Collection[str]) -> int:
    """Number of layers a UNet block, from where the first downsampler is; 2 in all published UNets."""
    found = (re.match(rf"{re.escape(UNET)}input_blocks\.(\d+)\.0\.op\.weight$", key) for key in keys)
    return min((int(match[1]) for match in found if match), default=3) - 1


def places(key: str, layers: int = 2) -> tuple[Place, ...]:
    """What a tensor of a single-file checkpoint is: one place, three for fused q, k, v, none if it is other.

    Args:
        key: the tensor's name in the file.
        layers: layers a UNet block.
    """
    if key.startswith(UNET):
        module, _, leaf = key.removeprefix(UNET).rpartition(".")
        path = unet_from_ldm(module, layers)
        return (Place(f"denoiser.{path}.{leaf}"),) if path and leaf in ("weight", "bias") else ()
    for prefix, (component, openclip) in TEXT_PREFIXES.items():
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            found = _openclip(rest) if openclip else _clip(rest)
            return tuple(Place(f"{component}.{place.name}", place.third, place.transposed) for place in found)
    return ()


def unet_from_ldm(path: str, layers: int = 2) -> str | None:
    """LDM module path (without `model.diffusion_model.`) -> diffusers' path; None when it is not one."""
    if path in TOP_FROM_LDM:
        return TOP_FROM_LDM[path]
    match = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)", path)
    if match is None:
        return None
    side, part, leaf = match[1], int(match[3]), match[4]
    resnet = RESNET_FROM_LDM.get(leaf)
    if side is None:
        if part == 1:
            return f"mid_block.attentions.0.{leaf}"
        return f"mid_block.resnets.{part // 2}.{resnet}" if part in (0, 2) and resnet else None
    index = int(match[2]) - (1 if side == "input" else 0)
    if index < 0:
        return None
    block, layer = divmod(index, layers + 1)
    stem = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if side == "input" and layer == layers:
        return f"{stem}.downsamplers.0.conv" if part == 0 and leaf == "op" else None
    if side == "output" and leaf == "conv":
        return f"{stem}.upsamplers.0.conv" if layer == layers and part in (1, 2) else None
    if part == 0:
        return f"{stem}.resnets.{layer}.{resnet}" if resnet else None
    return f"{stem}.attentions.{layer}.{leaf}" if part == 1 else None


def sdxl_unet_to_ldm(path: str) -> str | None:
    """Diffusers' module path in SDXL's UNet -> LDM path; None when SDXL has no such module."""
    if path in _TOP:
        return _TOP[path]
    if match := re.fullmatch(r"mid_block\.resnets\.([01])\.(\w+)", path):
        return f"middle_block.{2 * int(match[1])}.{_RESNET[match[2]]}" if match[2] in _RESNET else None
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", path):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        down, block, layer, leaf = match[1] == "down", int(match[2]), int(match[4]), match[5]
        if layer >= (2 if down else 3) or (match[3] == "resnets" and leaf not in _RESNET):
            return None
        stem = f"input_blocks.{3 * block + layer + 1}" if down else f"output_blocks.{3 * block + layer}"
        return f"{stem}.0.{_RESNET[leaf]}" if match[3] == "resnets" else f"{stem}.1.{leaf}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"up_blocks\.([01])\.upsamplers\.0\.conv", path):
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv"
    return None


def _clip(rest: str) -> tuple[Place, ...]:
    """Transformers' own names; some converters leave `text_model.` out."""
    if not rest.endswith((".weight", ".bias")):
        return ()
    return (Place(rest if rest.startswith("text_model.") else f"text_model.{rest}"),)


def _openclip(rest: str) -> tuple[Place, ...]:
    if rest in _OPENCLIP_TOP:
        return (Place(_OPENCLIP_TOP[rest]),)
    if rest == "text_projection":  # x @ P, where a linear layer computes x @ W.T
        return (Place("text_projection.weight", transposed=True),)
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", rest)
    if match is None:
        return ()
    stem, part, leaf = f"text_model.encoder.layers.{match[1]}", match[2], match[3]
    if part == "attn.in_proj":
        return tuple(Place(f"{stem}.self_attn.{name}_proj.{leaf}", third) for third, name in enumerate("qkv"))
    ours = _OPENCLIP_LAYER.get(part)
    return (Place(f"{stem}.{ours}.{leaf}"),) if ours else ()
