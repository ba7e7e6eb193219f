"""Hollowed Net (arXiv 2411.01179): a U-Net trained at its outer levels, its deep middle not in memory.

A U-Net of n levels keeps its outer `keep` levels: the first `keep` down blocks and the last `keep` up blocks,
which the skip connections still join. Between them nothing is computed any more: what the deep middle would
send up is read from a store that was filled once, by the whole net with the adapter off. It is a constant,
because the deep middle is frozen and its input is taken from the base. The point of exchange lies before the
last deep up block's upsampler, which therefore stays: a quarter of the numbers to store.

diffusers' own forward runs on, over stand-ins without parameters in the places of what is gone. So modules
that stay keep their names, and an adapter that was trained on them fits the whole net.

Nothing here reads a tensor's value: all of it works on fake modules, as a prediction of memory needs.

Legend of shape suffixes: B batch, C channels of the exchanged activation, h w its size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lorabooth.errors import RecipeError

_LEAST_SHARE = 0.5
"""A hollow that holds less of the parameters than this is hardly worth its stored activations."""


@dataclass(frozen=True)
class Hollow:
    """What `hollow_out` took away: weak references, so that this value itself keeps nothing alive.

    Attributes:
        keep: outer levels that stay.
        removed_parameters: numbers that are gone.
        removed_bytes: size of their parameters and buffers.
        kept_parameters: numbers that stay, adapters included.
        modules: deep modules by path.
        tensors: their parameters and buffers by path.
    """

    keep: int
    removed_parameters: int
    removed_bytes: int
    kept_parameters: int
    modules: dict[str, weakref.ref[nn.Module]]
    tensors: dict[str, weakref.ref[Tensor]]


class CapturedError(Exception):
    """Ends a forward pass of which nothing but the captured activation is wanted; see `capture`."""


def require_unet(denoiser: nn.Module) -> None:
    """Whether a denoiser has an inside to take out.

    Raises:
        RecipeError: it has no down and up blocks of equal number, or only one level.
    """
    levels = _levels(denoiser)
    if levels < 2:
        raise RecipeError(
            f"memory.hollow: {type(denoiser).__name__} is no U-Net of several levels, so that it has no deep "
            "middle to take out.",
            "Set memory.hollow = false; memory.checkpointing saves memory with every base.",
        )


def automatic_keep(denoiser: nn.Module) -> tuple[int, str]:
    """How many outer levels stay: as many as leave at least half of the parameters in the hollow.

    Returns:
        The number, 1 <= keep < levels, and the reason in a few words.

    Raises:
        RecipeError: as `require_unet`.
    """
    require_unet(denoiser)
    total = _count(denoiser)
    shares = {keep: _deep_count(denoiser, keep) / total for keep in range(1, _levels(denoiser))}
    enough = [keep for keep, share in shares.items() if share >= _LEAST_SHARE]
    keep = max(enough, default=1)
    return keep, f"{shares[keep]:.0%} of the denoiser lies deeper"


def keep_of(denoiser: nn.Module, wanted: int | Literal["auto"]) -> int:
    """How many outer levels stay, as a recipe's memory.hollow_keep says.

    Raises:
        RecipeError: that many leave no hollow; says how many there are. Or as `require_unet`.
    """
    keep = automatic_keep(denoiser)[0] if wanted == "auto" else wanted
    require_unet(denoiser)
    levels = _levels(denoiser)
    if not 1 <= keep < levels:
        raise RecipeError(
            f"memory.hollow_keep: {keep} of {levels} levels leave nothing to take out.",
            f'Give 1 to {levels - 1}, or "auto".',
        )
    return keep


def kept_patterns(denoiser: nn.Module, keep: int, patterns: Sequence[str]) -> tuple[str, ...]:
    """Adapter patterns that match the same layers as before, without those of the deep middle.

    Args:
        denoiser: the whole net.
        keep: outer levels that stay.
        patterns: regular expressions for whole module paths.
    """
    deep = "|".join(path.replace(".", r"\.") for path in _deep_paths(denoiser, keep))
    return tuple(rf"(?!(?:{deep})\.)(?:{pattern})" for pattern in patterns)


def stored_shape(denoiser: nn.Module, keep: int, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape (C, h, w) of the exchanged activation of one example.

    Args:
        denoiser: hollowed or not.
        keep: outer levels that stay.
        latent_shape: (channels, height, width) of its latents.
    """
    net: Any = denoiser
    height, width = latent_shape[-2:]
    for _ in range(keep):  # a stride of 2 with a margin of 1 rounds up
        height, width = (height + 1) // 2, (width + 1) // 2
    return int(net.config.block_out_channels[keep]), height, width


