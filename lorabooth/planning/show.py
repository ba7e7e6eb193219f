"""A memory plan to read in a terminal: phases x components, the peak marked, techniques, what would fit."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lorabooth.planning.budget import GIB, gib_text
from lorabooth.planning.forecast import Phase
from lorabooth.planning.memory_plan import Chosen, MemoryPlan, driver_bytes

MIB = 1 << 20
BAR_WIDTH = 24
_WIDE = 104
"""From this width on every phase has a bar."""
_NAME_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Column -> the components in it; what has no column of its own is work space.
_COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "denoiser": ("denoiser",),
        "text enc.": ("text encoder",),
        "vae": ("vae",),
        "adapter": ("adapter", "gradients", "optimizer"),
        "activations": (),
        "CUDA": ("CUDA context", "CUDA libraries"),
    }
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text, and how it is to look: "", "peak", "good", "bad", "dim" or "title"."""

    text: str
    look: str = ""


def plan_lines(plan: MemoryPlan, title: str, *, width: int = 80, blocks: bool = True) -> list[Line]:
    """Everything about a plan.

    Args:
        plan: from `choose.plan`.
        title: its first line: the base, its size, the batch.
        width: of the terminal, in characters.
        blocks: draw with block characters and arrows; else plain ASCII.

    Returns:
        Lines; the last says that it fits. Where nothing does, `too_little_text` is the end of it.
    """
    lines = [Line(text, "title") for text in _wrapped(title, width)]
    lines += [Line(text, "dim") for text in _wrapped(device_text(plan), width)]
    lines += [Line(""), *_table(plan, width, blocks=blocks), Line("")]
    if plan.chosen:
        lines += [Line("techniques, in the order of what they cost in speed", "title")]
        for number, each in enumerate(plan.chosen, 1):
            lines += _technique(number, each, width)
        lines.append(Line(""))
    if plan.passed_over:
        lines += _aligned("not taken", ((each.name, each.why) for each in plan.passed_over), width)
        lines.append(Line(""))
    if plan.fits:
        lines += [Line(text, "good") for text in _wrapped(fits_text(plan), width)]
    return lines


def device_text(plan: MemoryPlan) -> str:
    """Where it is planned for, and what of that is left alone."""
    device, budget = plan.forecast.device, plan.budget
    size, margin = gib_text(budget.total_bytes), gib_text(budget.margin_bytes)
    mine = "" if budget.total_bytes == device.total_bytes else f": {size} {budget.origin}"
    return f"{device.name}{mine}, of which {margin} are left alone"


def too_little_text(plan: MemoryPlan) -> tuple[str, str]:
    """What to tell where nothing fits: the numbers, and what would fit."""
    peak, own = plan.forecast.peak, driver_bytes(plan.forecast)
    if own >= plan.budget.usable_bytes:
        what = f"CUDA takes {gib_text(own)} for itself, before anything is loaded"
        usable = f"{gib_text(plan.budget.usable_bytes)} of {gib_text(plan.budget.total_bytes)} can be used"
        return f"{what}; {usable} ({plan.forecast.device.name}).", "Take a larger device."
    taken = "with every technique that helps" if plan.chosen else "and no technique helps"
    what = (
        f"{peak.name} needs {gib_text(peak.usage.peak_bytes)} {taken}; "
        f"{gib_text(plan.budget.usable_bytes)} of {gib_text(plan.budget.total_bytes)} can be used "
        f"({plan.forecast.device.name})."
    )
    fitting = [each for each in plan.would_fit if each.fits]
    if fitting:
        lines = [f"  {each.change}: {gib_text(each.peak_bytes)}   {each.options}" for each in fitting]
        return what, "\n".join(["What would fit:", *lines])
    tried = "".join(
        f" Even {each.change} it takes {gib_text(each.peak_bytes)}." for each in plan.would_fit[:1]
    )
    return what, f"Take a larger device, or a smaller base.{tried}"


