from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabooth.data.batches import Draw, assemble, plan_step, sample_latents
from lorabooth.data.cache import CachedLatent
from lorabooth.data.encode import LatentIndex
from lorabooth.data.records import record_id
from lorabooth.rng import generator_for
from lorabooth.types import Batch, Cond, FixedNoise, Geometry, Moments, PoolTuple, Record, Role


def flat(plan: Sequence[Sequence[Sequence[Draw]]]) -> list[Draw]:
    return sorted((draw for rank in plan for micro in rank for draw in micro), key=lambda draw: draw.position)


counts = st.integers(1, 4)


@given(
    seed=st.integers(0, 2**62),
    step=st.integers(0, 10_000),
    n_instance=st.integers(1, 9),
    n_class=st.integers(0, 30),
    batch_size=counts,
    accumulate=counts,
    world=counts,
    variants=st.integers(1, 8),
)
def test_the_examples_of_a_step_do_not_depend_on_how_it_is_split(
    seed: int,
    step: int,
    n_instance: int,
    n_class: int,
    batch_size: int,
    accumulate: int,
    world: int,
    variants: int,
) -> None:
    fixed = {"seed": seed, "step": step, "n_instance": n_instance, "n_class": n_class, "variants": variants}
    plan = plan_step(**fixed, batch_size=batch_size, accumulate=accumulate, world=world)
    assert len(plan) == world
    assert {len(rank) for rank in plan} == {accumulate}
    examples = batch_size * accumulate * world
    draws = flat(plan)
    assert draws == flat(plan_step(**fixed, batch_size=examples))
    assert draws == flat(plan_step(**fixed, batch_size=1, accumulate=examples))
    assert draws == flat(plan_step(**fixed, batch_size=1, world=examples))
    assert [draw.position for draw in draws] == list(range(2 * examples if n_class else examples))
    roles = [Role.INSTANCE] * examples + [Role.CLASS] * (examples if n_class else 0)
    assert [draw.role for draw in draws] == roles
    per_forward = {tuple(Counter(d.role for d in micro).items()) for rank in plan for micro in rank}
    assert len(per_forward) == 1
    assert all(0 <= draw.record < (n_instance if draw.role is Role.INSTANCE else n_class) for draw in draws)
    assert all(0 <= draw.variant < variants for draw in draws if draw.role is Role.INSTANCE)


def walk(steps: int, **options: int) -> list[Draw]:
    return [draw for step in range(steps) for draw in flat(plan_step(step=step, **options))]


def test_every_photo_is_seen_equally_often_and_every_class_image_once() -> None:
    draws = walk(100, seed=3, n_instance=5, n_class=200, batch_size=2)
    instance = Counter(draw.record for draw in draws if draw.role is Role.INSTANCE)
    prior = Counter(draw.record for draw in draws if draw.role is Role.CLASS)
    assert instance == dict.fromkeys(range(5), 40)
    assert prior == dict.fromkeys(range(200), 1)  # the whole pool, though there are 5 photos


def test_counts_differ_by_at_most_one_at_any_time() -> None:
    seen: Counter[int] = Counter(dict.fromkeys(range(7), 0))
    for draw in walk(40, seed=0, n_instance=7, n_class=0, batch_size=3):
        seen[draw.record] += 1
        assert max(seen.values()) - min(seen.values()) <= 1


def test_epochs_differ_and_so_do_seeds_and_the_two_walks() -> None:
    draws = walk(8, seed=0, n_instance=6, n_class=6, batch_size=6)
    own = [draw.record for draw in draws if draw.role is Role.INSTANCE]
    prior = [draw.record for draw in draws if draw.role is Role.CLASS]
    assert len({tuple(own[i : i + 6]) for i in range(0, 48, 6)}) > 5
    assert own != prior
    other = walk(8, seed=1, n_instance=6, n_class=6, batch_size=6)
    assert own != [draw.record for draw in other if draw.role is Role.INSTANCE]


def test_every_variant_of_every_photo_is_seen_equally_often() -> None:
    draws = walk(3 * 8 * 2, seed=0, n_instance=3, n_class=4, batch_size=1, variants=8, class_variants=2)
    own = Counter((draw.record, draw.variant) for draw in draws if draw.role is Role.INSTANCE)
    assert own == dict.fromkeys([(record, variant) for record in range(3) for variant in range(8)], 2)
    prior = Counter((draw.record, draw.variant) for draw in draws if draw.role is Role.CLASS)
    assert prior == dict.fromkeys([(record, variant) for record in range(4) for variant in range(2)], 6)


