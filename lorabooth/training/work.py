"""The steps of a run and what happens between them: checkpoints, measuring them, samples; the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lorabooth.adapters import file as adapter_file
from lorabooth.adapters import inject
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import equipment, going_on, state
from lorabooth.training import selection as selections
from lorabooth.training.alarms import Watch
from lorabooth.training.compose import ADAPTER_NAME
from lorabooth.training.eta import Eta
from lorabooth.training.facts import Ledger
from lorabooth.training.folder import RunFolder
from lorabooth.training.going_on import Standing
from lorabooth.training.log import MetricsLog
from lorabooth.training.loop import Hooks, Session, run_steps
from lorabooth.training.previews import Previews
from lorabooth.training.selection import Selection
from lorabooth.training.setting import Setting
from lorabooth.training.validation import Validation


@dataclass(frozen=True, slots=True)
class Result:
    """What the steps led to.

    Attributes:
        steps: of the run; fewer than wanted if it ended early.
        chosen: step of the checkpoint that was delivered (in the main process).
        grid: of its samples.
    """

    steps: int
    chosen: int
    grid: Path | None


@dataclass(frozen=True)
class Work:
    """What is needed for the steps of one run, in this process.

    Attributes:
        standing: how far the run is.
        setting: what it stands on.
        session: runs a step.
        metrics: gets a line a step.
        ledger: facts and times.
        watch: alarms, as the checkpoint had them.
        reporter: hears of everything.
        previews: draws samples; None for none.
        selection: measures checkpoints; None where the last is taken, and in all processes but the main one.
        validation: computes held-out losses; None for none.
        draws: steps at which samples were drawn.
        saves: steps that were saved.
    """

    standing: Standing
    setting: Setting
    session: Session
    metrics: MetricsLog
    ledger: Ledger
    watch: Watch
    reporter: Reporter
    previews: Previews | None = None
    selection: Selection | None = None
    validation: Validation | None = None
    draws: list[int] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """Without "auto"."""
        return self.setting.recipe

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return self.standing.folder

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.session.accelerator.is_main_process)

    def do(self) -> Result:
        """The steps, with samples before, between and after; the adapter is delivered once, at the end."""
        run, start, total = self.recipe.run, self.standing.steps, self.standing.total
        if not (self.folder.samples / "before" / "grid.png").is_file():
            self.draw(0, adapter=False)
        # Killed after the checkpoint and before what follows it: nobody else would measure and draw it.
        ended = start > 0 and self._is_due(start) and self.ends(start)
        if not ended and run.sample_every and 0 < start < total and start % run.sample_every == 0:
            self._draw_missing(start)
        done = start if ended else self._steps()
        return self._finish(done) if self.is_main else Result(done, done, None)

    def _steps(self) -> int:
        """Run them; how many the run has then."""
        run, seconds = self.recipe.run, self.ledger.clock.seconds
        once_s = {"samples": seconds["samples"] / len(self.draws)} if self.draws else {}
        has_previews, is_measured = self.previews is not None, run.select != "last"
        eta = Eta(
            self.standing.total,
            run.checkpoint_every,
            run.sample_every,
            has_previews,
            once_s,
            self.reporter,
            measured=is_measured,
        )
        hooks = Hooks(
            self.save,
            self.draw,
            run.checkpoint_every,
            run.sample_every,
            paced=eta,
            ends=self.ends if is_measured else None,
            validate=self.validate if run.validation_every else None,
            validate_every=run.validation_every,
        )
        try:
            with self.ledger.clock.phase("training"):
                run_steps(
                    self.session,
                    hooks,
                    self.metrics,
                    start=self.standing.steps,
                    stop=self.standing.total,
                    reporter=self.reporter,
                    watch=self.watch,
                )
        finally:
            estimated = {name: round(value, 3) for name, value in eta.estimated_s.items()}
            self.ledger.note("estimated_s", estimated)
        # The last step is always saved.
        return self.saves[-1] if self.saves else self.standing.steps

    def save(self, step: int) -> None:
        """A checkpoint; then old ones go."""
        if self.is_main:
            with self.ledger.clock.phase("checkpoints"):
                state.save(
                    self.folder.root,
                    step=step,
                    adapter_writer=lambda path: self._write_adapter(path, step),
                    optimizer=self.session.optimizer,
                    facts=going_on.facts(self.session, self.watch),
                )
                # The new one is not measured yet: it goes in its turn, as one of the newest.
                rotate(self.folder, self.recipe, self.reporter)
            self.ledger.note("steps_done", step)
        self.saves.append(step)
        self.session.accelerator.wait_for_everyone()

    def ends(self, step: int) -> bool:
        """Measure the checkpoint of this step, if one is chosen among them; whether the run ends with it.

        The same in all processes: the main one decides.
        """
        if self.recipe.run.select == "last":
            return False
        over = torch.zeros(1, device=self.session.accelerator.device)
        if self.selection is not None:
            with self.ledger.clock.phase("selection"):
                self.selection.judge(step)
            over += self.selection.is_over
            rotate(self.folder, self.recipe, self.reporter)
        if self.session.accelerator.num_processes > 1:
            over = self.session.accelerator.reduce(over, reduction="sum")
        return bool(over.item())

    def validate(self) -> dict[str, float]:
        """Held-out losses of the present weights; empty in all processes but the main one."""
        if self.validation is None or not self.is_main:
            return {}
        with self.ledger.clock.phase("validation"):
            return self.validation()

    def draw(self, step: int, *, adapter: bool = True) -> Path | None:
        """Samples, in the main process."""
        if self.previews is None or not self.is_main:
            return None
        with self.ledger.clock.phase("samples"):
            self.draws.append(step)
            return self.previews.draw(step, adapter=adapter)

    def _finish(self, done: int) -> Result:
        """Deliver the adapter, then draw: what the last step gives, and what was chosen."""
        last = going_on.last(self.folder, done, self.reporter)
        chosen = selections.best_checkpoint(self.folder, self.recipe) or last
        if self.recipe.run.select != "last":
            names = {} if self.selection is None else self.selection.referee.names
            told = selections.facts(self.folder, self.recipe, chosen=chosen.step, done=done, backbones=names)
            self.ledger.note("selection", told)
            self.reporter.say(f"chosen: {told['why']}")
        going_on.deliver(chosen, self.folder)
        grid = self.draw(done)
        if chosen.step != done:
            with self._weights_of(chosen):
                grid = self._draw_missing(chosen.step)
        return Result(done, chosen.step, grid)

    @contextmanager
    def _weights_of(self, checkpoint: state.Checkpoint) -> Iterator[None]:
        """In this context the adapter is that of a checkpoint."""
        components = self.setting.parts.components()
        own = inject.tensors(components, ADAPTER_NAME)
        inject.write(components, ADAPTER_NAME, adapter_file.read(checkpoint.adapter).tensors)
        try:
            yield
        finally:
            inject.write(components, ADAPTER_NAME, own)

    def _draw_missing(self, step: int) -> Path | None:
        grid = going_on.grid_of(self.folder, step)
        return grid if grid.is_file() else self.draw(step)

    def _is_due(self, step: int) -> bool:
        """Whether an undisturbed run has a checkpoint there, which is measured."""
        every = self.recipe.run.checkpoint_every
        return step == self.standing.total or (every > 0 and step % every == 0)

    def _write_adapter(self, path: Path, steps: int) -> None:
        metadata = replace(equipment.metadata_of(self.setting), steps=steps)
        adapter_file.write(path, inject.tensors(self.setting.parts.components(), ADAPTER_NAME), metadata)


def rotate(folder: RunFolder, recipe: Recipe, reporter: Reporter) -> None:
    """Let old checkpoints go, but for the best so far; what cannot be deleted is in nobody's way."""
    try:
        best = selections.best_checkpoint(folder, recipe)
        state.rotate(folder.root, recipe.run.keep, () if best is None else (best.step,))
    except OSError as error:
        reporter.warn(f"an old checkpoint could not be deleted: {error.strerror or error}")
