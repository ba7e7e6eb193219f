"""Sizes, devices and margins."""

from __future__ import annotations

import pytest
import torch

from lorabooth.errors import RecipeError
from lorabooth.memory.facts import Device
from lorabooth.memory.meter_cuda import CONTEXT_BYTES
from lorabooth.planning.budget import (
    FRAGMENTATION_BYTES,
    budget_for,
    card,
    device_named,
    gib_text,
    own_bytes,
    size_of,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("8192MiB", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("1.5GiB", 3 << 29),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert size_of(text, "--vram") == size_bytes


@pytest.mark.parametrize("text", ["8", "GiB", "-8GiB", "8 apples", "0GiB", "1e9GiB", "9999999TiB", "8GiB8"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        size_of(text, "--vram")
    assert "--vram" in str(error.value)
    assert "8GiB" in str(error.value)


def test_a_margin_is_kept() -> None:
    budget = budget_for(card(8 * GIB), "8GiB")
    assert budget.usable_bytes == 8 * GIB - int(0.05 * 8 * GIB) - FRAGMENTATION_BYTES


def test_the_context_that_a_question_to_a_gpu_makes_is_not_counted_twice() -> None:
    gpu = Device("cuda", "a GPU", 8 * GIB, 7 * GIB, "8.6", True)
    assert budget_for(gpu).total_bytes == 7 * GIB + CONTEXT_BYTES
    free = Device("cuda", "a GPU", 8 * GIB, 8 * GIB, "8.6", True)
    assert budget_for(free).total_bytes == 8 * GIB


def test_on_a_cpu_a_given_budget_holds_this_process_too() -> None:
    cpu = Device("cpu", "a CPU", 32 * GIB, 20 * GIB, "", False)
    given, found = budget_for(cpu, "8GiB"), budget_for(cpu)
    assert found.total_bytes == 20 * GIB
    assert found.margin_bytes == int(0.05 * 20 * GIB)
    assert given.margin_bytes > int(0.05 * 8 * GIB) + own_bytes() // 2


def test_devices_of_this_machine() -> None:
    assert device_named("cpu") == torch.device("cpu")
    for name in ("99", "cuda:99", "nonsense", "meta"):
        with pytest.raises(RecipeError) as error:
            device_named(name)
        assert f"--device {name}" in str(error.value)
        assert "--device cpu" in str(error.value)


def test_sizes_in_words() -> None:
    assert [gib_text(size) for size in (8 * GIB, 96 << 20, 3 << 20, 200 * GIB)] == [
        "8.0 GiB",
        "96 MiB",
        "3.0 MiB",
        "200 GiB",
    ]