def test_a_step_is_a_function_of_seed_and_step() -> None:
    options = {"seed": 5, "n_instance": 4, "n_class": 9, "batch_size": 2, "accumulate": 3, "variants": 4}
    whole = [plan_step(step=step, **options) for step in range(12)]
    resumed = [plan_step(step=step, **options) for step in reversed(range(6, 12))]
    assert whole[6:] == resumed[::-1]


def test_class_examples_can_be_fewer_more_or_none() -> None:
    options = {"seed": 0, "step": 2, "n_instance": 3, "n_class": 9, "batch_size": 2}
    assert [draw.role for draw in flat(plan_step(**options, class_batch_size=0))] == [Role.INSTANCE] * 2
    more = flat(plan_step(**options, class_batch_size=3))
    assert [draw.position for draw in more if draw.role is Role.CLASS] == [2, 3, 4]
    # How many class examples there are never changes which photos are seen.
    assert more[:2] == flat(plan_step(**options, class_batch_size=0))


@pytest.mark.parametrize("wrong", [{"n_instance": 0}, {"batch_size": 0}, {"step": -1}, {"world": 0}])
def test_counts_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="counts"):
        plan_step(**{"seed": 0, "step": 0, "n_instance": 1, "n_class": 0, "batch_size": 1, **wrong})


# --- assemble -------------------------------------------------------------------------------------

SHAPES = ((2, 4, 4), (2, 4, 8))


def world_of(
    n_instance: int, n_class: int, variants: int, std: float = 0.0
) -> tuple[list[Record], list[Record], LatentIndex]:
    """Records, and latents whose value is the record's number plus a tenth of the variant's."""
    own = [Record(Path(f"dog/{n}.png"), f"{n}", Role.INSTANCE, "dog") for n in range(n_instance)]
    prior = [Record(Path(f"class/{n}.png"), f"{100 + n}", Role.CLASS, "dog") for n in range(n_class)]

    def cuts(number: int) -> tuple[CachedLatent, ...]:
        shape = SHAPES[number % 2]
        return tuple(
            CachedLatent(
                Moments(torch.full(shape, number + v / 10), torch.full(shape, std)),
                Geometry((number, number), (v, v), (shape[1], shape[2])),
            )
            for v in range(variants)
        )

    latents = {record.path: cuts(int(record.caption)) for record in (*own, *prior)}
    return own, prior, LatentIndex(latents, 0, 0)


def collate(conds: Sequence[Cond]) -> Cond:
    return {name: torch.stack([cond[name] for cond in conds]) for name in conds[0]}


def batches(
    draws: Sequence[Draw],
    own: Sequence[Record],
    prior: Sequence[Record],
    latents: LatentIndex,
    *,
    step: int = 0,
    seed: int = 0,
    prior_weight: float = 0.5,
) -> list[Batch]:
    captions = {record.caption for record in (*own, *prior)}
    conds = {caption: {"tokens": torch.full((3,), float(caption))} for caption in captions}
    return assemble(
        draws,
        instance_records=own,
        class_records=prior,
        latents=latents,
        conds=conds,
        collate=collate,
        prior_weight=prior_weight,
        seed=seed,
        step=step,
    )


@given(
    seed=st.integers(0, 2**62),
    step=st.integers(0, 1000),
    n_instance=st.integers(1, 7),
    n_class=st.integers(0, 12),
    batch_size=counts,
    accumulate=counts,
    world=st.integers(1, 2),
    variants=st.integers(1, 4),
)
def test_no_photo_ever_meets_another_photos_caption(
    seed: int,
    step: int,
    n_instance: int,
    n_class: int,
    batch_size: int,
    accumulate: int,
    world: int,
    variants: int,
) -> None:
    own, prior, latents = world_of(n_instance, n_class, variants)
    plan = plan_step(
        seed=seed,
        step=step,
        n_instance=n_instance,
        n_class=n_class,
        batch_size=batch_size,
        accumulate=accumulate,
        world=world,
        variants=variants,
        class_variants=variants,
    )
    positions = []
    for draws in (micro for rank in plan for micro in rank):
        of_position = {draw.position: draw for draw in draws}
        for batch in batches(draws, own, prior, latents, step=step, seed=seed):
            assert (
                len(
                    {
                        len(batch.geometry),
                        len(batch.record_ids),
                        len(batch.positions),
                        *batch.latents.shape[:1],
                    }
                )
                == 1
            )
            for b, position in enumerate(batch.positions):
                draw = of_position[position]
                record = (own if draw.role is Role.INSTANCE else prior)[draw.record]
                number = int(record.caption)
                assert batch.record_ids[b] == record_id(record)
                assert torch.all(batch.latents[b] == torch.tensor(number + draw.variant / 10))
                assert torch.all(batch.cond["tokens"][b] == number)
                assert batch.geometry[b].original_px == (number, number)
                assert batch.geometry[b].crop_px == (draw.variant, draw.variant)
                assert batch.geometry[b].target_px == tuple(batch.latents.shape[2:])
                assert bool(batch.is_instance[b]) is (draw.role is Role.INSTANCE)
                assert float(batch.weight[b]) == (1.0 if draw.role is Role.INSTANCE else 0.5)
            positions += batch.positions
    assert sorted(positions) == [draw.position for draw in flat(plan)]


