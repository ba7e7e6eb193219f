"""Class images for prior preservation, drawn once from the frozen base and kept (DreamBooth, section 3.2).

They live in a folder named after everything that decides their pixels, so that another subject of the
same class finds them, an interrupted drawing goes on where it was, and nothing stale is ever used.
Image i is a function of (key, i), whatever was there before: the first 100 of 200 are the 100 of a smaller
run, and those of a run that was killed. Batched arithmetic rounds by the size of the batch, so images are
drawn in groups that are always the same (0-7, 8-15, ...) and always whole, though only one be missing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth import durable
from lorabooth.errors import BaseModelError, LoraboothError, RecipeError, TrainingError
from lorabooth.progress import Reporter, Silent
from lorabooth.prompts import slug
from lorabooth.rng import seed_for
from lorabooth.types import Interval

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image that was drawn.

    Attributes:
        image: RGB.
        latent: [C,h,w] that it was decoded from, or None.
    """

    image: Image
    latent: Tensor | None = None


Generate = Callable[[Sequence[str], Sequence[int]], Sequence[Drawn]]
"""(prompts, seeds), equally many -> as many images."""
KeepLatent = Callable[[str, "Tensor"], object]
"""(hex digest of an image file's bytes, latent that it was decoded from); keeps the latent."""

# Part of the key: to be raised when the same facts would give other pixels. 2: groups.
_CODE_VERSION = 2
_MAX_ATTEMPTS = 5
# Standard deviation over the pixels of the liveliest channel, in 8-bit levels. Photos and drawings are
# above 20; what a broken decoder leaves (black, grey, one colour with rounding) is below 1.
_FLAT_BELOW = 3.0


@dataclass(frozen=True, slots=True)
class SamplerFacts:
    """How class images are drawn; all of it is part of their key.

    Attributes:
        name: the sampler, e.g. "dpm++".
        steps: sampler steps.
        guidance: classifier-free guidance scale.
        guidance_interval: noise levels at which it acts; None is all.
        height_px: image height.
        width_px: image width.
        dtype: precision that the denoiser draws in, e.g. "fp32".
        group: images drawn together, >= 1; by it the last bits of an image differ.
    """

    name: str
    steps: int
    guidance: float
    height_px: int
    width_px: int
    dtype: str = "fp32"
    group: int = 1
    guidance_interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class ClassImages:
    """The class images of one prompt.

    Attributes:
        folder: where they are.
        paths: as many as asked for, in order.
        generated: how many were drawn now.
        reused: how many were there already.
        rejected: black or flat ones, drawn again.
    """

    folder: Path
    paths: tuple[Path, ...]
    generated: int
    reused: int
    rejected: int


