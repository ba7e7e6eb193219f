"""What a run stands on before anything is written: photos checked, base loaded, "auto" resolved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabooth.data import images
from lorabooth.data.records import CaptionsError, Scan, Skipped
from lorabooth.errors import RecipeError
from lorabooth.families import registry, source, tokens
from lorabooth.families.base import Defaults, Family, Parts
from lorabooth.families.release import Released, assert_released, release
from lorabooth.families.reload import with_vae
from lorabooth.memory import hollow
from lorabooth.memory.apply import DTYPES, precision
from lorabooth.memory.facts import describe_device
from lorabooth.memory.stream import stream
from lorabooth.memory.techniques import require_techniques, save_vae_memory
from lorabooth.progress import Reporter
from lorabooth.recipe import Recipe, check, from_mapping
from lorabooth.recipe.rules import printable
from lorabooth.training import subjects
from lorabooth.training.clock import Clock as Clock
from lorabooth.training.compiled import require_speed
from lorabooth.training.plan import PartFacts
from lorabooth.training.processes import process_state
from lorabooth.training.resolve import Choice, native_precision, resolve
from lorabooth.training.subjects import Photos, Subject


@dataclass
class LoadedBase:
    """The one place that holds the base's parts during a run: what it lets go of is gone.

    Attributes:
        parts: those that are in memory.
    """

    parts: Parts

    def to(self, device: torch.device, *names: str) -> None:
        """Move components ("vae", "text_encoder", ...) to a device."""
        for name, module in {"vae": self.parts.vae, **self.parts.components()}.items():
            if name in names and module is not None and _is_elsewhere(module, device):
                module.to(device)

    def release(self, *names: str) -> Released:
        """Let components go, and prove that their memory is free.

        Raises:
            RuntimeError: something else still holds one of them: a defect of the program.
        """
        self.parts, released = release(self.parts, *names)
        assert_released(released)
        return released


@dataclass(frozen=True, slots=True)
class LongCaption:
    """A caption that loses its end at the text encoder's limit.

    Attributes:
        photos: names of the files it belongs to, without folders.
        tokens: that it has, start and end included.
        limit: that the encoder takes.
        caption: all of it.
    """

    photos: tuple[str, ...]
    tokens: int
    limit: int
    caption: str


@dataclass(frozen=True)
class Setting:
    """A run's footing.

    Attributes:
        recipe: without "auto".
        choices: what "auto" became.
        subjects: with their prompts.
        photos: found and checked.
        family: of the base.
        base: its parts, frozen, on the CPU at first, in the recipe's dtype.
        device: where training happens.
        long_captions: those that lose their ends.
    """

    recipe: Recipe
    choices: tuple[Choice, ...]
    subjects: tuple[Subject, ...]
    photos: Photos
    family: Family
    base: LoadedBase
    device: torch.device
    long_captions: tuple[LongCaption, ...] = ()

    @property
    def long_caption_facts(self) -> list[dict[str, Any]]:
        """`long_captions` as JSON values for run.json, which holds no captions: photos, tokens, limit."""
        return [
            {"photos": [*each.photos], "tokens": each.tokens, "limit": each.limit}
            for each in self.long_captions
        ]

    @property
    def parts(self) -> Parts:
        """The base's parts that are in memory now."""
        return self.base.parts

    def with_vae(self) -> Parts:
        """They, with a VAE; the caller drops the result to free what was loaded for it."""
        place = torch.device("cpu") if self.recipe.memory.in_turn else self.device
        complete = with_vae(self.family, self.parts, place)
        save_vae_memory(complete.vae, self.recipe.memory)
        return complete


def _is_elsewhere(module: nn.Module, device: torch.device) -> bool:
    return any(tensor.device != device for tensor in (*module.parameters(), *module.buffers()))


def open_setting(recipe: Recipe, clock: Clock, reporter: Reporter) -> Setting:
    """Check the photos, load the base, resolve "auto".

    Raises:
        RecipeError: the recipe is wrong.
        DataError: photos cannot be used; found before any model is loaded.
        BaseModelError: the base cannot be used.
    """
    # Checked again, and paths made absolute: a recipe may have been put together in Python.
    recipe = from_mapping(recipe.model_dump(mode="json"), (), "the recipe")
    device = process_state().device
    with clock.phase("photos"):
        base = source.resolve(recipe.model.base, revision=recipe.model.revision, family=recipe.model.family)
        family = registry.family(base.family)
        _require_preset(family, recipe.adapter.targets)
        defaults = family.defaults_for(base)
        resolution = recipe.images.resolution
        side_px = defaults.resolution_px if resolution == "auto" else resolution
        _require_agreement(recipe, defaults, device)
        require_techniques(recipe.memory, device)
        require_speed(recipe.speed, device)
        photos = _gather(recipe, resolution_px=side_px, reporter=reporter)
        subjects.require_left_over(photos, recipe.run.validation_photos)
    for path, warning in photos.report.warnings:
        reporter.warn(f"{printable(path.name)}: {warning}")
    facts = describe_device(device)
    with clock.phase("load base"):
        base = replace(base, sha256=source.weights_digest(base))
        dtype = recipe.model.dtype if recipe.model.dtype != "auto" else native_precision(facts)[0]
        parts = family.load(base, DTYPES[dtype])
        taken: list[str] = [section.token for section in recipe.subjects if section.token != "auto"]

        def find_token(index: int) -> tuple[str, str]:
            tokenizer = parts.tokenizers["tokenizer"]
            found = tokens.find_identifier(tokenizer, avoid=[*taken, recipe.subjects[index].noun])
            taken.append(found.text)
            return found.text, found.reason

        resolved = resolve(
            recipe,
            source=base,
            defaults=defaults,
            device=facts,
            find_token=find_token,
            hollow_keep=lambda: hollow.automatic_keep(parts.denoiser),
        )
    recipe = resolved.recipe
    require_techniques(recipe.memory, device, parts.denoiser)
    save_vae_memory(parts.vae, recipe.memory)
    if recipe.memory.stream:
        # From the start: class images are drawn by a base that may be larger than the device.
        stream(parts.denoiser, device)
    if recipe.memory.hollow:
        hollow.keep_of(parts.denoiser, recipe.memory.hollow_keep)
    named = subjects.subjects_of(recipe)
    photos = replace(photos, scans=subjects.scan_all(named))
    long = _long_captions(family, parts, photos)
    if long:
        reporter.warn(_long_captions_text(long))
    return Setting(recipe, resolved.choices, named, photos, family, LoadedBase(parts), device, long)


