"""Names of modules in diffusion transformers: the original ones <-> diffusers', as literal tables. No torch.

FLUX and SD3 hold query, key and value (in FLUX's single blocks the MLP's first layer too) in one matrix in
their original code; diffusers has a layer for each. Adapters are canonical in diffusers' names, so an
original name can stand for several modules, which share lora_A and own consecutive rows of lora_B.

Sources: black-forest-labs/flux `flux/model.py`, Stability-AI/sd3.5 `mmditx.py`, and diffusers' models
`transformer_flux.py`, `transformer_sd3.py`; how trainers spell them: kohya-ss/sd-scripts
`networks/lora_flux.py`, `lora_sd3.py`, OneTrainer `modules/model/FluxModel.py`, `StableDiffusion3Model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

FAMILIES = ("flux", "sd3")

Halves = Literal["", "swapped", "swapped if two"]
"""Whether lora_B's two halves (shift, scale) are in the other order than in diffusers."""

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

# Original leaf -> diffusers' leaves.
_FLUX_DOUBLE = MappingProxyType(
    {
        "img_attn.qkv": _QKV,
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_attn.qkv": _ADDED_QKV,
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
    }
)
_FLUX_SINGLE = MappingProxyType(
    {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
)
_FLUX_TOP = MappingProxyType(
    {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
)
_SD3_JOINT = MappingProxyType(
    {
        "x_block.attn.qkv": _QKV,
        "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "x_block.mlp.fc1": ("ff.net.0.proj",),
        "x_block.mlp.fc2": ("ff.net.2",),
        "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.attn.qkv": _ADDED_QKV,
        "context_block.attn.proj": ("attn.to_add_out",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    }
)
_SD3_TOP = MappingProxyType(
    {
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    }
)
# Family -> (original block, diffusers' block, leaves); "" for what is in no block.
_BLOCKS: Mapping[str, tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...]] = MappingProxyType(
    {
        "flux": (
            ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
            ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
            ("", "", _FLUX_TOP),
        ),
        "sd3": (("joint_blocks", "transformer_blocks", _SD3_JOINT), ("", "", _SD3_TOP)),
    }
)
# The last layer's and, in SD3's last block, the context's modulation have two chunks, which diffusers' layer
# (AdaLayerNormContinuous) keeps in the other order; elsewhere the same leaf has six chunks in the same order.
_HALVES: Mapping[str, Halves] = MappingProxyType(
    {"final_layer.adaLN_modulation.1": "swapped", "context_block.adaLN_modulation.1": "swapped if two"}
)
# XLabs' processors (x-flux `src/flux/modules/layers.py`) -> the layer that their output is added to.
_XLABS = MappingProxyType(
    {
        "double_blocks.qkv_lora1": _QKV,
        "double_blocks.qkv_lora2": _ADDED_QKV,
        "double_blocks.proj_lora1": ("attn.to_out.0",),
        "double_blocks.proj_lora2": ("attn.to_add_out",),
        "single_blocks.qkv_lora": _QKV,
        "single_blocks.proj_lora": ("proj_out",),
    }
)
_XLABS_PATH = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.processor\.(\w+)")
# FLUX's MLP is four times as wide as its attention: linear1's rows are q, k, v and 4 times as many.
_WIDTHS = MappingProxyType({1: (1,), 3: (1, 1, 1), 4: (1, 1, 1, 4)})

_TOPS = ("transformer_blocks.", "single_transformer_blocks.", "time_text_embed.", "pos_embed.proj.")
_TOP_MODULES = ("x_embedder.", "context_embedder.", "norm_out.linear.", "proj_out.")
DIFFUSERS_TOPS = _TOPS + _TOP_MODULES
"""How the names of FLUX's and SD3's modules begin in diffusers."""


@dataclass(frozen=True, slots=True)
class Original:
    """A layer of the original code.

    Attributes:
        path: its name there, e.g. "double_blocks.0.img_attn.qkv".
        modules: diffusers' paths of what it holds, in the order of its rows.
        widths: their numbers of rows, relative to each other.
        halves: see Halves.
    """

    path: str
    modules: tuple[str, ...]
    widths: tuple[int, ...]
    halves: Halves = ""


def from_original(path: str) -> Original | None:
    """An original dotted name, FLUX's or SD3's; None when it is not one.

    `double_blocks.0.img_attn.qkv.1` is only the second of what the layer holds, as OneTrainer's OMI layout
    has it.
    """
    if match := _XLABS_PATH.fullmatch(path):
        leaves = _XLABS.get(f"{match[1]}.{match[3]}", ())
        block = "transformer_blocks" if match[1] == "double_blocks" else "single_transformer_blocks"
        modules = tuple(f"{block}.{match[2]}.{leaf}" for leaf in leaves)
        return Original(path, modules, _WIDTHS[len(modules)]) if modules else None
    if path == "img_in.proj":  # OneTrainer's OMI layout
        path = "img_in"
    found = _find(path, flat=False)
    if found is None and (match := re.fullmatch(r"(.+)\.([0-3])", path)):
        whole = _find(match[1], flat=False)
        if whole is not None and 1 < len(whole.modules) > int(match[2]):
            return Original(path, (whole.modules[int(match[2])],), (1,))
    return found


def from_flat(name: str) -> Original | None:
    """As `from_original`, of a name joined by underscores: "double_blocks_0_img_attn_qkv"."""
    return _find(name, flat=True)


def to_original(path: str, family: str) -> Original | None:
    """The original layer that holds a module of diffusers' name; None when the family has no such module."""
    match = re.fullmatch(r"(\w+_blocks)\.(\d+)\.(.+)", path)
    block, index, leaf = (match[1], match[2], match[3]) if match else ("", "", path)
    original = _by_module(family).get((block, leaf))
    if original is None:
        return None
    theirs, key = original
    return _original(theirs, block, index, key, _leaves(family, theirs)[key])


def _find(name: str, *, flat: bool) -> Original | None:
    mark = "_" if flat else r"\."
    match = re.fullmatch(rf"(double_blocks|single_blocks|joint_blocks){mark}(\d+){mark}(.+)", name)
    theirs, index, leaf = (match[1], match[2], match[3]) if match else ("", "", name)
    for family in FAMILIES:
        for original, ours, leaves in _BLOCKS[family]:
            if original != theirs:
                continue
            for key, targets in leaves.items():
                if leaf == (key.replace(".", "_") if flat else key):
                    return _original(theirs, ours, index, key, targets)
    return None


def _original(theirs: str, ours: str, index: str, key: str, leaves: tuple[str, ...]) -> Original:
    path = f"{theirs}.{index}.{key}" if theirs else key
    modules = tuple(f"{ours}.{index}.{leaf}" if ours else leaf for leaf in leaves)
    return Original(path, modules, _WIDTHS[len(modules)], _HALVES.get(key, ""))


def _leaves(family: str, theirs: str) -> Mapping[str, tuple[str, ...]]:
    return next(leaves for original, _, leaves in _BLOCKS[family] if original == theirs)


@cache
def _by_module(family: str) -> Mapping[tuple[str, str], tuple[str, str]]:
    """(diffusers' block, leaf) -> (original block, leaf)."""
    return MappingProxyType(dict(_pairs(family)))


def _pairs(family: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for theirs, ours, leaves in _BLOCKS.get(family, ()):
        for key, targets in leaves.items():
            yield from (((ours, leaf), (theirs, key)) for leaf in targets)
