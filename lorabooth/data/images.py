"""Photos -> pixels: checking, buckets, resizing and cropping. Decoding itself is in photo.py.

Legend: H W pixels of a photo or of the crop that is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from lorabooth.data.photo import PhotoError, read
from lorabooth.data.photo import decode as decode
from lorabooth.data.records import Skipped, shown_skips
from lorabooth.errors import DataError, RecipeError
from lorabooth.progress import Reporter, Silent
from lorabooth.recipe.rules import printable
from lorabooth.types import Geometry

if TYPE_CHECKING:
    import numpy.typing as npt

    from lorabooth.recipe import ImagesSection
    from lorabooth.types import Record

TRANSFORM_VERSION = 1
"""Part of every latent's cache key: raise it when `photo.read` or `fit` give other pixels."""
CROP_VARIANTS = 4
"""Random crops cached per photo: latents are computed once, so the crops must be a fixed few."""
MAX_ASPECT = 2.0
"""Longest to shortest side of a bucket."""
REFUSED_ASPECT = 8.0
WARNED_ASPECT = 3.0


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """What `check` found in one photo; sizes are after EXIF orientation."""

    path: Path
    height_px: int
    width_px: int
    mode: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PhotoReport:
    """Outcome of `check`: photos that can be used, (path, reason) of those that cannot, (path, warning)."""

    used: tuple[PhotoFacts, ...]
    problems: tuple[tuple[Path, str], ...]
    warnings: tuple[tuple[Path, str], ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut a photo: which of the fixed crops, mirrored or not."""

    crop_index: int
    flipped: bool


def check(
    records: Sequence[Record],
    *,
    resolution_px: int,
    min_px: int = 16,
    reporter: Reporter | None = None,
) -> PhotoReport:
    """Decode every photo once, before any model is loaded, and say which can be used.

    Args:
        records: photos to look at; a path that comes twice is decoded once.
        resolution_px: side that they will be trained at, for the warning about enlarged photos.
        min_px: photos with a shorter side are refused.
        reporter: progress; silent by default.
    """
    used: list[PhotoFacts] = []
    problems: list[tuple[Path, str]] = []
    remarks: list[tuple[Path, str]] = []
    paths = list(dict.fromkeys(record.path for record in records))
    with (reporter or Silent()).task("Checking photos", len(paths), "photo") as task:
        for path in paths:
            try:
                photo = read(path)
            except PhotoError as error:
                problems.append((path, error.reason))
            else:
                height_px, width_px = photo.pixels.shape[:2]
                refusal = _refusal(height_px, width_px, min_px)
                if refusal:
                    problems.append((path, refusal))
                else:
                    used.append(PhotoFacts(path, height_px, width_px, photo.mode, photo.notes))
                    remarks += [(path, text) for text in _remarks(height_px, width_px, resolution_px)]
            task.advance()
    return PhotoReport(tuple(used), tuple(problems), tuple(remarks))


def require_good(
    report: PhotoReport, *, captions: Sequence[Skipped] = (), skipped: Sequence[Skipped] = ()
) -> None:
    """Refuse a report with problems, in one message that accounts for every file.

    Args:
        report: of the photos.
        captions: caption files that cannot be used, and why.
        skipped: other files of the folders, which are told of but are no reason to refuse.

    Raises:
        DataError: names every photo and caption that cannot be used, and why, and what else was left out.
    """
    if not report.problems and not captions:
        return
    bad, total = len(report.problems), len(report.problems) + len(report.used)
    lines, fixes = [], []
    if report.problems:
        lines.append(f"{bad} of {total} photos cannot be used:")
        lines += [f"  {printable(str(path))}: {reason}" for path, reason in report.problems]
        fixes.append("Replace these files or move them out of the folder.")
    if captions:
        lines.append(f"{_counted(captions, 'caption')} cannot be used:")
        lines += shown_skips(captions, whole_path=True)
        fixes.append("Mend a caption, or delete it to use the prompt.")
    if skipped:
        lines.append(f"{_counted(skipped, 'other file')} left out:")
        lines += shown_skips(skipped, whole_path=True)
    raise DataError("\n".join(lines), " ".join(fixes))


def _counted(files: Sequence[Skipped], kind: str) -> str:
    return f"{len(files)} {kind}{'s' * (len(files) != 1)}"


def variants(images: ImagesSection) -> tuple[Variant, ...]:
    """All ways that a photo is cut: 1, or CROP_VARIANTS random crops; twice that with flips."""
    crops = CROP_VARIANTS if images.crop == "random" else 1
    flips = (False, True) if images.flip else (False,)
    return tuple(Variant(crop, flip) for crop in range(crops) for flip in flips)


def square_for(resolution_px: int, multiple_px: int) -> tuple[int, int]:
    """(H, W) of the square crop: the resolution, down to a multiple.

    Raises:
        RecipeError: the resolution is below one multiple.
    """
    side_px = resolution_px // multiple_px * multiple_px
    if side_px < 1:
        raise RecipeError(
            f"images.resolution: {resolution_px} px is less than this base can draw",
            f"Give at least {multiple_px}, better a multiple of it.",
        )
    return side_px, side_px


def bucket_for(height_px: int, width_px: int, resolution_px: int, multiple_px: int) -> tuple[int, int]:
    """The (H, W) that a photo is trained at, near its own aspect ratio.

    Both sides are multiples, the area is at most resolution squared and as large as that allows, the aspect
    ratio at most MAX_ASPECT. Aspect-ratio bucketing as in NovelAI's description and SDXL (arXiv 2307.01952,
    section 2.3).

    Raises:
        RecipeError: the resolution is below one multiple.
    """
    square = square_for(resolution_px, multiple_px)
    units = resolution_px**2 // multiple_px**2
    buckets = {square}
    for short in range(1, square[0] // multiple_px + 1):
        long = units // short
        if long <= MAX_ASPECT * short:
            buckets |= {(short * multiple_px, long * multiple_px), (long * multiple_px, short * multiple_px)}
    aspect = log(width_px / height_px)
    # The last two terms only break ties: larger first, then a fixed order.
    return min(buckets, key=lambda hw: (round(abs(log(hw[1] / hw[0]) - aspect), 9), -hw[0] * hw[1], hw))


def target_for(
    height_px: int, width_px: int, images: ImagesSection, resolution_px: int, multiple_px: int
) -> tuple[int, int]:
    """The photo's bucket if buckets are on, else the square."""
    if images.buckets:
        return bucket_for(height_px, width_px, resolution_px, multiple_px)
    return square_for(resolution_px, multiple_px)