def class_images_key(*, base_key: str, prompt: str, sampler: SamplerFacts) -> str:
    """Digest (64 hex digits) of all that decides the pixels of class images."""
    facts = {"version": _CODE_VERSION, "base": base_key, "prompt": prompt, "sampler": asdict(sampler)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def ensure_class_images(
    *,
    folder_root: Path,
    base_key: str,
    prompt: str,
    count: int,
    generate: Generate,
    sampler: SamplerFacts,
    reporter: Reporter | None = None,
    keep_latent: KeepLatent | None = None,
) -> ClassImages:
    """Find or draw `count` class images.

    Args:
        folder_root: the cache's root; the images get a folder of their own in it.
        base_key: what identifies the base: digest and id, never a path.
        prompt: the class prompt.
        count: how many images, >= 1.
        generate: draws a batch; a function of prompts and seeds, and image i (but for the rounding of batched
            arithmetic) of prompt i and seed i only. Called with `sampler.group` of them, or with one.
        sampler: how `generate` draws, and how many at once.
        reporter: hears of the progress.
        keep_latent: gets every image's latent before the image is written, so that no image that is there
            lacks it.

    Returns:
        The images; every one decodes, has the right size and is neither black nor flat.

    Raises:
        BaseModelError: one image came out black or flat in every attempt.
        RecipeError: the folder cannot be written.
        TrainingError: the disk is full; what was drawn is kept.
    """
    key = class_images_key(base_key=base_key, prompt=prompt, sampler=sampler)
    folder = folder_root / f"{slug(prompt)}-{key[:16]}"
    job = _Job(folder, key, base_key, prompt, sampler, generate, reporter or Silent(), keep_latent)
    with _locked(job):
        _tidy(job)
        paths = tuple(folder / f"{index:06d}.png" for index in range(count))
        missing = [index for index, path in enumerate(paths) if not _is_good_file(path, sampler)]
        rejected = _draw(job, missing, paths) if missing else 0
    if rejected:
        job.reporter.warn(f'{rejected} class image(s) of "{prompt}" came out black or flat; drawn again.')
    return ClassImages(folder, paths, len(missing), count - len(missing), rejected)


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    key: str
    base_key: str
    prompt: str
    sampler: SamplerFacts
    generate: Generate
    reporter: Reporter
    keep_latent: KeepLatent | None

    def facts(self) -> bytes:
        """The text of images.json: what the key was made of. No paths."""
        facts = {
            "prompt": self.prompt,
            "base": self.base_key,
            "sampler": asdict(self.sampler),
            "version": _CODE_VERSION,
            "key": self.key,
        }
        return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()

    def seed(self, index: int, attempt: int) -> int:
        """One seed per image and attempt, a function of the key."""
        return seed_for(int(self.key[:15], 16), attempt, 0, "class image", index)

    def draw(self, indices: Sequence[int], attempt: int) -> Sequence[Drawn]:
        """One batch."""
        seeds = [self.seed(index, attempt) for index in indices]
        images = self.generate([self.prompt] * len(seeds), seeds)
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)} images for {len(seeds)} seeds")
        return images


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """One process at a time draws into a folder; the system drops the lock of a killed one."""
    import filelock

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(job.folder.with_name(f".{job.folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            job.reporter.say(
                f'Another process is drawing the class images of "{job.prompt}"; waiting for it.'
            )
            lock.acquire()
    except OSError as error:
        raise _unwritable(job.folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _tidy(job: _Job) -> None:
    """Remove what killed processes left; under the lock there are no others. Say what the folder is."""
    facts = job.folder / "images.json"
    try:
        for leftover in job.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        is_told = facts.is_file() and facts.read_bytes() == job.facts()
    except OSError as error:
        raise _unwritable(job.folder, error) from error
    if not is_told:
        _write(facts, job.facts())


def _draw(job: _Job, missing: Sequence[int], paths: Sequence[Path]) -> int:
    """Draw and save the missing images; returns how many were rejected on the way."""
    size = job.sampler.group
    wanted, rejected = set(missing), 0
    done = len(paths) - len(missing)
    with job.reporter.task(f'Class images "{job.prompt}"', len(paths), unit="image", start=done) as task:
        for first in sorted({index // size * size for index in missing}):
            indices = range(first, first + size)
            for index, drawn in zip(indices, job.draw(indices, 0), strict=True):
                if index not in wanted:
                    continue
                attempt, lively = _lively(job, index, drawn)
                rejected += attempt
                content = _png(lively.image, job.prompt, job.seed(index, attempt))
                if lively.latent is not None and job.keep_latent is not None:
                    job.keep_latent(hashlib.sha256(content).hexdigest(), lively.latent)
                _write(paths[index], content)
                task.advance()
    return rejected


def _lively(job: _Job, index: int, drawn: Drawn) -> tuple[int, Drawn]:
    """The first attempt that is not flat, and its number; those after the given one are drawn alone."""
    for attempt in range(_MAX_ATTEMPTS):
        if attempt:
            (drawn,) = job.draw([index], attempt)
        if _is_lively(drawn.image):
            return attempt, drawn
    raise _nothing_drawn(job, index)


def _nothing_drawn(job: _Job, index: int) -> BaseModelError:
    how = f"sampler {job.sampler.name}, {job.sampler.steps} steps, guidance {job.sampler.guidance:g}"
    return BaseModelError(
        f'Class image {index} of "{job.prompt}" came out black or flat {_MAX_ATTEMPTS} times ({how}).',
        'Look at what the base draws with `lorabooth sample`; try model.dtype = "fp32" (half precision can '
        'overflow), or prior.mode = "distill", which needs no images.',
    )


def _unwritable(folder: Path, error: OSError) -> LoraboothError:
    what = f"The class images cannot be kept in {folder}: {error.strerror or error}."
    if durable.is_full(error):
        return TrainingError(
            what,
            "Free some disk space and run the command again: what was drawn is kept. Other folders in "
            f"{folder.parent} may be deleted, they are drawn again; or set LORABOOTH_CACHE to a folder on "
            "another disk.",
        )
    return RecipeError(what, "Set LORABOOTH_CACHE to a folder that can be written.")


def _is_lively(image: Image) -> bool:
    import numpy as np

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return bool(pixels.std(axis=(0, 1)).max() >= _FLAT_BELOW)


def _is_good_file(path: Path, sampler: SamplerFacts) -> bool:
    """Whether a whole, lively PNG of the right size is there; a torn one counts as absent."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image.size == (sampler.width_px, sampler.height_px) and _is_lively(image)
    except FileNotFoundError:
        return False
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        # Pillow says SyntaxError for a broken PNG chunk, OSError for missing data.
        return False


def _png(image: Image, prompt: str, seed: int) -> bytes:
    """A lossless file that says what it shows."""
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    facts.add_itxt("prompt", prompt)
    facts.add_text("seed", str(seed))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", pnginfo=facts)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    try:
        durable.replace(path, data)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
