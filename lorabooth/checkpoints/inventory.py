"""Where every weight of a base model is: canonical tensor name -> place in its files. Headers only.

A base is a diffusers folder (shards and variants included) or one .safetensors checkpoint in the original
(LDM) layout. Canonical names are `<component>.<module path>.weight` or `.bias`, with diffusers' paths for the
denoiser and transformers' with the `text_model.` prefix for CLIP, whatever the files call them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from lorabooth.checkpoints import ldm
from lorabooth.checkpoints.header import HOW_TO_CONVERT, PICKLE_SUFFIXES, Header, read_header
from lorabooth.errors import BaseModelError

COMPONENT_FOLDERS = MappingProxyType(
    {
        "unet": "denoiser",
        "transformer": "denoiser",
        "text_encoder": "text_encoder",
        "text_encoder_2": "text_encoder_2",
        "text_encoder_3": "text_encoder_3",
    }
)
"""Folder of a diffusers base -> canonical component that an adapter can sit on."""

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
"""What weights are held in unless they were quantized."""

_QUANTIZED_MARKS = (".absmax", ".quant_state.", ".weight_scale", ".scale_weight", ".qweight", ".SCB")
_BY_CONTEXT_WIDTH = MappingProxyType({768: "sd1", 1024: "sd2", 2048: "sdxl"})
_TRANSFORMER_MARKS = MappingProxyType({"double_blocks.0.": "FLUX", "joint_blocks.0.": "Stable Diffusion 3"})
_UNET_TOPS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "time_embedding.")


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place in a file.

    Attributes:
        file: index in `Base.files`.
        key: name of the stored tensor.
        shape: of the tensor itself, as the module has it.
        dtype: by safetensors' name.
        third: 0, 1 or 2 where it is that third of the stored tensor's rows; None for all of it.
        transposed: stored as the transpose of `shape`.
    """

    file: int
    key: str
    shape: tuple[int, ...]
    dtype: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One .safetensors file of a base.

    Attributes:
        path: where it is.
        header: what it holds.
    """

    path: Path
    header: Header


@dataclass(frozen=True)
class Base:
    """A base model's weights, by canonical name.

    Attributes:
        path: the folder or the file.
        kind: "folder" or "file".
        family: "sd1", "sd2", "sdxl", or "" where it cannot be told.
        files: those with weights that an adapter can change; of a folder, all variants.
        slots: canonical tensor name -> where it is; several places where a folder holds several variants.
    """

    path: Path
    kind: str
    family: str
    files: tuple[WeightFile, ...]
    slots: Mapping[str, tuple[Slot, ...]]

    @cached_property
    def modules(self) -> Collection[str]:
        """Canonical modules whose weight is a matrix or a convolution kernel, without embeddings."""
        return tuple(
            name.removesuffix(".weight")
            for name, slots in self.slots.items()
            if name.endswith(".weight") and len(slots[0].shape) in (2, 4) and ".embeddings." not in name
        )

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape [out,in] or [out,in,k,k] of a module's weight; None when there is no such module."""
        slots = self.slots.get(f"{module}.weight")
        return slots[0].shape if slots and len(slots[0].shape) in (2, 4) else None


def open_base(path: Path) -> Base:
    """Open a base model by its headers.

    Raises:
        BaseModelError: absent, broken, a pickle, incomplete, or of a layout that is not known.
    """
    path = Path(path)
    if path.is_dir():
        files, slots = _read_folder(path)
    elif path.is_file() or path.suffix.lower() in PICKLE_SUFFIXES:
        files, slots = _read_file(path)
    else:
        raise BaseModelError(
            f"{path}: there is no such base model.", "Give a diffusers folder or a .safetensors checkpoint."
        )
    return Base(path, "folder" if path.is_dir() else "file", _family(path, files, slots), files, slots)


def require_unquantized(base: Base) -> None:
    """Refuse what is not held in full or half precision.

    Raises:
        BaseModelError: names the file and the first tensor.
    """
    for file in base.files:
        odd = [
            (key, entry.dtype)
            for key, entry in file.header.entries.items()
            if (entry.dtype not in PLAIN_DTYPES and len(entry.shape) > 1)
            or any(mark in key for mark in _QUANTIZED_MARKS)
        ]
        if odd:
            key, dtype = odd[0]
            raise BaseModelError(
                f"{file.path}: this base is quantized ({key} is {dtype}).",
                "Weights are computed with in full precision: give the original fp32, bf16 or fp16 model.",
            )


