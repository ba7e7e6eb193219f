"""What was learned and what was forgotten, in numbers: arrays in, numbers with intervals out.

The metrics are DreamBooth's (arXiv 2208.12242, section 4). All of them are means: of cosines between
embeddings (DINO, CLIP-I, CLIP-T, PRES) or of distances between images (DIV, drift). What is averaged is kept
value by value, so that a mean can be taken apart by prompt, compared pair by pair, and given an interval.

Shape suffixes: N images, M references, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabooth.rng import seed_for

Floats = NDArray[np.floating[Any]]

DRAWS = 2000
COVERAGE = 0.95
_AT_ONCE = 4_000_000
"""Resampled indices held at once; more draws than that are made in portions, with the same numbers."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric: a mean, its interval, and what it is the mean of.

    Attributes:
        mean: of the values; of a difference, the difference of the two means.
        low: lower end of the 95 % bootstrap interval of the mean; None where a single value (or, of an
            unpaired difference, a single value on either side) says nothing about its spread.
        high: upper end likewise.
        values: one per image, pair or prompt, in their order; empty for an unpaired difference.
        groups: what was resampled together (a prompt, a subject), one per value; (): each value alone.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is written: six significant digits, no NaN."""
        return {
            "mean": _six(self.mean),
            "low": None if self.low is None else _six(self.low),
            "high": None if self.high is None else _six(self.high),
            "values": [_six(value) for value in self.values],
            "groups": list(self.groups),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Measured:
        """What `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        low, high = (None if raw[end] is None else float(raw[end]) for end in ("low", "high"))
        values = tuple(float(value) for value in raw["values"])
        return cls(float(raw["mean"]), low, high, values, tuple(str(name) for name in raw["groups"]))


def unit(x_ND: Floats) -> Floats:
    """Rows scaled to length 1, float64; a row of zeros stays one, and is then like nothing (cosine 0)."""
    x_ND = np.asarray(x_ND, dtype=np.float64)
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(length_N1 > 0, length_N1, 1.0)


def similarity_to(images_ND: Floats, references_MD: Floats) -> Floats:
    """Per image, the mean cosine with all references: DINO and CLIP-I against photos, PRES likewise.

    Args:
        images_ND: embeddings of generated images, any length.
        references_MD: embeddings of real photos, M >= 1.

    Returns:
        [N]; its mean is the mean over all N x M pairs.
    """
    if not len(references_MD):
        raise ValueError("no references to be similar to")
    return np.asarray(unit(images_ND) @ unit(references_MD).mean(axis=0))


def similarity_among(references_MD: Floats) -> Floats:
    """The real-image row: per photo, the mean cosine with all others. Fewer than two photos: empty.

    Returns:
        [M]; its mean is the mean over all pairs of different photos.
    """
    count = len(references_MD)
    if count < 2:
        return np.zeros(0)
    x_MD = unit(references_MD)
    cosine_MM = x_MD @ x_MD.T
    return np.asarray((cosine_MM.sum(axis=1) - np.diag(cosine_MM)) / (count - 1))


def prompt_similarity(images_ND: Floats, texts_ND: Floats) -> Floats:
    """CLIP-T: the cosine of image i with text i, [N]."""
    return np.asarray((unit(images_ND) * unit(texts_ND)).sum(axis=1))


def measured(
    values: Sequence[float] | Floats, groups: Sequence[str] = (), *, seed: int = 0, draws: int = DRAWS
) -> Measured:
    """The mean of values with its percentile bootstrap interval (Efron, 1979).

    With groups, whole groups are drawn (a cluster bootstrap): images of one prompt, or of one subject, are
    more alike than images of two, and to draw them one by one would promise too much. If all values are of
    one group, they are drawn one by one: the interval then speaks of that group alone. With few groups a
    percentile interval is somewhat too narrow; it is as wide as what was measured allows.

    Args:
        values: at least one, finite.
        groups: of each value, or empty: each value alone.
        seed: same seed and values, same interval.
        draws: resamples.

    Returns:
        The mean; low and high are None for a single value.

    Raises:
        ValueError: no values, a value that is not finite, or not as many groups as values.
    """
    x_N = np.asarray(values, dtype=np.float64)
    if not len(x_N) or not np.isfinite(x_N).all():
        raise ValueError("a metric needs at least one value, and all of them finite")
    names = tuple(groups)
    if names and len(names) != len(x_N):
        raise ValueError(f"{len(names)} groups for {len(x_N)} values")
    means = _resampled_means(x_N, names, draws, seed_for(seed, 0, 0, "bootstrap"))
    low, high = (None, None) if means is None else _ends(means)
    return Measured(float(x_N.mean()), low, high, tuple(x_N.tolist()), names)


def difference(
    first: Measured,
    second: Measured,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    paired: bool | None = None,
) -> Measured:
    """`first` minus `second`, with an interval.

    Args:
        first: one metric.
        second: the same metric of something else.
        seed: of the draws.
        draws: resamples.
        paired: whether value i of both is of the same prompt and seed, which takes the spread between
            prompts out of the difference. None: where lengths and groups agree.

    Returns:
        Paired: measured on the differences, value by value. Otherwise each side is resampled on its own, and
        `values` is empty.

    Raises:
        ValueError: paired, but lengths or groups differ.
    """
    alike = len(first.values) == len(second.values) > 0 and first.groups == second.groups
    if paired and not alike:
        raise ValueError("paired measurements must have the same number of values in the same groups")
    if alike and paired is not False:
        return measured(np.subtract(first.values, second.values), first.groups, seed=seed, draws=draws)
    sides = [
        _resampled_means(
            np.asarray(side.values), side.groups, draws, seed_for(seed, 0, 0, "bootstrap", i + 1)
        )
        for i, side in enumerate((first, second))
    ]
    gap = first.mean - second.mean
    if sides[0] is None or sides[1] is None:
        return Measured(gap, None, None)
    return Measured(gap, *_ends(sides[0] - sides[1]))


def by_group(metric: Measured) -> Mapping[str, float]:
    """The mean of each group, in the order in which groups first come; empty without groups."""
    found: dict[str, list[float]] = {}
    for name, value in zip(metric.groups, metric.values, strict=bool(metric.groups)):
        found.setdefault(name, []).append(value)
    return MappingProxyType({name: float(np.mean(values)) for name, values in found.items()})


def _resampled_means(x_N: Floats, groups: Sequence[str], draws: int, seed: int) -> Floats | None:
    """The means of `draws` resamples, or None if there is but one thing to draw."""
    sums: Floats = x_N
    counts: Floats = np.ones(len(x_N))
    if len(set(groups)) > 1:
        number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        which = [number[name] for name in groups]
        sums = np.bincount(which, weights=x_N).astype(np.float64)
        counts = np.bincount(which).astype(np.float64)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = []
    portion = max(1, _AT_ONCE // len(sums))
    for start in range(0, draws, portion):
        picks = rng.integers(len(sums), size=(min(portion, draws - start), len(sums)))
        means.append(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    return np.concatenate(means)


def _ends(means: Floats) -> tuple[float, float]:
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _six(value: float) -> float:
    return float(f"{value:.6g}")
