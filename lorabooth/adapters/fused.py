"""FLUX's and SD3's layers that hold several of diffusers' modules: adapters put together and taken apart.

Kohya's layout names the original layers (transformer_names.py). An adapter on one of them is, for modules
with lora_A [r_i,in] and lora_B [out_i,r_i], one of

    shared    lora_A [r,in] is all modules' own; lora_B [sum out_i, r] is theirs, one below the other
    stacked   lora_A [sum r_i, in], one below the other; lora_B is block-diagonal

Both are exact, and what is written is read back bit for bit: what is block-diagonal with equal ranks is read
as stacked, so the few shared adapters that are (all zeros, say) are written stacked. Unequal ranks and absent
modules are written in the header. A stacked layer's alpha is divided among its modules, so it comes back too
if it has at most 22 significant bits.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabooth.adapters import transformer_names
from lorabooth.adapters.transformer_names import Original
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

HEADER_KEY = "lorabooth.fused"
"""Header entry: first module of a layer -> ranks of the layer's modules, 0 for those without, as JSON."""

_DENOISER = "denoiser."
_LEVEL = "Write it as diffusers or peft, or add --level-alphas."


@dataclass(frozen=True, eq=False)
class _Module:
    """One module's adapter: lora_A [r,in], lora_B [out,r], alpha."""

    down: Tensor
    up: Tensor
    alpha: Tensor

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


Group = list["_Module | None"]
"""The adapters of a layer's modules in the order of its rows, None for those that have none."""


