"""What the recipe's [speed] asks for, put into a composed session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lorabooth.errors import RecipeError
from lorabooth.memory.facts import describe_device, versions
from lorabooth.progress import Reporter
from lorabooth.training import update
from lorabooth.training.compiled import Blocks, Pace, TimingFile, compile_cache
from lorabooth.training.graphed import CudaDevice, Device, Graphed
from lorabooth.training.loop import Session
from lorabooth.training.setting import Setting


def furnish(session: Session, setting: Setting, loss: Callable[[], Tensor], reporter: Reporter) -> Session:
    """The session with late figures, compiled blocks and captured steps, where they are wanted and possible.

    Args:
        session: composed, its precision proven.
        setting: the run's.
        loss: the forward pass of a small batch.
        reporter: hears of what is chosen.

    Raises:
        RecipeError: the recipe says "on", and the step cannot be compiled or captured.
    """
    recipe, device = setting.recipe, session.accelerator.device
    alone = session.accelerator.num_processes == 1
    possible = alone and update.can_decide_on_device(session.optimizer, session.scaler)
    # On a CPU there is nobody to wait for.
    session = replace(session, late=possible and device.type == "cuda")
    if recipe.speed.compile != "off":
        session = replace(session, pace=_pace(session, setting, loss, reporter))
    if recipe.speed.cuda_graph:
        if not session.late:
            raise RecipeError(
                "speed.cuda_graph: a captured step needs one process, torch's AdamW, and bf16 or fp32.",
                'Set memory.precision = "bf16", start one process, or set speed.cuda_graph = false.',
            )
        session = replace(session, graph=captured(session, CudaDevice(device)))
    return session


def speed_facts(session: Session) -> dict[str, object]:
    """What was chosen, for run.json."""
    facts: dict[str, object] = {"figures": "late" if session.late else "at once"}
    if isinstance(session.pace, Pace):
        facts |= session.pace.facts
    if isinstance(session.graph, Graphed):
        facts |= {"graphs": session.graph.captured, "replayed_steps": session.graph.replayed}
    return facts


def captured(session: Session, device: Device) -> Graphed:
    """The session's whole step, to be captured by a device."""
    return Graphed(
        lambda forwards: update.decide_on_device(session, 0, forwards, keep_gradients=True),
        session.parameters,
        device,
        session.accelerator.device,
    )


def _pace(session: Session, setting: Setting, loss: Callable[[], Tensor], reporter: Reporter) -> Pace | None:
    """Compiled blocks of the denoiser; None where it has none."""
    recipe, device = setting.recipe, session.accelerator.device
    mode = recipe.speed.compile
    blocks = Blocks(setting.parts.denoiser, compile_cache())
    if not blocks:
        text = f"speed.compile: {type(setting.parts.denoiser).__name__} names no repeated blocks"
        if mode == "on":
            raise RecipeError(f"{text}.", 'Set speed.compile = "off".')
        reporter.say(f"{text}; nothing is compiled")
        return None

    def attempt() -> None:
        try:
            with session.autocast():
                total = loss()
            total.backward()  # type: ignore[no-untyped-call]
        finally:
            for parameter in session.parameters:
                parameter.grad = None

    facts = {
        "base": setting.parts.source.sha256,
        "adapter": recipe.adapter.model_dump(),
        "memory": recipe.memory.model_dump(),
        "batch_size": recipe.optim.batch_size,
        "accumulate": recipe.optim.accumulate,
        "prior": [recipe.prior.mode, recipe.prior.every, recipe.prior.pool],
        "resolution": recipe.images.resolution,
        "device": describe_device(device).name,
        "torch": versions()["torch"],
    }
    return Pace(
        "on" if mode == "on" else "auto",
        blocks,
        attempt,
        memory=TimingFile.of(compile_cache(), facts),
        reporter=reporter,
    )
