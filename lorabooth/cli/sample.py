"""`lorabooth sample`: images and a labelled grid from a base, adapters, prompts and seeds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from lorabooth.cli.console import reporter_for
from lorabooth.cli.errors import command, usage
from lorabooth.errors import AdapterError

Dtype = Literal["auto", "fp32", "bf16", "fp16"]


@command
def sample(
    base: Annotated[
        str, typer.Option(help='Base model: "pocket", a diffusers folder, a .safetensors file, a hub id.')
    ],
    prompts: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="FILE[:STRENGTH]", help="An adapter file; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds: 0,1,2 or 0-3.")] = "0",
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=50, help="Guidance scale.")] = None,
    strengths: Annotated[
        str | None, typer.Option(help="A sweep: every image at each of these strengths, such as 0,0.5,1.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors and the result.")] = False,
) -> None:
    """Draw prompts with or without adapters.

    lorabooth sample --base pocket --adapter a.safetensors --prompt "a qzx mug on a beach" --out samples
    """
    wanted_seeds = parse_seeds(seeds)
    sweep = None if strengths is None else parse_numbers(strengths, "--strengths")
    if sweep is not None and not adapters:
        raise usage("--strengths needs an --adapter")
    files = [parse_adapter(text) for text in adapters or []]
    if missing := [str(path) for path, _ in files if not path.exists()]:
        raise AdapterError(f"there is no adapter file {', '.join(missing)}", "Check --adapter.")

    from lorabooth.families.quiet import quiet_libraries

    with quiet_libraries():
        from lorabooth.evaluation.sample import sample as draw

    result = draw(
        base,
        files,
        prompts,
        wanted_seeds,
        out=out,
        steps=steps,
        guidance=guidance,
        strengths=sweep,
        device=device,
        dtype=dtype,
        reporter=reporter_for(quiet=quiet),
    )
    count = len(result.paths)
    print(f"{count} image{'s' * (count != 1)} in {out}\ngrid     {result.grid_path}")


def parse_adapter(text: str) -> tuple[Path, float]:
    """Read FILE or FILE:STRENGTH; a file whose own name ends so, or a drive letter, is no strength."""
    head, colon, tail = text.rpartition(":")
    if not colon or not head or Path(text).is_file():
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise usage(f"--adapter {text}: the strength must be a finite number")
    return Path(head), strength


def parse_seeds(text: str) -> list[int]:
    """Read "0,1,2", "0-3" or "0-2,7"; at most 10,000 seeds, none twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise usage(f"--seeds {text}: write whole numbers, such as 0,1,2 or 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 10_000:
            raise usage(
                f"--seeds {part.strip()}: the range goes from a smaller to a larger number, 10,000 at most"
            )
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise usage(f"--seeds {text}: a seed is there twice")
    return seeds


def parse_numbers(text: str, option: str) -> list[float]:
    """Read "0,0.5,1"."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise usage(f"{option} {text}: write numbers with commas, such as 0,0.5,1") from None
    if not all(map(math.isfinite, numbers)):
        raise usage(f"{option} {text}: the numbers must be finite")
    return numbers
