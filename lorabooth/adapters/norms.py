"""How strong an adapter is, module by module, from factors alone: numpy, and no more bytes than a budget.

The effect of a LoRA module on its weight is `alpha / rank * B A` (arXiv 2106.09685, section 4.1), and
`|B A|^2 = sum((B^T B) * (A A^T))` elementwise, so the product itself is never made. LoHa and LoKr: LyCORIS
(arXiv 2309.14859), sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lorabooth.adapters.gather import FoundModule
from lorabooth.adapters.stored import StoredFactor
from lorabooth.checkpoints import tensors
from lorabooth.checkpoints.header import DTYPE_BYTES, Entry

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float32]"
Read: TypeAlias = Callable[[Path, int, int], bytearray]
"""Bytes [begin, end) of a file."""

BUDGET_BYTES = 32_000_000
"""Of factors that are read for an overview."""
HADAMARD_ROWS = 256
"""At most so many rows of a LoHa's product are made; the norm of a larger one is estimated from them."""

WITHOUT_NORMS = ("DoRA", "GLoRA", "OFT", "(IA)3")
"""Kinds whose effect depends on the base's weights."""


@dataclass(frozen=True)
class Norms:
    """What was read of an adapter.

    Attributes:
        values: module -> Frobenius norm of its effect at strength 1.
        sampled: modules that were read.
        broken: tensors among those read that hold NaN or infinity.
        bytes_read: of factors.
    """

    values: Mapping[str, float]
    sampled: tuple[str, ...]
    broken: tuple[str, ...]
    bytes_read: int


class NotFiniteError(Exception):
    """A tensor holds NaN or infinity; the argument is its name."""


def measure(
    modules: Iterable[FoundModule], budget_bytes: int = BUDGET_BYTES, read: Read | None = None
) -> Norms:
    """Norms of modules' effects; of some of every block where all would exceed the budget.

    The choice depends on names and shapes alone, so it is the same every time.

    Args:
        modules: of an adapter.
        budget_bytes: of tensors read, in total.
        read: reads the bytes; `tensors.read_bytes` when None.

    Raises:
        OSError: a file cannot be read.
    """
    values: dict[str, float] = {}
    broken: list[str] = []
    chosen = choose(list(modules), budget_bytes)
    for module in chosen:
        try:
            norm = norm_of(module, read)
        except NotFiniteError as error:
            broken.append(str(error))
            continue
        if norm is not None:
            values[module.name] = norm
    return Norms(
        values,
        tuple(module.name for module in chosen),
        tuple(broken),
        sum(module.size_bytes for module in chosen),
    )


def choose(modules: Sequence[FoundModule], budget_bytes: int) -> list[FoundModule]:
    """Modules to read: block by block in turn, within a block from all kinds and sizes of layers."""
    if sum(module.size_bytes for module in modules) <= budget_bytes:
        return list(modules)
    blocks: dict[str, list[FoundModule]] = {}
    for module in modules:
        blocks.setdefault(module.block, []).append(module)
    queues = [_spread(own) for own in blocks.values()]
    chosen: list[FoundModule] = []
    for turn in range(max(map(len, queues))):
        for queue in queues:
            if turn < len(queue) and queue[turn].size_bytes <= budget_bytes:
                chosen.append(queue[turn])
                budget_bytes -= queue[turn].size_bytes
    return chosen


def norm_of(module: FoundModule, read: Read | None = None) -> float | None:
    """Frobenius norm of a module's effect at strength 1; None where its kind or its parts do not give one.

    Raises:
        NotFiniteError: a tensor of it holds NaN or infinity.
        OSError: the file cannot be read.
    """
    rule = _RULES.get(module.kind)
    if module.missing or rule is None or module.parts.keys() & {"hada_t1", "hada_t2", "lokr_t2", "scalar"}:
        return None
    arrays = {part: _finite(factor, read) for part, factor in module.parts.items() if part != "alpha"}
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            squared = rule(arrays)
    except (ValueError, IndexError):  # shapes that do not fit together
        return None
    norm = abs(_scale(module)) * math.sqrt(max(squared, 0.0))
    return norm if math.isfinite(norm) else None


def array_of(factor: StoredFactor, read: Read | None = None) -> Array:
    """A factor as float32, whatever floating point type it is stored in.

    Raises:
        ValueError: it is of no floating point type.
        OSError: the file cannot be read.
    """
    entry, begin = factor.entry, factor.data_start + factor.entry.begin
    length = math.prod(factor.shape) * DTYPE_BYTES[entry.dtype]
    if factor.rows is not None:
        begin += factor.rows[0] * math.prod(entry.shape[1:]) * DTYPE_BYTES[entry.dtype]
    raw = (read or tensors.read_bytes)(factor.path, begin, begin + length)
    return decode(raw, entry.dtype).reshape(factor.shape)


