"""What a run draws with on the way: the base that trains, its VAE brought back, its own random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabooth.families.base import Family, Parts
from lorabooth.progress import Reporter
from lorabooth.training.studio import Studio

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Easel:
    """Draws images between the steps, and leaves no trace on them.

    Attributes:
        family: of the base.
        complete: gives the parts with a VAE (loaded anew if it has left memory).
        studio: what draws.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        side_px: image side.
        encoded: prompt -> text embedding, and "" for guidance; None while the text encoder is there.
        reporter: hears of progress.
        at_once: most images drawn together; None leaves it to the caller.
        in_turn: denoiser and VAE are on the device one at a time.
        whole: context in which the denoiser is whole; of a hollowed one the deep middle is loaded again.
    """

    family: Family
    complete: Callable[[], Parts]
    studio: Studio
    steps: int
    guidance: float
    side_px: int
    encoded: Mapping[str, Tensor] | None
    reporter: Reporter
    at_once: int | None = None
    in_turn: bool = False
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, at_once: int) -> list[Image]:
        """One image per (prompt, seed).

        Args:
            prompts: one per image.
            seeds: one per image.
            at_once: images drawn together, where the easel does not say.

        Raises:
            LoraboothError: they could not be drawn.
        """
        with self.whole():
            return self.studio.generate(
                self.family.pipeline(self.complete()),
                prompts,
                seeds,
                steps=self.steps,
                guidance=self.guidance,
                height_px=self.side_px,
                width_px=self.side_px,
                batch_size=at_once if self.at_once is None else min(self.at_once, len(prompts)),
                encoded=self.encoded,
                in_turn=self.in_turn,
                reporter=self.reporter,
            )
