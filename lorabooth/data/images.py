"""Photos -> pixels: decoding, orientation, transparency, buckets, resizing and cropping. Pure functions.

Legend: H W pixels of a photo or of the crop that is trained.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageFile

from lorabooth.errors import DataError, RecipeError
from lorabooth.progress import Reporter, Silent
from lorabooth.types import Geometry

if TYPE_CHECKING:
    import numpy.typing as npt

    from lorabooth.recipe import ImagesSection
    from lorabooth.types import Record

TRANSFORM_VERSION = 1
"""Part of every latent's cache key: raise it when `read` or `fit` give other pixels."""
CROP_VARIANTS = 4
"""Random crops cached per photo: latents are computed once, so the crops must be a fixed few."""
MAX_ASPECT = 2.0
"""Longest to shortest side of a bucket."""
REFUSED_ASPECT = 8.0
WARNED_ASPECT = 3.0

# Only these decoders are tried, whatever a file calls itself: others run programs (EPS) or make no photos.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo.

    Attributes:
        pixels: [H,W,3] uint8 RGB, upright.
        mode: Pillow's mode in the file ("RGB", "CMYK", "I;16", ...).
        notes: what was done to it beyond decoding, for people.
    """

    pixels: npt.NDArray[np.uint8]
    mode: str
    notes: tuple[str, ...] = ()


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


class PhotoError(DataError):
    """One photo that cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def decode(path: Path) -> npt.NDArray[np.uint8]:
    """Pixels of a photo, [H,W,3] uint8 RGB: EXIF orientation applied, transparency on white, first frame.

    Raises:
        PhotoError: not an image, truncated, damaged, or above Pillow's pixel limit.
    """
    return read(path).pixels


def read(path: Path, data: bytes | None = None) -> Photo:
    """Like `decode`, with the file's mode and notes.

    Args:
        path: the file; only named in errors if `data` is given.
        data: the file's bytes, if they were read already.

    Raises:
        PhotoError: as `decode`.
    """
    try:
        content = path.read_bytes() if data is None else data
    except OSError as error:
        raise PhotoError(path, f"cannot be read: {error.strerror or error}") from error
    if not content:
        raise PhotoError(path, "the file is empty")
    try:
        with _strict_pillow() as said:
            photo = _decode(content)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PhotoError(path, f"too many pixels to be a photo ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise PhotoError(
            path, "not an image, or of a kind that is not read, whatever its name says"
        ) from error
    except (*_BROKEN, struct.error, zlib.error) as error:
        raise PhotoError(path, f"damaged or incomplete ({error})") from error
    remarks = tuple(dict.fromkeys(str(warning.message) for warning in said))
    return Photo(photo.pixels, photo.mode, photo.notes + remarks)


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
    with (reporter or Silent()).task("checking photos", len(paths), "photo") as task:
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


def require_good(report: PhotoReport) -> None:
    """Refuse a report with problems.

    Raises:
        DataError: names every photo that cannot be used, and why.
    """
    if not report.problems:
        return
    bad, total = len(report.problems), len(report.problems) + len(report.used)
    lines = [f"  {path}: {reason}" for path, reason in report.problems]
    raise DataError(
        "\n".join([f"{bad} of {total} photos cannot be used:", *lines]),
        "Replace these files or move them out of the folder.",
    )


def variants(images: ImagesSection) -> tuple[Variant, ...]:
    """All ways that a photo is cut under these settings: 1, or CROP_VARIANTS random crops; times 2 if flipped."""
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
        found.append(
            f"{width_px}x{height_px} px, enlarged {factor:.1f} times to reach {resolution_px} px: it will look soft"
        )
    if long_px > WARNED_ASPECT * short_px:
        found.append(f"{width_px}x{height_px} px is a long strip; most of it will be cut off")
    return found


@contextmanager
def _strict_pillow() -> Iterator[list[warnings.WarningMessage]]:
    """Pillow's pixel limit is an error and truncated files are refused, whatever other libraries have set."""
    tolerated = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield said
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerated


def _decode(content: bytes) -> Photo:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    notes = []
    with Image.open(io.BytesIO(content), formats=formats) as image:
        frames = getattr(image, "n_frames", 1)
        image.load()
        mode = image.mode
        rgb, converted = to_rgb(image)
        # Not ImageOps.exif_transpose: it also rewrites the EXIF block and fails on odd tags of cameras.
        # TIFF is turned by Pillow's own load(), which removes the tag.
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if frames > 1:
        notes.append(f"the first of {frames} frames")
    if turn is not None:
        rgb = rgb.transpose(turn)
        notes.append("turned upright (EXIF)")
    return Photo(np.array(rgb, dtype=np.uint8), mode, (*notes, *converted))


def to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Any Pillow mode as 8-bit RGB, transparency composited on white; with notes on what was lost.

    More than 8 bits are scaled, not clipped: 16-bit modes by 65535; "I" and "F", which do not say their white,
    by the least of 1 (only "F"), 255 and 65535 that holds their brightest value, else by their own range.

    Raises:
        ValueError: numbers that are not finite.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        grey, note = _to_8_bit(values, image.mode)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey = np.where(values == transparent, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB"), (note,)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        opaque = rgba.getextrema()[3][0] == 255
        return Image.alpha_composite(white, rgba).convert("RGB"), () if opaque else (
            "transparency put on white",
        )
    return image.convert("RGB"), ()


def _to_8_bit(values: npt.NDArray[np.generic], mode: str) -> tuple[npt.NDArray[np.uint8], str]:
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("its pixels are not finite numbers")
    low, high = float(wide.min()), float(wide.max())
    if mode.startswith("I;16"):
        levels = [65535.0]
    else:
        levels = [
            level for level in ((1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)) if high <= level
        ]
    if low < 0 or not levels:
        white, black = (high, low) if high > low else (low + 1, low)
    else:
        white, black = levels[0], 0.0
    scaled = np.rint((wide - black) * (255.0 / (white - black))).clip(0, 255).astype(np.uint8)
    return scaled, f"{mode} scaled from {black:g}..{white:g} to 8 bits"
