"""Counts the bytes of live tensor storages, op by op, over real tensors and over shapes alone.

One counter serves both: over the shapes of a training step it predicts the step's memory, over a real step it
measures it. What is counted is what a program asks its allocator for: every storage once, however many views
look at it, from the op that makes it until its last reference is gone (autograd's saved tensors included).
What a kernel takes and gives back within one op is not seen (`meter_cuda` says what that leaves out).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorabooth.memory.host import HOST, made_for

ACTIVATIONS = "activations"
GRADIENTS = "gradients"
_FRESH_OP = "aten::lift_fresh"
_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True, slots=True)
class Usage:
    """The highest memory of a stretch of work.

    Attributes:
        peak_bytes: most bytes that were live at once.
        at_peak: bytes of each component at that moment, largest first; they add up to `peak_bytes`.
    """

    peak_bytes: int
    at_peak: Mapping[str, int]

    def plus(self, component: str, extra_bytes: int) -> Usage:
        """The same with a part that was there all the time."""
        parts = {**self.at_peak, component: self.at_peak.get(component, 0) + extra_bytes}
        return Usage(self.peak_bytes + extra_bytes, ordered(parts))


def ordered(parts: Mapping[str, int]) -> Mapping[str, int]:
    """Components that hold anything, largest first."""
    filled = sorted(((bytes_, name) for name, bytes_ in parts.items() if bytes_), reverse=True)
    return MappingProxyType({name: bytes_ for bytes_, name in filled})


@dataclass(slots=True)
class _Live:
    """One storage that is alive; the weak reference tells when it no longer is."""

    ref: weakref.ref[torch.UntypedStorage]
    bytes: int
    component: str


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storage bytes while it is entered; enter it after (inside) a fake tensor mode.

    A storage belongs to what it was made for (`host.making`), else to the component that was named when it
    was made (`during`), until it is given to another (`watch`, `gradients`). Not for several threads at once.
    """

    def __init__(
        self,
        *,
        granule_bytes: int = 1,
        component: str = ACTIVATIONS,
        host_counts: bool = True,
    ) -> None:
        """Start at nothing.

        Args:
            granule_bytes: sizes are rounded up to multiples of this, as an allocator rounds them: 512 for
                torch's CUDA caching allocator (see `meter_cuda`), 1 for the CPU.
            component: that new storages belong to.
            host_counts: whether what is made for host memory counts; False for a GPU's memory.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._granule_bytes = granule_bytes
        self._component = component
        self._host_counts = host_counts
        self._live: dict[int, _Live] = {}
        self._now: dict[str, int] = {}
        self._total = 0
        self._peak = 0
        self._at_peak: dict[str, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch need not wrap every op to keep its compiler out."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op, then count what it made."""
        if func is _DEVICE and hasattr(args[0], "fake_device"):
            return args[0].fake_device  # what a shape is asked for at every turn; nothing is made
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                    self._note_output(leaf, func, args, kwargs)
        return out

    def usage(self) -> Usage:
        """The highest moment since the start, or since `reset_peak`."""
        return Usage(self._peak, ordered(self._at_peak))

    def live(self) -> Mapping[str, int]:
        """Bytes of each component now."""
        return ordered(self._now)

    @property
    def live_bytes(self) -> int:
        """Bytes of all components now."""
        return self._total

    def reset_peak(self) -> None:
        """Take the present moment for the highest."""
        self._peak, self._at_peak = self._total, dict(self._now)

    def watch(self, component: str, *things: nn.Module | Tensor) -> None:
        """Count what is there already, or give it to another component: tensors, or all of a module's."""
        for thing in things:
            tensors = [*thing.parameters(), *thing.buffers()] if isinstance(thing, nn.Module) else [thing]
            for tensor in tensors:
                self._hold(tensor.untyped_storage(), component, retag=True)

    def drop(self, *tensors: Tensor) -> None:
        """Count these no more: they are not in the memory that is looked at."""
        for tensor in tensors:
            self._forget(tensor.untyped_storage()._cdata)

    @contextmanager
    def during(self, component: str) -> Iterator[None]:
        """What is made inside belongs to `component`."""
        before, self._component = self._component, component
        try:
            yield
        finally:
            self._component = before

    @contextmanager
    def gradients(self, parameters: Iterable[nn.Parameter], component: str = GRADIENTS) -> Iterator[None]:
        """Inside, gradients that arrive at the parameters belong to `component`."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.watch(component, parameter.grad)

        hooked: list[Any] = list(parameters)
        handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_output(self, tensor: Tensor, func: Any, args: Sequence[Any], kwargs: object) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            self._hold(storage, self._component, retag=False)
            return
        purpose = made_for()
        if purpose == HOST and not self._host_counts:
            return
        name = str(func._schema.name) if hasattr(func, "_schema") else ""
        if name != _FRESH_OP and _is_shared(storage, (args, kwargs)):
            return  # a view of something that was there before, and that nobody watches
        self._hold(storage, purpose or self._component, retag=False)

    def _hold(self, storage: torch.UntypedStorage, component: str, *, retag: bool) -> None:
        """Count a storage; one that is known may have been resized, or change its component."""
        key = storage._cdata
        size = -(-storage.nbytes() // self._granule_bytes) * self._granule_bytes
        known = self._live.get(key)
        if known is not None:
            if known.bytes == size and not (retag and known.component != component):
                return
            self._add(known.component, -known.bytes)
            known.bytes, known.component = size, component if retag else known.component
            self._add(known.component, size)
            return
        self._live[key] = _Live(weakref.ref(storage, _forgetter(self, key)), size, component)
        self._add(component, size)

    def _add(self, component: str, bytes_: int) -> None:
        self._now[component] = self._now.get(component, 0) + bytes_
        self._total += bytes_
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, dict(self._now)

    def _forget(self, key: int) -> None:
        gone = self._live.pop(key, None)
        if gone is not None:
            self._add(gone.component, -gone.bytes)


def _forgetter(meter: Meter, key: int) -> Callable[[object], None]:
    """What a dying storage calls; it does not keep the meter alive."""
    return partial(_gone, weakref.ref(meter), key)


def _gone(meter: weakref.ref[Meter], key: int, _: object) -> None:
    alive = meter()
    if alive is not None:
        alive._forget(key)


def _is_shared(storage: torch.UntypedStorage, inputs: object) -> bool:
    """Whether an op's inputs (tensors, and lists and mappings of them) look at the storage already."""
    if isinstance(inputs, Tensor):
        return inputs.layout is torch.strided and inputs.untyped_storage()._cdata == storage._cdata
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    elif not isinstance(inputs, list | tuple):
        return False
    return any(_is_shared(storage, each) for each in inputs)
