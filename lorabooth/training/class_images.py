"""The class examples of a run, by prior mode: decided here, once, above the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from lorabooth.data import images
from lorabooth.data.cache import CachedLatent, Store, sampled_key
from lorabooth.families.recast import recast
from lorabooth.memory.apply import DTYPES
from lorabooth.memory.facts import describe_device
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe
from lorabooth.training import subjects
from lorabooth.training.compiled import Blocks, Pace, TimingFile, compile_cache
from lorabooth.training.prior import Drawn, SamplerFacts, ensure_class_images
from lorabooth.training.setting import Setting
from lorabooth.training.studio import Studio
from lorabooth.types import Geometry, Interval, Moments, Record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

GROUP = 8
"""Class images drawn at once on an accelerator. Where memory forces fewer, their last bits may differ."""
GROUP_ON_CPU = 4
"""Likewise on a CPU: a quarter to a third faster than one by one on the pocket base, and no slower than 8."""

_STEPS_OF_BOTH_KINDS = 3
"""A sampler's: in the middle one guidance acts, and the denoiser sees twice the batch."""


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


def group_of(recipe: Recipe, device_kind: str) -> int:
    """Class images drawn at once.

    Args:
        recipe: with `memory.images_at_once`, a number or "auto".
        device_kind: "cpu", "cuda" or "mps".
    """
    if recipe.memory.images_at_once != "auto":
        return recipe.memory.images_at_once
    return GROUP_ON_CPU if device_kind == "cpu" else GROUP


def _interval_of(recipe: Recipe) -> Interval | None:
    """The noise levels at which guidance acts in class images; None is all.

    Args:
        recipe: resolved.
    """
    ends = recipe.prior.guidance_interval
    return (float(ends[0]), float(ends[1])) if ends else None


def _own_images(setting: Setting, reporter: Reporter) -> ClassExamples:
    # Decoded and found good already, with the photos, before the base was loaded.
    scan = subjects.own_class_images(Path(setting.recipe.prior.images), setting.subjects)
    reporter.say(f"class images: {scan.summary()}")
    return ClassExamples(scan.records, MappingProxyType({"mode": "images", "images": len(scan.records)}))


def _sampler_of(setting: Setting) -> SamplerFacts:
    """How class images are drawn; part of what they are kept under."""
    recipe = setting.recipe
    multiple_px = setting.family.resolution_multiple_px(setting.parts)
    height_px, width_px = images.square_for(int(recipe.images.resolution), multiple_px)
    return SamplerFacts(
        name="dpm++, decoded in tiles" if recipe.memory.vae_tiling else "dpm++",
        steps=int(recipe.prior.sampler_steps),
        guidance=float(recipe.prior.guidance),
        guidance_interval=_interval_of(recipe),
        height_px=height_px,
        width_px=width_px,
        dtype=recipe.prior.dtype,
        group=group_of(recipe, setting.device.type),
    )


def _generated(setting: Setting, studio: Studio, store: Store, reporter: Reporter) -> ClassExamples:
    recipe, artist = setting.recipe, _Artist(setting, studio, store, reporter)
    found: dict[str, Sequence[Path]] = {}
    drawn = reused = rejected = 0
    for prompt in artist.prompts:
        made = ensure_class_images(
            folder_root=store.root / "class-images",
            base_key=f"{setting.parts.source.base_id}/{setting.parts.source.sha256}",
            prompt=prompt,
            count=recipe.prior.count,
            generate=artist.generate,
            sampler=artist.sampler,
            reporter=reporter,
            keep_latent=artist.keep_latent,
        )
        found[prompt] = made.paths
        drawn, reused, rejected = drawn + made.generated, reused + made.reused, rejected + made.rejected
        reporter.say(f'class images of "{prompt}": {made.generated} drawn, {made.reused} found')
    facts: dict[str, object] = {
        "mode": "generated",
        "images": drawn + reused,
        "drawn": drawn,
        "reused": reused,
        "rejected": rejected,
        **artist.finish(),
    }
    return ClassExamples(subjects.class_records(found, setting.subjects), MappingProxyType(facts))


