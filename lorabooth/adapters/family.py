"""Which family of base models an adapter fits, from its modules' names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Canonical module -> shapes of (lora_A, lora_B)."""

# What cross-attention's keys and values are made from: CLIP ViT-L/14, OpenCLIP ViT-H/14, both of SDXL's.
_BY_CONTEXT_WIDTH = MappingProxyType({768: "sd1", 1024: "sd2", 2048: "sdxl"})
_DEEP = re.compile(
    r"denoiser\.(?:down_blocks\.\d|mid_block|up_blocks\.\d)\.attentions\.\d"
    r"\.transformer_blocks\.[1-9]"
)


def family_of(shapes: Shapes) -> str:
    """The family, or "" where names and shapes leave it open.

    Cross-attention's width tells SD1, SD2 and SDXL apart; without it several transformer layers a block, a
    second text encoder or the text encoder's width do.
    """
    contexts = {
        down[1]
        for module, (down, _) in shapes.items()
        if module.startswith("denoiser.") and module.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    if len(contexts) == 1 and (found := _BY_CONTEXT_WIDTH.get(next(iter(contexts)))):
        return found
    if any(module.startswith("text_encoder_2.") or _DEEP.match(module) for module in shapes):
        return "sdxl"
    widths = {
        down[1]
        for module, (down, _) in shapes.items()
        if module.startswith("text_encoder.") and module.endswith(".q_proj")
    }
    return "sd2" if widths == {1024} else ""
