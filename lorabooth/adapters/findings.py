"""What is wrong with an adapter, as its header tells: for `check`, and for `inspect` of a broken file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorabooth.adapters import formats, layouts
from lorabooth.adapters.gather import FoundModule, Gathered
from lorabooth.adapters.opened import OpenedFile
from lorabooth.checkpoints.tensors import FLOAT_DTYPES
from lorabooth.errors import AdapterError


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: "unreadable", "kind", "unknown", "repeated", "incomplete", "shape", "alpha", "dtype",
            "not_finite", "unsound"; against a base "family", "unmatched", "misfit"; as warnings "dead",
            "family".
        message: for people, with the first few names.
        names: all modules or tensors that it is about.
    """

    code: str
    message: str
    names: tuple[str, ...] = ()


def by_header(files: Sequence[OpenedFile], gathered: Gathered, kind: str) -> list[Finding]:
    """What names, shapes and alphas tell of an adapter.

    Args:
        files: its files.
        gathered: their modules.
        kind: as from `opened.kind_of`.
    """
    modules = gathered.modules.values()
    unknown = list(gathered.unknown)
    if kind == "LoRA":
        unknown += _foreign(files, set(unknown))
    incomplete = [f"{module.name} (no {', '.join(module.missing)})" for module in modules if module.missing]
    odd = [
        key
        for file in files
        for key, entry in file.header.entries.items()
        if entry.dtype not in FLOAT_DTYPES and math.prod(entry.shape) > 1
    ]
    found = (
        ("unknown", unknown, "tensor", "has a name that says nothing", "have names that say nothing"),
        ("repeated", list(gathered.repeated), "tensor", "means what another does", "mean what others do"),
        ("incomplete", incomplete, "module", "is incomplete", "are incomplete"),
        (
            "shape",
            _misshapen(modules),
            "module",
            "has factors that do not fit",
            "have factors that do not fit",
        ),
        ("alpha", _bad_alphas(modules), "module", "has an odd alpha", "have odd alphas"),
        ("dtype", odd, "tensor", "holds no floating point numbers", "hold no floating point numbers"),
    )
    return [finding(code, names, noun, one, several) for code, names, noun, one, several in found if names]


def finding(code: str, names: Sequence[str], noun: str, one: str, several: str) -> Finding:
    """A sentence with the first few names.

    Args:
        code: see Finding.
        names: at least one.
        noun: what they are.
        one: the sentence's end for a single one.
        several: for more.
    """
    text = f"1 {noun} {one}" if len(names) == 1 else f"{len(names)} {noun}s {several}"
    return Finding(code, f"{text}: {layouts.some(names)}.", tuple(names))


def _foreign(files: Sequence[OpenedFile], known: set[str]) -> list[str]:
    """Tensors that end as a LoRA's do, of layers that no layout names."""
    out = []
    for file in files:
        family = layouts.family_hint(file.header.entries, file.header.metadata)
        for key in file.header.entries:
            if key not in known and not _has_meaning(key, file.component, family):
                out.append(key)
    return out


def _has_meaning(key: str, component: str, family: str) -> bool:
    try:
        return layouts.parse(key, component, family) is not None
    except AdapterError:
        return False


def _misshapen(modules: Iterable[FoundModule]) -> list[str]:
    out = []
    for module in modules:
        shapes = {part: factor.shape for part, factor in module.parts.items()}
        if module.missing:
            continue
        if module.kind == "LoHa":
            sound = _fits(shapes["hada_w1_a"], shapes["hada_w1_b"]) and _fits(
                shapes["hada_w2_a"], shapes["hada_w2_b"]
            )
        elif "lora_A" in shapes:
            sound = _is_lora(module.name, shapes["lora_A"], shapes["lora_B"])
        else:
            sound = True
        if not sound:
            listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items() if len(shape) > 1)
            out.append(f"{module.name} ({listed})")
    return out


def _fits(up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(up) > 1 and len(down) > 1 and up[1] == down[0]


def _is_lora(module: str, down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    try:
        formats.rank_of(module, down, up)
    except AdapterError:
        return False
    return True


def _bad_alphas(modules: Iterable[FoundModule]) -> list[str]:
    return [m.name for m in modules if m.alpha is not None and not math.isfinite(m.alpha)]
