"""A world of shapes: tensors that know their size, dtype and device, and hold no numbers.

Torch's fake tensors, labelled "cpu" whatever device is predicted: autograd of fake CUDA tensors needs a CUDA
build of torch, and plain meta tensors know no autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lorabooth.memory.meter_known import UNKNOWN, KnownOps, Maker

_DEVICE = torch.ops.prim.device.default


class ShapesOnly(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Inside, every new tensor is a shape; tensors made outside must not be mixed in.

    A `Meter` is entered inside of it, so that it sees what a program asks for, not how a shape is computed.
    """

    def __init__(self, known: KnownOps | None = None) -> None:
        """Make a world.

        Args:
            known: what ops make of which shapes, remembered from other worlds and for them.
        """
        super().__init__()
        self._known = KnownOps() if known is None else known
        self._maker = Maker(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch need not wrap every op to keep its compiler out."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The op on shapes.

        The mode remembers, by weak reference, what it made of what. Parameters with weak references cannot be
        moved or cast (torch.utils.swap_tensors, which Module._apply uses for fake tensors), and nothing that
        is made inside is looked up again: it is made to forget.
        """
        if func is _DEVICE:
            return args[0].fake_device  # asked for at every turn
        options = {} if kwargs is None else kwargs
        # What is asked of tensors here is no part of the program, and function modes have no say in it.
        with torch._C.DisableTorchFunction():
            key = self._known.key(func, args, options)
            made = self._known.remade(self._maker, key, args)
            if made is not UNKNOWN:
                return made
            try:
                made = super().__torch_dispatch__(func, types, args, options)
            finally:
                self.fake_tensor_converter.meta_converter.tensor_memo.clear()
            self._known.learn(key, args, made)
            return made


class Uninitialised(TorchFunctionMode):
    """Inside, `torch.nn.init` leaves tensors as they are: a module of shapes is built in half the time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the tensor that would be filled."""
        options = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return func(*args, **options)
