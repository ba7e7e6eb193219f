"""Denoiser and VAE in turn. This CPU plays the device, and what waits in host memory is out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorabooth.families import registry, source
from lorabooth.memory import in_turn
from lorabooth.memory.stream import stream, streamed_tensors
from tests.memory import nets


def _leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has left can be used by nobody."""
    leave = in_turn._Waiting.leave

    def gone(waiting: Any) -> None:
        leave(waiting)
        for tensor in waiting._tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)

    monkeypatch.setattr(in_turn, "has_own_memory", lambda device: True)
    monkeypatch.setattr(in_turn._Waiting, "leave", gone)


@pytest.fixture
def parts(tiny_sd: Path) -> Any:
    found = source.resolve(str(tiny_sd))
    return registry.family(found.family).load(found, torch.float32)


def _held(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _held(module).items()}


def test_each_is_there_while_it_works_and_the_same_afterwards(parts, monkeypatch) -> None:
    _leaves_nothing(monkeypatch)
    unet, vae = parts.denoiser, parts.vae
    trained = nets.adapt(unet)
    before, objects = (_bits(unet), _bits(vae)), (_held(unet), _held(vae))
    adapter = [parameter.data_ptr() for parameter in trained]
    with in_turn.taking_turns(unet, vae) as decoding:
        for _ in range(2):
            assert not any(tensor.numel() for tensor in _held(vae).values())
            torch.testing.assert_close(_bits(unet), before[0], rtol=0, atol=0)
            with decoding():
                torch.testing.assert_close(_bits(vae), before[1], rtol=0, atol=0)
                there = [name for name, tensor in _held(unet).items() if tensor.numel()]
                assert len(there) == len(trained)
                assert all("lora_" in name for name in there)
                assert [parameter.data_ptr() for parameter in trained] == adapter
    torch.testing.assert_close((_bits(unet), _bits(vae)), before, rtol=0, atol=0)
    for module, held in zip((unet, vae), objects, strict=True):
        assert all(now is held[name] for name, now in _held(module).items())


def test_what_is_streamed_waits_already(parts, monkeypatch) -> None:
    _leaves_nothing(monkeypatch)
    stream(parts.denoiser, "cpu")
    waiting = streamed_tensors(parts.denoiser)
    places = [tensor.data_ptr() for tensor in waiting]
    with in_turn.taking_turns(parts.denoiser, parts.vae) as decoding, decoding():
        assert [tensor.data_ptr() for tensor in waiting] == places
        assert not parts.denoiser.conv_in.weight.numel()


def test_a_failure_brings_all_back(parts, monkeypatch) -> None:
    _leaves_nothing(monkeypatch)
    before = (_bits(parts.denoiser), _bits(parts.vae))
    with (
        pytest.raises(KeyboardInterrupt),
        in_turn.taking_turns(parts.denoiser, parts.vae) as decoding,
        decoding(),
    ):
        raise KeyboardInterrupt
    torch.testing.assert_close((_bits(parts.denoiser), _bits(parts.vae)), before, rtol=0, atol=0)


def test_where_host_and_device_are_one_memory_nothing_moves(parts) -> None:
    held = {**_held(parts.denoiser), **_held(parts.vae)}
    places = [tensor.data_ptr() for tensor in held.values()]
    with in_turn.taking_turns(parts.denoiser, parts.vae) as decoding:
        assert [tensor.data_ptr() for tensor in held.values()] == places
        with decoding():
            assert [tensor.data_ptr() for tensor in held.values()] == places
