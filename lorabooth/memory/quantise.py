"""The frozen denoiser's weights in 8 or 4 bits: int8, fp8 and NF4; unpacked layer by layer to compute with.

Linear layers and convolutions are stored so; norms, biases, embeddings, timestep layers and the first and
last convolution stay in the compute precision. The adapter stays float32, and its file is the same as ever:
merging reads the base's own files, never these weights.

- int8: a row (output channel) is divided by its largest magnitude / 127 and rounded, as in LLM.int8()
  (arXiv 2208.07339) and bitsandbytes' `int8_vectorwise_quant`, but from float32, so that no weight overflows.
- fp8: a row is divided by its largest magnitude / 448 and held in float8_e4m3fn (arXiv 2209.05433). Not
  diffusers' layerwise casting (0.42): it exchanges a layer's weight after the forward pass, and the backward
  pass of a convolution then fails on float8; and plain casting makes NaN of weights over 448.
- nf4: blocks of 64 on the 16 levels of NormalFloat4, their scales again in 8 bits (double quantisation), as
  in QLoRA (arXiv 2305.14314); bitsandbytes' kernels. The only file that imports them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorabooth.errors import RecipeError, first_line
from lorabooth.memory.frozen import Format, can_freeze, freeze_in_place
from lorabooth.memory.host import pinned

KINDS = ("int8", "nf4", "fp8")
"""What `memory.base_precision` may name besides plain formats."""

# Parts of module paths that stay: norms (adaptive ones too), embeddings, timestep layers, a transformer's
# or U-Net's first and last layer, adapters.
_STAYS = re.compile(r"(^|\.)[^.]*(norm|emb|time|lora)[^.]*(\.|$)|^(conv_in|conv_out|proj_out)$")
_NF4_BLOCK = 64
_NF4_SCALES_BLOCK = 256
_EXAMPLE_SHAPE = (8, 64)


@dataclass(frozen=True, slots=True)
class RowScaled:
    """[O, ...] of small numbers, and a float32 scale for each of the O rows."""

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Small numbers times scales; one new tensor of the weight's size."""
        weight, scale_O = stored
        rows = scale_O.to(dtype).view(-1, *(1,) * (weight.dim() - 1))
        return weight.to(dtype).mul_(rows)


@dataclass(frozen=True, slots=True)
class Nf4:
    """Two numbers to a byte; 8-bit scales of blocks of 64, with scales of their own for blocks of 256.

    Attributes:
        shape: of the weight.
    """

    shape: tuple[int, ...]

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Unpacked by bitsandbytes' kernels; one new tensor of the weight's size.

        As one long row: blocks do not end with a row, and on a CPU rows of odd length (3x3 kernels) would be
        compiled, shape by shape.
        """
        weight, scales, outer_scales, offset, code = stored
        ops = torch.ops.bitsandbytes
        inner = ops.dequantize_blockwise.default(scales, outer_scales, code, _NF4_SCALES_BLOCK, torch.float32)
        unpacked: Tensor = ops.dequantize_4bit.default(
            weight.view(-1, 1), inner.add_(offset), _NF4_BLOCK, "nf4", (1, math.prod(self.shape)), dtype
        )
        return unpacked.view(self.shape)


def quantise(denoiser: nn.Module, kind: str, device: torch.device | str, *, to_host: bool = False) -> int:
    """Store the frozen layers of a denoiser in few bits, in place.

    Layer by layer: each weight goes to the device alone, and only what is stored of it stays there, so the
    device never holds the whole denoiser in its full precision. Works on fake tensors; reads no value.

    Args:
        denoiser: before an adapter is attached, or with one; what trains stays.
        kind: one of `KINDS`.
        device: where it is computed, and where the result is.
        to_host: put the result into host memory instead, page-locked for a GPU.

    Returns:
        How many layers were changed.
    """
    code = _nf4_code(device) if kind == "nf4" else None
    layers = quantisable(denoiser)
    for layer in layers.values():
        stored_as, stored = _store(layer.weight.detach().to(device), kind, code)
        if to_host:
            stored = {name: pinned(tensor, device) for name, tensor in stored.items()}
        freeze_in_place(layer, stored_as, stored)
    return len(layers)


def quantisable(denoiser: nn.Module) -> dict[str, Any]:
    """Path -> layer of all that `quantise` stores in few bits."""
    return {
        path: layer
        for path, layer in denoiser.named_modules()
        if can_freeze(layer) and not _STAYS.search(path)
    }


def kind_problem(kind: str, device: torch.device | str) -> str:
    """Why weights cannot be held in a format on a device, or "" after one was stored and read there.

    Args:
        kind: one of `KINDS`.
        device: where to try.
    """
    if kind == "nf4" and (problem := _bitsandbytes_problem()):
        return problem
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_EXAMPLE_SHAPE, generator=generator)
    try:
        code = _nf4_code(device) if kind == "nf4" else None
        stored_as, stored = _store(weight.to(device), kind, code)
        again = stored_as.unpack(tuple(stored.values()), torch.float32).cpu()
    except torch.OutOfMemoryError:
        raise
    # bitsandbytes without its compiled library, and devices without a dtype, fail in any of these ways.
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        return f"it does not run on {torch.device(device).type} ({first_line(error)})"
    error_mean = float((again - weight).abs().mean() / weight.abs().mean())
    return "" if error_mean < 0.2 else f"it is wrong by {error_mean:.0%} on {torch.device(device).type}"


def _store(weight: Tensor, kind: str, code: Tensor | None) -> tuple[Format, dict[str, Tensor]]:
    """What is kept of a weight [O, ...], in the order of the format's `unpack`."""
    stores: dict[str, Callable[[], tuple[Format, dict[str, Tensor]]]] = {
        "int8": lambda: (ROW_SCALED, _by_row(weight, 127.0, lambda x: x.round_().to(torch.int8))),
        "fp8": lambda: (ROW_SCALED, _by_row(weight, _FP8_MAX, lambda x: x.to(torch.float8_e4m3fn))),
        "nf4": lambda: (Nf4(tuple(weight.shape)), _nf4(weight, code)),
    }
    return stores[kind]()


