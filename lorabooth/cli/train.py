"""`lorabooth train`: from a recipe, or from photos and a noun."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage

if TYPE_CHECKING:
    from lorabooth.api import RunResult
    from lorabooth.recipe import Recipe

# Where something is, which may be said beside a recipe.
_PLACES = {"--base": "model.base", "--images": "subjects.0.images"}


@command
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file; or use --base, --images and --noun.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help='Base model: "pocket", a diffusers folder, a .safetensors file, a hub id.'),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of 3-5 photos of the subject.")] = None,
    noun: Annotated[str | None, typer.Option(help="What the subject is: dog, mug, person.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Name of the subject in prompts; a rare one is looked up otherwise.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key: optim.lr=1e-4."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start in a new folder beside one that is taken.")
    ] = False,
) -> None:
    """Learn a subject. Started again with the same recipe, an interrupted run goes on.

    lorabooth train recipes/sd15-subject.toml

    lorabooth train --base pocket --images photos/dog --noun dog

    A run folder that was moved goes on too; --images and --base beside its recipe say where the photos and
    the base are now:

    lorabooth train RUN/recipe.toml --images photos/dog --base models/sd15
    """
    given = {"--base": base, "--images": images, "--noun": noun, "--token": token, "--steps": steps}
    effective = _recipe(
        recipe, {name: value for name, value in given.items() if value is not None}, overrides or []
    )
    run(effective, out=out, dry_run=dry_run, quiet=quiet, fresh=fresh)


def run(
    recipe: Recipe, *, out: Path | None, dry_run: bool, quiet: bool, fresh: bool = False
) -> RunResult | None:
    """Train a recipe and print what came out; shared with the demo. None for a dry run."""
    from lorabooth.families.quiet import quiet_libraries

    with quiet_libraries():  # the libraries' remarks while they are imported are not the user's business
        from lorabooth import api
    reporter = reporter_for(quiet=quiet)
    if dry_run:
        plan = api.train(recipe, out=out, dry_run=True, fresh=fresh, reporter=reporter)
        print(plan.text())
        return None
    result = api.train(recipe, out=out, dry_run=False, fresh=fresh, reporter=reporter)
    from lorabooth.training.processes import process_state

    if process_state().is_main_process:
        print(result_text(result))
    return result


def _recipe(file: Path | None, given: dict[str, Any], overrides: list[str]) -> Recipe:
    moved = {key: given[name] for name, key in _PLACES.items() if name in given}
    others = [name for name in given if name not in _PLACES]
    if file is not None and others:
        raise usage(f"give a recipe or {', '.join(others)}, not both; with a recipe, use --set instead")
    from lorabooth.recipe import from_mapping, load

    if file is not None:
        # A TOML text, whatever is in the path; --set comes last and wins.
        places = [f"{key}={json.dumps(str(value), ensure_ascii=False)}" for key, value in moved.items()]
        recipe = load(file, [*places, *overrides])
        if "--images" in given and len(recipe.subjects) > 1:
            raise usage("the recipe has several subjects: use --set subjects.0.images=FOLDER, and so on")
        return recipe
    if missing := [name for name in ("--base", "--images", "--noun") if name not in given]:
        start = "give a recipe file, or" if not given else "without a recipe,"
        raise usage(f"{start} {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")
    subject = {"images": str(given["--images"]), "noun": given["--noun"]}
    if "--token" in given:
        subject["token"] = given["--token"]
    raw: dict[str, Any] = {"model": {"base": given["--base"]}, "subjects": [subject]}
    if "--steps" in given:
        raw["optim"] = {"steps": given["--steps"]}
    return from_mapping(raw, overrides, "command line")


def result_text(result: RunResult) -> str:
    """Where everything is, and how to use it."""
    subject = result.recipe.subjects[0]
    chosen = "" if result.recipe.run.select == "last" else f", of step {result.chosen} of {result.steps}"
    lines = [f"adapter  {result.adapter}{chosen}"]
    if result.grid is not None:
        lines.append(f"samples  {result.grid}")
    lines.append(f"report   {result.report}")
    words = ["lorabooth", "sample", "--base", result.recipe.model.base, "--adapter", str(result.adapter)]
    words += ["--prompt", f"a photo of a {subject.token} {subject.noun} in the snow", "--out", "samples"]
    measure = shlex.join(["lorabooth", "evaluate", str(result.out)])
    return "\n".join(
        [*lines, "", "Draw it in a new place:", f"  {shlex.join(words)}", "Measure it:", f"  {measure}"]
    )
