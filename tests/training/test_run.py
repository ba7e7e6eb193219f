"""Whole runs, from photos to adapter, through the public API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorabooth
from lorabooth.adapters import file as adapter_file
from lorabooth.errors import RecipeError
from lorabooth.evaluation.apply import load_adapter
from lorabooth.families import registry, source
from tests.training import runs

FILES = {"recipe.toml", "run.json", "metrics.jsonl", "adapter.safetensors", "report.html", "checkpoints"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_run_leaves_everything_and_the_adapter_opens_in_diffusers(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = runs.train(tiny_sd, photos, out, "run.sample_count=1", "run.sample_every=3")
    assert FILES | {"samples"} <= {entry.name for entry in out.iterdir()}
    assert [line["step"] for line in runs.metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert {"before", "step-000003", "step-000006"} == {e.name for e in (out / "samples").iterdir()}
    assert json.loads((out / "run.json").read_text("utf-8"))["status"] == "finished"
    found = source.resolve(str(tiny_sd))
    family = registry.family(found.family)
    ours = family.pipeline(family.load(found, torch.float32))
    theirs = family.pipeline(family.load(found, torch.float32))
    load_adapter(ours, result.adapter)
    theirs.load_lora_weights(str(result.adapter.parent), weight_name=result.adapter.name)
    x, level = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = torch.randn(1, 77, ours.unet.config.cross_attention_dim)
    base = family.load(found, torch.float32).denoiser
    with torch.no_grad():
        a, b, plain = (unet(x, level, text).sample for unet in (ours.unet, theirs.unet, base))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a, plain, rtol=1e-3, atol=1e-4), "the adapter changes nothing"


@pytest.mark.parametrize("mode", ["generated", "distill", "none"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_every_prior_mode_trains_what_it_says(
    tiny_sd: Path, photos: Path, tmp_path: Path, mode: str, text_encoder: bool
) -> None:
    flag = "true" if text_encoder else "false"
    runs.train(tiny_sd, photos, tmp_path / "run", f"prior.mode={mode}", f"adapter.text_encoder={flag}")
    lines = runs.metrics(tmp_path / "run")
    assert all(("loss_prior" in line) == (mode != "none") for line in lines)
    if mode == "distill":
        assert lines[0]["loss_prior"] == pytest.approx(0, abs=1e-9), "an untrained adapter is its own teacher"
        assert lines[-1]["loss_prior"] > 0
    components = {
        name.split(".")[0] for name in adapter_file.read(tmp_path / "run/adapter.safetensors").tensors
    }
    assert components == ({"denoiser", "text_encoder"} if text_encoder else {"denoiser"})


def test_own_class_images_are_all_used(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    own = f"prior.images={photos}"
    runs.train(tiny_sd, photos, tmp_path / "run", "prior.mode=images", own, "optim.batch_size=2")
    facts = json.loads((tmp_path / "run/run.json").read_text("utf-8"))
    assert facts["class_images"] == {"mode": "images", "images": len(facts["photos"])}


def test_previews_do_not_change_the_run(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    dropout = "adapter.dropout=0.3"
    runs.train(tiny_sd, photos, tmp_path / "without", dropout)
    runs.train(tiny_sd, photos, tmp_path / "with", dropout, "run.sample_count=1", "run.sample_every=1")
    assert runs.metrics(tmp_path / "without") == runs.metrics(tmp_path / "with")
    assert _bytes(tmp_path / "without") == _bytes(tmp_path / "with")


def test_the_global_random_state_is_not_read(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    runs.train(tiny_sd, photos, tmp_path / "a", "adapter.dropout=0.3")
    torch.manual_seed(2)
    runs.train(tiny_sd, photos, tmp_path / "b", "adapter.dropout=0.3")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


def test_four_accumulated_ones_are_one_four(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    runs.train(tiny_sd, photos, tmp_path / "4x1", "optim.accumulate=4")
    runs.train(tiny_sd, photos, tmp_path / "1x4", "optim.batch_size=4")
    split, whole = runs.metrics(tmp_path / "4x1"), runs.metrics(tmp_path / "1x4")
    for one, other in zip(split, whole, strict=True):
        for key in ("loss", "loss_instance", "loss_prior", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-4), (one["step"], key)


def test_buckets_and_flips_train(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    shape = ("images.buckets=true", "images.flip=true", "images.crop=random", "optim.batch_size=2")
    runs.train(tiny_sd, photos, tmp_path / "run", *shape)
    assert len(runs.metrics(tmp_path / "run")) == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_a_float32_adapter(
    tiny_sd: Path, photos: Path, tmp_path: Path, precision: str
) -> None:
    runs.train(
        tiny_sd, photos, tmp_path / "run", f"memory.precision={precision}", "memory.checkpointing=true"
    )
    tensors = adapter_file.read(tmp_path / "run/adapter.safetensors").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("lora_B"))


def test_a_finished_run_is_left_as_it_is(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    first = runs.train(tiny_sd, photos, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted(first.out.rglob("*")) if path.is_file()}
    again = runs.train(tiny_sd, photos, tmp_path / "run")
    assert again.finished_before
    assert before == {path: path.read_bytes() for path in sorted(first.out.rglob("*")) if path.is_file()}


def test_more_steps_go_on(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    runs.train(tiny_sd, photos, tmp_path / "long", "optim.steps=8")
    runs.train(tiny_sd, photos, tmp_path / "run")
    longer = runs.train(tiny_sd, photos, tmp_path / "run", "optim.steps=8")
    assert longer.resumed_from == 6
    assert runs.metrics(tmp_path / "run") == runs.metrics(tmp_path / "long")


def test_another_recipes_run_is_refused_and_untouched(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    runs.train(tiny_sd, photos, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"adapter\.rank: 4 there, 8 now"):
        runs.train(tiny_sd, photos, tmp_path / "run", "adapter.rank=8")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    beside = lorabooth.train(runs.recipe(tiny_sd, photos, "adapter.rank=8"), out=tmp_path / "run", fresh=True)
    assert beside.out == tmp_path / "run-2"


def test_a_folder_with_other_files_is_refused(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        runs.train(tiny_sd, photos, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_runs_own_recipe_goes_on_with_it(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    first = runs.train(tiny_sd, photos, tmp_path / "run")
    own = lorabooth.Recipe.from_toml(first.out / "recipe.toml")
    assert lorabooth.train(own).finished_before
    assert own.model_copy(update={"run": first.recipe.run}) == first.recipe


def test_a_dry_run_writes_nothing(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    plan = lorabooth.train(runs.recipe(tiny_sd, photos), out=tmp_path / "run", dry_run=True)
    text = plan.text()
    assert not (tmp_path / "run").exists()
    assert plan.trained[0].modules > 0
    assert f"{plan.trained[0].parameters:,} parameters" in text
    assert "alpha = 4.0" in text


def test_the_tracker_gets_the_losses(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(tiny_sd, photos, tmp_path / "run", "run.tracker=tensorboard")
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*")).parent)).Reload()
    logged = [scalar.value for scalar in events.Scalars("loss_instance")]
    told = [line["loss_instance"] for line in runs.metrics(tmp_path / "run")]
    assert logged == pytest.approx(told)


def test_no_path_or_caption_in_the_adapter(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    result = runs.train(tiny_sd, photos, tmp_path / "run")
    header = result.adapter.read_bytes()[:4000].decode("utf-8", errors="replace")
    assert str(tmp_path) not in header
    assert "a photo of" not in header
    assert adapter_file.read(result.adapter).metadata.trigger_words == ("sks dog",)


def _bytes(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()
