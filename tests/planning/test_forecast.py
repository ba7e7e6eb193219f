"""What is predicted from configs is what a real run takes, counted in the same way: within 1 %."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.published import write_config_folder
from lorabooth.errors import BaseModelError
from lorabooth.families import registry
from lorabooth.families.source import resolve
from lorabooth.memory.facts import Device
from lorabooth.memory.meter import Meter, Usage
from lorabooth.planning import components as things
from lorabooth.planning import forecast as forecasts
from lorabooth.planning import phases
from lorabooth.planning.forecast import PHASES, Forecast, Forecaster, prepared
from lorabooth.recipe import Recipe, from_mapping
from tests.planning.rehearsals import CARD, CPU, measured, measured_before, predicted
from tests.tiny import make_photos
from tests.training import runs

GIB = 2**30
EMBEDDING_BYTES = 77 * 32 * 4
"""What a tiny Stable Diffusion's text encoder makes of a prompt."""
TECHNIQUES = {
    "plain": (),
    "checkpointing": ("memory.checkpointing=true",),
    "some blocks": ("memory.checkpointing=true", "memory.checkpoint_blocks=3"),
    "offload": ("memory.checkpointing=true", "memory.checkpoint_offload=true"),
    "bf16": ("memory.precision=bf16", "model.dtype=bf16"),
    "bf16 base from fp32": ("memory.precision=bf16", "model.dtype=fp32"),
    "int8": ("memory.precision=bf16", "memory.base_precision=int8"),
    "nf4": ("memory.precision=bf16", "memory.base_precision=nf4"),
    "text encoder": ("adapter.text_encoder=true",),
    "distill": ("prior.mode=distill",),
    "distill pool": ("prior.mode=distill", "prior.pool=2"),
    "no prior": ("prior.mode=none",),
    "accumulate": ("optim.accumulate=2", "optim.batch_size=2"),
    "adamw8bit": ("optim.name=adamw8bit", "adapter.rank=16"),
    "more targets": ("adapter.targets=attn+ff+conv",),
    "dropout": ("adapter.dropout=0.1", "memory.checkpointing=true"),
    # Larger than a tiny net is trained at: what its attention takes to be proven would be the most of it.
    "hollow": ("memory.hollow=true", "memory.hollow_pool=2", "images.resolution=192"),
    "streamed": ("memory.checkpointing=true", "memory.stream=true"),
}
# Each technique on one family, each family with one technique: the others are of the same code, and slow.
QUICK = {("sd2", "plain"), ("pocket", "checkpointing")} | {
    ("sd1", name) for name in ("bf16", "text encoder", "distill", "accumulate", "adamw8bit")
}
CASES = [
    pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
    for kind in ("sd1", "sd2", "pocket")
    for name in TECHNIQUES
]


@pytest.fixture(scope="module")
def class_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class-photos")
    make_photos(folder, seed=1)
    return folder


