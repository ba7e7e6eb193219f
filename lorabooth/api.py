"""The public functions: they join training and evaluation, which do not know each other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch

from lorabooth.errors import RecipeError
from lorabooth.evaluation.generate import generate
from lorabooth.evaluation.grids import draw_grid
from lorabooth.evaluation.sample import file_name
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe import Recipe
from lorabooth.run_report import write_run_report
from lorabooth.training.dry_run import plan_run
from lorabooth.training.plan import Plan
from lorabooth.training.planned import Planned
from lorabooth.training.processes import process_state, together
from lorabooth.training.ran_out import RanOutError
from lorabooth.training.run import Outcome, run
from lorabooth.training.studio import Marks, Referee, Shot, Studio

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorabooth.planning.memory_plan import MemoryPlan


@dataclass(frozen=True)
class RunResult:
    """What training gave.

    Attributes:
        out: the run folder.
        adapter: the adapter file.
        report: the page that shows the run.
        steps: optimizer steps of the run.
        chosen: steps that the adapter was trained for: the last one, unless run.select says otherwise.
        final_loss: of the last step.
        resumed_from: step that this call went on from; 0 for a new run.
        finished_before: nothing was left to do.
        recipe: effective, without "auto".
        grid: the last grid of samples, if any.
    """

    out: Path
    adapter: Path
    report: Path
    steps: int
    chosen: int
    final_loss: float
    resumed_from: int
    finished_before: bool
    recipe: Recipe
    grid: Path | None


@overload
def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    dry_run: Literal[False] = False,
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> RunResult: ...


@overload
def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    dry_run: Literal[True],
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> Plan: ...


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> RunResult | Plan:
    """Learn the subjects of a recipe.

    Args:
        recipe: what to learn, on which base, how.
        out: run folder; None takes the recipe's `run.out`, or runs/NOUN-TOKEN. An unfinished run of the same
            recipe in it goes on; a finished one is left as it is.
        dry_run: check photos, base and run folder, count what would train, write nothing.
        fresh: start over in a new folder beside one that is taken.
        reporter: hears of progress; silent by default.

    Returns:
        What the run left behind; the plan for a dry run.

    Raises:
        LoraboothError: one of errors.py; its message says what, where and what to do.
    """
    # Of several processes one speaks and writes.
    is_main = process_state().is_main_process
    say = reporter if reporter is not None and is_main else Silent()
    planned: Planned | None = None
    if recipe.memory.fit:
        from lorabooth.planning.fit import fitted  # here, because most runs need no prediction

        recipe, planned = together(partial(fitted, recipe, out=out, fresh=fresh, reporter=say))
    if dry_run:
        if recipe.run.select != "last":
            referee(recipe, say)
        return plan_run(recipe, out=out, reporter=say, fresh=fresh)
    outcome = _run(recipe, out=out, reporter=say, fresh=fresh, planned=planned)
    folder = outcome.folder
    if is_main and not (outcome.finished_before and folder.report.is_file()):
        write_run_report(folder, outcome.recipe, outcome.steps)
    return RunResult(
        out=folder.root,
        adapter=folder.adapter,
        report=folder.report,
        steps=outcome.steps,
        chosen=outcome.chosen,
        final_loss=outcome.final_loss,
        resumed_from=outcome.resumed_from,
        finished_before=outcome.finished_before,
        recipe=outcome.recipe,
        grid=outcome.grid,
    )


def _run(
    recipe: Recipe, *, out: Path | None, reporter: Reporter, fresh: bool, planned: Planned | None
) -> Outcome:
    """Run; where memory runs out, say what to try, or (memory.on_oom) go on with it.

    Raises:
        OutOfMemoryError: names the phase, the numbers and the next technique.
    """
    studio = Studio(
        generate=generate,
        draw_grid=draw_grid,
        file_name=file_name,
        referee=partial(referee, reporter=reporter),
    )
    while True:
        try:
            return run(recipe, out=out, studio=studio, reporter=reporter, fresh=fresh, planned=planned)
        except RanOutError as error:
            shortage = error.shortage
        # Only here, with the exception and its frames, is the failed run's memory free.
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        from lorabooth.planning.after import explained, stepped_down

        if shortage.recipe.memory.on_oom == "stop":
            raise explained(shortage)
        recipe, planned, told = stepped_down(shortage, planned)
        reporter.warn(told)
        # The same run goes on, wherever it was.
        out, fresh = shortage.folder.root, False


def referee(recipe: Recipe, reporter: Reporter) -> Referee:
    """What measures a run's checkpoints, on the CPU: the training device's memory is not its own.

    Raises:
        RecipeError: a backbone that run.select needs cannot be had: says how to get it, and what would do
            without it.
    """
    from lorabooth.evaluation.backbones import open_backbones
    from lorabooth.evaluation.scoring import Drawn, score

    wanted, keys = recipe.run.select, recipe.evaluation
    found = open_backbones(keys.dino, keys.clip, base=recipe.model.base, device="cpu", reporter=reporter)
    found = replace(found, distance=None)
    there = {"dino": found.subject is not None, "clip": found.clip is not None}
    needed = {"balanced": ("dino", "clip"), "subject": ("dino",), "prompt": ("clip",)}[wanted]
    missing = [key for key in needed if not there[key]]
    if missing:
        why = [
            f"  {note}" for note in found.notes if note.startswith(tuple(f"evaluation.{k}:" for k in missing))
        ]
        what = f'run.select = "{wanted}" cannot measure checkpoints, and nothing was trained:'
        alone = {"dino": '"subject" (DINO alone)', "clip": '"prompt" (CLIP-T alone)'}
        rest = "".join(f", or to {alone[key]}" for key in needed if there[key])
        raise RecipeError("\n".join([what, *why]), f'Or set run.select to "last"{rest}.')

    def marks(photos: Sequence[Image], shots: Sequence[Shot], images: Sequence[Image]) -> Marks:
        drawn = [
            Drawn(shot.prompt, shot.seed, image, shot.caption)
            for shot, image in zip(shots, images, strict=True)
        ]
        row = score(found, photos=photos, images=drawn)
        dino, clip_t = (None if one is None else one.mean for one in (row.dino, row.clip_t))
        return Marks(dino, clip_t)

    names = found.names()
    return Referee({"dino": names["dino"], "clip": names["clip"]}, marks)


def plan(
    recipe: Recipe,
    *,
    vram: str | None = None,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> MemoryPlan:
    """What a run would need, and which techniques make it fit, from the base's configs alone.

    Args:
        recipe: keys of [memory] that it gives are kept.
        vram: memory of a CUDA card that need not be here: "8GiB". None plans for `device`.
        device: "cpu", or the number of a GPU of this machine; None is where a run would go.
        reporter: hears of downloads (of configs).

    Raises:
        RecipeError: both `vram` and `device` are given, or one of them makes no sense.
        BaseModelError: the base's configs cannot be had.
    """
    from lorabooth.planning.fit import plan_for

    return plan_for(recipe, vram=vram, device=device, reporter=reporter or Silent())
