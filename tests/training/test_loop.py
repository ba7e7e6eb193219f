"""The loop on a real session: numbers that go wrong are skipped, told and in the end stop the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lorabooth.data.cache import Store
from lorabooth.errors import TrainingError
from lorabooth.progress import Silent
from lorabooth.training.caching import cache_and_release
from lorabooth.training.compose import attach, compose
from lorabooth.training.log import MetricsLog
from lorabooth.training.loop import DEAD_AFTER_STEPS, Hooks, Session, run_steps
from lorabooth.training.setting import Clock, open_setting
from lorabooth.types import Batch
from tests.training import runs


@pytest.fixture
def session(tiny_sd: Path, photos: Path, tmp_path: Path) -> Session:
    """Composed as a run composes it, without a prior."""
    setting = open_setting(runs.recipe(tiny_sd, photos, "prior.mode=none"), Clock(), Silent())
    examples, _ = cache_and_release(setting, (), Store(tmp_path / "cache"), Silent())
    accelerator = Accelerator()
    attached = attach(setting, accelerator.device, Silent())
    return compose(setting, examples, attached, accelerator=accelerator, reporter=Silent())


def _hooks(saved: list[int]) -> Hooks:
    return Hooks(checkpoint=saved.append, preview=lambda step: None, checkpoint_every=0, preview_every=0)


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
    log, saved = MetricsLog(tmp_path / "metrics.jsonl"), []
    run_steps(spoiled, _hooks(saved), log, start=0, stop=1, reporter=Silent())
    before = _weights(session)
    run_steps(spoiled, _hooks(saved), log, start=1, stop=2, reporter=Silent())
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
    run_steps(spoiled, _hooks(saved), log, start=2, stop=3, reporter=Silent())
    assert not all(torch.equal(a, b) for a, b in zip(before, _weights(session), strict=True))
    lines = runs.metrics(tmp_path)
    assert [line.get("skipped", False) for line in lines] == [False, True, False]
    assert lines[1]["loss"] is None
    assert lines[1]["record_ids"]
    assert all(bool(torch.isfinite(weight).all()) for weight in _weights(session))


def test_a_run_that_stays_not_finite_stops(session: Session, tmp_path: Path) -> None:
    saved: list[int] = []
    with pytest.raises(TrainingError, match="not finite") as raised:
        run_steps(
            _spoiled(session, range(3, 100)),
            _hooks(saved),
            MetricsLog(tmp_path / "metrics.jsonl"),
            start=0,
            stop=100,
            reporter=Silent(),
        )
    assert raised.value.exit_code == 7
    assert saved == [], "a broken state was saved"
    assert "fp32 on cpu" in str(raised.value)


def test_an_adapter_without_gradient_is_an_alarm(session: Session, tmp_path: Path) -> None:
    class Listener(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    for group in session.optimizer.param_groups:
        group["base_lr"] = 0.0
    listener = Listener()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    told = run_steps(session, _hooks([]), log, start=0, stop=DEAD_AFTER_STEPS + 2, reporter=listener)
    assert [w for w in listener.warnings if "lora_B is still zero" in w] == [
        w for w in told.warnings if "lora_B" in w
    ]
    assert len([w for w in told.warnings if "lora_B" in w]) == 1


def test_a_started_session_saves_once_at_its_end(session: Session, tmp_path: Path) -> None:
    saved: list[int] = []
    log = MetricsLog(tmp_path / "metrics.jsonl")
    run_steps(session, replace(_hooks(saved), checkpoint_every=2), log, start=0, stop=5, reporter=Silent())
    assert saved == [2, 4, 5]
