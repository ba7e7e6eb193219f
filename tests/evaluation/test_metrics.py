"""Every mean equals a loop over pairs; intervals cover what they say, and say nothing of a single value."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorabooth.evaluation import metrics
from lorabooth.evaluation.metrics import (
    Measured,
    by_group,
    difference,
    measured,
    prompt_similarity,
    similarity_among,
    similarity_to,
    unit,
)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """By hand, one pair at a time."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


@pytest.fixture(name="x_ND")
def some_images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


@pytest.fixture(name="y_MD")
def some_references() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32) + 0.5


def test_similarity_to_is_the_mean_over_all_pairs(x_ND: np.ndarray, y_MD: np.ndarray) -> None:
    found = similarity_to(x_ND, y_MD)
    for i, x in enumerate(x_ND):
        assert found[i] == pytest.approx(np.mean([cosine(x, y) for y in y_MD]), abs=1e-9)
    assert found.mean() == pytest.approx(np.mean([cosine(x, y) for x in x_ND for y in y_MD]), abs=1e-9)
    with pytest.raises(ValueError, match="no references"):
        similarity_to(x_ND, y_MD[:0])


def test_similarity_among_leaves_out_each_photo_with_itself(y_MD: np.ndarray) -> None:
    found = similarity_among(y_MD)
    for i in range(4):
        others = [cosine(y_MD[i], y_MD[j]) for j in range(4) if j != i]
        assert found[i] == pytest.approx(np.mean(others), abs=1e-9)
    assert len(similarity_among(y_MD[:1])) == len(similarity_among(y_MD[:0])) == 0


def test_prompt_similarity_is_row_by_row(x_ND: np.ndarray, y_MD: np.ndarray) -> None:
    found = prompt_similarity(x_ND[:4], y_MD)
    assert found.tolist() == pytest.approx([cosine(x, y) for x, y in zip(x_ND, y_MD, strict=False)], abs=1e-9)


def test_a_row_of_zeros_is_like_nothing() -> None:
    assert unit(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
    assert similarity_to(np.zeros((1, 3)), np.ones((2, 3))).tolist() == [0]


@given(
    hnp.arrays(np.float64, (3, 4), elements=st.floats(0.1, 10)),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=50)
def test_length_does_not_matter(x_ND: np.ndarray, scale: float) -> None:
    assert np.allclose(similarity_to(x_ND * scale, x_ND), similarity_to(x_ND, x_ND))
    assert (similarity_to(x_ND, x_ND) <= 1 + 1e-9).all()


# ---- the bootstrap ----


def test_the_interval_is_that_of_a_loop_of_resamples() -> None:
    values = np.random.default_rng(2).normal(size=40)
    found = measured(values, draws=4000)
    rng = np.random.default_rng(99)
    means = sorted(np.mean([values[rng.integers(40)] for _ in range(40)]) for _ in range(4000))
    spread = values.std() / math.sqrt(40)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(means[100], abs=0.15 * spread)
    assert found.high == pytest.approx(means[3899], abs=0.15 * spread)


def test_same_seed_same_interval_whatever_the_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = np.random.default_rng(3).normal(size=30), [f"p{i % 6}" for i in range(30)]
    first = measured(values, groups, seed=5)
    monkeypatch.setattr(metrics, "_AT_ONCE", 100)
    assert measured(values, groups, seed=5) == first
    assert measured(values, groups, seed=6).low != first.low


def test_groups_are_drawn_whole() -> None:
    # Ten copies of each of five values: one by one, fifty values would promise far too much.
    values = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 10)
    clustered = measured(values, [f"subject {i // 10}" for i in range(50)])
    alone = measured([0.1, 0.3, 0.5, 0.7, 0.9])
    naive = measured(values)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_groups_of_unequal_size_weigh_by_their_values() -> None:
    # Two groups: a resample is one of (a,a), (a,b), (b,b), whose means are 0, 3/4 and 1.
    found = measured([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"])
    assert (found.mean, found.low, found.high) == (0.75, 0.0, 1.0)
    assert dict(by_group(found)) == {"a": 0.0, "b": 1.0}


def test_of_one_group_the_values_are_drawn() -> None:
    values = [0.1, 0.5, 0.9]
    grouped, alone = measured(values, ["p"] * 3), measured(values)
    assert (grouped.low, grouped.high) == (alone.low, alone.high)
    assert grouped.low is not None
    assert 0.1 <= grouped.low < 0.5 < grouped.high <= 0.9


def test_one_value_has_no_interval() -> None:
    found = measured([0.25], ["p"])
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    assert json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_what_is_no_measurement_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        measured(values)
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        measured([0.5, 0.5], ["a"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(200):
        clusters = rng.normal(size=25)
        values = (clusters[:, None] + 0.3 * rng.normal(size=(25, 4))).ravel()
        found = measured(values, [str(i // 4) for i in range(100)], seed=trial, draws=400)
        assert found.low is not None
        inside += found.low <= 0 <= found.high
    assert 178 <= inside <= 198


def test_a_paired_difference_takes_the_spread_between_prompts_out() -> None:
    rng = np.random.default_rng(5)
    level = rng.normal(size=40)
    groups = [str(i // 4) for i in range(40)]
    better, base = measured(level + 0.1 + 0.01 * rng.normal(size=40), groups), measured(level, groups)
    paired, apart = difference(better, base), difference(better, base, paired=False)
    assert paired.mean == pytest.approx(apart.mean) == pytest.approx(better.mean - base.mean)
    assert paired.groups == base.groups
    assert 0.09 < paired.low < 0.1 < paired.high < 0.11
    assert apart.low < 0 < apart.high
    assert apart.values == ()


def test_what_does_not_match_is_compared_side_by_side() -> None:
    one, two = measured([0.5, 0.6, 0.7]), measured([0.1, 0.2])
    found = difference(one, two)
    assert found.mean == pytest.approx(0.45)
    assert found.low < 0.45 < found.high
    assert difference(one, measured([0.1])).low is None
    with pytest.raises(ValueError, match="paired"):
        difference(one, two, paired=True)
    itself = difference(one, one)
    assert (itself.mean, itself.low, itself.high) == (0, 0, 0)
    assert difference(one, one, paired=False).low < 0


def test_json_keeps_six_digits_and_comes_back() -> None:
    found = measured([1 / 3, 2e-7 / 3, 1e6 / 7], ["a", "a", "b"])
    raw = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert raw["values"] == [0.333333, 6.66667e-08, 142857]
    again = Measured.from_json(raw)
    assert again.to_json() == raw
    assert again.groups == found.groups
    with pytest.raises(KeyError):
        Measured.from_json({"mean": 1})
