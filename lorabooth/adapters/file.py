"""One adapter file: strict loading, atomic saving, metadata that is true and private.

Files are .safetensors in the layout that other tools open (formats.py); same input, same bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorabooth import durable
from lorabooth.adapters import formats
from lorabooth.checkpoints.header import Entry, Header, read_header
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FORMAT_VERSION", "AdapterFile", "Entry", "Header", "Metadata", "read", "read_header", "write"]

FORMAT_VERSION = "1"
MAX_RANK = 4096

_PREFIX = "lorabooth."
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# /home/x, ~/x, C:\x, \\server\x, file:///x: at the beginning of a value or of a word in it.
_LOOKS_LIKE_PATH = re.compile(r"""(?:^|[\s"'=(\[,;])(?:/[^\s/]|~[/\\]|[A-Za-z]:[\\/]|\\\\|file:)""")
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


@dataclass(frozen=True, slots=True)
class Metadata:
    """What an adapter file says about itself. Empty strings and zeros: not known (a foreign file).

    Attributes:
        family: of base models it fits, e.g. "sd1".
        base_id: the base it was trained on: a hub id or a name; never a path.
        base_sha256: digest of that base's denoiser weights.
        rank: of the denoiser's modules (the most frequent).
        alpha: of the denoiser's modules (the most frequent); the scale is alpha / rank.
        targets: preset that was trained, e.g. "attn".
        trigger_words: phrases that call the subject, e.g. ("sks dog",).
        steps: optimizer steps it was trained for.
        lorabooth_version: of the program that wrote it.
        format_version: of this table.
    """

    family: str = ""
    base_id: str = ""
    base_sha256: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: str = ""
    trigger_words: tuple[str, ...] = ()
    steps: int = 0
    lorabooth_version: str = ""
    format_version: str = FORMAT_VERSION

    def to_dict(self) -> dict[str, str]:
        """Header entries, strings only, keys `lorabooth.<field>`.

        Raises:
            AdapterError: a value looks like a file path; paths tell names and places.
        """
        out: dict[str, str] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            text = json.dumps(list(value), ensure_ascii=False) if isinstance(value, tuple) else str(value)
            if _LOOKS_LIKE_PATH.search(text):
                raise AdapterError(
                    f"The adapter's metadata {field.name!r} would hold a file path ({text}).",
                    "Adapter files are shared: give a name instead of a path.",
                )
            out[_PREFIX + field.name] = text
        return out

    @classmethod
    def from_dict(cls, entries: Mapping[str, str]) -> Metadata:
        """Read header entries; those that are absent (foreign files) keep their defaults.

        Raises:
            AdapterError: an entry is malformed, or the format is newer than this program knows.
        """
        known = {f.name: entries[_PREFIX + f.name] for f in fields(cls) if _PREFIX + f.name in entries}
        if known.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise AdapterError(
                f"The adapter file is of format {known['format_version']}; this is {FORMAT_VERSION}.",
                "Update lorabooth.",
            )
        try:
            words = json.loads(known.get("trigger_words", "[]"))
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError("trigger_words is not a list of strings")
            return cls(
                rank=int(known.pop("rank", 0)),
                alpha=float(known.pop("alpha", 0.0)),
                steps=int(known.pop("steps", 0)),
                trigger_words=tuple(words),
                **{key: value for key, value in known.items() if key != "trigger_words"},
            )
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"The adapter file's metadata is malformed: {error}.") from error


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
    entries = {"format": "pt", **metadata.to_dict(), **formats.export_header(ready, layout)}
    if layout == "kohya":
        entries |= _kohya_entries(formats.ranks_and_alphas(ready), metadata)
    save_safetensors(path, formats.export(ready, layout, metadata.family), entries)


def read(path: Path, *, component: str = "denoiser", config: str = "") -> AdapterFile:
    """Load an adapter of any known layout; the header is checked before anything is allocated.

    Args:
        path: a .safetensors file.
        component: whose adapter it is, if it is in PEFT's layout, which does not say.
        config: text of PEFT's adapter_config.json, if it is in PEFT's layout (see peft_folder.read_peft).

    Raises:
        AdapterError: unreadable, pickled, broken, not a LoRA, too large a rank, or non-finite numbers.
    """
    path = Path(path)
    checked = read_header(path)
    layout = formats.detect(checked.entries)
    for key, entry in checked.entries.items():
        if entry.dtype not in _FLOAT_DTYPES:
            raise AdapterError(
                f"{path.name}: tensor {key!r} has dtype {entry.dtype}; adapters hold floating point numbers."
            )
        if len(entry.shape) > 1 and min(entry.shape[:2]) > MAX_RANK:
            raise AdapterError(
                f"{path.name}: tensor {key!r} has a rank above {MAX_RANK} ({list(entry.shape)})."
            )
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    require_finite(tensors, path.name)
    entries = {**checked.metadata, "adapter_config": config} if config else checked.metadata
    imported = formats.import_(tensors, layout, entries, component)
    return AdapterFile(
        imported.tensors, _complete(checked.metadata, imported.tensors), layout, imported.notes
    )


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        AdapterError: names the first tensors that hold them.
    """
    bad = [key for key, tensor in tensors.items() if not bool(tensor.detach().float().isfinite().all())]
    if bad:
        raise AdapterError(
            f"{where}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, e.g. {bad[0]!r}.",
            "Such an adapter gives black images; use an earlier checkpoint.",
        )


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    """Write tensors and string metadata atomically, in an order that depends on nothing but them.

    Raises:
        RecipeError: the file cannot be written there.
        TrainingError: the disk is full.
    """
    from safetensors.torch import save

    # The library writes metadata in a random order; sorted, the same adapter is the same file.
    blob = save(dict(tensors))
    length = struct.unpack("<Q", blob[:8])[0]
    table = {"__metadata__": dict(sorted(entries.items())), **json.loads(blob[8 : 8 + length])}
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    durable.save(path, struct.pack("<Q", len(head)) + head, blob[8 + length :])


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
    require_finite(ready, "The adapter cannot be saved")
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


def _complete(entries: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Metadata:
    """Metadata with rank and alpha read from the tensors."""
    modules = formats.ranks_and_alphas(tensors)
    denoiser = {key: value for key, value in modules.items() if key.startswith("denoiser.")} or modules
    values = list(denoiser.values())
    rank, alpha = max(values, key=values.count)
    return replace(Metadata.from_dict(entries), rank=rank, alpha=alpha)
