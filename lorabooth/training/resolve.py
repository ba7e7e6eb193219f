"""From "auto" to values: every choice with its reason, so that a run can print and keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorabooth.families.base import Defaults, Source
from lorabooth.memory.facts import Device
from lorabooth.prompts import class_prompt
from lorabooth.recipe import Recipe, SubjectSection


@dataclass(frozen=True, slots=True)
class Choice:
    """One value that "auto" stood for.

    Attributes:
        key: recipe key, e.g. "optim.lr".
        value: what was chosen, as it stands in the run's recipe.toml.
        reason: why, in a few words.
    """

    key: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe without "auto", and what "auto" became."""

    recipe: Recipe
    choices: tuple[Choice, ...]


def resolve(
    recipe: Recipe,
    *,
    source: Source,
    defaults: Defaults,
    device: Device,
    find_token: Callable[[int], tuple[str, str]],
) -> Resolved:
    """Replace every "auto" of a recipe.

    Args:
        recipe: as the user wrote it.
        source: the resolved base.
        defaults: the family's figures for this base.
        device: where training runs.
        find_token: subject's index -> (rare identifier, reason), looked up in the base's tokenizer.

    Returns:
        The recipe with values (keys that mean nothing here stay "auto"), and the list of choices.
    """
    choices: list[Choice] = []

    def pick(key: str, given: Any, value: Any, reason: str) -> Any:
        if given != "auto":
            return given
        choices.append(Choice(key, value, reason))
        return value

    by_family = f"default of {source.family}"
    model = recipe.model.model_copy(
        update={
            "family": pick("model.family", recipe.model.family, source.family, "read from the base's files"),
            "dtype": pick("model.dtype", recipe.model.dtype, *native_precision(device)),
        }
    )
    subjects = _subjects(recipe.subjects, find_token, choices)
    rank = pick("adapter.rank", recipe.adapter.rank, defaults.rank, by_family)
    adapter_update = {
        "rank": rank,
        "alpha": pick(
            "adapter.alpha", recipe.adapter.alpha, float(rank), "alpha = rank: scale 1 in every reader"
        ),
    }
    optim_update = {
        "lr": pick("optim.lr", recipe.optim.lr, defaults.learning_rate, by_family),
        "steps": pick("optim.steps", recipe.optim.steps, defaults.steps, by_family),
    }
    if recipe.adapter.text_encoder:  # otherwise these keys mean nothing and stay "auto"
        adapter_update["text_encoder_rank"] = pick(
            "adapter.text_encoder_rank", recipe.adapter.text_encoder_rank, rank, "same as adapter.rank"
        )
        optim_update["text_encoder_lr"] = pick(
            "optim.text_encoder_lr",
            recipe.optim.text_encoder_lr,
            defaults.text_encoder_learning_rate,
            by_family,
        )
    adapter = recipe.adapter.model_copy(update=adapter_update)
    optim = recipe.optim.model_copy(update=optim_update)
    first = subjects[0]
    prior_prompt = class_prompt(first.template, first.noun)
    prior = recipe.prior.model_copy(
        update={
            "prompt": "auto"
            if len({class_prompt(s.template, s.noun) for s in subjects}) > 1
            else pick("prior.prompt", recipe.prior.prompt, prior_prompt, "the template without the token"),
            "sampler_steps": pick(
                "prior.sampler_steps",
                recipe.prior.sampler_steps,
                defaults.sampler_steps,
                "enough for DPM-Solver++",
            ),
            "guidance": pick("prior.guidance", recipe.prior.guidance, defaults.guidance, by_family),
        }
    )
    images = recipe.images.model_copy(
        update={
            "resolution": pick(
                "images.resolution",
                recipe.images.resolution,
                defaults.resolution_px,
                "what the base was trained at",
            )
        }
    )
    precision = pick("memory.precision", recipe.memory.precision, *native_precision(device))
    memory = recipe.memory.model_copy(
        update={
            "precision": precision,
            "attention": pick("memory.attention", recipe.memory.attention, "sdpa", "torch's own kernels"),
            "base_precision": pick(
                "memory.base_precision", recipe.memory.base_precision, precision, "same as memory.precision"
            ),
        }
    )
    return Resolved(
        recipe.model_copy(
            update={
                "model": model,
                "subjects": subjects,
                "prior": prior,
                "adapter": adapter,
                "optim": optim,
                "images": images,
                "memory": memory,
            }
        ),
        tuple(choices),
    )


def native_precision(device: Device) -> tuple[str, str]:
    """The precision that suits a device, and why."""
    if device.kind == "cuda":
        return ("bf16", "native on this GPU") if device.bf16 else ("fp16", "this GPU has no native bf16")
    return "fp32", f"exact on {device.kind}"


def _subjects(
    subjects: Sequence[SubjectSection], find_token: Callable[[int], tuple[str, str]], choices: list[Choice]
) -> tuple[SubjectSection, ...]:
    done = []
    for index, subject in enumerate(subjects):
        if subject.token != "auto":
            done.append(subject)
            continue
        token, reason = find_token(index)
        choices.append(Choice(f"subjects[{index}].token", token, reason))
        done.append(subject.model_copy(update={"token": token}))
    return tuple(done)