class _Artist:
    """Draws class images with the frozen base, in groups.

    Args:
        setting: the run's, its base whole.
        studio: what draws.
        store: keeps the latents.
        reporter: hears of memory that ran out, and of compilation.

    Attributes:
        prompts: of the run's classes, each once.
        sampler: how all of them are drawn.
    """

    def __init__(self, setting: Setting, studio: Studio, store: Store, reporter: Reporter) -> None:
        self.prompts = tuple(dict.fromkeys(subject.class_prompt for subject in setting.subjects))
        self.sampler = _sampler_of(setting)
        self._setting, self._studio, self._store, self._reporter = setting, studio, store, reporter
        self._encoded: dict[str, Tensor] = {}
        self._most: int | None = None
        self._tools: _Tools | None = None

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Sequence[Drawn]:
        """One group, with its latents."""
        # Nothing was moved if all images are there already: the base goes to the device with the first group.
        tools = self._tools = self._tools or self._prepare()

        def draw(steps: int) -> Sequence[Drawn]:
            return self._draw(tools.pipeline, prompts, seeds, steps)

        return tools.compiling.timed(len(prompts), draw, self.sampler.steps)

    def keep_latent(self, sha256: str, latent: Tensor) -> None:
        """Keep exactly this latent, a posterior without width, for the image of that digest."""
        moments = Moments(latent, torch.zeros_like(latent))
        size_px = (self.sampler.height_px, self.sampler.width_px)
        whole = Geometry(size_px, (0, 0), size_px)
        self._store.put_moments(sampled_key(sha256), CachedLatent(moments, whole))

    def finish(self) -> dict[str, object]:
        """The blocks run as they were written again, off the device; what there is to tell of their speed."""
        if self._tools is None:
            return {}
        # The encoders come next, then the adapter, and the step has other shapes.
        self._tools.compiling.blocks.off()
        self._setting.base.to(torch.device("cpu"), "denoiser")
        pace = self._tools.compiling.pace
        self._tools = None
        return {} if pace is None else {"speed": pace.facts}

    def _prepare(self) -> _Tools:
        """Prompts encoded first, so that the text encoder is not on the device while the denoiser is."""
        setting = self._setting
        self._encode()
        # A run trains on what was loaded; only the drawing may be in fewer bits.
        parts = recast(replace(setting.parts, text_encoders={}), DTYPES[self.sampler.dtype])
        if parts.denoiser is setting.parts.denoiser:
            setting.base.to(setting.device, "denoiser")
        else:
            parts.denoiser.to(setting.device)
        if not setting.recipe.memory.in_turn:
            setting.base.to(setting.device, "vae")
        count = setting.recipe.prior.count * len(self.prompts)
        compiling = _Compiling(setting, parts.denoiser, self.sampler, count, self._reporter)
        return _Tools(setting.family.pipeline(parts), compiling)

    def _encode(self) -> None:
        """All class prompts, and what is guided away from; each as a group, whose size rounds last bits."""
        setting = self._setting
        setting.base.to(setting.device, *setting.parts.text_encoders)
        for prompt in ("", *self.prompts):
            cond, *_ = setting.family.encode_prompts(setting.parts, [prompt] * self.sampler.group)
            self._encoded[prompt] = cond["encoder_hidden_states"]
        setting.base.to(torch.device("cpu"), *setting.parts.text_encoders)

    def _draw(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int
    ) -> Sequence[Drawn]:
        latents: dict[int, Tensor] = {}
        images = self._studio.generate(
            pipeline,
            prompts,
            seeds,
            steps=steps,
            guidance=self.sampler.guidance,
            guidance_interval=self.sampler.guidance_interval,
            height_px=self.sampler.height_px,
            width_px=self.sampler.width_px,
            batch_size=min(len(prompts), self._most or len(prompts)),
            encoded=self._encoded,
            in_turn=self._setting.recipe.memory.in_turn,
            on_latent=latents.__setitem__,
            on_smaller=self._smaller,
        )
        return [Drawn(image, latents.get(index)) for index, image in enumerate(images)]

    def _smaller(self, count: int) -> None:
        # What did not fit once does not fit the next time either.
        self._most = count
        self._reporter.warn(f"memory ran out while drawing class images; {count} at once from now on")


@dataclass(frozen=True)
class _Tools:
    """What images are drawn with, from the first group on."""

    pipeline: DiffusionPipeline
    compiling: _Compiling


class _Compiling:
    """Compiled blocks of the sampler, where the recipe wants them and they pay; a group is what is timed.

    Images differ in their last bits by whether their group was compiled, as they do by how many are drawn at
    once.

    Args:
        setting: the run's.
        denoiser: that draws.
        sampler: how images are drawn.
        count: images that the run needs, of which some may be there already.
        reporter: hears of the choice.
    """

    def __init__(
        self, setting: Setting, denoiser: nn.Module, sampler: SamplerFacts, count: int, reporter: Reporter
    ) -> None:
        self._setting, self._sampler, self._count, self._reporter = setting, sampler, count, reporter
        self._groups = 0
        self.blocks = Blocks(denoiser, compile_cache())
        self.pace: Pace | None = None

    def timed(self, size: int, draw: Callable[[int], Sequence[Drawn]], steps: int) -> Sequence[Drawn]:
        """Draw one group in so many sampler steps; what it took may decide on the next."""
        mode = self._setting.recipe.speed.compile
        if mode == "off" or not len(self.blocks) or size < self._sampler.group:
            return draw(steps)
        if self.pace is None:
            facts = {
                "sampler": asdict(self._sampler),
                "base": self._setting.parts.source.sha256,
                "device": describe_device(self._setting.device).name,
                "torch": torch.__version__,
            }
            self.pace = Pace(
                mode,
                self.blocks,
                lambda: draw(_STEPS_OF_BOTH_KINDS),
                memory=TimingFile.of(compile_cache(), facts),
                reporter=self._reporter,
                unit="group",
                settling=1,
                measured=1,
            )
        began_s = time.perf_counter()
        images = draw(steps)
        self._groups += 1
        self.pace(self._groups, -(-self._count // size), time.perf_counter() - began_s)
        return images
