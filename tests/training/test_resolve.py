"""What "auto" becomes: a value for every key that means something, each with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorabooth.families.base import Defaults, Source
from lorabooth.memory.facts import Device
from lorabooth.recipe import Recipe, from_mapping
from lorabooth.training.resolve import Resolved, resolve

DEFAULTS = Defaults(
    resolution_px=512,
    learning_rate=1e-4,
    text_encoder_learning_rate=5e-5,
    rank=16,
    steps=800,
    guidance=7.5,
    class_guidance=5.0,
    class_guidance_interval=(0.3, 5.5),
    sampler_steps=25,
    class_sampler_steps=15,
    class_bf16=True,
)
DEVICES = {
    "cpu": Device("cpu", "a processor", 2**34, 2**34, "", False),
    "bf16 cpu": Device("cpu", "a new processor", 2**34, 2**34, "", True),
    "new": Device("cuda", "a new card", 2**34, 2**34, "9.0", True),
    "old": Device("cuda", "an old card", 2**34, 2**34, "7.5", False),
}


def _resolve(recipe: Recipe, device: str = "cpu", defaults: Defaults = DEFAULTS) -> Resolved:
    return resolve(
        recipe,
        source=Source(Path("base"), "base", "sd1"),
        defaults=defaults,
        device=DEVICES[device],
        find_token=lambda index: (f"tok{index}", "rare"),
    )


def _recipe(*overrides: str, nouns: tuple[str, ...] = ("dog",)) -> Recipe:
    subjects = [{"images": f"photos/{noun}", "noun": noun} for noun in nouns]
    return from_mapping({"subjects": subjects}, overrides, "test")


def _value(recipe: Recipe, key: str) -> object:
    found: object = recipe
    for part in key.replace("[", ".").replace("]", "").split("."):
        found = found[int(part)] if isinstance(found, tuple) else getattr(found, part)
    return found


def test_every_choice_is_in_the_recipe_with_a_reason() -> None:
    resolved = _resolve(_recipe("adapter.text_encoder=true"))
    assert resolved.choices
    for choice in resolved.choices:
        assert _value(resolved.recipe, choice.key) == choice.value
        assert choice.reason
    assert resolved.recipe.adapter.alpha == resolved.recipe.adapter.rank == 16


def test_nothing_that_counts_stays_auto() -> None:
    recipe = _resolve(_recipe()).recipe
    left = [
        f"{name}.{key}"
        for name, section in recipe.model_dump().items()
        if isinstance(section, dict)
        for key, value in section.items()
        if value == "auto"
    ]
    means_nothing = ["adapter.text_encoder_rank", "optim.text_encoder_lr", "memory.hollow_keep"]
    chosen_when_it_runs = ["memory.checkpoint_blocks", "memory.budget", "memory.images_at_once"]
    measured_with = ["evaluation.dino", "evaluation.clip", "evaluation.lpips"]
    assert sorted(left) == sorted([*means_nothing, *chosen_when_it_runs, *measured_with, "run.out"])


def test_class_images_and_samples_have_a_guidance_of_their_own() -> None:
    recipe = _resolve(_recipe()).recipe
    assert (recipe.prior.guidance, recipe.run.sample_guidance) == (5.0, 7.5)
    recipe = _resolve(_recipe("prior.guidance=2", "run.sample_guidance=3")).recipe
    assert (recipe.prior.guidance, recipe.run.sample_guidance) == (2.0, 3.0)


def test_class_images_and_samples_have_steps_of_their_own() -> None:
    def steps(*overrides: str) -> tuple[object, object]:
        recipe = _resolve(_recipe(*overrides)).recipe
        return recipe.prior.sampler_steps, recipe.run.sample_steps

    assert steps() == (15, 25)
    assert steps("prior.sampler_steps=4") == (4, 4)
    assert steps("run.sample_steps=9") == (15, 9)
    assert steps("prior.sampler_steps=4", "run.sample_steps=9") == (4, 9)


def test_where_class_images_are_guided_is_the_familys_or_the_users() -> None:
    assert _resolve(_recipe()).recipe.prior.guidance_interval == (0.3, 5.5)
    assert _resolve(_recipe("prior.guidance_interval=[]")).recipe.prior.guidance_interval == ()
    assert _resolve(_recipe("prior.guidance_interval=[1, 2]")).recipe.prior.guidance_interval == (1.0, 2.0)


@pytest.mark.parametrize(
    ("device", "overrides", "expected"),
    [
        ("cpu", (), "fp32"),
        ("bf16 cpu", (), "bf16"),
        ("bf16 cpu", ("model.dtype=fp32",), "fp32"),
        ("bf16 cpu", ("prior.dtype=fp32",), "fp32"),
        ("bf16 cpu", ("memory.stream=true", "memory.checkpointing=true"), "fp32"),
        ("cpu", ("prior.dtype=bf16",), "bf16"),
        ("new", (), "bf16"),
        ("old", (), "fp16"),
        ("new", ("model.dtype=fp32",), "fp32"),
    ],
)
def test_class_images_are_drawn_as_the_base_is_held_or_in_a_processors_bf16(
    device: str, overrides: tuple[str, ...], expected: str
) -> None:
    recipe = _resolve(_recipe(*overrides), device).recipe
    assert recipe.prior.dtype == expected
    if "cpu" in device:
        assert (recipe.model.dtype, recipe.memory.precision) == ("fp32", "fp32")


def test_a_base_that_gains_nothing_from_bf16_draws_as_it_is_held() -> None:
    small = replace(DEFAULTS, class_bf16=False)
    assert _resolve(_recipe(), "bf16 cpu", small).recipe.prior.dtype == "fp32"


def test_what_the_user_wrote_stays() -> None:
    resolved = _resolve(_recipe("optim.lr=3e-4", "adapter.rank=4", "subjects.0.token=zwx"))
    assert resolved.recipe.optim.lr == 3e-4
    assert (resolved.recipe.adapter.rank, resolved.recipe.adapter.alpha) == (4, 4.0)
    assert not {"optim.lr", "adapter.rank", "subjects[0].token"} & {c.key for c in resolved.choices}


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("new", "bf16"), ("old", "fp16")])
def test_precision_follows_the_device(device: str, precision: str) -> None:
    recipe = _resolve(_recipe(), device).recipe
    assert {recipe.model.dtype, recipe.memory.precision, recipe.memory.base_precision} == {precision}


def test_several_classes_keep_their_own_prompts() -> None:
    resolved = _resolve(_recipe(nouns=("dog", "mug")))
    assert resolved.recipe.prior.prompt == "auto"
    assert [subject.token for subject in resolved.recipe.subjects] == ["tok0", "tok1"]
    assert _resolve(_recipe()).recipe.prior.prompt == "a photo of a dog"


def test_resolving_again_changes_nothing() -> None:
    once = _resolve(_recipe("adapter.text_encoder=true")).recipe
    assert _resolve(once).recipe == once
