"""The loop on a real session: numbers that go wrong are skipped, told and in the end stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorabooth.errors import TrainingError
from lorabooth.training.alarms import DEAD_AFTER_STEPS, NO_GRADIENT_STEPS, Watch
from lorabooth.training.log import FiniteGuard
from lorabooth.training.loop import Session
from lorabooth.types import Batch
from tests.training import runs, sessions
from tests.training.sessions import Listener, run

Make = Callable[..., Session]


@pytest.fixture
def make(tiny_sd: Path, photos: Path, tmp_path: Path) -> Make:
    """Composes sessions; takes recipe overrides."""
    return lambda *overrides: sessions.session(tiny_sd, photos, tmp_path / "cache", *overrides)


@pytest.fixture
def session(make: Make) -> Session:
    return make()


def _spoiled(session: Session, steps: Sequence[int]) -> Session:
    """The same session, whose latents are NaN in some steps."""

    def batches(step: int) -> Sequence[Sequence[Batch]]:
        drawn = session.batches(step)
        if step not in steps:
            return drawn
        return [[replace(batch, latents=batch.latents * float("nan")) for batch in micro] for micro in drawn]

    return replace(session, batches=batches)


def _weights(session: Session) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in session.parameters]


def test_a_step_that_is_not_finite_is_skipped_and_told(session: Session, tmp_path: Path) -> None:
    spoiled = _spoiled(session, [1])
    run(spoiled, tmp_path, range(1))
    before = _weights(session)
    run(spoiled, tmp_path, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
    run(spoiled, tmp_path, range(2, 3))
    assert not all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
    lines = runs.metrics(tmp_path)
    assert [line.get("skipped", False) for line in lines] == [False, True, False]
    assert lines[1]["loss"] is None
    assert lines[1]["record_ids"]
    assert lines[1]["not_finite"] == ["the subject's loss"]
    assert all(bool(torch.isfinite(weight).all()) for weight in _weights(session))


def test_a_run_that_stays_not_finite_stops(session: Session, tmp_path: Path) -> None:
    saved: list[int] = []
    listener = Listener()
    spoiled = _spoiled(session, range(3, 100))
    with pytest.raises(TrainingError, match="not finite") as raised:
        run(spoiled, tmp_path, range(100), between=sessions.hooks(saved), reporter=listener)
    assert raised.value.exit_code == 7
    assert saved == [], "a broken state was saved"
    assert "the subject's loss (fp32 on cpu" in str(raised.value)
    assert len(runs.metrics(tmp_path)) == 13
    assert len(listener.warnings) == 1
    assert listener.warnings[0].startswith("step 4 was skipped")


def test_the_photo_that_spoils_every_step_is_named(session: Session, tmp_path: Path) -> None:
    """Two photos a step, one of them always the broken one."""
    bad = session.batches(0)[0][0].record_ids[0]

    def batches(step: int) -> Sequence[Sequence[Batch]]:
        broken = [replace(batch, latents=batch.latents * float("inf")) for batch in session.batches(0)[0]]
        return [session.batches(step)[0], broken]

    others = {name for step in range(1, 10) for name in session.batches(step)[0][0].record_ids} - {bad}
    assert others, "all steps drew the same photo"
    with pytest.raises(TrainingError, match="In all of them") as raised:
        run(replace(session, batches=batches), tmp_path, range(50))
    assert f"In all of them: {bad}." in str(raised.value)
    assert not any(name in str(raised.value) for name in others)


def test_the_component_whose_gradient_is_not_finite_is_named(make: Make, tmp_path: Path) -> None:
    session = make("adapter.text_encoder=true")
    text = next(g for g in session.optimizer.param_groups if g["name"] == "text_encoder")["params"]
    for weight in text:
        weight.register_hook(lambda gradient: gradient * float("nan"))
    before = _weights(session)
    with pytest.raises(TrainingError, match="the gradient of text_encoder") as raised:
        run(session, tmp_path, range(9), watch=Watch(guard=FiniteGuard(limit=2)))
    assert "denoiser" not in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
    assert runs.metrics(tmp_path)[1]["not_finite"] == ["the gradient of text_encoder"]


def test_the_count_of_steps_that_were_not_finite_survives_an_interruption(
    session: Session, tmp_path: Path
) -> None:
    spoiled = _spoiled(session, range(100))
    watch = run(spoiled, tmp_path, range(6))
    watch = Watch.resumed(json.loads(json.dumps(watch.state_dict(), allow_nan=False)))
    listener = Listener()
    with pytest.raises(TrainingError, match="10 optimizer steps in a row up to step 10"):
        run(spoiled, tmp_path, range(6, 100), reporter=listener, watch=watch)
    assert listener.warnings == [], "told again after the interruption"


def test_an_adapter_that_stays_zero_is_an_alarm(session: Session, tmp_path: Path) -> None:
    for group in session.optimizer.param_groups:
        group["base_lr"] = 0.0
    listener, told = Listener(), Watch()
    for part in (range(20), range(20, 22), range(22, 24)):
        assert (part.start > DEAD_AFTER_STEPS) == bool(listener.warnings)
        told = Watch.resumed(run(session, tmp_path, part, reporter=listener, watch=told).state_dict())
    assert len(listener.warnings) == 1
    assert "every lora_B of denoiser is still zero" in listener.warnings[0]
    assert told.warnings == listener.warnings


def test_only_the_component_that_stays_zero_is_named(make: Make, tmp_path: Path) -> None:
    session = make("adapter.text_encoder=true")
    for group in session.optimizer.param_groups:
        if group["name"] == "text_encoder":
            group["base_lr"] = 0.0
    told = run(session, tmp_path, range(DEAD_AFTER_STEPS + 1))
    assert len(told.warnings) == 1
    assert "every lora_B of text_encoder is still zero" in told.warnings[0]


def test_a_component_that_the_loss_does_not_reach_is_an_alarm(make: Make, tmp_path: Path) -> None:
    session = make("adapter.text_encoder=true")
    condition = session.step_parts.condition

    def cut(cond):
        return {name: tensor.detach() for name, tensor in condition(cond).items()}

    session = replace(session, step_parts=replace(session.step_parts, condition=cut))
    told = run(session, tmp_path, range(NO_GRADIENT_STEPS))
    assert len(told.warnings) == 1
    assert "no gradient reached text_encoder" in told.warnings[0]


def test_a_sound_run_has_no_alarms_and_reads_the_device_once_a_step(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make("adapter.text_encoder=true")
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        plain = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *, name: str = name, plain: Callable[..., object] = plain) -> object:
            reads.append(f"{name} of {tensor.numel()} {tensor.dtype}")
            return plain(tensor)

        monkeypatch.setattr(torch.Tensor, name, noted)
    told = Watch()
    for step in range(DEAD_AFTER_STEPS + 4):
        reads.clear()
        told = run(session, tmp_path, range(step, step + 1), watch=told)
        # Integers and booleans are of the batch, read before it goes to the device.
        of_the_step = [read for read in reads if "float32" in read]
        assert len(of_the_step) == 1, f"step {step} read {of_the_step}"
    assert told.warnings == []


def _scaled(session: Session, scale: float) -> Session:
    """The same fp16 session, whose loss scale grows after three good steps in a row."""
    assert session.scaler.is_enabled()
    session.scaler.load_state_dict(
        {**session.scaler.state_dict(), "scale": scale, "growth_interval": 3, "_growth_tracker": 0}
    )
    return session


def test_the_loss_scale_is_halved_on_overflow_and_recovers(make: Make, tmp_path: Path) -> None:
    """From 2**34 it takes more halvings in a row than the guard lets non-finite steps pass."""
    session = _scaled(make("memory.precision=fp16"), 2.0**34)
    before = _weights(session)
    watch = run(session, tmp_path, range(30))
    lines = runs.metrics(tmp_path)
    scales = [line["loss_scale"] for line in lines if line.get("overflow")]
    first_good = next(index for index, line in enumerate(lines) if not line.get("overflow"))
    assert first_good > watch.guard.limit
    assert scales[:first_good] == [2.0 ** (34 - k) for k in range(first_good)]
    assert all(line["grad_norm"] is not None for line in lines if not line.get("overflow"))
    assert watch.guard.overflows == len(scales) > first_good, "the scale did not grow again to its limit"
    assert watch.guard.in_a_row == 0
    assert watch.warnings == []
    after = _weights(session)
    assert {weight.dtype for weight in after} == {torch.float32}
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(bool(torch.isfinite(weight).all()) for weight in after)


def test_a_photo_that_is_not_finite_leaves_the_loss_scale_alone(make: Make, tmp_path: Path) -> None:
    session = _scaled(make("memory.precision=fp16"), 1024.0)
    watch = run(_spoiled(session, range(2)), tmp_path, range(2))
    assert session.scaler.get_scale() == 1024.0
    assert (watch.guard.overflows, watch.guard.in_a_row) == (0, 2)


def test_gradients_that_no_scale_mends_end_an_fp16_run(make: Make, tmp_path: Path) -> None:
    session = _scaled(make("memory.precision=fp16"), 16.0)
    for weight in session.parameters:
        weight.register_hook(lambda gradient: gradient * float("inf"))
    watch = Watch(guard=FiniteGuard(limit=3))
    with pytest.raises(TrainingError, match=r"up to step 7 .*the gradient of denoiser \(fp16") as raised:
        run(session, tmp_path, range(100), watch=watch)
    assert watch.guard.overflows == 4  # 16, 8, 4, 2
    assert 'memory.precision = "bf16"' in raised.value.fix


def test_fp16_goes_on_equal_after_an_interruption(make: Make, tmp_path: Path) -> None:
    """Interrupted while the scale is still being halved, after it was found, and twice."""

    def ended(folder: str, *parts: range) -> tuple[list[torch.Tensor], dict[str, object], object]:
        (tmp_path / folder).mkdir()
        session, watch = _scaled(make("memory.precision=fp16"), 2.0**24), Watch()
        facts: dict[str, dict[str, object]] = {}
        for part in parts:
            if facts:
                weights, optimizer = _weights(session), session.optimizer.state_dict()
                session, watch = make("memory.precision=fp16"), Watch.resumed(facts["watch"])
                session.scaler.load_state_dict(facts["scaler"])
                session.optimizer.load_state_dict(optimizer)
                with torch.no_grad():
                    for parameter, weight in zip(session.parameters, weights, strict=True):
                        parameter.copy_(weight)
            watch = run(session, tmp_path / folder, part, watch=watch)
            facts = {"scaler": session.scaler.state_dict(), "watch": watch.state_dict()}
            facts = json.loads(json.dumps(facts, allow_nan=False))
        return _weights(session), facts, runs.metrics(tmp_path / folder)

    whole = ended("whole", range(12))
    resumed = ended("resumed", range(2), range(2, 9), range(9, 12))
    torch.testing.assert_close(resumed[0], whole[0], rtol=0, atol=0)
    assert resumed[1:] == whole[1:]
    overflows = [line.get("overflow", False) for line in whole[2]]
    assert overflows[1:3] == [True, True], "the first interruption is not within the halving"
    assert not all(overflows[:9])


def test_a_full_disk_ends_the_run_with_one_message(session: Session, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    saved: list[int] = []
    with pytest.raises(TrainingError, match="No space left"):
        run(session, tmp_path, range(3), between=sessions.hooks(saved))
    assert saved == []


def test_a_started_session_saves_once_at_its_end(session: Session, tmp_path: Path) -> None:
    saved: list[int] = []
    run(session, tmp_path, range(5), between=replace(sessions.hooks(saved), checkpoint_every=2))
    assert saved == [2, 4, 5]
