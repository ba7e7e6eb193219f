"""Weights that visit the device: gradients stay, and no more than a few units' weights are there at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabooth.adapters import inject
from lorabooth.memory import quantise, stream
from lorabooth.memory.apply import cast_base
from lorabooth.memory.checkpoint import recompute
from lorabooth.memory.frozen import keep_no_inputs
from lorabooth.memory.units import checkpoint_units
from tests.memory import nets


@pytest.mark.parametrize("kind", ["", *quantise.KINDS])
def test_gradients_are_equal_step_after_step(tiny_sd: Path, kind: str) -> None:
    plain, unet = nets.load(tiny_sd), nets.load(tiny_sd)
    expected_of, parameters = nets.adapt(plain), nets.adapt(unet)
    if kind:
        quantise.quantise(plain, kind, "cpu")
        quantise.quantise(unet, kind, "cpu", to_host=True)
    keep_no_inputs(unet)
    stream.stream(unet, "cpu")
    recompute(unet, offload=True, offload_from_bytes=0)
    expected = nets.gradients(plain, expected_of)
    for _ in range(3):
        torch.testing.assert_close(nets.gradients(unet, parameters), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(nets.loss(unet), nets.loss(plain), rtol=0, atol=0)


def test_few_units_weights_are_on_the_device_at_once(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    keep_no_inputs(unet)
    waiting = stream.stream(unet, "cpu")
    recompute(unet)
    alive: dict[int, int] = {}
    peak = 0
    copy = stream._copy

    def noted(kept: Tensor, device: torch.device) -> Tensor:
        nonlocal peak
        made = copy(kept, device)
        storage = made.untyped_storage()
        key = storage._cdata
        alive[key] = storage.nbytes()
        weakref.finalize(storage, alive.pop, key)
        peak = max(peak, sum(alive.values()))
        return made

    monkeypatch.setattr(stream, "_copy", noted)
    nets.gradients(unet, parameters)
    frozen = [[p for p in u.module.parameters() if not p.requires_grad] for u in checkpoint_units(unet)]
    largest = max(sum(t.numel() * t.element_size() for t in held) for held in frozen)
    assert largest <= peak <= 2 * largest < waiting / 2
    gc.collect()
    assert not alive


def test_moving_and_casting_the_rest_leaves_what_waits(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    waiting = stream.stream(unet, "cpu")
    parameters = nets.adapt(unet)  # afterwards, as when class images were drawn before
    assert stream.is_streamed(unet)
    held = stream.streamed_tensors(unet)
    assert sum(t.numel() * t.element_size() for t in held) == waiting
    assert not {id(p) for p in parameters} & {id(t) for t in held}
    before = [t.clone() for t in held]
    nn.Module.to(unet, torch.float64)
    torch.testing.assert_close(held, before, rtol=0, atol=0)
    assert {p.dtype for p in parameters} == {torch.float64}
    assert unet.conv_in.weight.dtype == torch.float64
    assert unet.down_blocks[0].resnets[0].conv1.get_base_layer().weight is held[_place(unet, held)]


def _place(unet: Any, held: list[Tensor]) -> int:
    weight = unet.down_blocks[0].resnets[0].conv1.get_base_layer().weight
    return next(i for i, tensor in enumerate(held) if tensor is weight)


def test_the_adapter_stays_even_when_it_is_off(tiny_sd: Path) -> None:
    """Switched off its factors want no gradient, like the base's weights."""
    unet, plain = nets.load(tiny_sd), nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    with inject.disabled({"denoiser": unet}):
        stream.stream(unet, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(nets.loss(unet), nets.loss(plain), rtol=0, atol=0)
    assert not {id(p) for p in parameters} & {id(t) for t in stream.streamed_tensors(unet)}


def test_stopping_gives_the_plain_denoiser_back(tiny_sd: Path) -> None:
    unet, plain = nets.load(tiny_sd), nets.load(tiny_sd)
    stream.stream(unet, "cpu")
    stream.stream(unet, "cpu")
    stream.stop(unet)
    assert not stream.is_streamed(unet)
    assert stream.streamed_tensors(unet) == []
    torch.testing.assert_close(dict(unet.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    cast_base(unet, torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


def test_a_unit_that_leaves_the_denoiser_is_not_kept(tiny_sd: Path) -> None:
    unet = nets.load(tiny_sd)
    parameters = nets.adapt(unet)
    stream.stream(unet, "cpu")
    recompute(unet)
    nets.gradients(unet, parameters)
    weight = weakref.ref(unet.mid_block.resnets[0].norm1.weight)
    assert weight() is not None
    unet.mid_block = None
    del parameters
    gc.collect()
    assert weight() is None
