"""Frozen layers that keep nothing but their weight for the backward pass, in whatever format it is held.

A frozen layer's backward pass needs the weight alone (grad_x = grad_y W). torch saves more: a convolution
keeps its whole input though no gradient of the weight is wanted; a weight that is cast or unpacked for the
product would be kept in its large form. Here only the weight as it is stored is saved (through autograd's own
saving, so that checkpoints and offloading see it), and it is unpacked once more in the backward pass.

Own layers, and not bitsandbytes': its `MatMul8bitLt` and `MatMul8bitFp` (0.50) hold a layer's input in an
attribute of the autograd context, past `save_for_backward`, so that non-reentrant checkpoints save nothing on
8-bit layers; `Linear4bit` repacks its weight in place in eval mode on some CPUs, where it has no gradient any
more; and neither has convolutions, which are more than half of a U-Net's weights.

Legend of shape suffixes: B batch, C channels, h w size, I O a layer's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from lorabooth.memory.host import SCRATCH, making


class Format(Protocol):
    """How a weight is stored."""

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in a layer's shape and in `dtype`, from what is stored of it."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """The weight as it is."""

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Cast, if it has another dtype."""
        return stored[0].to(dtype)


PLAIN = Plain()


class FrozenConv2d(nn.Conv2d):
    """A frozen convolution that keeps no input. Made by `freeze_in_place`.

    peft makes an adapter's factors of the base layer's own class: one that was constructed, and not frozen,
    is the plain layer that it inherits from.
    """

    stored_as: Format | None = None
    stored_names: tuple[str, ...] = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """As the convolution it was: [B,I,h,w] -> [B,O,h',w'], in autocast's dtype or the input's."""
        if self.stored_as is None:
            return super().forward(input)
        dtype = _compute_dtype(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            input.to(dtype), bias, self.stored_as, geometry, *_stored(self)
        )
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return _apply_to_device_only(self, fn, recurse)


class FrozenLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in some format. Made by `freeze_in_place`."""

    stored_as: Format | None = None
    stored_names: tuple[str, ...] = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """As the layer it was: [..., I] -> [..., O], in autocast's dtype or the input's."""
        if self.stored_as is None:
            return super().forward(input)
        dtype = _compute_dtype(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(dtype), bias, self.stored_as, *_stored(self)
        )
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return _apply_to_device_only(self, fn, recurse)


FROZEN = (FrozenConv2d, FrozenLinear)


def can_freeze(layer: nn.Module) -> bool:
    """Whether a layer is a plain, frozen linear layer or 2-D convolution as `freeze_in_place` takes them."""
    if type(layer) is nn.Linear:
        return not layer.weight.requires_grad
    return (
        type(layer) is nn.Conv2d
        and not layer.weight.requires_grad
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def freeze_in_place(layer: nn.Module, stored_as: Format, stored: dict[str, Tensor]) -> None:
    """Turn a layer that `can_freeze` into its frozen kind: the object and its bias stay.

    Args:
        layer: changed in place.
        stored_as: what makes a weight of what is stored.
        stored: name -> tensor; "weight" becomes a parameter, the others buffers. Their order is that of
            `stored_as.unpack`.
    """
    frozen: Any = layer
    frozen.__class__ = FrozenConv2d if isinstance(layer, nn.Conv2d) else FrozenLinear
    frozen.stored_as, frozen.stored_names = stored_as, tuple(stored)
    for name, tensor in stored.items():
        if name != "weight":
            frozen.register_buffer(name, tensor, persistent=False)
        elif tensor is not frozen.weight:
            frozen.weight = nn.Parameter(tensor, requires_grad=False)


def keep_no_inputs(model: nn.Module) -> int:
    """Turn the frozen convolutions of a model into ones that keep no input; exact, and at no cost in time.

    Layers inside an adapted layer count too; those that train stay.

    Returns:
        How many were changed.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Conv2d and can_freeze(layer)]
    for layer in layers:
        freeze_in_place(layer, PLAIN, {"weight": layer.weight})
    return len(layers)


def is_in_few_bits(layer: Any) -> bool:
    """Whether a layer's weight is stored in another format than plain numbers."""
    return isinstance(layer, FrozenConv2d | FrozenLinear) and not isinstance(
        layer.stored_as, Plain | NoneType
    )


def stored_names(layer: Any) -> tuple[str, ...]:
    """Names of the tensors that make up a weight in few bits; none of any other layer."""
    return tuple(layer.stored_names) if is_in_few_bits(layer) else ()


def dequantised(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight that a frozen layer computes with, in `dtype`.

    Raises:
        TypeError: it is no frozen layer.
    """
    if not isinstance(layer, FrozenConv2d | FrozenLinear) or layer.stored_as is None:
        raise TypeError(f"{type(layer).__name__} is not a frozen layer")
    return layer.stored_as.unpack(_stored(layer), dtype)


class _Product(torch.autograd.Function):
    """x W^T + b, of which only the stored weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored_as: Format, *stored: Tensor) -> Tensor:
        ctx.stored_as, ctx.n_stored = stored_as, len(stored)
        ctx.save_for_backward(*stored)
        return linear(x, _unpack(stored_as, stored, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = _unpack(ctx.stored_as, ctx.saved_tensors, grad.dtype)
        return (grad @ weight, None, None, *(None for _ in range(ctx.n_stored)))


class _Convolution(torch.autograd.Function):
    """A convolution of which only the stored weight and the input's shape are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, stored_as: Format, geometry: Any, *stored: Tensor
    ) -> Tensor:
        ctx.stored_as, ctx.n_stored, ctx.geometry, ctx.shape = stored_as, len(stored), geometry, x.shape
        ctx.save_for_backward(*stored)
        return conv2d(x, _unpack(stored_as, stored, x.dtype), bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight = _unpack(ctx.stored_as, ctx.saved_tensors, grad.dtype)
        stride, padding, dilation, groups = ctx.geometry
        # As torch.nn.grad.conv2d_input: of the input only its shape is needed.
        x = grad.new_empty(1).expand(ctx.shape)
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, False, False)
        )
        return (found[0], None, None, None, *(None for _ in range(ctx.n_stored)))


def _unpack(stored_as: Format, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    with making(SCRATCH):
        return stored_as.unpack(stored, dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _stored(layer: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name) for name in layer.stored_names)


def _apply_to_device_only(layer: Any, fn: Any, recurse: bool) -> Any:
    """`Module.to` that moves what is stored and leaves its dtype: a scale cast to half is another weight."""
    if not is_in_few_bits(layer):
        return nn.Module._apply(layer, fn, recurse)  # type: ignore[no-untyped-call]

    def moved(tensor: Tensor) -> Tensor:
        result: Tensor = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    for name in layer.stored_names:
        tensor = getattr(layer, name)
        if name == "weight":
            layer.weight = nn.Parameter(moved(tensor.data), requires_grad=False)
        else:
            layer.register_buffer(name, moved(tensor), persistent=False)
    if layer.bias is not None:
        layer.bias.data = fn(layer.bias.data)
    return layer
