"""Contract first; the body is being written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lorabooth.types import Noised

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NoisePath(Protocol):
    """How clean latents become noisy, and what the denoiser predicts."""

    def sample_level(self, generator: torch.Generator) -> Tensor:
        """One level [] for one example."""
        ...

    def noise(self, latents_BChw: Tensor, eps_BChw: Tensor, level_B: Tensor) -> Noised:
        """Move latents to `level` along `eps`."""
        ...
