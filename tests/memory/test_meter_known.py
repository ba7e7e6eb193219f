"""What ops make of shapes, remembered: a second world finds it, and it is what the first one computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lorabooth.memory.meter import Meter
from lorabooth.memory.meter_known import KnownOps
from lorabooth.memory.meter_shapes import ShapesOnly

Facts = tuple[torch.Size, tuple[int, ...], int, torch.dtype, bool]

OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a new tensor": lambda x: torch.nn.functional.silu(x),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "a view": lambda x: x[:, 1:].transpose(0, 1),
    "a view of several": lambda x: x.chunk(2, dim=1)[1],
    "in place": lambda x: x.mul_(2),
    "several outputs": lambda x: nn.functional.layer_norm(x, (8,)),
    "a factory": lambda x: torch.zeros(x.shape[0], dtype=torch.int64),
    "a wider type": lambda x: x.to(torch.bfloat16) + torch.ones(4, 8),
}


def facts(x: Tensor, y: Tensor) -> Facts:
    shares = x.untyped_storage()._cdata == y.untyped_storage()._cdata
    return y.shape, y.stride(), int(y.storage_offset()), y.dtype, bool(shares)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_remembered_is_what_was_computed(op: Callable[[Tensor], Tensor]) -> None:
    known, real = KnownOps(), torch.randn(4, 8)
    told = []
    for _ in range(2):
        with ShapesOnly(known), Meter() as meter:
            x = torch.empty(4, 8)
            y = op(x)
            assert type(y) is FakeTensor
            assert y.device == torch.device("cpu")
            told.append((facts(x, y), meter.usage()))
    assert told[0] == told[1]
    assert told[0][0] == facts(real, op(real))


def test_gradients_are_those_of_a_world_that_knows_nothing() -> None:
    known, told = KnownOps(), []
    for _ in range(2):
        with ShapesOnly(known), Meter() as meter, torch.autocast("cpu", torch.bfloat16):
            layer = nn.Linear(8, 8)
            layer(torch.empty(4, 8)).float().square().mean().backward()
            assert layer.weight.grad is not None
            told.append((facts(layer.weight, layer.weight.grad), meter.usage()))
    assert told[0] == told[1]


def test_numbers_of_different_kinds_are_different_calls() -> None:
    known = KnownOps()
    add = torch.ops.aten.add.Tensor
    with ShapesOnly(known):
        x = torch.empty(3, dtype=torch.int64)
        assert len({known.key(add, (x, number), {}) for number in (1, 1.0, True)}) == 3
        assert (x + 1).dtype == torch.int64
        assert (x + 1.0).dtype == torch.float32


def test_values_and_what_depends_on_them_are_not_remembered() -> None:
    known = KnownOps()
    with ShapesOnly(known):
        x = torch.empty(3)
        assert known.key(torch.ops.aten.nonzero.default, (x,), {}) is None
        assert known.key(torch.ops.aten.resize_.default, (x, [4]), {}) is None
        assert known.key(torch.ops.aten.add.Tensor, (x, object()), {}) is None
    real = torch.ones(3)
    assert known.key(torch.ops.aten.add.Tensor, (real, real), {}) is None
