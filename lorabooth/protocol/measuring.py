"""Which images a subject is measured by, and the measuring of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.evaluation.backbones import Backbones
from lorabooth.evaluation.scoring import Drawn, real_row, score
from lorabooth.prompts import class_prompt
from lorabooth.protocol.drawing import Sampler, Shot, drawn, image_path, missing, shots_of
from lorabooth.protocol.prompts import EvaluationPrompts, filled
from lorabooth.protocol.results import Pictures, SubjectEvaluation

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from lorabooth.progress import Reporter

CLASS_IMAGES = 16
"""Images of the class that PRES is the mean of."""
UNRELATED_IMAGES = 2
"""Images per unrelated prompt that drift is the mean of."""


@dataclass(frozen=True)
class Counts:
    """How many images; their seeds are 0, 1, 2, ...

    Attributes:
        subject: per prompt of the subject.
        classes: per class prompt.
        unrelated: per unrelated prompt.
    """

    subject: int = 4
    classes: int = CLASS_IMAGES
    unrelated: int = UNRELATED_IMAGES


@dataclass(frozen=True)
class Album:
    """The shots of one subject, which are the same with the adapter on and off.

    Attributes:
        name: "qzx mug".
        prompts: (prompt, caption) of the subject.
        subject: shots of these.
        classes: shots of the class.
        unrelated: shots of other things.
    """

    name: str
    prompts: tuple[tuple[str, str], ...]
    subject: tuple[Shot, ...]
    classes: tuple[Shot, ...]
    unrelated: tuple[Shot, ...]

    @property
    def shots(self) -> tuple[Shot, ...]:
        """All of them, each once, in the order of drawing."""
        return tuple(dict.fromkeys((*self.subject, *self.classes, *self.unrelated)))

    def measured_by(self, backbones: Backbones) -> Album:
        """Without the shots whose metric cannot be measured: nothing is drawn in vain."""
        return replace(
            self,
            classes=self.classes if backbones.subject is not None else (),
            unrelated=self.unrelated if backbones.distance is not None else (),
        )

    @classmethod
    def of(cls, token: str, noun: str, prompts: EvaluationPrompts, counts: Counts) -> Album:
        """The shots of a subject.

        Args:
            token: its identifier.
            noun: its class.
            prompts: templates.
            counts: images per prompt.
        """
        pairs = tuple(filled(template, token, noun) for template in prompts.subject)
        classes = [(class_prompt(template, noun), None) for template in prompts.classes]
        others = [(prompt, None) for prompt in prompts.unrelated]
        return cls(
            name=f"{token} {noun}",
            prompts=pairs,
            subject=shots_of(pairs, range(counts.subject)),
            classes=shots_of(classes, range(counts.classes)),
            unrelated=shots_of(others, range(counts.unrelated)),
        )


@dataclass(frozen=True)
class Side:
    """Where images with the adapter on, or off, are kept, and what decides them.

    Attributes:
        place: their folder.
        facts: base, adapter and strength.
        sampler: how they are drawn.
    """

    place: Path
    facts: Mapping[str, str]
    sampler: Sampler

    def missing(self, shots: Sequence[Shot]) -> list[Shot]:
        """Those that are still to be drawn."""
        return missing(shots, self.place, {**self.facts, **self.sampler.facts()})

    def path(self, shot: Shot) -> Path:
        """The file of a shot's image."""
        return image_path(self.place, shot, {**self.facts, **self.sampler.facts()})

    def drawn(
        self,
        pipeline: DiffusionPipeline | None,
        shots: Sequence[Shot],
        *,
        reporter: Reporter | None = None,
        on_image: Callable[[], None] | None = None,
    ) -> list[Drawn]:
        """The images of shots; `pipeline` may be None where none is missing. See `drawing.drawn`."""
        how = self.sampler
        return drawn(
            pipeline,
            shots,
            self.place,
            steps=how.steps,
            guidance=how.guidance,
            side_px=how.side_px,
            batch_size=how.batch_size,
            facts=self.facts,
            reporter=reporter,
            on_image=on_image,
        )


def measure(
    album: Album,
    on: Side,
    off: Side,
    photos: Sequence[Image],
    backbones: Backbones,
    *,
    home: Path,
    photos_digest: str = "",
) -> SubjectEvaluation:
    """Measure a subject by images that are all drawn.

    Args:
        album: which images.
        on: those with the adapter.
        off: those of the base.
        photos: of the subject.
        backbones: what measures; metrics without one are None.
        home: folder that the results' file names are relative to.
        photos_digest: goes into the results.
    """
    sides = {}
    before = off.drawn(None, album.unrelated)
    for name, side in (("adapter", on), ("without", off)):
        sides[name] = score(
            backbones,
            photos=photos,
            images=side.drawn(None, album.subject),
            class_images=side.drawn(None, album.classes),
            # The base against itself would be a column of zeros.
            unrelated=side.drawn(None, album.unrelated) if side is on else (),
            unrelated_before=before,
        )
    return SubjectEvaluation(
        subject=album.name,
        adapter=sides["adapter"],
        without=sides["without"],
        real=real_row(backbones, photos),
        prompts=album.prompts,
        class_prompts=tuple(dict.fromkeys(shot.prompt for shot in album.classes)),
        unrelated=tuple(dict.fromkeys(shot.prompt for shot in album.unrelated)),
        photos=photos_digest,
        pictures=tuple(
            Pictures(kind, shot.prompt, shot.seed, _name(on.path(shot), home), _name(off.path(shot), home))
            for kind, shots in (
                ("subject", album.subject),
                ("class", album.classes),
                ("unrelated", album.unrelated),
            )
            for shot in shots
        ),
    )


def _name(path: Path, home: Path) -> str:
    """A path as seen from a folder, so that both can be moved together; with "/" on every system."""
    return Path(os.path.relpath(path, home)).as_posix()
