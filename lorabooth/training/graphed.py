"""A whole optimizer step as one CUDA graph: forward, backward, clipping and update are launched at once.

At batch 1 a U-Net's kernels are shorter than it takes Python to launch them; a graph launches them all. It is
a recording: shapes, addresses and Python's decisions are those of the moment of capture. So each signature
(the shapes of all that goes in) has a graph of its own, what goes in is copied to the addresses that were
recorded, the learning rate is a tensor, gradients stay where they are, and whether a step is applied is
decided on the device (`update.decide_on_device`).

After the whole-network example of torch's notes on CUDA semantics: some steps run as they are, on a side
stream, before one is captured. They are real steps of the run; nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorabooth.errors import RecipeError
from lorabooth.training.prefetch import Forwards, Ready
from lorabooth.types import Batch, Geometry

WARM_UP_STEPS = 3
"""Steps of a signature before it is captured: kernels are chosen and buffers made in them."""
MOST_GRAPHS = 8
"""Every graph keeps its inputs; steps of further signatures run as they are."""

Compute = Callable[[Forwards], Tensor]
"""One optimizer step -> its numbers, nothing read by the host, gradients zeroed in place at its end."""


class Device(Protocol):
    """What captures and replays."""

    def eager(self, run: Callable[[], Tensor]) -> Tensor:
        """Run the operations as they are, where a later capture may follow."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the operations; what is returned replays them and gives the recorded output."""
        ...


class CudaDevice:
    """Captures on a CUDA device; all graphs share one pool of memory, as they never run at the same time.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def eager(self, run: Callable[[], Tensor]) -> Tensor:
        """On the stream that is captured later: autograd remembers the streams that gradients came from."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = run()
        current.wait_stream(self._stream)
        out.record_stream(current)
        return out

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record one step; it is not run.

        Raises:
            RuntimeError: an operation cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Thread-local: the thread that makes the coming batches may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass
class _Slot:
    """One signature.

    Attributes:
        seen: steps of it so far.
        inputs: where a replay reads from; None until captured.
        replay: runs the captured step.
    """

    seen: int = 0
    inputs: Forwards | None = None
    replay: Callable[[], Tensor] | None = None


class Graphed:
    """Runs optimizer steps, from the fourth of a signature on by its graph.

    Args:
        compute: the step.
        parameters: trained ones; their gradients get lasting places.
        device: captures and replays.
        place: where the step's inputs belong.
        warm_up_steps: before a signature is captured.
        most: signatures that are captured.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Sequence[nn.Parameter],
        device: Device,
        place: torch.device,
        *,
        warm_up_steps: int = WARM_UP_STEPS,
        most: int = MOST_GRAPHS,
    ) -> None:
        self._compute = compute
        self._device = device
        self._place = place
        self._warm_up_steps = warm_up_steps
        self._most = most
        self._slots: dict[Hashable, _Slot] = {}
        self.replayed = 0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return sum(slot.replay is not None for slot in self._slots.values())

    def __call__(self, forwards: Forwards) -> Tensor:
        """Run one step; its numbers are overwritten by the next replay.

        Raises:
            RecipeError: the step cannot be captured.
        """
        slot = self._slots.setdefault(signature(forwards), _Slot())
        slot.seen += 1
        if slot.replay is None and slot.seen > self._warm_up_steps and self.captured < self._most:
            slot.inputs = [[_lasting(ready, self._place) for ready in turn] for turn in forwards]
            slot.replay = self._captured(slot.inputs)
        if slot.replay is None or slot.inputs is None:
            return self._device.eager(lambda: self._compute(forwards))
        for turn, given in zip(slot.inputs, forwards, strict=True):
            for place, ready in zip(turn, given, strict=True):
                for into, tensor in zip(_tensors(place), _tensors(ready), strict=True):
                    into.copy_(tensor, non_blocking=True)
        self.replayed += 1
        return slot.replay()

    def _captured(self, inputs: Forwards) -> Callable[[], Tensor]:
        try:
            return self._device.capture(lambda: self._compute(inputs))
        except torch.OutOfMemoryError:
            raise
        # AttributeError: a family that reads the geometry, which a recording could not follow.
        except (RuntimeError, AttributeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"speed.cuda_graph: this training step cannot be captured ({line}).",
                "Set speed.cuda_graph = false; what is done so far is kept up to the last checkpoint.",
            ) from error


def signature(forwards: Forwards) -> Hashable:
    """All that a recording of the step depends on, besides the numbers in its tensors."""
    return tuple(tuple(_shapes(ready) for ready in turn) for turn in forwards)


def _shapes(ready: Ready) -> tuple[Hashable, ...]:
    kinds = ((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(ready))
    return (ready.class_rows, tuple(sorted(ready.batch.cond)), *kinds)


def _tensors(ready: Ready) -> list[Tensor]:
    """Everything that the step reads, in a fixed order."""
    batch = ready.batch
    conds = [batch.cond[name] for name in sorted(batch.cond)]
    taught = [] if batch.taught is None else [batch.taught]
    return [batch.latents, *conds, batch.weight, batch.is_instance, *taught, ready.eps, ready.level]


def _lasting(ready: Ready, device: torch.device) -> Ready:
    """The same examples at addresses of their own; without geometry, which would be recorded as it is now."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    batch = ready.batch
    unknown: Any = tuple(object() for _ in batch.geometry)
    static: Batch = replace(
        batch,
        latents=own(batch.latents),
        cond={name: own(tensor) for name, tensor in batch.cond.items()},
        geometry=cast("tuple[Geometry, ...]", unknown),
        weight=own(batch.weight),
        is_instance=own(batch.is_instance),
        taught=None if batch.taught is None else own(batch.taught),
    )
    return replace(ready, batch=static, eps=own(ready.eps), level=own(ready.level))
