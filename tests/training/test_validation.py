"""The validation loss: what it is, of what, and that it leaves no trace on the training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import lorabooth
from lorabooth.adapters import inject
from lorabooth.data.batches import sample_latents
from lorabooth.data.cache import Store
from lorabooth.data.records import record_id
from lorabooth.errors import DataError, RecipeError
from lorabooth.objective.paths import FlowPath, NoisePath
from lorabooth.progress import Silent
from lorabooth.rng import generator_for, seed_for
from lorabooth.training.caching import Examples, cache_and_release
from lorabooth.training.class_images import class_examples
from lorabooth.training.compose import attach, compose
from lorabooth.training.loop import Session
from lorabooth.training.setting import Clock, Setting, open_setting
from lorabooth.training.studio import Studio
from lorabooth.training.validation import LEVELS, Validation, few, levels, validation_of
from lorabooth.types import Record, Role
from tests.training import runs
from tests.training.test_resume_matrix import content

VALIDATED = "run.validation_every=1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))


@dataclass(frozen=True)
class Composed:
    """A run up to its first step."""

    setting: Setting
    examples: Examples
    session: Session

    @property
    def validation(self) -> Validation:
        found = validation_of(self.setting, self.examples, self.session)
        assert found is not None
        return found


def composed(base: Path, photos: Path, cache: Path, *overrides: str) -> Composed:
    recipe = runs.recipe(base, photos, VALIDATED, *overrides)
    setting = open_setting(recipe, Clock(), Silent())
    store, accelerator = Store(cache), Accelerator()
    nobody: Any = None
    classes = class_examples(setting, Studio(nobody, nobody, nobody), store, Silent())
    examples, _ = cache_and_release(setting, classes.records, store, Silent())
    attached = attach(setting, accelerator.device, Silent())
    with torch.no_grad():  # an adapter that does something
        for number, weight in enumerate(attached.up_weights()):
            weight.copy_(torch.randn(weight.shape, generator=generator_for(number, 0, 0, "test")) * 0.05)
    session = compose(setting, examples, attached, accelerator=accelerator, reporter=Silent())
    return Composed(setting, examples, session)


def by_hand(one: Composed, records: list[Record], first: int) -> float:
    """Mean error over records and levels, one forward each; `first` is the place of the first record."""
    setting, path = one.setting, one.session.step_parts.path
    seed = seed_for(setting.recipe.run.seed, 0, 0, "validation")
    errors = []
    for module in setting.parts.components().values():
        module.eval()
    for place, record in enumerate(records, start=first):
        cached = one.examples.latents.of(record, 0)
        for number, level in enumerate(levels(path, seed)):
            position = place * LEVELS + number
            latents = sample_latents(cached.moments, generator_for(seed, 0, 0, "latent", position))[None]
            eps = torch.randn(latents.shape[1:], generator=generator_for(seed, 0, 0, "noise", position))[None]
            noised = path.noise(latents, eps, level[None])
            cond = setting.family.collate([one.examples.conds[record.caption]])
            if setting.recipe.adapter.text_encoder:
                cond = setting.family.encode_tokens(setting.parts, cond)
            target = noised.target
            arguments = (setting.parts, noised.x, noised.level, cond, [cached.geometry])
            with torch.no_grad():
                if record.role is Role.CLASS and setting.recipe.prior.mode == "distill":
                    with inject.disabled(setting.parts.components()):
                        target = setting.family.predict(*arguments)
                predicted = setting.family.predict(*arguments)
            errors.append(float((predicted - target).square().mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("mode", ["none", "images", "distill"])
def test_it_is_the_mean_over_photos_and_levels_of_each_term(
    tiny_sd: Path, photos: Path, tmp_path: Path, mode: str
) -> None:
    prior = {"images": [f"prior.images={photos}"], "distill": [], "none": []}[mode]
    more = ("adapter.dropout=0.5", "prior.weight=0.5", "run.validation_photos=1", "optim.batch_size=2")
    one = composed(tiny_sd, photos, tmp_path, f"prior.mode={mode}", *prior, *more)
    found = one.validation()
    held = one.examples.held_out
    own = [record for record in held if record.role is Role.INSTANCE]
    classes = [record for record in held if record.role is Role.CLASS]
    assert len(own) == 1
    assert found["val_loss_instance"] == pytest.approx(by_hand(one, own, 0), rel=1e-4)
    if mode == "none":
        assert set(found) == {"val_loss", "val_loss_instance"}
        assert found["val_loss"] == found["val_loss_instance"]
    else:
        assert len(classes) == 1
        assert found["val_loss_prior"] == pytest.approx(by_hand(one, classes, 1), rel=1e-4)
        total = found["val_loss_instance"] + 0.5 * found["val_loss_prior"]
        assert found["val_loss"] == pytest.approx(total)


def test_the_same_weights_give_the_same_bits_and_modes_and_random_numbers_stay(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    more = ("adapter.dropout=0.5", "adapter.text_encoder=true", "memory.checkpointing=true")
    one = composed(tiny_sd, photos, tmp_path, "prior.mode=distill", *more)
    modules = [m for part in one.setting.parts.components().values() for m in part.modules()]
    modes, state = [module.training for module in modules], torch.get_rng_state()
    assert any(modes)
    first, second = one.validation(), one.validation()
    assert first == second
    assert [module.training for module in modules] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in one.session.parameters)


def test_what_is_held_out_is_not_trained_on(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    one = composed(tiny_sd, photos, tmp_path, "prior.mode=distill", "run.validation_photos=1")
    trained = {
        name
        for step in range(12)
        for turn in one.session.batches(step)
        for b in turn
        for name in b.record_ids
    }
    held = {record_id(record) for record in one.examples.held_out}
    everything = {record_id(record) for record in one.setting.photos.records}
    last = record_id(one.setting.photos.records[-1])
    assert any(last in name for name in held)
    assert trained.isdisjoint(held)
    assert len(trained & everything) == len(everything) - 1
    validated = {name for chunk in one.validation.chunks for name in chunk.batch.record_ids}
    assert validated == held
    assert one.validation.facts() == {
        "photos": 1,
        "class_examples": 1,
        "levels": LEVELS,
        "held_out": True,
        "class_held_out": True,
    }


def test_nothing_held_out_changes_nothing(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    more = ("adapter.dropout=0.3", "run.keep=0", "optim.steps=4", "prior.count=2")
    runs.train(tiny_sd, photos, tmp_path / "off", *more)
    result = runs.train(tiny_sd, photos, tmp_path / "on", *more, "run.validation_every=2")
    off, on = runs.metrics(tmp_path / "off"), runs.metrics(tmp_path / "on")
    keys = {"val_loss", "val_loss_instance", "val_loss_prior"}
    assert [line["step"] for line in on if keys <= set(line)] == [2, 4]
    assert [{key: value for key, value in line.items() if key not in keys} for line in on] == off
    assert content(tmp_path / "off") == content(tmp_path / "on")
    facts = json.loads((result.out / "run.json").read_text("utf-8"))
    assert facts["validation"]["held_out"] is False
    page = result.report.read_text("utf-8")
    assert "3 photos (trained on: not held out) and 2 class examples (trained on: not held out)" in page
    assert ">validation<" in page, "the curve's legend"


def test_photos_that_are_held_out_must_leave_some(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run\.validation_photos = 3 leaves none of the 3 photo") as caught:
        runs.train(tiny_sd, photos, tmp_path / "run", VALIDATED, "run.validation_photos=3")
    assert "at most 2" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_how_often_may_change_and_on_what_may_not(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    out, few_steps = tmp_path / "run", ("prior.mode=none", "optim.steps=2")
    runs.train(tiny_sd, photos, out, *few_steps)
    with pytest.raises(RecipeError, match=r"run\.validation_photos: 0 there, 1 now"):
        runs.train(tiny_sd, photos, out, *few_steps, VALIDATED, "run.validation_photos=1")
    longer = runs.train(tiny_sd, photos, out, *few_steps[:1], "optim.steps=3", VALIDATED)
    assert longer.resumed_from == 2
    assert ["val_loss" in line for line in runs.metrics(out)] == [False, False, True]


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(sampling="uniform", shift=3.0)])
def test_levels_are_spread_as_training_draws_them(path: NoisePath) -> None:
    found = [float(level) for level in levels(path, 7)]
    drawn = sorted(float(path.sample_level(generator_for(1, 0, 0, "x", i))) for i in range(4000))
    assert found == sorted(found)
    for number, level in enumerate(found):
        share = sum(value < level for value in drawn) / len(drawn)
        assert share == pytest.approx((2 * number + 1) / (2 * LEVELS), abs=0.05)


def test_of_many_records_the_last_of_each_subject() -> None:
    many = [Record(Path(f"{i}.png"), "c", Role.CLASS, "ab"[i % 2]) for i in range(40)]
    assert [int(record.path.stem) for record in few(many)] == [32, 34, 36, 38, 33, 35, 37, 39]
    assert few([]) == ()


def test_a_recipe_can_be_read_back_with_all_of_it(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = runs.recipe(tiny_sd, photos, VALIDATED, "run.validation_photos=2", "run.select=prompt")
    (tmp_path / "r.toml").write_text(lorabooth.recipe.dump(recipe), encoding="utf-8")
    assert lorabooth.Recipe.from_toml(tmp_path / "r.toml") == recipe
