"""Base + adapters + prompts + seeds -> images in a folder, and one labelled grid of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorabooth.errors import RecipeError
from lorabooth.evaluation.image_files import has_facts, save_image
from lorabooth.progress import Reporter, Silent
from lorabooth.prompts import slug
from lorabooth.version import __version__

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from lorabooth.evaluation.apply import AdapterHandle
    from lorabooth.evaluation.generate import Sampler

Dtype = Literal["auto", "fp32", "bf16", "fp16"]

_GRID = "grid.png"


@dataclass(frozen=True, slots=True)
class Shot:
    """One image to draw.

    Attributes:
        prompt: its text.
        seed: of its first noise.
        strength: factor on all adapters in a strength sweep, else None.
    """

    prompt: str
    seed: int
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What `sample` has drawn.

    Attributes:
        shots: in order: prompts, within them seeds, within them strengths.
        images: one per shot.
        grid: the labelled grid.
        paths: one file per shot.
        grid_path: the grid's file.
    """

    shots: tuple[Shot, ...]
    images: tuple[Image, ...]
    grid: Image
    paths: tuple[Path, ...]
    grid_path: Path


def sample(
    base: str | Path,
    adapters: Sequence[tuple[Path, float]] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    *,
    out: Path,
    steps: int | None = None,
    guidance: float | None = None,
    strengths: Sequence[float] | None = None,
    resolution_px: int | None = None,
    sampler: Sampler = "dpm++",
    batch_size: int = 1,
    device: str = "auto",
    dtype: Dtype = "auto",
    reporter: Reporter | None = None,
) -> SampleResult:
    """Draw every prompt with every seed, write the images and a labelled grid into a folder.

    Args:
        base: "pocket", a diffusers folder, a .safetensors checkpoint, or a hub id.
        adapters: files with their strengths; several add up.
        prompts: at least one.
        seeds: at least one, none twice.
        out: folder; made if need be. Files of another sample are never overwritten.
        steps: sampler steps; None is the family's default, as for the next two.
        guidance: classifier-free guidance scale.
        resolution_px: image side.
        strengths: a sweep: every image once per entry, all adapters' strengths multiplied by it.
        sampler: see `generate.generate`.
        batch_size: most images at once.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: precision of the weights; "auto" is half precision on a GPU, float32 elsewhere.
        reporter: hears of the progress.

    Returns:
        Images, grid, and where they are.

    Raises:
        RecipeError: nothing to draw, or the folder holds other images of the same names.
        BaseModelError, AdapterError, OutOfMemoryError: see there.
    """
    from lorabooth.adapters.stored import open_adapter
    from lorabooth.evaluation.apply import attach_file
    from lorabooth.families import registry, source

    reporter = reporter or Silent()
    shots = plan_shots(prompts, seeds, strengths, bool(adapters))
    for path, _ in adapters:
        open_adapter(Path(path)).tensors()  # before the base is loaded: broken files and NaN
    found = source.resolve(str(base), reporter=reporter)
    family = registry.family(found.family)
    defaults = family.defaults_for(found)
    how = _How(
        steps=steps or defaults.sampler_steps,
        guidance=defaults.guidance if guidance is None else guidance,
        side_px=resolution_px or defaults.resolution_px,
        sampler=sampler,
        base=found.base_id,
        adapters=tuple((adapter_digest(Path(path)), strength) for path, strength in adapters),
    )
    names = [file_name(shot.prompt, shot.seed, index, shot.strength) for index, shot in enumerate(shots)]
    facts = [how.facts(shot) for shot in shots]
    grid_facts = {"images": json.dumps(facts, ensure_ascii=False), "software": _software()}
    _claim(out, dict(zip(names, facts, strict=True)) | {_GRID: grid_facts})

    place, precision = device_and_dtype(device, dtype)
    parts = family.load(found, precision)
    for module in (*parts.components().values(), parts.vae):
        if module is not None:
            module.to(place)
    handles = [attach_file(parts.components(), Path(path), strength) for path, strength in adapters]
    for handle in handles:
        for note in handle.notes:
            reporter.say(f"{handle.name}: {note}")
    drawing = _Drawing(family.pipeline(parts), handles, how, batch_size, reporter)
    images = drawing.draw(shots, lambda index, image: save_image(out / names[index], image, facts[index]))
    labels = [f"{Path(path).stem} at {strength:g}" for path, strength in adapters]
    grid = _grid(shots, images, how, labels)
    save_image(out / _GRID, grid, grid_facts)
    return SampleResult(shots, tuple(images), grid, tuple(out / name for name in names), out / _GRID)


def plan_shots(
    prompts: Sequence[str], seeds: Sequence[int], strengths: Sequence[float] | None, adapted: bool
) -> tuple[Shot, ...]:
    """All combinations: prompts, within them seeds, within them strengths.

    Raises:
        RecipeError: nothing to draw, a duplicate, or a sweep without an adapter.
    """
    if not prompts or not seeds or not all(prompt.strip() for prompt in prompts):
        raise RecipeError(
            "There is nothing to draw: no prompt or no seed.", "Give --prompt TEXT and --seeds 0,1."
        )
    if strengths is not None and not adapted:
        raise RecipeError(
            "A strength sweep needs an adapter.", "Give --adapter FILE, or leave --strengths out."
        )
    if strengths is not None and not strengths:
        raise RecipeError("The strength sweep is empty.", "Give --strengths 0,0.5,1, for one.")
    for what, values in (("prompt", prompts), ("seed", seeds), ("strength", strengths or ())):
        if twice := [value for value in dict.fromkeys(values) if list(values).count(value) > 1]:
            raise RecipeError(f"The {what} {twice[0]!r} is given twice.", "Give each one once.")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise RecipeError(f"{wrong[0]} is no seed.", "Seeds are whole numbers from 0 to 2^63 - 1.")
    sweep: Sequence[float | None] = strengths if strengths is not None else (None,)
    return tuple(Shot(prompt, seed, strength) for prompt in prompts for seed in seeds for strength in sweep)


