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

from lorabooth.data.cache import CachedLatent
from lorabooth.data.encode import LatentIndex
from lorabooth.data.records import record_id
from lorabooth.rng import generator_for
from lorabooth.types import Batch, Cond, Moments, PoolTuple, Record, Role


@dataclass(frozen=True, slots=True)
class Draw:
    """One example of a step.

    Attributes:
        record: index into the records of its role.
        variant: which cached cut of the photo.
        role: INSTANCE or CLASS.
        position: 0-based within the optimizer step, over ranks and accumulation; instance examples first.
        slot: which tuple of the record's fixed pool; None without a pool.
    """

    record: int
    variant: int
    role: Role
    position: int
    slot: int | None = None


MicroBatch: TypeAlias = tuple[Draw, ...]
Tuples: TypeAlias = Callable[[Draw], PoolTuple | None]
"""A draw -> its tuple of a fixed pool; None where it has none."""


class Orders:
    """The permutations in use: a step costs the same whether a pool has ten records or ten thousand."""

    def __init__(self) -> None:
        self._latest: dict[Role, dict[tuple[int, int, int], list[int]]] = {}

    def of(self, seed: int, role: Role, n_records: int, epoch: int) -> Sequence[int]:
        """The order in which an epoch walks through a pool: a function of the arguments."""
        key, known = (seed, n_records, epoch), self._latest.get(role, {})
        order = known.get(key)
        if order is None:
            order = _permutation(n_records, generator_for(seed, 0, 0, f"order-{role}", epoch))
            # A step may end one epoch and begin the next. A new table: another thread may read the old one.
            self._latest[role] = {**dict(list(known.items())[-1:]), key: order}
        return order


def no_tuples(draw: Draw) -> None:
    """There is no fixed pool: latents, noise and timesteps are drawn anew in every step."""


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
    class_every: int = 1,
    pool: int = 0,
    class_pool: int = 0,
    orders: Orders | None = None,
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
        class_every: class examples are only in steps 0, `class_every`, 2 `class_every` ...; multiply their
            weight by it, and over as many steps the gradient's expectation is what it was (before clipping).
        pool: tuples of each photo's fixed pool, walked as variants are; tuple i has cut i modulo `variants`.
            0 is no pool.
        class_pool: tuples of each class example's.
        orders: remembers permutations from step to step.

    Returns:
        [rank][forward] -> its examples, instance ones first.

    Raises:
        ValueError: a count is out of range.
    """
    at_least_1 = (n_instance, batch_size, accumulate, world, variants, class_variants, class_every)
    if min(at_least_1) < 1 or min(step, n_class, pool, class_pool) < 0:
        raise ValueError("counts start at 1; step, n_class and pools at 0")
    per_class = batch_size if class_batch_size is None else class_batch_size
    turn_of_class, rest = divmod(step, class_every)
    per_class = per_class if n_class and not rest else 0
    forwards = accumulate * world
    n_step = forwards * batch_size
    orders = orders or Orders()
    instance = list(_walk(seed, step, Role.INSTANCE, n_instance, n_step, variants, 0, pool, orders))
    prior = list(
        _walk(
            seed,
            turn_of_class,
            Role.CLASS,
            n_class,
            forwards * per_class,
            class_variants,
            n_step,
            class_pool,
            orders,
        )
    )

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
    tuples: Tuples = no_tuples,
) -> list[Batch]:
    """Batches of one forward's examples: one per latent shape, so a single one unless buckets are on.

    Class examples go through the denoiser in the same forward as the subject's. A record brings its own photo
    and its own caption; nothing is paired by position.

    Args:
        draws: of one rank and forward, from `plan_step`.
        instance_records: pool that INSTANCE draws index.
        class_records: pool that CLASS draws index: class images under the class prompt, or (distillation) the
            subject's own photos under the class prompt.
        latents: holds every record's photo.
        conds: caption -> unbatched conditioning, or tokens if the text encoder trains.
        collate: the family's.
        prior_weight: weight of class examples: lambda, times `class_every`.
        seed: the run's.
        step: optimizer step.
        tuples: the fixed pool's, if there is one.
    """
    groups: dict[tuple[int, ...], list[_Found]] = {}
    for draw in draws:
        pool = instance_records if draw.role is Role.INSTANCE else class_records
        record = pool[draw.record]
        cached = latents.of(record, draw.variant)
        groups.setdefault(tuple(cached.moments.mean.shape), []).append((draw, record, cached))
    return [_batch(group, conds, collate, prior_weight, seed, step, tuples) for group in groups.values()]


def sample_latents(moments: Moments, generator: torch.Generator) -> Tensor:
    """Mean + std * noise, [C,h,w] float32: a draw from the VAE's posterior."""
    noise = torch.randn(moments.mean.shape, generator=generator, dtype=torch.float32)
    return moments.mean + moments.std * noise


