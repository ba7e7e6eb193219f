"""LoRA configurations as PEFT and diffusers write them (JSON): ranks, alphas and module names.

diffusers keeps one per component in a file's header, PEFT one in `adapter_config.json`. Importing this module
imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from lorabooth.adapters import names
from lorabooth.errors import AdapterError

HEADER_KEY = "lora_adapter_metadata"
"""Header entry in which diffusers (0.34 and later) keeps LoRA configurations, as JSON."""

COMPONENTS = MappingProxyType(
    {
        "unet": "denoiser",
        "transformer": "denoiser",
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder_2",
        "text_encoder_3": "text_encoder_3",
    }
)
"""Diffusers' component name -> canonical."""


_UNET_TOPS = (
    *("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding."),
    *("add_embedding.", "class_embedding.", "encoder_hid_proj."),
)


def is_unet(path: str) -> bool:
    """Whether a denoiser's module is one of a UNet, by its name in diffusers."""
    return f"{path}.".startswith(_UNET_TOPS)


def prefix_of(component: str, path: str = "conv_in") -> str:
    """Diffusers' name of a canonical component: the denoiser is "unet" or "transformer".

    Args:
        component: canonical.
        path: of any of its modules, which tells a UNet from a transformer.
    """
    if component != "denoiser":
        return component
    return "unet" if is_unet(path) else "transformer"


def owners(modules: Iterable[str]) -> dict[str, str]:
    """Component -> path of the first of its modules, components sorted."""
    out: dict[str, str] = {}
    for module in modules:
        component, path = names.split_module(module)
        out.setdefault(component, path)
    return dict(sorted(out.items()))


def build(modules: Mapping[str, tuple[int, float]], component: str) -> dict[str, Any]:
    """PEFT's LoraConfig fields for one component: r, lora_alpha, their patterns, target_modules.

    Args:
        modules: canonical module -> (rank, alpha), as from `formats.ranks_and_alphas`.
        component: which one.

    Text encoder names are written without `text_model.`: PEFT matches endings, so they fit both trees.
    """
    anchor = "" if component.startswith("text_encoder") else "^"
    own = {
        names.flat_path(component, path): value
        for (owner, path), value in ((names.split_module(module), value) for module, value in modules.items())
        if owner == component
    }
    rank = Counter(rank for rank, _ in own.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in own.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {anchor + path: r for path, (r, _) in sorted(own.items()) if r != rank},
        "alpha_pattern": {anchor + path: _plain(a) for path, (_, a) in sorted(own.items()) if a != alpha},
        "target_modules": sorted(own),
    }


def renewed(
    old: Mapping[str, Any], modules: Mapping[str, tuple[int, float]], component: str
) -> dict[str, Any]:
    """A configuration for other ranks and alphas; what else it says (dropout, say) stays."""
    kept = {key: value for key, value in old.items() if key != "use_rslora"}
    return kept | build(modules, component)


def parse(layout: str, header: Mapping[str, str], component: str) -> dict[str, dict[str, Any]]:
    """Component -> LoRA configuration, from a file header or (entry `adapter_config`) a PEFT folder.

    Raises:
        AdapterError: it is not a JSON object.
    """
    raw = header.get({"diffusers": HEADER_KEY, "peft": "adapter_config"}.get(layout, ""), "")
    if not raw:
        return {}
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"The adapter's LoRA configuration is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError("The adapter's LoRA configuration is not a JSON object.")
    if layout == "peft":
        return {component: config}
    out: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        prefix, _, field = key.partition(".")
        if prefix in COMPONENTS:
            out.setdefault(COMPONENTS[prefix], {})[field] = value
    return out


def alpha_of(config: Mapping[str, Any], component: str, path: str, rank: int) -> float | None:
    """A module's alpha, or None; the first pattern that its path ends in wins, as in PEFT.

    Raises:
        AdapterError: options that a plain LoRA does not have, or values that make no sense.
    """
    for field in ("use_dora", "lora_bias"):
        if config.get(field):
            raise AdapterError(
                f"The adapter was trained with {field}, which cannot be read as a plain LoRA adapter."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"The adapter was trained with init_lora_weights {start!r}, which also changes the base model; "
            "as a plain LoRA adapter it would be wrong.",
            "Save it in PEFT with path_initial_model_for_weight_conversion.",
        )
    value = _of_module(config, "lora_alpha", "alpha_pattern", component, path)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise AdapterError(f"The adapter's alpha {value!r} is not a sensible number.")
    return float(value) * math.sqrt(rank) if config.get("use_rslora") else float(value)


# PEFT's initialisations after which the base is not the original one (LoraConfig's documentation).
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq")


def describes(config: Mapping[str, Any], modules: Mapping[str, tuple[int, float]], component: str) -> bool:
    """Whether a configuration gives every module of a component the rank and alpha that it has."""
    for module, (rank, alpha) in modules.items():
        owner, path = names.split_module(module)
        if owner != component:
            continue
        try:
            found = alpha_of(config, component, path, rank)
            if found is None or _of_module(config, "r", "rank_pattern", component, path) != rank:
                return False
        except AdapterError:
            return False
        if struct.pack("<f", found) != struct.pack("<f", alpha):  # alphas are float32
            return False
    return True


def _of_module(config: Mapping[str, Any], field: str, patterns_field: str, component: str, path: str) -> Any:
    """A module's value: that of the first pattern which its path ends in, else the common one."""
    patterns = config.get(patterns_field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"The adapter's {patterns_field} is not a table of module names.")
    flat = names.flat_path(component, path)
    for pattern, value in patterns.items():
        literal = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        if re.search(r"[\\^$*+?()\[\]{}|]", literal):
            raise AdapterError(
                f"The adapter's {patterns_field} {pattern!r} is a regular expression; only names are read."
            )
        whole = literal in (path, flat)
        if whole or (not pattern.startswith("^") and path.endswith(f".{literal}")):
            return value
    return config.get(field)


def _plain(value: float) -> int | float:
    """An integer where it is one, as LoRA configurations customarily hold."""
    return int(value) if value == int(value) else value
