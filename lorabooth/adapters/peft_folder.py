"""PEFT folders: `adapter_config.json` beside `adapter_model.safetensors`, one folder per component."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabooth import durable
from lorabooth.adapters import file, formats, lora_config, names
from lorabooth.adapters.folders import CONFIG_NAME, WEIGHTS_NAME
from lorabooth.adapters.metadata import Metadata
from lorabooth.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor


def export_peft(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Metadata, *, text_model_prefix: bool = False
) -> dict[str, Path]:
    """Write one PEFT folder per component: `folder/unet`, `folder/text_encoder`, ...

    `peft.PeftModel.from_pretrained(unet, folder / "unet")` opens it.

    Args:
        folder: made if absent.
        tensors: canonical.
        metadata: kept in the weights' header.
        text_model_prefix: PEFT needs the names of the loaded module tree; True for transformers versions
            whose CLIP text encoder still has a `text_model` submodule.

    Returns:
        Component -> its folder.

    Raises:
        AdapterError: non-finite or incomplete tensors, private metadata.
        RecipeError: the folder cannot be written.
    """
    entries = {"format": "pt", **metadata.to_dict()}
    ready = file.prepare(tensors)
    modules = formats.ranks_and_alphas(ready)
    out: dict[str, Path] = {}
    for component in sorted({names.split_module(module)[0] for module in modules}):
        own = {
            key: value for key, value in ready.items() if names.split_key(key)[0].startswith(f"{component}.")
        }
        flat = component.startswith("text_encoder") and not text_model_prefix
        weights = {
            key.replace(".model.text_model.", ".model.", 1) if flat else key: value
            for key, value in formats.export(own, "peft", metadata.family, component).items()
        }
        target = out[component] = folder / lora_config.prefix_of(component)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"{target} cannot be made: {error.strerror or error}.", "Choose another folder."
            ) from error
        config = {**_CONSTANT_CONFIG, "base_model_name_or_path": metadata.base_id or None}
        config |= lora_config.build(modules, component)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        file.save_safetensors(target / WEIGHTS_NAME, weights, entries)
        durable.save(target / CONFIG_NAME, text.encode())
    return out


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