def decode(raw: bytes | bytearray, dtype: str) -> Array:
    """Bytes of a floating point tensor -> float32, flat.

    Args:
        raw: little-endian.
        dtype: by safetensors' name.

    Raises:
        ValueError: it is no floating point type.
    """
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOATS:
        with np.errstate(over="ignore"):
            return np.frombuffer(raw, _FLOATS[dtype]).astype(np.float32, copy=False)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _eight_bit(dtype)[np.frombuffer(raw, np.uint8)]
    raise ValueError(f"{dtype} is no floating point type")


def broken_of(
    path: Path, data_start: int, entries: Mapping[str, Entry], count: int, piece_bytes: int
) -> list[str]:
    """Tensors with NaN or infinity, among `count` spread over a file, of each a piece from its middle.

    Raises:
        OSError: the file cannot be read.
    """
    keys = [
        key
        for key, entry in entries.items()
        if entry.dtype in tensors.FLOAT_DTYPES and entry.end > entry.begin
    ]
    step = max(1, len(keys) // max(count, 1))
    out = []
    for key in keys[step // 2 :: step][:count]:
        entry = entries[key]
        length = min(entry.end - entry.begin, piece_bytes)
        begin = entry.begin + (entry.end - entry.begin - length) // 2 // 8 * 8  # no number is cut in two
        raw = tensors.read_bytes(path, data_start + begin, data_start + begin + length)
        if not np.isfinite(decode(raw, entry.dtype)).all():
            out.append(key)
    return out


_FLOATS = MappingProxyType({"F64": "<f8", "F32": "<f4", "F16": "<f2"})


def _eight_bit(dtype: str) -> Array:
    """The value of every pattern (arXiv 2209.05433): E5M2 is float16's upper byte, E4M3 has no infinity."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -value, value).astype(np.float32)


def _finite(factor: StoredFactor, read: Read | None) -> Array:
    try:
        array = array_of(factor, read)
    except ValueError as error:
        raise NotFiniteError(factor.key) from error
    if not np.isfinite(array).all():
        raise NotFiniteError(factor.key)
    return array


def _scale(module: FoundModule) -> float:
    if module.kind == "full difference" or (module.kind == "LoKr" and not module.rank):
        return 1.0
    return module.scale if math.isfinite(module.scale) else 0.0


def _square(array: Array) -> float:
    return float(np.vdot(array, array))


def _lora(parts: Mapping[str, Array]) -> float:
    down, up = parts["lora_A"], parts["lora_B"]
    down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
    inner, outer = down @ down.T, up.T @ up
    if "lora_mid" in parts:  # [r,r,k,k], between the two: B M_k A for every tap k
        taps = parts["lora_mid"].reshape(*parts["lora_mid"].shape[:2], -1)
        return float(np.einsum("ab,bck,cd,adk->", outer, taps, inner, taps, optimize=True))
    return float(np.vdot(outer, inner))


def _loha(parts: Mapping[str, Array]) -> float:
    left, right = parts["hada_w1_a"], parts["hada_w2_a"]
    rows = np.unique(np.linspace(0, len(left) - 1, min(len(left), HADAMARD_ROWS)).round().astype(int))
    product = (left[rows] @ parts["hada_w1_b"]) * (right[rows] @ parts["hada_w2_b"])
    return _square(product) * len(left) / len(rows)


def _lokr(parts: Mapping[str, Array]) -> float:
    def factor(whole: str) -> float:
        if whole in parts:
            return _square(parts[whole])
        return _lora({"lora_A": parts[f"{whole}_b"], "lora_B": parts[f"{whole}_a"]})

    return factor("lokr_w1") * factor("lokr_w2")  # |kron(x, y)| = |x| |y|


def _difference(parts: Mapping[str, Array]) -> float:
    return _square(parts["diff"]) if "diff" in parts else _square(parts["diff_b"])


_RULES = MappingProxyType(
    {
        "LoRA": _lora,
        "Tucker LoRA": _lora,
        "LoHa": _loha,
        "LoKr": _lokr,
        "full difference": _difference,
    }
)


def _spread(modules: Sequence[FoundModule]) -> list[FoundModule]:
    """An order whose every beginning has all kinds of layers in it: sorted by kind, then far apart."""
    ranked = sorted(modules, key=lambda m: (m.name.rsplit(".", 1)[-1], m.dims or (0, 0), m.name))
    bits = max(1, (len(ranked) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [ranked[i] for i in order if i < len(ranked)]
