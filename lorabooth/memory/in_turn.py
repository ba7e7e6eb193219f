"""Denoiser and VAE on the device in turn: each waits in host memory while the other works.

Drawing an image needs the denoiser, step after step, and then the VAE, once. A device that has no room for
both has it for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lorabooth.memory.host import to_host
from lorabooth.memory.stream import streamed_tensors

Decoding = Callable[[], AbstractContextManager[None]]
"""Context in which the VAE is on the device, and the denoiser is not."""


def has_own_memory(device: torch.device) -> bool:
    """Whether what is moved to the host leaves the device: not on a CPU, nor where both share one memory."""
    return device.type == "cuda"


@contextmanager
def taking_turns(denoiser: nn.Module, vae: nn.Module) -> Iterator[Decoding]:
    """Inside, the VAE waits in host memory; in the context that is yielded, the denoiser does.

    Frozen weights and buffers go and come, and are the same tensors throughout; what trains stays, with its
    gradients, and what is streamed waits already. Afterwards everything is where it was. Where the device has
    no memory of its own nothing moves.

    Args:
        denoiser: on the device.
        vae: there or in host memory.
    """
    device = next(denoiser.parameters()).device
    if not has_own_memory(device):
        yield nullcontext
        return
    is_there = next(vae.parameters()).device == device
    painter, decoder = _Waiting(leaving(denoiser, device), device), _Waiting(_tensors(vae), device)

    @contextmanager
    def decoding() -> Iterator[None]:
        painter.leave()
        try:
            decoder.come()
            yield
        finally:
            decoder.leave()
            painter.come()

    decoder.leave()
    try:
        yield decoding
    finally:
        if is_there:
            decoder.come()


def leaving(denoiser: nn.Module, device: torch.device) -> list[Tensor]:
    """What of a denoiser goes to host memory while the VAE decodes."""
    streamed = {id(tensor) for tensor in streamed_tensors(denoiser)}
    frozen = [tensor for tensor in _tensors(denoiser) if not tensor.requires_grad]
    return [tensor for tensor in frozen if tensor.device == device and id(tensor) not in streamed]


class _Waiting:
    """Tensors that nothing changes, at times in host memory: copied there once, as it may be asked often."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._tensors, self._device = [*tensors], device
        self._homes: list[Tensor] = []

    def leave(self) -> None:
        """They are in host memory now."""
        if not self._homes:
            self._homes = [self._home(tensor.detach()) for tensor in self._tensors]
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home

    def come(self) -> None:
        """They are on the device now."""
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = torch.empty_like(home, device=self._device).copy_(home, non_blocking=True)

    def _home(self, tensor: Tensor) -> Tensor:
        return to_host(tensor) if tensor.device == self._device else tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    """Each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())
