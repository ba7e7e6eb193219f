"""Stored tuples: a step that reads them is the step that would have computed them, however a run is cut."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import lorabooth
from lorabooth.adapters import inject
from lorabooth.data.cache import Store
from lorabooth.errors import RecipeError, TrainingError
from lorabooth.evaluation.apply import load_adapter
from lorabooth.evaluation.generate import generate
from lorabooth.families import registry, source
from lorabooth.progress import Silent
from lorabooth.recipe import Recipe, fingerprint
from lorabooth.training import pool as pools
from lorabooth.training.caching import Examples, cache_and_release
from lorabooth.training.class_images import class_examples
from lorabooth.training.compose import Draws, attach, compose
from lorabooth.training.loop import Session
from lorabooth.training.setting import Clock, Setting, open_setting
from lorabooth.training.step import class_rows, distill_targets, micro_step, noise_of
from lorabooth.training.studio import Studio
from lorabooth.types import Role
from tests.training import runs
from tests.training.test_resume_matrix import CrashError, Interrupting

DISTILL_POOL = ("prior.mode=distill", "prior.pool=3")
HOLLOW = ("memory.hollow=true", "memory.hollow_pool=3")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LORABOOTH_CACHE", str(folder))
    return folder


def _no_studio() -> Studio:
    def never(*args: object, **options: object) -> list:
        raise AssertionError("nothing is drawn here")

    return Studio(generate=never, draw_grid=never, file_name=never)


class Composed:
    """A run up to its first step."""

    def __init__(self, base: Path, photos: Path, cache: Path, *overrides: str) -> None:
        self.setting: Setting = open_setting(runs.recipe(base, photos, *overrides), Clock(), Silent())
        store = Store(cache)
        classes = class_examples(self.setting, _no_studio(), store, Silent())
        self.examples: Examples = cache_and_release(self.setting, classes.records, store, Silent())[0]
        self.attached = attach(self.setting, CPU, Silent())
        self.pool = pools.prepare(
            self.setting, self.examples, device=CPU, world=1, store=store, reporter=Silent()
        )
        self.hollow = pools.hollow_out(self.setting, self.attached, Silent())
        self.session: Session = compose(
            self.setting,
            self.examples,
            self.attached,
            accelerator=Accelerator(),
            reporter=Silent(),
            pool=self.pool,
        )

    def stir(self) -> None:
        """Give the adapter an effect."""
        with torch.no_grad():
            for index, weight in enumerate(self.attached.up_weights()):
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(index))


def _entries(cache: Path) -> list[Path]:
    return sorted((cache / "pool").rglob("*.safetensors"))


def _adapter(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()


def _facts(out: Path) -> dict:
    return json.loads((out / "run.json").read_text("utf-8"))


# ---- the stored targets of `distill` ----


@pytest.mark.parametrize("text", [False, True], ids=["cached text", "trained text"])
@pytest.mark.parametrize("mode", ["prior.pool", "hollow"])
def test_a_stored_target_is_what_the_teacher_would_say(
    tiny_sd: Path, photos: Path, cache: Path, mode: str, text: bool
) -> None:
    if mode == "hollow" and text:
        pytest.skip("a contradiction, see the rules")
    flags = ("images.flip=true", f"adapter.text_encoder={str(text).lower()}")
    more = DISTILL_POOL if mode == "prior.pool" else ("prior.mode=distill", *HOLLOW)
    one = Composed(tiny_sd, photos, cache, *more, *flags)
    whole = open_setting(one.setting.recipe, Clock(), Silent())
    attached = attach(whole, CPU, Silent()) if mode == "prior.pool" else None
    one.stir()
    if attached is not None:
        inject.write(
            whole.parts.components(), "lorabooth", inject.tensors(one.setting.parts.components(), "lorabooth")
        )
    family = whole.family

    def predict(x, level, cond, geometry):
        return family.predict(whole.parts, x, level, cond, geometry)

    def condition(cond):
        return family.encode_tokens(whole.parts, cond) if text else cond

    taught = distill_targets(predict, condition, lambda: inject.disabled(whole.parts.components()))
    parts = one.session.step_parts
    for step in range(3):
        (batch,) = one.session.batches(step)[0]
        rows = class_rows(batch)
        eps, level = noise_of(parts.path, batch, one.session.seed, step)
        noised = parts.path.noise(batch.latents, eps, level)
        stored = parts.targets(batch, noised, rows)
        assert torch.equal(stored, taught(batch, noised, rows))
        assert torch.equal(stored[0], noised.target[0]), "the subject's is the path's own"
        assert not torch.allclose(stored[-1], noised.target[-1], atol=1e-2)


def test_a_step_runs_the_denoiser_once(tiny_sd: Path, photos: Path, cache: Path) -> None:
    seen = {}
    for name, more in {"anew": ("prior.mode=distill",), "stored": DISTILL_POOL}.items():
        one = Composed(tiny_sd, photos, cache, *more)
        sizes: list[int] = []
        one.setting.parts.denoiser.register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(len(args[0]))
        )
        (batch,) = one.session.batches(1)[0]
        eps, level = noise_of(one.session.step_parts.path, batch, one.session.seed, 1)
        micro_step(
            one.session.step_parts, batch, eps, level, class_rows=class_rows(batch), n_instance=1, n_class=1
        )
        seen[name] = sizes
    # The subject's and the class examples are in the same forward.
    assert seen == {"anew": [1, 2], "stored": [2]}


def test_without_a_pool_nothing_is_stored_and_nothing_changes(
    tiny_sd: Path, photos: Path, cache: Path
) -> None:
    one = Composed(tiny_sd, photos, cache, "prior.mode=distill")
    assert one.pool.facts == {}
    assert not (cache / "pool").exists()
    (batch,) = one.session.batches(0)[0]
    assert batch.fixed == ()
    assert batch.taught is None


def test_the_walk_comes_back_to_a_tuple_and_never_leaves_the_pool(
    tiny_sd: Path, photos: Path, cache: Path
) -> None:
    """Three photos with three tuples each: steps 0..8 see all nine, and so do 9..17."""
    one = Composed(tiny_sd, photos, cache, *DISTILL_POOL, "optim.steps=40")
    assert one.pool.facts["tuples"] == 9

    def seen(steps: Sequence[int]) -> set[bytes]:
        found = set()
        for step in steps:
            (batch,) = one.session.batches(step)[0]
            eps, _ = noise_of(one.session.step_parts.path, batch, one.session.seed, step)
            assert batch.fixed[0] is None, "photos are not in this pool"
            found.add(eps[1].numpy().tobytes() + batch.latents[1].numpy().tobytes())
        return found

    first, second = seen(range(9)), seen(range(9, 18))
    assert len(first) == 9
    assert first == second


# ---- a hollowed denoiser ----


@pytest.mark.parametrize(("base", "mode"), [("tiny_sd", "distill"), ("tiny_sd2", "none")])
def test_the_first_loss_is_the_whole_denoisers(
    base: str, photos: Path, cache: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    """An untrained adapter changes nothing: the hollowed step is the whole net's on the same tuples."""
    folder = request.getfixturevalue(base)
    one = Composed(folder, photos, cache, f"prior.mode={mode}", *HOLLOW, "optim.batch_size=2")
    whole = open_setting(one.setting.recipe, Clock(), Silent())
    parts = one.session.step_parts
    for step in range(3):
        (batch,) = one.session.batches(step)[0]
        eps, level = noise_of(parts.path, batch, one.session.seed, step)
        noised = parts.path.noise(batch.latents, eps, level)
        with torch.no_grad():
            mine = parts.predict(noised.x, level, batch.cond, batch.geometry)
            theirs = whole.family.predict(whole.parts, noised.x, level, batch.cond, batch.geometry)
        # What is stored was computed alone, and a batch rounds otherwise.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_deep_middle_is_gone_and_the_adapter_fits_the_whole_net(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ("prior.mode=none", "optim.steps=4", *HOLLOW, "prior.sampler_steps=2")
    samples = (
        "run.sample_count=1",
        "run.sample_every=2",
        "run.sample_prompts=['a photo of a {token} {noun}']",
    )
    result = runs.train(tiny_sd, photos, out, *more, *samples)
    runs.train(tiny_sd, photos, tmp_path / "without", *more)
    assert _adapter(out) == _adapter(tmp_path / "without"), "previews change the run"
    grids = [
        (out / "samples" / name / "grid.png").read_bytes()
        for name in ("before", "step-000002", "step-000004")
    ]
    assert len(set(grids)) == 3
    facts = _facts(out)
    hollowed = facts["hollow"]
    found = source.resolve(str(tiny_sd))
    family = registry.family(found.family)
    pipeline = family.pipeline(family.load(found, torch.float32))
    total = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert hollowed["removed_parameters"] > total / 2
    assert (
        hollowed["kept_parameters"] + hollowed["removed_parameters"] == total + facts["adapter"]["parameters"]
    )
    loaded = load_adapter(pipeline, result.adapter)
    assert loaded is not None
    # The previews are what the delivered adapter draws on the whole base.
    recipe = Recipe.from_toml(out / "recipe.toml")
    (image,) = generate(
        pipeline,
        ["a photo of a sks dog"],
        [0],
        steps=int(recipe.prior.sampler_steps),
        guidance=float(recipe.prior.guidance),
        height_px=64,
        width_px=64,
    )
    (preview,) = [path for path in (out / "samples/step-000004").glob("*.png") if path.name != "grid.png"]
    from PIL import Image, ImageChops

    with Image.open(preview) as drawn:
        assert max(high for _, high in ImageChops.difference(drawn.convert("RGB"), image).getextrema()) <= 1


