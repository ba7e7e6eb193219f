"""The fewest blocks that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabooth.families import registry
from lorabooth.families.source import resolve
from lorabooth.memory.units import checkpoint_units
from lorabooth.planning.blocks import block_weights, fewest


@given(
    savings=st.lists(st.integers(0, 100), min_size=1, max_size=60),
    weights=st.lists(st.floats(0.01, 1), min_size=60, max_size=60),
    usable=st.integers(0, 6000),
)
def test_the_smallest_number_that_fits_whatever_the_first_guess(
    savings: list[int], weights: list[float], usable: int
) -> None:
    peaks = [1000 + sum(savings) - sum(savings[:n]) for n in range(len(savings) + 1)]
    if not peaks[-1] <= usable < peaks[0]:
        return
    asked: list[int] = []

    def peak_bytes(count: int) -> int:
        asked.append(count)
        return peaks[count]

    shares = [weight / sum(weights[: len(savings)]) for weight in weights[: len(savings)]]
    found = fewest(peak_bytes, shares, peaks[0], peaks[-1], usable)
    assert found == min(n for n, peak in enumerate(peaks) if peak <= usable)
    assert len(asked) == len(set(asked)) <= 3 + 6


def test_weights_are_of_the_units_and_fall_inwards(tiny_sd: Path) -> None:
    source = resolve(str(tiny_sd), configs_only=True)
    family = registry.family(source.family)
    weights = block_weights(family, source)
    import torch

    units = checkpoint_units(family.load(source, torch.float32).denoiser)
    assert len(weights) == len(units)
    assert sum(weights) == pytest.approx(1)
    assert weights[0] > weights[-1]
