"""Puts the rooms together for one run: class images, caches, adapter, optimizer -> a `Session` for the loop.

Everything that differs between runs (family, prior mode, precision, cached or trained text encoder) is decided
here, so that the loop and the step contain none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lorabooth.adapters import inject
from lorabooth.data.batches import assemble, plan_step
from lorabooth.data.cache import Store
from lorabooth.data.encode import LatentIndex, cache_latents, cache_texts
from lorabooth.errors import RecipeError
from lorabooth.families.base import Family, Parts
from lorabooth.objective.loss import weighting
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import optim
from lorabooth.training.loop import Session
from lorabooth.training.step import StepParts, cached_condition, distill_targets, path_targets
from lorabooth.training.subjects import Subject
from lorabooth.types import Batch, Cond, Geometry, Record


@dataclass(frozen=True)
class Examples:
    """All that is trained on, encoded and in memory.

    Attributes:
        instance: the subject's photos.
        classes: class images, or (distill) the photos under the class prompt; empty without a prior.
        latents: of both.
        conds: caption -> conditioning, or tokens if the text encoder trains.
    """

    instance: tuple[Record, ...]
    classes: tuple[Record, ...]
    latents: LatentIndex
    conds: Mapping[str, Cond]


def encode_examples(
    family: Family,
    parts: Parts,
    recipe: Recipe,
    instance: Sequence[Record],
    classes: Sequence[Record],
    *,
    store: Store,
    reporter: Reporter,
) -> Examples:
    """Photos, class images and captions through VAE and text encoder, or from the store.

    Class images are cut as a plain square: flips and random crops are for the few photos of a subject.
    """
    encoder_id = f"{parts.source.family}/{parts.source.sha256}"
    resolution_px = int(recipe.images.resolution)

    def latents(records: Sequence[Record], images: Any) -> LatentIndex:
        return cache_latents(
            store,
            records,
            encode=lambda pixels: family.encode_images(parts, pixels),
            encoder_id=f"{encoder_id}/vae/fp32",
            images=images,
            resolution_px=resolution_px,
            multiple_px=family.resolution_multiple_px(parts),
            seed=recipe.run.seed,
            reporter=reporter,
        )

    index = latents(instance, recipe.images)
    photos = {record.path for record in instance}
    drawn = [record for record in classes if record.path not in photos]
    if drawn:
        index = index.joined(latents(drawn, recipe.images.model_copy(update={"flip": False, "crop": "center"})))
    prompts = [record.caption for record in (*instance, *classes)]
    if recipe.adapter.text_encoder:
        unique = list(dict.fromkeys(prompts))
        conds: Mapping[str, Cond] = dict(zip(unique, family.tokenize(parts, unique), strict=True))
    else:
        conds = cache_texts(
            store,
            prompts,
            encode=lambda some: family.encode_prompts(parts, some),
            encoder_id=f"{encoder_id}/text/{recipe.model.dtype}",
            reporter=reporter,
        ).conds
    reporter.say(f"latents: {index.computed} encoded, {index.reused} from the cache")
    return Examples(tuple(instance), tuple(classes), index, conds)


def targets_of(family: Family, recipe: Recipe) -> list[inject.Target]:
    """What the adapter sits on.

    Raises:
        RecipeError: the family has no such preset.
    """
    preset = recipe.adapter.targets
    if preset not in family.targets:
        raise RecipeError(
            f'adapter.targets: "{preset}" is not a preset of {family.name}',
            f"Presets: {', '.join(family.targets)}.",
        )
    rank = int(recipe.adapter.rank)
    alpha = float(recipe.adapter.alpha)
    found = [inject.Target("denoiser", tuple(family.targets[preset]), rank, alpha, recipe.adapter.dropout)]
    if recipe.adapter.text_encoder:
        text_rank = int(recipe.adapter.text_encoder_rank)
        text_alpha = alpha / rank * text_rank
        found.append(
            inject.Target("text_encoder", tuple(family.text_targets), text_rank, text_alpha, recipe.adapter.dropout)
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


def autocast_of(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a training forward; float32 needs none."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


def compose(
    family: Family,
    parts: Parts,
    recipe: Recipe,
    examples: Examples,
    attached: inject.Attached,
    *,
    accelerator: Accelerator,
    variants: int,
    reporter: Reporter,
) -> Session:
    """The session that the loop runs."""
    device = accelerator.device
    path = family.noise_path(parts).to(device)

    def predict(x: torch.Tensor, level: torch.Tensor, cond: Cond, geometry: Sequence[Geometry]) -> torch.Tensor:
        return family.predict(parts, x, level, cond, geometry)

    def encode(tokens: Cond) -> Cond:
        return family.encode_tokens(parts, tokens)

    condition = encode if recipe.adapter.text_encoder else cached_condition
    components = parts.components()
    targets = path_targets
    if recipe.prior.mode == "distill":
        targets = distill_targets(predict, condition, lambda: inject.disabled(components))
    trained = {name: attached.parameters(name) for name in components}
    parameters = [parameter for members in trained.values() for parameter in members]
    optimizer = optim.make(
        recipe.optim, optim.groups(trained, recipe.optim), device, strict=False, reporter=reporter
    )
    n_step = recipe.optim.batch_size * recipe.optim.accumulate * accelerator.num_processes
    precision = recipe.memory.precision
    return Session(
        accelerator=accelerator,
        step_parts=StepParts(
            predict=predict,
            condition=condition,
            path=path,
            weighting=weighting(recipe.loss, path.prediction),
            targets=targets,
        ),
        batches=Draws(family, recipe, examples, accelerator.process_index, accelerator.num_processes, variants),
        optimizer=optimizer,
        parameters=parameters,
        up_weights=attached.up_weights(),
        autocast=autocast_of(device, precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        section=recipe.optim,
        seed=recipe.run.seed,
        n_instance=n_step,
        n_class=n_step if examples.classes else 0,
        diagnosis=f"{precision} on {device.type}, base {parts.source.base_id} in {recipe.memory.base_precision}",
    )


def trigger_words(subjects: Sequence[Subject]) -> str:
    """What to write in a prompt to get the subjects."""
    return ", ".join(subject.name for subject in subjects)


def class_image_root(store: Store) -> Path:
    """Where generated class images are kept: beside the latents, shared by all runs."""
    return store.root / "class-images"
