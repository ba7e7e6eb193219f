"""`lorabooth inspect`: what a weight file is."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.errors import command
from lorabooth.cli.rank_table import size_text

if TYPE_CHECKING:
    from lorabooth.adapters.inspection import BlockFacts, ComponentFacts, Inspection

LINE_WIDTH = 100
BAR_WIDTH = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


@command
def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="An adapter or a base model: a .safetensors file or a folder."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a file is: kind, family, ranks, targets, trigger words, norms; or the parts of a base model.

    lorabooth inspect dog.safetensors
    """
    # Small products: threads would wait for each other longer than they compute. Read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lorabooth.adapters.inspect import inspect_path

    found = inspect_path(file)
    print(json.dumps(found.to_dict(), indent=2) if as_json else inspection_text(found, blocks=_can_draw()))


def inspection_text(found: Inspection, *, blocks: bool = True) -> str:
    """The facts to read in a terminal.

    Args:
        found: from `inspect_path`.
        blocks: draw bars with block characters; with "#" otherwise.
    """
    rows = [_facts(found), {name: text for name, text in found.facts.items() if text}]
    width = max(map(len, (name for table in rows for name in table)), default=0)
    parts = [f"{found.name}\n{_title(found)}", *(_aligned(table, width) for table in rows)]
    if found.components:
        parts.append(_component_table(found.components))
    if found.blocks:
        parts.append(_block_table(found, blocks=blocks))
    for title, lines in (("notes", found.notes), ("problems", found.problems)):
        if lines:
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))
    return "\n\n".join(part for part in parts if part)


def parameters_text(count: int) -> str:
    """A number of parameters: "318,464", "85.10 M", "2.57 B"."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e9:.2f} B" if count >= 999_995_000 else f"{count / 1e6:.2f} M"


def _title(found: Inspection) -> str:
    kind = found.kind or "unknown"
    what = f"{kind} {found.variant}" if found.is_adapter and found.variant else kind
    family = found.family_name or found.family
    whose = f" for {family}" if found.is_adapter and family else f", {family}" if family else ""
    detail = "" if found.is_adapter or not found.variant else f" ({found.variant})"
    layout = f", {found.layout} layout" if found.layout else ""
    return f"{what}{whose}{detail}{layout}"


def _facts(found: Inspection) -> dict[str, str]:
    rows = {
        "base": found.base,
        "trigger words": ", ".join(found.trigger_words),
        "frequent tags": ", ".join(f"{tag} ({count})" for tag, count in found.tags),
        "steps": f"{found.steps:,}" if found.steps else "",
        "prediction": found.prediction,
    }
    if found.is_adapter:
        rows["rank"] = _span(*found.ranks) if found.ranks[1] else ""
        rows["alpha"] = _alphas(found.blocks)
        rows["modules"] = f"{found.modules:,}" if found.modules else ""
        rows["targets"] = _targets(found.targets)
    else:
        weighty = found.kind in ("checkpoint", "UNet", "transformer")
        rows["quantized"] = found.quantization or ("no" if weighty else "")
        rows["EMA weights"] = "yes" if found.ema else ""
    rows["parameters"] = parameters_text(found.parameters) + f", {_dtypes(found.dtypes)}" * bool(found.dtypes)
    rows["size"] = size_text(found.size_bytes)
    return {name: text for name, text in rows.items() if text}


def _aligned(rows: Mapping[str, str], width: int) -> str:
    """Names and values in two columns; a long value goes on below itself."""
    indent = " " * (width + 2)
    return "\n".join(
        textwrap.fill(text, LINE_WIDTH, initial_indent=f"{name:<{width}}  ", subsequent_indent=indent)
        for name, text in rows.items()
    )


def _targets(targets: Mapping[str, int]) -> str:
    """Such as "attention q k v out 128, feed-forward 32": the four of an attention are one."""
    merged: dict[str, tuple[list[str], int]] = {}
    for kind, count in targets.items():
        head, attention, leaf = kind.rpartition("attention ")
        attends = attention and leaf in ("q", "k", "v", "out", "qkv")
        name = head + "attention" if attends else kind
        leaves, total = merged.get(name, ([], 0))
        merged[name] = ([*leaves, leaf] if attends else leaves, total + count)
    return ", ".join(" ".join([name, *leaves, f"{total}"]) for name, (leaves, total) in merged.items())


def _alphas(rows: Sequence[BlockFacts]) -> str:
    low = [row.alpha_min for row in rows if row.alpha_min is not None]
    high = [row.alpha_max for row in rows if row.alpha_max is not None]
    return _span(min(low), max(high)) if low and high else ""


def _span(low: float, high: float) -> str:
    if low == high:
        return f"{low:.4g}"
    return f"{low:.4g}-{high:.4g}" if low >= 0 else f"{low:.4g} to {high:.4g}"


def _norm_text(norm: float) -> str:
    """Three digits, zeros too: "3.00", "0.180"."""
    return f"{norm:#.3g}".rstrip(".") if norm else "0"


def _dtypes(dtypes: Mapping[str, int]) -> str:
    total = sum(dtypes.values())
    shown = [_DTYPES.get(name, name) for name, count in dtypes.items() if count * 1000 >= total]
    return " + ".join(shown)


def _component_table(components: Sequence[ComponentFacts]) -> str:
    rows = [("component", "tensors", "parameters", "dtype", "size", "")]
    rows += [
        (
            part.name,
            f"{part.tensors:,}",
            parameters_text(part.parameters),
            _dtypes(part.dtypes),
            size_text(part.size_bytes),
            _remarks(part),
        )
        for part in components
    ]
    return _table(rows, left=(0, 3, 5))


def _remarks(part: ComponentFacts) -> str:
    remarks = [part.class_name, f"{part.files} files" if part.files > 1 else "", part.quantization]
    remarks.append(f"also {', '.join(part.variants)}" if part.variants else "")
    return ", ".join(remark for remark in remarks if remark)


def _block_table(found: Inspection, *, blocks: bool) -> str:
    """A line a block: modules, ranks, alphas, and its norm as a bar."""
    most = max((row.norm or 0.0 for row in found.blocks), default=0.0)
    rows = [("block", "modules", "rank", "alpha", "norm", "")]
    for row in found.blocks:
        alpha = "" if row.alpha_min is None or row.alpha_max is None else _span(row.alpha_min, row.alpha_max)
        norm = "" if row.norm is None else _norm_text(row.norm)
        drawn = bar((row.norm or 0.0) / most if most else 0.0, blocks=blocks)
        rank = _span(row.rank_min, row.rank_max) if row.rank_max else ""
        rows.append((row.name, f"{row.modules:,}", rank, alpha, norm, drawn))
    table = _table(rows, left=(0, 5))
    if not found.sampled:
        return table
    what = "alpha/rank |B A|" if found.kind == "LoRA" else "Frobenius norm of the change"
    how = "all" if found.sampled == found.modules else f"sampled {found.sampled:,} of"
    return (
        f"{table}\n\nnorm: {what} of a module at strength 1, root mean square; "
        f"{how} {found.modules:,} modules"
    )


def bar(share: float, *, width: int = BAR_WIDTH, blocks: bool = True) -> str:
    """A horizontal bar.

    Args:
        share: of the full width, in [0, 1].
        width: full, in characters.
        blocks: to an eighth of a character; else whole "#" only.
    """
    if not blocks:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
        if any(row)
    )


def _can_draw() -> bool:
    """Whether stdout can hold block characters."""
    try:
        _EIGHTHS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
