"""One adapter file: strict loading, atomic saving.

Files are .safetensors in the layout that other tools open (formats.py); same input, same bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from lorabooth import durable
from lorabooth.adapters import formats
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_file
from lorabooth.checkpoints.tensors import FLOAT_DTYPES, torch_dtype
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# kohya's sd-scripts, library/model_util.py; A1111 tells SD1 from SD2 by "ss_v2". SD2's version string would
# also say epsilon or v-prediction, which the metadata does not know, so it is left out.
_KOHYA_FAMILY = MappingProxyType(
    {
        "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
        "sd2": {"ss_v2": "True"},
        "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    }
)
# Stability AI ModelSpec 1.0.0, "architecture".
_MODELSPEC_ARCHITECTURE = MappingProxyType(
    {"sd1": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
)
_POCKET = "pocket"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file.

    Attributes:
        tensors: canonical names, on the CPU; factors in the file's dtype, alphas [] float32.
        metadata: as far as the file has it; rank and alpha are always filled in.
        layout: "kohya", "diffusers" or "peft".
        notes: what had to be assumed, for the user.
    """

    tensors: dict[str, Tensor]
    metadata: Metadata
    layout: str
    notes: tuple[str, ...] = ()


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    layout: str = "kohya",
    dtype: torch.dtype | None = None,
) -> None:
    """Save an adapter atomically: a temporary file beside it, fsync, rename.

    In kohya's layout a component's modules share one alpha (`formats.level_alphas`); where they do already,
    what is read back is bit for bit what was written.

    Args:
        path: ends in .safetensors.
        tensors: canonical.
        metadata: its family decides kohya's names.
        layout: "kohya" (opens in diffusers, ComfyUI, A1111) or "diffusers"; for PEFT see peft_folder.
        dtype: of the factors; float32 when None. Alphas stay float32.

    Raises:
        AdapterError: non-finite or incomplete tensors, private metadata, an unknown layout.
        RecipeError: the file cannot be written there.
        TrainingError: the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or layout not in ("kohya", "diffusers"):
        raise AdapterError(
            f"An adapter is written to a .safetensors file as kohya or diffusers: {path.name}, {layout}."
        )
    # Levelled before the cast, so that folding an alpha into lora_B rounds once.
    ready = prepare(formats.level_alphas(tensors) if layout == "kohya" else tensors, dtype)
    entries = {"format": "pt", **metadata.to_dict()}
    entries |= formats.export_header(ready, layout, metadata.family)
    if layout == "kohya":
        entries |= _kohya_entries(formats.ranks_and_alphas(ready), metadata)
    save_safetensors(path, formats.export(ready, layout, metadata.family), entries)


def read(path: Path, *, component: str = "denoiser", config: str = "") -> AdapterFile:
    """Load an adapter file of any known layout; the header is checked before anything is allocated.

    Args:
        path: a .safetensors file.
        component: whose adapter it is, if it is in PEFT's layout, which does not say.
        config: text of PEFT's adapter_config.json, if it is in PEFT's layout.

    Raises:
        AdapterError: unreadable, pickled, broken, not a LoRA, too large a rank, or non-finite numbers.
    """
    stored = open_file(Path(path), component=component, config=config)
    return AdapterFile(stored.tensors(), stored.metadata, stored.layout, stored.notes)


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    """Write tensors and string metadata atomically, in an order that depends on nothing but them.

    The library's own writer orders metadata at random and holds a copy of all tensors.

    Raises:
        RecipeError: the file cannot be written there.
        TrainingError: the disk is full.
    """
    durable.save(path, *chunks(tensors, entries))


def chunks(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a .safetensors file; tensors lie in it by falling size of their numbers, then by name.

    Raises:
        AdapterError: a name or a metadata entry is no text that a file can hold.
    """
    import torch

    dtypes = {torch_dtype(name): name for name in FLOAT_DTYPES} | {torch.int64: "I64", torch.int32: "I32"}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    table: dict[str, object] = {"__metadata__": dict(sorted(entries.items()))}
    at = 0
    for key, tensor in ordered:
        end = at + tensor.numel() * tensor.element_size()
        table[key] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    try:
        head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 30) : error.end + 10]
        raise AdapterError(
            f"Names or metadata cannot be written, being no valid UTF-8: a lone surrogate in {around!r}.",
            "Such text comes from a file name or a file in another encoding: give it anew.",
        ) from error
    head += b" " * (-len(head) % 8)
    yield struct.pack("<Q", len(head)) + head
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        # A view of the numbers: a file takes it as it takes bytes.
        yield cast("bytes", flat.view(torch.uint8).numpy().data)


def prepare(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Canonical tensors on the CPU, contiguous, cast (float32 when `dtype` is None) and finite.

    Raises:
        AdapterError: there are none, or some are not finite.
    """
    import torch

    if not tensors:
        raise AdapterError("There is nothing to save: the adapter holds no tensors.")
    ready = {
        key: tensor.detach()
        .to("cpu", torch.float32 if key.endswith(".alpha") else dtype or torch.float32)
        .contiguous()
        for key, tensor in tensors.items()
    }
    formats.require_finite(ready, "The adapter cannot be saved")
    return ready


def _kohya_entries(modules: Mapping[str, tuple[int, float]], metadata: Metadata) -> dict[str, str]:
    """Kohya's and ModelSpec's customary entries, only those that are true of this adapter."""
    out = {"ss_network_module": "networks.lora"}
    ranks, alphas = {rank for rank, _ in modules.values()}, {alpha for _, alpha in modules.values()}
    if len(ranks) == 1:
        out["ss_network_dim"] = str(ranks.pop())
    if len(alphas) == 1:
        out["ss_network_alpha"] = str(alphas.pop())
    # The embedded base only has SD1's shape: other checkpoints of that family do not take its adapters.
    if metadata.base_id != _POCKET:
        out |= _KOHYA_FAMILY.get(metadata.family, {})
        if architecture := _MODELSPEC_ARCHITECTURE.get(metadata.family):
            out["modelspec.sai_model_spec"] = "1.0.0"
            out["modelspec.architecture"] = architecture
            out["modelspec.title"] = ", ".join(metadata.trigger_words) or "LoRA"
    return out
