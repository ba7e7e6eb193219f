"""How many blocks to recompute: the fewest that fit, found with as few forecasts as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from lorabooth.families.base import Family, Source
from lorabooth.memory.meter_shapes import ShapesOnly
from lorabooth.memory.units import Unit, checkpoint_units

_GUESSES = 3
"""After so many guesses the rest is halved: guesses that are all a little low come nearer one by one."""


def block_weights(family: Family, source: Source) -> list[float]:
    """Roughly what share of the activations each block keeps, in the order in which blocks are recomputed.

    Only a first guess for `fewest`, which believes nothing but forecasts: pixels (a quarter per level of a
    U-Net) times channels, and attention blocks keep more than residual ones.
    """
    with ShapesOnly():
        denoiser = family.skeleton(source, torch.bfloat16).denoiser
        levels = len(getattr(denoiser, "up_blocks", ()))
        weights = [_weight(unit, levels) for unit in checkpoint_units(denoiser)]
    return [weight / sum(weights) for weight in weights]


def fewest(
    peak_bytes: Callable[[int], int],
    weights: Sequence[float],
    none_bytes: int,
    all_bytes: int,
    usable_bytes: int,
) -> int:
    """The smallest number of blocks whose forecast fits; memory falls with every block.

    Args:
        peak_bytes: number of blocks -> forecast; slow.
        weights: share of each block, adding up to 1: where to look first.
        none_bytes: forecast without any, which does not fit.
        all_bytes: forecast with all, which fits.
        usable_bytes: what fits.
    """
    low, high = (0, none_bytes), (len(weights), all_bytes)
    summed = [0.0, *accumulate(weights)]
    looked = 0
    while high[0] - low[0] > 1:
        # Between two known points memory is taken to fall as the blocks' weights say.
        span = summed[high[0]] - summed[low[0]]
        share = (low[1] - usable_bytes) / max(1, low[1] - high[1])
        guess = next(n for n in range(low[0], high[0] + 1) if summed[n] - summed[low[0]] >= share * span)
        if looked >= _GUESSES:
            guess = (low[0] + high[0]) // 2
        looked += 1
        count = min(max(guess, low[0] + 1), high[0] - 1)
        found = (count, peak_bytes(count))
        if found[1] <= usable_bytes:
            high = found
        else:
            low = found
    return high[0]


def _weight(unit: Unit, levels: int) -> float:
    first, *rest = unit.name.split(".")
    level = {"down_blocks": lambda i: i, "up_blocks": lambda i: levels - 1 - i}
    depth = level[first](int(rest[0])) if first in level else levels - 1 if first == "mid_block" else 0
    channels = max((p.shape[0] for p in unit.module.parameters() if p.dim() > 1), default=1)
    return float(channels) * 0.25**depth
