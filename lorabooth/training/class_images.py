"""The class examples of a run, by prior mode: decided here, once, above the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorabooth.data import images
from lorabooth.data.cache import Store
from lorabooth.progress import Reporter
from lorabooth.training import subjects
from lorabooth.training.prior import SamplerFacts, ensure_class_images
from lorabooth.training.setting import Setting
from lorabooth.training.studio import Studio
from lorabooth.types import Record

if TYPE_CHECKING:
    from PIL.Image import Image

GROUP = 8
"""Class images drawn at once on an accelerator. Where memory forces fewer, their last bits may differ."""
GROUP_ON_CPU = 4
"""Likewise on a CPU: a quarter to a third faster than one by one on the pocket base, and no slower than 8."""


@dataclass(frozen=True)
class ClassExamples:
    """Examples that keep the class.

    Attributes:
        records: of them; empty without prior preservation.
        facts: for run.json.
    """

    records: tuple[Record, ...]
    facts: Mapping[str, object]


def class_examples(setting: Setting, studio: Studio, store: Store, reporter: Reporter) -> ClassExamples:
    """Generate, find or derive the class examples.

    Raises:
        DataError: the user's class images cannot be used.
        BaseModelError: the base draws only black or flat images.
        RecipeError: the folder for class images cannot be written.
        TrainingError: the disk is full.
    """
    modes: dict[str, Callable[[], ClassExamples]] = {
        "generated": lambda: _generated(setting, studio, store, reporter),
        "images": lambda: _own_images(setting, reporter),
        "distill": lambda: ClassExamples(
            subjects.as_class_examples(setting.photos.records, setting.subjects),
            MappingProxyType({"mode": "distill", "images": 0}),
        ),
        "none": lambda: ClassExamples((), MappingProxyType({"mode": "none", "images": 0})),
    }
    return modes[setting.recipe.prior.mode]()


def _own_images(setting: Setting, reporter: Reporter) -> ClassExamples:
    # Decoded and found good already, with the photos, before the base was loaded.
    scan = subjects.own_class_images(Path(setting.recipe.prior.images), setting.subjects)
    reporter.say(f"class images: {scan.summary()}")
    return ClassExamples(scan.records, MappingProxyType({"mode": "images", "images": len(scan.records)}))


def _generated(setting: Setting, studio: Studio, store: Store, reporter: Reporter) -> ClassExamples:
    recipe = setting.recipe
    side_px = int(recipe.images.resolution)
    multiple_px = setting.family.resolution_multiple_px(setting.parts)
    height_px, width_px = images.square_for(side_px, multiple_px)
    sampler = SamplerFacts(
        name="dpm++",
        steps=int(recipe.prior.sampler_steps),
        guidance=float(recipe.prior.guidance),
        height_px=height_px,
        width_px=width_px,
        dtype=recipe.model.dtype,
        group=GROUP_ON_CPU if setting.device.type == "cpu" else GROUP,
    )
    pipeline = setting.family.pipeline(setting.parts)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Sequence[Image]:
        # Nothing was moved if all images are there already: the base goes to the device with the first batch.
        pipeline.to(setting.device)
        return studio.generate(
            pipeline,
            prompts,
            seeds,
            steps=sampler.steps,
            guidance=sampler.guidance,
            height_px=height_px,
            width_px=width_px,
            batch_size=len(prompts),
        )

    found: dict[str, Sequence[Path]] = {}
    drawn = reused = rejected = 0
    for prompt in dict.fromkeys(subject.class_prompt for subject in setting.subjects):
        made = ensure_class_images(
            folder_root=store.root / "class-images",
            base_key=f"{setting.parts.source.base_id}/{setting.parts.source.sha256}",
            prompt=prompt,
            count=recipe.prior.count,
            generate=generate,
            sampler=sampler,
            reporter=reporter,
        )
        found[prompt] = made.paths
        drawn, reused, rejected = drawn + made.generated, reused + made.reused, rejected + made.rejected
        reporter.say(f'class images of "{prompt}": {made.generated} drawn, {made.reused} found')
    facts = {
        "mode": "generated",
        "images": drawn + reused,
        "drawn": drawn,
        "reused": reused,
        "rejected": rejected,
    }
    return ClassExamples(subjects.class_records(found, setting.subjects), MappingProxyType(facts))
