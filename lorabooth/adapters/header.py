"""The header of a .safetensors file, checked before anything is allocated. Needs no torch; milliseconds.

Format (huggingface/safetensors, README "Format"): 8 bytes little-endian length N, N bytes of JSON, then the
tensors' bytes. Each entry names a dtype, a shape and a span; the spans must cover the rest exactly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorabooth.errors import AdapterError

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 20_000
MAX_DIMS = 8

DTYPE_BYTES = MappingProxyType(
    {
        **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
        **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
    }
)
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")
_HOW_TO_CONVERT = (
    "Such a file can run code when opened. Get its .safetensors version; or, if you trust its source: "
    'safetensors.torch.save_file(torch.load("OLD", weights_only=True), "NEW.safetensors").'
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


def read_header(path: Path) -> Header:
    """Read and check a .safetensors header.

    Raises:
        AdapterError: absent, a pickle, truncated, or a header that does not describe exactly this file.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise AdapterError(
            f"{path.name} is a pickled checkpoint ({path.suffix}), which is never opened.", _HOW_TO_CONVERT
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = _header_length(path.name, prefix, size)
            raw = file.read(length)
    except OSError as error:
        raise AdapterError(
            f"The adapter file {path} cannot be read: {error.strerror or error}.",
            "Check the path and its permissions.",
        ) from error
    if len(raw) != length:
        raise _broken(path.name, "it ends within its header")
    return _parse(path.name, raw, size - 8 - length)


def _header_length(name: str, prefix: bytes, size: int) -> int:
    if prefix.startswith(_PICKLE_MAGIC) and size > 8 and struct.unpack("<Q", prefix)[0] > size:
        raise AdapterError(
            f"{name} is a pickled or zipped checkpoint, not a .safetensors file.", _HOW_TO_CONVERT
        )
    if len(prefix) < 8:
        raise _broken(name, f"it has only {size} bytes")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > size - 8:
        raise _broken(
            name,
            f"its header would have {length} bytes, the file has {size}; it is truncated or no such file",
        )
    if length > MAX_HEADER_BYTES:
        raise _broken(name, f"its header has {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    return length


def _parse(name: str, raw: bytes, data_bytes: int) -> Header:
    if not raw.startswith(b"{"):
        raise _broken(name, "its header is not a JSON object")
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(name, f"its header is not valid JSON ({error})") from error
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(name, "its metadata is not a table of strings")
    if len(table) > MAX_TENSORS:
        raise _broken(name, f"it names {len(table)} tensors, more than the {MAX_TENSORS} allowed")
    entries = {key: _entry(name, key, value) for key, value in table.items()}
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _broken(name, f"tensor {key!r} begins at byte {entry.begin} of the data, expected {at}")
        at = entry.end
    if at != data_bytes:
        raise _broken(
            name, f"its tensors span {at} bytes, the file holds {data_bytes}; it is truncated or padded"
        )
    return Header(MappingProxyType(metadata), MappingProxyType(entries), 8 + len(raw))


def _entry(name: str, key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(name, f"tensor {key!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(name, f"tensor {key!r} has the unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _broken(name, f"tensor {key!r} has no proper shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _broken(name, f"tensor {key!r} has no proper data_offsets")
    begin, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise _broken(name, f"tensor {key!r} of {dtype} {shape} does not fill its {end - begin} bytes")
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


def _broken(name: str, why: str) -> AdapterError:
    return AdapterError(f"{name} is not a sound .safetensors file: {why}.", "Download or copy it again.")
