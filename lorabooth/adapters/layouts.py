"""The layouts of adapter files in the world, as literal tables: which one a file is in, what a name means.

kohya      `lora_unet_down_blocks_0..._to_q` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`
diffusers  `unet.down_blocks.0...to_q` + `.lora_A.weight`, `.lora_B.weight`; alphas in the header, as JSON
peft       `base_model.model.down_blocks.0...to_q` + as diffusers; alphas in adapter_config.json
"""

from __future__ import annotations

import re
from collections.abc import Collection
from types import MappingProxyType

from lorabooth.adapters import lora_config, names
from lorabooth.errors import AdapterError

LAYOUTS = ("kohya", "diffusers", "peft")

KOHYA_KINDS = MappingProxyType({"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"})
# Longest first; ".lora.down" and ".lora_linear_layer.down" are what diffusers' training scripts still write.
_DOTTED_KINDS = MappingProxyType(
    {
        ".lora_linear_layer.down.weight": "lora_A",
        ".lora_linear_layer.up.weight": "lora_B",
        ".lora_A.default.weight": "lora_A",
        ".lora_B.default.weight": "lora_B",
        ".lora.down.weight": "lora_A",
        ".lora.up.weight": "lora_B",
        ".lora_A.weight": "lora_A",
        ".lora_B.weight": "lora_B",
        ".alpha": "alpha",
    }
)
# diffusers before 0.22: "...attn1.processor.to_q_lora.down.weight", and "...self_attn.to_q_lora.down.weight".
_OLD_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_UNET_TOPS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in.",
    "conv_out.",
    "time_embedding.",
    "add_embedding.",
)
PEFT_PREFIX = "base_model.model."
_NOT_LORA = MappingProxyType(
    {
        "hada_w1_a": "a LoHa (LyCORIS) adapter",
        "lokr_w": "a LoKr (LyCORIS) adapter",
        "dora_scale": "a DoRA adapter",
        "lora_magnitude_vector": "a DoRA adapter",
        "lora_mid": "a Tucker-decomposed (LyCORIS) adapter",
        "model.diffusion_model.": "a whole checkpoint",
        "string_to_param": "a textual inversion embedding",
        "emb_params": "a textual inversion embedding",
    }
)


def detect(keys: Collection[str]) -> str:
    """The layout that tensor names are in: "kohya", "diffusers" or "peft".

    Raises:
        AdapterError: the names are of none; says what they look like instead.
    """
    for mark, kind in _NOT_LORA.items():
        if any(mark in key for key in keys):
            raise AdapterError(f"This file is {kind}, not a plain LoRA adapter, and cannot be read as one.")
    if any(key.startswith("lora_") and key.endswith(tuple(KOHYA_KINDS)) for key in keys):
        return "kohya"
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        return "peft"
    if any(_parse_dotted(key) is not None for key in keys):
        return "diffusers"
    raise AdapterError(f"No LoRA tensors are in this file; its tensors are called {some(keys)}.")


def parse(key: str, layout: str, component: str) -> tuple[str, str] | None:
    """A foreign tensor's (canonical module, kind), or None."""
    if layout == "kohya":
        name, _, suffix = key.partition(".")
        module = names.module_from_kohya(name)
        return (module, KOHYA_KINDS[suffix]) if module and suffix in KOHYA_KINDS else None
    if layout == "peft":
        parsed = _parse_suffix(key.removeprefix(PEFT_PREFIX)) if key.startswith(PEFT_PREFIX) else None
        return (_module(component, parsed[0]), parsed[1]) if parsed else None
    if layout == "diffusers":
        return _parse_dotted(key)
    raise AdapterError(f"{layout!r} is not a known layout ({', '.join(LAYOUTS)}).")


def _parse_dotted(key: str) -> tuple[str, str] | None:
    """Diffusers' spellings: `unet.` or another component first; a bare UNet path is the denoiser's."""
    prefix, _, rest = key.partition(".")
    component = lora_config.COMPONENTS.get(prefix)
    if component is None:
        component, rest = ("denoiser", key) if key.startswith(_UNET_TOPS) else (None, "")
    parsed = _parse_suffix(rest)
    return (_module(component, parsed[0]), parsed[1]) if component and parsed else None


def _parse_suffix(rest: str) -> tuple[str, str] | None:
    """`<path><suffix>` -> (path, kind)."""
    if match := _OLD_PROCESSOR.fullmatch(rest):
        stem, leaf, side = match[1], match[2], match[3]
        clip = stem.endswith("self_attn")
        named = f"{leaf}_proj" if clip else ("to_out.0" if leaf == "out" else f"to_{leaf}")
        return f"{stem}.{named}", "lora_A" if side == "down" else "lora_B"
    for suffix, kind in _DOTTED_KINDS.items():
        if rest.endswith(suffix) and len(rest) > len(suffix):
            return rest.removesuffix(suffix), kind
    return None


def _module(component: str, path: str) -> str:
    module = f"{component}.{names.canonical_path(component, path)}"
    names.split_module(module)
    return module


def some(keys: Collection[str], limit: int = 5) -> str:
    """The first few of a list of names, for a message."""
    listed = ", ".join(repr(key) for key in list(keys)[:limit])
    return f"{listed} and {len(keys) - limit} more" if len(keys) > limit else listed
