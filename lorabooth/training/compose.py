"""Puts the rooms together for one run: examples, adapter, optimizer -> a `Session` for the loop.

Everything that differs between runs (family, prior mode, precision, cached or trained text encoder) is
decided here, so that the loop and the step contain none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from lorabooth.adapters import inject
from lorabooth.data.batches import Tuples, assemble, no_tuples
from lorabooth.families.base import Family
from lorabooth.families.reload import load_denoiser
from lorabooth.memory import apply, hollow, techniques
from lorabooth.memory.attention import set_attention
from lorabooth.objective.loss import weighting
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.rng import seed_for
from lorabooth.training import optim
from lorabooth.training.caching import Examples
from lorabooth.training.loop import Session
from lorabooth.training.pool import Pool, plan_of, sizes
from lorabooth.training.prefetch import to_device
from lorabooth.training.setting import Setting
from lorabooth.training.speed import furnish
from lorabooth.training.step import (
    StepParts,
    Targets,
    cached_condition,
    class_rows,
    distill_targets,
    micro_step,
    noise_of,
    path_targets,
    stored_targets,
)
from lorabooth.types import Batch, Cond, Geometry

ADAPTER_NAME = "lorabooth"


def targets_of(family: Family, recipe: Recipe, denoiser: nn.Module) -> list[inject.Target]:
    """What the adapter sits on; `open_setting` has checked that the preset exists.

    Args:
        family: of the base.
        recipe: without "auto".
        denoiser: whole; with memory.hollow its deep middle gets no adapter.
    """
    patterns = tuple(family.targets[recipe.adapter.targets])
    if recipe.memory.hollow:
        keep = hollow.keep_of(denoiser, recipe.memory.hollow_keep)
        patterns = hollow.kept_patterns(denoiser, keep, patterns)
    rank = int(recipe.adapter.rank)
    alpha = float(recipe.adapter.alpha)
    found = [inject.Target("denoiser", patterns, rank, alpha, recipe.adapter.dropout)]
    if recipe.adapter.text_encoder:
        text_rank = int(recipe.adapter.text_encoder_rank)
        text_alpha = alpha / rank * text_rank
        found.append(
            inject.Target(
                "text_encoder", tuple(family.text_targets), text_rank, text_alpha, recipe.adapter.dropout
            )
        )
    return found


@dataclass(frozen=True)
class Draws:
    """The batches of a step for one rank, as the loop asks for them."""

    family: Family
    recipe: Recipe
    examples: Examples
    rank: int
    world: int
    tuples: Tuples = no_tuples

    def __call__(self, step: int) -> Sequence[Sequence[Batch]]:
        """Micro-batches of `step`; a pure function of it."""
        plan = plan_of(self.recipe, self.examples, self.world, step)
        return [
            assemble(
                draws,
                instance_records=self.examples.instance,
                class_records=self.examples.classes,
                latents=self.examples.latents,
                conds=self.examples.conds,
                collate=self.family.collate,
                prior_weight=self.recipe.prior.weight * self.recipe.prior.every,
                seed=self.recipe.run.seed,
                step=step,
                tuples=self.tuples,
            )
            for draws in plan[self.rank]
        ]


def attach(setting: Setting, device: torch.device, reporter: Reporter) -> inject.Attached:
    """Put a fresh adapter on the base, and the base on the device, with the recipe's memory techniques.

    Works on shapes as well: nothing reads a value.
    """
    recipe, parts = setting.recipe, setting.parts
    attached = inject.attach(
        parts.components(),
        targets_of(setting.family, recipe, parts.denoiser),
        name=ADAPTER_NAME,
        seed=recipe.run.seed,
    )
    said = techniques.hold_base(parts.denoiser, recipe.memory, device)
    setting.base.to(device, *parts.components())
    dtype = apply.precision(recipe.memory, device).compute
    set_attention(parts.denoiser, recipe.memory.attention, dtype=dtype, device=device, reporter=reporter)
    if recipe.memory.checkpointing and "text_encoder" in attached.components:
        apply.enable_checkpointing(parts.components()["text_encoder"])
    said += techniques.recompute(parts.denoiser, recipe.memory, dropout=recipe.adapter.dropout)
    for line in said:
        reporter.say(line)
    for module in parts.components().values():
        module.train()
    return attached


def compose(
    setting: Setting,
    examples: Examples,
    attached: inject.Attached,
    *,
    accelerator: Accelerator,
    reporter: Reporter,
    pool: Pool | None = None,
) -> Session:
    """The session that the loop runs; its precision is proven by one small step.

    Args:
        setting: the run's.
        examples: encoded.
        attached: the adapter.
        accelerator: devices and processes.
        reporter: hears of what does not work.
        pool: from `pool.prepare`; a recipe with a fixed pool needs it.
    """
    recipe, family, parts = setting.recipe, setting.family, setting.parts
    device = accelerator.device
    parts_of_step = step_parts(setting, device)
    trained = {name: attached.parameters(name) for name in parts.components()}
    parameters = [parameter for members in trained.values() for parameter in members]
    optimizer = optim.make(
        recipe.optim,
        optim.groups(trained, recipe.optim),
        device,
        strict=recipe.optim.strict,
        reporter=reporter,
        captured=recipe.speed.cuda_graph,
    )
    n_step = recipe.optim.batch_size * recipe.optim.accumulate * accelerator.num_processes
    n_class = n_step if examples.classes else 0
    batches = Draws(
        family,
        recipe,
        examples,
        accelerator.process_index,
        accelerator.num_processes,
        no_tuples if pool is None else pool.tuples,
    )

    attempt = partial(_trial, parts_of_step, batches, recipe.run.seed, device, n_step, n_class)
    wanted = apply.precision(recipe.memory, device)
    precision = apply.probe(
        attempt,
        parameters,
        parts.denoiser,
        wanted,
        device,
        lambda dtype: load_denoiser(family, replace(parts, dtype=dtype)),
        reporter,
    )
    session = Session(
        accelerator=accelerator,
        step_parts=parts_of_step,
        batches=batches,
        optimizer=optimizer,
        parameters=parameters,
        up_weights=attached.up_weights(),
        autocast=lambda: precision.autocast(device),
        randomness=_dropout_randomness(recipe, accelerator) if recipe.adapter.dropout else _no_randomness,
        scaler=precision.scaler(device),
        section=recipe.optim,
        seed=recipe.run.seed,
        n_instance=n_step,
        n_class=n_class,
        diagnosis=f"{apply.NAMES[precision.compute]} on {device.type}, base {parts.source.base_id} in "
        f"{precision.base_name}",
        prior_every=recipe.prior.every,
    )
    return furnish(session, setting, attempt, reporter)


def _trial(
    parts: StepParts, batches: Draws, seed: int, device: torch.device, n_instance: int, n_class: int
) -> torch.Tensor:
    """The loss of the first micro-batch."""
    batch = batches(0)[0][0]
    eps, level = noise_of(parts.path, batch, seed, 0, device=device)
    return micro_step(
        parts,
        to_device(batch, device),
        eps,
        level,
        class_rows=class_rows(batch),
        n_instance=n_instance,
        n_class=n_class,
    ).total


def step_parts(setting: Setting, device: torch.device) -> StepParts:
    """The step's functions: which text conditioning, which targets, which weighting."""
    recipe, family, parts = setting.recipe, setting.family, setting.parts
    components = parts.components()

    def predict(
        x: torch.Tensor, level: torch.Tensor, cond: Cond, geometry: Sequence[Geometry]
    ) -> torch.Tensor:
        with hollow.filled(parts.denoiser, cond["hollow"]) if recipe.memory.hollow else nullcontext():
            return family.predict(parts, x, level, cond, geometry)

    def encode(tokens: Cond) -> Cond:
        return family.encode_tokens(parts, tokens)

    condition = encode if recipe.adapter.text_encoder else cached_condition
    targets: Targets = path_targets
    if recipe.prior.mode == "distill" and any(sizes(recipe)):
        targets = stored_targets
    elif recipe.prior.mode == "distill":
        targets = distill_targets(predict, condition, lambda: inject.disabled(components))
    path = family.noise_path(parts).to(device)
    return StepParts(
        predict=predict,
        condition=condition,
        path=path,
        weighting=weighting(recipe.loss, path.prediction),
        targets=targets,
    )


def _no_randomness(step: int, turn: int) -> AbstractContextManager[None]:  # noqa: ARG001 - as the other kind
    """Nothing in the step draws."""
    return nullcontext()


def _dropout_randomness(
    recipe: Recipe, accelerator: Accelerator
) -> Callable[[int, int], AbstractContextManager[None]]:
    """Dropout draws from torch's global state: seed it for one micro-batch, then put it back."""
    devices = [accelerator.device.index or 0] if accelerator.device.type == "cuda" else []

    @contextmanager
    def seeded(step: int, turn: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_for(recipe.run.seed, step, accelerator.process_index, "dropout", turn))
            yield

    return seeded
