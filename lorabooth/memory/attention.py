"""Attention kernels: torch's own by default; others only after one forward and backward pass at real sizes.

Legend of shape suffixes: B batch, H heads, L tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lorabooth.errors import TrainingError, first_line
from lorabooth.progress import Reporter, Silent

_TOKENS = 64
# torch's kernels by the names used here, in the order in which they are tried where torch's choice is wrong.
_BACKENDS = MappingProxyType(
    {
        "flash": "FLASH_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
        "mem_efficient": "EFFICIENT_ATTENTION",
        "math": "MATH",
    }
)
# Largest |difference| to float32 reference attention on unit-normal inputs that rounding explains.
_TOLERANCE = MappingProxyType({torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2})


@dataclass(frozen=True, slots=True)
class KernelFact:
    """Whether one attention kernel works here, forward and backward.

    Attributes:
        name: "flash", "mem_efficient", "math", "cudnn" or "xformers".
        works: it ran, and agreed with reference attention.
        detail: why not; "" if it works.
    """

    name: str
    works: bool
    detail: str


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The attention in use.

    Attributes:
        name: "sdpa" or "xformers".
        reason: why, in a few words.
        kernels: of sdpa, those in use at the denoiser's head sizes: "flash", "mem_efficient", "cudnn" or
            "math"; empty where nothing can be tried (shapes).
    """

    name: str
    reason: str
    kernels: tuple[str, ...] = ()


