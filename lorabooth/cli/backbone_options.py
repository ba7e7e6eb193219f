"""The options that say what results are measured with, the same for one run and for many subjects."""

from __future__ import annotations

from typing import Annotated

import typer

Dino = Annotated[
    str | None, typer.Option(help="What measures DINO and PRES: a hub id, a folder, pocket or auto.")
]
Clip = Annotated[str | None, typer.Option(help="What measures CLIP-I and CLIP-T, likewise.")]
Lpips = Annotated[str | None, typer.Option(help="What measures DIV and drift: LPIPS weights, or auto.")]
