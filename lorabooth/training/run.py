"""One run from recipe to adapter: the phases in order, each timed, each resumable.

photos -> base -> class images -> caches -> adapter -> steps -> samples
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from lorabooth.adapters import file as adapter_file
from lorabooth.adapters import inject
from lorabooth.adapters.metadata import Metadata
from lorabooth.data import images as data_images
from lorabooth.data.cache import Store, default_root
from lorabooth.errors import RecipeError
from lorabooth.families.reload import with_vae
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import folder as folders
from lorabooth.training import state
from lorabooth.training.caching import cache_and_release
from lorabooth.training.class_images import class_examples
from lorabooth.training.compose import ADAPTER_NAME, attach, compose, targets_of
from lorabooth.training.facts import Ledger
from lorabooth.training.folder import RunFolder
from lorabooth.training.lock import RunLock
from lorabooth.training.log import MetricsLog
from lorabooth.training.log import read as read_metrics
from lorabooth.training.loop import Hooks, Session, run_steps
from lorabooth.training.plan import Plan, TrainedPart, choices_text
from lorabooth.training.previews import Previews
from lorabooth.training.setting import Clock, Setting, open_setting, part_facts, summary_lines
from lorabooth.training.studio import Studio
from lorabooth.training.subjects import preview_prompts
from lorabooth.version import __version__


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        folder: of the run.
        recipe: effective, without "auto".
        steps: optimizer steps that the adapter was trained for.
        final_loss: of the last step; NaN if there is none.
        resumed_from: step that this call went on from; 0 for a new run.
        finished_before: nothing was left to do.
        grid: the last sample grid, if any was drawn.
    """

    folder: RunFolder
    recipe: Recipe
    steps: int
    final_loss: float
    resumed_from: int
    finished_before: bool
    grid: Path | None


def plan_run(recipe: Recipe, *, out: Path | None, reporter: Reporter) -> Plan:
    """Everything up to the first write: photos checked, base loaded, adapter attached, counted.

    Raises:
        LoraboothError: what `train` would refuse before training.
    """
    setting = open_setting(recipe, Clock(), reporter)
    place = _out_of(out, setting.recipe)
    attached = inject.attach(
        setting.parts.components(), targets_of(setting.family, setting.recipe), seed=setting.recipe.run.seed
    )
    optim, adapter = setting.recipe.optim, setting.recipe.adapter
    trained = []
    for component in attached.components:
        is_text = component != "denoiser"
        modules = [name for name in attached.modules if name.startswith(f"{component}.")]
        rank = int(adapter.text_encoder_rank if is_text else adapter.rank)
        trained.append(
            TrainedPart(
                component=component,
                modules=len(modules),
                rank=rank,
                alpha=float(adapter.alpha) / int(adapter.rank) * rank,
                lr=float(optim.text_encoder_lr if is_text else optim.lr),
                parameters=sum(weight.numel() for weight in attached.parameters(component)),
            )
        )
    inject.detach(setting.parts.components())
    n_step = optim.batch_size * optim.accumulate
    return Plan(
        recipe=setting.recipe,
        choices=setting.choices,
        parts=part_facts(setting.parts),
        trained=trained,
        photos=setting.photos.summary(),
        examples=(n_step, 0 if setting.recipe.prior.mode == "none" else n_step),
        device=str(setting.device),
        out=str(place),
    )


def run(
    recipe: Recipe, *, out: Path | None, studio: Studio, reporter: Reporter, fresh: bool = False
) -> Outcome:
    """Train, or go on with an unfinished run of the same recipe.

    Args:
        recipe: what to learn; "auto" is resolved here.
        out: run folder; None takes the recipe's, or runs/NOUN-TOKEN.
        studio: draws images.
        reporter: hears of everything.
        fresh: start over in a new folder beside one that is taken.

    Raises:
        LoraboothError: see errors.py; the state that was reached is on disk.
    """
    clock = Clock()
    setting = open_setting(recipe, clock, reporter)
    place = _out_of(out, setting.recipe)
    place = folders.fresh_beside(place) if fresh else place
    folder = folders.claim(place, setting.recipe)
    for line in summary_lines(setting):
        reporter.say(line)
    if setting.choices:
        reporter.say('chosen for "auto":\n' + choices_text(setting.choices))
    accelerator = _accelerator(setting, folder)
    with RunLock(folder.root) if accelerator.is_main_process else nullcontext():
        return _locked_run(setting, folder, accelerator, studio, clock, reporter)


def _locked_run(
    setting: Setting,
    folder: RunFolder,
    accelerator: Accelerator,
    studio: Studio,
    clock: Clock,
    reporter: Reporter,
) -> Outcome:
    recipe = setting.recipe
    total = int(recipe.optim.steps)
    checkpoint = state.newest(folder.root, reporter)
    if folder.is_finished() and checkpoint is not None and checkpoint.step >= total:
        reporter.say(f"{folder.root} is done already: {checkpoint.step} steps. Nothing was changed.")
        return _outcome(folder, recipe, checkpoint.step, checkpoint.step, finished_before=True)
    if checkpoint is not None and checkpoint.step > total:
        raise RecipeError(
            f"optim.steps is {total}, but {folder.root} has {checkpoint.step} steps already.",
            "Give as many or more, or --fresh to start beside it.",
        )
    ledger = Ledger(folder, setting, clock)
    if accelerator.is_main_process:
        folders.write_recipe(folder, recipe)
        ledger.write("running")
    store = Store(default_root())
    with clock.phase("class images"), accelerator.main_process_first():
        classes = class_examples(setting, studio, store, reporter)
    ledger.note("class_images", dict(classes.facts))
    with clock.phase("caching"), accelerator.main_process_first():
        examples, encoded = cache_and_release(setting, classes.records, store, reporter)
    attached = attach(setting, accelerator.device, reporter)
    ledger.note("adapter", {"modules": attached.n_modules, "parameters": attached.n_parameters})
    session = compose(setting, examples, attached, accelerator=accelerator, reporter=reporter)
    start = _restore(checkpoint, setting, session) if checkpoint is not None else 0
    if start:
        reporter.say(f"going on from step {start} of {total}")
    metrics = MetricsLog(folder.metrics)
    if accelerator.is_main_process:
        metrics.truncate_after(start)
    previews = _previews(setting, studio, encoded, folder, reporter)
    grid = _train(setting, folder, session, metrics, previews, ledger, start, reporter)
    if accelerator.is_main_process:
        ledger.write("finished")
    accelerator.end_training()
    return replace(_outcome(folder, recipe, total, start, finished_before=False), grid=grid)


