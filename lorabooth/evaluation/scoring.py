"""All metrics of one set of drawn images, from a set of backbones: the numbers of one row of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lorabooth.evaluation.metrics import (
    Measured,
    measured,
    prompt_similarity,
    similarity_among,
    similarity_to,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorabooth.evaluation.backbones import Backbones


@dataclass(frozen=True)
class Drawn:
    """One drawn image, and what it was drawn from.

    Attributes:
        prompt: the whole prompt, as the pipeline had it.
        seed: of its noise.
        image: RGB.
        caption: what CLIP-T compares it with: the prompt without the rare token, which means nothing to CLIP.
            None: the prompt.
    """

    prompt: str
    seed: int
    image: Image
    caption: str | None = None


@dataclass(frozen=True)
class Scores:
    """One row: each metric, or None where it was not measured (no backbone, or no images for it).

    Attributes:
        dino: subject fidelity: images of the subject against its photos; per image, grouped by prompt.
        clip_i: the same with CLIP.
        clip_t: prompt fidelity: each image against its caption.
        pres: class images against the subject's photos; lower is better: the class is still itself.
        div: the mean distance between images of one prompt; one value per prompt; higher is better.
        drift: how far the base's own images of unrelated prompts moved, seed by seed; lower is better.
    """

    dino: Measured | None = None
    clip_i: Measured | None = None
    clip_t: Measured | None = None
    pres: Measured | None = None
    div: Measured | None = None
    drift: Measured | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written; None for what was not measured."""
        return {name: None if one is None else one.to_json() for name, one in self.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Scores:
        """What `to_json` wrote; metrics that are not there are None.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        found = {field.name: raw.get(field.name) for field in fields(cls)}
        return cls(**{name: None if one is None else Measured.from_json(one) for name, one in found.items()})

    def items(self) -> Iterator[tuple[str, Measured | None]]:
        """(name, metric) in the order of a table's columns."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


def score(
    backbones: Backbones,
    *,
    photos: Sequence[Image],
    images: Sequence[Drawn],
    class_images: Sequence[Drawn] = (),
    unrelated: Sequence[Drawn] = (),
    unrelated_before: Sequence[Drawn] = (),
    seed: int = 0,
) -> Scores:
    """Measure one set of images.

    Args:
        backbones: see `open_backbones`; what is missing leaves its metrics out.
        photos: the subject's real photos.
        images: drawn with the subject's prompts.
        class_images: drawn with class prompts ("a photo of a dog"), for PRES.
        unrelated: drawn with prompts that have nothing to do with the subject, for drift.
        unrelated_before: the base's own of the same prompts and seeds; what has no partner is left out.
        seed: of the bootstrap.

    Returns:
        The row. Each list of images is embedded once per backbone.
    """
    prompts = [shot.prompt for shot in images]
    dino = clip_i = clip_t = pres = None
    if backbones.subject is not None and photos:
        real = backbones.subject(photos)
        if images:
            dino = measured(similarity_to(backbones.subject(_pixels(images)), real), prompts, seed=seed)
        if class_images:
            groups = [shot.prompt for shot in class_images]
            pres = measured(similarity_to(backbones.subject(_pixels(class_images)), real), groups, seed=seed)
    if backbones.clip is not None and images:
        drawn = backbones.clip.images(_pixels(images))
        clip_t = measured(prompt_similarity(drawn, _texts(backbones, images)), prompts, seed=seed)
        if photos:
            clip_i = measured(similarity_to(drawn, backbones.clip.images(photos)), prompts, seed=seed)
    return Scores(
        dino=dino,
        clip_i=clip_i,
        clip_t=clip_t,
        pres=pres,
        div=_diversity(backbones, images, seed),
        drift=_drift(backbones, unrelated, unrelated_before, seed),
    )


def real_row(backbones: Backbones, photos: Sequence[Image], *, seed: int = 0) -> Scores:
    """The real-image row: DINO and CLIP-I of the photos with one another, pairs of different photos.

    What a perfect generator could reach; None with fewer than two photos.
    """
    if len(photos) < 2:
        return Scores()
    dino = clip_i = None
    if backbones.subject is not None:
        dino = measured(similarity_among(backbones.subject(photos)), seed=seed)
    if backbones.clip is not None:
        clip_i = measured(similarity_among(backbones.clip.images(photos)), seed=seed)
    return Scores(dino=dino, clip_i=clip_i)


def _pixels(shots: Sequence[Drawn]) -> list[Image]:
    return [shot.image for shot in shots]


def _texts(backbones: Backbones, images: Sequence[Drawn]) -> Any:
    """Embeddings of the images' captions [N,D]; each different caption is embedded once."""
    assert backbones.clip is not None
    captions = [shot.prompt if shot.caption is None else shot.caption for shot in images]
    distinct = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    return backbones.clip.texts(distinct)[[place[caption] for caption in captions]]


def _diversity(backbones: Backbones, images: Sequence[Drawn], seed: int) -> Measured | None:
    """DIV: per prompt, the mean distance over all pairs of its images."""
    by_prompt: dict[str, list[Image]] = {}
    for shot in images:
        by_prompt.setdefault(shot.prompt, []).append(shot.image)
    pairs = [(prompt, *pair) for prompt, group in by_prompt.items() for pair in combinations(group, 2)]
    if backbones.distance is None or not pairs:
        return None
    distances = backbones.distance([first for _, first, _ in pairs], [second for _, _, second in pairs])
    found: dict[str, list[float]] = {}
    for (prompt, _, _), distance in zip(pairs, distances, strict=True):
        found.setdefault(prompt, []).append(float(distance))
    return measured([sum(one) / len(one) for one in found.values()], tuple(found), seed=seed)


def _drift(
    backbones: Backbones, after: Sequence[Drawn], before: Sequence[Drawn], seed: int
) -> Measured | None:
    """The distance of each image from the base's own of the same prompt and seed."""
    own = {(shot.prompt, shot.seed): shot.image for shot in before}
    both = [shot for shot in after if (shot.prompt, shot.seed) in own]
    if backbones.distance is None or not both:
        return None
    distances = backbones.distance([own[shot.prompt, shot.seed] for shot in both], _pixels(both))
    return measured(distances, [shot.prompt for shot in both], seed=seed)
