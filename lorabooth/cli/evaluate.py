"""`lorabooth evaluate`: measure a run; its subcommands compare runs and measure many subjects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lorabooth.cli import evaluate_many
from lorabooth.cli.backbone_options import Clip, Dino, Lpips
from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage

if TYPE_CHECKING:
    from lorabooth.protocol.results import Evaluation


class RunFirst(TyperGroup):
    """A group whose first word may be a run instead of a subcommand: `evaluate RUN` is `evaluate run RUN`.

    A run folder named like a subcommand is given with a path: `evaluate ./compare`.
    """

    # The context's class is click's, which some versions of typer bring along and others depend on.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name before words that name no command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunFirst, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure what was learned and what was forgotten: of a run, of many subjects, or runs side by side.

    lorabooth evaluate RUN [OPTIONS] is short for lorabooth evaluate run RUN [OPTIONS].
    """


@app.command("run")
@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file of prompts, one a line, with {token} and {noun}.")
    ] = None,
    images_per_prompt: Annotated[
        int, typer.Option(min=1, max=1000, help="Images per prompt; their seeds are 0, 1, ...")
    ] = 4,
    class_images: Annotated[int, typer.Option(min=0, max=1000, help="Images of the class, for PRES.")] = 16,
    unrelated_images: Annotated[
        int, typer.Option(min=0, max=1000, help="Images per prompt of other things, for drift.")
    ] = 2,
    dino: Dino = None,
    clip: Clip = None,
    lpips: Lpips = None,
    strength: Annotated[float, typer.Option(help="Factor on the adapter.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampler steps, instead of the run's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the recipe says.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="The photos, if they are not where the recipe says.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for the results, instead of the run's.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print evaluation.json instead of a table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Measure a run with its adapter on and off. Started again, an interrupted evaluation goes on.

    lorabooth evaluate runs/mug-qzx

    Images are kept in RUN/evaluation, numbers in RUN/evaluation.json, all of it to look at in
    RUN/evaluation.html.
    """
    from lorabooth.families.quiet import quiet_libraries

    with quiet_libraries():
        from lorabooth.protocol.run import evaluate as measure

    found = measure(
        run,
        prompts=prompts,
        images_per_prompt=images_per_prompt,
        class_images=class_images,
        unrelated_images=unrelated_images,
        dino=dino,
        clip=clip,
        lpips=lpips,
        strength=strength,
        steps=steps,
        base=base,
        images=images,
        device=device,
        out=out,
        reporter=reporter_for(quiet=quiet),
    )
    if as_json:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        show(found)


@app.command("compare")
@command
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or their evaluation.json files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Runs side by side, and what differs from the first, with intervals.

    lorabooth evaluate compare runs/with-prior runs/without-prior

    All must have been evaluated with the same prompts, numbers of images and backbones.
    """
    if as_json and markdown:
        raise usage("give --json or --markdown, not both")
    from lorabooth.protocol.compare import compare as side_by_side

    found = side_by_side(runs)
    if as_json:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    elif markdown:
        print(found.markdown())
    else:
        _console().print(found.terminal())


def show(found: Evaluation) -> None:
    """Print an evaluation's tables, and where everything is."""
    from rich.text import Text

    from lorabooth.protocol.tables import backbone_line, rows_of, terminal_table

    console = _console()
    for one in found.subjects:
        console.print(terminal_table(rows_of(one), found.backbones, title=one.subject, strong=[2]))
    console.print(Text(f"{backbone_line(found.backbones)}. 95 % intervals over prompts.", style="dim"))
    for note in found.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    print(f"\nnumbers  {found.path}\npage     {found.page}")


def _console() -> Any:
    """Standard output; a pipe gets lines wide enough for all columns."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(110, console.width))


evaluate_many.register(app)
