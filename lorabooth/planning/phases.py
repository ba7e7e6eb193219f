"""The phases of a run, rehearsed on shapes: the real code of each, with counted memory.

What is on the device in each phase is what a run has there: class images with denoiser and VAE, caching with
the encoders, training with the denoiser, and what it trains, alone. Of a denoiser that is streamed to a card,
only what stays there and the units that visit it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorabooth.memory.meter import Usage
from lorabooth.planning.components import Scene
from lorabooth.planning.phases_before import before
from lorabooth.planning.phases_training import training


def usages(scene: Scene, wanted: Collection[str]) -> Mapping[str, Usage]:
    """The usage of each wanted phase that the recipe has, and of those seen on the way; without driver."""
    recipe = scene.recipe
    found: dict[str, Usage] = {}
    earlier = {name for name in ("class images", "caching") if name in wanted}
    if recipe.prior.mode != "generated":
        earlier.discard("class images")
    if earlier:
        found.update(before(scene, earlier))
    later = {name for name in ("training", "previews", "saving") if name in wanted}
    if recipe.run.sample_count == 0 and recipe.run.select == "last":
        later.discard("previews")
    if later:
        found.update(training(scene, later))
    return found
