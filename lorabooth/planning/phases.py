"""The phases of a run, rehearsed on shapes: the real code of each, with counted memory.

What is on the device in each phase is what a run has there: class images with all parts, caching with the
encoders (and the denoiser, if it has drawn), training with the denoiser, and what it trains, alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorabooth.memory.meter import Usage
from lorabooth.planning.components import Scene
from lorabooth.planning.phases_before import caching, class_images
from lorabooth.planning.phases_training import training


def usages(scene: Scene, wanted: Collection[str]) -> Mapping[str, Usage]:
    """The usage of each wanted phase that the recipe has, in the order of a run; without the driver's."""
    recipe = scene.recipe
    found: dict[str, Usage] = {}
    if "class images" in wanted and recipe.prior.mode == "generated":
        found["class images"] = class_images(scene)
    if "caching" in wanted:
        found["caching"] = caching(scene)
    later = {name for name in ("training", "previews", "saving") if name in wanted}
    if recipe.run.sample_count == 0 and recipe.run.select == "last":
        later.discard("previews")
    if later:
        made = training(scene, later)
        found.update({name: usage for name, usage in made.items() if name in later})
    return found