def fits_text(plan: MemoryPlan) -> str:
    """The last line of a plan that fits."""
    peak = plan.forecast.peak
    how = "with these techniques" if plan.chosen else "as it stands"
    size, most = gib_text(plan.budget.total_bytes), gib_text(peak.usage.peak_bytes)
    return f"fits {size} {how}: peak {most} in {peak.name}"


# ---- the table ----


def _table(plan: MemoryPlan, width: int, *, blocks: bool) -> list[Line]:
    phases, peak = plan.forecast.phases, plan.forecast.peak
    unit, name = (GIB, "GiB") if plan.forecast.peak_bytes >= GIB else (MIB, "MiB")
    shares = {phase.name: _by_column(phase) for phase in phases}
    columns = [column for column in _COLUMNS if any(shares[phase.name][column] for phase in phases)]
    rows = [["phase", *columns, name, ""]]
    for phase in phases:
        cells = [_number(shares[phase.name][column], unit) for column in columns]
        mark = ("◀ peak" if blocks else "< peak") if phase is peak else ""
        rows.append([phase.name, *cells, _number(phase.usage.peak_bytes, unit), mark])
    if width >= _WIDE:
        limit = max(plan.budget.total_bytes, plan.forecast.peak_bytes)
        rows[0].append("")
        for row, phase in zip(rows[1:], phases, strict=True):
            row.insert(-1, _bar(phase.usage.peak_bytes / limit, blocks=blocks))
    looks = ["dim", *("peak" if phase is peak else "" for phase in phases)]
    text = _columns(rows, left=(0, *range(len(columns) + 2, len(rows[0]))))
    return [Line(line, look) for line, look in zip(text, looks, strict=True)]


def _by_column(phase: Phase) -> dict[str, int]:
    parts = dict(phase.usage.at_peak)
    found = {column: sum(parts.pop(name, 0) for name in names) for column, names in _COLUMNS.items()}
    found["activations"] += sum(parts.values())
    return found


def _number(size_bytes: int, unit: int) -> str:
    if not size_bytes:
        return "-"
    return f"{size_bytes / unit:.2f}" if unit == GIB else f"{size_bytes / unit:.1f}"


def _bar(share: float, *, blocks: bool) -> str:
    if not blocks:
        return ("#" * round(share * BAR_WIDTH)).ljust(BAR_WIDTH, ".")
    eighths = round(share * BAR_WIDTH * 8)
    return (_EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(
        BAR_WIDTH, "·"
    )


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(size) if index in left else cell.rjust(size)
            for index, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# ---- the techniques ----


def _technique(number: int, each: Chosen, width: int) -> list[Line]:
    saved = f"saves {gib_text(each.saved_bytes)} in {each.phase}"
    *above, last = _wrapped(each.name, width - 4)
    if len(last) + len(saved) + 6 <= width:
        heads = [
            *above,
            f"{last:<{_NAME_WIDTH}}  {saved}" if len(last) <= _NAME_WIDTH else f"{last}  {saved}",
        ]
    else:
        heads = [*above, last, saved]
    marks = [f"{number:>2}", *[""] * len(heads)]
    lines = [Line(f"{mark:<4}{head}") for mark, head in zip(marks, heads, strict=False)]
    for text in (each.reason, each.set_text()):
        lines += [Line(f"    {part}", "dim") for part in _wrapped(text, width - 4)]
    return lines


def _aligned(title: str, rows: Iterable[tuple[str, str]], width: int) -> list[Line]:
    pairs = list(rows)
    longest = max(len(name) for name, _ in pairs)
    lines = [Line(title, "dim")]
    for name, text in pairs:
        parts = _wrapped(text, max(20, width - longest - 6))
        lines.append(Line(f"    {name:<{longest}}  {parts[0]}", "dim"))
        lines += [Line(f"    {'':<{longest}}  {part}", "dim") for part in parts[1:]]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
