"""The units of a denoiser that come and go as wholes: recomputed, or streamed from host memory.

A unit is a residual block, an attention block or a resampling layer of a U-Net, or a block of a transformer.
Its `forward` is replaced, on the object alone, by a `Call`; what a technique needs is set on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_UNITS = frozenset(
    {
        "Transformer2DModel",
        "BasicTransformerBlock",
        "ResnetBlock2D",
        "Downsample2D",
        "Upsample2D",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    }
)
# Among units of one resolution: what keeps most activations first.
_KIND_ORDER = ("attentions", "transformer_blocks", "single_transformer_blocks", "resnets")


@dataclass(frozen=True)
class Unit:
    """One unit.

    Attributes:
        name: its path in the denoiser.
        module: itself.
    """

    name: str
    module: nn.Module


class Call:
    """A unit's `forward`, with techniques around it.

    Attributes:
        plain: the unit's own forward.
        recompute: keep only the inputs, and run again in the backward pass (non-reentrant).
        preserve_rng: run again with the same random numbers; needed where the unit draws any (dropout).
        keeping: context in which the recomputed unit's inputs are saved, or None for as they are.
        resident: context in which the unit's weights are on the device, or None if they always are.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.recompute = False
        self.preserve_rng = True
        self.keeping: Callable[[], AbstractContextManager[Any]] | None = None
        self.resident: Callable[[], AbstractContextManager[Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The unit's output; equal with every technique."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._run(*args, **kwargs)
        # Tensors by place: those given by name would be kept in a closure, where `keeping` does not see them.
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        others = {name: value for name, value in kwargs.items() if name not in names}

        # `run` outlives this call: if it held `args` itself, it would keep what `keeping` takes away.
        count = len(args)

        def run(*values: Any) -> Any:
            by_name = dict(zip(names, values[count:], strict=True))
            return self._run(*values[:count], **by_name, **others)

        with self.keeping() if self.keeping else nullcontext():
            return checkpoint(
                run,
                *args,
                *(kwargs[name] for name in names),
                use_reentrant=False,
                preserve_rng_state=self.preserve_rng,
            )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.resident() if self.resident else nullcontext():
            return self.plain(*args, **kwargs)


def call_of(unit: Unit) -> Call:
    """The unit's `Call`; made and put in place of its forward the first time."""
    module: Any = unit.module
    call = vars(module).get("forward")
    if not isinstance(call, Call):
        call = Call(module.forward)
        module.forward = call
    return call


def checkpoint_units(denoiser: nn.Module) -> tuple[Unit, ...]:
    """The units of a denoiser in the order in which they should be recomputed; every weight in one at most.

    A U-Net's go from the outermost resolution, where activations are largest, inwards, and at one resolution
    attention before residual blocks before resampling; a transformer's blocks are alike, and go in order. So
    the first n of them are those that save most.

    An attention block with a single transformer block inside is one unit; one with several (SDXL) is as many,
    so that what is recomputed at once stays small.
    """
    found: list[Unit] = []
    inside = ""
    for name, module in denoiser.named_modules():
        if inside and name.startswith(inside):
            continue
        if type(module).__name__ in _UNITS and not _has_several(module):
            found.append(Unit(name, module))
            inside = f"{name}."
    up_blocks = len(getattr(denoiser, "up_blocks", ()))
    return tuple(sorted(found, key=lambda unit: _rank(unit.name, up_blocks)))


def _has_several(module: nn.Module) -> bool:
    blocks: Sequence[Any] = getattr(module, "transformer_blocks", ())
    return len(blocks) > 1


def _rank(name: str, up_blocks: int) -> tuple[int, int]:
    """(levels from the outside, kind); the sort is stable, so equal ones stay in order."""
    first, *rest = name.split(".")
    levels = {"down_blocks": lambda i: i, "up_blocks": lambda i: up_blocks - 1 - i}
    depth = levels[first](int(rest[0])) if first in levels else up_blocks if first == "mid_block" else 0
    kind = next((i for i, key in enumerate(_KIND_ORDER) if key in name.split(".")), len(_KIND_ORDER))
    return depth, kind
