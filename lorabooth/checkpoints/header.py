"""The header of a .safetensors file, checked before anything is allocated. Needs no torch; milliseconds.

Format (huggingface/safetensors, README "Format"): 8 bytes little-endian length N, N bytes of JSON, then the
tensors' bytes. Each entry names a dtype, a shape and a span; the spans must cover the rest exactly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from lorabooth.errors import AdapterError, LoraboothError

Failure: TypeAlias = Callable[..., LoraboothError]
"""What a bad file is raised as: AdapterError for adapters, BaseModelError for base models."""

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 20_000
MAX_DIMS = 8

DTYPE_BYTES = MappingProxyType(
    {
        **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
        **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
    }
)
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")
HOW_TO_CONVERT = (
    "Such a file can run code when opened. Get its .safetensors version; or, if you trust its source, "
    "convert it on a machine that holds nothing of value: "
    'd = torch.load("OLD", weights_only=True, map_location="cpu"); d = d.get("state_dict", d); '
    'safetensors.torch.save_file({k: v.contiguous() for k, v in d.items()}, "NEW.safetensors").'
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype by safetensors' name, shape, and bytes [begin, end) of the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a .safetensors file holds, without its tensors.

    Attributes:
        metadata: the file's string metadata.
        entries: tensor name -> Entry, in the header's order.
        data_start: offset of the data part in the file, in bytes.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    data_start: int


def read_header(path: Path, failure: Failure = AdapterError) -> Header:
    """Read and check a .safetensors header.

    Args:
        path: the file.
        failure: what is raised, by what the file should be.

    Raises:
        AdapterError or BaseModelError: absent, a pickle, truncated, or a header that does not describe
            exactly this file.
    """
    path = Path(path)
    pickled = failure(f"{path.name} is a pickled checkpoint, which is never opened.", HOW_TO_CONVERT)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise pickled
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if _looks_pickled(prefix, size):
                raise pickled
            raw = file.read(_header_length(prefix, size))
        return _parse(raw, struct.unpack("<Q", prefix)[0], size)
    except OSError as error:
        raise failure(
            f"The file {path} cannot be read: {error.strerror or error}.",
            "Check the path and its permissions.",
        ) from error
    except _UnsoundError as error:
        raise failure(
            f"{path.name} is not a sound .safetensors file: {error}.", "Download or copy it again."
        ) from error


class _UnsoundError(Exception):
    """Why a file is no sound .safetensors file."""


def _looks_pickled(prefix: bytes, size: int) -> bool:
    return prefix.startswith(_PICKLE_MAGIC) and size > 8 and struct.unpack("<Q", prefix)[0] > size


def _header_length(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _UnsoundError(f"it has only {size} bytes")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > size - 8:
        raise _UnsoundError(
            f"its header would have {length} bytes, the file has {size}; it is truncated or no such file"
        )
    if length > MAX_HEADER_BYTES:
        raise _UnsoundError(f"its header has {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    return length


def _parse(raw: bytes, length: int, size: int) -> Header:
    if len(raw) != length:
        raise _UnsoundError("it ends within its header")
    if not raw.startswith(b"{"):
        raise _UnsoundError("its header is not a JSON object")
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _UnsoundError(f"its header is not valid JSON ({error})") from error
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _UnsoundError("its metadata is not a table of strings")
    if len(table) > MAX_TENSORS:
        raise _UnsoundError(f"it names {len(table)} tensors, more than the {MAX_TENSORS} allowed")
    entries = {key: _entry(key, value) for key, value in table.items()}
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _UnsoundError(f"tensor {key!r} begins at byte {entry.begin} of the data, expected {at}")
        at = entry.end
    held = size - 8 - length
    if at != held:
        raise _UnsoundError(f"its tensors span {at} bytes, the file holds {held}; it is truncated or padded")
    return Header(MappingProxyType(metadata), MappingProxyType(entries), 8 + length)


def _entry(key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _UnsoundError(f"tensor {key!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _UnsoundError(f"tensor {key!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _UnsoundError(f"tensor {key!r} has no proper shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _UnsoundError(f"tensor {key!r} has no proper data_offsets")
    begin, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise _UnsoundError(f"tensor {key!r} of {dtype} {shape} does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    # 2**63 bounds every product's size; bool is an int in Python and is none here.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