def to_original(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Canonical tensors -> the denoiser's by the original layers' names (`denoiser.double_blocks.0...`).

    Raises:
        AdapterError: the family has no such module, or modules of one layer have different scales or dtypes.
    """
    out = {key: value for key, value in tensors.items() if not key.startswith(_DENOISER)}
    for original, group in _groups(tensors, family):
        name = f"{_DENOISER}{original.path}"
        one = _joined(original, group) if len(group) > 1 else group[0]
        assert one is not None
        out[f"{name}.lora_A"] = one.down
        out[f"{name}.lora_B"] = _halves(original, one)
        out[f"{name}.alpha"] = one.alpha
    return out


def header(tensors: Mapping[str, Tensor], family: str) -> dict[str, str]:
    """The entry for a kohya file's header on layers whose tensors do not tell what is in them."""
    ranks = {
        original.modules[0]: [module.rank if module else 0 for module in group]
        for original, group in _groups(tensors, family)
        if len(group) > 1 and len({module.rank if module else 0 for module in group}) > 1
    }
    return {HEADER_KEY: json.dumps(ranks, sort_keys=True)} if ranks else {}


def separated(
    tensors: Mapping[str, Tensor], entries: Mapping[str, str], modules: Collection[str]
) -> dict[str, Tensor]:
    """Canonical tensors as read from original layers, stacked ones taken apart, bit for bit as they were.

    Args:
        tensors: canonical; modules of one layer share lora_A.
        entries: the file's string metadata.
        modules: canonical names of those that were read from a layer that holds several.
    """
    out = dict(tensors)
    paths = [module.removeprefix(_DENOISER) for module in modules if module.startswith(_DENOISER)]
    family = next((f for f in transformer_names.FAMILIES if _all_known(paths, f)), "")
    if not family:
        return out
    recorded = _recorded(entries)
    for original, group in _groups(tensors, family, paths):
        if len(group) > 1 and all(group) and set(original.modules) <= set(paths):
            _take_apart(out, original, [m for m in group if m], recorded.get(original.modules[0]))
    return out


def level(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with one rank in each layer, so that every module's scale is the same.

    lora_A gets rows and lora_B columns of zeros; lora_B is multiplied by what the scale loses, in float32.
    """
    import torch

    out = dict(tensors)
    paths = _paths(tensors)
    family = next((f for f in transformer_names.FAMILIES if _all_known(paths, f)), "")
    for original, group in _groups(tensors, family) if family else ():
        most = max(module.rank for module in group if module)
        for path, module in zip(original.modules, group, strict=True):
            if module is not None and module.rank < most:
                more = most - module.rank
                down = torch.cat([module.down, module.down.new_zeros(more, *module.down.shape[1:])])
                grown = (module.up.float() * (most / module.rank)).to(module.up.dtype)
                up = torch.cat([grown, grown.new_zeros(grown.shape[0], more, *grown.shape[2:])], 1)
                out |= {f"{_DENOISER}{path}.lora_A": down, f"{_DENOISER}{path}.lora_B": up}
    return out


def _paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """The denoiser's modules."""
    return [
        key.removeprefix(_DENOISER).removesuffix(".lora_A")
        for key in tensors
        if key.startswith(_DENOISER) and key.endswith(".lora_A")
    ]


def _all_known(paths: Sequence[str], family: str) -> bool:
    return bool(paths) and all(transformer_names.to_original(path, family) for path in paths)


def _groups(
    tensors: Mapping[str, Tensor], family: str, paths: Sequence[str] | None = None
) -> list[tuple[Original, Group]]:
    """Original layers of some or all modules, in their order, with what is on their modules."""
    found: dict[str, Original] = {}
    for path in _paths(tensors) if paths is None else paths:
        original = transformer_names.to_original(path, family)
        if original is None:
            raise AdapterError(
                f"{path!r} is not a module of {family}'s transformer, so it has no kohya name."
            )
        found.setdefault(original.path, original)
    return [(o, [_module(tensors, path) for path in o.modules]) for o in found.values()]


def _module(tensors: Mapping[str, Tensor], path: str) -> _Module | None:
    stem = f"{_DENOISER}{path}"
    if f"{stem}.lora_A" not in tensors:
        return None
    return _Module(tensors[f"{stem}.lora_A"], tensors[f"{stem}.lora_B"], tensors[f"{stem}.alpha"])


def _halves(original: Original, module: _Module) -> Tensor:
    rows, inner = module.up.shape[0], module.down[0].numel()
    swap = original.halves == "swapped" or (original.halves == "swapped if two" and rows == 2 * inner)
    return module.up.roll(rows // 2, 0) if swap else module.up


def _joined(original: Original, group: Group) -> _Module:
    """One adapter of a whole layer.

    Raises:
        AdapterError: it cannot be one exactly.
    """
    import torch

    present = [module for module in group if module is not None]
    first = present[0]
    if any(m.down.dtype != first.down.dtype or m.up.dtype != first.up.dtype for m in present):
        raise AdapterError(
            f"{original.path!r} is one layer in kohya's layout, but its modules have different dtypes.",
            "Add --dtype to give all tensors the same.",
        )
    unit = first.up.shape[0] // original.widths[group.index(first)]
    rows = [unit * width for width in original.widths]
    for module, expected in zip(group, rows, strict=True):
        if module is not None and (module.up.shape[0] != expected or module.up.dim() != 2):
            raise AdapterError(
                f"{original.path!r} is one layer in kohya's layout; its modules' lora_B must have "
                f"{', '.join(map(str, rows))} rows, but one has shape {list(module.up.shape)}."
            )
    if len(present) == len(group) and _all_share(present):
        up = torch.cat([module.up for module in present])
        if not _is_block_diagonal(up, rows, _even(first.rank, len(rows))):
            return _Module(first.down, up, first.alpha)
    ranks = [module.rank if module else 0 for module in group]
    up = first.up.new_zeros(sum(rows), sum(ranks))
    for i, module in enumerate(group):
        if module is not None:
            up[_span(rows, i), _span(ranks, i)] = module.up
    return _Module(torch.cat([m.down for m in present]), up, _stacked_alpha(original, present))


def _stacked_alpha(original: Original, present: Sequence[_Module]) -> Tensor:
    """An alpha that gives every module's alpha back.

    Raises:
        AdapterError: there is none, as scales differ.
    """
    import torch

    total = sum(module.rank for module in present)
    last = max(present, key=lambda module: module.rank)
    exact = torch.tensor(float(last.alpha) * total / last.rank, dtype=torch.float64)
    for dtype in (last.alpha.dtype, torch.float32, torch.float64):
        candidate = exact.to(dtype)
        if all(float(_share(candidate, m.rank, total)) == float(m.alpha) for m in present):
            return candidate
    told = ", ".join(f"{float(module.alpha):g}/{module.rank}" for module in present)
    raise AdapterError(
        f"{original.path!r} is one layer in kohya's layout, but its modules have different scales "
        f"(alpha/rank {told}).",
        _LEVEL,
    )


def _share(alpha: Tensor, rank: int, total: int) -> Tensor:
    """A module's alpha, float32, such that its scale is the layer's."""
    return (alpha.double() * rank / total).float()


def _take_apart(
    out: dict[str, Tensor], original: Original, group: Sequence[_Module], recorded: Sequence[int] | None
) -> None:
    """Replace a layer's shared adapter with its modules' own, if it is stacked."""
    import torch

    rank, rows = group[0].rank, [int(module.up.shape[0]) for module in group]
    if not _all_share(group) or group[0].up.dim() != 2:
        return
    ranks = list(recorded) if recorded and len(recorded) == len(rows) and sum(recorded) == rank else None
    ranks = ranks or _even(rank, len(rows))
    up = torch.cat([module.up for module in group])
    if ranks is None or not _is_block_diagonal(up, rows, ranks):
        return
    for i, (path, module) in enumerate(zip(original.modules, group, strict=True)):
        stem = f"{_DENOISER}{path}"
        if ranks[i] == 0:
            for kind in ("lora_A", "lora_B", "alpha"):
                del out[f"{stem}.{kind}"]
            continue
        out[f"{stem}.lora_A"] = module.down[_span(ranks, i)]
        out[f"{stem}.lora_B"] = module.up[:, _span(ranks, i)].contiguous()
        out[f"{stem}.alpha"] = _share(module.alpha, ranks[i], rank)


def _all_share(modules: Sequence[_Module]) -> bool:
    first = modules[0]
    return all(
        m.rank == first.rank and float(m.alpha) == float(first.alpha) and _same_bits(m.down, first.down)
        for m in modules[1:]
    )


def _even(rank: int, n: int) -> list[int] | None:
    return [rank // n] * n if rank % n == 0 else None


def _is_block_diagonal(up: Tensor, rows: Sequence[int], ranks: Sequence[int] | None) -> bool:
    """Whether all outside the blocks [rows[i], ranks[i]] is +0."""
    if ranks is None:
        return False
    rest = _bits(up).clone()
    width = rest.shape[1] // up.shape[1]
    for i in range(len(rows)):
        columns = _span(ranks, i)
        rest[_span(rows, i), columns.start * width : columns.stop * width] = 0
    return not bool(rest.any())


def _span(sizes: Sequence[int], i: int) -> slice:
    return slice(sum(sizes[:i]), sum(sizes[: i + 1]))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype:
        return True
    return a.dtype == b.dtype and a.shape == b.shape and bool((_bits(a) == _bits(b)).all())


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a matrix, [rows, columns * itemsize]."""
    import torch

    return tensor.detach().contiguous().view(torch.uint8)


def _recorded(entries: Mapping[str, str]) -> dict[str, list[int]]:
    """What the header says of layers; nothing where it is malformed, as the tensors then tell."""
    try:
        table = json.loads(entries.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(table, dict):
        return {}
    return {
        key: value
        for key, value in table.items()
        if isinstance(value, list) and all(type(rank) is int and rank >= 0 for rank in value)
    }
