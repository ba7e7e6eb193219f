"""The public functions: they join training and evaluation, which do not know each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from lorabooth.evaluation.generate import generate
from lorabooth.evaluation.grids import draw_grid
from lorabooth.evaluation.sample import file_name
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe import Recipe
from lorabooth.run_report import write_run_report
from lorabooth.training.dry_run import plan_run
from lorabooth.training.plan import Plan
from lorabooth.training.processes import process_state
from lorabooth.training.run import run
from lorabooth.training.studio import Studio


@dataclass(frozen=True)
class RunResult:
    """What training gave.

    Attributes:
        out: the run folder.
        adapter: the adapter file.
        report: the page that shows the run.
        steps: optimizer steps that the adapter was trained for.
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
    if dry_run:
        return plan_run(recipe, out=out, reporter=say, fresh=fresh)
    studio = Studio(generate=generate, draw_grid=draw_grid, file_name=file_name)
    outcome = run(recipe, out=out, studio=studio, reporter=say, fresh=fresh)
    folder = outcome.folder
    if is_main and not (outcome.finished_before and folder.report.is_file()):
        write_run_report(folder, outcome.recipe, outcome.steps)
    return RunResult(
        out=folder.root,
        adapter=folder.adapter,
        report=folder.report,
        steps=outcome.steps,
        final_loss=outcome.final_loss,
        resumed_from=outcome.resumed_from,
        finished_before=outcome.finished_before,
        recipe=outcome.recipe,
        grid=outcome.grid,
    )
