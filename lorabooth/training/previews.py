"""Sample images of a run, drawn with random numbers of their own, so that they cannot change it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorabooth import durable
from lorabooth.errors import LoraboothError
from lorabooth.training.easel import Easel
from lorabooth.training.folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Previews:
    """Draws the run's sample prompts when asked.

    Attributes:
        easel: what draws.
        prompts: rows of the grid.
        seeds: its columns.
        folder: where they are written.
        adapter_off: context with the adapter switched off.
    """

    easel: Easel
    prompts: Sequence[str]
    seeds: Sequence[int]
    folder: RunFolder
    adapter_off: Callable[[], AbstractContextManager[Any]]

    @property
    def side_px(self) -> int:
        """Of an image."""
        return self.easel.side_px

    def draw(self, step: int, *, adapter: bool = True) -> Path | None:
        """Draw all prompts with all seeds into samples/step-NNNNNN, with a grid.

        Args:
            step: finished steps; names the folder ("before" when the adapter is off).
            adapter: on or off.

        Returns:
            The grid, or None if drawing failed: a failure is told, and the run goes on.
        """
        place = self.folder.step_samples(step) if adapter else self.folder.samples / "before"
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        try:
            with nullcontext() if adapter else self.adapter_off():
                images = self.easel.draw(
                    [prompt for prompt, _ in pairs], [seed for _, seed in pairs], at_once=len(self.seeds)
                )
            return self._save(place, pairs, images, "before training" if not adapter else f"step {step}")
        except (LoraboothError, OSError) as error:
            self.easel.reporter.warn(
                f"the samples of step {step} could not be drawn; training goes on. {error}"
            )
            return None

    def _save(
        self, place: Path, pairs: Sequence[tuple[str, int]], images: Sequence[Image], title: str
    ) -> Path:
        durable.make_folder(place)
        for index, ((prompt, seed), image) in enumerate(zip(pairs, images, strict=True)):
            facts = {"prompt": prompt, "seed": str(seed)}
            durable.replace(place / self.easel.studio.file_name(prompt, seed, index), png(image, facts))
        columns = len(self.seeds)
        rows = [images[first : first + columns] for first in range(0, len(images), columns)]
        grid = self.easel.studio.draw_grid(
            rows,
            row_labels=list(self.prompts),
            column_labels=[f"seed {seed}" for seed in self.seeds],
            title=title,
        )
        durable.replace(place / "grid.png", png(grid))
        return place / "grid.png"


def png(image: Image, facts: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """An image as PNG bytes, with facts as text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