def test_one_shape_gives_one_batch_with_both_roles() -> None:
    own, prior, latents = world_of(1, 1, 1)
    (micro,) = plan_step(seed=0, step=0, n_instance=1, n_class=1, batch_size=3)[0]
    (batch,) = batches(micro, own, prior, latents)
    assert batch.latents.shape == (6, *SHAPES[0])
    assert batch.latents.dtype == batch.weight.dtype == torch.float32
    assert batch.is_instance.tolist() == [True] * 3 + [False] * 3
    assert batch.weight.tolist() == [1.0] * 3 + [0.5] * 3


def test_latents_are_drawn_from_the_posterior_by_seed_step_and_position() -> None:
    own, prior, latents = world_of(4, 4, 1, std=2.0)
    options = {"seed": 9, "step": 3, "n_instance": 4, "n_class": 4}

    def drawn(step: int = 3, seed: int = 9, **split: int) -> dict[int, torch.Tensor]:
        plan = plan_step(**options, **split)
        found = [
            b for rank in plan for m in rank for b in batches(m, own, prior, latents, step=step, seed=seed)
        ]
        return {p: batch.latents[i] for batch in found for i, p in enumerate(batch.positions)}

    whole, split = drawn(batch_size=4), drawn(batch_size=1, accumulate=2, world=2)
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[position], split[position]) for position in whole)
    # Differences do not see the photo, only its noise.
    eps = [each.flatten()[0] - each.flatten()[1] for each in whole.values()]
    assert len({round(float(each), 4) for each in eps}) == len(eps)
    assert not torch.equal(whole[0], drawn(step=4, batch_size=4)[0])
    assert not torch.equal(whole[0], drawn(seed=8, batch_size=4)[0])


def test_the_posterior_has_its_mean_and_spread() -> None:
    moments = Moments(torch.full((1, 100, 100), 3.0), torch.full((1, 100, 100), 0.5))
    sample = sample_latents(moments, generator_for(0, 0, 0, "latent"))
    assert abs(float(sample.mean()) - 3) < 0.02
    assert abs(float(sample.std()) - 0.5) < 0.02


def test_distillation_uses_the_subjects_photos_under_the_class_prompt() -> None:
    own, _, latents = world_of(4, 0, 2)
    as_class = [Record(record.path, "100", Role.CLASS, "dog") for record in own]
    (micro,) = plan_step(seed=0, step=0, n_instance=4, n_class=4, batch_size=4, variants=2, class_variants=2)[
        0
    ]
    found = batches(micro, own, as_class, latents)
    for batch in found:
        for b in range(len(batch.positions)):
            number = batch.geometry[b].original_px[0]
            assert batch.record_ids[b] == f"dog/{number}.png"
            assert float(batch.latents[b].flatten()[0]) == pytest.approx(
                number + batch.geometry[b].crop_px[0] / 10
            )
            assert float(batch.cond["tokens"][b, 0]) == (number if batch.is_instance[b] else 100)


def test_lambda_zero_is_a_weight_like_any_other() -> None:
    own, prior, latents = world_of(1, 1, 1)
    (micro,) = plan_step(seed=0, step=0, n_instance=1, n_class=1, batch_size=1)[0]
    (batch,) = batches(micro, own, prior, latents, prior_weight=0.0)
    assert batch.weight.tolist() == [1.0, 0.0]


# ---- class examples in every so many steps, and fixed pools ----