@pytest.fixture
def recipe_of(
    tiny_sd: Path,
    tiny_sd2: Path,
    photos: Path,
    class_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """(kind of base, overrides) -> a recipe with the user's class images, unless overrides say otherwise."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))

    def make(kind: str, *overrides: str) -> Recipe:
        base = {"sd1": tiny_sd, "sd2": tiny_sd2}.get(kind, "pocket")
        own = ("prior.mode=images", f"prior.images={class_photos}")
        has_mode = any(each.startswith("prior.mode=") for each in overrides)
        return runs.recipe(base, photos, *(() if has_mode else own), *overrides)

    return make


@pytest.mark.parametrize(("kind", "technique"), CASES)
def test_a_training_step_takes_what_was_predicted(
    kind: str, technique: str, recipe_of, tmp_path: Path
) -> None:
    recipe = recipe_of(kind, *TECHNIQUES[technique])
    real = measured(recipe, tmp_path)["training"]
    told = predicted(recipe, phases=("training",)).phase("training").usage
    assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    for component in (things.DENOISER, things.ADAPTER, things.TEXT_ENCODER):
        assert told.at_peak.get(component, 0) == pytest.approx(real.at_peak.get(component, 0), rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_other_phase_takes_what_was_predicted(recipe_of, tmp_path: Path, dtype: str) -> None:
    recipe = recipe_of(
        "sd1",
        *("prior.mode=generated", "prior.count=4", "prior.sampler_steps=3", f"prior.dtype={dtype}"),
        "run.sample_count=2",
    )
    real = measured(recipe, tmp_path)
    told = predicted(recipe)
    assert [phase.name for phase in told.phases] == list(PHASES)
    for name, usage in real.items():
        assert told.phase(name).usage.peak_bytes == pytest.approx(usage.peak_bytes, rel=0.01), name


def test_a_run_without_class_images_and_samples_has_no_such_phases(recipe_of) -> None:
    told = predicted(recipe_of("sd1", "run.sample_count=0"))
    assert [phase.name for phase in told.phases] == ["caching", "training", "saving"]
    assert told.peak.usage.peak_bytes == told.peak_bytes == max(p.usage.peak_bytes for p in told.phases)
    with pytest.raises(KeyError):
        told.phase("previews")
    assert json.loads(json.dumps(told.as_json()))["peak_bytes"] == told.peak_bytes


def test_nothing_is_rehearsed_twice(recipe_of, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    usages = phases.usages

    def noted(scene: things.Scene, wanted: Collection[str]) -> Mapping[str, Usage]:
        asked.append(tuple(wanted))
        return usages(scene, wanted)

    monkeypatch.setattr(forecasts, "usages", noted)
    recipe, told = recipe_of("sd1", "prior.mode=none"), Forecaster()
    base = resolve(recipe.model.base, configs_only=True)
    place = (base, registry.family(base.family), CARD)
    first = told(recipe, *place, phases=("training",))
    assert [phase.name for phase in first.phases] == ["training"]
    both = told(recipe, *place, phases=("training", "saving"))
    assert asked == [("training",)]
    assert both.phases[0] == first.phases[0]
    told(recipe_of("sd1", "prior.mode=none", "adapter.rank=8"), *place, phases=("training",))
    assert len(asked) == 2
    assert both.phases == Forecaster()(recipe, *place, phases=("training", "saving")).phases


def test_measuring_checkpoints_draws_as_previews_do(recipe_of) -> None:
    def drawn(*overrides: str) -> int:
        recipe = recipe_of("sd1", *overrides)
        return predicted(recipe, phases=("previews",)).phase("previews").usage.peak_bytes

    few = drawn("run.sample_count=0", "run.select=subject", "run.select_images=2")
    assert few < drawn("run.sample_count=2", "run.select=subject", "run.select_images=8")
    assert few == drawn("run.sample_count=2")


def test_the_state_by_rule_is_that_of_bitsandbytes() -> None:
    """Above and below its 4096 elements, whole and torn blocks of 256."""
    import bitsandbytes

    sizes = (1, 4095, 4096, 4097, 5000, 200_000)
    parameters = [nn.Parameter(torch.full((size,), 0.5)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)

    def state_of(optimizer: torch.optim.Optimizer) -> list[list[tuple[torch.Size, torch.dtype]]]:
        optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        # Its codes are one for all tensors.
        return [
            sorted((v.shape, v.dtype) for k, v in state.items() if torch.is_tensor(v) and "qmap" not in k)
            for state in states
        ]

    rule = things.BlockwiseAdamW([{"params": parameters}])
    real = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)
    assert [code.shape for code in rule.codes] == [code.shape for code in real.name2qmap.values()]
    key = lambda facts: [(tuple(shape), str(dtype)) for shape, dtype in facts]  # noqa: E731
    assert [sorted(key(each)) for each in state_of(rule)] == [sorted(key(each)) for each in state_of(real)]


# --- devices that are not here


def test_a_card_is_told_in_its_own_arithmetic(recipe_of) -> None:
    recipe = recipe_of("sd1")
    card = predicted(recipe, CARD, phases=("training",)).phase("training")
    parts = card.usage.at_peak
    assert sum(parts.values()) == card.usage.peak_bytes
    assert card.allocated_bytes == card.usage.peak_bytes - parts[things.CONTEXT]
    # bf16 there, fp32 here: half the weights; rounded up to 512 bytes a tensor.
    here = predicted(recipe, CPU, phases=("training",)).phase("training").usage.at_peak
    assert parts[things.DENOISER] % 512 == 0
    assert here[things.DENOISER] / 2 < parts[things.DENOISER] < here[things.DENOISER] * 0.6
    old = Device("cuda", "an old card", 8 << 30, 8 << 30, "7.5", False)
    base = resolve(recipe.model.base, configs_only=True)
    assert prepared(recipe, base, registry.family(base.family), old).memory.precision == "fp16"
    with Meter() as meter:  # and what is made after a rehearsal is real
        assert torch.ones(3).tolist() == [1.0, 1.0, 1.0]
        assert meter.usage().peak_bytes == 12


def test_what_waits_in_host_memory_is_not_on_the_card(recipe_of) -> None:
    checkpointed = ("memory.checkpointing=true", "prior.mode=none")

    def on_card(*more: str) -> dict[str, int]:
        told = predicted(recipe_of("sd1", *checkpointed, *more), CARD, phases=("training",))
        return dict(told.phase("training").usage.at_peak)

    plain, streamed = on_card(), on_card("memory.stream=true")
    assert streamed[things.DENOISER] < plain[things.DENOISER] / 2


@pytest.mark.parametrize("how", ["plain", "streamed", "in bf16", "in turn"])
def test_a_base_draws_and_waits_as_was_predicted(
    recipe_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each part is on the card while it works, and no longer."""
    recipe = recipe_of(
        "sd1",
        *("prior.mode=generated", "prior.count=2", "prior.sampler_steps=3", "model.dtype=fp32"),
        *(("memory.stream=true", "memory.checkpointing=true") if how == "streamed" else ()),
        *(("prior.dtype=bf16",) if how == "in bf16" else ()),
        *(("memory.in_turn=true",) if how == "in turn" else ()),
        "memory.images_at_once=2",
    )
    told = predicted(recipe, CARD, phases=("class images", "caching"))
    real = measured_before(recipe, tmp_path, monkeypatch)
    # In this CPU's memory, and not in a card's: six tables of the sampler's 1000 levels, what two prompts
    # were encoded to, pixels once.
    photo_bytes = 3 * int(told.recipe.images.resolution) ** 2 * 4
    host_bytes = {"class images": 6 * 4096 + 2 * EMBEDDING_BYTES, "caching": photo_bytes}
    for name, usage in real.items():
        phase = told.phase(name).usage
        driver_bytes = phase.at_peak[things.CONTEXT] + phase.at_peak[things.LIBRARIES]
        taken_bytes = usage.peak_bytes - host_bytes[name]
        assert phase.peak_bytes - driver_bytes == pytest.approx(taken_bytes, rel=0.01), name
        is_caching = name == "caching"
        # A copy in bf16 draws in place of the denoiser that trains, which waits.
        draws = not is_caching and how != "in bf16"
        assert (things.TEXT_ENCODER in usage.at_peak, things.DENOISER in usage.at_peak) == (is_caching, draws)


def test_tokens_do_not_need_a_vocabulary(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_sd, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    overrides = ("adapter.text_encoder=true", "prior.mode=none")
    with_words = predicted(runs.recipe(bare, photos, *overrides), phases=("training",))
    for name in ("vocab.json", "merges.txt"):
        (bare / "tokenizer" / name).unlink()
    without = predicted(runs.recipe(bare, photos, *overrides), phases=("training",))
    assert without.as_json() == with_words.as_json()


def test_a_missing_config_is_one_message(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_sd, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = runs.recipe(bare, photos, "prior.mode=none")
    base = resolve(str(bare), configs_only=True)
    (bare / "text_encoder" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="text_encoder"):
        Forecaster()(recipe, base, registry.family(base.family), CARD)


# --- the published sizes, from configs alone


def published(name: str, work: Path, *overrides: str) -> Recipe:
    folder = write_config_folder(work / name, name)
    raw = {
        "model": {"base": str(folder)},
        "subjects": [{"images": "photos", "noun": "dog", "token": "sks"}],
        "prior": {"mode": "images", "images": "class"},
        "adapter": {"rank": 4},
        "images": {"resolution": 512},
    }
    return from_mapping(raw, overrides, "test")


def test_sd15_is_predicted_from_its_configs(tmp_path: Path) -> None:
    """512 px, 1+1 images, bf16 base, float32 adapter of rank 4."""
    usage = predicted(published("sd15", tmp_path), CARD, phases=("training",)).phase("training").usage
    assert usage.at_peak[things.DENOISER] == pytest.approx(859_520_964 * 2, rel=0.001)
    assert usage.at_peak[things.ADAPTER] == pytest.approx(797_184 * 4, rel=0.01)
    assert usage.at_peak[things.OPTIMIZER] == pytest.approx(2 * 797_184 * 4, rel=0.03)
    assert 2.5 * GIB < usage.peak_bytes < 4.5 * GIB


def test_a_streamed_base_is_not_on_the_card_before_training(tmp_path: Path) -> None:
    """Class images fall by its weights, but for first and last layers and units that visit."""
    weights_bytes = 859_520_964 * 2

    def told(*more: str) -> Forecast:
        drawn = ("prior.mode=generated", "prior.images=", "memory.checkpointing=true")
        recipe = published("sd15", tmp_path / str(len(more)), *drawn, *more)
        return predicted(recipe, CARD, phases=("class images", "caching"))

    plain, streamed = told(), told("memory.stream=true")
    drawn = plain.phase("class images").usage
    assert drawn.at_peak[things.DENOISER] == pytest.approx(weights_bytes, rel=0.001)
    assert things.TEXT_ENCODER not in drawn.at_peak
    assert things.DENOISER not in plain.phase("caching").usage.at_peak
    assert streamed.phase("caching").usage.at_peak[things.DENOISER] < 0.02 * weights_bytes
    assert streamed.phase("class images").usage.at_peak[things.DENOISER] < 0.15 * weights_bytes
    fell_bytes = drawn.peak_bytes - streamed.phase("class images").usage.peak_bytes
    assert 0.8 * weights_bytes < fell_bytes < weights_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_technique_saves_what_it_is_there_for(name: str, tmp_path: Path) -> None:
    ladder = [
        (),
        ("memory.checkpointing=true",),
        ("memory.checkpointing=true", "memory.base_precision=int8"),
        ("memory.checkpointing=true", "memory.base_precision=nf4"),
        ("memory.checkpointing=true", "memory.base_precision=nf4", "memory.stream=true"),
    ]
    peaks = []
    for index, overrides in enumerate(ladder):
        recipe = published(name, tmp_path / str(index), *overrides)
        peaks.append(predicted(recipe, CARD, phases=("training",)).peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[2] < 0.8 * peaks[1]
