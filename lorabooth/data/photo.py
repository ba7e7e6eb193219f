"""One photo file -> upright 8-bit RGB pixels, whatever its format, mode and orientation."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from lorabooth.errors import DataError
from lorabooth.recipe.rules import printable

if TYPE_CHECKING:
    import numpy.typing as npt

# Only these decoders are tried, whatever a file calls itself: others run programs (EPS) or make no photos.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError)
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


class PhotoError(DataError):
    """One photo that cannot be used.

    Attributes:
        path: of it, as it is; the message shows it in printable form.
        reason: why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{printable(str(path))}: {reason}")
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
    except UnidentifiedImageError as error:
        raise PhotoError(
            path, "not an image, or of a kind that is not read, whatever its name says"
        ) from error
    except (*_BROKEN, struct.error, zlib.error) as error:
        raise PhotoError(path, f"damaged or incomplete ({printable(str(error), 200)})") from error
    remarks = tuple(dict.fromkeys(str(warning.message) for warning in said))
    return Photo(photo.pixels, photo.mode, photo.notes + remarks)


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

    More than 8 bits are scaled, not clipped: 16-bit modes by 65535; "I" and "F", which do not say their
    white, by the least of 1 (only "F"), 255 and 65535 that holds their brightest value, else by their
    own range.

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
        opaque = rgba.getchannel("A").getextrema()[0] == 255
        return Image.alpha_composite(white, rgba).convert("RGB"), () if opaque else (
            "transparency put on white",
        )
    return image.convert("RGB"), ()


def _to_8_bit(values: npt.NDArray[Any], mode: str) -> tuple[npt.NDArray[np.uint8], str]:
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
