"""An optimizer's state as tensors and JSON, and back, bit for bit; nothing non-finite goes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lorabooth.errors import TrainingError


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimizer's state as a JSON value and the tensors that it points to, on the CPU.

    Raises:
        TrainingError: a tensor of it is not finite; it is named.
    """
    tensors: dict[str, Tensor] = {}
    packed = {
        str(index): pack(state, str(index), tensors)
        for index, state in optimizer.state_dict()["state"].items()
    }
    require_finite(tensors)
    return {"outline": outline(optimizer), "state": packed}, tensors


def unpack_optimizer(
    saved: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put what `pack_optimizer` gave into a fresh optimizer of the same outline."""
    state = {int(index): unpack(packed, tensors) for index, packed in saved["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    page_again(optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What its state takes; of an optimizer that has done no step, what it will take."""
    if optimizer.state:
        return sum(t.numel() * t.element_size() for t in tensors_in(optimizer.state))
    eight_bit = "8bit" in type(optimizer).__name__.lower()
    # Two moments. bitsandbytes keeps those of small tensors in float32, and a scale for 256 of the others.
    return sum(
        int(p.numel() * 2.1) if eight_bit and p.numel() >= 4096 else p.numel() * 8
        for group in optimizer.param_groups
        for p in group["params"]
    )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity in the optimizer's state ("3/exp_avg": of the fourth parameter).

    Raises:
        TrainingError: names the first.
    """
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise TrainingError(
            f"the optimizer's state holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, "
            f"e.g. {bad[0]}",
            'Lower optim.lr, or set memory.precision to "bf16" or "fp32".',
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from tensors_in(member)


def outline(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What must agree between a saved and a fresh optimizer: its class, components and shapes."""
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {"name": group.get("name", ""), "shapes": [list(p.shape) for p in group["params"]]}
            for group in optimizer.param_groups
        ],
    }


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """State as JSON: tensors go to `tensors` under their path and leave {"tensor": path} behind."""
    if isinstance(value, Tensor):
        # A copy: bitsandbytes shares one quantization map between parameters, safetensors shares nothing.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": {key: pack(member, f"{name}/{key}", tensors) for key, member in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}, which cannot be saved")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        # A copy: what safetensors loads may be a view of the file, which rotation deletes.
        return tensors[packed["tensor"]].clone()
    return {key: unpack(member, tensors) for key, member in packed["map"].items()}


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Move restored state of a paged bitsandbytes optimizer back into paged memory.

    Its `load_state_dict` leaves plain device tensors, which would take the memory that paging is to save.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            plain = state.get(key)
            if plain is None:
                continue
            buffer = optimizer.get_state_buffer(parameter, dtype=plain.dtype)  # type: ignore[attr-defined]
            if getattr(buffer, "is_paged", False):
                buffer.copy_(plain)
                state[key] = buffer
