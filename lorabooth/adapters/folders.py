"""Adapters that are folders: PEFT's, diffusers', and lorabooth's own run folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lorabooth.adapters import layouts, lora_config, stored
from lorabooth.adapters.stored import StoredAdapter
from lorabooth.checkpoints.header import read_header
from lorabooth.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
RUN_NAME = "adapter.safetensors"
MAX_CONFIG_BYTES = 10_000_000


def open_folder(folder: Path, component: str | None = None) -> StoredAdapter:
    """Open the adapter that a folder holds.

    Args:
        folder: a PEFT folder, a folder of PEFT folders named by component (`unet`, `text_encoder`, ...), a
            folder with diffusers' `pytorch_lora_weights.safetensors`, a run folder, or one with a single
            .safetensors file.
        component: whose adapter a PEFT folder is; None reads it from the folder's or the modules' names.

    Raises:
        AdapterError: none of these, or several adapters.
    """
    if (folder / CONFIG_NAME).is_file():
        return _open_peft(folder, component or _component_of(folder))
    for name in (RUN_NAME, DIFFUSERS_NAME):
        if (folder / name).is_file():
            return replace(stored.open_file(folder / name), path=folder)
    parts = [folder / name for name in lora_config.COMPONENTS if (folder / name / CONFIG_NAME).is_file()]
    if parts:
        return _joined(folder, [_open_peft(part, lora_config.COMPONENTS[part.name]) for part in parts])
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(files) == 1:
        return replace(stored.open_file(files[0]), path=folder)
    if files:
        raise AdapterError(
            f"{folder} holds {len(files)} .safetensors files.",
            f"Give the file itself, for example {files[0]}.",
        )
    raise AdapterError(
        f"{folder} holds no adapter.",
        f"A folder of PEFT's holds {CONFIG_NAME} and {WEIGHTS_NAME}, one of diffusers' {DIFFUSERS_NAME}.",
    )


def _open_peft(folder: Path, component: str) -> StoredAdapter:
    try:
        if (folder / CONFIG_NAME).stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{folder / CONFIG_NAME} is larger than any LoRA configuration.")
        text = (folder / CONFIG_NAME).read_text("utf-8")
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{folder} is not a PEFT folder: {error}.", f"It must hold {CONFIG_NAME} and {WEIGHTS_NAME}."
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG_NAME} does not describe a LoRA.")
    return replace(stored.open_file(folder / WEIGHTS_NAME, component=component, config=text), path=folder)


def _component_of(folder: Path) -> str:
    """By the folder's name, else by what its weights say."""
    if folder.name in lora_config.COMPONENTS:
        return lora_config.COMPONENTS[folder.name]
    if not (folder / WEIGHTS_NAME).is_file():
        return "denoiser"
    header = read_header(folder / WEIGHTS_NAME)
    return layouts.peft_component(header.entries, header.metadata)


def _joined(folder: Path, parts: list[StoredAdapter]) -> StoredAdapter:
    """The components' adapters as one."""
    first = parts[0]
    modules = {module: found for part in parts for module, found in part.modules.items()}
    configs = {component: config for part in parts for component, config in part.configs.items()}
    notes = tuple(note for part in parts for note in part.notes)
    metadata = stored.completed(replace(first.metadata, family=""), modules, first.entries)
    metadata = replace(metadata, family=next((p.family for p in parts if p.family), metadata.family))
    return StoredAdapter(folder, first.layout, modules, metadata, first.entries, configs, notes)
