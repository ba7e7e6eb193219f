"""`lorabooth merge`: adapters into a base model's weights, or out of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.console import dtype_text, duration_text, reporter_for
from lorabooth.cli.errors import command, usage
from lorabooth.cli.rank_table import size_text
from lorabooth.cli.sample import parse_adapter

if TYPE_CHECKING:
    from lorabooth.adapters.merge_report import MergeReport

_TOLD_FROM_S = 1.0
"""A shorter wait for the disk is not worth a word."""


@command
def merge(
    base: Annotated[
        str, typer.Option(help='Base model: a diffusers folder, a .safetensors file, "pocket", a hub id.')
    ],
    adapters: Annotated[
        list[str],
        typer.Option("--adapter", metavar="FILE[:STRENGTH]", help="An adapter file; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="A folder for a folder, a .safetensors file for a file.")],
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--block",
            metavar="NAME=STRENGTH",
            help="A further factor for a part, such as text_encoder=0 or up_blocks.1=0.5; may be repeated.",
        ),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take the adapters out again.")] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Merge what fits; otherwise a leftover is an error.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Write a base model with adapters merged into its weights; the base itself is only read.

    lorabooth merge --base models/sd15 --adapter dog.safetensors:0.8 --out models/sd15-dog

    lorabooth merge --base sdxl.safetensors --adapter dog.safetensors --out sdxl-dog.safetensors
    """
    strengths = dict(_block(text) for text in blocks or [])
    files = [parse_adapter(text) for text in adapters]

    from lorabooth import exchange
    from lorabooth.adapters.merge_match import Merging

    reporter = reporter_for(quiet=quiet or as_json)
    report = exchange.merge(
        base,
        [Merging(path, strength, strengths) for path, strength in files],
        out,
        reverse=reverse,
        allow_partial=allow_partial,
        overwrite=overwrite,
        reporter=reporter,
    )
    print(json.dumps(_facts(report), indent=2) if as_json else report_text(report))


def report_text(report: MergeReport) -> str:
    """What was changed, by how much, what was lost, and what was left."""
    largest, worst = report.largest_change, report.worst_rounding
    lines = [
        f"merged    {report.n_modules} weights{f' of {report.family}' * bool(report.family)} "
        f"in {duration_text(report.seconds)}"
        + f", {duration_text(report.waited_s)} of it for the disk"
        * (report.waited_s >= _TOLD_FROM_S),
        f"change    mean {_percent(report.mean_change)}, largest {_percent(largest.relative_change)} "
        f"of the weight ({largest.module})",
        f"rounding  to {' and '.join(dtype_text(dtype) for dtype in report.dtypes)}: "
        + (
            f"lost {_percent(report.mean_rounding)} of the change, at worst {_percent(worst.rounding)} "
            f"({worst.module})"
            if worst.rounding
            else "nothing lost"
        ),
    ]
    if report.leftovers:
        lines.append(f"leftovers {len(report.leftovers)} modules that the base does not have:")
        lines += [f"          {module}" for module in report.leftovers]
    if report.left_out:
        lines.append("left out  files that would still hold the unmerged model:")
        lines += [f"          {name}" for name in report.left_out]
    lines += [f"note      {note}" for note in report.notes]
    return "\n".join([*lines, f"written   {report.out} ({size_text(report.n_bytes)})"])


def _block(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not name or not equals or not math.isfinite(strength):
        raise usage(f"--block {text}: write NAME=STRENGTH, such as text_encoder=0")
    return name, strength


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _facts(report: MergeReport) -> dict[str, object]:
    facts = dataclasses.asdict(report) | {"out": str(report.out)}
    return facts | {"mean_change": report.mean_change, "mean_rounding": report.mean_rounding}
