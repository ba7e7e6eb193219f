"""Frozen weights that visit a card, rehearsed: the unit that computes, and the one after it, there already.

`memory.stream` copies ahead on CUDA alone. Shapes are labelled "cpu", where each unit is copied as it is
called: what CUDA has besides is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorabooth.memory.meter import Meter
from lorabooth.memory.stream import streamed_tensors
from lorabooth.memory.units import Unit, call_of, checkpoint_units


class Ahead:
    """The units of a streamed denoiser come one ahead, as `memory/stream.py` has them come on CUDA.

    Their order shows itself in the first pass: ahead of units not seen before nothing is copied. A pass
    backwards is taken to go the other way, also the first time.
    """

    def __init__(self, denoiser: nn.Module, meter: Meter, component: str) -> None:
        """Watch over a denoiser from now on.

        Args:
            denoiser: after `stream`; changed in place.
            meter: that counts.
            component: what visiting weights are counted as.
        """
        self._meter, self._component = meter, component
        self._order: list[str] = []
        self._units: dict[str, Unit] = {}
        self._is_shown = False
        self._waiting: list[Tensor] = []
        for unit in checkpoint_units(denoiser):
            call = call_of(unit)
            if call.resident is not None:
                call.resident = partial(self._visit, unit, call.resident)

    @contextmanager
    def _visit(self, unit: Unit, resident: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        with ExitStack() as visit:
            with self._meter.during(self._component):
                # What waited is what computes now.
                self._waiting = []
                visit.enter_context(resident())
                following = self._after(unit)
                if following is not None:
                    self._waiting = [torch.empty_like(home) for home in streamed_tensors(following.module)]
            yield

    def _after(self, unit: Unit) -> Unit | None:
        """The unit that comes next; None if that has not shown itself."""
        if unit.name in self._units:
            self._is_shown = True
        else:
            self._units[unit.name] = unit
            self._order.append(unit.name)
        place = self._order.index(unit.name)
        if torch._C._current_graph_task_id() != -1:
            return self._units[self._order[max(0, place - 1)]]
        if place + 1 < len(self._order):
            return self._units[self._order[place + 1]]
        if not self._is_shown:
            return None
        # The last one is the first to be recomputed; without a backward pass a pass begins anew.
        return unit if torch.is_grad_enabled() else self._units[self._order[0]]
