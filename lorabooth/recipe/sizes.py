"""Sizes of memory as users write them: "8GiB", "8 GB", "8192MiB"."""

from __future__ import annotations

import re
from types import MappingProxyType

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")
_UNITS = MappingProxyType(
    {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    | {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
)
EXAMPLES = '"8GiB", "8GB" or "8192MiB"'
_MOST_BYTES = 1 << 50


def parse_size(text: str) -> int:
    """A size in bytes.

    Args:
        text: a number and a unit: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024), in
            any case.

    Raises:
        ValueError: it is no such text, or not between one byte and a pebibyte; says what is.
    """
    found = _SIZE.fullmatch(text)
    factor = _UNITS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(f"is no size; write a number and a unit: {EXAMPLES}")
    size = float(found[1]) * factor
    if not 1 <= size <= _MOST_BYTES:
        raise ValueError(f"is no size that memory has; write such as {EXAMPLES}")
    return int(size)
