"""Precision, attention kernel, checkpointing: applied to a denoiser, and proven before they are relied on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabooth.errors import RecipeError, TrainingError
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe import MemorySection

DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16})
NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
# What is tried when a precision does not work, most like it first. fp32 has nothing below it.
_NEXT = MappingProxyType({torch.float16: torch.bfloat16, torch.bfloat16: torch.float32})


@dataclass(frozen=True, slots=True)
class Precision:
    """Which number formats a training step uses. Adapter weights are float32 in all of them.

    Attributes:
        compute: dtype of autocast; float32 is no autocast.
        base: dtype that the frozen denoiser is held in.
        reason: why, in a few words, for the run's summary.
    """

    compute: torch.dtype
    base: torch.dtype
    reason: str

    @property
    def scaled(self) -> bool:
        """Whether the loss must be scaled, because small float16 gradients would vanish."""
        return self.compute == torch.float16

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype=self.compute)

    def scaler(self, device: torch.device | str) -> torch.amp.GradScaler:
        """The loss scaler; a disabled one where none is needed."""
        return torch.amp.GradScaler(torch.device(device).type, enabled=self.scaled)


def precision(memory: MemorySection, device: torch.device | str) -> Precision:
    """The number formats that a recipe asks for; "auto" becomes what the device is good at.

    CUDA: bf16 where it is native, else fp16. CPU and Apple GPUs: fp32.

    Raises:
        RecipeError: the frozen base would be coarser than the arithmetic on it.
    """
    place = torch.device(device)
    reason = "as the recipe says"
    if memory.precision == "auto":
        compute, reason = _best(place)
    else:
        compute = DTYPES[memory.precision]
    base = compute if memory.base_precision == "auto" else DTYPES[memory.base_precision]
    if compute == torch.float32 and base != torch.float32:
        raise RecipeError(
            f'memory.base_precision = "{NAMES[base]}" does not go with memory.precision = "fp32": '
            "weights would be rounded and nothing computed faster.",
            f'Set memory.precision = "{NAMES[base]}", or memory.base_precision = "fp32".',
        )
    return Precision(compute, base, reason)


def cast_base(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights and buffers in `dtype`, in place; whatever trains keeps its float32."""
    for module in denoiser.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass instead of keeping them (non-reentrant).

    The reentrant kind gives no gradient at all when a block's inputs need none, as with a frozen base.

    Args:
        model: a diffusers denoiser, or a transformers text encoder (which recomputes in train mode only, and
            has no dropout that the mode would change).

    Raises:
        RecipeError: this model cannot.
    """
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        raise RecipeError(
            f"memory.checkpointing: {type(model).__name__} cannot recompute activations.",
            "Set memory.checkpointing = false.",
        )


def probe(
    attempt: Callable[[], Tensor],
    trained: Sequence[nn.Parameter],
    denoiser: nn.Module,
    wanted: Precision,
    device: torch.device | str,
    reporter: Reporter | None = None,
) -> Precision:
    """Prove a precision by one small forward and backward pass; where it fails, take the next one and say so.

    Fails means: not finite, no gradient, or not implemented on the device. The order is fp16, bf16, fp32.
    The denoiser's frozen weights end up in the returned precision's base dtype.

    Args:
        attempt: runs the forward pass on a small batch and returns a scalar loss; called under autocast.
        trained: the adapter's parameters; their gradients are cleared afterwards.
        denoiser: cast in place by `cast_base`.
        wanted: what to try first.
        device: where it runs.
        reporter: told of every step down.

    Returns:
        The first precision that works.

    Raises:
        TrainingError: not even fp32 gives finite numbers.
    """
    say = reporter or Silent()
    candidate = wanted
    while True:
        cast_base(denoiser, candidate.base)
        problem = _try(attempt, trained, candidate, device)
        if not problem:
            return candidate
        following = _NEXT.get(candidate.compute)
        if following is None:
            raise TrainingError(
                f"one trial step in {NAMES[candidate.compute]} failed: {problem}.",
                "The base model's weights may be broken; try another copy of it.",
            )
        reason = f"{NAMES[candidate.compute]} failed a trial step ({problem})"
        say.warn(f"Precision: {reason}; going on in {NAMES[following]}.")
        base = following if candidate.base == candidate.compute else candidate.base
        base = torch.float32 if following == torch.float32 else base
        candidate = replace(candidate, compute=following, base=base, reason=reason)


def _best(device: torch.device) -> tuple[torch.dtype, str]:
    if device.type != "cuda":
        return torch.float32, f"exact, and fastest on {device.type}"
    # Cards before compute capability 8 emulate bf16, slower than fp32.
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16, "native on this GPU, and as wide as float32"
    return torch.float16, "this GPU has no native bf16"


def _try(
    attempt: Callable[[], Tensor],
    trained: Sequence[nn.Parameter],
    candidate: Precision,
    device: torch.device | str,
) -> str:
    """What went wrong, or "". Gradients are cleared."""
    try:
        with candidate.autocast(device):
            loss = attempt()
        loss.backward()  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(loss)):
            return "the loss is not finite"
        gradients = [p.grad for p in trained if p.grad is not None]
        if not gradients:
            return "no gradient reaches the adapter"
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            return "a gradient is not finite"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0][:200]
    finally:
        for parameter in trained:
            parameter.grad = None
    return ""
