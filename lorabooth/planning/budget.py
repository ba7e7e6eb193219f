"""How much memory a run may use: a given size, or what a device has free, less a margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorabooth.errors import RecipeError
from lorabooth.memory.facts import Device, default_device, describe_device, devices
from lorabooth.memory.meter_cuda import CONTEXT_BYTES
from lorabooth.recipe.sizes import parse_size

GIB = 1 << 30
MARGIN_SHARE = 0.05
"""Part of a budget that is left alone: a forecast is held to 5 % of what torch's allocator reports."""
FRAGMENTATION_BYTES = 128 << 20
"""Left alone on CUDA besides, for workspaces and remainders that a forecast does not model (meter_cuda.py).

A stated allowance, not a measurement.
"""
AMPERE = "8.0"


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that a run may use.

    Attributes:
        total_bytes: all of it.
        margin_bytes: of that, what a plan leaves alone.
        origin: where the figure is from, in words: "free now", "given".
    """

    total_bytes: int
    margin_bytes: int
    origin: str

    @property
    def usable_bytes(self) -> int:
        """What a forecast's peak may reach."""
        return max(0, self.total_bytes - self.margin_bytes)


def budget_for(device: Device, size: str = "auto") -> Budget:
    """The budget on a device.

    Args:
        device: of this machine, or a description of another.
        size: "8GiB", or "auto": what is free now.

    Raises:
        RecipeError: no size.
    """
    if size == "auto":
        total, origin = _free_bytes(device), "free now"
    else:
        total, origin = size_of(size, "memory.budget"), "given"
    margin = int(total * MARGIN_SHARE)
    if device.kind == "cuda":
        margin += FRAGMENTATION_BYTES
    elif size != "auto":  # what is free now is free besides this process
        margin += own_bytes()
    return Budget(total, margin, origin)


def size_of(text: str, where: str) -> int:
    """A size in bytes.

    Raises:
        RecipeError: it is none; names where it was given.
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise RecipeError(f"{where}: {text!r} {error}.") from None


def card(size_bytes: int) -> Device:
    """A CUDA card of some size that need not be here; bf16 is taken to be native (compute capability 8.0)."""
    return Device("cuda", f"a card of {gib_text(size_bytes)}", size_bytes, size_bytes, AMPERE, True)


def device_named(name: str) -> torch.device:
    """A device of this machine: "cpu", "cuda", "cuda:1" or the number of a GPU; "" is what work would run on.

    Raises:
        RecipeError: it is not here; says what is.
    """
    try:
        place = torch.device(f"cuda:{name}" if name.isdecimal() else name or default_device())
        describe_device(place)
    # What torch raises for a device that it was built without, has not found, or never heard of.
    except (RuntimeError, AssertionError, ValueError) as error:
        here = [f"{each.kind} ({each.name})" for each in devices()]
        raise RecipeError(
            f"--device {name}: this machine has no such device.",
            f"There is {', '.join(here)}. Write --device cpu or the number of a GPU, or --vram 8GiB for a "
            "card that is not here.",
        ) from error
    if place.type not in ("cpu", "cuda") and not (place.type == "mps" and torch.backends.mps.is_available()):
        raise RecipeError(f"--device {name}: no run can be there.", "Write --device cpu, or a GPU's number.")
    return place


def gib_text(size_bytes: float) -> str:
    """A size as tables show it: "8.0 GiB", "96 MiB"."""
    if size_bytes < GIB:
        size_mib = size_bytes / (1 << 20)
        return f"{size_mib:.0f} MiB" if size_mib >= 10 else f"{size_mib:.1f} MiB"
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes < 100 * GIB else f"{size_bytes / GIB:.0f} GiB"


def own_bytes() -> int:
    """The resident memory of this process: interpreter and libraries, which no forecast counts."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def _free_bytes(device: Device) -> int:
    """Asking a GPU makes a context there, which is no longer free and which a forecast counts again."""
    if device.kind != "cuda":
        return device.free_bytes
    return min(device.total_bytes, device.free_bytes + CONTEXT_BYTES)
