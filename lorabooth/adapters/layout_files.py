"""An adapter's tensors and header entries as the files of one layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorabooth.adapters import adapter_folder, formats, layouts, lora_config, names
from lorabooth.adapters.family import naming_family
from lorabooth.adapters.folders import CONFIG_NAME, DIFFUSERS_NAME, WEIGHTS_NAME
from lorabooth.adapters.peft_folder import config_text, named, of_component
from lorabooth.adapters.stash import Record
from lorabooth.checkpoints.tensors import FLOAT_DTYPES, torch_dtype
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """A .safetensors file to be written."""

    tensors: Mapping[str, Tensor]
    entries: Mapping[str, str]


Files: TypeAlias = dict[str, "Weights | str"]
"""Path in the output folder -> content: weights, or a text."""


@dataclass(frozen=True)
class Job:
    """How tensors are to be written.

    Attributes:
        out: file or folder.
        name: of a kohya file in a folder.
        family: decides kohya's names.
        restored: what was special about a file of this layout, if the adapter was in one.
        entries: header entries that travel.
        kept: tensors have their dtypes.
    """

    out: Path
    name: str
    family: str
    restored: Record | None
    entries: Mapping[str, str]
    kept: bool

    def header(self) -> dict[str, str]:
        """The entries, and `format` as the layout's file had it."""
        fixed = self.restored.entries if self.restored else {"format": "pt"}
        return {**self.entries, **{key: value for key, value in fixed.items() if key == "format"}}


def files_of(tensors: Mapping[str, Tensor], layout: str, job: Job) -> Files:
    """The files of an adapter in a layout.

    Args:
        tensors: canonical.
        layout: "kohya", "diffusers" or "peft".
        job: how they are to be written.

    Raises:
        AdapterError: the layout cannot hold the adapter.
    """
    writer = {"kohya": _kohya, "diffusers": _diffusers, "peft": _peft}[layout]
    return writer(tensors, job)


def _kohya(tensors: Mapping[str, Tensor], job: Job) -> Files:
    if not naming_family(job.family, {names.split_key(key)[0] for key in tensors}):
        raise AdapterError(
            "The adapter does not tell which family of base models it is for, on which kohya's names depend.",
            f"Name it with --family: {', '.join(names.KOHYA_PREFIXES)}.",
        )
    foreign = _with_alphas(formats.export(tensors, "kohya", job.family), job)
    header = job.header() | formats.export_header(tensors, "kohya", job.family)
    return {job.name: Weights(foreign, header)}


def _with_alphas(foreign: dict[str, Tensor], job: Job) -> dict[str, Tensor]:
    """Alphas in the dtype and the shape that the file had; else in the factors' dtype, if they have one."""
    import torch

    restored = job.restored or Record("kohya")
    ranks = {k.removesuffix(".lora_down.weight"): v.shape[0] for k, v in foreign.items() if "lora_down" in k}
    if restored.alpha_dtype == "" and all(float(foreign[f"{k}.alpha"]) == r for k, r in ranks.items()):
        return {key: value for key, value in foreign.items() if not key.endswith(".alpha")}
    dtypes = {value.dtype for key, value in foreign.items() if not key.endswith(".alpha")}
    by_name = {name: torch_dtype(name) for name in FLOAT_DTYPES} | {"I64": torch.int64, "I32": torch.int32}
    wanted = by_name.get(restored.alpha_dtype or "") if job.kept else None
    wanted = wanted or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
    out = dict(foreign)
    for key, value in foreign.items():
        if key.endswith(".alpha"):
            cast = value.to(wanted)
            exact = float(cast) == float(value) and (wanted.itemsize > 1)
            out[key] = (cast if exact else value).reshape(restored.alpha_shape)
    return out


def _diffusers(tensors: Mapping[str, Tensor], job: Job) -> Files:
    foreign = formats.export(tensors, "diffusers", job.family)
    header = job.header() | _diffusers_config(tensors, job.restored)
    return {DIFFUSERS_NAME: Weights(foreign, header)}


def _diffusers_config(tensors: Mapping[str, Tensor], restored: Record | None) -> dict[str, str]:
    """The entry with LoRA configurations: the file's own if it is still right, else with its other fields."""
    key = lora_config.HEADER_KEY
    modules = formats.ranks_and_alphas(tensors)
    text = restored.entries.get(key, "") if restored else ""
    if restored and not text and all(alpha == rank for rank, alpha in modules.values()):
        return {}
    old = lora_config.parse("diffusers", {key: text}, "") if text else {}
    owners = lora_config.owners(modules)
    if old and all(lora_config.describes(old.get(name, {}), modules, name) for name in owners):
        return {key: text}
    packed = {
        f"{lora_config.prefix_of(name, path)}.{field}": value
        for name, path in owners.items()
        for field, value in lora_config.renewed(old.get(name, {}), modules, name).items()
    }
    return {key: json.dumps(packed, indent=2, sort_keys=True)}


def _peft(tensors: Mapping[str, Tensor], job: Job) -> Files:
    owners = lora_config.owners(formats.ranks_and_alphas(tensors))
    single = adapter_folder.is_file(job.out)
    if single and len(owners) > 1:
        raise AdapterError(
            f"A file in PEFT's layout holds one component, but the adapter has {', '.join(owners)}.",
            f"Give a folder instead of {job.out.name}.",
        )
    out: Files = {}
    for component, path in owners.items():
        own = of_component(tensors, component)
        nested = job.restored is not None and job.restored.text_model
        weights = named(own, component, text_model_prefix=nested)
        text = _peft_config(own, component, job.restored)
        header = job.header()
        if layouts.peft_component(weights, {}) != component:
            header[layouts.COMPONENT_KEY] = component
        if single:
            header["adapter_config"] = text
        folder = "" if len(owners) == 1 else f"{lora_config.prefix_of(component, path)}/"
        out[f"{folder}{WEIGHTS_NAME}"] = Weights(weights, header)
        if not single:
            out[f"{folder}{CONFIG_NAME}"] = text
    return out


def _peft_config(own: Mapping[str, Tensor], component: str, restored: Record | None) -> str:
    old = restored.configs.get(component) if restored else None
    if old is None:
        return config_text(own, component)
    modules = formats.ranks_and_alphas(own)
    right = lora_config.describes(old, modules, component)
    config = old if right else lora_config.renewed(old, modules, component)
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
