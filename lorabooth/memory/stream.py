"""A denoiser's frozen weights wait in host memory, and come to the device unit by unit.

Not diffusers' group offloading (0.42): it gives weights back after the forward pass by exchanging the
parameters' data, which autograd has saved for the backward pass: that of a convolution then
sees the exchanged ones, recomputed or not. Here a unit that runs sees copies, and what autograd saves of them
lives as long as it is needed: with every unit recomputed, from its recomputation to its own backward pass.
So the device holds two or three units at a time. On a GPU the copies come from page-locked memory on a stream
of their own, one unit ahead.

On other devices the same is done without streams and without being ahead: there a copy costs what it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lorabooth.memory.host import pinned
from lorabooth.memory.units import Unit, call_of, checkpoint_units

_KEY = "_lorabooth_streamed"


class _Streamed:
    """The frozen tensors of one unit: their places, and the tensors in host memory that belong there."""

    def __init__(self, unit: Unit, device: torch.device) -> None:
        self.name = unit.name
        self.places: list[tuple[dict[str, Any], str, Tensor]] = []
        factors = _adapter_factors(unit.module)
        owners = [owner for owner in unit.module.modules() if owner not in factors]
        for held in (table for owner in owners for table in (owner._parameters, owner._buffers)):
            for name, tensor in held.items():
                if tensor is not None and not tensor.requires_grad:
                    home = pinned(tensor.detach(), device)
                    kept = nn.Parameter(home, requires_grad=False) if _is_parameter(tensor) else home
                    self.places.append((held, name, kept))
        self.home()

    def home(self) -> None:
        """The host's tensors are the unit's."""
        for held, name, kept in self.places:
            held[name] = kept

    def put(self, copies: list[Tensor]) -> None:
        """The copies are the unit's."""
        for (held, name, kept), copy in zip(self.places, copies, strict=True):
            held[name] = nn.Parameter(copy, requires_grad=False) if _is_parameter(kept) else copy

    def absent(self) -> None:
        """Nobody's: for what walks over all of a module's tensors."""
        for held, name, _ in self.places:
            held[name] = None


class _Line:
    """The units of one denoiser in the order in which they are called, as it shows itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Weak: a unit that leaves the denoiser (a hollowed one) is not kept.
        self._follows: WeakValueDictionary[tuple[str, bool], _Streamed] = WeakValueDictionary()
        self._last: tuple[str, bool] | None = None
        self._ahead: tuple[str, list[Tensor], Any] | None = None

    @contextmanager
    def resident(self, unit: _Streamed) -> Iterator[None]:
        """The unit's weights are on the device; afterwards they are the host's again."""
        copies = self._take(unit)
        self._note(unit)
        try:
            unit.put(copies)
            del copies
            self._start_next()
            yield
        finally:
            unit.home()

    def _note(self, unit: _Streamed) -> None:
        # A pass backwards goes through the units in another order than one forwards.
        now = (unit.name, torch._C._current_graph_task_id() != -1)
        if self._last is not None:
            self._follows[self._last] = unit
        self._last = now

    def _take(self, unit: _Streamed) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != unit.name:
            return [_copy(kept, self.device) for _, _, kept in unit.places]
        _, copies, done = ahead
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for copy in copies:
            copy.record_stream(current)
        return copies

    def _start_next(self) -> None:
        """Copy the unit that came after this one last time, while this one computes."""
        following = self._follows.get(self._last) if self._last is not None else None
        if self.stream is None or following is None:
            return
        with torch.cuda.stream(self.stream):
            copies = [_copy(kept, self.device) for _, _, kept in following.places]
            self._ahead = (following.name, copies, self.stream.record_event())


def stream(denoiser: nn.Module, device: torch.device | str) -> int:
    """Keep the frozen weights of a denoiser's units in host memory; they visit the device to compute.

    The weights outside of units (first and last layers, embeddings), the adapter and its gradients live on
    the device: `denoiser.to(device)` moves those, and leaves what is streamed. Calling it again starts anew
    with the weights as they are now.

    Args:
        denoiser: changed in place. To train it, recompute every unit (`checkpoint.recompute`): otherwise
            autograd keeps the copies until the backward pass, and nothing is saved.
        device: where it computes.

    Returns:
        Bytes that are in host memory now.
    """
    stop(denoiser)
    line = _Line(torch.device(device))
    total = 0
    for unit in checkpoint_units(denoiser):
        module: Any = unit.module
        streamed = _Streamed(unit, line.device)
        call_of(unit).resident = partial(line.resident, streamed)
        module._apply = partial(_apply_to_others, module, streamed)
        setattr(module, _KEY, streamed)
        total += sum(kept.numel() * kept.element_size() for _, _, kept in streamed.places)
    return total


def stop(denoiser: nn.Module) -> None:
    """Undo `stream`: the weights are in host memory, and stay where they are moved to."""
    for unit in checkpoint_units(denoiser):
        module: Any = unit.module
        if _KEY in vars(module):
            call_of(unit).resident = None
            del module._apply
            delattr(module, _KEY)


def is_streamed(denoiser: nn.Module) -> bool:
    """Whether `stream` is in effect."""
    return any(_KEY in vars(module) for module in denoiser.modules())


def streamed_tensors(denoiser: nn.Module) -> list[Tensor]:
    """The tensors that wait in host memory; none of them counts as the device's."""
    held = [vars(module)[_KEY] for module in denoiser.modules() if _KEY in vars(module)]
    return [kept for streamed in held for _, _, kept in streamed.places]


def _apply_to_others(module: nn.Module, streamed: _Streamed, fn: Any, recurse: bool = True) -> nn.Module:
    """`Module._apply` (to, cuda, half ...) on all of a unit but its streamed weights."""
    streamed.absent()
    try:
        type(module)._apply(module, fn, recurse)  # type: ignore[no-untyped-call]
    finally:
        streamed.home()
    return module


def _copy(kept: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(kept, device=device).copy_(kept, non_blocking=True)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _adapter_factors(unit: nn.Module) -> set[nn.Module]:
    """The modules of adapters' factors: small, trained, and at times without gradient (adapter off)."""
    return {
        factor
        for layer in unit.modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "lora_B")
        for factors in (layer.lora_A, layer.lora_B)
        for factor in factors.modules()  # type: ignore[union-attr]
    }
