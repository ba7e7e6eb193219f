"""Values that travel between rooms. Frozen; tensor shapes are in the docstrings.

Legend of shape letters: B batch, C latent channels, h w latent height and width, H W pixels.
Importing this module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Cond: TypeAlias = "Mapping[str, Tensor]"
"""What a denoiser is told besides the noisy latents: named tensors, of one prompt or collated [B, ...]."""

Interval: TypeAlias = "tuple[float, float]"
"""Noise levels in (low, high]: sigma, noise over signal, sqrt((1 - alpha_bar) / alpha_bar)."""


class Role(StrEnum):
    """What an example is for: to learn the subject, or to keep the class (prior preservation)."""

    INSTANCE = "instance"
    CLASS = "class"


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its caption, before any pixel is read.

    Attributes:
        path: the image file.
        caption: the prompt it is trained under.
        role: INSTANCE for the subject's photos, CLASS for prior-preservation images.
        subject: name of the subject (its token and noun) that it belongs to.
    """

    path: Path
    caption: str
    role: Role
    subject: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """How pixels were cut from a photo, in pixels.

    Attributes:
        original_px: (height, width) of the photo after EXIF orientation.
        crop_px: (top, left) of the crop within the resized photo.
        target_px: (height, width) of the crop, as trained.
        flipped: mirrored left to right.
    """

    original_px: tuple[int, int]
    crop_px: tuple[int, int]
    target_px: tuple[int, int]
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Moments:
    """The VAE's posterior of one image, already scaled and shifted as the denoiser wants it.

    Attributes:
        mean: [C,h,w] float32.
        std: [C,h,w] float32, >= 0.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, slots=True)
class FixedNoise:
    """Noise and level of one example that comes from a fixed pool, on the CPU.

    Attributes:
        eps: [C,h,w] float32, standard normal.
        level: [] timestep or time, as the path samples it.
    """

    eps: Tensor
    level: Tensor


@dataclass(frozen=True, slots=True)
class PoolTuple:
    """One example of a fixed pool: what it is trained on, and what was computed for it before training.

    Attributes:
        latents: [C,h,w] float32, clean.
        noise: its noise and level.
        stored: "hollow" [C',h',w'], the frozen activation that enters a hollowed denoiser; "target" [C,h,w],
            what the frozen base predicts.
    """

    latents: Tensor
    noise: FixedNoise
    stored: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one latent shape that go through the denoiser together.

    Attributes:
        latents: [B,C,h,w] float32, clean.
        cond: collated conditioning, or tokens when the text encoder trains.
        geometry: B entries.
        weight: [B] float32, 1 for the subject's examples, lambda for class examples.
        is_instance: [B] bool.
        record_ids: B stable ids, for logs and diagnoses.
        positions: B positions of the examples within the optimizer step (0-based, over ranks and
            accumulation); noise and timesteps are functions of (seed, step, position).
        fixed: B entries: noise and timestep of an example from a fixed pool, None for others; or empty.
        taught: [B,C,h,w] stored predictions of the frozen base, zeros in the subject's rows; or None.
    """

    latents: Tensor
    cond: Cond
    geometry: tuple[Geometry, ...]
    weight: Tensor
    is_instance: Tensor
    record_ids: tuple[str, ...]
    positions: tuple[int, ...]
    fixed: tuple[FixedNoise | None, ...] = ()
    taught: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Noised:
    """A clean latent moved along a noise path.

    Attributes:
        x: [B,C,h,w] the noisy latents, input of the denoiser.
        target: [B,C,h,w] what the denoiser should predict, in the path's convention.
        level: [B] timesteps (int64) or times (float32), as the denoiser takes them.
        snr: [B] float32 signal-to-noise ratio at `level`.
    """

    x: Tensor
    target: Tensor
    level: Tensor
    snr: Tensor
