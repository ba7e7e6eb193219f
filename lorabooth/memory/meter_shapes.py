"""A world of shapes: tensors that know their size, dtype and device, and hold no numbers.

Torch's fake tensors, labelled "cpu" whatever device is predicted: autograd of fake CUDA tensors needs a CUDA
build of torch, and plain meta tensors know no autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


class ShapesOnly(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Inside, every new tensor is a shape; tensors made outside must not be mixed in.

    A `Meter` is entered inside of it, so that it sees what a program asks for, not how a shape is computed.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The op on shapes.

        The mode remembers, by weak reference, what it made of what. Parameters with weak references cannot be
        moved or cast (torch.utils.swap_tensors, which Module._apply uses for fake tensors), and nothing that
        is made inside is looked up again: it is made to forget.
        """
        try:
            return super().__torch_dispatch__(func, types, args, {} if kwargs is None else kwargs)
        finally:
            self.fake_tensor_converter.meta_converter.tensor_memo.clear()


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
