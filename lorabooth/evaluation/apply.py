"""Adapters onto a pipeline that is there already, and off again without a trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lorabooth.adapters import inject
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from lorabooth.adapters.tree import attached_names
from lorabooth.errors import AdapterError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class AdapterHandle:
    """An adapter that sits on a pipeline.

    Attributes:
        name: under which it is attached.
        metadata: what the file says: family, base, rank, trigger words.
        notes: what had to be assumed while reading it.
        n_modules: how many modules it adapts.
    """

    name: str
    metadata: Metadata
    notes: tuple[str, ...]
    n_modules: int
    _components: Mapping[str, nn.Module]

    def set_strength(self, strength: float) -> None:
        """Scale its effect: 0 is off, 1 as trained; other numbers, negative ones too, are allowed.

        Raises:
            AdapterError: it was removed.
        """
        inject.set_strength(self._components, self.name, strength)

    def remove(self) -> None:
        """Take it off; modules and weights are bit for bit as they were before it came.

        Raises:
            AdapterError: it was removed already.
        """
        inject.detach(self._components, self.name)


def load_adapter(
    pipeline: DiffusionPipeline, file: Path | str, strength: float = 1.0, name: str | None = None
) -> AdapterHandle:
    """Put an adapter file on a pipeline; several may sit on it at once, and their effects add up.

    Args:
        pipeline: of the family that the adapter was made for. It is changed in place.
        file: .safetensors in kohya's, diffusers' or PEFT's layout, or a folder saved by PEFT.
        strength: factor on its effect, 1 is as trained.
        name: to tell adapters apart; None takes the file's name.

    Returns:
        A handle to change its strength or to remove it.

    Raises:
        AdapterError: the file is broken or does not fit the pipeline, or the name is taken.
    """
    return attach_file(components_of(pipeline), Path(file), strength, name)


def attach_file(
    components: Mapping[str, nn.Module], path: Path, strength: float, name: str | None = None
) -> AdapterHandle:
    """As `load_adapter`, on components by canonical name."""
    stored = open_adapter(path)
    unique = name or _free_name(path, attached_names(components))
    attached = inject.attach_tensors(components, stored.tensors(), strength=strength, name=unique)
    return AdapterHandle(unique, stored.metadata, stored.notes, attached.n_modules, components)


def components_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's modules that an adapter can sit on, by canonical name.

    Raises:
        AdapterError: it has neither a UNet nor a transformer.
    """
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if denoiser is None:
        raise AdapterError(f"{type(pipeline).__name__} has no UNet or transformer to put an adapter on.")
    encoders = {name: getattr(pipeline, name, None) for name in _TEXT_ENCODERS}
    return {"denoiser": denoiser, **{name: module for name, module in encoders.items() if module is not None}}


def _free_name(path: Path, taken: tuple[str, ...]) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "adapter"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