def fit(
    pixels_u8: npt.NDArray[np.uint8],
    target_px: tuple[int, int],
    *,
    crop: Literal["center", "random"],
    flip: bool,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Geometry]:
    """Scale a photo until it covers the target (Lanczos, antialiased), and cut the target out.

    Args:
        pixels_u8: [H,W,3] uint8.
        target_px: (H, W) of the crop.
        crop: where to cut; "center" draws nothing from the generator.
        flip: mirror the crop left to right.
        generator: of the crop's place.

    Returns:
        Pixels [3,H,W] float32 in [-1,1], and how they were cut.
    """
    height_px, width_px = pixels_u8.shape[:2]
    target_h, target_w = target_px
    scale = max(target_h / height_px, target_w / width_px)
    resized_h, resized_w = (max(target_h, round(height_px * scale)), max(target_w, round(width_px * scale)))
    image = Image.fromarray(pixels_u8)
    if (resized_h, resized_w) != (height_px, width_px):
        image = image.resize((resized_w, resized_h), Image.Resampling.LANCZOS)
    top, left = (resized_h - target_h) // 2, (resized_w - target_w) // 2
    if crop == "random":
        top = int(torch.randint(resized_h - target_h + 1, (), generator=generator))
        left = int(torch.randint(resized_w - target_w + 1, (), generator=generator))
    cut = np.array(image, dtype=np.float32)[top : top + target_h, left : left + target_w]
    pixels = torch.from_numpy(cut).permute(2, 0, 1) / 127.5 - 1.0
    geometry = Geometry((height_px, width_px), (top, left), (target_h, target_w), flip)
    return (pixels.flip(-1) if flip else pixels).contiguous(), geometry


def _refusal(height_px: int, width_px: int, min_px: int) -> str:
    size = f"{width_px}x{height_px} px"
    if min(height_px, width_px) < min_px:
        return f"{size} is too small to learn from; at least {min_px} px a side, better hundreds"
    if max(height_px, width_px) > REFUSED_ASPECT * min(height_px, width_px):
        return f"{size} is too long a strip; crop it to the subject"
    return ""


def _remarks(height_px: int, width_px: int, resolution_px: int) -> list[str]:
    short_px, long_px = sorted((height_px, width_px))
    found = []
    if short_px < resolution_px:
        factor = ceil(10 * resolution_px / short_px) / 10
        size = f"{width_px}x{height_px} px"
        found.append(f"{size}, enlarged {factor:.1f} times to reach {resolution_px} px: it will look soft")
    if long_px > WARNED_ASPECT * short_px:
        found.append(f"{width_px}x{height_px} px is a long strip; most of it will be cut off")
    return found
