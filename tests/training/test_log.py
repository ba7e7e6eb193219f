"""metrics.jsonl is whole lines of valid JSON, each step once; the guard ends what no longer learns."""

from __future__ import annotations

import json
import math

import pytest

from lorabooth.errors import TrainingError
from lorabooth.training.log import FiniteGuard, MetricsLog, read


def test_lines_come_back_in_order_and_are_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    lines = [{"step": step, "loss": 0.1 * step, "lr": 1e-4, "skipped": False} for step in (1, 2, 3)]
    for count, line in enumerate(lines, start=1):
        log.append(line)
        assert read(path) == lines[:count]


def test_non_finite_numbers_are_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "loss_prior": 0.5})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = log.path.read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "loss_prior": 0.5}


def test_truncation_on_resume_leaves_every_step_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        log.append({"step": step, "loss": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed here
    assert [line["step"] for line in read(log.path)] == [1, 2, 3, 4, 5, 6, 7]
    log.truncate_after(4)
    for step in range(5, 10):
        log.append({"step": step, "loss": -float(step)})
    found = read(log.path)
    assert [line["step"] for line in found] == list(range(1, 10))
    assert found[3]["loss"] == 4.0
    assert found[4]["loss"] == -5.0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_keeps_the_text_of_kept_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 0.1 + 0.2, "record_ids": ["größe.jpg"]})
    before = log.path.read_bytes()
    log.truncate_after(1)
    assert log.path.read_bytes() == before


def test_nothing_to_truncate(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_foreign_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(TrainingError, match="line 2"):
        read(path)


def check(guard: FiniteGuard, step: int, finite: bool) -> None:
    guard.check(
        step=step,
        finite=finite,
        record_ids=["01.jpg", "class/7.png", "01.jpg"],
        diagnosis="compute dtype fp16",
        figures={"loss": 1.0 if finite else math.nan, "loss_instance": 1.0, "lr": 1e-4},
    )


def test_guard_ends_a_run_after_k_in_a_row_with_a_diagnosis():
    guard = FiniteGuard(limit=3)
    for step in (1, 2):
        check(guard, step, finite=False)
    with pytest.raises(TrainingError) as caught:
        check(guard, 3, finite=False)
    told = str(caught.value)
    for part in ("step 3", "loss is nan", "fp16", "01.jpg, class/7.png", "memory.precision", "optim.lr"):
        assert part in told
    assert "loss_instance is" not in told
    assert caught.value.exit_code == 7


def test_guard_counts_only_steps_in_a_row():
    guard = FiniteGuard(limit=2)
    for step in range(20):
        check(guard, step, finite=step % 2 == 0)
    assert guard.in_a_row == 1
