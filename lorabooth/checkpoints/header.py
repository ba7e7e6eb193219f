"""The header of a .safetensors file, checked before anything is allocated. Needs no torch; milliseconds.

Format (huggingface/safetensors, README "Format"): 8 bytes little-endian length N, N bytes of JSON, then the
tensors' bytes. Each entry names a dtype, a shape and a span; the spans must cover the rest exactly.

The JSON is read piece by piece (`header_json`), and the first piece that is wrong ends it: what a hostile
header would unfold to is never built.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

from lorabooth.checkpoints.header_json import Cursor, HeaderJSONError, quoted
from lorabooth.errors import AdapterError, LoraboothError

Failure: TypeAlias = Callable[..., LoraboothError]
"""What a bad file is raised as: AdapterError for adapters, BaseModelError for base models."""

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 20_000
MAX_METADATA = 20_000
MAX_DIMS = 8
MAX_ENTRY_CHARS = 2_000
"""JSON of one tensor's entry, white space included; 200 are many."""

DTYPE_BYTES = MappingProxyType(
    {
        **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
        **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
    }
)
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_MAGIC = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"),  # zip: torch.save, whole, empty or split
    *(b"\x80\x01", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),  # pickle, protocols that say so
    *(b"(d", b"(l", b"(c", b"}q", b"]q", b"cos\n", b"cposix\n", b"c__main"),  # protocols 0 and 1
    *(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"),  # gzip, bzip2, xz, zstd around any of them
)
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
        # A pipe would wait for its writer when it is opened, a device may do anything.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is a folder" if path.is_dir() else "it is a pipe or a device, no file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if _looks_pickled(prefix, size):
                raise pickled
            return _parse(_read_json(file, _header_length(prefix, size)), size)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise failure(
            f"The file {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "Check the path and its permissions.",
        ) from error
    except (_UnsoundError, HeaderJSONError) as error:
        raise failure(
            f"{path.name} is not a sound .safetensors file: {error}.", "Download or copy it again."
        ) from error


class _UnsoundError(Exception):
    """Why a file is no sound .safetensors file."""


def _looks_pickled(prefix: bytes, size: int) -> bool:
    # Such a start could also be a length; then the header would fit into the file.
    return prefix.startswith(_PICKLE_MAGIC) and (len(prefix) < 8 or _number(prefix) > size)


def _number(prefix: bytes) -> int:
    length: int = struct.unpack("<Q", prefix)[0]
    return length


def _header_length(prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _UnsoundError(f"it has only {size} bytes")
    length = _number(prefix)
    if length > size - 8:
        raise _UnsoundError(
            f"its header would have {length} bytes, the file has {size}; it is truncated or no such file"
        )
    if length > MAX_HEADER_BYTES:
        raise _UnsoundError(f"its header has {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    return length


def _read_json(file: BinaryIO, length: int) -> bytes:
    start = file.read(min(1, length))
    if start != b"{":
        raise _UnsoundError("its header is not a JSON object")
    raw = start + file.read(length - 1)
    if len(raw) != length:
        raise _UnsoundError("it ends within its header")
    return raw


def _parse(raw: bytes, size: int) -> Header:
    cursor = Cursor(raw)
    metadata: dict[str, str] = {}
    entries: dict[str, Entry] = {}
    for key in cursor.members():
        if key == "__metadata__":
            metadata = _metadata(cursor)
        elif len(entries) == MAX_TENSORS:
            raise _UnsoundError(f"it names more than the {MAX_TENSORS} tensors allowed")
        else:
            entries[key] = _entry(key, cursor.small_object(MAX_ENTRY_CHARS))
    cursor.end()
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise _UnsoundError(
                f"tensor {quoted(key)} begins at byte {entry.begin} of the data, expected {at}"
            )
        at = entry.end
    held = size - 8 - len(raw)
    if at != held:
        raise _UnsoundError(f"its tensors span {at} bytes, the file holds {held}; it is truncated or padded")
    return Header(MappingProxyType(metadata), MappingProxyType(entries), 8 + len(raw))


def _metadata(cursor: Cursor) -> dict[str, str]:
    table: dict[str, str] = {}
    if not cursor.at("{"):
        raise _UnsoundError("its metadata is not a table of strings")
    for key in cursor.members():
        if not cursor.at('"'):
            raise _UnsoundError(f"its metadata is not a table of strings: see {quoted(key)}")
        if len(table) == MAX_METADATA:
            raise _UnsoundError(f"its metadata has more than the {MAX_METADATA} entries allowed")
        table[key] = cursor.string()
    return table


def _entry(key: str, value: dict[str, Any] | None) -> Entry:
    if value is None or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _UnsoundError(f"tensor {quoted(key)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _UnsoundError(f"tensor {quoted(key)} has the unknown dtype {quoted(dtype)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _UnsoundError(f"tensor {quoted(key)} has no proper shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _UnsoundError(f"tensor {quoted(key)} has no proper data_offsets")
    # Not even beside a zero: others multiply from the left, and overflow.
    if math.prod(max(1, size) for size in shape) * DTYPE_BYTES[dtype] >= 2**63:
        raise _UnsoundError(
            f"tensor {quoted(key)} does not fill its span: {dtype} {shape} is beyond any memory"
        )
    begin, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise _UnsoundError(f"tensor {quoted(key)} of {dtype} {shape} does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(values: Any) -> bool:
    # bool is an int in Python and is none here.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
