"""Adapters into a base model's weights, and out again: W + strength * (alpha / rank) * lora_B lora_A.

LoRA, arXiv 2106.09685, section 4.1. Computed in float32 (float64 for float64 weights), a few megabytes at a
time, rounded once to the base's dtype. All bytes but those of the touched weights are the base's own; it
is only read. The result takes its place in one step, or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorabooth import durable
from lorabooth.adapters import names
from lorabooth.adapters.bits import scan
from lorabooth.adapters.cores import one_thread_each
from lorabooth.adapters.delta import Change, Contribution, chunk_function
from lorabooth.adapters.stored import StoredAdapter, open_adapter
from lorabooth.checkpoints import copying, inventory
from lorabooth.checkpoints.header import Entry
from lorabooth.checkpoints.inventory import Base, Slot
from lorabooth.checkpoints.rewrite import ChunkFunction, Span, rewrite
from lorabooth.errors import AdapterError, BaseModelError
from lorabooth.progress import Reporter, Silent

_CHUNK_ELEMENTS = 1 << 18  # of float32: 1 MiB, so that what is computed stays in a core's cache


@dataclass(frozen=True)
class Merging:
    """One adapter to merge.

    Attributes:
        path: of the adapter.
        strength: factor on its effect; negative ones take it out.
        block_strengths: further factors for parts of it: a canonical module name, or the beginning of one
            ("text_encoder", "denoiser.down_blocks.1"; "denoiser." may be left out). The longest match counts.
    """

    path: Path
    strength: float = 1.0
    block_strengths: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergedModule:
    """How one weight was changed.

    Attributes:
        module: canonical name.
        relative_change: Frobenius norm of the change over that of the weight.
        rounding: norm of what the cast to the base's dtype lost, over that of the change.
    """

    module: str
    relative_change: float
    rounding: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the merged base.
        family: of the base, "" where it is not known.
        n_modules: how many weights were changed.
        n_bytes: size of the result.
        seconds: that it took.
        dtypes: of the changed weights, by safetensors' names.
        modules: each of them.
        leftovers: modules of the adapters that the base does not have (only with `allow_partial`).
        left_out: files of a base folder that were not copied, because they hold the unmerged model.
        notes: what had to be assumed, for the user.
    """

    out: Path
    family: str
    n_modules: int
    n_bytes: int
    seconds: float
    dtypes: tuple[str, ...]
    modules: tuple[MergedModule, ...]
    leftovers: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def largest_change(self) -> MergedModule:
        """The module whose weight changed most."""
        return max(self.modules, key=lambda module: module.relative_change)

    @property
    def mean_change(self) -> float:
        """Mean over the modules of the relative change."""
        return sum(module.relative_change for module in self.modules) / len(self.modules)

    @property
    def mean_rounding(self) -> float:
        """Mean over the modules of the share that the cast lost."""
        return sum(module.rounding for module in self.modules) / len(self.modules)

    @property
    def worst_rounding(self) -> MergedModule:
        """The module that lost most of its change to the base's dtype."""
        return max(self.modules, key=lambda module: module.rounding)


