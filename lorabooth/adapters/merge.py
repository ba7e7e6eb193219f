"""Adapters into a base model's weights, and out again: W + strength * (alpha / rank) * lora_B lora_A.

LoRA, arXiv 2106.09685, section 4.1. Computed in float32 (float64 for float64 weights), a few megabytes at a
time, rounded once to the base's dtype. All bytes but those of the touched weights are the base's own; it
is only read. The result takes its place in one step, or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth import durable
from lorabooth.adapters import merge_match, names
from lorabooth.adapters.cores import one_thread_each
from lorabooth.adapters.delta import Change, Contribution, chunk_function
from lorabooth.adapters.merge_match import FAMILY_HINT, Merging, Wanted
from lorabooth.adapters.merge_report import MergedModule, MergeReport
from lorabooth.adapters.stored import open_adapter
from lorabooth.checkpoints import copying, inventory
from lorabooth.checkpoints.header import Entry
from lorabooth.checkpoints.inventory import Base, Slot
from lorabooth.checkpoints.rewrite import ChunkFunction, Span, rewrite
from lorabooth.errors import AdapterError, BaseModelError
from lorabooth.progress import Reporter, Silent

_CHUNK_ELEMENTS = 1 << 18  # of float32: 1 MiB, so that what is computed stays in a core's cache


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
    merge_match.require_family(opened, stored)
    merge_match.require_blocks(adapters, stored)
    factors = [merge_match.factor_of(merging, -1.0 if reverse else 1.0) for merging in adapters]
    wanted, leftovers = merge_match.match(opened, stored, factors)
    if leftovers and not allow_partial:
        raise merge_match.does_not_fit(opened, stored, leftovers)
    if not wanted:
        raise AdapterError(f"Nothing of the adapter fits {opened.path}.", FAMILY_HINT)
    copied = copying.plan_copy(opened, {names.split_module(module)[0] for module in wanted})
    durable.require_space(out.parent, copied.n_bytes)
    with durable.user_errors(out), one_thread_each() as ready:
        out.parent.mkdir(parents=True, exist_ok=True)
        measured, waited_s = _write(opened, wanted, copied, out, say, ready)
    return MergeReport(
        out=out,
        family=opened.family,
        n_modules=len(measured),
        n_bytes=copied.n_bytes,
        seconds=time.monotonic() - began_s,
        waited_s=waited_s,
        dtypes=tuple(sorted({slot.dtype for module in wanted for slot in opened.slots[f"{module}.weight"]})),
        modules=measured,
        leftovers=leftovers,
        left_out=copied.left_out,
        notes=tuple(f"{one.path.name}: {note}" for one in stored for note in one.notes),
    )


def _write(
    base: Base,
    wanted: Wanted,
    copied: copying.CopyPlan,
    out: Path,
    reporter: Reporter,
    ready: Callable[[], None],
) -> tuple[tuple[MergedModule, ...], float]:
    """Write every file of the base, merged where something is wanted. Last: seconds waited for the disk."""
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
        written_s = time.monotonic()
    waited_s = time.monotonic() - written_s
    merged = [MergedModule(module, found.relative(), found.rounding()) for module, found in change.items()]
    return tuple(merged), waited_s


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
