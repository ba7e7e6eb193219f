"""Single tensors out of .safetensors files, by plain reads: no mapping, no more memory than asked for."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorabooth.checkpoints.header import DTYPE_BYTES, Entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Floating point, by safetensors' names."""


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of one of FLOAT_DTYPES."""
    import torch

    by_name = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    return by_name[name]


def read_bytes(path: Path, begin: int, end: int) -> bytearray:
    """Bytes [begin, end) of a file.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    buffer = bytearray(end - begin)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        view, at = memoryview(buffer), 0
        while at < len(buffer):
            count = file.readinto(view[at:])
            if not count:
                raise OSError(f"{path.name} ends at byte {begin + at}, {end} were expected")
            at += count
    return buffer


def read_tensor(path: Path, data_start: int, entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
    """One tensor of a file, or rows [begin, end) of it, on the CPU in the file's dtype.

    Raises:
        OSError: the file cannot be read.
    """
    import torch

    shape, begin, end = entry.shape, entry.begin, entry.end
    if rows is not None:
        row_bytes = (end - begin) // shape[0]
        begin, end = begin + rows[0] * row_bytes, begin + rows[1] * row_bytes
        shape = (rows[1] - rows[0], *shape[1:])
    dtype = torch_dtype(entry.dtype)
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(read_bytes(path, data_start + begin, data_start + end), dtype=dtype).reshape(
        shape
    )


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    import torch

    wide = values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32).reshape(-1)
    # A finite sum of squares says so at a fraction of the cost of looking at each.
    return math.isfinite(float(wide.dot(wide))) or bool(wide.isfinite().all())


_SCALAR_FORMATS = MappingProxyType(
    {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}
)


def read_scalar(descriptor: int, data_start: int, entry: Entry) -> float | None:
    """The one number of a tensor with one element, without torch; None when it has more, or an odd dtype.

    Args:
        descriptor: of the open file.
        data_start: offset of the data part, in bytes.
        entry: which tensor.
    """
    if entry.end - entry.begin != DTYPE_BYTES[entry.dtype]:
        return None
    raw = _pread(descriptor, entry.end - entry.begin, data_start + entry.begin)
    if entry.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    layout = _SCALAR_FORMATS.get(entry.dtype)
    return float(struct.unpack(layout, raw)[0]) if layout else None


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    """`os.pread`, also where there is none (Windows)."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, count)
