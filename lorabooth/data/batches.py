"""Which examples make up an optimizer step, and their batches: functions of (seed, step) and nothing else.

The examples of a step are the same however it is split over ranks and accumulation, so 4 x 1 == 1 x 4,
and resuming needs no state but the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lorabooth.data.encode import LatentIndex
from lorabooth.data.records import record_id
from lorabooth.rng import generator_for
from lorabooth.types import Batch, Cond, Moments, Record, Role


@dataclass(frozen=True, slots=True)
class Draw:
    """One example of a step.

    Attributes:
        record: index into the records of its role.
        variant: which cached cut of the photo.
        role: INSTANCE or CLASS.
        position: 0-based within the optimizer step, over ranks and accumulation; instance examples first.
    """

    record: int
    variant: int
    role: Role
    position: int


MicroBatch: TypeAlias = tuple[Draw, ...]


def plan_step(
    *,
    seed: int,
    step: int,
    n_instance: int,
    n_class: int,
    batch_size: int,
    accumulate: int = 1,
    world: int = 1,
    class_batch_size: int | None = None,
    variants: int = 1,
    class_variants: int = 1,
) -> tuple[tuple[MicroBatch, ...], ...]:
    """The examples of one optimizer step.

    Photos are walked in permutations, a new one each epoch, so each is seen equally often; class examples
    walk the whole class pool on their own. Variants are walked likewise: after `variants` epochs, each was
    seen once.

    Args:
        seed: the run's.
        step: optimizer step, from 0.
        n_instance: number of instance records, all subjects together.
        n_class: number of class records, all classes together.
        batch_size: instance examples per forward and rank.
        accumulate: forwards per step.
        world: number of ranks.
        class_batch_size: class examples per forward and rank; as many as instance examples by default, 0 for
            none, and none if there are no class records.
        variants: cuts of each instance photo.
        class_variants: cuts of each class photo.

    Returns:
        [rank][forward] -> its examples, instance ones first.

    Raises:
        ValueError: a count is out of range.
    """
    if min(n_instance, batch_size, accumulate, world, variants, class_variants) < 1 or min(step, n_class) < 0:
        raise ValueError("counts start at 1; step and n_class at 0")
    per_class = batch_size if class_batch_size is None else class_batch_size
    per_class = per_class if n_class else 0
    forwards = accumulate * world
    n_step = forwards * batch_size
    instance = list(_walk(seed, step, Role.INSTANCE, n_instance, n_step, variants, 0))
    prior = list(_walk(seed, step, Role.CLASS, n_class, forwards * per_class, class_variants, n_step))

    def forward(rank: int, turn: int) -> MicroBatch:
        slot = turn * world + rank
        own = instance[slot * batch_size : (slot + 1) * batch_size]
        return (*own, *prior[slot * per_class : (slot + 1) * per_class])

    return tuple(tuple(forward(rank, turn) for turn in range(accumulate)) for rank in range(world))


def assemble(
    draws: Sequence[Draw],
    *,
    instance_records: Sequence[Record],
    class_records: Sequence[Record],
    latents: LatentIndex,
    conds: Mapping[str, Cond],
    collate: Callable[[Sequence[Cond]], Cond],
    prior_weight: float,
    seed: int,
    step: int,
) -> list[Batch]:
    """Batches of one forward's examples: one per latent shape, so a single one unless buckets are on.

    A record brings its own photo and its own caption; nothing is paired by position.

    Args:
        draws: of one rank and forward, from `plan_step`.
        instance_records: pool that INSTANCE draws index.
        class_records: pool that CLASS draws index: class images under the class prompt, or (distillation) the
            subject's own photos under the class prompt.
        latents: holds every record's photo.
        conds: caption -> unbatched conditioning, or tokens if the text encoder trains.
        collate: the family's.
        prior_weight: lambda, weight of class examples.
        seed: the run's.
        step: optimizer step.
    """
    groups: dict[tuple[int, ...], list[tuple[Draw, Record]]] = {}
    for draw in draws:
        pool = instance_records if draw.role is Role.INSTANCE else class_records
        record = pool[draw.record]
        shape = tuple(latents.of(record, draw.variant).moments.mean.shape)
        groups.setdefault(shape, []).append((draw, record))
    return [_batch(group, latents, conds, collate, prior_weight, seed, step) for group in groups.values()]


def sample_latents(moments: Moments, generator: torch.Generator) -> Tensor:
    """Mean + std * noise, [C,h,w] float32: a draw from the VAE's posterior."""
    noise = torch.randn(moments.mean.shape, generator=generator, dtype=torch.float32)
    return moments.mean + moments.std * noise


def _batch(
    group: Sequence[tuple[Draw, Record]],
    latents: LatentIndex,
    conds: Mapping[str, Cond],
    collate: Callable[[Sequence[Cond]], Cond],
    prior_weight: float,
    seed: int,
    step: int,
) -> Batch:
    cached = [latents.of(record, draw.variant) for draw, record in group]
    drawn = [
        sample_latents(each.moments, generator_for(seed, step, 0, "latent", draw.position))
        for each, (draw, _) in zip(cached, group, strict=True)
    ]
    is_instance = torch.tensor([draw.role is Role.INSTANCE for draw, _ in group])
    return Batch(
        latents=torch.stack(drawn),
        cond=collate([conds[record.caption] for _, record in group]),
        geometry=tuple(each.geometry for each in cached),
        weight=torch.where(is_instance, 1.0, prior_weight),
        is_instance=is_instance,
        record_ids=tuple(record_id(record) for _, record in group),
        positions=tuple(draw.position for draw, _ in group),
    )


def _walk(
    seed: int, step: int, role: Role, n_records: int, n_step: int, n_variants: int, first_position: int
) -> Iterator[Draw]:
    """The `n_step` draws of a step from an endless walk through one pool."""
    orders: dict[int, list[int]] = {}
    for slot in range(n_step):
        epoch, place = divmod(step * n_step + slot, n_records)
        if epoch not in orders:
            orders[epoch] = _permutation(n_records, generator_for(seed, 0, 0, f"order-{role}", epoch))
        record = orders[epoch][place]
        variant = 0
        if n_variants > 1:
            turn, within = divmod(epoch, n_variants)
            order = _permutation(n_variants, generator_for(seed, turn, 0, f"variant-{role}", record))
            variant = order[within]
        yield Draw(record, variant, role, first_position + slot)


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
