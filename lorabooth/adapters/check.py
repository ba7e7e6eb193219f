"""Whether an adapter is sound, and whether it fits a base: every tensor is read, nothing is written.

Files are read in pieces and numbers are judged by their bits, so that memory stays small whatever the size.
Needs numpy, and neither torch nor any model library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorabooth.adapters import fit
from lorabooth.adapters.findings import Finding, by_header, finding
from lorabooth.adapters.gather import FoundModule, Gathered, from_stored
from lorabooth.adapters.names import COMPONENTS
from lorabooth.adapters.opened import (
    ADAPTER_KINDS,
    OpenedFile,
    family_by_layers,
    gather_all,
    kind_of,
    open_files,
    own_metadata,
)
from lorabooth.adapters.provenance import provenance
from lorabooth.adapters.stored import StoredAdapter, open_adapter
from lorabooth.checkpoints.identify import identify
from lorabooth.errors import AdapterError
from lorabooth.progress import Reporter, Silent

_PRODUCTS = ("LoRA", "Tucker LoRA", "LoHa", "LoKr", "full difference")
"""Kinds whose effect is nothing where one of their factors is zero."""


_BROKEN = ("holds NaN or infinity", "hold NaN or infinity")


@dataclass(frozen=True)
class CheckReport:
    """The result of a check. The attributes, and `sound`, are the keys of `check --json`.

    Attributes:
        name: of the file or folder, without where it is.
        kind: "LoRA", "LoHa", ...; "" where it cannot be told.
        family: of base models, "" where it cannot be told.
        tensors: how many were read.
        modules: how many there are.
        base: name of the base it was held against, "" without one.
        base_family: that base's family.
        matched: modules that fit the base; 0 without one.
        problems: why it cannot be used as it is.
        warnings: what should be known before it is used.
        notes: what was assumed.
    """

    name: str
    kind: str = ""
    family: str = ""
    tensors: int = 0
    modules: int = 0
    base: str = ""
    base_family: str = ""
    matched: int = 0
    problems: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "sound": self.sound}


def check_adapter(path: Path, base: Path | None = None, reporter: Reporter | None = None) -> CheckReport:
    """Read a whole adapter and say what is wrong with it.

    Args:
        path: a .safetensors file, a folder of PEFT's or diffusers', or a run folder.
        base: a diffusers folder or a .safetensors checkpoint that the adapter should fit.
        reporter: hears of progress.

    Returns:
        The findings; an adapter that is broken or unreadable is one with problems, never an exception.

    Raises:
        BaseModelError: the base is absent, broken, or of a layout that is not known.
    """
    name = path.name or path.resolve().name
    try:
        files = open_files(path)
        kind = kind_of(files)
        if kind not in ADAPTER_KINDS:
            return CheckReport(name, kind, problems=(_no_adapter(files),))
        return _check(path, name, files, kind, base, reporter or Silent())
    except AdapterError as error:
        return CheckReport(name, problems=(Finding("unreadable", error.what),))


def _check(
    path: Path,
    name: str,
    files: Sequence[OpenedFile],
    kind: str,
    base: Path | None,
    reporter: Reporter,
) -> CheckReport:
    gathered = gather_all(files)
    problems = by_header(files, gathered, kind)
    adapter, refusal = _opened(path, kind)
    if refusal and not problems:
        problems.append(Finding("unsound", refusal))
    modules = from_stored(adapter) if adapter else _nameable(gathered, kind)
    not_finite, zero = _read_all(files, reporter)
    if not_finite:
        problems.append(finding("not_finite", not_finite, "tensor", *_BROKEN))
    warnings = _dead(gathered.modules.values(), zero)
    said = provenance(files[0].header.metadata, adapter.metadata if adapter else own_metadata(files))
    family = said.family or family_by_layers(modules)
    against = fit.against(modules, family, base) if base is not None else fit.Fit()
    return CheckReport(
        name=name,
        kind=kind,
        family=family,
        tensors=sum(len(file.header.entries) for file in files),
        modules=len(modules) if adapter else len(gathered.modules),
        base=against.base,
        base_family=against.family,
        matched=against.matched,
        problems=(*problems, *(Finding(*parts) for parts in against.problems)),
        warnings=(*warnings, *(Finding(*parts) for parts in against.warnings)),
        notes=adapter.notes if adapter else _assumed(gathered, kind),
    )


def _no_adapter(files: Sequence[OpenedFile]) -> Finding:
    found = identify({key: entry.shape for key, entry in files[0].header.entries.items()})
    what = f"it is a {found.kind}" if found.kind else "its tensors are of no kind that is known"
    return Finding("kind", f"This is no adapter: {what}.", tuple(files[0].header.entries)[:5])


def _opened(path: Path, kind: str) -> tuple[StoredAdapter | None, str]:
    """The adapter as other commands open it, or why they refuse it; only plain LoRAs are tried."""
    if kind != "LoRA":
        return None, ""
    try:
        return open_adapter(path), ""
    except AdapterError as error:
        return None, error.what


def _nameable(gathered: Gathered, kind: str) -> Mapping[str, FoundModule]:
    """What can be looked for in a base, of a LoRA that cannot be opened: layers of q, k, v in one cannot."""
    if kind != "LoRA":
        return gathered.modules
    return {name: module for name, module in gathered.modules.items() if name.partition(".")[0] in COMPONENTS}


def _assumed(gathered: Gathered, kind: str) -> tuple[str, ...]:
    notes = []
    without = sum(1 for module in gathered.modules.values() if module.alpha is None and module.rank)
    if without:
        notes.append(f"{without} modules carry no alpha; it is taken as their rank.")
    if kind not in ("LoRA", "DoRA", "Tucker LoRA", "LoHa"):
        notes.append(f"The shapes of {kind} factors among each other are not checked.")
    return tuple(notes)


def _read_all(files: Sequence[OpenedFile], reporter: Reporter) -> tuple[list[str], set[str]]:
    """Tensors that hold NaN or infinity, and those that are zero throughout.

    Raises:
        AdapterError: a file cannot be read.
    """
    from lorabooth.adapters.bits import scan

    not_finite: list[str] = []
    zero: set[str] = set()
    total = sum(len(file.header.entries) for file in files)
    with reporter.task("Checking", total, "tensor") as task:
        for file in files:
            try:
                for key, entry in file.header.entries.items():
                    finite, any_nonzero = scan(file.path, file.header.data_start, entry)
                    if not finite:
                        not_finite.append(key)
                    if not any_nonzero:
                        zero.add(key)
                    task.advance()
            except OSError as error:
                raise AdapterError(f"{file.path} cannot be read: {error.strerror or error}.") from error
    return not_finite, zero


def _dead(modules: Iterable[FoundModule], zero: set[str]) -> list[Finding]:
    """A warning about modules that change nothing."""
    products = [module for module in modules if module.kind in _PRODUCTS]
    dead = [
        module.name
        for module in products
        if any(factor.key in zero for part, factor in module.parts.items() if part not in ("diff_b",))
    ]
    if not dead:
        return []
    causes = Counter(part for m in products for part, factor in m.parts.items() if factor.key in zero)
    part, _ = causes.most_common(1)[0]
    what = "the adapter has no effect" if len(dead) == len(products) else "those have no effect"
    message = f"{part} is zero in {len(dead)} of {len(products)} modules: {what}."
    if part == "lora_B":
        message += " It was saved before it learned anything, or no gradient reached it."
    return [Finding("dead", message, tuple(dead))]
