"""The layouts of adapter files in the world, as literal tables: which one a file is in, what a name means.

kohya      `lora_unet_down_blocks_0..._to_q` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`
diffusers  `unet.down_blocks.0...to_q` + `.lora_A.weight`, `.lora_B.weight`; alphas in the header, as JSON
peft       `base_model.model.down_blocks.0...to_q` + as diffusers; alphas in adapter_config.json

A name says by itself what it means, in each of the spellings that trainers have for these layouts: a prefix,
a path in the network's original or in diffusers' names, a suffix. So a file may mix them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorabooth.adapters import lora_config, names, transformer_names
from lorabooth.adapters.family import family_from_metadata
from lorabooth.adapters.kinds import kind_of as kind_of
from lorabooth.adapters.transformer_names import Halves, Original
from lorabooth.checkpoints import ldm
from lorabooth.errors import AdapterError

LAYOUTS = ("kohya", "diffusers", "peft")

KOHYA_KINDS = MappingProxyType({"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"})
PEFT_PREFIX = "base_model.model."
COMPONENT_KEY = "lorabooth.component"
"""Header entry of a file in PEFT's layout: whose adapter it is, which its names do not say."""

# How dotted names begin -> component, longest first. "t5" depends on the family (`names.t5_component`).
_DOTTED_PREFIXES = MappingProxyType(
    {
        # ComfyUI, and OneTrainer's layout for it
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_h.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.t5xxl.transformer.": names.T5,
        "model.diffusion_model.": "denoiser",
        "diffusion_model.": "denoiser",
        # diffusers
        "text_encoder_3.": "text_encoder_3",
        "text_encoder_2.": "text_encoder_2",
        "text_encoder.": "text_encoder",
        "transformer.": "denoiser",
        "unet.": "denoiser",
        # ai-toolkit's text encoders beside a transformer
        "lora_te1.": "text_encoder",
        "lora_te2.": "text_encoder_2",
        "lora_te.": "text_encoder",
        # OneTrainer's OMI layout
        "clip_l.": "text_encoder",
        "clip_g.": "text_encoder_2",
        "t5.": names.T5,
    }
)
_SUFFIXES = MappingProxyType(
    {
        ".lora_linear_layer.down.weight": "lora_A",  # diffusers before 0.26
        ".lora_linear_layer.up.weight": "lora_B",
        ".lora.down.weight": "lora_A",  # diffusers' training scripts
        ".lora.up.weight": "lora_B",
        ".lora_down.weight": "lora_A",  # kohya, OneTrainer
        ".lora_up.weight": "lora_B",
        ".lora_A.weight": "lora_A",  # PEFT
        ".lora_B.weight": "lora_B",
        ".lora_A": "lora_A",  # Mochi's trainer, by ComfyUI
        ".lora_B": "lora_B",
        ".alpha": "alpha",
    }
)
# PEFT's state_dict() also holds the adapter's name, "default" unless it was given another.
_NAMED = re.compile(r"(.+)\.(lora_[AB])\.[A-Za-z0-9_-]+\.weight")
# diffusers before 0.22: "...attn1.processor.to_q_lora.down.weight", and "...self_attn.to_q_lora.down.weight".
_OLD_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_XLABS = re.compile(r"((?:double|single)_blocks\.\d+\.processor\.\w+_lora[12]?)\.(down|up)\.weight")

_LDM_TOPS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_CLIP_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a tensor of an adapter file is.

    Attributes:
        modules: the canonical modules that it belongs to; several where the layer holds several (q, k, v).
        kind: "lora_A", "lora_B" or "alpha".
        widths: the modules' numbers of lora_B's rows, relative to each other.
        halves: whether lora_B's halves are in the other order.
    """

    modules: tuple[str, ...]
    kind: str
    widths: tuple[int, ...] = (1,)
    halves: Halves = ""

    def rows(self, key: str, total: int) -> list[tuple[int, int]]:
        """Each module's rows [begin, end) of a lora_B that has `total`.

        Raises:
            AdapterError: they do not come out even.
        """
        unit, rest = divmod(total, sum(self.widths))
        if rest or not unit:
            raise AdapterError(
                f"Tensor {key!r} should hold {len(self.modules)} modules in the ratio "
                f"{':'.join(map(str, self.widths))}, but has {total} rows."
            )
        ends = [unit * sum(self.widths[: i + 1]) for i in range(len(self.widths))]
        return [(end - unit * width, end) for end, width in zip(ends, self.widths, strict=True)]


def detect(keys: Collection[str]) -> str:
    """The layout that tensor names are in: "kohya", "diffusers" or "peft".

    Raises:
        AdapterError: the names are of none; says what they look like instead.
    """
    kind = kind_of(keys)
    if kind in _NOT_LORA:
        raise AdapterError(
            f"This file is {_NOT_LORA[kind]}, not a plain LoRA adapter, and cannot be read as one."
        )
    if any(_flat(key) for key in keys):
        return "kohya"
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        return "peft"
    if any(parse(key) is not None for key in keys):
        return "diffusers"
    raise AdapterError(f"No LoRA tensors are in this file; its tensors are called {some(keys)}.")


def parse(key: str, component: str = "denoiser", family: str = "") -> Meaning | None:
    """What a foreign tensor is; None when its name is of no known spelling.

    Args:
        key: its name.
        component: whose adapter a name of PEFT's is, which does not say.
        family: decides which text encoder T5 is.
    """
    if _flat(key):
        return _parse_flat(key, family)
    if key.startswith(PEFT_PREFIX):
        parsed = _split_suffix(key.removeprefix(PEFT_PREFIX))
        return _meaning(component, *parsed) if parsed else None
    for prefix, found in _DOTTED_PREFIXES.items():
        if key.startswith(prefix):
            parsed = _split_suffix(key.removeprefix(prefix).removeprefix(PEFT_PREFIX))
            owner = names.t5_component(family) if found == names.T5 else found
            if parsed is None or ("diffusion_model." in prefix and not _known_denoiser(parsed[0])):
                return None
            return _meaning(owner, *parsed)
    parsed = _split_suffix(key)
    return _meaning("denoiser", *parsed) if parsed and _known_denoiser(parsed[0]) else None


def family_hint(keys: Collection[str], header: Mapping[str, str]) -> str:
    """The family, as far as it decides what names mean (which text encoder T5 is); else ""."""
    if any("single_transformer_blocks" in key or "double_blocks" in key for key in keys):
        return "flux"
    return "flux" if any("single_blocks" in key for key in keys) else family_from_metadata(header)


def peft_component(keys: Collection[str], header: Mapping[str, str], component: str = "denoiser") -> str:
    """Whose adapter a file in PEFT's layout is: as its header or its names say, else `component`."""
    said = header.get(COMPONENT_KEY, "")
    if said in names.COMPONENTS:
        return said
    paths = [key.removeprefix(PEFT_PREFIX) for key in keys]
    text = any(_CLIP_LAYER.match(path) or path.startswith(names.T5_TOP) for path in paths)
    return "text_encoder" if text and component == "denoiser" else component


