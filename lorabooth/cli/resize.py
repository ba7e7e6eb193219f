"""`lorabooth resize`: an adapter at lower ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage
from lorabooth.cli.rank_table import Dtype, size_text, table_text, torch_dtype

if TYPE_CHECKING:
    from lorabooth.adapters.resize_file import ResizeReport

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@command
def resize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter.")],
    out: Annotated[Path, typer.Option(help="The new file, ending in .safetensors.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of every module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each module's squared singular values to keep, such as 0.95."),
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest size of the file, such as 20MB.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the file's tensors [as they are].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Make an adapter smaller, by a rank, by the energy to keep, or to a size.

    lorabooth resize dog.safetensors --max-size 20MB --dtype fp16 --out small.safetensors
    """
    if sum(rule is not None for rule in (rank, energy, max_size)) != 1:
        raise usage("give exactly one of --rank, --energy and --max-size")
    if energy is not None and not 0 < energy <= 1:
        raise usage(f"--energy {energy}: it is a share above 0 and at most 1, such as 0.95")
    max_bytes = None if max_size is None else parse_size(max_size)

    from lorabooth.adapters.resize_file import resize_file

    report = resize_file(
        file,
        out,
        rank=rank,
        energy=energy,
        max_bytes=max_bytes,
        dtype=torch_dtype(dtype),
        overwrite=overwrite,
        reporter=reporter_for(quiet=quiet),
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report))


def parse_size(text: str) -> int:
    """Bytes of "20MB" (decimal), "20MiB" (binary), "1.5 GB" or "800000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg]i?)?b?)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size < 1:
        raise usage(f"--max-size {text}: write a size such as 20MB, 20MiB or 800kB")
    return size


def report_text(report: ResizeReport) -> str:
    """The report to read in a terminal."""
    return "\n".join(
        [
            table_text(report.table),
            "",
            f"size  {size_text(report.bytes_before)} -> {size_text(report.bytes_after)}",
            f"file  {report.out}",
        ]
    )
