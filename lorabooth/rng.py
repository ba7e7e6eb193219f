"""Every random draw of a run comes from here: a pure function of (seed, step, rank, purpose, index).

Nothing reads or advances a global random state, so previews, resumes and other batch splits
cannot change a run.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, step: int, rank: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one purpose at one place of a run.

    Args:
        seed: the run's seed.
        step: optimizer step, or 0 where it does not matter.
        rank: process rank, or 0 for draws that all ranks share.
        purpose: what is drawn, e.g. "noise"; different purposes are independent.
        index: position within the step.

    Returns:
        An integer in [0, 2**63).
    """
    text = f"{seed}/{step}/{rank}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, step: int, rank: int, purpose: str, index: int = 0) -> torch.Generator:
    """A fresh CPU generator seeded by `seed_for`; same arguments, same numbers, on every machine."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_for(seed, step, rank, purpose, index))
