"""The forward pass of adapted layers with peft's mathematics and less around it.

peft's own forward casts the whole input to the factors' dtype, calls a dropout module that does nothing, and
scales and adds the low-rank output in two passes over the layer's output. Here the scale goes to the small
inner tensor (and is left out where it is 1), the sum is part of the matrix product, and layers that read one
input (q, k and v of an attention) share one product with their lora_A side by side. What is saved, switched
and scaled stays peft's: only the class of the layers is replaced by a subclass with another `forward`.
Quantised layers are other classes, and keep peft's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional

_SELF_ATTENTION = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
_CROSS_ATTENTION = (("to_k", "to_v"),)


class Siblings:
    """The lora_A of layers that are called one after the other with one and the same tensor.

    The first one called computes the inner tensors of all. An input is known by being the same object;
    whoever comes with another one computes its own, so a wrong guess about the model costs time only.

    Args:
        weights: [r_i, in] of each layer, in the order of the calls.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = tuple(weights)
        self._ranks = [weight.shape[0] for weight in weights]
        self._x: Tensor | None = None
        self._inner: tuple[Tensor, ...] = ()

    def down(self, place: int, x: Tensor) -> Tensor:
        """The input [..., in] through the lora_A of layer `place` -> [..., r].

        Nothing is held any longer than until the last layer was called.
        """
        if place == 0:
            joint = torch.cat(self.weights)
            inner = torch.split(functional.linear(_as_computed(x, joint), joint), self._ranks, dim=-1)
            self._x, self._inner = x, inner
            return inner[0]
        if self._x is not x:
            return functional.linear(_as_computed(x, self.weights[place]), self.weights[place])
        part = self._inner[place]
        if place == len(self.weights) - 1:
            self._x, self._inner = None, ()
        return part


class LeanLinear(Linear):  # type: ignore[misc]
    """peft's adapted linear layer with a forward pass that does no needless work."""

    siblings: dict[str, tuple[int, Siblings]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base(x) + sum of scaling * lora_B(lora_A(x))` over the active adapters, in the base's dtype."""
        if args or kwargs or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: Tensor = self.base_layer(x)
        result = base
        for name in _active(self):
            result = _add_product(result, self._inner(x, name), self.lora_B[name].weight)
        return result.to(base.dtype)

    def _inner(self, x: Tensor, name: str) -> Tensor:
        """[..., r], scaled."""
        weight, dropout = self.lora_A[name].weight, self.lora_dropout[name]
        place, siblings = self.siblings.get(name, (0, None))
        if siblings is not None and siblings.weights[place] is weight:
            inner = siblings.down(place, x)
        else:
            x = _as_computed(x, weight)
            inner = functional.linear(x if isinstance(dropout, nn.Identity) else dropout(x), weight)
        scaling = self.scaling[name]
        return inner if scaling == 1 else inner * scaling

    def delete_adapter(self, adapter_name: str) -> None:
        """As peft's; the siblings' factors go as well."""
        super().delete_adapter(adapter_name)
        self.siblings.pop(adapter_name, None)


class LeanConv2d(Conv2d):  # type: ignore[misc]
    """peft's adapted convolution, likewise."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`base(x) + sum of scaling * lora_B(lora_A(x))` over the active adapters, in the base's dtype."""
        if args or kwargs or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base: Tensor = self.base_layer(x)
        result = base
        for name in _active(self):
            dropout, scaling = self.lora_dropout[name], self.scaling[name]
            x = _as_computed(x, self.lora_A[name].weight)
            inner = self.lora_A[name](x if isinstance(dropout, nn.Identity) else dropout(x))
            result = result + self.lora_B[name](inner if scaling == 1 else inner * scaling)
        return result.to(base.dtype)


def make_lean(model: nn.Module, name: str) -> None:
    """Give the adapted layers of a model the lean forward pass; those that have it keep it.

    Args:
        model: carries the adapter.
        name: of the adapter, whose siblings are found.
    """
    layer: Any
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = LeanLinear
            layer.siblings = {}
        elif type(layer) is Conv2d:
            layer.__class__ = LeanConv2d
    for parent in model.modules():
        for layers in _families(parent, name):
            siblings = Siblings([layer.lora_A[name].weight for layer in layers])
            for place, layer in enumerate(layers):
                layer.siblings[name] = (place, siblings)


def _families(parent: nn.Module, name: str) -> Iterator[list[Any]]:
    """Groups of children that read one tensor: q, k, v of self-attention; k and v of cross-attention."""
    is_cross = bool(getattr(parent, "is_cross_attention", False))
    for names in _CROSS_ATTENTION if is_cross else _SELF_ATTENTION:
        layers = [getattr(parent, child, None) for child in names]
        if all(_shares(layer, name) for layer in layers) and len({x.in_features for x in layers}) == 1:  # type: ignore[union-attr]
            yield layers


def _shares(layer: nn.Module | None, name: str) -> bool:
    """Dropout is drawn for each layer anew: with it there is nothing to share."""
    return (
        isinstance(layer, LeanLinear)
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


def _active(layer: Any) -> list[str]:
    """Names of the adapters that take part in a layer's output."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _as_computed(x: Tensor, weight: Tensor) -> Tensor:
    """The input in the dtype that the product takes; autocast casts it there by itself, to half."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def _add_product(result: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """Result [..., out] + inner [..., r] up^T [r, out]; one kernel if their dtypes agree."""
    if result.dtype != inner.dtype:
        return result + functional.linear(inner, up)
    flat = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t())
    return flat.view(result.shape)
