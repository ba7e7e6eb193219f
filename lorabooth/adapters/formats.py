"""Adapter tensors, canonical <-> the layouts that other tools read and write. Dict to dict; bijections.

canonical  `denoiser.down_blocks.0...to_q` + `.lora_A`, `.lora_B`, `.alpha`
kohya      `lora_unet_down_blocks_0..._to_q` + `.lora_down.weight`, `.lora_up.weight`, `.alpha`
diffusers  `unet.down_blocks.0...to_q` + `.lora_A.weight`, `.lora_B.weight`; alphas in the header, as JSON
peft       `base_model.model.down_blocks.0...to_q` + as diffusers; alphas in adapter_config.json

kohya's is the layout that is saved: diffusers, ComfyUI and A1111 all open it, with every module's alpha in
the file. A PEFT folder holds one component (peft_folder.py). FLUX's and SD3's layers that hold several
modules come apart and together again in fused.py. Everywhere the effective weight is
`W + (alpha / rank) * lora_B lora_A` (LoRA, arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorabooth.adapters import fused, layouts, lora_config, names, transformer_names
from lorabooth.adapters.family import naming_family
from lorabooth.checkpoints.tensors import is_finite
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

_KOHYA_SUFFIXES = MappingProxyType({kind: suffix for suffix, kind in layouts.KOHYA_KINDS.items()})


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a stored tensor a canonical tensor is.

    Attributes:
        key: the stored tensor's name.
        rows: [begin, end) of its first dimension; None for all of it.
        swapped: its first dimension's two halves are stored in the other order.
    """

    key: str
    rows: tuple[int, int] | None = None
    swapped: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the stored tensor; a view where it can be one."""
        part = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return part.roll(part.shape[0] // 2, 0) if self.swapped else part


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


def export(
    tensors: Mapping[str, Tensor], layout: str, family: str, component: str = "denoiser"
) -> dict[str, Tensor]:
    """Canonical tensors -> a layout's tensors (the same objects, other names).

    Args:
        tensors: canonical; every module with lora_A, lora_B and alpha.
        layout: "kohya", "diffusers" or "peft".
        family: decides kohya's names ("sd1", "sd2", "sdxl", "sd3", "flux").
        component: the one that a PEFT dict holds; others must not be in `tensors`.

    Returns:
        Tensors by the layout's names; new ones only for layers that kohya's layout holds in one. In
        "diffusers" and "peft" alpha travels apart, see `export_header` and `lora_config.build`.

    Raises:
        AdapterError: incomplete modules, or names that the layout cannot hold.
    """
    out: dict[str, Tensor] = {}
    ranks_and_alphas(tensors)
    if layout == "kohya":
        family = naming_family(family, {names.split_key(key)[0] for key in tensors})
    if layout == "kohya" and family in transformer_names.FAMILIES:
        tensors = fused.to_original(tensors, family)
    for module in ranks_and_alphas(tensors):
        owner, path = names.split_module(module)
        for kind in names.KINDS:
            tensor = tensors[f"{module}.{kind}"]
            if layout == "kohya":
                out[f"{names.kohya_name(module, family)}.{_KOHYA_SUFFIXES[kind]}"] = tensor
            elif kind != "alpha" and layout == "diffusers":
                out[f"{lora_config.prefix_of(owner, path)}.{path}.{kind}.weight"] = tensor
            elif kind != "alpha" and layout == "peft":
                if owner != component:
                    raise AdapterError(f"A PEFT folder of {component!r} cannot hold {module!r}.")
                out[f"{layouts.PEFT_PREFIX}{path}.{kind}.weight"] = tensor
            elif layout not in layouts.LAYOUTS:
                raise AdapterError(f"{layout!r} is not a known layout ({', '.join(layouts.LAYOUTS)}).")
    return out


def export_header(tensors: Mapping[str, Tensor], layout: str, family: str = "") -> dict[str, str]:
    """Header entries that belong to a layout.

    diffusers keeps ranks and alphas there; kohya's files of FLUX and SD3 what is in a layer that holds
    several modules, where the tensors alone would leave it open.
    """
    if layout == "kohya" and family in transformer_names.FAMILIES:
        return fused.header(tensors, family)
    if layout != "diffusers":
        return {}
    packed: dict[str, Any] = {}
    modules = ranks_and_alphas(tensors)
    for component, first in lora_config.owners(modules).items():
        for key, value in lora_config.build(modules, component).items():
            packed[f"{lora_config.prefix_of(component, first)}.{key}"] = value
    return {lora_config.HEADER_KEY: json.dumps(packed, indent=2, sort_keys=True)}


def locate(
    shapes: Mapping[str, tuple[int, ...]],
    layout: str,
    component: str = "denoiser",
    header: Mapping[str, str] | None = None,
) -> dict[str, Part]:
    """Where each canonical tensor is among a layout's tensors; none is ever dropped.

    Modules that one layer of FLUX or SD3 holds share its lora_A and its alpha.

    Args:
        shapes: the layout's names -> shapes, as from a file's header.
        layout: "kohya", "diffusers" or "peft", as from `layouts.detect`.
        component: the one that a PEFT dict belongs to.
        header: the file's string metadata, for what names leave open.

    Returns:
        Canonical name -> part, without the alphas that no tensor holds (see `complete`).

    Raises:
        AdapterError: names that do not belong to the layout.
    """
    if layout not in layouts.LAYOUTS:
        raise AdapterError(f"{layout!r} is not a known layout ({', '.join(layouts.LAYOUTS)}).")
    family = layouts.family_hint(shapes, header or {})
    out: dict[str, Part] = {}
    unmatched: list[str] = []
    two_chunks: dict[str, str] = {}
    for key, shape in shapes.items():
        meaning = layouts.parse(key, component, family)
        if meaning is None:
            unmatched.append(key)
            continue
        for name, part in _parts(key, shape, meaning).items():
            if name in out:
                raise AdapterError(f"Two tensors of the file mean {name!r}; one is {key!r}.")
            out[name] = part
            if meaning.halves == "swapped if two" and meaning.kind == "lora_B":
                two_chunks[name] = name.removesuffix("lora_B") + "lora_A"
    if unmatched:
        raise AdapterError(
            f"{len(unmatched)} of the file's {len(shapes)} tensors are not known in the {layout} layout: "
            f"{layouts.some(unmatched)}.",
            "LoRA on linear and convolution layers of Stable Diffusion's UNet, of CLIP and T5, and of FLUX's "
            "and SD3's transformers can be read.",
        )
    for up, down in two_chunks.items():
        if down in out and shapes[out[up].key][0] == 2 * math.prod(shapes[out[down].key][1:]):
            out[up] = replace(out[up], swapped=True)
    return out


def _parts(key: str, shape: tuple[int, ...], meaning: layouts.Meaning) -> dict[str, Part]:
    """The canonical tensors that one stored tensor holds."""
    if len(meaning.modules) == 1 or meaning.kind != "lora_B" or not shape:
        swapped = meaning.halves == "swapped" and meaning.kind == "lora_B"
        return {f"{module}.{meaning.kind}": Part(key, swapped=swapped) for module in meaning.modules}
    return {
        f"{module}.lora_B": Part(key, rows)
        for module, rows in zip(meaning.modules, meaning.rows(key, shape[0]), strict=True)
    }


def complete(
    shapes: Mapping[str, tuple[int, ...]],
    alphas: Mapping[str, float],
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, tuple[int, float]], tuple[str, ...]]:
    """Each module's rank and alpha: alpha from the file, else from its configuration, else the rank.

    Args:
        shapes: canonical tensor names -> shapes; alphas may be absent.
        alphas: canonical module -> alpha as the file's tensors have it (NaN where it is no single number).
        configs: component -> LoRA configuration, as from `lora_config.parse`.

    Returns:
        Canonical module -> (rank, alpha) in the order of the tensors, and sentences for the user on what had
        to be assumed.

    Raises:
        AdapterError: a factor is missing, factors do not fit together, or an alpha is no finite number.
    """
    out: dict[str, tuple[int, float]] = {}
    assumed = 0
    for module in dict.fromkeys(names.split_key(key)[0] for key in shapes):
        down, up = shapes.get(f"{module}.lora_A"), shapes.get(f"{module}.lora_B")
        if down is None or up is None:
            raise AdapterError(f"The adapter is incomplete: {module!r} has only one of its two factors.")
        rank = rank_of(module, down, up)
        alpha = alphas.get(module)
        if alpha is None:
            component, path = names.split_module(module)
            config = configs.get(component)
            alpha = lora_config.alpha_of(config, component, path, rank) if config is not None else None
            assumed += alpha is None
        out[module] = (rank, checked_alpha(module, float(rank) if alpha is None else alpha))
    note = f"{assumed} modules carry no alpha; it is taken as their rank, as diffusers and kohya's tools do."
    return out, (note,) if assumed else ()


def import_(
    tensors: Mapping[str, Tensor],
    layout: str,
    header: Mapping[str, str] | None = None,
    component: str = "denoiser",
) -> Imported:
    """A layout's tensors -> canonical tensors; no tensor is ever dropped.

    Args:
        tensors: by the layout's names.
        layout: "kohya", "diffusers" or "peft", as from `layouts.detect`.
        header: the file's string metadata; for "peft", `adapter_config` holds the configuration's JSON.
        component: the one that a PEFT dict belongs to.

    Raises:
        AdapterError: names that do not belong to the layout, incomplete modules, or factors that do not fit.
    """
    import torch

    if layout == "peft":
        component = layouts.peft_component(tensors, header or {}, component)
    parts = locate({key: tuple(value.shape) for key, value in tensors.items()}, layout, component, header)
    held = {name: part.of(tensors[part.key]) for name, part in parts.items()}
    alphas = {
        name.removesuffix(".alpha"): float(value) if value.numel() == 1 else math.nan
        for name, value in held.items()
        if name.endswith(".alpha")
    }
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    modules, notes = complete(shapes, alphas, lora_config.parse(layout, header or {}, component))
    out: dict[str, Tensor] = {}
    for module, (_, alpha) in modules.items():
        out |= {f"{module}.{kind}": held[f"{module}.{kind}"] for kind in ("lora_A", "lora_B")}
        out[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    together = [n.removesuffix(".lora_B") for n, part in parts.items() if part.rows is not None]
    return Imported(fused.separated(out, header or {}, together), notes)


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
        down, up = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        value = checked_alpha(module, float(alpha) if alpha.numel() == 1 else math.nan)
        out[module] = (rank_of(module, tuple(down.shape), tuple(up.shape)), value)
    return out


def level_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with one alpha per component: other alphas are folded into their lora_B, in float32.

    diffusers (0.42 at least) applies one alpha to a whole component of a kohya file when its modules' alphas
    differ, and so changes the adapter's effect; files are written such that every reader agrees. An adapter
    whose alphas agree already, as all that are trained here, is returned as it is. Modules that FLUX's and
    SD3's original layers hold in one also get the largest of their ranks, padded with zeros.

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
    return fused.level(out)


def rank_of(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> int:
    """The inner dimension of two factors' shapes.

    Raises:
        AdapterError: the factors do not fit together.
    """
    fits = len(down) == len(up) and len(down) in (2, 4) and min(*down, *up) > 0 and down[0] == up[1]
    if not fits or up[2:] not in ((), (1, 1)):
        raise AdapterError(
            f"The factors of {module!r} do not fit together: lora_A {list(down)}, lora_B {list(up)}."
        )
    return down[0]


def checked_alpha(module: str, alpha: float) -> float:
    """The alpha, if it is a finite number.

    Raises:
        AdapterError: it is not.
    """
    if not math.isfinite(alpha):
        raise AdapterError(f"The alpha of {module!r} must be one finite number.")
    return alpha


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        AdapterError: names the first tensors that hold them.
    """
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise AdapterError(
            f"{where}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, e.g. {bad[0]!r}.",
            "Such an adapter gives black images; use an earlier checkpoint.",
        )
