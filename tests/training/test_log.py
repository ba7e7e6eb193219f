"""metrics.jsonl is whole lines of valid JSON, each step once; the guard ends what no longer learns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from lorabooth.errors import LoraboothError, TrainingError
from lorabooth.training.log import FiniteGuard, MetricsLog, read, wrong_parts


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


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\0\0\0", "[1]", '{"loss": 1.0}'])
def test_a_torn_line_after_the_checkpoint_does_not_block_going_on(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{torn}\n{{"step": 4}}\n')
    MetricsLog(path).truncate_after(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_torn_line_is_dropped_with_a_run_that_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st\n{"step": 2}\n')
    MetricsLog(path).truncate_after(0)
    assert path.read_text() == ""


def test_a_torn_line_after_later_steps_does_not_block_either(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\ntorn\n')
    MetricsLog(path).truncate_after(2)
    assert path.read_text() == '{"step": 1}\n'


def test_a_foreign_line_before_the_checkpoint_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\ntorn\n{"step": 3}\n{"step": 4}\n'
    path.write_text(text)
    with pytest.raises(TrainingError, match="line 2"):
        MetricsLog(path).truncate_after(3)
    assert path.read_text() == text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_message(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"No space left to write .*metrics\.jsonl") as raised:
        MetricsLog(path).append({"step": 1, "loss": 0.5})
    assert raised.value.exit_code == 7


def test_a_folder_that_is_gone_is_said_in_one_message(tmp_path):
    with pytest.raises(LoraboothError, match=r"metrics\.jsonl cannot be written"):
        MetricsLog(tmp_path / "gone" / "metrics.jsonl").append({"step": 1})


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_foreign_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(TrainingError, match="line 2"):
        read(path)


LOSS, GRADIENT = "the subject's loss", "the gradient of text_encoder"


def check(
    guard: FiniteGuard,
    step: int,
    *wrong: str,
    ids: Sequence[str] = ("01.jpg", "class/7.png", "01.jpg"),
    overflow: bool = False,
    diagnosis: str = "fp16 on cuda, base tiny in fp16",
) -> None:
    guard.check(step=step, wrong=wrong, record_ids=ids, diagnosis=diagnosis, overflow=overflow)


def again(guard: FiniteGuard) -> FiniteGuard:
    """As it comes back from a checkpoint."""
    return FiniteGuard(guard.limit, json.loads(json.dumps(guard.state_dict(), allow_nan=False)))


def test_guard_ends_a_run_after_k_in_a_row_with_a_diagnosis():
    guard = FiniteGuard(limit=3)
    check(guard, 1, LOSS)
    check(guard, 2, GRADIENT)
    with pytest.raises(TrainingError) as caught:
        check(guard, 3, GRADIENT)
    told = str(caught.value)
    for part in (
        "step 3",
        LOSS,
        GRADIENT,
        "fp16 on cuda",
        "In all of them: 01.jpg, class/7.png.",
        "optim.lr",
    ):
        assert part in told
    assert told.count(GRADIENT) == 1
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("dtype", "tried"), [("fp16", '"bf16" or "fp32"'), ("bf16", '= "fp32"'), ("fp32", "")]
)
def test_guard_tries_only_wider_precisions(dtype, tried):
    with pytest.raises(TrainingError) as caught:
        check(FiniteGuard(limit=1), 1, LOSS, diagnosis=f"{dtype} on cpu, base tiny in {dtype}")
    assert tried in caught.value.fix
    assert ("memory.precision" in caught.value.fix) == bool(tried)


def test_guard_names_the_photo_that_is_always_there():
    guard = FiniteGuard(limit=3)
    check(guard, 1, LOSS, ids=["02.jpg", "03.jpg"])
    check(guard, 2, LOSS, ids=["03.jpg", "01.jpg"])
    with pytest.raises(TrainingError, match=r"In all of them: 03\.jpg\.") as caught:
        check(guard, 3, LOSS, ids=["03.jpg", "02.jpg"])
    assert "look at 03.jpg" in caught.value.fix
    assert "01.jpg" not in str(caught.value)


def test_guard_says_that_it_is_not_one_photo():
    guard = FiniteGuard(limit=3)
    check(guard, 1, LOSS, ids=["01.jpg"])
    check(guard, 2, LOSS, ids=["02.jpg"])
    with pytest.raises(TrainingError, match=r"not one photo; in the last: 01\.jpg") as caught:
        check(guard, 3, LOSS, ids=["01.jpg"])
    assert "look at" not in caught.value.fix


def test_guard_counts_only_steps_in_a_row():
    guard = FiniteGuard(limit=2)
    for step in range(20):
        check(guard, step, *([LOSS] if step % 2 else []))
    assert guard.in_a_row == 1


def test_guard_forgets_a_row_that_ended():
    guard = FiniteGuard(limit=2)
    check(guard, 1, GRADIENT, ids=["01.jpg"])
    check(guard, 2)
    check(guard, 3, LOSS, ids=["02.jpg", "03.jpg"])
    with pytest.raises(TrainingError, match=r"In all of them: 02\.jpg, 03\.jpg\.") as caught:
        check(guard, 4, LOSS, ids=["02.jpg", "03.jpg"])
    assert GRADIENT not in str(caught.value)


def test_guard_goes_on_counting_after_each_interruption():
    guard = FiniteGuard(limit=4)
    check(guard, 1, LOSS, ids=["01.jpg", "03.jpg"])
    for step in (2, 3):
        guard = again(guard)
        check(guard, step, LOSS, ids=["03.jpg"])
    with pytest.raises(TrainingError, match=r"4 optimizer steps .* In all of them: 03\.jpg"):
        check(again(guard), 4, GRADIENT, ids=["03.jpg", "01.jpg"])


def test_guard_counts_overflows_of_the_loss_scale_apart():
    guard = FiniteGuard(limit=2)
    for step in range(16):
        check(guard, step, overflow=True)
    assert (guard.overflows, guard.in_a_row) == (16, 0)
    check(guard, 16, LOSS)
    check(guard, 17, overflow=True)
    assert again(guard).overflows == 17
    with pytest.raises(TrainingError, match="2 optimizer steps"):
        check(again(guard), 18, LOSS)


@pytest.mark.parametrize(
    ("line", "norms", "expected"),
    [
        ({"loss": 1.0, "loss_instance": 1.0, "grad_norm": 2.0}, {"denoiser": 2.0}, []),
        (
            {"loss": math.nan, "loss_instance": math.nan, "grad_norm": math.nan},
            {"denoiser": math.nan},
            [LOSS],
        ),
        (
            {"loss": math.inf, "loss_instance": 1.0, "loss_prior": math.inf, "grad_norm": math.nan},
            {"denoiser": math.nan},
            ["the class images' loss"],
        ),
        (
            {"loss": math.inf, "loss_instance": 3e38, "loss_prior": 3e38, "grad_norm": 1.0},
            {"denoiser": 1.0},
            ["the loss"],
        ),
        (
            {"loss": 1.0, "loss_instance": 1.0, "grad_norm": math.inf},
            {"denoiser": 2.0, "text_encoder": math.inf},
            [GRADIENT],
        ),
        (
            {"loss": 1.0, "loss_instance": 1.0, "grad_norm": math.inf},
            {"denoiser": 3e38, "text_encoder": 3e38},
            ["the gradient's norm"],
        ),
    ],
)
def test_the_part_that_went_wrong_is_named(line, norms, expected):
    assert wrong_parts(line, norms) == expected
