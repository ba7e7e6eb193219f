"""Precision and checkpointing: applied to a base, and proven before they are relied on."""

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

from lorabooth.errors import RecipeError, TrainingError, first_line
from lorabooth.memory.frozen import stored_names
from lorabooth.memory.quantise import KINDS
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
        base: dtype that the frozen denoiser is held in, but for the layers that are stored in few bits.
        reason: why, in a few words, for the run's summary.
        storage: how those are stored, one of `quantise.KINDS`; "" if there are none.
    """

    compute: torch.dtype
    base: torch.dtype
    reason: str
    storage: str = ""

    @property
    def base_name(self) -> str:
        """What the base is held in, as a recipe says it."""
        return self.storage or NAMES[self.base]

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

    CUDA: bf16 where it is native, else fp16. CPU and Apple GPUs: fp32, or bf16 with a base in few bits.

    Raises:
        RecipeError: the frozen base would be coarser than the arithmetic on it.
    """
    place = torch.device(device)
    reason = "as the recipe says"
    storage = memory.base_precision if memory.base_precision in KINDS else ""
    if memory.precision == "auto":
        compute, reason = _best(place)
        if storage and compute == torch.float32:
            compute, reason = torch.bfloat16, f"as exact as a base in {storage} needs"
    else:
        compute = DTYPES[memory.precision]
    base = compute if storage or memory.base_precision == "auto" else DTYPES[memory.base_precision]
    if compute == torch.float32 and (storage or base != torch.float32):
        wanted = "bf16" if storage else NAMES[base]
        raise RecipeError(
            f'memory.base_precision = "{memory.base_precision}" does not go with memory.precision = "fp32": '
            "weights would be rounded and nothing computed faster.",
            f'Set memory.precision = "{wanted}", or memory.base_precision = "fp32".',
        )
    return Precision(compute, base, reason, storage)


def cast_base(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights and buffers in `dtype`, in place.

    Whatever trains keeps its float32, and what is stored in few bits stays as it is.
    """
    for module, name, tensor in _plain_tensors(denoiser):
        if tensor.dtype != dtype:
            _set(module, name, tensor, tensor.detach().to(dtype))


def restore_base(denoiser: nn.Module, fresh: nn.Module) -> None:
    """Give a denoiser the frozen weights and buffers of a freshly loaded one again, in their dtype, in place.

    Args:
        denoiser: may carry an adapter, which stays, and layers in few bits, which stay; may lack parts.
        fresh: the same base's, without an adapter; its tensors are taken over.
    """
    originals = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    paths = {module: path for path, module in denoiser.named_modules()}
    for module, name, tensor in _plain_tensors(denoiser):
        # What is inside an adapted layer is known to the base by the layer's own name.
        original = originals.get(f"{paths[module]}.{name}".replace(".base_layer.", ".").lstrip("."))
        if original is not None and original.shape == tensor.shape:
            _set(module, name, tensor, original.detach().to(tensor.device))


def _plain_tensors(denoiser: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, tensor) of all frozen floating-point tensors that are not part of a few-bits format."""
    found = []
    for module in denoiser.modules():
        stored = stored_names(module)
        held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        found += [
            (module, name, tensor)
            for name, tensor in held
            if tensor.is_floating_point() and not tensor.requires_grad and name not in stored
        ]
    return found


def _set(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Exchange a tensor's data; page-locked memory stays that."""
    if torch.cuda.is_available() and old.is_pinned():
        new = new.pin_memory()
    if isinstance(old, nn.Parameter):
        old.data = new
    else:
        setattr(module, name, new)


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
    reload: Callable[[torch.dtype], nn.Module],
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
        reload: loads the base's denoiser anew in a dtype. Called when a step down wants weights that the one
            before has rounded, or made infinite (float16 ends at 65504): so nothing is kept twice where all
            is well.
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
        if base != candidate.base:
            restore_base(denoiser, reload(base))
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
    except RuntimeError as error:
        return first_line(error)
    finally:
        for parameter in trained:
            parameter.grad = None
    return ""
