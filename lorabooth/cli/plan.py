"""`lorabooth plan`: will it fit?"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorabooth.cli.errors import command

if TYPE_CHECKING:
    from lorabooth.planning.memory_plan import MemoryPlan
    from lorabooth.planning.show import Line

_STYLES = {"title": "bold", "dim": "dim", "peak": "bold yellow", "good": "bold green", "bad": "bold red"}
_NARROWEST, _WIDEST = 60, 120


@command
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a recipe key: images.resolution=448."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a card that need not be here: 8GiB.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A device of this machine: cpu, or the number of a GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say whether a run fits, what would make it fit, and what that costs. Reads no weights; needs no GPU.

    lorabooth plan recipes/sd15-subject.toml --vram 8GiB

    Without --vram or --device it plans for where the run would go. Techniques that the recipe gives are kept;
    memory = "auto" in the recipe lets `lorabooth train` take the ones that are chosen here.
    """
    from lorabooth import api
    from lorabooth.cli.console import reporter_for
    from lorabooth.errors import OutOfMemoryError
    from lorabooth.planning.show import too_little_text
    from lorabooth.recipe import load

    wanted = load(recipe, overrides or [])
    made = api.plan(wanted, vram=vram, device=device, reporter=reporter_for(quiet=as_json))
    if as_json:
        print(json.dumps(_as_json(made), indent=2))
    else:
        _print(made)
    if not made.fits:
        raise OutOfMemoryError(*too_little_text(made))


def _as_json(made: MemoryPlan) -> dict[str, Any]:
    from lorabooth.planning.title import missing_photos

    return {**made.as_json(), "missing_photos": missing_photos(made.recipe)}


def _print(made: MemoryPlan) -> None:
    """Coloured on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.text import Text

    from lorabooth.planning.show import plan_lines
    from lorabooth.planning.title import missing_photos, title

    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((100, 24)).columns))
    lines: Sequence[Line] = plan_lines(
        made, title(made.forecast.recipe, made.source), width=width, blocks=_can_draw()
    )
    # A failed plan ends with the error itself.
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for line in lines:
        console.print(Text(line.text, style=_STYLES.get(line.look, "")))
    for folder in missing_photos(made.recipe):
        console.print(Text(f"photos: {folder} is not there yet; a plan does not need them", style="dim"))


def _can_draw() -> bool:
    """Whether stdout can hold block characters."""
    try:
        "█▏◀·".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
