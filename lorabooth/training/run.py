"""One run from recipe to adapter: the phases in order, each timed, each resumable.

photos -> base -> class images -> caches -> adapter -> steps -> samples
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lorabooth.data.cache import Store, default_root
from lorabooth.errors import InterruptedRunError
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe import Recipe
from lorabooth.training import equipment, going_on, space, state
from lorabooth.training import folder as folders
from lorabooth.training import identity as identities
from lorabooth.training import pool as pools
from lorabooth.training import selection as selections
from lorabooth.training.alarms import Watch
from lorabooth.training.caching import cache_and_release
from lorabooth.training.class_images import class_examples
from lorabooth.training.compose import attach, compose
from lorabooth.training.facts import Ledger
from lorabooth.training.folder import RunFolder
from lorabooth.training.going_on import Standing
from lorabooth.training.identity import Identity
from lorabooth.training.log import MetricsLog
from lorabooth.training.log import read as read_metrics
from lorabooth.training.plan import choices_text
from lorabooth.training.planned import Planned, miss_texts
from lorabooth.training.processes import process_state
from lorabooth.training.ran_out import RanOutError, Shortage, detail_of, forecast_phase, is_shortage
from lorabooth.training.setting import Clock, Setting, open_setting, summary_lines
from lorabooth.training.speed import speed_facts
from lorabooth.training.studio import Referee, Studio
from lorabooth.training.validation import validation_of
from lorabooth.training.work import Work, rotate


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        folder: of the run.
        recipe: effective, without "auto".
        steps: optimizer steps of the run.
        chosen: step of the checkpoint that the adapter is of; the last one, unless run.select says otherwise.
        final_loss: of the last step; NaN if there is none.
        resumed_from: step that this call went on from; 0 for a new run.
        finished_before: nothing was left to do.
        grid: the last sample grid, if any was drawn.
    """

    folder: RunFolder
    recipe: Recipe
    steps: int
    chosen: int
    final_loss: float
    resumed_from: int
    finished_before: bool
    grid: Path | None


def run(
    recipe: Recipe,
    *,
    out: Path | None,
    studio: Studio,
    reporter: Reporter,
    fresh: bool = False,
    planned: Planned | None = None,
) -> Outcome:
    """Train, or go on with an unfinished run of the same recipe.

    Args:
        recipe: what to learn; "auto" is resolved here.
        out: run folder; None takes the recipe's, or runs/NOUN-TOKEN.
        studio: draws images.
        reporter: hears of everything.
        fresh: start over in a new folder beside one that is taken.
        planned: what was predicted of its memory, to be held against what it takes.

    Raises:
        RanOutError: memory ran out; it says where.
        LoraboothError: see errors.py; the state that was reached is on disk.
    """
    clock = Clock()
    setting = open_setting(recipe, clock, reporter)
    identity = identities.of(setting)
    folder = folders.check(folders.out_of(out, setting.recipe, fresh=fresh), setting.recipe, identity)
    folders.check_writable(folder.root)
    for line in summary_lines(setting):
        reporter.say(line)
    if setting.choices:
        reporter.say('chosen for "auto":\n' + choices_text(setting.choices))
    is_main = process_state().is_main_process
    with folders.held(folder) if is_main else nullcontext():
        # Once more: another process may have been faster.
        folders.check(folder.root, setting.recipe, identity)
        if is_main:
            folders.sweep(folder)
            state.sweep(folder.root)
        standing = going_on.find(folder, setting.recipe, reporter)
        going_on.tell(standing, reporter)
        if standing.finished:
            return _left_alone(standing, setting.recipe, reporter)
        referee = selections.open_referee(setting.recipe, studio)
        ledger = Ledger(folder, setting, clock, folders.read_json(folder.facts), planned)
        if is_main:
            _begin(standing, setting.recipe, identity, ledger, reporter)
            # Killed after its last save and before this, a run would keep one checkpoint too many for good.
            rotate(folder, setting.recipe, reporter)
        with _ends_told(ledger, is_main=is_main):
            outcome = _run_phases(standing, setting, ledger, studio, referee, reporter)
        for miss in miss_texts(planned, clock):
            reporter.warn(f"memory: {miss}")
        return outcome


def _left_alone(standing: Standing, recipe: Recipe, reporter: Reporter) -> Outcome:
    """A finished run: only an adapter that is gone is written again."""
    folder, checkpoint = standing.folder, standing.checkpoint
    chosen = selections.chosen_in(folder, standing.steps)
    if checkpoint is not None and not folder.adapter.is_file():
        whole = checkpoint if chosen == standing.steps else state.at(folder.root, chosen) or checkpoint
        going_on.deliver(whole, folder)
        which = "the last checkpoint" if whole is checkpoint else f"the checkpoint of step {chosen}"
        reporter.say(f"{folder.adapter.name} was gone and is written again, from {which}.")
    else:
        reporter.say("Nothing was changed.")
    return _outcome(folder, recipe, standing.steps, chosen, standing.steps, finished_before=True)


