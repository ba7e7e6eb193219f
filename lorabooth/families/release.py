"""Letting go of parts that have done their work, and proof that their memory is gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorabooth.families.base import Parts

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Released:
    """What was let go: weak references, so that this value itself keeps nothing alive.

    Attributes:
        names: components, e.g. ("vae", "text_encoder").
        bytes: size of their parameters and buffers.
        modules: by component name.
        tensors: parameters and buffers by "component.path".
        on_device: CUDA device -> (their bytes on it, bytes that were allocated there before).
    """

    names: tuple[str, ...]
    bytes: int
    modules: dict[str, weakref.ref[nn.Module]]
    tensors: dict[str, weakref.ref[Tensor]]
    on_device: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def release(parts: Parts, *names: str) -> tuple[Parts, Released]:
    """Parts without the named components ("vae", "text_encoder", ...), and what `assert_released` proves.

    The caller must drop its own `parts` (rebind the name) and whatever else holds the components: pipelines,
    closures, optimizers. Components that the base does not have are ignored.
    """
    text_encoders = dict(parts.text_encoders)
    gone: dict[str, nn.Module] = {}
    for name in names:
        if name == "vae" and parts.vae is not None:
            gone[name] = parts.vae
        elif name in text_encoders:
            gone[name] = text_encoders.pop(name)
    tensors = {
        f"{name}.{path}": tensor
        for name, module in gone.items()
        for path, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    released = Released(
        names=tuple(gone),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        modules={name: weakref.ref(module) for name, module in gone.items()},
        tensors={path: weakref.ref(tensor) for path, tensor in tensors.items()},
        on_device=_on_device(tensors.values()),
    )
    vae = None if "vae" in gone else parts.vae
    return replace(parts, vae=vae, text_encoders=text_encoders), released


def assert_released(released: Released) -> None:
    """Collect garbage, give cached device memory back, and prove that no released tensor is alive.

    On a GPU the allocator is asked as well: a view of a tensor would keep its memory without keeping the
    tensor.

    Raises:
        RuntimeError: something still holds a component; the message names it. A defect of the program, not of
            the user's input.
    """
    import torch

    gc.collect()
    alive = [name for name, ref in released.modules.items() if ref() is not None]
    alive += [path for path, ref in released.tensors.items() if ref() is not None]
    if alive:
        raise RuntimeError(
            f"released parts are still in memory: {', '.join(alive[:3])}{' ...' if len(alive) > 3 else ''} "
            f"({len(alive)} objects); something holds a reference to them"
        )
    for device, (held, before) in released.on_device.items():
        require_fall(device, held, before, torch.cuda.memory_allocated(device))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_fall(device: str, held: int, before: int, after: int) -> None:
    """Prove that a device's allocated memory fell by what was released.

    Args:
        device: its name, for the message.
        held: bytes of the released tensors on it.
        before: bytes allocated there with them.
        after: bytes allocated there now.

    Raises:
        RuntimeError: it fell by less.
    """
    if after > before - held:
        raise RuntimeError(
            f"{held:,} bytes were released on {device}, but its memory fell by {before - after:,} only: "
            "something holds a view of a released tensor"
        )


def _on_device(tensors: Iterable[Tensor]) -> dict[str, tuple[int, int]]:
    """(bytes of the tensors, bytes allocated in all) for each CUDA device that they are on."""
    import torch

    held: dict[str, int] = {}
    for tensor in tensors:
        if tensor.device.type == "cuda":
            size = tensor.numel() * tensor.element_size()
            held[str(tensor.device)] = held.get(str(tensor.device), 0) + size
    return {device: (size, torch.cuda.memory_allocated(device)) for device, size in held.items()}
