"""Builds of a few steps are of small batches, too: the code is the same, and minutes shorter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lorabooth.pocket import clip, subject, unet, vae


@pytest.fixture(scope="module")
def small_batches() -> Iterator[None]:
    """Batches of 4 in every phase of a build in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for phase in (vae, clip, subject, unet):
            patch.setattr(phase, "BATCH", 4)
        yield
