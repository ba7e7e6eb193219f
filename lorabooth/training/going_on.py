"""What a run folder has already, and how a run goes on from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorabooth import durable
from lorabooth.adapters import file as adapter_file
from lorabooth.adapters import inject
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.memory.apply import NAMES
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import folder as folders
from lorabooth.training import selection, state
from lorabooth.training.alarms import Watch
from lorabooth.training.compose import ADAPTER_NAME
from lorabooth.training.folder import RunFolder
from lorabooth.training.loop import Session
from lorabooth.training.setting import Setting


@dataclass(frozen=True)
class Standing:
    """How far the run in a folder is.

    Attributes:
        folder: of the run.
        total: steps that are wanted now.
        checkpoint: the newest whole one.
        steps: done.
        finished: nothing is left to do.
    """

    folder: RunFolder
    total: int
    checkpoint: state.Checkpoint | None
    steps: int
    finished: bool


def find(folder: RunFolder, recipe: Recipe, reporter: Reporter) -> Standing:
    """Look at what is there; nothing is changed.

    Args:
        folder: of this recipe's run, or free.
        recipe: without "auto": how many steps are wanted, and when a run ends early.
        reporter: hears of torn checkpoints.

    Raises:
        RecipeError: the run has more steps than are wanted, or is finished and cannot be made longer because
            its checkpoints are gone.
    """
    total, checkpoint = int(recipe.optim.steps), state.newest(folder.root, reporter)
    finished = folder.is_finished()
    ended_early = finished and selection.is_over(selection.recorded(folder), recipe)
    if finished and checkpoint is None and folder.adapter.is_file():
        # Somebody made room: the result is there, and only going on is impossible.
        steps = adapter_file.read(folder.adapter).metadata.steps
        steps = int(folders.read_json(folder.facts).get("steps_done", steps))
        if steps < total and not ended_early:
            raise RecipeError(
                f"{folder.root} is done with {steps} steps, and its checkpoints are gone: it cannot go on "
                f"to {total}.",
                "Give --fresh to start beside it.",
            )
        return Standing(folder, total, None, steps, finished=True)
    steps = checkpoint.step if checkpoint is not None else 0
    if steps > total and not finished:
        raise RecipeError(
            f"optim.steps is {total}, but {folder.root} has {steps} steps already.",
            "Give as many or more, or --fresh to start beside it.",
        )
    is_done = finished and checkpoint is not None and (steps >= total or ended_early)
    return Standing(folder, total, checkpoint, steps, is_done)


def tell(standing: Standing, reporter: Reporter) -> None:
    """Say how far the run is, if it has begun."""
    if standing.finished:
        early = f" of {standing.total}; run.stop_early ended it" if standing.steps < standing.total else ""
        reporter.say(f"{standing.folder.root} is done already: {standing.steps} steps{early}.")
    elif standing.steps:
        reporter.say(f"going on from step {standing.steps} of {standing.total}")
    elif standing.folder.facts.is_file():
        reporter.say(f"{standing.folder.root} was begun and has no whole checkpoint: it starts with step 1.")


def deliver(checkpoint: state.Checkpoint, folder: RunFolder) -> None:
    """Make the checkpoint's adapter the run's result, bit for bit.

    Raises:
        TrainingError: it cannot be written.
    """
    with folders.saving(folder.adapter):
        durable.replace(folder.adapter, checkpoint.adapter.read_bytes())


def last(folder: RunFolder, step: int, reporter: Reporter) -> state.Checkpoint:
    """The checkpoint of the last step, read back and found whole.

    Raises:
        TrainingError: it is not there or not whole, although it was saved.
    """
    found = state.newest(folder.root, reporter)
    if found is None or found.step != step:
        raise TrainingError(
            f"the checkpoint of step {step} in {folder.root} was saved but cannot be read back whole.",
            "The disk may be failing: copy the run folder to another one; the same command goes on there.",
        )
    return found


def facts(session: Session, watch: Watch) -> dict[str, Any]:
    """What a checkpoint keeps beside weights and optimizer."""
    return {
        "scaler": session.scaler.state_dict(),
        "precision": precision_name(session),
        "watch": watch.state_dict(),
    }


def restore(checkpoint: state.Checkpoint, setting: Setting, session: Session, reporter: Reporter) -> Watch:
    """Put adapter, optimizer and loss scale of a checkpoint back; returns what the loop remembered.

    Raises:
        RecipeError: the checkpoint is of another optimizer or of other parameters.
    """
    saved = adapter_file.read(checkpoint.adapter)
    inject.write(setting.parts.components(), ADAPTER_NAME, saved.tensors)
    now, then = precision_name(session), str(checkpoint.facts.get("precision", ""))
    if then and then != now:
        reporter.warn(
            f"the first {checkpoint.step} steps were computed in {then}, the others will be in {now}: "
            "the result is not exactly that of an uninterrupted run"
        )
    scale = dict(checkpoint.facts.get("scaler", {}))
    # Empty where no loss was scaled (not in fp16); a scaler refuses that.
    if scale and session.scaler.is_enabled():
        session.scaler.load_state_dict(scale)
    state.restore(checkpoint, session.optimizer)
    return Watch.resumed(checkpoint.facts.get("watch", {}))


def precision_name(session: Session) -> str:
    """The precision that was proven and is used: "fp32", "bf16" or "fp16"."""
    device = session.accelerator.device.type
    with session.autocast():
        if not torch.is_autocast_enabled(device):
            return "fp32"
        return NAMES[torch.get_autocast_dtype(device)]


def command(folder: RunFolder) -> str:
    """What to type to go on, wherever the run was started from."""
    import shlex

    return shlex.join(["lorabooth", "train", str(folder.recipe)])


def grid_of(folder: RunFolder, step: int) -> Path:
    """The picture of a preview; written last, so that it is there only if all images are."""
    return folder.step_samples(step) / "grid.png"
