"""Training and what happens in between, rehearsed on shapes: the run's own attach and step, blank examples.

Legend of shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorabooth.adapters import inject
from lorabooth.data.images import PhotoReport
from lorabooth.families.base import Parts
from lorabooth.memory import apply, hollow
from lorabooth.memory.host import HOST, making
from lorabooth.memory.meter import Meter, Usage
from lorabooth.memory.meter_shapes import Uninitialised
from lorabooth.memory.stream import streamed_tensors
from lorabooth.planning import components as things
from lorabooth.planning.components import Scene
from lorabooth.planning.phases_before import draw
from lorabooth.planning.visits import Ahead
from lorabooth.progress import Silent
from lorabooth.recipe import Recipe
from lorabooth.training import optim, pool, subjects
from lorabooth.training.compose import ADAPTER_NAME, attach, step_parts
from lorabooth.training.loop import Session
from lorabooth.training.prefetch import DEPTH, Ready
from lorabooth.training.setting import LoadedBase, Setting
from lorabooth.training.step import noise_of
from lorabooth.training.subjects import Photos
from lorabooth.training.update import decide_on_device
from lorabooth.types import Batch, Cond


@dataclass(frozen=True)
class _Stage:
    """A run that is ready to train.

    Attributes:
        setting: its base without what was released.
        session: what the step runs.
        conds: a batch of one, of what the step is told.
        again: parts that previews load once more.
    """

    setting: Setting
    session: Session
    conds: Cond
    again: Parts


@dataclass(frozen=True)
class _Here:
    """What the step asks of accelerate: one process, on shapes."""

    device: torch.device = things.SHAPES_ON
    num_processes: int = 1


def training(scene: Scene, wanted: Collection[str]) -> dict[str, Usage]:
    """The real `attach`, a full optimizer step, and what follows it with the trained parts in memory.

    Args:
        scene: what is rehearsed.
        wanted: of "training", "previews" and "saving"; the last is seen in any case.
    """
    found: dict[str, Usage] = {}
    with scene.world():
        parts = things.skeleton(scene)
        conds = _conditioning(scene, parts)
        kept = dict(parts.text_encoders) if scene.recipe.adapter.text_encoder else {}
        setting = _setting(scene, replace(parts, vae=None, text_encoders=kept))
        again = things.skeleton(scene) if "previews" in wanted and scene.recipe.memory.hollow else parts
        del parts
        with scene.meter() as meter:
            stage = _ready(scene, setting, again, conds, meter)
            # What a step leaves behind: gradients, where they stay for a recorded step.
            if "training" in wanted or scene.recipe.speed.cuda_graph:
                _step(scene, stage, meter)
                found["training"] = meter.usage()
            if "previews" in wanted:
                meter.reset_peak()
                _previews(scene, stage, meter)
                found["previews"] = meter.usage()
            meter.reset_peak()
            _saving(scene, stage, meter)
            found["saving"] = meter.usage()
    return found


def _ready(scene: Scene, setting: Setting, again: Parts, conds: Cond, meter: Meter) -> _Stage:
    """Base placed, adapter attached, optimizer with its state."""
    recipe, parts = scene.recipe, setting.parts
    if not scene.is_cuda:  # a CPU's memory has the base before it is held otherwise
        things.hold(meter, parts)
    with meter.during(things.DENOISER):
        with Uninitialised():
            attached = attach(setting, things.SHAPES_ON, Silent())
        if scene.streams:
            # Among shapes nothing tells that a layer's weights went back to the host: only what stays counts.
            away = streamed_tensors(parts.denoiser)
            meter.drop(*away)
            meter.reset_peak()
            things.hold(meter, parts, but=away)
            Ahead(parts.denoiser, meter, things.DENOISER)
        else:
            things.hold(meter, parts)
        meter.watch(things.ADAPTER, *attached.parameters())
    if any(pool.sizes(recipe)):
        _fill_pool(scene, setting, conds)
    pool.hollow_out(setting, attached, Silent())
    session = _session(scene, setting, attached)
    with meter.during(things.OPTIMIZER):
        for parameter in session.parameters:
            parameter.grad = torch.zeros_like(parameter)
        session.optimizer.step()
        session.optimizer.zero_grad(set_to_none=True)
    return _Stage(setting, session, conds, again)


def _session(scene: Scene, setting: Setting, attached: inject.Attached) -> Session:
    """As `compose` makes it, without the proofs that read numbers."""
    recipe, parts = scene.recipe, setting.parts
    trained = {name: attached.parameters(name) for name in parts.components()}
    precision = apply.precision(recipe.memory, things.SHAPES_ON)
    n_step = recipe.optim.batch_size * recipe.optim.accumulate
    return Session(
        accelerator=_Here(),
        step_parts=step_parts(setting, things.SHAPES_ON),
        batches=_no_batches,
        optimizer=_optimizer(recipe, optim.groups(trained, recipe.optim)),
        parameters=[parameter for members in trained.values() for parameter in members],
        up_weights=attached.up_weights(),
        autocast=lambda: precision.autocast(things.SHAPES_ON),
        randomness=_no_randomness,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        section=recipe.optim,
        seed=recipe.run.seed,
        n_instance=n_step,
        n_class=n_step if recipe.prior.mode != "none" else 0,
        diagnosis="",
    )


def _no_batches(step: int) -> tuple[()]:  # noqa: ARG001 - the loop's signature
    """A rehearsal brings its own."""
    return ()


def _no_randomness(step: int, turn: int) -> AbstractContextManager[None]:  # noqa: ARG001 - likewise
    """Shapes draw nothing."""
    return nullcontext()


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if recipe.optim.name == "adamw":
        return optim.make(recipe.optim, groups, things.SHAPES_ON, strict=True, reporter=Silent())
    return things.BlockwiseAdamW(groups)


def _step(scene: Scene, stage: _Stage, meter: Meter) -> None:
    """One optimizer step, as the loop runs it.

    A GPU is given one forward's examples at a time; a CPU's memory has those of all, and of the steps ahead.
    """
    recipe = scene.recipe

    def forwards() -> Iterator[list[Ready]]:
        for _ in range(recipe.optim.accumulate):
            with meter.during(things.INPUTS):
                ready = [_examples(scene, stage)]
            yield ready

    steps = 1 if scene.is_cuda else 1 + DEPTH
    coming: list[Any] = [forwards() if scene.is_cuda else list(forwards()) for _ in range(steps)]
    with meter.gradients(stage.session.parameters):
        decide_on_device(stage.session, 0, coming[0], keep_gradients=recipe.speed.cuda_graph)


def _examples(scene: Scene, stage: _Stage) -> Ready:
    """The blank examples of one forward."""
    recipe = scene.recipe
    n_instance = recipe.optim.batch_size
    n_class = n_instance if recipe.prior.mode != "none" else 0
    batch = _batch(scene, stage, n_instance, n_class)
    eps, level = noise_of(stage.session.step_parts.path, batch, 0, 0)
    return Ready(batch, eps, level, tuple(range(n_instance, n_instance + n_class)))


def _batch(scene: Scene, stage: _Stage, n_instance: int, n_class: int) -> Batch:
    """A micro-batch of blank examples."""
    recipe, parts = scene.recipe, stage.setting.parts
    count, shape = n_instance + n_class, scene.latent_shape(parts)
    cond = things.blank_like(stage.conds, count)
    compute = apply.DTYPES[recipe.memory.precision]
    taught = None
    if recipe.memory.hollow:
        keep = hollow.keep_of(parts.denoiser, recipe.memory.hollow_keep)
        cond["hollow"] = torch.empty(
            (count, *hollow.stored_shape(parts.denoiser, keep, shape)), dtype=compute
        )
    if n_class and recipe.prior.mode == "distill" and any(pool.sizes(recipe)):
        taught = torch.empty((count, *shape), dtype=compute)
    return Batch(
        latents=torch.empty((count, *shape)),
        cond=cond,
        geometry=(scene.geometry(parts),) * count,
        weight=torch.ones(count),
        is_instance=torch.empty(count, dtype=torch.bool),
        record_ids=("",) * count,
        positions=tuple(range(count)),
        taught=taught,
    )


def _fill_pool(scene: Scene, setting: Setting, conds: Cond) -> None:
    """One forward pass of the whole net, adapter off, at a batch of one."""
    parts = setting.parts
    x_BChw, level_B = torch.empty((1, *scene.latent_shape(parts))), torch.zeros(1, dtype=torch.int64)
    precision = apply.precision(scene.recipe.memory, things.SHAPES_ON)
    cond, memory = things.blank_like(conds, 1), scene.recipe.memory
    capturing: AbstractContextManager[object] = nullcontext()
    if memory.hollow:
        keep = hollow.keep_of(parts.denoiser, memory.hollow_keep)
        capturing = hollow.capture(parts.denoiser, keep, to_the_end=scene.recipe.prior.mode == "distill")
    with (
        torch.no_grad(),
        inject.disabled(parts.components()),
        precision.autocast(things.SHAPES_ON),
        capturing,
        suppress(hollow.CapturedError),
    ):
        if scene.recipe.adapter.text_encoder:
            cond = dict(scene.family.encode_tokens(parts, cond))
        scene.family.predict(parts, x_BChw, level_B, cond, (scene.geometry(parts),))


def _previews(scene: Scene, stage: _Stage, meter: Meter) -> None:
    """Samples with the adapter on: a VAE comes back, and optimizer state stays."""
    recipe, kept = scene.recipe, stage.setting.parts
    whole: AbstractContextManager[object] = nullcontext()
    if recipe.memory.hollow:
        whole = hollow.whole(kept.denoiser, stage.again.denoiser)
    parts = replace(kept, vae=stage.again.vae)
    for module in parts.components().values():
        module.eval()
    at_once = recipe.memory.images_at_once
    # Images that a checkpoint is measured by are drawn in the same way, and measured off the device.
    measured = 0 if recipe.run.select == "last" else recipe.run.select_images
    count = max(recipe.run.sample_count, measured) if at_once == "auto" else at_once
    with whole:
        if not scene.takes_turns:
            meter.watch(things.VAE, *filter(None, [parts.vae]))
        if recipe.memory.hollow:
            meter.watch(things.DENOISER, *(p for p in parts.denoiser.parameters() if not p.requires_grad))
        guidance = float(scene.recipe.run.sample_guidance)
        cond = None if parts.text_encoders else stage.conds
        draw(scene, parts, meter, count, guidance=guidance, cond=cond)
    for module in parts.components().values():
        module.train()
    if parts.vae is not None:  # it has left memory, and is kept here for another rehearsal at most
        meter.drop(*parts.vae.parameters(), *parts.vae.buffers())


def _saving(scene: Scene, stage: _Stage, meter: Meter) -> None:
    """A checkpoint: adapter and optimizer state are copied to host memory."""
    del scene
    with making(HOST), meter.during("checkpoint"):
        copies = [*inject.tensors(stage.setting.parts.components(), ADAPTER_NAME).values()]
        copies += [each.detach().clone() for each in things.state_tensors(stage.session.optimizer)]


def _conditioning(scene: Scene, parts: Parts) -> Cond:
    """What a batch of one is told: cached text embeddings, or tokens if the text encoder trains."""
    tokens = things.blank_tokens(scene.family, parts, 1)
    if scene.recipe.adapter.text_encoder:
        return tokens
    with torch.no_grad():
        return scene.family.encode_tokens(parts, tokens)


def _setting(scene: Scene, parts: Parts) -> Setting:
    return Setting(
        recipe=scene.recipe,
        choices=(),
        subjects=subjects.subjects_of(scene.recipe),
        photos=Photos((), PhotoReport((), (), ())),
        family=scene.family,
        base=LoadedBase(parts),
        device=things.SHAPES_ON,
    )
