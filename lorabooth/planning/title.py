"""What is planned, in a line: base, size, batch, adapter, steps."""

from __future__ import annotations

from pathlib import Path

from lorabooth.families.base import Source
from lorabooth.recipe import Recipe


def title(recipe: Recipe, source: Source) -> str:
    """Such as "sd15 (sd1), 512 px, 1 subject + 1 class image a step, rank 16, bf16".

    Args:
        recipe: without "auto".
        source: the base.
    """
    optim, memory = recipe.optim, recipe.memory
    batch = f"{optim.batch_size} subject"
    if recipe.prior.mode != "none":
        batch += f" + {optim.batch_size} class"
    batch += f" example{'s' * (optim.batch_size > 1 or recipe.prior.mode != 'none')}"
    if optim.accumulate > 1:
        batch += f", {optim.accumulate} times a step"
    text = " and text encoder" if recipe.adapter.text_encoder else ""
    return (
        f"{source.base_id} ({source.family}), {recipe.images.resolution} px, {batch}, "
        f"rank {recipe.adapter.rank} {recipe.adapter.targets}{text}, {memory.precision}, {optim.name}"
    )


def missing_photos(recipe: Recipe) -> list[str]:
    """Folders of photos that are not there; a plan does not need them."""
    return [subject.images for subject in recipe.subjects if not Path(subject.images).is_dir()]