def test_a_preview_that_cannot_load_the_base_is_told_and_the_run_goes_on(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_sd, base)
    before = pools.hollow_out

    def then_the_base_is_gone(*args: object) -> dict:
        facts = before(*args)
        shutil.rmtree(base / "unet")
        return facts

    monkeypatch.setattr(pools, "hollow_out", then_the_base_is_gone)
    out = tmp_path / "run"
    quick = ("prior.mode=none", "optim.steps=2", "run.sample_count=1")
    runs.train(base, photos, out, *HOLLOW, *quick)
    assert _facts(out)["status"] == "finished"
    assert not list((out / "samples").glob("*/grid.png"))


def test_four_accumulated_ones_are_one_four(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    more = ("prior.mode=images", f"prior.images={photos}", *HOLLOW, "optim.steps=3", "prior.every=2")
    runs.train(tiny_sd, photos, tmp_path / "4x1", *more, "optim.accumulate=4")
    runs.train(tiny_sd, photos, tmp_path / "1x4", *more, "optim.batch_size=4")
    split, whole = runs.metrics(tmp_path / "4x1"), runs.metrics(tmp_path / "1x4")
    assert ["loss_prior" in line for line in split] == [True, False, True]
    for one, other in zip(split, whole, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "loss_instance", "loss_prior", "grad_norm"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-7), (one["step"], key)


def test_half_precision_and_checkpointing(tiny_sd: Path, photos: Path, tmp_path: Path, cache: Path) -> None:
    half = ("memory.precision=bf16", "memory.checkpointing=true", "images.buckets=true")
    more = (*half, "prior.mode=none", "optim.steps=2")
    runs.train(tiny_sd, photos, tmp_path / "run", *HOLLOW, *more)
    assert {load_file(path)["hollow"].dtype for path in _entries(cache)} == {torch.bfloat16}
    assert all(line["loss"] > 0 for line in runs.metrics(tmp_path / "run"))


def test_other_memory_techniques_go_with_it(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    """A base in 8 bits that waits in host memory, recomputed; the previews borrow whole layers."""
    techniques = ("memory.base_precision=int8", "memory.checkpointing=true", "memory.stream=true")
    more = ("memory.precision=bf16", "prior.mode=distill", "optim.steps=2", "run.sample_count=1")
    out = tmp_path / "run"
    runs.train(tiny_sd, photos, out, *HOLLOW, *techniques, *more)
    first, second = runs.metrics(out)
    assert first["loss_prior"] == pytest.approx(0, abs=1e-4), "the teacher is the base in 8 bits"
    assert second["loss"] > 0
    assert (out / "samples" / "step-000002" / "grid.png").is_file()


# ---- interrupted, repeated, disturbed ----


@pytest.mark.parametrize(
    "kind", [(*DISTILL_POOL, "prior.every=2"), ("prior.mode=distill", *HOLLOW)], ids=" ".join
)
def test_gone_on_with_is_never_stopped(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    cache: Path,
    kind: tuple[str, ...],
) -> None:
    """The pool is even lost in between, and computed again."""
    kind = (*kind, "optim.steps=4")
    runs.train(tiny_sd, photos, tmp_path / "whole", *kind)
    shutil.rmtree(cache / "pool")
    recipe = runs.recipe(tiny_sd, photos, *kind)
    with pytest.raises(CrashError):
        lorabooth.train(recipe, out=tmp_path / "cut", reporter=Interrupting(3, crash=True))
    shutil.rmtree(cache / "pool")
    resumed = lorabooth.train(recipe, out=tmp_path / "cut")
    assert resumed.resumed_from == 2
    assert _adapter(tmp_path / "cut") == _adapter(tmp_path / "whole")
    assert runs.metrics(tmp_path / "cut") == runs.metrics(tmp_path / "whole")


def test_a_longer_run_computes_what_is_new_and_what_is_damaged(
    tiny_sd: Path, photos: Path, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    more = ("prior.mode=none", "memory.hollow=true", "memory.hollow_pool=8")
    runs.train(tiny_sd, photos, out, *more, "optim.steps=2")
    size = 64 * 4 * 4 * 4
    assert _facts(out)["pool"] == {"tuples": 2, "computed": 2, "bytes": 2 * size}
    damaged = _entries(cache)[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4] + b"abcd")
    runs.train(tiny_sd, photos, out, *more, "optim.steps=5")
    assert _facts(out)["pool"] == {"tuples": 5, "computed": 4, "bytes": 5 * size}
    assert damaged.read_bytes() == whole
    assert len(_entries(cache)) == len(runs.metrics(out)) == 5


def test_an_entry_that_vanishes_while_training_is_one_message(
    tiny_sd: Path, photos: Path, cache: Path
) -> None:
    one = Composed(tiny_sd, photos, cache, "prior.mode=none", *HOLLOW)
    shutil.rmtree(cache / "pool")
    with pytest.raises(TrainingError, match="cannot be read any more"):
        one.session.batches(0)


def test_too_little_space_is_told_before_the_first_is_computed(
    tiny_sd: Path, photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TrainingError, match="are needed"):
        Composed(tiny_sd, photos, cache, "prior.mode=none", *HOLLOW)
    assert not _entries(cache)


def test_pools_are_part_of_the_recipe(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    runs.train(tiny_sd, photos, tmp_path / "run", *DISTILL_POOL, "optim.steps=1")
    with pytest.raises(RecipeError, match=r"prior\.pool"):
        runs.train(tiny_sd, photos, tmp_path / "run", "prior.mode=distill", "prior.pool=4", "optim.steps=1")
    prints = {
        fingerprint(runs.recipe(tiny_sd, photos, *more))
        for more in ((), ("prior.every=2",), HOLLOW, ("memory.hollow=true",))
    }
    assert len(prints) == 4


def test_seeds_and_roles_have_their_own_tuples(tiny_sd: Path, photos: Path, cache: Path) -> None:
    one = Composed(tiny_sd, photos, cache, "prior.mode=distill", *HOLLOW)
    (batch,) = one.session.batches(0)[0]
    assert batch.is_instance.tolist() == [True, False]
    assert not torch.equal(batch.fixed[0].eps, batch.fixed[1].eps)
    other = Composed(tiny_sd, photos, cache, "prior.mode=distill", *HOLLOW, "run.seed=1")
    (theirs,) = other.session.batches(0)[0]
    assert not torch.equal(batch.fixed[0].eps, theirs.fixed[0].eps)
    draws = Draws(one.setting.family, one.setting.recipe, one.examples, 0, 1, one.pool.tuples)
    assert {
        draw.role
        for rank in pools.plan_of(one.setting.recipe, one.examples, 1, 0)
        for micro in rank
        for draw in micro
    } == {
        Role.INSTANCE,
        Role.CLASS,
    }
    assert draws(0)[0][0].record_ids == batch.record_ids


def test_a_hollowed_denoiser_says_how_many_modules_train(tiny_sd: Path, photos: Path, cache: Path) -> None:
    said: list[str] = []

    class Hears(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    setting = open_setting(
        runs.recipe(tiny_sd, photos, "prior.mode=none", *HOLLOW, "adapter.targets=attn+ff+conv"),
        Clock(),
        Silent(),
    )
    attached = attach(setting, CPU, Silent())
    assert any(choice.key == "memory.hollow_keep" and choice.value == 1 for choice in setting.choices)
    pools.hollow_out(setting, attached, Hears())
    total = 0
    for path, module in hollow_free(tiny_sd).named_modules():
        is_layer = isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        total += is_layer and any(re.fullmatch(p, path) for p in setting.family.targets["attn+ff+conv"])
    assert f"{attached.n_modules} of {total} modules train" in said[-1]
    assert 0 < attached.n_modules < total


def hollow_free(base: Path) -> torch.nn.Module:
    found = source.resolve(str(base))
    return registry.family(found.family).load(found, torch.float32).denoiser


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("memory.hollow_keep=2",), r"memory\.hollow_keep: 2 of 2 levels"),
        (("adapter.text_encoder=true",), r"memory\.hollow.*frozen text encoder"),
        (("prior.mode=distill", "prior.pool=2"), r"prior\.pool.*its own pool"),
    ],
)
def test_contradictions_are_told_before_anything_is_done(
    tiny_sd: Path, photos: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        runs.train(tiny_sd, photos, tmp_path / "run", *HOLLOW, *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("prior.mode=none", "prior.every=2"), r"prior\.every.*no class examples"),
        (("prior.pool=2",), r'prior\.pool.*only used with prior\.mode = "distill"'),
        (("memory.hollow_keep=1",), r"memory\.hollow_keep.*memory\.hollow is false"),
    ],
)
def test_keys_that_mean_nothing_are_errors(
    tiny_sd: Path, photos: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        runs.recipe(tiny_sd, photos, *more)