def some(keys: Collection[str], limit: int = 5) -> str:
    """The first few of a list of names, for a message."""
    listed = ", ".join(repr(key) for key in list(keys)[:limit])
    return f"{listed} and {len(keys) - limit} more" if len(keys) > limit else listed


def _flat(key: str) -> bool:
    """Whether a name is of underscore-joined parts up to the suffix."""
    name, dot, suffix = key.partition(".")
    return bool(dot) and name.startswith(tuple(names.FLAT_PREFIXES)) and f".{suffix}" in _SUFFIXES


def _parse_flat(key: str, family: str) -> Meaning | None:
    name, _, suffix = key.partition(".")
    kind = _SUFFIXES[f".{suffix}"]
    prefix = next(prefix for prefix in names.FLAT_PREFIXES if name.startswith(prefix))
    if names.FLAT_PREFIXES[prefix] == "denoiser":
        original = transformer_names.from_flat(name.removeprefix(prefix))
        if original is not None:
            return _of_original(original, kind)
    module = names.module_from_kohya(name, family)
    return Meaning((module,), kind) if module else None


def _split_suffix(rest: str) -> tuple[str, str] | None:
    """`<path><suffix>` -> (path, kind)."""
    if match := _OLD_PROCESSOR.fullmatch(rest):
        stem, leaf, side = match[1], match[2], match[3]
        clip = stem.endswith("self_attn")
        named = f"{leaf}_proj" if clip else ("to_out.0" if leaf == "out" else f"to_{leaf}")
        return f"{stem}.{named}", "lora_A" if side == "down" else "lora_B"
    if match := _XLABS.fullmatch(rest):
        return match[1], "lora_A" if match[2] == "down" else "lora_B"
    for suffix, kind in _SUFFIXES.items():
        if rest.endswith(suffix) and len(rest) > len(suffix):
            return rest.removesuffix(suffix), kind
    match = _NAMED.fullmatch(rest)
    return (match[1], match[2]) if match else None


def _meaning(component: str, path: str, kind: str) -> Meaning | None:
    """A dotted path of a component -> canonical."""
    if component == "denoiser":
        if path.startswith(_LDM_TOPS):
            found = ldm.unet_from_ldm(path)
            return Meaning((f"denoiser.{found}",), kind) if found else None
        if original := transformer_names.from_original(path):
            return _of_original(original, kind)
    module = f"{component}.{names.canonical_path(component, path)}"
    names.split_module(module)
    return Meaning((module,), kind)


def _of_original(original: Original, kind: str) -> Meaning:
    modules = tuple(f"denoiser.{path}" for path in original.modules)
    return Meaning(modules, kind, original.widths, original.halves)


def _known_denoiser(path: str) -> bool:
    """Whether a path without a component's name is a denoiser's."""
    known = f"{path}.".startswith((*_LDM_TOPS, *transformer_names.DIFFUSERS_TOPS))
    return known or lora_config.is_unet(path) or transformer_names.from_original(path) is not None


_NOT_LORA = MappingProxyType(
    {
        "LoHa": "a LoHa (LyCORIS) adapter",
        "LoKr": "a LoKr (LyCORIS) adapter",
        "OFT": "an OFT (LyCORIS) adapter",
        "GLoRA": "a GLoRA (LyCORIS) adapter",
        "(IA)3": "an (IA)3 adapter",
        "DoRA": "a DoRA adapter",
        "Tucker LoRA": "a Tucker-decomposed (LyCORIS LoCon) adapter",
        "full difference": "a full difference of weights",
        "textual inversion": "a textual inversion embedding",
        "checkpoint": "a whole checkpoint",
    }
)
