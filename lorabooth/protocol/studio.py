"""The base of an evaluated run: found at once, loaded when the first image is to be drawn."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorabooth.data.images import square_for
from lorabooth.errors import InterruptedRunError, RecipeError
from lorabooth.evaluation.apply import attach_file
from lorabooth.families import registry, source
from lorabooth.families.base import Family, Parts, Source
from lorabooth.progress import Reporter
from lorabooth.protocol.drawing import Pace, Sampler, Shot
from lorabooth.protocol.measuring import Side
from lorabooth.protocol.opened import OpenRun
from lorabooth.training.class_images import group_of
from lorabooth.training.resolve import sample_steps


class Studio:
    """The base of a run, loaded when the first image is to be drawn.

    Args:
        opened: the run.
        found: its base.
        sampler: how images are drawn.
        device: where.
        dtype: of the frozen weights.
        strength: of the adapter.
        reporter: hears of cost and progress.
    """

    def __init__(
        self,
        opened: OpenRun,
        found: Source,
        sampler: Sampler,
        device: torch.device,
        dtype: torch.dtype,
        strength: float,
        reporter: Reporter,
    ) -> None:
        self.source = found
        self.sampler = sampler
        self._opened, self._strength, self._reporter = opened, strength, reporter
        self._device, self._dtype = device, dtype
        self._family: Family = registry.family(found.family)

    @classmethod
    def of(
        cls,
        opened: OpenRun,
        device: torch.device,
        dtype: torch.dtype,
        *,
        strength: float,
        steps: int | None,
        reporter: Reporter,
    ) -> Studio:
        """Find the base; its weights are not loaded yet.

        Raises:
            BaseModelError: it is absent or broken.
            RecipeError: the strength or the steps make no sense.
        """
        recipe = opened.recipe
        if steps is not None and steps < 1:
            raise RecipeError(f"{steps} sampler steps draw nothing.", "Give 1 or more.")
        model = recipe.model
        found = source.resolve(model.base, revision=model.revision, family=model.family, reporter=reporter)
        found = replace(found, sha256=source.weights_digest(found))
        defaults = registry.family(found.family).defaults_for(found)
        guidance, resolution = recipe.run.sample_guidance, recipe.images.resolution
        sampler = Sampler(
            steps=steps or sample_steps(recipe, defaults)[0],
            guidance=defaults.guidance if guidance == "auto" else guidance,
            side_px=square_for(defaults.resolution_px if resolution == "auto" else resolution, 8)[0],
            batch_size=group_of(recipe, device.type),
        )
        return cls(opened, found, sampler, device, dtype, strength, reporter)

    def side(self, place: Path, *, on: bool) -> Side:
        """The images with the adapter on or off."""
        facts = {
            "base": f"{self.source.base_id}/{self.source.sha256[:16]}",
            "adapter": self._opened.adapter if on else "",
            "strength": f"{self._strength:g}" if on else "",
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        return Side(place, facts, self.sampler)

    def draw(self, shots: Sequence[Shot], on: Side, off: Side, *, again: Path) -> None:
        """Draw what is missing, the base's own images first.

        Raises:
            InterruptedRunError: Ctrl-C; what is drawn is kept.
            BaseModelError, AdapterError, OutOfMemoryError, LoraboothError: see there.
        """
        todo = len(off.missing(shots)) + len(on.missing(shots))
        whole = 2 * len(dict.fromkeys(shots))
        if not todo:
            self._reporter.say(f"all {whole} images are there already")
            return
        kept = f"; {whole - todo} of {whole} are there already" if todo < whole else ""
        how = self.sampler
        each = f"{how.steps} step{'s' * (how.steps != 1)} each"
        self._reporter.say(f"{todo} images of {how.side_px} px to draw, {each}, on {self._device}{kept}")
        pace: Pace | None = None
        try:
            parts = self._load()
            with self._reporter.task("Drawing", whole, unit="image", start=whole - todo) as task:
                pace = Pace(todo, how.batch_size, task, self._reporter)
                self._draw_sides(parts, shots, on, off, pace)
        except KeyboardInterrupt:
            done = 0 if pace is None else pace.done
            raise InterruptedRunError(
                f"interrupted; {whole - todo + done} of {whole} images are drawn and kept.",
                f"The same command goes on from there: lorabooth evaluate {again}",
            ) from None

    def _load(self) -> Parts:
        parts = self._family.load(self.source, self._dtype)
        for module in (*parts.components().values(), parts.vae):
            if module is not None:
                module.to(self._device)
        return parts

    def _draw_sides(self, parts: Parts, shots: Sequence[Shot], on: Side, off: Side, pace: Pace) -> None:
        pipeline = self._family.pipeline(parts)
        distinct = tuple(dict.fromkeys(shots))
        off.drawn(pipeline, distinct, reporter=self._reporter, on_image=pace)
        attach_file(parts.components(), self._opened.folder.adapter, self._strength)
        on.drawn(pipeline, distinct, reporter=self._reporter, on_image=pace)
        # The metrics' networks come next, and they have a right to the memory.
        del pipeline
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def notes(self) -> tuple[str, ...]:
        """What is not as it was when the run was trained."""
        trained = self._opened.facts.get("base", {}).get("sha256", "")
        if trained and trained != self.source.sha256:
            return ("the base is another one than the run was trained on: its weights differ",)
        return ()

    def facts(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            "base_sha256": self.source.sha256,
            "adapter": self._opened.adapter,
            "adapter_steps": self._opened.metadata.steps,
            "strength": self._strength,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
        }
