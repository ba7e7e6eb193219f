from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.errors import TrainingError
from lorabooth.pocket.trainer import (
    Budget,
    Hyper,
    Task,
    average_of,
    ema_decay_at,
    learning_rate,
    read_state,
    train,
    write_state,
)
from lorabooth.rng import generator_for


def _task(folder: Path, steps: int, fail_at: int = -1) -> Task:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)

    def losses(step: int) -> dict[str, Tensor]:
        x = torch.randn((16, 4), generator=generator_for(0, step, 0, "x"))
        error = (module(x) - x.sum(dim=1, keepdim=True)).square().mean()
        return {"loss": error * float("nan") if step == fail_at else error}

    hyper = Hyper(lr=0.05, warmup_steps=1, ema_decay=0.9)
    return Task(
        "toy", module, losses, hyper, Budget(0, steps), folder / "toy.safetensors", folder / "log.jsonl"
    )


def test_training_lowers_the_loss_and_keeps_the_average(tmp_path: Path) -> None:
    task = _task(tmp_path, 60)
    before = float(task.losses(0)["loss"].detach())
    average = train(task)
    task.module.load_state_dict(average)
    assert float(task.losses(0)["loss"].detach()) < 0.2 * before
    assert torch.equal(average_of(task.state_file)["weight"], average["weight"])


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    whole = _task(tmp_path / "whole", 6)
    expected = train(whole)
    halted = _task(tmp_path / "halves", 6, fail_at=3)
    seen: list[int] = []
    with pytest.raises(TrainingError, match="step 3"):
        train(replace(halted, save_every_s=-1.0, on_save=lambda _ema, step, _progress: seen.append(step)))
    assert seen == [1, 2, 3]
    again = train(_task(tmp_path / "halves", 6))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert read_state(tmp_path / "halves" / "toy.safetensors")[1]["step"] == 6


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(2.0)}
    write_state(tmp_path / "s.safetensors", tensors, {"step": 7})
    found, info = read_state(tmp_path / "s.safetensors")
    assert info == {"step": 7}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not list(tmp_path.glob("*.partial"))


def test_schedule_warms_up_and_falls_with_progress() -> None:
    hyper = Hyper(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    assert learning_rate(hyper, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(hyper, 50, 0.0) == pytest.approx(1.0)
    assert learning_rate(hyper, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(hyper, 50, 1.0) == pytest.approx(0.1)


def test_budget_counts_time_but_grants_the_least_steps() -> None:
    assert Budget(10, 2).progress(100, 5) == 0.5
    assert Budget(10, 2).progress(1, 50) == 0.5
    assert Budget(0, 4).progress(2, 99) == 0.5
    assert ema_decay_at(0, 0.999) == pytest.approx(0.1)
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_log_lines_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorabooth.pocket.trainer.LOG_EVERY_S", -1.0)
    train(_task(tmp_path, 3))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 for line in lines)
