"""Puts the rooms together for one run: examples, adapter, optimizer -> a `Session` for the loop.

Everything that differs between runs (family, prior mode, precision, cached or trained text encoder) is
decided here, so that the loop and the step contain none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lorabooth.adapters import inject
from lorabooth.data.batches import assemble, plan_step
from lorabooth.data.images import variants
from lorabooth.families.base import Family
from lorabooth.memory import apply
from lorabooth.memory.attention import set_attention
from lorabooth.objective.loss import weighting
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.rng import seed_for
from lorabooth.training import optim
from lorabooth.training.caching import Examples
from lorabooth.training.loop import Session, to_device
from lorabooth.training.setting import Setting
from lorabooth.training.step import (
    StepParts,
    Targets,
    cached_condition,
    class_rows,
    distill_targets,
    draw_noise,
    micro_step,
    path_targets,
)
from lorabooth.types import Batch, Cond, Geometry

ADAPTER_NAME = "lorabooth"


def targets_of(family: Family, recipe: Recipe) -> list[inject.Target]:
    """What the adapter sits on; `open_setting` has checked that the preset exists."""
    preset = recipe.adapter.targets
    rank = int(recipe.adapter.rank)
    alpha = float(recipe.adapter.alpha)
    found = [inject.Target("denoiser", tuple(family.targets[preset]), rank, alpha, recipe.adapter.dropout)]
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
    variants: int

    def __call__(self, step: int) -> Sequence[Sequence[Batch]]:
        """Micro-batches of `step`; a pure function of it."""
        plan = plan_step(
            seed=self.recipe.run.seed,
            step=step,
            n_instance=len(self.examples.instance),
            n_class=len(self.examples.classes),
            batch_size=self.recipe.optim.batch_size,
            accumulate=self.recipe.optim.accumulate,
            world=self.world,
            variants=self.variants,
            class_variants=self.variants if self.recipe.prior.mode == "distill" else 1,
        )
        return [
            assemble(
                draws,
                instance_records=self.examples.instance,
                class_records=self.examples.classes,
                latents=self.examples.latents,
                conds=self.examples.conds,
                collate=self.family.collate,
                prior_weight=self.recipe.prior.weight,
                seed=self.recipe.run.seed,
                step=step,
            )
            for draws in plan[self.rank]
        ]


def attach(setting: Setting, device: torch.device, reporter: Reporter) -> inject.Attached:
    """Place the base on the device, prove its attention kernel, and put a fresh adapter on it."""
    recipe, parts = setting.recipe, setting.parts
    setting.base.to(device, *parts.components())
    attached = inject.attach(
        parts.components(), targets_of(setting.family, recipe), name=ADAPTER_NAME, seed=recipe.run.seed
    )
    dtype = apply.precision(recipe.memory, device).compute
    set_attention(parts.denoiser, recipe.memory.attention, dtype=dtype, device=device, reporter=reporter)
    if recipe.memory.checkpointing:
        for component in attached.components:
            apply.enable_checkpointing(parts.components()[component])
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
) -> Session:
    """The session that the loop runs; its precision is proven by one small step."""
    recipe, family, parts = setting.recipe, setting.family, setting.parts
    device = accelerator.device
    step_parts = _step_parts(setting, device)
    trained = {name: attached.parameters(name) for name in parts.components()}
    parameters = [parameter for members in trained.values() for parameter in members]
    optimizer = optim.make(
        recipe.optim,
        optim.groups(trained, recipe.optim),
        device,
        strict=recipe.optim.strict,
        reporter=reporter,
    )
    n_step = recipe.optim.batch_size * recipe.optim.accumulate * accelerator.num_processes
    n_class = n_step if examples.classes else 0
    batches = Draws(
        family,
        recipe,
        examples,
        accelerator.process_index,
        accelerator.num_processes,
        len(variants(recipe.images)),
    )

    def attempt() -> torch.Tensor:
        batch = batches(0)[0][0]
        eps, level = draw_noise(
            step_parts.path, recipe.run.seed, 0, batch.positions, batch.latents.shape[1:], device=device
        )
        return micro_step(
            step_parts,
            to_device(batch, device),
            eps,
            level,
            class_rows=class_rows(batch),
            n_instance=n_step,
            n_class=n_class,
        ).total

    wanted = apply.precision(recipe.memory, device)
    precision = apply.probe(attempt, parameters, parts.denoiser, wanted, device, reporter)
    return Session(
        accelerator=accelerator,
        step_parts=step_parts,
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
        f"{apply.NAMES[precision.base]}",
    )


def _step_parts(setting: Setting, device: torch.device) -> StepParts:
    """The step's functions: which text conditioning, which targets, which weighting."""
    recipe, family, parts = setting.recipe, setting.family, setting.parts
    components = parts.components()

    def predict(
        x: torch.Tensor, level: torch.Tensor, cond: Cond, geometry: Sequence[Geometry]
    ) -> torch.Tensor:
        return family.predict(parts, x, level, cond, geometry)

    def encode(tokens: Cond) -> Cond:
        return family.encode_tokens(parts, tokens)

    condition = encode if recipe.adapter.text_encoder else cached_condition
    targets: Targets = path_targets
    if recipe.prior.mode == "distill":
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