ROW_SCALED = RowScaled()
_FP8_MAX = 448.0


def _by_row(weight: Tensor, largest: float, narrow: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    exact = weight.to(torch.float32)
    # A row of zeros has no scale; any will do.
    scale_O = exact.flatten(1).abs().amax(dim=1).div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
    small = narrow(exact / scale_O.view(-1, *(1,) * (exact.dim() - 1)))
    return {"weight": small, "weight_scale": scale_O}


def _nf4(weight: Tensor, code: Tensor | None) -> dict[str, Tensor]:
    if code is None:
        raise ValueError("NF4 needs the 8-bit code of its scales")
    ops = torch.ops.bitsandbytes
    # Two half-precision formats and float32 are taken as they are.
    packed, scales = ops.quantize_4bit.default(weight.reshape(1, -1), _NF4_BLOCK, "nf4", torch.uint8)
    offset = scales.mean()
    inner, outer = ops.quantize_blockwise.default(scales - offset, code, _NF4_SCALES_BLOCK)
    return {
        # As many dimensions as the weight has: peft asks for them.
        "weight": packed.view(-1, *(1,) * (weight.dim() - 1)),
        "weight_scales": inner,
        "weight_outer_scales": outer,
        "weight_offset": offset,
        "weight_code": code,
    }


def _nf4_code(device: torch.device | str) -> Tensor:
    """`_dynamic_code`, once bitsandbytes' kernels are there.

    Raises:
        RecipeError: they are not.
    """
    if problem := _bitsandbytes_problem():
        raise RecipeError(
            f'memory.base_precision = "nf4": {problem}.', 'Or write "int8", which needs no package.'
        )
    return _dynamic_code(device)


def _dynamic_code(device: torch.device | str) -> Tensor:
    """The signed 8-bit code [256] of dynamic exponents for scales (arXiv 1511.04561), ascending.

    Written out, since bitsandbytes' `create_dynamic_map` reads tensors' values, which shapes do not have, and
    its callers keep the result for the whole process. i bits of the fraction leave an exponent of i - 6.
    """
    positive = [
        10.0 ** (i - 6) * (0.1 + 0.9 * (place + 0.5) / 2**i) for i in range(7) for place in range(2**i)
    ]
    return torch.tensor(sorted([0.0, 1.0, *positive, *(-x for x in positive)]), device=device)


def _bitsandbytes_problem() -> str:
    try:
        import bitsandbytes.functional  # noqa: F401 - registers its kernels as torch.ops
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"bitsandbytes cannot be imported ({first_line(error)}); pip install 'lorabooth[gpu]'"
    return ""
