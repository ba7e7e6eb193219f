"""The command `lorabooth`. Commands import torch and pydantic only when they run: `--help` is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lorabooth.cli import (
    blend,
    check,
    convert,
    demo,
    doctor,
    evaluate,
    extract,
    inspect,
    merge,
    plan,
    pocket,
    resize,
    sample,
    train,
)
from lorabooth.cli.errors import DEBUG_VARIABLE, report_defect

app = typer.Typer(
    name="lorabooth",
    help="Learn one subject from 3-5 photos into a small adapter, with prior preservation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("sample")(sample.sample)
app.command("inspect")(inspect.inspect)
app.command("check")(check.check)
app.command("convert")(convert.convert)
app.command("merge")(merge.merge)
app.command("blend")(blend.blend)
app.command("resize")(resize.resize)
app.command("extract")(extract.extract)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(pocket.app, name="pocket")


def _print_version(wanted: bool) -> None:
    if wanted:
        from lorabooth.version import __version__

        print(f"lorabooth {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Learn one subject from 3-5 photos into a small adapter, with prior preservation."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def main() -> None:
    """Run the command line; exits the process.

    Exit codes: 0; 2 recipe or usage; 3 data; 4 base model; 5 adapter; 6 memory; 7 training; 130 interrupted,
    can be resumed; 1 a defect.
    """
    for stream in (sys.stdout, sys.stderr):
        # A Windows console or a POSIX locale must not turn a photo's name into an exception.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = report_defect
    # Calling `app` itself would put Typer's own excepthook in the place of ours.
    typer.main.get_command(app)(prog_name="lorabooth")
