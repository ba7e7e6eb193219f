"""Frozen layers keep nothing but their weight, and are otherwise the layers they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorabooth.memory import frozen
from lorabooth.memory.frozen import FrozenConv2d, keep_no_inputs
from tests.memory import nets


def saved_shapes(layer: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    shapes = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x)
    return shapes


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(4, 6, 1, groups=2, bias=False),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_frozen_convolution_is_the_same_and_keeps_no_input(kind: str) -> None:
    layer = CONVOLUTIONS[kind].requires_grad_(False)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        y = layer(x * 1)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    before, kept_before = run(), saved_shapes(layer, x * 1)
    frozen.freeze_in_place(layer, frozen.PLAIN, {"weight": layer.weight})
    try:
        torch.testing.assert_close(run(), before, rtol=0, atol=0)
        assert (2, 4, 9, 9) in kept_before
        assert saved_shapes(layer, x * 1) == [tuple(layer.weight.shape)]
    finally:
        layer.__class__ = nn.Conv2d


def test_a_units_gradients_stay_and_less_is_kept(tiny_sd: Path) -> None:
    plain, lean = nets.load(tiny_sd), nets.load(tiny_sd)
    parameters, ours = nets.adapt(plain), nets.adapt(lean)
    expected, kept = nets.gradients(plain, parameters), nets.kept_bytes(plain)
    assert keep_no_inputs(lean) == len([m for m in lean.modules() if type(m) is FrozenConv2d])
    torch.testing.assert_close(nets.gradients(lean, ours), expected, rtol=0, atol=0)
    assert nets.kept_bytes(lean) < kept


def test_what_trains_and_what_pads_otherwise_is_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "trains": nn.Conv2d(2, 2, 3),
            "wraps": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular").requires_grad_(False),
            "same": nn.Conv2d(2, 2, 3, padding="same").requires_grad_(False),
            "frozen": nn.Conv2d(2, 2, 3).requires_grad_(False),
        }
    )
    assert keep_no_inputs(model) == 1
    assert type(model["frozen"]) is FrozenConv2d
    assert {type(model[name]) for name in ("trains", "wraps", "same")} == {nn.Conv2d}


def test_a_layer_that_was_constructed_is_a_plain_one_that_trains() -> None:
    """As peft makes the factors of an adapter on top of a frozen layer."""
    layer, plain = FrozenConv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 5, 5)
    layer(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    with pytest.raises(TypeError, match="not a frozen layer"):
        frozen.dequantised(layer, torch.float32)


def test_autocast_decides_the_dtype() -> None:
    layer = nn.Conv2d(2, 2, 3).requires_grad_(False)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    keep_no_inputs(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32
