"""From "auto" to values: every choice with its reason, so that a run can print and keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorabooth.families.base import Defaults, Source
from lorabooth.memory.facts import Device
from lorabooth.memory.quantise import KINDS
from lorabooth.prompts import class_prompt
from lorabooth.recipe import AdapterSection, OptimSection, PriorSection, Recipe, RunSection, SubjectSection


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

    @property
    def text(self) -> str:
        """The value, a list as TOML writes it."""
        return str(list(self.value) if isinstance(self.value, tuple) else self.value)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe without "auto", and what "auto" became."""

    recipe: Recipe
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class _Picker:
    """Takes what the user wrote, or a value for "auto", which it notes with its reason."""

    choices: list[Choice] = field(default_factory=list)

    def __call__(self, key: str, given: Any, value: Any, reason: str) -> Any:
        if given != "auto":
            return given
        self.choices.append(Choice(key, value, reason))
        return value


def resolve(
    recipe: Recipe,
    *,
    source: Source,
    defaults: Defaults,
    device: Device,
    find_token: Callable[[int], tuple[str, str]],
    hollow_keep: Callable[[], tuple[int, str]] | None = None,
) -> Resolved:
    """Replace every "auto" of a recipe.

    Args:
        recipe: as the user wrote it.
        source: the resolved base.
        defaults: the family's figures for this base.
        device: where training runs.
        find_token: subject's index -> (rare identifier, reason), looked up in the base's tokenizer.
        hollow_keep: (outer levels of the denoiser that stay, reason), for memory.hollow; None leaves "auto".

    Returns:
        The recipe with values (keys that mean nothing here stay "auto"), and the list of choices.
    """
    pick = _Picker()
    by_family = f"default of {source.family}"
    precision, why = native_precision(device)
    model = recipe.model.model_copy(
        update={
            "family": pick("model.family", recipe.model.family, source.family, "read from the base's files"),
            "dtype": pick("model.dtype", recipe.model.dtype, precision, why),
        }
    )
    subjects = _subjects(recipe.subjects, find_token, pick.choices)
    adapter, optim = _training(recipe, defaults, by_family, pick)
    drawn_in = _class_precision(recipe, model.dtype, defaults, device)
    prior = _prior(recipe.prior, subjects, defaults, by_family, drawn_in, pick)
    side_px, trained_at = defaults.resolution_px, "what the base was trained at"
    resolution = pick("images.resolution", recipe.images.resolution, side_px, trained_at)
    given = recipe.memory
    if given.base_precision in KINDS and precision == "fp32":
        precision, why = "bf16", f"as exact as a base in {given.base_precision} needs"
    compute = pick("memory.precision", recipe.memory.precision, precision, why)
    memory = given.model_copy(
        update={
            "precision": compute,
            "attention": pick("memory.attention", given.attention, "sdpa", "torch's own kernels"),
            "base_precision": pick(
                "memory.base_precision", given.base_precision, compute, "same as memory.precision"
            ),
        }
    )
    if given.hollow and hollow_keep is not None:
        keep, share = hollow_keep()
        found = pick("memory.hollow_keep", given.hollow_keep, keep, share)
        memory = memory.model_copy(update={"hollow_keep": found})
    update = {
        "model": model,
        "subjects": subjects,
        "prior": prior,
        "adapter": adapter,
        "optim": optim,
        "images": recipe.images.model_copy(update={"resolution": resolution}),
        "memory": memory,
        "run": _run(recipe, defaults, by_family, pick),
    }
    return Resolved(recipe.model_copy(update=update), tuple(pick.choices))


def sample_steps(recipe: Recipe, defaults: Defaults) -> tuple[int, str]:
    """Sampler steps of samples and evaluations, and why: a number given for class images is theirs too."""
    given, of_class_images = recipe.run.sample_steps, recipe.prior.sampler_steps
    if given != "auto":
        return given, "given"
    if of_class_images != "auto":
        return of_class_images, "same as prior.sampler_steps"
    return defaults.sampler_steps, "enough for DPM-Solver++"


def _run(recipe: Recipe, defaults: Defaults, by_family: str, pick: _Picker) -> RunSection:
    given = recipe.run
    steps, why = sample_steps(recipe, defaults)
    update = {
        "sample_steps": pick("run.sample_steps", given.sample_steps, steps, why),
        "sample_guidance": pick("run.sample_guidance", given.sample_guidance, defaults.guidance, by_family),
    }
    return given.model_copy(update=update)


def _training(
    recipe: Recipe, defaults: Defaults, by_family: str, pick: _Picker
) -> tuple[AdapterSection, OptimSection]:
    given, optim = recipe.adapter, recipe.optim
    rank = pick("adapter.rank", given.rank, defaults.rank, by_family)
    alpha = pick("adapter.alpha", given.alpha, float(rank), "alpha = rank: scale 1 in every reader")
    adapter_update = {"rank": rank, "alpha": alpha}
    optim_update = {
        "lr": pick("optim.lr", optim.lr, defaults.learning_rate, by_family),
        "steps": pick("optim.steps", optim.steps, defaults.steps, by_family),
    }
    if given.text_encoder:  # otherwise these keys mean nothing and stay "auto"
        adapter_update["text_encoder_rank"] = pick(
            "adapter.text_encoder_rank", given.text_encoder_rank, rank, "same as adapter.rank"
        )
        optim_update["text_encoder_lr"] = pick(
            "optim.text_encoder_lr", optim.text_encoder_lr, defaults.text_encoder_learning_rate, by_family
        )
    return given.model_copy(update=adapter_update), optim.model_copy(update=optim_update)


def _prior(
    given: PriorSection,
    subjects: Sequence[SubjectSection],
    defaults: Defaults,
    by_family: str,
    drawn_in: tuple[str, str],
    pick: _Picker,
) -> PriorSection:
    prompts = list(dict.fromkeys(class_prompt(subject.template, subject.noun) for subject in subjects))
    update = {
        "sampler_steps": pick(
            "prior.sampler_steps",
            given.sampler_steps,
            defaults.class_sampler_steps,
            "enough for DPM-Solver++",
        ),
        "guidance_interval": pick(
            "prior.guidance_interval", given.guidance_interval, defaults.class_guidance_interval, by_family
        ),
        "guidance": pick("prior.guidance", given.guidance, defaults.class_guidance, by_family),
        "dtype": pick("prior.dtype", given.dtype, *drawn_in),
    }
    if len(prompts) == 1:  # with several classes "auto" stays: each subject has its own class prompt
        update["prompt"] = pick("prior.prompt", given.prompt, prompts[0], "the template without the token")
    return given.model_copy(update=update)


def _class_precision(recipe: Recipe, loaded: str, defaults: Defaults, device: Device) -> tuple[str, str]:
    """What class images are drawn in, and why."""
    is_free = recipe.model.dtype == "auto" and not recipe.memory.stream
    if is_free and device.kind == "cpu" and device.bf16 and defaults.class_bf16:
        return "bf16", "native on this CPU"
    return loaded, "same as model.dtype"


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