def head_sizes(denoiser: nn.Module) -> tuple[int, ...]:
    """Channels per head of all attention layers of a denoiser, ascending."""
    sizes = set()
    for module in denoiser.modules():
        heads, inner = getattr(module, "heads", None), getattr(module, "inner_dim", None)
        if isinstance(heads, int) and isinstance(inner, int) and heads > 0:
            sizes.add(inner // heads)
    return tuple(sorted(sizes))


def set_attention(
    denoiser: nn.Module,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    reporter: Reporter | None = None,
) -> AttentionChoice:
    """Put an attention kernel into a denoiser: torch's SDPA, or xformers if it proves itself first.

    Args:
        denoiser: a diffusers model; changed in place.
        kind: "auto" and "sdpa" are torch's own, "xformers" is tried at the denoiser's head sizes in `dtype`.
        dtype: that attention will run in (the compute precision); None for that of the denoiser's weights.
        device: where it will run; None for where the denoiser is.
        reporter: told what is in use; warned, with the reason, when xformers cannot be used.
    """
    say = reporter or Silent()
    weight = next(denoiser.parameters())
    dtype, sizes, place = dtype or weight.dtype, head_sizes(denoiser), torch.device(device or weight.device)
    if isinstance(weight, FakeTensor):
        _use_sdpa(denoiser, None)
        return AttentionChoice("sdpa", "shapes have no numbers to prove it with")
    reason = ""
    if kind == "xformers":
        problem = xformers_problem(sizes, dtype, place)
        if not problem:
            denoiser.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            say.say(f"attention: xformers ({_proven(sizes, dtype)})")
            return AttentionChoice("xformers", _proven(sizes, dtype))
        say.warn(f"xformers cannot be used here: {problem}. Going on with torch's own attention.")
        reason = f"xformers was asked for, but {problem}; "
    chosen = choose_sdpa(sizes, dtype, place)
    for refused in chosen.refused:
        say.warn(f"attention: {refused}; it is not used.")
    _use_sdpa(denoiser, chosen.forced)
    plural = "s" if len(chosen.kernels) > 1 else ""
    reason += f"{' and '.join(chosen.kernels)} kernel{plural}, {_proven(sizes, dtype)}"
    say.say(f"attention: sdpa ({reason})")
    return AttentionChoice("sdpa", reason, chosen.kernels)


@dataclass(frozen=True, slots=True)
class SdpaChoice:
    """Which of torch's own kernels attention runs on.

    Attributes:
        kernels: one for each head size where they differ, without repeats.
        forced: the one kernel that all attention must use, "" to leave it to torch.
        refused: what torch would have used, with what is wrong with it.
    """

    kernels: tuple[str, ...]
    forced: str
    refused: tuple[str, ...] = ()


def choose_sdpa(sizes: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> SdpaChoice:
    """Prove the kernels that torch itself takes; if one is wrong here, find one that is right at all sizes.

    Args:
        sizes: channels per head.
        dtype: of queries, keys and values.
        device: where they are.

    Raises:
        TrainingError: not even the math kernel is right.
    """
    taken = {size: _sdpa_default(size, dtype, device) for size in sizes}
    refused = tuple(
        f"torch's {name} kernel at head size {size} in {_short(dtype)}: {problem}"
        for size, name in taken.items()
        if (problem := _prove(scaled_dot_product_attention, size, dtype, device))
    )
    if not refused:
        return SdpaChoice(tuple(dict.fromkeys(taken.values())), "")
    for name in _BACKENDS:
        if not any(_prove(_attend_with(name), size, dtype, device) for size in sizes):
            return SdpaChoice((name,), name, refused)
    raise TrainingError(
        f"no attention kernel of torch is right on {torch.device(device).type}: {refused[0]}.",
        "Try another memory.precision, or another version of torch.",
    )


def _sdpa_default(size: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """The kernel that torch takes by itself, with gradients wanted."""
    q = torch.zeros((2, 2, _TOKENS, size), dtype=dtype, device=device, requires_grad=True)
    # What scaled_dot_product_attention itself asks; there is no public question (torch 2.13).
    number = int(torch._fused_sdp_choice(q, q, q))
    names = {int(getattr(SDPBackend, attribute)): name for name, attribute in _BACKENDS.items()}
    return names.get(number, f"number {number}")


def _attend_with(name: str) -> Any:
    """Attention on one of torch's kernels, or an error where it is not available."""
    backend = getattr(SDPBackend, _BACKENDS[name])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v)

    return attend


def _use_sdpa(denoiser: Any, forced: str | None) -> None:
    """Put diffusers' SDPA processor into a denoiser, held to one kernel if there must be."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if not forced:
        denoiser.set_attn_processor(AttnProcessor2_0())
        return
    backend = getattr(SDPBackend, _BACKENDS[forced])

    class HeldProcessor(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel([backend]):
                return super().__call__(*args, **kwargs)

    denoiser.set_attn_processor(HeldProcessor())


def _proven(sizes: Sequence[int], dtype: torch.dtype) -> str:
    return f"proven forward and backward at head sizes {', '.join(map(str, sizes))} in {_short(dtype)}"


def xformers_problem(sizes: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> str:
    """Why xformers' attention cannot be used at these head sizes, or "" if it was proven to work."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return "it is not installed (pip install xformers)"
    except (OSError, RuntimeError, AttributeError) as error:  # built for another torch or CUDA
        return f"it cannot be imported ({first_line(error)})"

    def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        # xformers wants [B,L,H,D].
        q, k, v = (t.transpose(1, 2) for t in (q_BHLD, k_BHLD, v_BHLD))
        output: Tensor = memory_efficient_attention(q, k, v)
        return output.transpose(1, 2)

    for size in sizes:
        problem = _prove(attend, size, dtype, device)
        if problem:
            return f"at head size {size} in {_short(dtype)} {problem}"
    return ""


def attention_facts(
    device: torch.device | str, dtype: torch.dtype = torch.float32, head_size: int = 64
) -> list[KernelFact]:
    """Which attention kernels work on a device, each proven forward and backward; for `doctor`.

    Args:
        device: where to try.
        dtype: to try in.
        head_size: channels per head.
    """
    facts = []
    for name in _BACKENDS:
        problem = _prove(_attend_with(name), head_size, dtype, device)
        facts.append(KernelFact(name, not problem, problem))
    problem = xformers_problem((head_size,), dtype, device)
    return [*facts, KernelFact("xformers", not problem, problem)]


def _prove(attend: Any, head_size: int, dtype: torch.dtype, device: torch.device | str) -> str:
    """Run attention forward and backward, compare with float32 arithmetic; "" or what went wrong."""
    import warnings

    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, _TOKENS, head_size)
    exact = [torch.randn(shape, generator=generator).to(dtype).float() for _ in range(4)]
    inputs = [t.clone().to(device, dtype).requires_grad_() for t in exact[:3]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains at length why a forced kernel is not available
            output = attend(*inputs)
            output.backward(exact[3].to(device, dtype))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return f"it does not run ({first_line(error)})"
    reference_inputs = [t.clone().requires_grad_() for t in exact[:3]]
    q, k, v = reference_inputs
    reference = torch.softmax(q @ k.transpose(-1, -2) / head_size**0.5, dim=-1) @ v
    reference.backward(exact[3])  # type: ignore[no-untyped-call]
    for ours, theirs in (
        (output, reference),
        *((a.grad, b.grad) for a, b in zip(inputs, reference_inputs, strict=True)),
    ):
        if ours is None or theirs is None:
            return "it gives no gradient"
        error_max = float((ours.detach().float().cpu() - theirs.detach()).abs().max())
        if not error_max <= _TOLERANCE[dtype]:
            return f"it is wrong by {error_max:.2g}"
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