@given(
    seed=st.integers(0, 2**62),
    step=st.integers(0, 1000),
    every=st.integers(1, 5),
    pool=st.integers(0, 4),
    class_pool=st.integers(0, 4),
    batch_size=counts,
    accumulate=counts,
    world=st.integers(1, 3),
)
def test_rare_class_examples_and_pools_do_not_depend_on_how_a_step_is_split(
    seed: int,
    step: int,
    every: int,
    pool: int,
    class_pool: int,
    batch_size: int,
    accumulate: int,
    world: int,
) -> None:
    fixed = {"seed": seed, "step": step, "n_instance": 3, "n_class": 5, "variants": 2, "class_every": every}
    fixed |= {"pool": pool, "class_pool": class_pool}
    examples = batch_size * accumulate * world
    draws = flat(plan_step(**fixed, batch_size=batch_size, accumulate=accumulate, world=world))
    assert draws == flat(plan_step(**fixed, batch_size=examples))
    roles = Counter(draw.role for draw in draws)
    assert roles[Role.INSTANCE] == examples
    assert roles[Role.CLASS] == (0 if step % every else examples)
    for draw in draws:
        slots = pool if draw.role is Role.INSTANCE else class_pool
        if slots:
            assert draw.slot is not None
            assert 0 <= draw.slot < slots
            assert draw.variant == (draw.slot % 2 if draw.role is Role.INSTANCE else 0)
        else:
            assert draw.slot is None


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_rare_class_examples_weigh_as_much_as_if_they_were_in_every_step(every: int) -> None:
    """Over any `every` steps the weights add up to lambda a step; the whole pool is walked all the same."""
    weight, steps = 0.5, 12 * every
    own, prior, latents = world_of(2, 6, 1)
    sums, seen = [], Counter()
    for step in range(steps):
        (micro,) = plan_step(seed=4, step=step, n_instance=2, n_class=6, batch_size=1, class_every=every)[0]
        total = 0.0
        for batch in batches(micro, own, prior, latents, step=step, prior_weight=weight * every):
            total += float(batch.weight[~batch.is_instance].sum())
            assert torch.all(batch.weight[batch.is_instance] == 1)
        sums.append(total)
        seen.update(draw.record for draw in micro if draw.role is Role.CLASS)
    for first in range(0, steps - every + 1):
        assert sum(sums[first : first + every]) == pytest.approx(weight * every)
    assert seen == dict.fromkeys(range(6), 2)


def test_photos_are_the_same_however_rare_class_examples_are() -> None:
    def photos(every: int) -> list[Draw]:
        options = {"seed": 1, "n_instance": 3, "n_class": 5, "batch_size": 2, "variants": 2}
        return [draw for draw in walk(9, **options, class_every=every) if draw.role is Role.INSTANCE]

    assert photos(1) == photos(2) == photos(9)


def test_every_tuple_of_a_pool_is_seen_equally_often() -> None:
    draws = walk(5 * 4 * 3, seed=0, n_instance=5, n_class=10, batch_size=1, pool=4, class_pool=3)
    own = Counter((draw.record, draw.slot) for draw in draws if draw.role is Role.INSTANCE)
    assert own == dict.fromkeys([(record, slot) for record in range(5) for slot in range(4)], 3)
    prior = Counter((draw.record, draw.slot) for draw in draws if draw.role is Role.CLASS)
    assert prior == dict.fromkeys([(record, slot) for record in range(10) for slot in range(3)], 2)


def test_a_batch_takes_latents_noise_and_stored_tensors_from_the_pool() -> None:
    own, prior, latents = world_of(1, 1, 1)
    (micro,) = plan_step(seed=0, step=0, n_instance=1, n_class=1, batch_size=1, class_pool=2)[0]
    shape = SHAPES[0]
    noise = FixedNoise(torch.full(shape, 3.0), torch.tensor(42))
    known = PoolTuple(torch.full(shape, 5.0), noise, {"target": torch.full(shape, 7.0)})
    (batch,) = assemble(
        micro,
        instance_records=own,
        class_records=prior,
        latents=latents,
        conds={record.caption: {"tokens": torch.zeros(3)} for record in (*own, *prior)},
        collate=collate,
        prior_weight=1.0,
        seed=0,
        step=0,
        tuples=lambda draw: known if draw.role is Role.CLASS else None,
    )
    assert batch.fixed == (None, noise)
    assert torch.all(batch.latents[1] == 5.0)
    assert not torch.any(batch.latents[0] == 5.0)
    assert batch.taught is not None
    assert torch.all(batch.taught[1] == 7.0)
    assert torch.all(batch.taught[0] == 0.0)
    assert "hollow" not in batch.cond
