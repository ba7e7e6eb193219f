"""`lorabooth demo`: the whole story on the embedded base, in minutes, without a download."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command
from lorabooth.cli.train import run

if TYPE_CHECKING:
    from lorabooth.api import RunResult
    from lorabooth.progress import Reporter

DEFAULT_OUT = Path("runs/demo")
_CLASS_IMAGES, _UNRELATED_IMAGES = 8, 1
"""Fewer than `lorabooth evaluate` draws: the demo's table is there in a minute, with wider intervals."""


@command
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = DEFAULT_OUT,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure what was learned and what forgotten.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Learn a subject from five photos on the embedded pocket base, draw it in new places, and measure it."""
    from lorabooth.recipe import load

    changes = [*(overrides or []), *([] if steps is None else [f"optim.steps={steps}"])]
    reporter = reporter_for(quiet=quiet)
    with as_file(files("lorabooth.pocket") / "demo") as folder:
        recipe = load(folder / "recipe.toml", changes)
        reporter.say(f"Learning the {recipe.subjects[0].noun} in {recipe.subjects[0].images}")
        result = run(recipe, out=out, dry_run=False, quiet=quiet)
        if result is None:
            return
        if measured:
            _measure(result, reporter)
        if result.grid is not None:
            from lorabooth.run_report import write_story
            from lorabooth.training.folder import RunFolder

            story = write_story(RunFolder(result.out), result.recipe, result.chosen)
            print(f"\nThe photos and what was learned from them, in one picture: {story}")


def _measure(result: RunResult, reporter: Reporter) -> None:
    """The sample prompts with the adapter on and off, in numbers; the report shows the table as well."""
    from dataclasses import replace

    from lorabooth.cli.evaluate import show
    from lorabooth.protocol.prompts import default_prompts
    from lorabooth.protocol.run import evaluate

    recipe = result.recipe
    asked = tuple(prompt for prompt in recipe.run.sample_prompts if "{token}" in prompt)
    usual = default_prompts(recipe.model.base, recipe.subjects[0].noun)
    print()
    show(
        evaluate(
            result.out,
            prompts=replace(usual, subject=asked) if asked else usual,
            class_images=_CLASS_IMAGES,
            unrelated_images=_UNRELATED_IMAGES,
            reporter=reporter,
        )
    )
