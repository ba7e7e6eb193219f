"""What benchmarks/class_images.py says of embeddings, on vectors whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.class_images import frechet, judged, ways
from lorabooth.pocket.scenes import CLASSES


class Texts:
    """A CLIP that knows a direction for every class."""

    def texts(self, prompts: list[str]) -> Any:
        return np.eye(len(prompts), dtype=np.float32)


def test_the_distance_of_two_normal_distributions() -> None:
    drawn = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    assert frechet(drawn, drawn) == pytest.approx(0, abs=1e-5)
    assert frechet(drawn, drawn + np.float32(2)) == pytest.approx(3 * 4, rel=1e-4)
    # Twice as wide: the trace of (S + 4 S - 2 * 2 S) is that of S.
    centred = drawn - drawn.mean(axis=0)
    assert frechet(centred, 2 * centred) == pytest.approx(np.trace(np.cov(drawn.T)), rel=1e-4)


def test_copies_have_no_variety_and_another_class_is_not_the_one_that_was_asked_for() -> None:
    drawn = np.repeat(np.eye(len(CLASSES), dtype=np.float32), 2, axis=0)
    found = judged(drawn, Texts(), drawn, 2)  # type: ignore[arg-type]
    assert found["class_named"]["value"] == 1
    assert found["variety"] == pytest.approx(0)
    found = judged(np.roll(drawn, 1, axis=0), Texts(), drawn, 2)  # type: ignore[arg-type]
    assert found["class_named"]["value"] == 0.5
    assert found["variety"] == pytest.approx(1)


def test_the_last_way_is_what_is_done() -> None:
    way = ways()[-1]
    assert way.interval is not None
    assert (way.sampler, way.steps) == ("dpm++", 15)