def _read_file(path: Path) -> tuple[tuple[WeightFile, ...], dict[str, tuple[Slot, ...]]]:
    header = read_header(path, BaseModelError)
    layers = ldm.layers_per_block(header.entries)
    slots: dict[str, tuple[Slot, ...]] = {}
    for key, entry in header.entries.items():
        places = ldm.places(key, layers)
        if not places and key.startswith(_UNET_TOPS):
            places = (ldm.Place(f"denoiser.{key}"),)
        for place in places:
            shape = entry.shape
            if place.third is not None:
                if not shape or shape[0] % 3:
                    raise BaseModelError(
                        f"{path}: {key} is of shape {list(shape)}, which is not q, k and v in one.",
                        "The file is broken; download it again.",
                    )
                shape = (shape[0] // 3, *shape[1:])
            if place.transposed:
                shape = shape[::-1]
            slots[place.name] = (Slot(0, key, shape, entry.dtype, place.third, place.transposed),)
    if not any(name.startswith("denoiser.") for name in slots):
        raise _unknown_file(path, header)
    return (WeightFile(path, header),), slots


def _unknown_file(path: Path, header: Header) -> BaseModelError:
    keys = header.entries
    for mark, kind in _TRANSFORMER_MARKS.items():
        if any(mark in key for key in keys):
            return BaseModelError(
                f"{path}: this is a {kind} checkpoint in its original layout, which is not supported.",
                "Give the model as a diffusers folder.",
            )
    if any(".lora_" in key or key.startswith("lora_") for key in keys):
        return BaseModelError(f"{path}: this is an adapter, not a base model.", "Give the checkpoint.")
    first = next(iter(keys), "")
    return BaseModelError(
        f"{path}: no Stable Diffusion checkpoint in the original layout (first tensor: {first}).",
        "Give a diffusers folder, or a .safetensors checkpoint as A1111 and ComfyUI use it.",
    )


def _read_folder(folder: Path) -> tuple[tuple[WeightFile, ...], dict[str, tuple[Slot, ...]]]:
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{folder}: not a base model folder: it has no model_index.json.",
            "Give the whole diffusers folder, or a .safetensors checkpoint.",
        )
    files: list[WeightFile] = []
    slots: dict[str, tuple[Slot, ...]] = {}
    for name, component in COMPONENT_FOLDERS.items():
        for path in _weight_files(folder / name):
            header = read_header(path, BaseModelError)
            for key, entry in header.entries.items():
                canonical = f"{component}.{_with_text_model(component, key)}"
                slot = Slot(len(files), key, entry.shape, entry.dtype)
                slots[canonical] = (*slots.get(canonical, ()), slot)
            files.append(WeightFile(path, header))
    if not any(name.startswith("denoiser.") for name in slots):
        raise _no_denoiser(folder)
    return tuple(files), slots


def _weight_files(directory: Path) -> list[Path]:
    """A component's .safetensors files, full precision first; all shards of an index must be there."""
    if not directory.is_dir():
        return []
    found = sorted(
        (path for path in directory.glob("*.safetensors") if path.is_file()),
        key=lambda path: ("." in path.name.removesuffix(".safetensors"), path.name),
    )
    for index in sorted(directory.glob("*.index*.json")):
        missing = [name for name in _indexed(index) if not (directory / name).is_file()]
        if missing and index.name.endswith("json") and ".safetensors." in index.name:
            raise BaseModelError(
                f"{index}: names weight files that are not there: {', '.join(missing)}.",
                "Download the base again.",
            )
    return found


def _indexed(index: Path) -> list[str]:
    try:
        table = json.loads(index.read_text("utf-8"))
        return sorted(set(table["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{index}: not a sound index of weight files ({error}).", "Download the base again."
        ) from error


def _with_text_model(component: str, key: str) -> str:
    """Text encoder names with the `text_model.` prefix that newer transformers versions drop."""
    if not component.startswith("text_encoder") or key.startswith(("text_model.", "text_projection.")):
        return key
    return (
        f"text_model.{key}"
        if key.startswith(("encoder.layers.", "embeddings.", "final_layer_norm."))
        else key
    )


def _no_denoiser(folder: Path) -> BaseModelError:
    pickles = [
        path
        for name in ("unet", "transformer")
        for path in sorted((folder / name).glob("*"))
        if path.suffix in PICKLE_SUFFIXES
    ]
    if pickles:
        return BaseModelError(f"{pickles[0]} is a pickled checkpoint, which is never opened.", HOW_TO_CONVERT)
    return BaseModelError(
        f"{folder}: there are no .safetensors weights in its unet folder.", "Download the base again."
    )


def _family(path: Path, files: tuple[WeightFile, ...], slots: Mapping[str, tuple[Slot, ...]]) -> str:
    widths = {
        found[0].shape[1]
        for name, found in slots.items()
        if name.startswith("denoiser.") and name.endswith(".attn2.to_k.weight") and len(found[0].shape) == 2
    }
    if len(widths) == 1 and (known := _BY_CONTEXT_WIDTH.get(next(iter(widths)))):
        return known
    if not any(name.startswith("denoiser.down_blocks.") for name in slots):
        return _transformer_family(path)
    if any(name.startswith("text_encoder_2.") for name in slots):
        return "sdxl"
    if any(key.startswith("cond_stage_model.model.") for file in files for key in file.header.entries):
        return "sd2"
    linear = any(
        name.startswith("denoiser.") and name.endswith(".proj_in.weight") and len(found[0].shape) == 2
        for name, found in slots.items()
    )
    return "sd2" if linear else "sd1"


def _transformer_family(folder: Path) -> str:
    """By the pipeline's class; a transformer's names alone do not tell."""
    try:
        name = str(json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name", ""))
    except (OSError, ValueError):
        return ""
    return {"FluxPipeline": "flux", "StableDiffusion3Pipeline": "sd3"}.get(name, "")


def stored_rows(slot: Slot, stored: tuple[int, ...]) -> tuple[int, int]:
    """Rows [begin, end) of the stored tensor that a slot is."""
    if slot.third is None:
        return 0, stored[0]
    part = stored[0] // 3
    return slot.third * part, (slot.third + 1) * part
