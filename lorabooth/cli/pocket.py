"""`lorabooth pocket`: how the embedded base model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command

app = typer.Typer(help="The embedded base model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """The embedded base model."""


@app.command("build")
@command
def build(
    out: Annotated[Path, typer.Option(help="Folder for the model and the state of its training.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time; a build can go on later.")] = 60.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Render scenes and train the pocket base on them; started again with the same --out, it goes on."""
    from lorabooth.pocket.build import build as build_base

    result = build_base(out, minutes=minutes, device=device, reporter=reporter_for(quiet=quiet))
    print(f"pocket base  {result}")
