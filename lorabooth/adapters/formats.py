"""Adapter tensors, canonical <-> the layouts that other tools read and write. Dict to dict; bijections.

canonical  `denoiser.down_blocks.0...to_q` + `.lora_A`, `.lora_B`, `.alpha`
kohya      `lora_unet_down_blocks_0..._to_q` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`
diffusers  `unet.down_blocks.0...to_q` + `.lora_A.weight`, `.lora_B.weight`; alphas in the header, as JSON
peft       `base_model.model.down_blocks.0...to_q` + as diffusers; alphas in adapter_config.json

kohya's is the layout that is saved: diffusers, ComfyUI and A1111 all open it, with every module's alpha in
the file. A PEFT folder holds one component (peft_folder.py). Everywhere the effective weight is
`W + (alpha / rank) * lora_B lora_A` (LoRA, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorabooth.adapters import lora_config, names
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("kohya", "diffusers", "peft")

_KOHYA_KINDS = MappingProxyType({"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"})
_KOHYA_SUFFIXES = MappingProxyType({kind: suffix for suffix, kind in _KOHYA_KINDS.items()})
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
_PEFT_PREFIX = "base_model.model."
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


@dataclass(frozen=True)
class Imported:
    """Canonical tensors of a foreign adapter, and what had to be assumed about it.

    Attributes:
        tensors: canonical names; lora_A [r,in] or [r,in,k,k] and lora_B [out,r] or [out,r,1,1] in the file's
            dtype, alpha [] float32.
        notes: sentences for the user, e.g. that alpha was absent and is taken as the rank.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def detect(keys: Collection[str]) -> str:
    """The layout that tensor names are in: "kohya", "diffusers" or "peft".

    Raises:
        AdapterError: the names are of none; says what they look like instead.
    """
    for mark, kind in _NOT_LORA.items():
        if any(mark in key for key in keys):
            raise AdapterError(f"This file is {kind}, not a plain LoRA adapter, and cannot be read as one.")
    if any(key.startswith("lora_") and key.endswith(tuple(_KOHYA_KINDS)) for key in keys):
        return "kohya"
    if any(key.startswith(_PEFT_PREFIX) for key in keys):
        return "peft"
    if any(_parse_dotted(key) is not None for key in keys):
        return "diffusers"
    raise AdapterError(f"No LoRA tensors are in this file; its tensors are called {_some(keys)}.")


def export(
    tensors: Mapping[str, Tensor], layout: str, family: str, component: str = "denoiser"
) -> dict[str, Tensor]:
    """Canonical tensors -> a layout's tensors (the same objects, other names).

    Args:
        tensors: canonical; every module with lora_A, lora_B and alpha.
        layout: "kohya", "diffusers" or "peft".
        family: decides kohya's names ("sd1", "sd2", "sdxl").
        component: the one that a PEFT dict holds; others must not be in `tensors`.

    Returns:
        Tensors by the layout's names. In "diffusers" and "peft" alpha travels apart, see `export_header` and
        `lora_config.build`.

    Raises:
        AdapterError: incomplete modules, or names that the layout cannot hold.
    """
    out: dict[str, Tensor] = {}
    for module in ranks_and_alphas(tensors):
        owner, path = names.split_module(module)
        for kind in names.KINDS:
            tensor = tensors[f"{module}.{kind}"]
            if layout == "kohya":
                out[f"{names.kohya_name(module, family)}.{_KOHYA_SUFFIXES[kind]}"] = tensor
            elif kind != "alpha" and layout == "diffusers":
                out[f"{lora_config.prefix_of(owner)}.{path}.{kind}.weight"] = tensor
            elif kind != "alpha" and layout == "peft":
                if owner != component:
                    raise AdapterError(f"A PEFT folder of {component!r} cannot hold {module!r}.")
                out[f"{_PEFT_PREFIX}{path}.{kind}.weight"] = tensor
            elif layout not in LAYOUTS:
                raise AdapterError(f"{layout!r} is not a known layout ({', '.join(LAYOUTS)}).")
    return out


def export_header(tensors: Mapping[str, Tensor], layout: str) -> dict[str, str]:
    """Header entries that belong to a layout: diffusers keeps ranks and alphas there."""
    if layout != "diffusers":
        return {}
    packed: dict[str, Any] = {}
    modules = ranks_and_alphas(tensors)
    for component in sorted({names.split_module(module)[0] for module in modules}):
        for key, value in lora_config.build(modules, component).items():
            packed[f"{lora_config.prefix_of(component)}.{key}"] = value
    return {lora_config.HEADER_KEY: json.dumps(packed, indent=2, sort_keys=True)}


