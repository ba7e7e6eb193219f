"""Compiled blocks: the same gradients, put back without a trace, and kept only where they pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from lorabooth.errors import RecipeError
from lorabooth.memory import checkpoint
from lorabooth.training import compiled
from lorabooth.training.compiled import Blocks, Pace, Timing, TimingFile
from tests.training import runs
from tests.training.sessions import Listener

STEPS = compiled.MEASURED_STEPS + 2


@pytest.fixture
def unet(tiny_sd: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet").requires_grad_(False)


def pace(unet: Any, tmp_path: Path, listener: Listener, *, fails: bool = False, key: str = "a") -> Pace:
    """Whose steps take what it is told."""

    def attempt() -> None:
        if fails:
            raise RuntimeError("no compiler\nfound")

    memory = TimingFile.of(tmp_path / "cache", {"key": key})
    return Pace("auto", Blocks(unet, tmp_path / "cache"), attempt, memory=memory, reporter=listener)


def is_compiled(unet: Any) -> bool:
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert blocks
    on = {"forward" in vars(block) for block in blocks}
    assert len(on) == 1
    return on.pop()


def feed(pace: Pace, seconds: float, done: int, stop: int, steps: int = STEPS) -> int:
    for _ in range(steps):
        done += 1
        pace(done, stop, seconds)
    return done


def test_a_short_run_is_not_compiled(unet: Any, tmp_path: Path) -> None:
    listener = Listener()
    short = pace(unet, tmp_path, listener)
    feed(short, 0.5, 0, 100)
    assert not is_compiled(unet)
    assert short.facts["compile"] == "off"
    assert "93 steps that are left take about 46 s" in str(short.facts["reason"])
    assert listener.said == [f"speed.compile: off: {short.facts['reason']}"]


def test_a_long_run_keeps_what_is_faster(unet: Any, tmp_path: Path) -> None:
    listener = Listener()
    long = pace(unet, tmp_path, listener)
    done = feed(long, 0.5, 0, 5000)
    assert is_compiled(unet)
    feed(long, 0.3, done, 5000)
    assert is_compiled(unet)
    assert long.facts["compile"] == "on"
    assert "0.3 s compiled and 0.5 s as it is" in str(long.facts["reason"])
    feed(long, 9.0, 50, 5000)
    assert is_compiled(unet), "decided once"
    assert len(listener.said) == 1


def test_a_long_run_goes_back_from_what_is_not_faster_and_the_next_run_knows(
    unet: Any, tmp_path: Path
) -> None:
    first = pace(unet, tmp_path, Listener())
    done = feed(first, 0.5, 0, 5000)
    assert is_compiled(unet)
    feed(first, 0.49, done, 5000)
    assert not is_compiled(unet)
    assert first.facts["compile"] == "off"
    again = pace(unet, tmp_path, Listener())
    feed(again, 0.5, 0, 5000)
    assert not is_compiled(unet)
    assert "an earlier run measured 0.49 s compiled, 0.5 s as it is" in str(again.facts["reason"])
    other = pace(unet, tmp_path, Listener(), key="another base")
    feed(other, 0.5, 0, 5000)
    assert is_compiled(unet), "that was measured of something else"


def test_what_an_earlier_run_paid_decides_on_a_try(unet: Any, tmp_path: Path) -> None:
    memory = TimingFile.of(tmp_path / "cache", {"key": "a"})
    memory.write(Timing(eager_step_s=1.0, compiled_step_s=0.5, compile_s=4.0))
    assert memory.read() == Timing(1.0, 0.5, 4.0)
    quick = pace(unet, tmp_path, Listener())
    feed(quick, 1.0, 0, STEPS + 7)
    assert not is_compiled(unet)
    quick = pace(unet, tmp_path, Listener())
    feed(quick, 1.0, 0, STEPS + 9)
    assert is_compiled(unet)
    for broken in ("", "[]", "{}", '{"eager_step_s": 0, "compiled_step_s": 1, "compile_s": 1}', "{"):
        memory.path.write_text(broken)
        assert memory.read() is None


def test_a_compiler_that_fails_is_a_reason_and_leaves_the_blocks_alone(unet: Any, tmp_path: Path) -> None:
    listener = Listener()
    failing = pace(unet, tmp_path, listener, fails=True)
    feed(failing, 0.5, 0, 5000)
    assert not is_compiled(unet)
    assert "torch cannot compile here (no compiler)" in str(failing.facts["reason"])
    with pytest.raises(RecipeError, match=r"speed.compile: torch cannot compile here \(no compiler\)"):
        Pace(
            "on",
            Blocks(unet, tmp_path),
            lambda: (_ for _ in ()).throw(RuntimeError("no compiler")).__next__(),
            memory=None,
            reporter=listener,
        )
    assert not is_compiled(unet)


def test_blocks_that_are_recomputed_stay_so(unet: Any, tmp_path: Path) -> None:
    checkpoint.recompute(unet)
    before = {name: vars(module).get("forward") for name, module in unet.named_modules()}
    blocks = Blocks(unet, tmp_path)
    assert len(blocks) > 0
    blocks.on()
    blocks.on()
    blocks.off()
    assert {name: vars(module).get("forward") for name, module in unet.named_modules()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("memory.checkpointing=true",),
        ("prior.mode=distill",),
        ("images.buckets=true", "adapter.text_encoder=true"),
        ("run.validation_every=2",),
    ],
)
def test_a_compiled_run_is_the_same_run(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """Losses and gradient norms over six steps; with LoRA, class images, checkpointing and buckets."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    plain = runs.train(tiny_sd, photos, tmp_path / "plain", *overrides)
    result = runs.train(tiny_sd, photos, tmp_path / "on", "speed.compile=on", *overrides)
    for ours, theirs in zip(runs.metrics(result.out), runs.metrics(plain.out), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm", *(name for name in ours if name.startswith("val_loss"))):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    first, expected = runs.metrics(result.out)[0], runs.metrics(plain.out)[0]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    facts = json.loads((result.out / "run.json").read_text())["speed"]
    assert facts["compile"] == "on"
    assert facts["compile_s"] > 0
    counted = torch._dynamo.utils.counters["frames"]
    assert counted["ok"] == counted["total"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most", "mean"), [("fp32", 2, 0.01), ("bf16", 30, 2)])
def test_compiled_class_images_are_the_same_images(
    tiny_sd: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    most: int,
    mean: float,
) -> None:
    """With and without guidance the denoiser sees two sizes of batch; both are compiled.

    In bf16 a compiled block rounds less often than the operations one by one.
    """
    few = ("prior.count=8", "prior.sampler_steps=4", "memory.images_at_once=4", "optim.steps=1")
    few = (*few, f"prior.dtype={dtype}")
    pixels, facts = {}, {}
    for mode in ("off", "on"):
        torch._dynamo.reset()
        monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / f"cache-{mode}"))
        result = runs.train(tiny_sd, photos, tmp_path / mode, *few, f"speed.compile={mode}")
        facts[mode] = json.loads((result.out / "run.json").read_text())["class_images"]
        files = sorted((tmp_path / f"cache-{mode}").rglob("0*.png"))
        pixels[mode] = np.stack([np.asarray(Image.open(file)).astype(int) for file in files])
    assert facts["on"]["speed"]["compile"] == "on"
    assert facts["on"]["drawn"] == 8
    assert "speed" not in facts["off"]
    apart = np.abs(pixels["on"] - pixels["off"])
    assert apart.max() <= most
    assert apart.mean() <= mean
    assert np.abs(np.diff(pixels["on"], axis=0)).max() > 20


@pytest.mark.slow
def test_a_run_goes_on_compiled(
    tiny_sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps as they are and three compiled lose what six steps lose."""
    monkeypatch.setenv("LORABOOTH_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    # A constant rate: what the first three steps do must not depend on how many are to follow.
    constant = ("optim.schedule=constant",)
    plain = runs.train(tiny_sd, photos, tmp_path / "plain", *constant, "optim.steps=6")
    runs.train(tiny_sd, photos, tmp_path / "on", *constant, "optim.steps=3")
    result = runs.train(tiny_sd, photos, tmp_path / "on", *constant, "optim.steps=6", "speed.compile=on")
    assert result.resumed_from == 3
    for ours, theirs in zip(runs.metrics(result.out), runs.metrics(plain.out), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert json.loads((result.out / "run.json").read_text())["speed"]["compile"] == "on"


@pytest.mark.slow
def test_a_compiler_is_proven(tmp_path: Path) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    compiled.require_compiler(torch.device("cpu"), tmp_path)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
