"""A recipe's memory section, applied to a base: what a run, its trial step and its prediction have in common.

`hold_base` and `recompute` read no tensor's value, so they work on shapes. Every technique leaves the adapter
float32 and its gradients equal: exactly (recomputation, offloading, streaming, frozen convolutions), or to
those of the base whose weights are what the few bits stand for (int8, fp8, nf4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorabooth.errors import RecipeError
from lorabooth.memory import attention, checkpoint, quantise, stream
from lorabooth.memory.apply import cast_base, precision
from lorabooth.memory.frozen import keep_no_inputs
from lorabooth.memory.units import checkpoint_units
from lorabooth.recipe import MemorySection


def hold_base(denoiser: nn.Module, memory: MemorySection, device: torch.device | str) -> list[str]:
    """Hold a denoiser's frozen weights as the recipe says: in which format, and where.

    Layer by layer, so that the device never holds more than there was or will be. Call it with the adapter
    attached; afterwards `denoiser.to(device)` moves what is to be there.

    Args:
        denoiser: changed in place.
        memory: the recipe's section.
        device: where it computes.

    Returns:
        What was done, a line each, for the user.

    Raises:
        RecipeError: `precision` does, or a package is missing.
    """
    chosen, said = precision(memory, device), []
    stream.stop(denoiser)
    if chosen.storage:
        count = quantise.quantise(denoiser, chosen.storage, device, to_host=memory.stream)
        said.append(f"base: {count} layers in {chosen.storage}")
    cast_base(denoiser, chosen.base)
    # On an Apple GPU the plain convolution's backward pass is the one that is known to work.
    if torch.device(device).type != "mps":
        keep_no_inputs(denoiser)
    if memory.stream:
        waiting = stream.stream(denoiser, device)
        said.append(f"base: {waiting / 2**20:,.1f} MiB wait in host memory and visit {device} block by block")
    return said


def recompute(denoiser: nn.Module, memory: MemorySection, *, dropout: float = 0.0) -> list[str]:
    """Recompute as many units of a denoiser as the recipe says.

    Args:
        denoiser: changed in place.
        memory: the recipe's section.
        dropout: of the adapter; with it a unit must be recomputed with the same random numbers.

    Returns:
        What was done, for the user.

    Raises:
        RecipeError: the denoiser has no units, or fewer.
    """
    if not memory.checkpointing:
        return []
    count = None if memory.checkpoint_blocks == "auto" else memory.checkpoint_blocks
    done = checkpoint.recompute(denoiser, count, offload=memory.checkpoint_offload, preserve_rng=dropout > 0)
    return [f"checkpointing: {done} of {len(checkpoint_units(denoiser))} blocks are recomputed"]


def save_vae_memory(vae: Any, memory: MemorySection) -> None:
    """Let a VAE take images one by one (exact), or in overlapping tiles of half its training size.

    Tiles are normalised each on its own and blended where they overlap (a quarter of a side): latents and
    pixels differ from those of the whole image, by up to 0.3 and 0.2 of their standard deviation (root mean
    square, on the pocket base with its tiles of 32 px).

    Args:
        vae: diffusers' AutoencoderKL, or None.
        memory: the recipe's section.
    """
    if vae is None:
        return
    if memory.vae_slicing:
        vae.enable_slicing()
    if memory.vae_tiling:
        vae.enable_tiling()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_latent_min_size = max(1, int(vae.config.sample_size) // factor // 2)
        vae.tile_sample_min_size = vae.tile_latent_min_size * factor


def technique_problems(
    memory: MemorySection, device: torch.device | str, denoiser: nn.Module | None = None
) -> list[str]:
    """What of a recipe's memory section cannot be done here, each with what is missing and what to do.

    Each technique is tried on a few numbers, so it takes a moment and no memory.

    Args:
        memory: the recipe's section, without contradictions.
        device: where training runs.
        denoiser: checks what depends on it too (head sizes, number of blocks); None checks the rest, before
            anything is loaded.
    """
    place, found = torch.device(device), []
    if memory.base_precision in quantise.KINDS and denoiser is None:
        problem = quantise.kind_problem(memory.base_precision, place)
        if problem:
            fix = 'write "int8", which needs no package' if memory.base_precision == "nf4" else 'write "auto"'
            found.append(f'memory.base_precision = "{memory.base_precision}": {problem}; or {fix}')
    for key in ("stream", "in_turn"):
        if getattr(memory, key) and place.type == "mps" and denoiser is None:
            found.append(
                f"memory.{key}: an Apple GPU has no memory of its own that could be saved; write false"
            )
    if memory.attention == "xformers":
        sizes: Sequence[int] = (64,) if denoiser is None else attention.head_sizes(denoiser)
        problem = attention.xformers_problem(sizes, precision(memory, place).compute, place)
        if problem:
            found.append(f'memory.attention = "xformers": {problem}; or write "sdpa", torch\'s own')
    if denoiser is not None and memory.checkpointing:
        count = None if memory.checkpoint_blocks == "auto" else memory.checkpoint_blocks
        trouble = checkpoint.count_problem(denoiser, count)
        found += [" ".join(trouble)] if trouble else []
    return found


def require_techniques(
    memory: MemorySection, device: torch.device | str, denoiser: nn.Module | None = None
) -> None:
    """Stop, with all of `technique_problems` in one message, if there are any.

    Raises:
        RecipeError: a technique cannot be used here.
    """
    problems = technique_problems(memory, device, denoiser)
    if problems:
        raise RecipeError("Not on this machine, or not with this base:\n  " + "\n  ".join(problems))