def import_(
    tensors: Mapping[str, Tensor],
    layout: str,
    header: Mapping[str, str] | None = None,
    component: str = "denoiser",
) -> Imported:
    """A layout's tensors -> canonical tensors; no tensor is ever dropped.

    Args:
        tensors: by the layout's names.
        layout: "kohya", "diffusers" or "peft", as from `detect`.
        header: the file's string metadata; for "peft", `adapter_config` holds the configuration's JSON.
        component: the one that a PEFT dict belongs to.

    Raises:
        AdapterError: names that do not belong to the layout, incomplete modules, or factors that do not fit.
    """
    out: dict[str, Tensor] = {}
    unmatched: list[str] = []
    for key, tensor in tensors.items():
        parsed = _parse(key, layout, component)
        if parsed is None:
            unmatched.append(key)
            continue
        name = f"{parsed[0]}.{parsed[1]}"
        if name in out:
            raise AdapterError(f"Two tensors of the file mean {name!r}; one is {key!r}.")
        out[name] = tensor
    if unmatched:
        raise AdapterError(
            f"{len(unmatched)} of the file's {len(tensors)} tensors are not known in the {layout} layout: "
            f"{_some(unmatched)}.",
            "LoRA on linear and convolution layers of Stable Diffusion's UNet and CLIP can be read.",
        )
    return _with_alphas(out, lora_config.parse(layout, header or {}, component))


def ranks_and_alphas(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Canonical module -> (rank, alpha), in the order of the tensors.

    Raises:
        AdapterError: a module lacks one of its three tensors, or their shapes do not fit together.
    """
    modules: dict[str, set[str]] = {}
    for key in tensors:
        module, kind = names.split_key(key)
        modules.setdefault(module, set()).add(kind)
    out: dict[str, tuple[int, float]] = {}
    for module, kinds in modules.items():
        if missing := sorted(set(names.KINDS) - kinds):
            raise AdapterError(f"The adapter is incomplete: {module!r} has no {', '.join(missing)}.")
        alpha = tensors[f"{module}.alpha"]
        if alpha.numel() != 1 or not math.isfinite(float(alpha)):
            raise AdapterError(f"The alpha of {module!r} must be one finite number.")
        out[module] = (_rank(module, tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]), float(alpha))
    return out


def level_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with one alpha per component: other alphas are folded into their lora_B, in float32.

    diffusers (0.42 at least) applies one alpha to a whole component of a kohya file when its modules' alphas
    differ, and so changes the adapter's effect; files are written such that every reader agrees. An adapter
    whose alphas agree already, as all that are trained here, is returned as it is.

    Raises:
        AdapterError: incomplete modules.
    """
    modules = ranks_and_alphas(tensors)
    out = dict(tensors)
    for component in {names.split_module(module)[0] for module in modules}:
        own = {m: alpha for m, (_, alpha) in modules.items() if names.split_module(m)[0] == component}
        common = Counter(alpha for alpha in own.values() if alpha).most_common(1)
        for module, alpha in own.items():
            if common and alpha != common[0][0]:
                up = tensors[f"{module}.lora_B"]
                out[f"{module}.lora_B"] = (up.float() * (alpha / common[0][0])).to(up.dtype)
                out[f"{module}.alpha"] = tensors[f"{module}.alpha"].new_tensor(common[0][0])
    return out


def _rank(module: str, down: Tensor, up: Tensor) -> int:
    a, b = tuple(down.shape), tuple(up.shape)
    fits = len(a) == len(b) and len(a) in (2, 4) and min(*a, *b) > 0 and a[0] == b[1]
    if not fits or b[2:] not in ((), (1, 1)):
        raise AdapterError(
            f"The factors of {module!r} do not fit together: lora_A {list(a)}, lora_B {list(b)}."
        )
    return a[0]


def _parse(key: str, layout: str, component: str) -> tuple[str, str] | None:
    """A foreign tensor's (canonical module, kind), or None."""
    if layout == "kohya":
        name, _, suffix = key.partition(".")
        module = names.module_from_kohya(name)
        return (module, _KOHYA_KINDS[suffix]) if module and suffix in _KOHYA_KINDS else None
    if layout == "peft":
        parsed = _parse_suffix(key.removeprefix(_PEFT_PREFIX)) if key.startswith(_PEFT_PREFIX) else None
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


def _with_alphas(tensors: dict[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> Imported:
    """Add each module's alpha: from the file, else its configuration, else the rank; check completeness."""
    import torch

    out: dict[str, Tensor] = {}
    assumed = 0
    for module in dict.fromkeys(names.split_key(key)[0] for key in tensors):
        down, up = tensors.get(f"{module}.lora_A"), tensors.get(f"{module}.lora_B")
        if down is None or up is None:
            raise AdapterError(f"The adapter is incomplete: {module!r} has only one of its two factors.")
        rank = _rank(module, down, up)
        alpha = tensors.get(f"{module}.alpha")
        if alpha is None:
            component, path = names.split_module(module)
            found = (
                lora_config.alpha_of(configs[component], component, path, rank)
                if component in configs
                else None
            )
            assumed += found is None
            alpha = torch.tensor(float(rank) if found is None else found, dtype=torch.float32)
        out |= {f"{module}.lora_A": down, f"{module}.lora_B": up}
        out[f"{module}.alpha"] = alpha.reshape(()).to(torch.float32) if alpha.numel() == 1 else alpha
    ranks_and_alphas(out)
    note = f"{assumed} modules carry no alpha; it is taken as their rank, as diffusers and kohya's tools do."
    return Imported(out, (note,) if assumed else ())


def _some(keys: Collection[str], limit: int = 5) -> str:
    listed = ", ".join(repr(key) for key in list(keys)[:limit])
    return f"{listed} and {len(keys) - limit} more" if len(keys) > limit else listed