def file_name(prompt: str, seed: int, index: int, strength: float | None = None) -> str:
    """Name of an image's file, e.g. "00-a-photo-of-a-dog-seed0-strength1.00.png"; safe on every system."""
    swept = ""
    if strength is not None:
        short = f"{strength:.2f}"
        swept = f"-strength{short if float(short) == strength else repr(float(strength))}"
    return f"{index:02d}-{slug(prompt)}-seed{seed}{swept}.png"


@dataclass(frozen=True, slots=True)
class _How:
    """All that decides an image besides its shot."""

    steps: int
    guidance: float
    side_px: int
    sampler: Sampler
    base: str
    adapters: tuple[tuple[str, float], ...]

    def facts(self, shot: Shot) -> dict[str, str]:
        """What is written into the image's file; no paths, no file names."""
        return {
            "prompt": shot.prompt,
            "seed": str(shot.seed),
            "steps": str(self.steps),
            "guidance": f"{self.guidance:g}",
            "strength": "" if shot.strength is None else f"{shot.strength:g}",
            "sampler": self.sampler,
            "size": f"{self.side_px}x{self.side_px}",
            "base": self.base,
            "adapters": json.dumps(self.adapters),
            "software": _software(),
        }


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A loaded pipeline with its adapters, ready to draw."""

    pipeline: DiffusionPipeline
    handles: Sequence[AdapterHandle]
    how: _How
    batch_size: int
    reporter: Reporter

    def draw(self, shots: Sequence[Shot], on_image: Callable[[int, Image], None]) -> list[Image]:
        """One image per shot; a sweep draws strength by strength, since all images of a batch share it."""
        from lorabooth.evaluation.generate import generate

        images: dict[int, Image] = {}

        for strength in dict.fromkeys(shot.strength for shot in shots):
            chosen = [index for index, shot in enumerate(shots) if shot.strength == strength]
            if strength is not None:
                for handle, (_, own) in zip(self.handles, self.how.adapters, strict=True):
                    handle.set_strength(own * strength)
            made = generate(
                self.pipeline,
                [shots[index].prompt for index in chosen],
                [shots[index].seed for index in chosen],
                steps=self.how.steps,
                guidance=self.how.guidance,
                height_px=self.how.side_px,
                width_px=self.how.side_px,
                sampler=self.how.sampler,
                batch_size=self.batch_size,
                reporter=self.reporter,
                on_image=lambda place, image, chosen=chosen: on_image(chosen[place], image),  # type: ignore[misc]
            )
            images.update(zip(chosen, made, strict=True))
        return [images[index] for index in range(len(shots))]


def _grid(shots: Sequence[Shot], images: Sequence[Image], how: _How, adapters: Sequence[str]) -> Image:
    """Rows are prompts and columns seeds; in a sweep rows are prompt and seed, columns strengths."""
    from lorabooth.evaluation.grids import draw_grid

    prompts = list(dict.fromkeys(shot.prompt for shot in shots))
    seeds = list(dict.fromkeys(shot.seed for shot in shots))
    strengths = [s for s in dict.fromkeys(shot.strength for shot in shots) if s is not None]
    columns = len(strengths or seeds)
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return draw_grid(
        rows,
        row_labels=[f"{p} · seed {s}" for p in prompts for s in seeds] if strengths else prompts,
        column_labels=[f"strength {s:g}" for s in strengths] or [f"seed {seed}" for seed in seeds],
        title=", ".join(adapters) or how.base,
        subtitle=f"{how.base} · {how.steps} steps · guidance {how.guidance:g} · {_software()}",
    )


def _claim(out: Path, planned: Mapping[str, Mapping[str, str]]) -> None:
    """Make the folder, and refuse if it holds other content under a planned name.

    Raises:
        RecipeError: it does, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"{out} cannot be made: {error.strerror or error}.", "Choose another --out."
        ) from error
    for name, facts in planned.items():
        if (out / name).exists() and not has_facts(out / name, facts):
            raise RecipeError(
                f"{out / name} is there already and holds another image; nothing was drawn.",
                "Choose another --out, or move those images away.",
            )


def adapter_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of an adapter's file, or of its files one after the other."""
    from lorabooth.adapters.stored import open_adapter

    modules = open_adapter(path).modules.values()
    files = dict.fromkeys(factor.path for module in modules for factor in (module.down, module.up))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def device_and_dtype(device: str, dtype: Dtype) -> tuple[torch.device, torch.dtype]:
    """Where a base goes and in which precision; "auto" is half precision on a GPU, float32 elsewhere.

    Raises:
        RecipeError: the device cannot be used.
    """
    import torch

    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        # torch without CUDA raises AssertionError for a CUDA device.
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"The device {device!r} cannot be used: {reason}", 'Choose "cpu" or "auto".'
        ) from error
    if dtype == "auto":
        half = "bf16" if where.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
        dtype = "fp32" if where.type == "cpu" else half  # type: ignore[assignment]
    return where, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _software() -> str:
    return f"lorabooth {__version__}"
