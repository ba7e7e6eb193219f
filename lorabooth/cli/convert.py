"""`lorabooth convert`: an adapter in another tool's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorabooth.cli.console import dtype_text, reporter_for
from lorabooth.cli.errors import command
from lorabooth.cli.rank_table import size_text, torch_dtype

if TYPE_CHECKING:
    from lorabooth.adapters.convert import ConvertReport

Layout = Literal["kohya", "diffusers", "peft"]
Dtype = Literal["keep", "fp32", "fp16", "bf16"]
Family = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]


@command
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter of any layout, file or folder.")],
    to: Annotated[
        Layout, typer.Option(help="Layout: kohya (which ComfyUI and A1111 read too), diffusers or peft.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="A file if it ends in .safetensors, else a folder with the layout's file names."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    level_alphas: Annotated[
        bool, typer.Option("--level-alphas", help="One alpha a component; the rest goes into lora_B.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the factors; keep leaves each as it is.")] = "keep",
    family: Annotated[
        Family | None, typer.Option(help="Of base models, where the adapter does not tell it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Rename an adapter's tensors as another tool calls them; the numbers stay as they are.

    lorabooth convert dog.safetensors --to diffusers --out dog
    """
    from lorabooth.adapters.convert import convert_file

    report = convert_file(
        file,
        out,
        to=to,
        overwrite=overwrite,
        level_alphas=level_alphas,
        dtype=None if dtype == "keep" else torch_dtype(dtype),
        family=family or "",
        reporter=reporter_for(quiet=quiet),
    )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report))


def report_text(report: ConvertReport) -> str:
    """What it was, what it is now, and where."""
    ranks = "-".join(str(rank) for rank in dict.fromkeys(report.ranks))
    was = [
        f"from  {report.layout}",
        report.family or "family unknown",
        f"{report.n_modules} module{'s' * (report.n_modules != 1)} of {', '.join(report.components)}",
        f"rank {ranks}",
        " and ".join(map(dtype_text, report.dtypes)),
    ]
    lines = [", ".join(was), f"to    {report.to}, {size_text(report.n_bytes)}"]
    return "\n".join([*lines, *(f"file  {path}" for path in report.files)])