def merge(
    base: Path,
    adapters: Sequence[Merging],
    out: Path,
    *,
    reverse: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> MergeReport:
    """Write a base model with adapters merged into its weights.

    Args:
        base: a diffusers folder, or a .safetensors checkpoint in the original (LDM) layout. Only read.
        adapters: at least one; their effects add up.
        out: a folder for a folder, a .safetensors file for a file.
        reverse: subtract instead of add: takes adapters out of a base that they were merged into.
        allow_partial: merge what fits, and list the rest; otherwise a single leftover is an error.
        overwrite: replace an earlier result at `out`.
        reporter: hears of the progress.

    Returns:
        What was changed, by how much, and what rounding lost.

    Raises:
        AdapterError: an adapter is broken, not finite, of another family, or does not fit; or the result
            would overflow the base's dtype.
        BaseModelError: the base is broken, quantized, or not supported.
        RecipeError: `out` cannot be written.
        TrainingError: the disk is too small.
    """
    say, began_s = reporter or Silent(), time.monotonic()
    if not adapters:
        raise AdapterError("There is no adapter to merge.", "Give at least one.")
    opened = inventory.open_base(base)
    inventory.require_unquantized(opened)
    stored = [open_adapter(merging.path) for merging in adapters]
    copying.require_output(opened, out, overwrite, [merging.path for merging in adapters])
    _require_family(opened, stored)
    _require_blocks(adapters, stored)
    sign = -1.0 if reverse else 1.0
    wanted, leftovers = _match(opened, stored, [_factors(merging, sign) for merging in adapters])
    if leftovers and not allow_partial:
        raise _does_not_fit(opened, stored, leftovers)
    if not wanted:
        raise AdapterError(f"Nothing of the adapter fits {opened.path}.", _FAMILY_HINT)
    copied = copying.plan_copy(opened, {names.split_module(module)[0] for module in wanted})
    durable.require_space(out.parent, copied.n_bytes)
    with durable.user_errors(out), one_thread_each() as ready:
        _require_finite(stored, say)
        out.parent.mkdir(parents=True, exist_ok=True)
        measured = _write(opened, wanted, copied, out, say, ready)
    return MergeReport(
        out=out,
        family=opened.family,
        n_modules=len(measured),
        n_bytes=copied.n_bytes,
        seconds=time.monotonic() - began_s,
        dtypes=tuple(sorted({slot.dtype for module in wanted for slot in opened.slots[f"{module}.weight"]})),
        modules=measured,
        leftovers=leftovers,
        left_out=copied.left_out,
        notes=tuple(f"{one.path.name}: {note}" for one in stored for note in one.notes),
    )


_FAMILY_HINT = "It was made for another family of base models."

Wanted = dict[str, list[Contribution]]
"""Canonical module -> what is added to its weight."""


def _factors(merging: Merging, sign: float) -> Callable[[str], float]:
    """A canonical module -> the whole factor on its adapter's effect."""
    blocks = {_whole_name(key): value for key, value in merging.block_strengths.items()}

    def factor(module: str) -> float:
        matching = [key for key in blocks if _is_within(module, key)]
        block = blocks[max(matching, key=len)] if matching else 1.0
        return sign * merging.strength * block

    return factor


def _whole_name(block: str) -> str:
    """With the component, which may be left out for the denoiser."""
    return block if block.split(".")[0] in names.COMPONENTS else f"denoiser.{block}"


def _is_within(module: str, block: str) -> bool:
    return module == block or module.startswith(f"{block}.")


def _require_blocks(adapters: Sequence[Merging], stored: Sequence[StoredAdapter]) -> None:
    """A part that does not exist is a slip of the pen, and would silently have no effect."""
    for merging, adapter in zip(adapters, stored, strict=True):
        if not all(map(math.isfinite, (merging.strength, *merging.block_strengths.values()))):
            raise AdapterError(f"{adapter.path.name}: strengths must be finite numbers.")
        for block in merging.block_strengths:
            if not any(_is_within(module, _whole_name(block)) for module in adapter.modules):
                parts = dict.fromkeys(".".join(module.split(".")[:3]) for module in adapter.modules)
                raise AdapterError(
                    f"{adapter.path.name} has no part {block!r}.", f"Its parts are {', '.join(parts)}."
                )


def _match(
    base: Base, stored: Sequence[StoredAdapter], factors: Sequence[Callable[[str], float]]
) -> tuple[Wanted, tuple[str, ...]]:
    """What is added to each module's weight, and the modules that the base lacks or shapes otherwise."""
    wanted: Wanted = {}
    leftovers: dict[str, None] = {}
    for adapter, factor in zip(stored, factors, strict=True):
        for module, found in adapter.modules.items():
            shape = base.weight_shape(module)
            if shape is None or not _fits(shape, found.down.shape, found.up.shape):
                leftovers[module] = None
                continue
            scale = factor(module) * found.alpha / found.rank
            if scale:
                wanted.setdefault(module, []).append(Contribution(found.down, found.up, scale))
    return wanted, tuple(leftovers)


def _fits(weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Whether factors fit a weight; a 1x1 convolution and a linear layer are the same matrix."""
    inner = (down[1], *(() if down[2:] == (1, 1) else down[2:]))
    return (up[0], *inner) == (weight[0], weight[1], *(() if weight[2:] == (1, 1) else weight[2:]))


def _require_family(base: Base, stored: Sequence[StoredAdapter]) -> None:
    for adapter in stored:
        if adapter.family and base.family and adapter.family != base.family:
            fitting = sum(base.weight_shape(module) is not None for module in adapter.modules)
            if fitting < len(adapter.modules):
                raise AdapterError(
                    f"{adapter.path.name} is an adapter for {adapter.family}, but {base.path.name} is "
                    f"{base.family}.",
                    "Merge it into a base of its own family.",
                )


def _does_not_fit(base: Base, stored: Sequence[StoredAdapter], leftovers: Sequence[str]) -> AdapterError:
    total = len({module for adapter in stored for module in adapter.modules})
    listed = ", ".join(leftovers[:5]) + (f" and {len(leftovers) - 5} more" if len(leftovers) > 5 else "")
    return AdapterError(
        f"{len(leftovers)} of the adapter's {total} modules are absent from {base.path.name} or have another "
        f"shape there: {listed}.",
        "--allow-partial merges the others." if len(leftovers) < total else _FAMILY_HINT,
    )


def _require_finite(stored: Sequence[StoredAdapter], reporter: Reporter) -> None:
    """Read every factor once, before anything is written."""
    total = sum(len(adapter.modules) for adapter in stored)
    with reporter.task("Checking adapters", total, "module") as task:
        for adapter in stored:
            for module, found in adapter.modules.items():
                for kind, factor in (("lora_A", found.down), ("lora_B", found.up)):
                    if not scan(factor.path, factor.data_start, factor.entry)[0]:
                        raise AdapterError(
                            f"{adapter.path.name}: {module}.{kind} holds NaN or infinity.",
                            "Such an adapter gives black images; use an earlier checkpoint.",
                        )
                task.advance()


def _write(
    base: Base,
    wanted: Wanted,
    copied: copying.CopyPlan,
    out: Path,
    reporter: Reporter,
    ready: Callable[[], None],
) -> tuple[MergedModule, ...]:
    """Write every file of the base, merged where something is wanted."""
    change: dict[str, Change] = {}
    spans: dict[int, list[Span]] = {}
    for module, contributions in wanted.items():
        change[module] = Change()
        for slot in base.slots[f"{module}.weight"]:
            spans.setdefault(slot.file, []).append(_span(base, slot, contributions, change[module], ready))
    by_path = {base.files[index].path: found for index, found in spans.items()}
    total_mib = max(1, copied.n_bytes >> 20)
    with reporter.task("Merging", total_mib, "MiB") as task, durable.staged(out) as beside:
        counter = _Mebibytes(task.advance)
        if base.kind == "file":
            rewrite(base.path, beside, by_path.get(base.path, ()), on_bytes=counter.add)
        else:
            for source, relative in copied.files:
                target = beside / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                rewrite(source, target, by_path.get(source, ()), on_bytes=counter.add)
        for module, found in change.items():
            _require_sound(base, module, found)
    return tuple(MergedModule(module, found.relative(), found.rounding()) for module, found in change.items())


@dataclass
class _Mebibytes:
    """From bytes done to whole units of a progress bar."""

    advance: Callable[[int], None]
    done: int = 0

    def add(self, n_bytes: int) -> None:
        """Count further bytes."""
        before, self.done = self.done >> 20, self.done + n_bytes
        if (step := (self.done >> 20) - before) > 0:
            self.advance(step)


def _span(
    base: Base, slot: Slot, contributions: Sequence[Contribution], change: Change, ready: Callable[[], None]
) -> Span:
    """The bytes of one weight, and how they are computed."""
    file = base.files[slot.file]
    entry: Entry = file.header.entries[slot.key]
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    begin_row, end_row = inventory.stored_rows(slot, entry.shape)
    start = file.header.data_start + entry.begin
    columns = 1
    for size in entry.shape[1:]:
        columns *= size
    rows = max(1, _CHUNK_ELEMENTS // columns)

    def begin() -> ChunkFunction:
        ready()
        return chunk_function(contributions, entry.dtype, columns, slot.transposed, change)

    return Span(
        start + begin_row * row_bytes,
        start + end_row * row_bytes,
        rows * row_bytes,
        begin,
    )


def _require_sound(base: Base, module: str, change: Change) -> None:
    """Neither the base's weight nor the result may be other than finite."""
    if not math.isfinite(change.weight):
        raise BaseModelError(
            f"{base.path.name}: the weight of {module} holds NaN or infinity.",
            "The base is broken; download it again.",
        )
    if change.overflows:
        raise AdapterError(
            f"The merged weight of {module} overflows the base's precision.",
            "Use a smaller strength, or merge into a bf16 or fp32 base.",
        )
