"""Walking a live module tree: which layers can be adapted, which are, under which canonical names.

An adapted layer is known by its parts (`lora_A`, `get_base_layer`), so this needs no peft.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from lorabooth.adapters import names
from lorabooth.errors import AdapterError

Components: TypeAlias = Mapping[str, nn.Module]
"""Canonical component name ("denoiser", "text_encoder", ...) -> loaded module."""


def walk(model: nn.Module, component: str) -> Iterator[tuple[str, str, Any]]:
    """(path in the tree, canonical path, module) of every module, adapters' own parts left out."""
    inside: str | None = None
    for path, module in model.named_modules():
        if not path or (inside and path.startswith(inside)):
            continue
        if is_adapted(module):
            inside = f"{path}."
        yield path, names.canonical_path(component, path), module


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a low-rank layer around a base layer."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def adaptable(model: nn.Module, component: str) -> dict[str, nn.Module]:
    """Canonical path -> linear or 2-D convolution layer of the base, adapted already or not."""
    bases = {
        canonical: module.get_base_layer() if is_adapted(module) else module
        for _, canonical, module in walk(model, component)
    }
    return {path: base for path, base in bases.items() if isinstance(base, nn.Linear | nn.Conv2d)}


def adapted(model: nn.Module, component: str, name: str | None = None) -> dict[str, Any]:
    """Canonical path -> low-rank layer, of all or those that carry the adapter `name`."""
    return {
        canonical: module
        for _, canonical, module in walk(model, component)
        if is_adapted(module) and (name is None or name in module.lora_A)
    }


def carrying(components: Components, name: str) -> dict[str, Any]:
    """Canonical module name -> layer that carries the adapter `name`.

    Raises:
        AdapterError: none does.
    """
    found = {
        f"{component}.{path}": layer
        for component, model in components.items()
        for path, layer in adapted(model, component, name).items()
    }
    if not found:
        others = ", ".join(attached_names(components)) or "none"
        raise AdapterError(f"No adapter {name!r} is attached (attached: {others}).")
    return found


def attached_names(components: Components) -> tuple[str, ...]:
    """Names of all attached adapters, in the order in which the modules carry them."""
    return tuple(
        dict.fromkeys(
            name
            for component, model in components.items()
            for layer in adapted(model, component).values()
            for name in layer.lora_A
        )
    )


def fitted(base: nn.Module, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors in the shapes that a base layer needs, or None if they do not fit it.

    A linear layer and a 1x1 convolution are the same matrix, and files hold either for the other (kohya's of
    SD2, for instance); between these two the factors are viewed anew.
    """
    if isinstance(base, nn.Linear) and down.dim() == 4 and down.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)
    elif isinstance(base, nn.Conv2d) and down.dim() == 2 and base.kernel_size == (1, 1):
        down, up = down[:, :, None, None], up[:, :, None, None]
    if isinstance(base, nn.Conv2d):
        inner: tuple[int, ...] = (base.in_channels // base.groups, *base.kernel_size)
        outer: tuple[int, ...] = (base.out_channels, down.shape[0], 1, 1)
    elif isinstance(base, nn.Linear):
        inner, outer = (base.in_features,), (base.out_features, down.shape[0])
    else:
        return None
    return (down, up) if tuple(down.shape[1:]) == inner and tuple(up.shape) == outer else None


def gradients(layer: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Each parameter of a layer with its `requires_grad`, for `restore_gradients`."""
    return [(parameter, parameter.requires_grad) for parameter in layer.parameters()]


def restore_gradients(recorded: Sequence[tuple[nn.Parameter, bool]]) -> None:
    """Set `requires_grad` as it was recorded."""
    for parameter, wanted in recorded:
        parameter.requires_grad_(wanted)


def any_of(paths: Iterable[str]) -> str:
    """A regular expression that matches exactly these names."""
    return "(?:" + "|".join(re.escape(path) for path in paths) + ")"


def examples(listed: Collection[str], limit: int = 5) -> str:
    """The first few of a list, for a message."""
    shown = ", ".join(list(listed)[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown or "none"
