"""What training borrows from evaluation, given to it from above: drawing images, laying them out, judging."""

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
    from lorabooth.recipe import Recipe
    from lorabooth.types import Interval


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
        guidance_interval: Interval | None = None,
        height_px: int | None = None,
        width_px: int | None = None,
        batch_size: int = 1,
        encoded: Mapping[str, Tensor] | None = None,
        in_turn: bool = False,
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


@dataclass(frozen=True, slots=True)
class Shot:
    """One image of the small evaluation.

    Attributes:
        prompt: what is drawn.
        seed: of its first noise.
        caption: what the image is held against: the prompt without the identifier.
    """

    prompt: str
    seed: int
    caption: str


@dataclass(frozen=True, slots=True)
class Marks:
    """What the images of one subject are given; None for what nobody can measure here.

    Attributes:
        dino: subject fidelity: mean cosine of images and photos.
        clip_t: prompt fidelity: mean cosine of images and captions.
    """

    dino: float | None
    clip_t: float | None


@dataclass(frozen=True)
class Referee:
    """Measures images; holds the metrics' backbones, off the training device.

    Attributes:
        names: "dino" and "clip" -> the backbone's name.
        marks: (a subject's photos, its shots, their images in the same order) -> marks.
    """

    names: Mapping[str, str]
    marks: Callable[[Sequence[Image], Sequence[Shot], Sequence[Image]], Marks]


@dataclass(frozen=True)
class Studio:
    """The callables.

    Attributes:
        generate: draws images.
        draw_grid: lays them out.
        file_name: (prompt, seed, index) -> name of an image file.
        referee: opens what measures checkpoints; raises a LoraboothError that says what is missing. None
            where nobody can be asked: then a recipe has to say run.select = "last".
    """

    generate: GenerateImages
    draw_grid: DrawGrid
    file_name: Callable[[str, int, int], str]
    referee: Callable[[Recipe], Referee] | None = None
