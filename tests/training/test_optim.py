"""Groups, schedules, clipping and optimizers, the 8-bit ones for real."""

from __future__ import annotations

import math
import sys

import bitsandbytes
import pytest
import torch
from torch import nn

from lorabooth.errors import RecipeError
from lorabooth.progress import Silent
from lorabooth.recipe import OptimSection
from lorabooth.training import optim

CPU = torch.device("cpu")


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def section(**changes) -> OptimSection:
    return OptimSection(**{"lr": 1e-3, "text_encoder_lr": 2e-4, "weight_decay": 0.1, **changes})


def test_each_component_has_its_own_learning_rate():
    denoiser, text = parameter(2, 2), parameter(3)
    made = optim.groups({"denoiser": [denoiser], "text_encoder": [text], "text_encoder_2": []}, section())
    assert [group["name"] for group in made] == ["denoiser", "text_encoder"]
    assert [group["base_lr"] for group in made] == [1e-3, 2e-4]
    assert made[0]["params"] == [denoiser]
    assert all(group["weight_decay"] == 0.1 for group in made)


def test_auto_that_was_not_resolved_is_named():
    with pytest.raises(RecipeError, match=r"optim\.text_encoder_lr"):
        optim.groups({"text_encoder": [parameter(1)]}, OptimSection(lr=1e-3))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_learning_rates_reach_the_parameters(name):
    one, two = parameter(64, 64), parameter(64, 64)
    plan = section(name=name, weight_decay=0.0, schedule="linear")
    optimizer = optim.make(
        plan,
        optim.groups({"denoiser": [one], "text_encoder": [two]}, plan),
        CPU,
        strict=False,
        reporter=Silent(),
    )
    assert optim.set_lr(optimizer, plan, 5, 10) == pytest.approx(5e-4)
    for weight in (one, two):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # The first AdamW step moves every weight by its learning rate.
    assert (1 - one).mean().item() == pytest.approx(5e-4, rel=1e-2)
    assert (1 - two).mean().item() == pytest.approx(1e-4, rel=1e-2)


def test_adamw8bit_is_real_and_says_what_stays_in_32_bit():
    plan, listener = section(name="adamw8bit"), Listener()
    big, small = parameter(64, 64), parameter(5)
    groups = optim.groups({"denoiser": [big, small]}, plan)
    optimizer = optim.make(plan, groups, CPU, strict=True, reporter=listener)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    for weight in (big, small):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[big]["state1"].dtype == torch.uint8
    assert optimizer.state[small]["state1"].dtype == torch.float32
    assert "1 of 2 tensors is 8-bit" in listener.said[0]
    assert not listener.warned


def test_paged_on_a_cpu_falls_back_loudly_or_fails_when_strict():
    plan, listener = section(name="paged_adamw8bit"), Listener()
    groups = optim.groups({"denoiser": [parameter(64, 64)]}, plan)
    optimizer = optim.make(plan, groups, CPU, strict=False, reporter=listener)
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
    assert "adamw8bit is used instead" in listener.warned[0]
    with pytest.raises(RecipeError, match="paged"):
        optim.make(plan, groups, CPU, strict=True, reporter=listener)


def test_without_bitsandbytes_adamw_takes_its_place_loudly(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    plan, listener = section(name="adamw8bit"), Listener()
    groups = optim.groups({"denoiser": [parameter(64, 64)]}, plan)
    optimizer = optim.make(plan, groups, CPU, strict=False, reporter=listener)
    assert type(optimizer) is torch.optim.AdamW
    assert "pip install" in listener.warned[0]
    with pytest.raises(RecipeError, match="pip install") as caught:
        optim.make(plan, groups, CPU, strict=True, reporter=listener)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("step_body", "told"),
    [
        (lambda self: None, "wrong numbers"),
        (lambda self: (_ for _ in ()).throw(NameError("no library")), "NameError: no library"),
    ],
)
def test_a_bitsandbytes_that_imports_but_does_not_work_is_found_out(monkeypatch, step_body, told):
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", step_body)
    assert told in optim.eight_bit_problem("adamw8bit", CPU)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_optimizers_are_proven_on_a_cpu(name):
    assert optim.eight_bit_problem(name, CPU) == ""


def test_schedules_by_hand():
    assert [optim.lr_at(section(), 1.0, step, 4) for step in range(4)] == [1.0] * 4
    linear = [optim.lr_at(section(schedule="linear"), 2.0, step, 4) for step in range(5)]
    assert linear == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    cosine = [optim.lr_at(section(schedule="cosine"), 1.0, step, 4) for step in range(5)]
    assert cosine == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])
    warm = [optim.lr_at(section(schedule="linear", warmup_steps=2), 1.0, step, 6) for step in range(6)]
    assert warm == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_learning_rate_is_never_negative_nor_above_its_base(schedule, warmup):
    plan = section(schedule=schedule, warmup_steps=warmup)
    rates = [optim.lr_at(plan, 1e-4, step, 10) for step in range(15)]
    assert all(0 <= rate <= 1e-4 for rate in rates)
    assert all(rate > 0 for rate in rates[:10])


def test_clip_scales_to_the_bound_and_tells_the_norm_before():
    weights = [parameter(3), parameter(1), parameter(2)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([4.0])
    assert optim.clip(weights, 0.0).item() == 5.0
    assert weights[1].grad.item() == 4.0
    assert optim.clip(weights, 1.0).item() == 5.0
    assert weights[1].grad.item() == pytest.approx(0.8, rel=1e-4)
    assert optim.clip(weights, 10.0).item() == pytest.approx(1.0, rel=1e-4)
    assert weights[1].grad.item() == pytest.approx(0.8, rel=1e-4)


def test_clip_tells_of_non_finite_gradients():
    weight = parameter(2)
    weight.grad = torch.tensor([1.0, math.inf])
    assert not optim.clip([weight], 1.0).isfinite()
