"""`lorabooth extract`: an adapter from the difference of two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage
from lorabooth.cli.rank_table import Dtype, error_text, size_text, table_text, torch_dtype

if TYPE_CHECKING:
    from lorabooth.adapters.extract import ExtractReport


@command
def extract(
    base: Annotated[
        str, typer.Option(help='Base model: a diffusers folder, a .safetensors file, "pocket", a hub id.')
    ],
    tuned: Annotated[str, typer.Option(help="The fine-tuned model, of the same family; as --base.")],
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of a module.")],
    out: Annotated[Path, typer.Option(help="The new file, ending in .safetensors.")],
    energy: Annotated[
        float | None,
        typer.Option(help="Lower a module's rank to what holds this share of its squared change."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the file's tensors.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Make the adapter that brings a base model nearest to a fine-tuned one.

    lorabooth extract --base models/sd15 --tuned models/sd15-dog --rank 16 --out dog.safetensors
    """
    if energy is not None and not 0 < energy <= 1:
        raise usage(f"--energy {energy}: it is a share above 0 and at most 1, such as 0.95")

    from lorabooth import exchange

    report = exchange.extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        dtype=torch_dtype(dtype),
        overwrite=overwrite,
        reporter=reporter_for(quiet=quiet),
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report))


def report_text(report: ExtractReport) -> str:
    """The report to read in a terminal."""
    lines = [table_text(report.table), ""]
    if report.unchanged:
        lines.append(f"same   {report.unchanged} modules have the same weight in both")
    if report.rest.tensors:
        share = error_text(report.rest.relative_norm)
        lines.append(
            f"rest   {report.rest.tensors} norms, biases and embeddings changed too, {share} of the whole "
            f"change, which no adapter holds ({', '.join(report.rest.examples[:2])})"
        )
    lines += [f"note   {note}" for note in report.notes]
    lines.append(f"error  {error_text(report.relative_error)} of the whole change is not in the adapter")
    return "\n".join([*lines, f"file   {report.out} ({size_text(report.n_bytes)})"])
