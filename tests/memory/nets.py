"""A tiny real UNet with a stirred adapter, and what its gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabooth.adapters import inject
from lorabooth.families import registry, source

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
CONVOLUTIONS = r".*\.resnets\.\d+\.(conv1|conv2)"
EVERYTHING = (ATTENTION, CONVOLUTIONS)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's UNet, frozen."""
    found = source.resolve(str(folder))
    return registry.family(found.family).load(found, dtype).denoiser


def adapt(unet: nn.Module, patterns: Sequence[str] = EVERYTHING) -> list[nn.Parameter]:
    """An adapter that does something (lora_B starts at zero, where no gradient reaches lora_A)."""
    target = inject.Target("denoiser", tuple(patterns), 4, 4.0, 0.0)
    parameters = inject.attach({"denoiser": unet}, [target], seed=0).parameters()
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return parameters


def loss(unet: Any) -> Tensor:
    """Of one batch of two."""
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    dtype = unet.conv_in.weight.dtype
    prediction = unet(x.to(dtype), torch.tensor([500, 20]), cond.to(dtype)).sample
    return prediction.float().square().mean()  # type: ignore[no-any-return]


def gradients(
    unet: nn.Module, parameters: Sequence[nn.Parameter], compute: Callable[[nn.Module], Tensor] = loss
) -> list[Tensor]:
    """Of the adapter, by a real backward pass into `.grad`, which is cleared again."""
    compute(unet).backward()
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
    assert len(found) == len(parameters)
    assert {g.dtype for g in found} == {torch.float32}
    return found


def cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Of all gradients as one vector."""
    a, b = (torch.cat([g.flatten() for g in side]) for side in (ours, theirs))
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def kept_bytes(unet: nn.Module) -> int:
    """What autograd saves in a forward pass, every storage once; what a recomputation saves is not in it."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss(unet)
    return sum(held.values())
