"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`, one folder per component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth import durable
from lorabooth.adapters import file, formats, lora_config
from lorabooth.adapters.folders import CONFIG_NAME, WEIGHTS_NAME
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def export_peft(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    *,
    text_model_prefix: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Path]:
    """Write one PEFT folder per component: `folder/unet`, `folder/text_encoder`, ...

    `peft.PeftModel.from_pretrained(unet, folder / "unet")` opens it.

    Args:
        folder: made if absent.
        tensors: canonical.
        metadata: kept in the weights' header.
        text_model_prefix: PEFT needs the names of the loaded module tree; True for transformers versions
            whose CLIP text encoder still has a `text_model` submodule.
        dtype: of the factors; float32 when None.

    Returns:
        Component -> its folder.

    Raises:
        AdapterError: non-finite or incomplete tensors, private metadata.
        RecipeError: the folder cannot be written.
    """
    entries = {"format": "pt", **metadata.to_dict()}
    ready = file.prepare(tensors, dtype)
    out: dict[str, Path] = {}
    for component, path in lora_config.owners(formats.ranks_and_alphas(ready)).items():
        own = of_component(ready, component)
        target = out[component] = folder / lora_config.prefix_of(component, path)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"{target} cannot be made: {error.strerror or error}.", "Choose another folder."
            ) from error
        weights = named(own, component, text_model_prefix=text_model_prefix)
        text = config_text(own, component, base_id=metadata.base_id)
        file.save_safetensors(target / WEIGHTS_NAME, weights, entries)
        durable.save(target / CONFIG_NAME, text.encode())
    return out


def of_component(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """One component's canonical tensors."""
    return {key: value for key, value in tensors.items() if key.startswith(f"{component}.")}


def named(
    tensors: Mapping[str, Tensor], component: str, *, text_model_prefix: bool = False
) -> dict[str, Tensor]:
    """One component's canonical tensors by PEFT's names; see `export_peft`."""
    flat = component.startswith("text_encoder") and not text_model_prefix
    return {
        key.replace(".model.text_model.", ".model.", 1) if flat else key: value
        for key, value in formats.export(tensors, "peft", "", component).items()
    }


def config_text(tensors: Mapping[str, Tensor], component: str, *, base_id: str = "") -> str:
    """The text of `adapter_config.json` for one component's canonical tensors."""
    config = {**_CONSTANT_CONFIG, "base_model_name_or_path": base_id or None}
    config |= lora_config.build(formats.ranks_and_alphas(tensors), component)
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


_CONSTANT_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}
