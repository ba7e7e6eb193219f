"""`lorabooth demo`: the whole story on the embedded base, in minutes, without a download."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command
from lorabooth.cli.train import run

DEFAULT_OUT = Path("runs/demo")


@command
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = DEFAULT_OUT,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Learn a subject from five photos on the embedded pocket base, and draw it in new places."""
    from lorabooth.recipe import load

    changes = [*(overrides or []), *([] if steps is None else [f"optim.steps={steps}"])]
    with as_file(files("lorabooth.pocket") / "demo") as folder:
        recipe = load(folder / "recipe.toml", changes)
        photos = recipe.subjects[0].images
        reporter_for(quiet=quiet).say(f"Learning the {recipe.subjects[0].noun} in {photos}")
        result = run(recipe, out=out, dry_run=False, quiet=quiet)
        if result is not None and result.grid is not None:
            from lorabooth.run_report import write_story
            from lorabooth.training.folder import RunFolder

            story = write_story(RunFolder(result.out), result.recipe, result.steps)
            print(f"\nThe photos and what was learned from them, in one picture: {story}")