def _require_preset(family: Family, preset: str) -> None:
    if preset not in family.targets:
        raise RecipeError(
            f'adapter.targets: "{preset}" is not a preset of {family.name}.',
            f"Presets: {', '.join(family.targets)}.",
        )


def _require_agreement(recipe: Recipe, defaults: Defaults, device: torch.device) -> None:
    """What can be told of "auto" before the base is loaded: the rules that its values would break.

    Raises:
        RecipeError: precisions that do not go together on this device; a warmup longer than the run.
    """
    precision(recipe.memory, device)
    if recipe.optim.steps == "auto":
        optim = recipe.optim.model_copy(update={"steps": defaults.steps})
        check(recipe.model_copy(update={"optim": optim}))


def _gather(recipe: Recipe, *, resolution_px: int, reporter: Reporter) -> Photos:
    """List and decode all photos, the user's own class images too, before any model is loaded.

    Raises:
        DataError: a folder, photos or captions cannot be used; all bad files in one message.
    """
    named = subjects.subjects_of(recipe)
    scans: list[Scan] = []
    captions: list[Skipped] = []
    for subject in named:
        try:
            scans += subjects.scan_all((subject,))
        except CaptionsError as error:
            scans.append(error.scan)
            captions += error.problems
    own = recipe.prior.images if recipe.prior.mode == "images" else ""
    classes = [subjects.own_class_images(Path(own), named)] if own else []
    photos = [record for scan in scans for record in scan.records]
    drawn = [record for scan in classes for record in scan.records]
    report = images.check([*photos, *drawn], resolution_px=resolution_px, reporter=reporter)
    skipped = [skip for scan in (*scans, *classes) for skip in scan.skipped]
    images.require_good(report, captions=captions, skipped=skipped)
    # Class images that are a little small are no matter; there may be hundreds.
    own_paths = {record.path for record in photos}
    warnings = tuple((path, text) for path, text in report.warnings if path in own_paths)
    return Photos(tuple(scans), replace(report, warnings=warnings))


def _long_captions(family: Family, parts: Parts, photos: Photos) -> tuple[LongCaption, ...]:
    """Captions that lose tokens at the text encoder's limit, in the photos' order."""
    names: dict[str, list[str]] = {}
    for record in photos.records:
        names.setdefault(record.caption, []).append(record.path.name)
    counts = family.count_tokens(parts, list(names))
    return tuple(
        LongCaption(tuple(owners), has, limit, caption)
        for (caption, owners), (has, limit) in zip(names.items(), counts, strict=True)
        if has > limit
    )


def _long_captions_text(long: Sequence[LongCaption]) -> str:
    """A table of them."""
    lines = ["these captions lose their ends at the text encoder's limit:"]
    for each in long:
        more = f" and {len(each.photos) - 1} more" if len(each.photos) > 1 else ""
        whose = printable(each.photos[0], 40) + more
        lines.append(f"  {whose}: {each.tokens} of {each.limit} tokens: {printable(each.caption, 60)}")
    return "\n".join(lines)


def part_facts(parts: Parts) -> list[PartFacts]:
    """The base's components, for printing."""
    modules: dict[str, Any] = {"denoiser": parts.denoiser, **parts.text_encoders}
    if parts.vae is not None:
        modules["vae"] = parts.vae
    return [
        PartFacts(
            name,
            type(module).__name__,
            sum(parameter.numel() for parameter in module.parameters()),
            str(next(module.parameters()).dtype).removeprefix("torch."),
        )
        for name, module in modules.items()
    ]


def summary_lines(setting: Setting) -> Sequence[str]:
    """What the user should see before work begins."""
    subject_lines = [f'learning "{subject.name}": {subject.prompt}' for subject in setting.subjects]
    return [
        f"base: {setting.parts.source.base_id} ({setting.family.name}), on {setting.device}",
        *subject_lines,
        setting.photos.summary(),
    ]
