"""Which family of base models an adapter fits: from its modules' names and shapes, or from its metadata."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from lorabooth.adapters import transformer_names

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Canonical module -> shapes of (lora_A, lora_B)."""

# What cross-attention's keys and values are made from: CLIP ViT-L/14, OpenCLIP ViT-H/14, both of SDXL's.
_BY_CONTEXT_WIDTH = MappingProxyType({768: "sd1", 1024: "sd2", 2048: "sdxl"})
# Widths of transformers: FLUX.1; SD3 and SD3.5 medium, SD3.5 large.
_BY_HIDDEN_WIDTH = MappingProxyType({3072: "flux", 1536: "sd3", 2432: "sd3"})
# Transformers of other families have the same names and more blocks (HunyuanVideo, Qwen-Image).
_MOST_BLOCKS = MappingProxyType(
    {
        "flux": MappingProxyType({"transformer_blocks": 19, "single_transformer_blocks": 38}),
        "sd3": MappingProxyType({"transformer_blocks": 38}),
    }
)
_BLOCK = re.compile(r"(\w+_blocks)\.(\d+)\.")
_DEEP = re.compile(
    r"denoiser\.(?:down_blocks\.\d|mid_block|up_blocks\.\d)\.attentions\.\d"
    r"\.transformer_blocks\.[1-9]"
)
_UNET = (
    *("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding."),
    "add_embedding.",
)
_HIDDEN_IN = (
    *(".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.add_q_proj", ".attn.add_k_proj"),
    *(".attn.add_v_proj", ".norm1.linear", ".norm1_context.linear", ".ff.net.0.proj"),
)

_BY_NAME = MappingProxyType(
    {
        # kohya's sd-scripts `train_util.get_sai_model_spec`, OneTrainer `resources/sd_model_spec/*-lora.json`
        "modelspec.architecture": (
            (r"stable-diffusion-v1\b.*", "sd1"),
            (r"stable-diffusion-v2\b.*", "sd2"),
            (r"stable-diffusion-xl-v1-base\b.*", "sdxl"),
            (r"stable-diffusion-(v?3)\b.*", "sd3"),
            (r"flux[-.]1(-(unknown|dev|schnell|fill-dev))?(/.*)?", "flux"),
        ),
        # kohya's sd-scripts, ai-toolkit `toolkit/metadata.py`
        "ss_base_model_version": (
            (r"sd_v1|sd_1\.5", "sd1"),
            (r"sd_v2.*|sd_2\.[01]", "sd2"),
            (r"sdxl_.*", "sdxl"),
            (r"sd3.*", "sd3"),
            (r"flux1", "flux"),
        ),
        "ss_v2": ((r"true", "sd2"),),
    }
)


def family_of(shapes: Shapes) -> str:
    """The family, or "" where names and shapes leave it open.

    Cross-attention's width tells SD1, SD2 and SDXL apart; without it several transformer layers a block, a
    second text encoder or the text encoder's width do. FLUX and SD3 have names of their own in part, and
    widths.
    """
    if found := _transformer_family(shapes):
        return found
    contexts = {
        down[1]
        for module, (down, _) in shapes.items()
        if module.startswith("denoiser.") and module.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    if len(contexts) == 1 and (found := _BY_CONTEXT_WIDTH.get(next(iter(contexts)), "")):
        return found
    second = any(module.startswith("text_encoder_2.") for module in shapes)
    transformer = any(not path.startswith(_UNET) for path in _denoiser(shapes))
    if (second and not transformer) or any(_DEEP.match(module) for module in shapes):
        return "sdxl"
    widths = {
        down[1]
        for module, (down, _) in shapes.items()
        if module.startswith("text_encoder.") and module.endswith(".q_proj")
    }
    return "sd2" if widths == {1024} else ""


def naming_family(family: str, modules: Collection[str]) -> str:
    """The family whose kohya names an adapter gets: its own, or where that is not known, one of like modules.

    SD1's and SD2's names are the same; SDXL tells itself apart by deep transformer blocks or a second text
    encoder. "" for transformers that are not known.
    """
    if family:
        return family
    if any(module.startswith("text_encoder_2.") or _DEEP.match(module) for module in modules):
        return "sdxl"
    paths = [module.removeprefix("denoiser.") for module in modules if module.startswith("denoiser.")]
    return "sd1" if all(path.startswith(_UNET) for path in paths) else ""


def family_from_metadata(entries: Mapping[str, str]) -> str:
    """The family that a file's string metadata names (lorabooth's, kohya's, ModelSpec's); else ""."""
    if said := entries.get("lorabooth.family", ""):
        return said
    for key, patterns in _BY_NAME.items():
        value = entries.get(key, "").lower()
        found = next((family for pattern, family in patterns if re.fullmatch(pattern, value)), "")
        if found:
            return found
    return ""


def _denoiser(shapes: Shapes) -> list[str]:
    return [module.removeprefix("denoiser.") for module in shapes if module.startswith("denoiser.")]


def _transformer_family(shapes: Shapes) -> str:
    """FLUX or SD3: every module is one of that network's, and a name or a width is its own."""
    paths = _denoiser(shapes)
    if not paths:
        if any(module.startswith("text_encoder_3.") for module in shapes):
            return "sd3"
        t5 = any(module.startswith("text_encoder_2.encoder.block.") for module in shapes)
        return "flux" if t5 else ""
    named = [
        family
        for family in transformer_names.FAMILIES
        if all(transformer_names.to_original(path, family) for path in paths)
    ]
    widths = {down[1] for module, (down, _) in shapes.items() if module.endswith(_HIDDEN_IN)}
    by_width = _BY_HIDDEN_WIDTH.get(next(iter(widths)), "") if len(widths) == 1 else ""
    found = named[0] if len(named) == 1 else by_width
    return found if found in named and _few_blocks(paths, found) else ""


def _few_blocks(paths: Collection[str], family: str) -> bool:
    blocks = (_BLOCK.match(path) for path in paths)
    return all(int(block[2]) < _MOST_BLOCKS[family][block[1]] for block in blocks if block)
