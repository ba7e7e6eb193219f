"""`lorabooth blend`: several adapters into one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command
from lorabooth.cli.rank_table import Dtype, size_text, table_text, torch_dtype
from lorabooth.cli.sample import parse_adapter

if TYPE_CHECKING:
    from lorabooth.adapters.blend_files import BlendReport

Method = Literal["linear", "cat", "svd", "ties", "dare", "magnitude_prune"]
Layout = Literal["kohya", "diffusers"]


@command
def blend(
    adapters: Annotated[
        list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="Adapters, each with its strength.")
    ],
    out: Annotated[Path, typer.Option(help="The new file, ending in .safetensors.")],
    method: Annotated[
        Method,
        typer.Option(help="cat: exact, ranks add up. svd: nearest at --rank. Others combine the factors."),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(min=1, help="For svd; else the largest of the adapters' ranks.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="For ties, dare, magnitude_prune: share of numbers kept [0.5].")
    ] = None,
    seed: Annotated[int, typer.Option(help="For dare.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the file's tensors.")] = "fp32",
    layout: Annotated[
        Layout | None, typer.Option(help="Of the file; kohya's where the family has it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Mix adapters into one.

    lorabooth blend dog.safetensors:0.7 ink.safetensors:0.5 --method svd --rank 16 --out mix.safetensors
    """
    wanted = [parse_adapter(text) for text in adapters]

    from lorabooth.adapters.blend_files import blend_files

    report = blend_files(
        wanted,
        out,
        method=method,
        rank=rank,
        density=density,
        seed=seed,
        dtype=torch_dtype(dtype),
        layout=layout,
        overwrite=overwrite,
        reporter=reporter_for(quiet=quiet),
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report))


def report_text(report: BlendReport) -> str:
    """The report to read in a terminal."""
    count = len(report.strengths)
    strengths = ", ".join(f"{strength:g}" for strength in report.strengths)
    larger = report.bytes_after > 1.5 * report.bytes_before
    hint = " (fp32, so that nothing is rounded; --dtype fp16 halves it)" if larger else ""
    return "\n".join(
        [
            f"{report.method} of {count} adapter{'s' * (count != 1)}, strength {strengths}",
            "",
            table_text(report.table),
            "",
            f"size  {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}{hint}",
            f"file  {report.out}",
        ]
    )
