"""Floating point tensors judged by their bits, a piece at a time: numpy, no conversion, little memory."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np

from lorabooth.checkpoints.header import Entry
from lorabooth.checkpoints.tensors import read_bytes

PIECE_BYTES = 4_194_304
"""Read at once."""

# dtype -> (unsigned integer of its width, bits that are all set in NaN and infinity and in no other number).
_BITS = MappingProxyType(
    {
        "F64": ("<u8", 0x7FF0_0000_0000_0000),
        "F32": ("<u4", 0x7F80_0000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F8_E5M2": ("u1", 0x7C),
        "F8_E4M3": ("u1", 0x7F),  # no infinity; only the largest pattern is NaN
    }
)


def scan(path: Path, data_start: int, entry: Entry) -> tuple[bool, bool]:
    """Whether all numbers of a tensor are finite, and whether any is other than zero.

    Integers are always finite. A tensor without elements is finite and not zero.

    Args:
        path: the file.
        data_start: offset of its data part, in bytes.
        entry: the tensor.

    Raises:
        OSError: the file cannot be read.
    """
    finite, nonzero = True, entry.begin == entry.end
    for begin in range(entry.begin, entry.end, PIECE_BYTES):
        raw = read_bytes(path, data_start + begin, data_start + min(entry.end, begin + PIECE_BYTES))
        if entry.dtype not in _BITS:
            nonzero = nonzero or any(raw)
            continue
        name, special = _BITS[entry.dtype]
        bits = np.frombuffer(raw, name)
        kind = bits.dtype.type
        masked = bits & kind(special)
        finite = finite and not bool((masked == kind(special)).any())
        magnitude = kind((1 << (8 * bits.itemsize - 1)) - 1)  # without the sign: -0.0 is zero
        nonzero = nonzero or bool((bits & magnitude).any())
    return finite, nonzero
