"""A denoiser in another precision, beside the one that was loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lorabooth.families.base import Parts

if TYPE_CHECKING:
    import torch


def recast(parts: Parts, dtype: torch.dtype) -> Parts:
    """The same parts with a denoiser in `dtype`: the very same where it is so already, else a frozen copy.

    Tensors are cast one by one, and what was loaded stays as it is: drawing rounds nothing that is trained
    on. Where host and device are one memory, the copy is held besides.

    Args:
        parts: with a denoiser that no adapter is on.
        dtype: of floating point weights and buffers.
    """
    if parts.dtype == dtype:
        return parts
    replaced: dict[int, object] = {}
    for tensor in (*parts.denoiser.parameters(), *parts.denoiser.buffers()):
        cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
        replaced[id(tensor)] = (
            nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast
        )
    return replace(parts, denoiser=copy.deepcopy(parts.denoiser, replaced), dtype=dtype)
