"""`lorabooth pocket`: how the embedded base model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage

app = typer.Typer(help="The embedded base model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """The embedded base model."""


@app.command("build")
@command
def build(
    out: Annotated[Path, typer.Option(help="Folder for the finished model.")] = Path("pocket-base"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time; a build can go on later.")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    work: Annotated[
        Path | None, typer.Option(help="Folder for training states and the log; OUT-work if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every random draw.")] = 0,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Training processes on a CPU.")] = 2,
    start: Annotated[
        str | None,
        typer.Option(
            "--start-from", help='A finished base ("pocket": the embedded one) whose denoiser trains on.'
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Render scenes and train the pocket base on them; started again with the same folders, it goes on."""
    if device not in ("auto", "cpu", "cuda"):
        raise usage(f"--device {device}: use auto, cpu or cuda")
    import torch

    from lorabooth.pocket.build import BuildPlan
    from lorabooth.pocket.build import build as build_base

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise usage("--device cuda: torch sees no GPU here; `lorabooth doctor` says why")
    states = work or out.with_name(f"{out.name}-work")
    plan = BuildPlan(states, out, minutes, device, seed=seed, processes=processes)
    if start is not None:
        from lorabooth.pocket.base import pocket_dir
        from lorabooth.pocket.restart import start_from

        start_from(plan, pocket_dir() if start == "pocket" else Path(start))
    reporter_for(quiet=quiet).say(f"building on {device} for {minutes:g} minutes; log: {plan.log_file}")
    print(f"pocket base  {build_base(plan)}")