def _train(
    setting: Setting,
    folder: RunFolder,
    session: Session,
    metrics: MetricsLog,
    previews: Previews | None,
    ledger: Ledger,
    start: int,
    reporter: Reporter,
) -> Path | None:
    """The steps, with samples before, between and after; the adapter is saved last."""
    recipe, clock = setting.recipe, ledger.clock
    total = int(recipe.optim.steps)
    components = setting.parts.components()
    metadata = _metadata(setting)

    def write_adapter(path: Path, steps: int) -> None:
        adapter_file.write(path, inject.tensors(components, ADAPTER_NAME), replace(metadata, steps=steps))

    def save(step: int) -> None:
        if session.accelerator.is_main_process:
            with clock.phase("checkpoints"):
                state.save(
                    folder.root,
                    step=step,
                    adapter_writer=lambda path: write_adapter(path, step),
                    optimizer=session.optimizer,
                    facts={"scaler": session.scaler.state_dict()},
                )
                state.rotate(folder.root, recipe.run.keep)
        session.accelerator.wait_for_everyone()

    def draw(step: int, *, adapter: bool = True) -> Path | None:
        if previews is None or not session.accelerator.is_main_process:
            return None
        with clock.phase("samples"):
            return previews.draw(step, adapter=adapter)

    if not (folder.samples / "before" / "grid.png").is_file():
        draw(0, adapter=False)
    hooks = Hooks(
        checkpoint=save,
        preview=draw,
        checkpoint_every=recipe.run.checkpoint_every,
        preview_every=recipe.run.sample_every,
    )
    with clock.phase("training"):
        log = run_steps(session, hooks, metrics, start=start, stop=total, reporter=reporter)
    ledger.note("warnings", log.warnings)
    if session.accelerator.is_main_process:
        write_adapter(folder.adapter, total)
    return draw(total)


def _restore(checkpoint: state.Checkpoint, setting: Setting, session: Session) -> int:
    """Adapter, optimizer and grad scaler of a checkpoint; returns its step."""
    saved = adapter_file.read(checkpoint.adapter)
    inject.write(setting.parts.components(), ADAPTER_NAME, saved.tensors)
    session.scaler.load_state_dict(dict(checkpoint.facts.get("scaler", {})))
    return state.restore(checkpoint, session.optimizer)


def _previews(
    setting: Setting,
    studio: Studio,
    encoded: dict[str, torch.Tensor] | None,
    folder: RunFolder,
    reporter: Reporter,
) -> Previews | None:
    recipe = setting.recipe
    if recipe.run.sample_count == 0:
        return None
    components = setting.parts.components()
    multiple_px = setting.family.resolution_multiple_px(setting.parts)
    return Previews(
        family=setting.family,
        complete=lambda: with_vae(setting.family, setting.parts, setting.device),
        studio=studio,
        prompts=preview_prompts(recipe, setting.subjects),
        seeds=range(recipe.run.sample_count),
        steps=int(recipe.prior.sampler_steps),
        guidance=float(recipe.prior.guidance),
        side_px=data_images.square_for(int(recipe.images.resolution), multiple_px)[0],
        encoded=encoded,
        folder=folder,
        adapter_off=lambda: inject.disabled(components),
        reporter=reporter,
    )


def _metadata(setting: Setting) -> Metadata:
    recipe, source = setting.recipe, setting.parts.source
    return Metadata(
        family=source.family,
        base_id=source.base_id,
        base_sha256=source.sha256,
        rank=int(recipe.adapter.rank),
        alpha=float(recipe.adapter.alpha),
        targets=recipe.adapter.targets,
        trigger_words=tuple(subject.name for subject in setting.subjects),
        steps=0,
        lorabooth_version=__version__,
    )


def _accelerator(setting: Setting, folder: RunFolder) -> Accelerator:
    tracker = setting.recipe.run.tracker
    if tracker == "none":
        return Accelerator()
    accelerator = Accelerator(log_with=tracker, project_dir=str(folder.root))
    accelerator.init_trackers("lorabooth", init_kwargs={"wandb": {"name": folder.root.name}})
    return accelerator


def _out_of(out: Path | None, recipe: Recipe) -> Path:
    if out is not None:
        return out
    return folders.default_out(recipe) if recipe.run.out == "auto" else Path(recipe.run.out)


def _outcome(
    folder: RunFolder, recipe: Recipe, steps: int, resumed_from: int, *, finished_before: bool
) -> Outcome:
    lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    loss = lines[-1]["loss"] if lines else None
    grid = folder.step_samples(steps) / "grid.png"
    return Outcome(
        folder=folder,
        recipe=recipe,
        steps=steps,
        final_loss=float("nan") if loss is None else float(loss),
        resumed_from=resumed_from,
        finished_before=finished_before,
        grid=grid if grid.is_file() else None,
    )
