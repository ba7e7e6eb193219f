"""`lorabooth check`: whether an adapter is sound, and fits a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from lorabooth.adapters.check import CheckReport


@command
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter: a file or a folder.")],
    base: Annotated[
        str | None,
        typer.Option(help='Base it should fit: "pocket", a diffusers folder, a .safetensors file, a hub id.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Read every number of an adapter, and hold its layers against a base.

    Exit code 0: sound; 5: the adapter is broken or does not fit; 4: the base cannot be read.

    lorabooth check dog.safetensors --base pocket
    """
    from lorabooth import exchange

    report = exchange.check(file, base, reporter=reporter_for(quiet=quiet or as_json))
    print(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report))
    if not report.sound:
        raise AdapterError(problems_text(report))


def report_text(report: CheckReport) -> str:
    """What was found, without the problems: those are an error's text."""
    kind = report.kind or "file of no known kind"
    head = f"{report.name}: {kind}" + (f" for {report.family}" if report.family else "")
    counts = f"{_plural(report.modules, 'module')}, {_plural(report.tensors, 'tensor')} read"
    lines = [f"{head}, {counts}" if report.tensors else head]
    if report.base:
        named = f"{report.base} ({report.base_family})" if report.base_family else report.base
        lines.append(f"base: {named}, {report.matched:,} of {report.modules:,} modules fit")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"warning: {warning.message}" for warning in report.warnings]
    if report.sound:
        lines.append("sound")
    return "\n".join(lines)


def problems_text(report: CheckReport) -> str:
    """The problems as one message."""
    if len(report.problems) == 1:
        return f"{report.name}: {report.problems[0].message}"
    lines = [f"  {problem.message}" for problem in report.problems]
    return "\n".join([f"{report.name} has {len(lines)} problems:", *lines])


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
