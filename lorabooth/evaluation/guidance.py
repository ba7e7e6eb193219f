"""Classifier-free guidance (arXiv 2207.12598), in an interval of noise levels if wanted (arXiv 2404.07724).

Guidance takes a second pass of the denoiser in every step. At high noise it costs variety too, pulling all
images of a prompt towards each other, and at low noise it does next to nothing: images were found better with
it in the middle alone, for fewer passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabooth.types import Interval

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_UNGUIDED = 1.0
"""The scale at which the denoiser is asked for the prompt alone."""


def noise_levels(scheduler: SchedulerMixin, steps: int) -> list[float]:
    """Sigma at each step of a discrete diffusion's sampler; infinite where no signal is left.

    Args:
        scheduler: with the noise schedule of the base; its timesteps are set.
        steps: sampler steps.
    """
    scheduler.set_timesteps(steps)
    kept = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
    return [math.sqrt((1 - share) / share) if share > 0 else math.inf for share in kept]


def guided_steps(
    scheduler: SchedulerMixin, steps: int, scale: float, interval: Interval | None = None
) -> list[bool]:
    """Whether guidance acts, step by step of a sampler.

    Args:
        scheduler: with the noise schedule of the base; its timesteps are set where an interval is given.
        steps: sampler steps.
        scale: of guidance; <= 1 is without.
        interval: the noise levels at which it acts; None is all of them.
    """
    if interval is None or scale <= 1:
        return [scale > 1] * steps
    low, high = interval
    return [low < sigma <= high for sigma in noise_levels(scheduler, steps)]


class GuidedCall:
    """What a pipeline is called with so that guidance acts in some of its steps.

    Args:
        scale: of guidance where it acts.
        acts: whether it does, step by step.
        positive: the prompts' embeddings [B,tokens,width].
        negative: those of what is guided away from, likewise; None where it never acts.
    """

    def __init__(self, scale: float, acts: list[bool], positive: Tensor, negative: Tensor | None) -> None:
        self._scale, self._acts = scale, acts
        self._positive, self._negative = positive, negative

    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        found: dict[str, Any] = {"guidance_scale": self._at(0), "prompt_embeds": self._positive}
        if self._acts[0]:
            found["negative_prompt_embeds"] = self._negative
        if len(set(self._acts)) > 1:
            found["callback_on_step_end"] = self._after
            found["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
        return found

    def _at(self, step: int) -> float:
        return self._scale if self._acts[step] else _UNGUIDED

    def _after(
        self, pipeline: DiffusionPipeline, step: int, _timestep: object, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Turn guidance on or off for the step that comes, as diffusers' guide to its callbacks does."""
        if step + 1 == len(self._acts) or self._acts[step] == self._acts[step + 1]:
            return tensors
        pipeline._guidance_scale = self._at(step + 1)
        if not self._acts[step + 1] or self._negative is None:
            return {**tensors, "prompt_embeds": self._positive}
        return {**tensors, "prompt_embeds": torch.cat([self._negative, self._positive])}
