"""Whole runs, from photos to adapter, through the public API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorabooth
from lorabooth.adapters import file as adapter_file
from lorabooth.errors import InterruptedRunError, RecipeError, TrainingError
from lorabooth.evaluation.apply import load_adapter
from lorabooth.families import registry, source
from lorabooth.memory import apply
from lorabooth.progress import Silent
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


class Listener(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def heard(base: Path, photos: Path, out: Path, *overrides: str) -> tuple[lorabooth.RunResult, Listener]:
    listener = Listener()
    return lorabooth.train(runs.recipe(base, photos, *overrides), out=out, reporter=listener), listener


def facts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text("utf-8"))
    return found


def test_going_on_and_being_done_are_said(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    _, new = heard(tiny_sd, photos, tmp_path / "run")
    assert not any("going on" in line or "is done already" in line for line in new.said)
    _, longer = heard(tiny_sd, photos, tmp_path / "run", "optim.steps=8", "run.keep=5")
    assert "going on from step 6 of 8" in longer.said
    assert "changed since the run began: optim.steps: 6 before, 8 now" in longer.said
    assert "changed since the run began: run.keep: 2 before, 5 now" in longer.said
    _, done = heard(tiny_sd, photos, tmp_path / "run", "optim.steps=8")
    assert f"{tmp_path / 'run'} is done already: 8 steps." in done.said
    assert "Nothing was changed." in done.said


def test_timings_and_warnings_add_up_over_a_resumed_run(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, _ = heard(tiny_sd, photos, out)
    before = facts(out)
    before["warnings"] = ["the disk was slow"]
    (out / "run.json").write_text(json.dumps(before), encoding="utf-8")
    lorabooth.train(
        lorabooth.Recipe.from_toml(out / "recipe.toml").model_copy(
            update={"optim": first.recipe.optim.model_copy(update={"steps": 8})}
        )
    )
    after = facts(out)
    assert after["warnings"] == ["the disk was slow"]
    assert after["resumed_from"] == [6]
    assert after["steps_done"] == 8
    for phase, seconds in before["timings_s"].items():
        assert after["timings_s"][phase] > seconds, phase
    chosen = {choice["key"] for choice in before["choices"]}
    assert chosen
    assert {choice["key"] for choice in after["choices"]} == chosen, "its own recipe has no auto left"


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (KeyboardInterrupt(), InterruptedRunError, "interrupted"),
        (TrainingError("no more"), TrainingError, "failed"),
        (ZeroDivisionError(), ZeroDivisionError, "failed"),
    ],
)
@pytest.mark.parametrize("where", ["run.cache_and_release", "work.run_steps"])
def test_however_a_run_ends_it_is_written(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    status: str,
    where: str,
) -> None:
    def fail(*args: object, **options: object) -> None:
        assert facts(tmp_path / "run")["status"] == "running"
        raise error

    monkeypatch.setattr(f"lorabooth.training.{where}", fail)
    with pytest.raises(raised) as caught:
        runs.train(tiny_sd, photos, tmp_path / "run")
    assert facts(tmp_path / "run")["status"] == status
    assert "class images" in facts(tmp_path / "run")["timings_s"]
    if status == "interrupted":
        assert f"lorabooth train {tmp_path / 'run' / 'recipe.toml'}" in str(caught.value)


def test_what_a_killed_first_write_left_is_in_nobodys_way(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    litter = [
        out / f".recipe.toml.{gone.pid}.tmp",
        out / f".writable.{gone.pid}.tmp",
        out / "samples" / "before" / f".grid.png.{gone.pid}.tmp",
        out / "checkpoints" / f".x.{gone.pid}.tmp",
        out / "checkpoints" / ".unfinished-step-000002-1" / "adapter.safetensors",
    ]
    litter[0].parent.mkdir()
    litter[0].write_bytes(b"[mod")
    litter[1].write_bytes(b"x")
    beside = lorabooth.train(runs.recipe(tiny_sd, photos), out=out, dry_run=True, fresh=True)
    assert beside.out == str(out), "a folder with nothing but litter is free"
    runs.train(tiny_sd, photos, out, "optim.steps=2")
    for path in litter[2:]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    alive = out / f".other.{os.getpid()}.tmp"
    alive.write_bytes(b"somebody is writing this")
    runs.train(tiny_sd, photos, out)
    assert not [path for path in litter if path.exists()]
    assert alive.exists()


def test_an_adapter_that_was_deleted_comes_back(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    first = runs.train(tiny_sd, photos, tmp_path / "run")
    whole = first.adapter.read_bytes()
    first.adapter.unlink()
    again, listener = heard(tiny_sd, photos, tmp_path / "run")
    assert again.finished_before
    assert first.adapter.read_bytes() == whole
    assert any("was gone" in line for line in listener.said)


def test_a_finished_run_without_checkpoints_is_never_trained_over(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    first = runs.train(tiny_sd, photos, tmp_path / "run")
    whole = first.adapter.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert runs.train(tiny_sd, photos, tmp_path / "run").finished_before
    with pytest.raises(RecipeError, match="its checkpoints are gone"):
        runs.train(tiny_sd, photos, tmp_path / "run", "optim.steps=8")
    assert first.adapter.read_bytes() == whole


def test_a_run_that_fell_back_from_fp16_goes_on(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    base = tmp_path / "loud"
    shutil.copytree(tiny_sd, base)
    (weights,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1e5  # more than fp16 can hold
    save_file(tensors, weights, {"format": "pt"})
    fp16 = ("memory.precision=fp16", "memory.base_precision=fp32")
    _, told = heard(base, photos, tmp_path / "run", *fp16)
    assert any("fp16 failed" in line for line in told.warned)
    assert facts(tmp_path / "run")["precision"] == "bf16"
    longer, told = heard(base, photos, tmp_path / "run", *fp16, "optim.steps=8")
    assert longer.resumed_from == 6
    assert not any("were computed in" in line for line in told.warned)
    straight, _ = heard(base, photos, tmp_path / "straight", *fp16, "optim.steps=8")
    assert longer.adapter.read_bytes() == straight.adapter.read_bytes()


@pytest.mark.parametrize("first", ["fp16", "bf16"])
def test_a_precision_that_does_not_work_any_more_is_named(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """As on another machine, or after an update: the loss scale of fp16 is of no use then."""
    wanted = f"memory.precision={first}"
    runs.train(tiny_sd, photos, tmp_path / "run", wanted)
    attempt = apply._try

    def only_fp32(loss: Any, trained: Any, candidate: apply.Precision, device: Any) -> str:
        if candidate.compute != torch.float32:
            return "not here"
        return attempt(loss, trained, candidate, device)

    monkeypatch.setattr(apply, "_try", only_fp32)
    longer, told = heard(tiny_sd, photos, tmp_path / "run", wanted, "optim.steps=8")
    assert longer.resumed_from == 6
    assert any(
        f"the first 6 steps were computed in {first}, the others will be in fp32" in line
        for line in told.warned
    )


def test_previews_are_drawn_anew_if_their_grid_is_missing(
    tiny_sd: Path, photos: Path, tmp_path: Path
) -> None:
    wanted = ("run.sample_count=1", "run.sample_every=3", "run.checkpoint_every=3", "run.keep=0")
    runs.train(tiny_sd, photos, tmp_path / "whole", *wanted, "optim.steps=9")
    runs.train(tiny_sd, photos, tmp_path / "run", *wanted)
    (tmp_path / "run" / "samples" / "step-000006" / "grid.png").unlink()
    runs.train(tiny_sd, photos, tmp_path / "run", *wanted, "optim.steps=9")
    assert pictures(tmp_path / "run") == pictures(tmp_path / "whole")


def pictures(out: Path) -> dict[str, bytes]:
    root = out / "samples"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_looks_at_the_folder(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.train(tiny_sd, photos, out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.raises(RecipeError, match=r"adapter\.rank: 4 there, 8 now"):
        lorabooth.train(runs.recipe(tiny_sd, photos, "adapter.rank=8"), out=out, dry_run=True)
    listener = Listener()
    plan = lorabooth.train(
        runs.recipe(tiny_sd, photos, "optim.steps=8"), out=out, dry_run=True, reporter=listener
    )
    assert plan.out == str(out)
    assert "going on from step 6 of 8" in listener.said
    fresh = lorabooth.train(runs.recipe(tiny_sd, photos, "adapter.rank=8"), out=out, dry_run=True, fresh=True)
    assert fresh.out == str(tmp_path / "run-2")
    assert not (tmp_path / "run-2").exists()
    assert before == {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_fresh_beside_a_file_is_beside_it(tiny_sd: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    plan = lorabooth.train(runs.recipe(tiny_sd, photos), out=tmp_path / "run", dry_run=True, fresh=True)
    assert plan.out == str(tmp_path / "run-2")


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