_Found: TypeAlias = tuple[Draw, Record, CachedLatent]
"""A draw, what it drew, and its latent."""


def _batch(
    group: Sequence[_Found],
    conds: Mapping[str, Cond],
    collate: Callable[[Sequence[Cond]], Cond],
    prior_weight: float,
    seed: int,
    step: int,
    tuples: Tuples,
) -> Batch:
    cached = [latent for _, _, latent in group]
    pooled = [tuples(draw) for draw, _, _ in group]
    drawn = [
        sample_latents(each.moments, generator_for(seed, step, 0, "latent", draw.position))
        if known is None
        else known.latents
        for each, known, (draw, _, _) in zip(cached, pooled, group, strict=True)
    ]
    is_instance = torch.tensor([draw.role is Role.INSTANCE for draw, _, _ in group])
    return Batch(
        latents=torch.stack(drawn),
        cond={**collate([conds[record.caption] for _, record, _ in group]), **_given(pooled)},
        geometry=tuple(each.geometry for each in cached),
        weight=torch.where(is_instance, 1.0, prior_weight),
        is_instance=is_instance,
        record_ids=tuple(record_id(record) for _, record, _ in group),
        positions=tuple(draw.position for draw, _, _ in group),
        fixed=tuple(None if known is None else known.noise for known in pooled) if any(pooled) else (),
        taught=_taught(pooled, drawn),
    )


def _given(pooled: Sequence[PoolTuple | None]) -> Cond:
    """The frozen activations of a hollowed denoiser: conditioning like the text's."""
    found = [known.stored["hollow"] for known in pooled if known is not None and "hollow" in known.stored]
    return {"hollow": torch.stack(found)} if found else {}


def _taught(pooled: Sequence[PoolTuple | None], latents: Sequence[Tensor]) -> Tensor | None:
    """Stored predictions, zeros where there is none; None if there is none at all."""
    found = [None if known is None else known.stored.get("target") for known in pooled]
    known = next((target for target in found if target is not None), None)
    if known is None:
        return None
    return torch.stack(
        [
            torch.zeros_like(own, dtype=known.dtype) if target is None else target
            for target, own in zip(found, latents, strict=True)
        ]
    )


def _walk(
    seed: int,
    step: int,
    role: Role,
    n_records: int,
    n_step: int,
    n_variants: int,
    first_position: int,
    pool: int,
    orders: Orders,
) -> Iterator[Draw]:
    """The `n_step` draws of a step from an endless walk through the records, and through what each has."""
    n_turns = pool or n_variants
    for slot in range(n_step):
        epoch, place = divmod(step * n_step + slot, n_records)
        record = orders.of(seed, role, n_records, epoch)[place]
        chosen = 0
        if n_turns > 1:
            turn, within = divmod(epoch, n_turns)
            order = _permutation(n_turns, generator_for(seed, turn, 0, f"variant-{role}", record))
            chosen = order[within]
        yield Draw(record, chosen % n_variants, role, first_position + slot, chosen if pool else None)


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
