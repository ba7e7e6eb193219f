"""A part that has left memory, back from disk for a while: to look at images between steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorabooth.families.base import Family, Parts

if TYPE_CHECKING:
    import torch
    from torch import nn


def with_vae(family: Family, parts: Parts, device: torch.device) -> Parts:
    """The same parts with a VAE on `device`; the caller drops the result to free it again."""
    if parts.vae is not None:
        return parts
    return replace(parts, vae=family.load_vae(parts.source).to(device))


def load_denoiser(family: Family, parts: Parts) -> nn.Module:
    """The base's denoiser once more, whole and frozen, on the CPU; what is loaded beside it is let go.

    Raises:
        BaseModelError: the files are not there any more, or were changed.
    """
    return family.load(parts.source, parts.dtype).denoiser
