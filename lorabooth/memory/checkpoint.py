"""Activations recomputed by the unit, and what remains of them in host memory.

Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorabooth.errors import RecipeError
from lorabooth.memory.host import to_host
from lorabooth.memory.units import call_of, checkpoint_units

OFFLOAD_FROM_BYTES = 2**20
"""Smaller inputs of a unit (timestep and text embeddings, which all units share) stay on the device."""


def recompute(
    denoiser: nn.Module,
    count: int | None = None,
    *,
    offload: bool = False,
    preserve_rng: bool = False,
    offload_from_bytes: int = OFFLOAD_FROM_BYTES,
) -> int:
    """Recompute units of a denoiser in the backward pass instead of keeping their activations.

    Non-reentrant: the other kind gives no gradient at all when a unit's inputs need none, as with a frozen
    base. Gradients are equal, bit for bit, on the same kernels. Calling it again replaces what was set.

    Args:
        denoiser: changed in place.
        count: how many of `checkpoint_units(denoiser)`, from the first; None is all.
        offload: what is kept (the units' inputs) waits in host memory; gradients stay equal. Where host and
            device are one memory it only costs the copy.
        preserve_rng: recompute with the same random numbers; needed with dropout.
        offload_from_bytes: smaller inputs stay on the device.

    Returns:
        How many units are recomputed.

    Raises:
        RecipeError: the denoiser has no units, or fewer than `count`.
    """
    units = checkpoint_units(denoiser)
    if problem := count_problem(denoiser, count):
        raise RecipeError(*problem)
    chosen = units if count is None else units[:count]
    for unit in units[len(chosen) :]:
        call_of(unit).recompute = False
    for unit in chosen:
        call = call_of(unit)
        call.recompute, call.preserve_rng = True, preserve_rng
        call.keeping = partial(_in_host_memory, offload_from_bytes) if offload else None
    return len(chosen)


def count_problem(denoiser: nn.Module, count: int | None) -> tuple[str, str] | None:
    """Why so many units of a denoiser cannot be recomputed, with what to do; None if they can."""
    available = len(checkpoint_units(denoiser))
    if not available:
        return (
            f"memory.checkpointing: {type(denoiser).__name__} has no blocks that can be recomputed.",
            "Set memory.checkpointing = false.",
        )
    if count is not None and count > available:
        return (
            f"memory.checkpoint_blocks is {count}, but this base has {available} blocks.",
            f'Write {available} or fewer, or "auto" for all.',
        )
    return None


def _in_host_memory(from_bytes: int) -> saved_tensors_hooks:
    """Context in which saved tensors wait in host memory.

    Around a non-reentrant checkpoint it sees exactly the checkpoint's inputs: inside, the checkpoint's own
    hooks come first.
    """

    def pack(tensor: Tensor) -> Any:
        if tensor.numel() * tensor.element_size() < from_bytes or isinstance(tensor, nn.Parameter):
            return tensor
        return (to_host(tensor), tensor.device)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        away, device = kept
        return _back(away, device)

    return saved_tensors_hooks(pack, unpack)


def _back(away: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, always a new tensor, so that the host's may go."""
    return torch.empty_like(away, device=device).copy_(away, non_blocking=True)
