from __future__ import annotations

import numpy as np
import pytest

from lorabooth.pocket.scenes import sample_scene
from lorabooth.pocket.vocabulary import IDENTIFIER_SHARE, draw_caption, identifiers, with_identifier


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a mug", "a qzx mug"),
        ("an orange cat", "a qzx orange cat"),
        ("a photo of a striped ball on the beach", "a photo of a qzx striped ball on the beach"),
        ("an upside down red mug at night", "an upside down qzx red mug at night"),
        ("a mug wearing a red hat", "a qzx mug wearing a red hat"),
    ],
)
def test_identifier_stands_before_the_noun_phrase(caption: str, expected: str) -> None:
    assert with_identifier(caption, "qzx") == expected


def test_caption_without_a_noun_is_an_error() -> None:
    with pytest.raises(ValueError, match="no colour"):
        with_identifier("nothing here", "qzx")


def test_identifiers_occur_in_the_stated_share() -> None:
    rng = np.random.default_rng(0)
    names = identifiers()
    captions = [draw_caption(sample_scene(rng), rng, names) for _ in range(1500)]
    found = sum(any(word in names for word in caption.split()) for caption in captions) / len(captions)
    assert abs(found - IDENTIFIER_SHARE) < 0.03