@contextmanager
def capture(denoiser: nn.Module, keep: int, *, to_the_end: bool) -> Iterator[list[Tensor]]:
    """In this context every forward pass of the whole net leaves the activation [B,C,h,w] in the list.

    Args:
        denoiser: the whole net.
        keep: outer levels that will stay.
        to_the_end: else the pass ends there with `CapturedError`, which the caller catches.
    """
    found: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001 - the hook's signature
        found.append(args[0].detach())
        if not to_the_end:
            raise CapturedError

    handle = _upsampler(denoiser, keep).register_forward_pre_hook(take)
    try:
        yield found
    finally:
        handle.remove()


def hollow_out(denoiser: nn.Module, keep: int) -> Hollow:
    """Take the deep middle out of a U-Net, in place.

    What the caller, an optimizer or a hook still holds of it stays in memory: check with `Hollow.tensors`.

    Args:
        denoiser: a diffusers U-Net, adapted or not; adapters on deep layers go with them.
        keep: outer levels that stay.

    Raises:
        RecipeError: as `keep_of`.
    """
    keep_of(denoiser, keep)
    before = _count(denoiser)
    deep = {path: denoiser.get_submodule(path) for path in _deep_paths(denoiser, keep)}
    tensors = {
        f"{path}.{name}": tensor
        for path, module in deep.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    for path, stand_in in _stand_ins(denoiser, keep).items():
        _put(denoiser, path, stand_in)
    # A table that all layers read (NF4's code) stays with the layers that stay.
    staying = {id(tensor) for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    tensors = {path: tensor for path, tensor in tensors.items() if id(tensor) not in staying}
    return Hollow(
        keep=keep,
        removed_parameters=sum(_count(module) for module in deep.values()),
        removed_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        kept_parameters=before - sum(_count(module) for module in deep.values()),
        modules={path: weakref.ref(module) for path, module in deep.items()},
        tensors={path: weakref.ref(tensor) for path, tensor in tensors.items()},
    )


@contextmanager
def filled(denoiser: nn.Module, activation_BChw: Tensor) -> Iterator[None]:
    """In this context a hollowed denoiser can run: the hollow sends up the given activation [B,C,h,w]."""
    door = _door(denoiser)[1]
    door.given = activation_BChw
    try:
        yield
    finally:
        door.given = None


@contextmanager
def whole(denoiser: nn.Module, full: nn.Module) -> Iterator[None]:
    """In this context a hollowed denoiser is whole again, with the deep modules of a freshly loaded one.

    Args:
        denoiser: hollowed; its adapters stay where they are.
        full: the same base; what is borrowed from it gets the hollowed one's device, dtype and mode.
    """
    net: Any = denoiser
    keep, door = _door(denoiser)
    weight: Tensor = net.conv_in.weight
    places = {path: _at(denoiser, path) for path in _places(denoiser, keep)}
    try:
        for path, stand_in in places.items():
            module: Any = _at(full, path)
            if stand_in is door:
                module.upsamplers = None  # not to be moved: its own is here, as it is held while training
            module.to(weight.device, weight.dtype).train(denoiser.training)
            if stand_in is door:
                module.upsamplers = door.upsamplers
            _put(denoiser, path, module)
        yield
    finally:
        for path, stand_in in places.items():
            _put(denoiser, path, stand_in)


class _Down(nn.Module):
    """In the place of a deep down block: passes on as many residuals as that would, which nobody looks at."""

    def __init__(self, residuals: int) -> None:
        super().__init__()
        self.residuals = residuals

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # noqa: ARG002
        return hidden_states, (hidden_states,) * self.residuals


class _Through(nn.Module):
    """In the place of the middle block, and of deep up blocks but the last."""

    def __init__(self, residuals: int) -> None:
        super().__init__()
        self.resnets = range(residuals)  # what the net's forward takes the length of

    def forward(self, hidden_states: Tensor, temb: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        return hidden_states


class _Door(nn.Module):
    """In the place of the last deep up block: the stored activation comes in here, and is enlarged."""

    def __init__(self, residuals: int, upsamplers: nn.ModuleList) -> None:
        super().__init__()
        self.resnets = range(residuals)
        self.upsamplers = upsamplers
        self.given: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,  # noqa: ARG002 - of the stand-ins before it
        temb: Tensor,  # noqa: ARG002
        upsample_size: Any = None,
        **_: Any,
    ) -> Tensor:
        if self.given is None:
            raise RuntimeError("a hollowed denoiser runs only within hollow.filled(...)")
        out = self.given
        for upsampler in self.upsamplers:
            out = upsampler(out, upsample_size)
        return out


def _levels(denoiser: Any) -> int:
    downs, ups = getattr(denoiser, "down_blocks", ()), getattr(denoiser, "up_blocks", ())
    return len(downs) if len(downs) == len(ups) else 0


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _deep_count(denoiser: nn.Module, keep: int) -> int:
    return sum(_count(denoiser.get_submodule(path)) for path in _deep_paths(denoiser, keep))


def _places(denoiser: Any, keep: int) -> list[str]:
    """Where stand-ins come in: deep blocks, and the downsampler that feeds nothing else."""
    levels = _levels(denoiser)
    middle = [] if getattr(denoiser, "mid_block", None) is None else ["mid_block"]
    return [
        f"down_blocks.{keep - 1}.downsamplers",
        *(f"down_blocks.{level}" for level in range(keep, levels)),
        *middle,
        *(f"up_blocks.{level}" for level in range(levels - keep)),
    ]


def _deep_paths(denoiser: nn.Module, keep: int) -> list[str]:
    """Paths of the modules that go, none within another: those places without what stays of the last."""
    *before, last = _places(denoiser, keep)
    inside = [name for name, _ in denoiser.get_submodule(last).named_children() if name != "upsamplers"]
    return [*before, *(f"{last}.{name}" for name in inside)]


def _stand_ins(denoiser: nn.Module, keep: int) -> dict[str, nn.Module | None]:
    """What comes into each place."""
    places = _places(denoiser, keep)
    out: dict[str, nn.Module | None] = {places[0]: None}
    missing = 1  # the residual of the downsampler
    for path in places[1:]:
        block: Any = denoiser.get_submodule(path)
        if path.startswith("down_blocks"):
            out[path] = _Down(len(block.resnets) + (block.downsamplers is not None) + missing)
            missing = 0
        elif path == places[-1]:
            out[path] = _Door(len(block.resnets), block.upsamplers)
        else:
            out[path] = _Through(len(block.resnets))
    return out


def _upsampler(denoiser: nn.Module, keep: int) -> nn.Module:
    return denoiser.get_submodule(f"{_places(denoiser, keep)[-1]}.upsamplers.0")


def _door(denoiser: nn.Module) -> tuple[int, _Door]:
    """(outer levels that stay, the door) of a hollowed denoiser."""
    ups: Any = getattr(denoiser, "up_blocks", ())
    for level, block in enumerate(ups):
        if isinstance(block, _Door):
            return len(ups) - 1 - level, block
    raise RuntimeError("this denoiser is not hollowed out")


def _at(denoiser: nn.Module, path: str) -> nn.Module | None:
    """The module in a place; None where a stand-in is nothing at all."""
    parent, _, name = path.rpartition(".")
    found: nn.Module | None = getattr(denoiser.get_submodule(parent), name)
    return found


def _put(denoiser: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(denoiser.get_submodule(parent), name, module)
