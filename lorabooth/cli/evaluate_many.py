"""`lorabooth evaluate protocol` and `pocketbench`: many subjects, one table."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.backbone_options import Clip, Dino, Lpips
from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage

if TYPE_CHECKING:
    from lorabooth.protocol.jobs import Job
    from lorabooth.protocol.summary import ProtocolResult

Out = Annotated[Path, typer.Option(help="Folder for the runs and the table; the same command in it goes on.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key: optim.steps=400."),
]
Processes = Annotated[
    int, typer.Option(min=1, max=64, help="Processes that share the subjects, each on a GPU of its own.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print protocol.json instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")]


def register(app: typer.Typer) -> None:
    """Add the commands for many subjects to `lorabooth evaluate`."""
    app.command("protocol")(protocol)
    app.command("pocketbench")(pocketbench)
    app.command("protocol-worker", hidden=True)(worker)


@command
def protocol(
    subjects: Annotated[
        Path, typer.Option(help="Folder with a folder of photos per subject, such as DreamBench's.")
    ],
    recipe: Annotated[Path, typer.Option(help="How each subject is trained; its own subject is replaced.")],
    out: Out,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this subject; may be repeated.")
    ] = None,
    nouns: Annotated[
        list[str] | None,
        typer.Option(
            "--nouns",
            metavar="NAME=NOUN[,live]",
            help="What a subject is, where no prompts_and_classes.txt or class.txt says it; may be repeated.",
        ),
    ] = None,
    images_per_prompt: Annotated[
        int, typer.Option(min=1, max=1000, help="Images per prompt; their seeds are 0, 1, ...")
    ] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file of prompts for every subject, one a line, with {token} and {noun}."),
    ] = None,
    dino: Dino = None,
    clip: Clip = None,
    lpips: Lpips = None,
    overrides: Overrides = None,
    processes: Processes = 1,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: QuietOption = False,
) -> None:
    """Train, draw and measure every subject in a folder; one table. Started again, it goes on.

    lorabooth evaluate protocol --subjects dreambench --recipe recipes/sd15-subject.toml --out bench

    DreamBench's folders and its prompts_and_classes.txt are read as published. In other folders a class.txt
    in each subject's says what it is ("mug", "snail, live"), or --nouns does.

    Several GPUs: --processes 4, or the same command under `accelerate launch`; every process trains alone.
    """
    told = _pairs(nouns or [])
    backbones = {"dino": dino, "clip": clip, "lpips": lpips}
    own = [f"evaluation.{key}={json.dumps(value)}" for key, value in backbones.items() if value is not None]

    def make() -> Job:
        from lorabooth.protocol.jobs import Settings, load_recipe, make_job

        return make_job(
            subjects,
            load_recipe(recipe, [*own, *(overrides or [])]),
            out,
            settings=Settings(images_per_prompt=images_per_prompt, device=device),
            only=only or [],
            told=told,
            prompts=prompts,
        )

    _run(make, processes=processes, device=device, dry_run=dry_run, as_json=as_json, quiet=quiet)


@command
def pocketbench(
    out: Out = Path("runs/pocketbench"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few specimens, prompts and steps: minutes, and rough numbers.")
    ] = False,
    overrides: Overrides = None,
    processes: Processes = 2,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: QuietOption = False,
) -> None:
    """The same protocol in the pocket world: specimens that nobody has seen, no download, one table."""
    # A dry run writes nothing that stays, and the photos are there to be looked at.
    nowhere = dry_run and not out.exists()
    with tempfile.TemporaryDirectory() if nowhere else contextlib.nullcontext(str(out)) as place:

        def make() -> Job:
            from lorabooth.protocol.pocketbench import bench_job

            return bench_job(Path(place), quick=quick, overrides=overrides or [], device=device)

        _run(make, processes=processes, device=device, dry_run=dry_run, as_json=as_json, quiet=quiet)


@command
def worker(
    out: Annotated[Path, typer.Argument()],
    since: Annotated[float, typer.Option()],
    number: Annotated[int, typer.Option()],
    workers: Annotated[int, typer.Option()],
    only: Annotated[list[str], typer.Option()],
    quiet: QuietOption = False,
) -> None:
    """One of the processes of `evaluate protocol --processes`."""
    from lorabooth.families.quiet import quiet_libraries
    from lorabooth.protocol.workers import Position, end_with_parent

    end_with_parent()
    with quiet_libraries():
        from lorabooth.protocol.many import worker as share
    share(
        out,
        only=tuple(only),
        since_s=since,
        position=Position(number, workers),
        reporter=reporter_for(quiet=quiet),
    )


def _run(
    make: Callable[[], Job], *, processes: int, device: str, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Put a protocol together, run it, print the table; ends with the code of the first subject's error."""
    if device not in ("auto", "cpu", "cuda"):
        raise usage(f"--device {device}: use auto, cpu or cuda")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # training asks accelerate
    from lorabooth.families.quiet import quiet_libraries
    from lorabooth.protocol.workers import leave_launch

    # Before anything asks accelerate which of several processes it is.
    position = leave_launch()
    reporter = reporter_for(quiet=quiet or position.index > 0)
    with quiet_libraries():
        from lorabooth.protocol import many

        job = make()
    if dry_run:
        if position.index == 0:
            print(many.estimate(job, reporter).text())
        return
    result = many.run_protocol(
        job, processes=processes if position.count == 1 else 1, position=position, reporter=reporter
    )
    if position.index == 0:
        _print(result, as_json=as_json)
        many.require_all(result)


def _print(result: ProtocolResult, *, as_json: bool) -> None:
    from lorabooth.protocol.summary import WARNING, to_json
    from lorabooth.protocol.tables import backbone_line, terminal_table

    if as_json:
        print(json.dumps(to_json(result), indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(110, console.width))
    if rows := result.rows():
        means = range(len(rows) - 3, len(rows))
        console.print(terminal_table(rows, result.backbones, title=result.job.settings.title, strong=means))
        console.print(Text(f"{backbone_line(result.backbones)}. 95 % intervals.", style="dim"))
        console.print(Text(WARNING, style="dim"))
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    print(f"\nnumbers  {result.path}\ntable    {result.path.with_suffix('.md')}\nsheet    {result.page}")


def _pairs(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, noun = text.partition("=")
        if not equals or not name.strip() or not noun.strip():
            raise usage(f"--nouns {text}: write NAME=NOUN, such as rex=dog")
        found[name.strip()] = noun.strip()
    return found
