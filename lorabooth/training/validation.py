"""A validation loss on fixed examples, noise and timesteps: comparable from step to step, unlike the loss.

Of the subject and of the class apart: the one says when the photos are learned by heart, the other how far
the class has moved. Its photos and class images are those that `run.validation_photos` keeps from training;
with 0 there it is computed on what is trained on, and then says less: it goes on falling while the subject is
learned by heart. In mode "distill" the class term is the distance from what the frozen base predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorabooth.adapters import inject
from lorabooth.data.batches import Draw, assemble
from lorabooth.objective.paths import NoisePath
from lorabooth.recipe import Recipe
from lorabooth.rng import generator_for, seed_for
from lorabooth.training.caching import Examples
from lorabooth.training.loop import Session
from lorabooth.training.prefetch import Ready
from lorabooth.training.setting import Setting
from lorabooth.training.step import StepParts, class_rows, distill_targets, draw_noise, micro_step
from lorabooth.types import Record, Role

LEVELS = 4
"""Timesteps of each example: the middles of as many equally likely parts of those that training draws."""
MOST_RECORDS = 8
"""Photos, and class examples, that are looked at."""
_DRAWS = 512


@dataclass(frozen=True)
class Validation:
    """Computes the losses of the present weights; leaves no trace on the run.

    Attributes:
        parts: the step's functions.
        chunks: the examples with noise and timesteps, as many at once as a training forward has.
        modules: what is put into eval mode meanwhile.
        around: context of the forward passes.
        device: where the denoiser is.
        photos: photos among the examples.
        classes: class examples among them.
        held_out: the photos are kept from training.
        classes_held_out: the class examples are.
    """

    parts: StepParts
    chunks: tuple[Ready, ...]
    modules: tuple[nn.Module, ...]
    around: Callable[[], AbstractContextManager[None]]
    device: torch.device
    photos: int
    classes: int
    held_out: bool
    classes_held_out: bool

    def __call__(self) -> dict[str, float]:
        """Figures "val_loss", "val_loss_instance", and "val_loss_prior" if there are class examples."""
        sums = torch.zeros(3, device=self.device)
        with ExitStack() as inside:
            inside.enter_context(torch.no_grad())
            inside.enter_context(_evaluating(self.modules))
            for chunk in self.chunks:
                ready = chunk.on(self.device)
                with self.around():
                    terms = micro_step(
                        self.parts,
                        ready.batch,
                        ready.eps,
                        ready.level,
                        class_rows=ready.class_rows,
                        n_instance=self.photos * LEVELS,
                        n_class=self.classes * LEVELS,
                    )
                sums += torch.stack([terms.total, terms.instance, terms.prior])
        total, instance, prior = sums.tolist()
        found = {"val_loss": total, "val_loss_instance": instance}
        return {**found, "val_loss_prior": prior} if self.classes else found

    def facts(self) -> dict[str, object]:
        """For run.json."""
        return {
            "photos": self.photos,
            "class_examples": self.classes,
            "levels": LEVELS,
            "held_out": self.held_out,
            "class_held_out": self.classes_held_out,
        }


def validation_of(setting: Setting, examples: Examples, session: Session) -> Validation | None:
    """What a run validates with; None if its recipe wants none.

    Args:
        setting: the run's.
        examples: encoded; what is held out is not trained on.
        session: composed.
    """
    recipe = setting.recipe
    if not recipe.run.validation_every:
        return None
    held = {role: [one for one in examples.held_out if one.role is role] for role in Role}
    instance = few(held[Role.INSTANCE] or examples.instance)
    classes = few(held[Role.CLASS] or examples.classes)
    components = setting.parts.components()
    parts = session.step_parts
    if recipe.prior.mode == "distill":
        # Stored targets, where training has them, are of other noise.
        targets = distill_targets(parts.predict, parts.condition, lambda: inject.disabled(components))
        parts = replace(parts, targets=targets)
    return Validation(
        parts=parts,
        chunks=tuple(_chunks(setting, examples, instance, classes)),
        modules=tuple(components.values()),
        around=_around(recipe, session),
        device=session.accelerator.device,
        photos=len(instance),
        classes=len(classes),
        held_out=bool(held[Role.INSTANCE]),
        classes_held_out=bool(held[Role.CLASS]),
    )


def few(records: Sequence[Record]) -> tuple[Record, ...]:
    """At most `MOST_RECORDS`, the last of each subject."""
    names = list(dict.fromkeys(record.subject for record in records))
    each = max(1, MOST_RECORDS // max(1, len(names)))
    return tuple(record for name in names for record in [r for r in records if r.subject == name][-each:])


def levels(path: NoisePath, seed: int) -> list[torch.Tensor]:
    """The fixed timesteps: middles of `LEVELS` equally likely parts of what training draws from.

    Args:
        path: on the CPU.
        seed: of the draws that show where these parts are.
    """
    drawn = [path.sample_level(generator_for(seed, 0, 0, "validation-level", i)) for i in range(_DRAWS)]
    ordered = sorted(drawn, key=float)
    return [ordered[(2 * part + 1) * _DRAWS // (2 * LEVELS)] for part in range(LEVELS)]


def _chunks(
    setting: Setting, examples: Examples, instance: Sequence[Record], classes: Sequence[Record]
) -> Iterator[Ready]:
    """Every record at every level, the subject's first; noise is a function of (seed, place)."""
    recipe, family = setting.recipe, setting.family
    path = family.noise_path(setting.parts)
    seed = seed_for(recipe.run.seed, 0, 0, "validation")
    fixed = levels(path, seed)
    both = ((Role.INSTANCE, instance), (Role.CLASS, classes))
    rows = [(role, index) for role, some in both for index in range(len(some))]
    draws = [
        Draw(record=index, variant=0, role=role, position=place * LEVELS + number)
        for place, (role, index) in enumerate(rows)
        for number in range(LEVELS)
    ]
    size = recipe.optim.batch_size * (2 if classes else 1)
    for first in range(0, len(draws), size):
        batches = assemble(
            draws[first : first + size],
            instance_records=instance,
            class_records=classes,
            latents=examples.latents,
            conds=examples.conds,
            collate=family.collate,
            prior_weight=recipe.prior.weight,
            seed=seed,
            step=0,
        )
        for batch in batches:
            eps, _ = draw_noise(path, seed, 0, batch.positions, batch.latents.shape[1:])
            level = torch.stack([fixed[place % LEVELS] for place in batch.positions])
            yield Ready(batch, eps, level, class_rows(batch))


def _around(recipe: Recipe, session: Session) -> Callable[[], AbstractContextManager[None]]:
    """The precision of training; blocks that are compiled for its shapes and gradients run as they are."""

    @contextmanager
    def around() -> Iterator[None]:
        eager: AbstractContextManager[Any] = nullcontext()
        if recipe.speed.compile != "off":
            eager = torch.compiler.set_stance("force_eager")
        with session.autocast(), eager:
            yield

    return around


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout; every module gets its own mode back."""
    modes = [(module, module.training) for whole in modules for module in whole.modules()]
    for whole in modules:
        whole.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
