"""The words of the pocket world's captions, and the rare identifiers that stand for nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np

from lorabooth.pocket import scenes

CONSONANTS = "bcdfghjklmnpqrstvwxz"
IDENTIFIER_SHARE = 0.12
CONTEXT_TOKENS = 32

# Sentences beyond the grammar of the captions, so that ordinary prompts do not fall apart into letters.
_OTHER_SENTENCES = (
    "a drawing of the my your this that one two some toy object thing style picture image photograph sketch",
    "a close up of a big small little new old nice beautiful colourful colorful bright dark shiny",
    "standing sitting lying in on at with and by near over under behind the sea sand forest city street room",
    "a gray grey gold golden silver cyan magenta violet black white hat scarf glasses sunglasses person dog",
    "a rotated turned tilted upside down upright mirrored flying sleeping smiling",
)


def _grammar() -> list[str]:
    return [
        *scenes.CLASSES, *scenes.COLOURS, *scenes.PATTERNS, *scenes.PLACES.values(), *scenes.PLACES,
        *scenes.ACCESSORIES, *scenes.STYLES, *scenes.POSES, *scenes.MARKS,
    ]  # fmt: skip


def identifiers() -> tuple[str, ...]:
    """The 300 rare identifiers of two or three consonants, no word and no end of one, always the same."""
    draw = random.Random(1234)
    words = set(re.findall(r"[a-z]+", " ".join((*_grammar(), *_OTHER_SENTENCES))))
    chosen: list[str] = ["sks", "qzx"]
    for length, count in ((2, 60), (3, 300)):
        while len(chosen) < count:
            word = "".join(draw.choice(CONSONANTS) for _ in range(length))
            if word not in chosen and not any(known.endswith(word) for known in words):
                chosen.append(word)
    return tuple(chosen)


def corpus(seed: int, captions: int) -> tuple[list[str], tuple[str, ...]]:
    """Sentences to train the tokenizer on (drawn captions, the fixed vocabulary), and the identifiers."""
    rng = np.random.default_rng(seed)
    drawn = [scenes.caption(scenes.sample_scene(rng), rng) for _ in range(captions)]
    return drawn + _grammar() * 20 + list(_OTHER_SENTENCES) * 5, identifiers()


_NOUN_PHRASE = re.compile(
    r"\b(?:(?:an|a) )?(" + "|".join([*scenes.COLOURS, *scenes.PATTERNS, *scenes.CLASSES]) + r")\b"
)


def with_identifier(caption: str, identifier: str) -> str:
    """`caption` with an identifier before the first colour, pattern or class: "a red mug" -> "a qzx red mug".

    Raises:
        ValueError: the caption names no colour, pattern or class.
    """
    match = _NOUN_PHRASE.search(caption)
    if match is None:
        raise ValueError(f"no colour, pattern or class in {caption!r}")
    start, word = match.start(1), match.group(1)
    article = "" if match.start() == start else "a "
    return f"{caption[: match.start()]}{article}{identifier} {word}{caption[match.end(1) :]}"


def draw_caption(
    scene: scenes.Scene, rng: np.random.Generator, names: Sequence[str], drop: float = 0.35
) -> str:
    """A caption of `scene`, in `IDENTIFIER_SHARE` of the draws with a random identifier from `names`."""
    text = scenes.caption(scene, rng, drop=drop)
    if rng.random() < IDENTIFIER_SHARE:
        text = with_identifier(text, names[int(rng.integers(len(names)))])
    return text