def _begin(
    standing: Standing, recipe: Recipe, identity: Identity, ledger: Ledger, reporter: Reporter
) -> None:
    """The run's own recipe and identity are the first that is written: they make the folder this run's."""
    folder = standing.folder
    for line in folders.changed_keys(folder, recipe):
        reporter.say(f"changed since the run began: {line}")
    if standing.steps and identities.parse(folders.read_json(folder.identity)) is None:
        reporter.warn(
            f"{folder.root} does not say which photos and which base it was trained on; they are taken to be "
            "those that are there now"
        )
    folders.write_recipe(folder, recipe)
    folders.write_json(folder.identity, identity.to_json())
    ledger.note("resumed_from", [*ledger.before.get("resumed_from", []), *filter(None, [standing.steps])])
    ledger.write("running")


@contextmanager
def _ends_told(ledger: Ledger, *, is_main: bool) -> Iterator[None]:
    """However the run ends is written to run.json; an interrupt becomes a message that says how to go on."""
    again = f"To go on: {going_on.command(ledger.folder)}"
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | InterruptedRunError)
        if is_main:
            ledger.write_if_possible("interrupted" if interrupted else "failed")
        if isinstance(error, InterruptedRunError):
            raise InterruptedRunError(error.what, f"It goes on from here. {again}") from None
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                "interrupted at once; what is finished (class images, encoded photos, checkpoints) is kept.",
                again,
            ) from None
        if is_shortage(error):
            raise RanOutError(_shortage(ledger, error)) from None
        raise
    if is_main:
        ledger.write("finished")


def _shortage(ledger: Ledger, error: BaseException) -> Shortage:
    """What ran out where, without holding on to anything."""
    setting, failed = ledger.setting, ledger.clock.failed
    return Shortage(
        phase=forecast_phase(failed[0] if failed else ""),
        steps=going_on.find(ledger.folder, setting.recipe, Silent()).steps,
        recipe=setting.recipe,
        source=setting.parts.source,
        device=setting.device,
        folder=ledger.folder,
        detail=detail_of(error),
        alone=process_state().num_processes == 1,
    )


def _run_phases(
    standing: Standing,
    setting: Setting,
    ledger: Ledger,
    studio: Studio,
    referee: Referee | None,
    reporter: Reporter,
) -> Outcome:
    recipe, folder, clock, start = setting.recipe, standing.folder, ledger.clock, standing.steps
    accelerator = equipment.accelerator_of(setting, folder)
    store = Store(default_root())
    with clock.phase("class images"), accelerator.main_process_first():
        classes = class_examples(setting, studio, store, reporter)
    ledger.note("class_images", dict(classes.facts))
    with clock.phase("caching"), accelerator.main_process_first():
        examples, encoded = cache_and_release(setting, classes.records, store, reporter)
    with clock.phase("setting up"):
        attached = attach(setting, accelerator.device, reporter)
    ledger.note("adapter", {"modules": attached.n_modules, "parameters": attached.n_parameters})
    timed = clock.phase("pool") if any(pools.sizes(recipe)) else nullcontext()
    with timed, accelerator.main_process_first():
        pool = pools.prepare(
            setting,
            examples,
            device=accelerator.device,
            world=accelerator.num_processes,
            store=store,
            reporter=reporter,
        )
    ledger.note("pool", dict(pool.facts))
    ledger.note("hollow", pools.hollow_out(setting, attached, reporter))
    with clock.phase("setting up"):
        session = compose(setting, examples, attached, accelerator=accelerator, reporter=reporter, pool=pool)
    ledger.note("precision", going_on.precision_name(session))
    watch = Watch()
    if standing.checkpoint is not None:
        watch = going_on.restore(standing.checkpoint, setting, session, reporter)
    metrics = MetricsLog(folder.metrics)
    if accelerator.is_main_process:
        metrics.truncate_after(start)
    easel = equipment.easel_of(setting, studio, encoded, reporter)
    previews = equipment.previews_of(setting, easel, folder)
    validation = validation_of(setting, examples, session)
    if validation is not None:
        ledger.note("validation", validation.facts())
    space.require(folder.root, equipment.amounts_of(recipe, session, attached.n_parameters, previews))
    work = Work(
        standing,
        setting,
        session,
        metrics,
        ledger,
        watch,
        reporter,
        previews=previews,
        selection=equipment.selection_of(setting, easel, folder, referee, start=start),
        validation=validation,
    )
    try:
        result = work.do()
    finally:
        ledger.note("warnings", watch.warnings)
        ledger.note("speed", speed_facts(session))
    accelerator.end_training()
    outcome = _outcome(folder, recipe, result.steps, result.chosen, start, finished_before=False)
    return replace(outcome, grid=result.grid)


def _outcome(
    folder: RunFolder, recipe: Recipe, steps: int, chosen: int, resumed_from: int, *, finished_before: bool
) -> Outcome:
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    loss = lines[-1]["loss"] if lines else None
    grid = going_on.grid_of(folder, chosen)
    return Outcome(
        folder=folder,
        recipe=recipe,
        steps=steps,
        chosen=chosen,
        final_loss=float("nan") if loss is None else float(loss),
        resumed_from=resumed_from,
        finished_before=finished_before,
        grid=grid if grid.is_file() else None,
    )
