"""Tensors in host memory: what steps aside while the device works on something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

HOST = "host memory"
SCRATCH = "quantisation scratch"
_MADE_FOR: ContextVar[str] = ContextVar("lorabooth_made_for", default="")


def made_for() -> str:
    """What tensors that are made now are: `HOST`, `SCRATCH`, or "" for anything else.

    For whoever counts memory. Device labels do not tell it: where host and device are one memory (a CPU, or
    the shapes of a prediction), both are "cpu".
    """
    return _MADE_FOR.get()


@contextmanager
def making(what: str) -> Iterator[None]:
    """Inside, `made_for()` is `what`."""
    token = _MADE_FOR.set(what)
    try:
        yield
    finally:
        _MADE_FOR.reset(token)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked for a GPU so that the copy needs no waiting; same dtype and layout.

    Ordered with the current stream: the device tensor may be freed at once.
    """
    is_gpu = tensor.device.type == "cuda"
    with making(HOST):
        away = torch.empty_like(tensor, device="cpu", pin_memory=is_gpu)
        away.copy_(tensor, non_blocking=is_gpu)
    return away


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor in host memory, page-locked if `device` is a GPU; itself if it is so already."""
    with making(HOST):
        home = tensor.cpu()
        if torch.device(device).type != "cuda" or home.is_pinned():
            return home
        return home.pin_memory()
