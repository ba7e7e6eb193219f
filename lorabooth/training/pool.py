"""Fixed pools: what the frozen base makes of an example is computed once, before training, and kept on disk.

Two techniques live on it. With `prior.pool` every class example of mode "distill" has so many noises and
timesteps, and the teacher's predictions for them are stored: a step needs no second forward pass. With
`memory.hollow` photos and class examples have pools, and the activations that the deep middle of the U-Net
sends up are stored, so that it can leave memory.

Which tuple a step draws is a function of (seed, step), and what a tuple holds one of (seed, record, slot): so
only what the run will draw is computed, and resuming needs no state. Entries are found by their content, each
is computed alone, and one that is there already is not computed again.

Legend of shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabooth import durable
from lorabooth.adapters import inject, tree
from lorabooth.data.batches import Draw, MicroBatch, Tuples, no_tuples, plan_step, sample_latents
from lorabooth.data.cache import Store, pool_key
from lorabooth.data.images import variants
from lorabooth.data.records import record_id
from lorabooth.errors import TrainingError
from lorabooth.families.release import Released, assert_released
from lorabooth.families.source import weights_digest
from lorabooth.memory import apply, hollow
from lorabooth.objective.paths import NoisePath
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.rng import generator_for
from lorabooth.training.caching import Examples
from lorabooth.training.setting import Setting
from lorabooth.types import Cond, FixedNoise, Geometry, PoolTuple, Record, Role

_FORMAT_VERSION = 1
"""Part of every key: raised when the same facts would give other numbers."""
_KIND = "pool"

_Slot = tuple[Role, int, int]
"""(role, record, slot) of a tuple."""


@dataclass(frozen=True)
class Pool:
    """A run's fixed pool.

    Attributes:
        per_photo: tuples of each photo; 0 without a pool.
        per_class: tuples of each class example; 0 without a pool.
        tuples: a draw's tuple, its tensors read from disk.
        facts: for run.json; empty without a pool.
    """

    per_photo: int = 0
    per_class: int = 0
    tuples: Tuples = no_tuples
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


def sizes(recipe: Recipe) -> tuple[int, int]:
    """Tuples of each photo and of each class example; 0 is no pool."""
    if recipe.memory.hollow:
        return recipe.memory.hollow_pool, recipe.memory.hollow_pool
    return 0, recipe.prior.pool


def plan_of(recipe: Recipe, examples: Examples, world: int, step: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """The examples of one optimizer step, [rank][forward], as the recipe has them drawn."""
    cuts = len(variants(recipe.images))
    per_photo, per_class = sizes(recipe)
    return plan_step(
        seed=recipe.run.seed,
        step=step,
        n_instance=len(examples.instance),
        n_class=len(examples.classes),
        batch_size=recipe.optim.batch_size,
        accumulate=recipe.optim.accumulate,
        world=world,
        variants=cuts,
        class_variants=cuts if recipe.prior.mode == "distill" else 1,
        class_every=recipe.prior.every,
        pool=per_photo,
        class_pool=per_class,
        orders=examples.orders,
    )


def prepare(
    setting: Setting,
    examples: Examples,
    *,
    device: torch.device,
    world: int,
    store: Store,
    reporter: Reporter,
) -> Pool:
    """Compute what the run's fixed pool lacks, if it has one; the base is whole, and the adapter is off.

    Args:
        setting: its denoiser is on the device, held as in training, the adapter attached.
        examples: encoded.
        device: where the denoiser is.
        world: number of processes.
        store: where entries are kept.
        reporter: hears of the progress.

    Raises:
        TrainingError: the disk is full, or an activation is not finite.
        RecipeError: the store cannot be written.
    """
    recipe = setting.recipe
    per_photo, per_class = sizes(recipe)
    if not per_photo and not (per_class and examples.classes):
        return Pool()
    steps = int(recipe.optim.steps)
    most = per_photo * len(examples.instance) + per_class * len(examples.classes)
    draws = _drawn(lambda step: plan_of(recipe, examples, world, step), steps, most)
    makes = _Makes(recipe.run.seed, setting.family.noise_path(setting.parts), examples)
    base = _frozen_base(setting, examples, device)
    paths: dict[_Slot, Path] = {}
    stored_bytes = computed = 0
    with reporter.task("Computing the pool", len(draws), "tuple") as task:
        for slot, draw in draws.items():
            key, compute = base.job(makes.record(draw), draw, *makes.inputs(draw))
            entry = store.tensors(_KIND, key, reporter)
            if entry is None:
                entry = compute()
                size = _bytes(entry)
                # Of what is left, as if all of it were missing: it is told at the first, not in the middle.
                if not computed:
                    durable.require_space(store.root, (len(draws) - len(paths)) * size)
                store.put_tensors(_KIND, key, entry)
                computed += 1
            stored_bytes += _bytes(entry)
            paths[slot] = store.path(_KIND, key)
            task.advance()
    reporter.say(
        f"pool: {computed} tuples computed, {len(draws) - computed} from the cache; "
        f"{stored_bytes / 2**20:.1f} MiB on disk"
    )
    facts = {"tuples": len(draws), "computed": computed, "bytes": stored_bytes}
    return Pool(per_photo, per_class, _Reader(makes, paths), MappingProxyType(facts))


def hollow_out(setting: Setting, attached: inject.Attached, reporter: Reporter) -> dict[str, object]:
    """Let the deep middle of the denoiser go, if the recipe says so, and prove that its memory is free.

    Returns:
        Facts for run.json; empty if nothing was done.
    """
    recipe, denoiser = setting.recipe, setting.parts.denoiser
    if not recipe.memory.hollow:
        return {}
    keep = hollow.keep_of(denoiser, recipe.memory.hollow_keep)
    patterns = [re.compile(pattern) for pattern in setting.family.targets[recipe.adapter.targets]]
    named = sum(
        any(pattern.fullmatch(path) for pattern in patterns) for path in tree.adaptable(denoiser, "denoiser")
    )
    gone = hollow.hollow_out(denoiser, keep)
    assert_released(Released(("deep middle",), gone.removed_bytes, gone.modules, gone.tensors))
    share = gone.removed_parameters / (gone.removed_parameters + gone.kept_parameters)
    reporter.say(
        f"memory.hollow: the deep middle left memory, {gone.removed_bytes / 2**20:.1f} MiB ({share:.0%} of "
        f"the denoiser); {attached.n_modules} of {named} modules train, those of the outer {keep} level(s)"
    )
    return {
        "keep": keep,
        "removed_parameters": gone.removed_parameters,
        "removed_bytes": gone.removed_bytes,
        "kept_parameters": gone.kept_parameters,
    }


@dataclass(frozen=True)
class _Makes:
    """Latents, noise and timestep of every tuple: functions of (seed, record, slot)."""

    seed: int
    path: NoisePath
    examples: Examples

    def record(self, draw: Draw) -> Record:
        pool = self.examples.instance if draw.role is Role.INSTANCE else self.examples.classes
        return pool[draw.record]

    def inputs(self, draw: Draw) -> tuple[Tensor, FixedNoise]:
        """(latents [C,h,w], noise)."""
        moments = self.examples.latents.of(self.record(draw), draw.variant).moments

        def generator(purpose: str) -> torch.Generator:
            return generator_for(self.seed, 0, 0, f"pool-{draw.role}-{draw.record}-{purpose}", draw.slot or 0)

        eps = torch.randn(moments.mean.shape, generator=generator("noise"))
        noise = FixedNoise(eps, self.path.sample_level(generator("level")))
        return sample_latents(moments, generator("latent")), noise


@dataclass(frozen=True)
class _Base:
    """The frozen base, which computes tuples.

    Attributes:
        setting: the run's.
        examples: encoded.
        device: where the denoiser is.
        precision: that the run asks for.
        path: on the CPU.
        keep: outer levels that will stay; None where the denoiser stays whole.
        facts: what identifies the base and how it is run.
    """

    setting: Setting
    examples: Examples
    device: torch.device
    precision: apply.Precision
    path: NoisePath
    keep: int | None
    facts: Mapping[str, object]

    def job(
        self, record: Record, draw: Draw, latents: Tensor, noise: FixedNoise
    ) -> tuple[str, Callable[[], dict[str, Tensor]]]:
        """The key of a tuple, and what computes its tensors (on the CPU)."""
        has_target = draw.role is Role.CLASS and self.setting.recipe.prior.mode == "distill"
        x = self.path.noise(latents[None], noise.eps[None], noise.level[None]).x
        cond = self.setting.family.collate([self.examples.conds[record.caption]])
        geometry = self.examples.latents.of(record, draw.variant).geometry
        inputs = {"x": x, "level": noise.level[None], **cond}
        facts = {**self.facts, "target": has_target, "geometry": asdict(geometry)}

        def compute() -> dict[str, Tensor]:
            entry = self._run(x, noise.level[None], cond, geometry, has_target=has_target)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in entry.values()):
                raise TrainingError(
                    f"what the base computes for {record_id(record)} at timestep {float(noise.level):g} is "
                    f"not finite in {self.facts['compute']}.",
                    'Set memory.precision = "bf16" or "fp32".',
                )
            return entry

        return pool_key(inputs, facts), compute

    def _run(
        self, x: Tensor, level: Tensor, cond: Cond, geometry: Geometry, *, has_target: bool
    ) -> dict[str, Tensor]:
        setting, denoiser = self.setting, self.setting.parts.denoiser
        moved = {name: tensor.to(self.device) for name, tensor in cond.items()}
        out: dict[str, Tensor] = {}
        capturing: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.keep is not None:
            capturing = hollow.capture(denoiser, self.keep, to_the_end=has_target)
        with (
            torch.no_grad(),
            inject.disabled(setting.parts.components()),
            self.precision.autocast(self.device),
            capturing as seen,
        ):
            if setting.recipe.adapter.text_encoder:
                moved = dict(setting.family.encode_tokens(setting.parts, moved))
            with suppress(hollow.CapturedError):
                predicted = setting.family.predict(
                    setting.parts, x.to(self.device), level.to(self.device), moved, [geometry]
                )
                if has_target:
                    out["target"] = predicted[0].cpu()
        if seen:
            out["hollow"] = seen[0][0].to("cpu", self.precision.compute)
        return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def _frozen_base(setting: Setting, examples: Examples, device: torch.device) -> _Base:
    recipe, parts = setting.recipe, setting.parts
    precision = apply.precision(recipe.memory, device)
    keep = hollow.keep_of(parts.denoiser, recipe.memory.hollow_keep) if recipe.memory.hollow else None
    facts = {
        "version": _FORMAT_VERSION,
        "denoiser": parts.source.sha256,
        "text": weights_digest(parts.source, "text_encoder") if recipe.adapter.text_encoder else None,
        "compute": apply.NAMES[precision.compute],
        "base": recipe.memory.base_precision,
        "device": device.type,
        "keep": keep,
    }
    return _Base(setting, examples, device, precision, setting.family.noise_path(parts), keep, facts)


@dataclass(frozen=True)
class _Reader:
    """Gives a draw its tuple; nothing but the paths is in memory."""

    makes: _Makes
    paths: Mapping[_Slot, Path]

    def __call__(self, draw: Draw) -> PoolTuple | None:
        if draw.slot is None:
            return None
        path = self.paths[draw.role, draw.record, draw.slot]
        latents, noise = self.makes.inputs(draw)
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"a stored tuple of the pool cannot be read any more: {path}: {error}",
                "The same command computes it again and goes on from the last checkpoint.",
            ) from error
        return PoolTuple(latents, noise, stored)


def _drawn(plan: Callable[[int], Sequence[Sequence[MicroBatch]]], steps: int, most: int) -> dict[_Slot, Draw]:
    """The tuples that a run of so many steps draws, in the order in which they are first drawn."""
    found: dict[_Slot, Draw] = {}
    for step in range(steps):
        for draw in (draw for rank in plan(step) for forward in rank for draw in forward):
            if draw.slot is not None:
                found.setdefault((draw.role, draw.record, draw.slot), draw)
        if len(found) == most:
            break
    return found


def _bytes(entry: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())
