"""The images of an evaluation: each is drawn once, kept in a folder, and found there the next time.

A file's name ends in a digest of everything that decides the image (prompt, seed, base, adapter, sampler),
and the file tells the same in its text chunks. So another adapter, step count or prompt is another file,
and what a killed process left is either a whole image or nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image as Pillow

from lorabooth import durable
from lorabooth.evaluation.image_files import has_facts, save_image
from lorabooth.evaluation.scoring import Drawn
from lorabooth.progress import Reporter, Silent, Task, duration
from lorabooth.prompts import slug

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_DIGEST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Shot:
    """One image that is wanted.

    Attributes:
        prompt: what is drawn.
        seed: of its first noise.
        caption: what CLIP-T compares it with; None is the prompt.
    """

    prompt: str
    seed: int
    caption: str | None = None


@dataclass(frozen=True, slots=True)
class Sampler:
    """How images are drawn.

    Attributes:
        steps: of DPM-Solver++.
        guidance: classifier-free guidance scale.
        side_px: image side.
        batch_size: most images at once; does not tell images apart.
    """

    steps: int
    guidance: float
    side_px: int
    batch_size: int = 1

    def facts(self) -> dict[str, str]:
        """What of it decides an image."""
        return {
            "sampler": "dpm++",
            "steps": str(self.steps),
            "guidance": f"{self.guidance:g}",
            "size": f"{self.side_px}x{self.side_px}",
        }


def shots_of(prompts: Sequence[tuple[str, str | None]], seeds: Sequence[int]) -> tuple[Shot, ...]:
    """Every (prompt, caption) with every seed, prompt by prompt."""
    return tuple(Shot(prompt, seed, caption) for prompt, caption in prompts for seed in seeds)


def image_path(place: Path, shot: Shot, facts: Mapping[str, str]) -> Path:
    """Where the image of a shot is kept.

    Args:
        place: folder.
        shot: which.
        facts: everything else that decides it.
    """
    text = json.dumps(_all_facts(shot, facts), sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]
    return place / f"{slug(shot.prompt)}-seed{shot.seed}-{digest}.png"


def missing(shots: Sequence[Shot], place: Path, facts: Mapping[str, str]) -> list[Shot]:
    """Those whose images are not in the folder yet, each once."""
    found = []
    for shot in dict.fromkeys(shots):
        if not has_facts(image_path(place, shot, facts), _all_facts(shot, facts)):
            found.append(shot)
    return found


def drawn(
    pipeline: DiffusionPipeline | None,
    shots: Sequence[Shot],
    place: Path,
    *,
    steps: int,
    guidance: float,
    side_px: int,
    batch_size: int = 1,
    facts: Mapping[str, str],
    reporter: Reporter | None = None,
    on_image: Callable[[], None] | None = None,
) -> list[Drawn]:
    """The images of all shots: those in the folder are read, the others drawn and kept there.

    Args:
        pipeline: loaded, with the adapters on it that `facts` tell of; None where no image is missing.
        shots: what is wanted.
        place: folder of the images; made if need be.
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        side_px: image side.
        batch_size: most images at once.
        facts: what decides an image besides prompt, seed and sampler: the base, the adapter, its strength.
        reporter: hears of progress and warnings.
        on_image: called after each image that was drawn, instead of a bar for this call alone.

    Returns:
        One per shot, in their order.

    Raises:
        RecipeError, TrainingError: an image cannot be written.
        OutOfMemoryError, LoraboothError: see `generate`. What was drawn before stays.
    """
    how = Sampler(steps, guidance, side_px, batch_size)
    facts = {**facts, **how.facts()}
    todo = missing(shots, place, facts)
    if todo:
        if pipeline is None:
            raise ValueError(f"{len(todo)} images are missing, and there is no pipeline to draw them")
        with durable.user_errors(place):
            durable.make_folder(place)
            durable.sweep_temporaries(place)
        _draw(pipeline, todo, place, how, facts, reporter or Silent(), on_image)
    return [_read(shot, image_path(place, shot, facts)) for shot in shots]


def _draw(
    pipeline: DiffusionPipeline,
    todo: Sequence[Shot],
    place: Path,
    how: Sampler,
    facts: Mapping[str, str],
    reporter: Reporter,
    on_image: Callable[[], None] | None,
) -> None:
    from lorabooth.evaluation.generate import generate

    def keep(index: int, image: Image) -> None:
        shot = todo[index]
        save_image(image_path(place, shot, facts), image.convert("RGB"), _all_facts(shot, facts))
        if on_image is not None:
            on_image()

    generate(
        pipeline,
        [shot.prompt for shot in todo],
        [shot.seed for shot in todo],
        steps=how.steps,
        guidance=how.guidance,
        height_px=how.side_px,
        width_px=how.side_px,
        batch_size=how.batch_size,
        reporter=reporter if on_image is None else _OnlyWarnings(reporter),
        on_image=keep,
    )


def _all_facts(shot: Shot, facts: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": shot.prompt, "seed": str(shot.seed), **facts}


def _read(shot: Shot, path: Path) -> Drawn:
    with Pillow.open(path) as image:
        return Drawn(shot.prompt, shot.seed, image.convert("RGB"), shot.caption)


class _OnlyWarnings(Silent):
    """A reporter whose bars are somebody else's business."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def warn(self, message: str) -> None:
        """Hand on."""
        self._reporter.warn(message)


class Pace:
    """One bar over all images of an evaluation, and what they will cost as soon as the first are there.

    Args:
        count: images to draw.
        first: how many of them tell the speed: a batch.
        task: the bar.
        reporter: is told the estimate.
    """

    def __init__(self, count: int, first: int, task: Task, reporter: Reporter) -> None:
        self._count, self._first, self._task, self._reporter = count, first, task, reporter
        self._began_s = time.perf_counter()
        self._done = 0

    def __call__(self) -> None:
        """One more image is there."""
        self._done += 1
        self._task.advance()
        if self._done == self._first and self._done < self._count:
            each_s = (time.perf_counter() - self._began_s) / self._done
            others = self._count - self._done
            rest = duration(each_s * others)
            self._reporter.say(f"{each_s:.2f} s an image: about {rest} for the other {others}")

    @property
    def done(self) -> int:
        """Images drawn."""
        return self._done
