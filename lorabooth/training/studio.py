"""What training borrows from evaluation, given to it from above: drawing images and laying them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from lorabooth.progress import Reporter


class GenerateImages(Protocol):
    """Draws one image per (prompt, seed); leaves no trace on the pipeline or on any random state."""

    def __call__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        height_px: int | None = None,
        width_px: int | None = None,
        batch_size: int = 1,
        encoded: Mapping[str, Tensor] | None = None,
        reporter: Reporter | None = None,
        on_latent: Callable[[int, Tensor], None] | None = None,
        on_smaller: Callable[[int], None] | None = None,
    ) -> list[Image]:
        """See evaluation/generate.py."""
        ...


class DrawGrid(Protocol):
    """Lays images out with labels."""

    def __call__(
        self,
        images: Sequence[Sequence[Image | None]],
        *,
        row_labels: Sequence[str] = (),
        column_labels: Sequence[str] = (),
        title: str = "",
        subtitle: str = "",
    ) -> Image:
        """See evaluation/grids.py."""
        ...


@dataclass(frozen=True)
class Studio:
    """The callables.

    Attributes:
        generate: draws images.
        draw_grid: lays them out.
        file_name: (prompt, seed, index) -> name of an image file.
    """

    generate: GenerateImages
    draw_grid: DrawGrid
    file_name: Callable[[str, int, int], str]
