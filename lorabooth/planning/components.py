"""What a rehearsal on shapes is made of: where it takes place, what stands in for photos, optimizers by rule.

Legend of shape suffixes: B batch, C latent channels, h w latent size, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorabooth.data import images
from lorabooth.families.base import Family, Parts, Source
from lorabooth.memory import apply, meter_cuda
from lorabooth.memory.facts import Device
from lorabooth.memory.meter import Meter, Usage
from lorabooth.memory.meter_known import KnownOps
from lorabooth.memory.meter_shapes import ShapesOnly, Uninitialised
from lorabooth.memory.techniques import save_vae_memory
from lorabooth.recipe import Recipe
from lorabooth.training.optim import MIN_8BIT_ELEMENTS
from lorabooth.types import Cond, Geometry

DENOISER = "denoiser"
TEXT_ENCODER = "text encoder"
VAE = "vae"
ADAPTER = "adapter"
OPTIMIZER = "optimizer"
INPUTS = "inputs"
LIBRARIES = "CUDA libraries"
CONTEXT = "CUDA context"
SHAPES_ON = torch.device("cpu")
"""What shapes are labelled, whatever device is predicted; see memory/meter_shapes.py."""

_BLOCK = 256
_CODE = 256


@dataclass(frozen=True)
class Scene:
    """What is rehearsed, and on which device.

    Attributes:
        recipe: without "auto".
        source: the base; its configs are looked at.
        family: of the base.
        device: what is predicted; it need not be here.
        known: what ops make of shapes, from other rehearsals and for them.
    """

    recipe: Recipe
    source: Source
    family: Family
    device: Device
    known: KnownOps = field(default_factory=KnownOps)

    @property
    def is_cuda(self) -> bool:
        """Whether the device has a memory of its own, and CUDA's arithmetic."""
        return self.device.kind == "cuda"

    @property
    def streams(self) -> bool:
        """Whether the denoiser's frozen weights wait in a memory that is not the device's."""
        return self.is_cuda and self.recipe.memory.stream

    @property
    def takes_turns(self) -> bool:
        """Whether denoiser and VAE are on the device one at a time while images are drawn."""
        return self.is_cuda and self.recipe.memory.in_turn

    @contextmanager
    def world(self) -> Iterator[None]:
        """Where tensors are shapes, and arithmetic is the device's."""
        arithmetic = meter_cuda.CudaArithmetic() if self.is_cuda else nullcontext()
        with ShapesOnly(self.known), arithmetic:
            yield

    def meter(self) -> Meter:
        """A counter that rounds as the device's allocator, and leaves out what is not in its memory."""
        return Meter(
            granule_bytes=meter_cuda.GRANULE_BYTES if self.is_cuda else 1, host_counts=not self.is_cuda
        )

    def with_driver(self, usage: Usage) -> Usage:
        """With what the device takes for itself."""
        if not self.is_cuda:
            return usage
        usage = usage.plus(LIBRARIES, meter_cuda.libraries_bytes(self.device.capability))
        return usage.plus(CONTEXT, meter_cuda.CONTEXT_BYTES)

    def latent_shape(self, parts: Parts) -> tuple[int, int, int]:
        """(C, h, w) of a square photo's latents."""
        denoiser: Any = parts.denoiser
        side = self.side_px(parts) // int(parts.extras["vae_factor"])
        return int(denoiser.config.in_channels), side, side

    def side_px(self, parts: Parts) -> int:
        """Side of a square photo."""
        multiple_px = self.family.resolution_multiple_px(parts)
        return images.square_for(int(self.recipe.images.resolution), multiple_px)[0]

    def geometry(self, parts: Parts) -> Geometry:
        """Of a photo that is as large as it is trained."""
        size = (self.side_px(parts),) * 2
        return Geometry(size, (0, 0), size)


def skeleton(scene: Scene) -> Parts:
    """The base's parts as shapes, as the recipe has them loaded."""
    with Uninitialised():
        parts = scene.family.skeleton(scene.source, apply.DTYPES[scene.recipe.model.dtype])
    save_vae_memory(parts.vae, scene.recipe.memory)
    return parts


def hold(
    meter: Meter,
    parts: Parts,
    components: Iterable[str] = (VAE, TEXT_ENCODER, DENOISER),
    *,
    but: Iterable[Tensor] = (),
) -> None:
    """Count all that these components hold, each under its name, but for some tensors."""
    left_out = {id(tensor) for tensor in but}
    for component in components:
        tensors = _tensors(_modules(parts)[component])
        meter.watch(component, *(tensor for tensor in tensors if id(tensor) not in left_out))


def tensors_of(parts: Parts) -> list[Tensor]:
    """Weights and buffers of all components."""
    return [tensor for modules in _modules(parts).values() for tensor in _tensors(modules)]


def _modules(parts: Parts) -> dict[str, list[nn.Module]]:
    """Component -> what it consists of, of what is in memory."""
    return {
        VAE: [] if parts.vae is None else [parts.vae],
        TEXT_ENCODER: [module for module in parts.text_encoders.values() if module is not None],
        DENOISER: [parts.denoiser],
    }


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def blank_tokens(family: Family, parts: Parts, count: int) -> Cond:
    """Tokens of `count` empty prompts, collated; by the encoder's limit alone where there is no tokenizer."""
    if parts.tokenizers:
        return family.collate(family.tokenize(parts, [""] * count))
    names = ("input_ids", "attention_mask") if parts.extras["use_attention_mask"] else ("input_ids",)
    shape = (count, int(parts.extras["max_tokens"]))
    return {name: torch.zeros(shape, dtype=torch.int64) for name in names}


def blank_like(cond: Cond, count: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A collated conditioning of `count` rows, each as those of `cond`; in its dtypes unless one is given."""
    return {
        name: torch.empty((count, *one.shape[1:]), dtype=dtype or one.dtype) for name, one in cond.items()
    }


class BlockwiseAdamW(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit and PagedAdamW8bit, and no arithmetic: what it takes, on shapes.

    Its constructor computes its 8-bit codes number by number, which shapes cannot. Two bytes a parameter and
    two float32 scales for each block of 256; tensors below 4096 elements have float32 state. The paged kind
    pages tensors from 100,000 elements up only (bitsandbytes/optim/optimizer.py, get_state_buffer), which few
    low-rank factors have: it is counted as if it stayed.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """As the optimizers of torch."""
        super().__init__(groups, {})
        self.codes = [torch.empty(_CODE), torch.empty(_CODE)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make the state of what has a gradient."""
        del closure
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = blockwise_state(parameter)


def blockwise_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an 8-bit AdamW keeps of one parameter."""
    if parameter.numel() < MIN_8BIT_ELEMENTS:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // _BLOCK)
    state = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
    return {**state, **{name: torch.zeros(blocks) for name in ("absmax1", "absmax2")}}


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of an optimizer's state."""
    states: Mapping[Any, Mapping[str, Any]] = optimizer.state
    return [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
