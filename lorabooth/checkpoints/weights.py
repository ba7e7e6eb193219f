"""Weights of a base model by canonical name, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.checkpoints.inventory import Base, stored_rows
from lorabooth.checkpoints.tensors import read_bytes, read_tensor
from lorabooth.errors import BaseModelError

if TYPE_CHECKING:
    from torch import Tensor

_PART_ELEMENTS = 1 << 23
_COMPARED_BYTES = 8 << 20


def read(base: Base, name: str) -> Tensor:
    """A tensor in float32, in the shape that its module has; the first variant, which is the most precise.

    Raises:
        BaseModelError: the file cannot be read.
    """
    slot = base.slots[name][0]
    stored = base.files[slot.file].header.entries[slot.key].shape
    tensor = _rows(base, name, stored_rows(slot, stored) if stored else None)
    return tensor.T.contiguous() if slot.transposed else tensor


def read_parts(base: Base, name: str) -> Iterator[Tensor]:
    """As `read`, some rows at a time where the tensor is large; not for transposed ones."""
    slot = base.slots[name][0]
    stored = base.files[slot.file].header.entries[slot.key].shape
    if slot.transposed or math.prod(stored) <= _PART_ELEMENTS:
        yield read(base, name)
        return
    begin, end = stored_rows(slot, stored)
    rows = max(1, _PART_ELEMENTS // math.prod(stored[1:]))
    for at in range(begin, end, rows):
        yield _rows(base, name, (at, min(at + rows, end)))


def same_vae(first: Base, second: Base) -> bool | None:
    """Whether two bases have the same VAE bit for bit; None where they keep it differently."""
    ours, theirs = _vae_spans(first), _vae_spans(second)
    if set(ours) != set(theirs) or not ours:
        return None
    return all(_equal_bytes(ours[key], theirs[key]) for key in ours)


Bytes = tuple[Path, int, int]
"""A file and bytes [begin, end) of it."""


def _vae_spans(base: Base) -> dict[str, Bytes]:
    if base.kind == "folder":
        files = sorted((base.path / "vae").glob("*.safetensors"))
        return {path.name: (path, 0, path.stat().st_size) for path in files}
    file = base.files[0]
    start = file.header.data_start
    return {
        f"{key} {entry.dtype}": (file.path, start + entry.begin, start + entry.end)
        for key, entry in file.header.entries.items()
        if key.startswith("first_stage_model.")
    }


def _equal_bytes(ours: Bytes, theirs: Bytes) -> bool:
    length = ours[2] - ours[1]
    if length != theirs[2] - theirs[1]:
        return False
    for at in range(0, length, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, length - at)
        if read_bytes(ours[0], ours[1] + at, ours[1] + at + count) != read_bytes(
            theirs[0], theirs[1] + at, theirs[1] + at + count
        ):
            return False
    return True


def _rows(base: Base, name: str, rows: tuple[int, int] | None) -> Tensor:
    slot = base.slots[name][0]
    file = base.files[slot.file]
    try:
        stored = read_tensor(file.path, file.header.data_start, file.header.entries[slot.key], rows)
        return stored.float()
    except OSError as error:
        raise BaseModelError(f"{file.path} cannot be read: {error}.") from error
