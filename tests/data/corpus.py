"""A folder of every photo that goes wrong, or looks as if it did: each is to be used, refused or left out.

All pictures that are used show one scene, four corners of four colours, so that a test can tell whether a
file was read as people see it.
"""

from __future__ import annotations

import ctypes
import io
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
Corners = tuple[tuple[int, int, int], ...]
SCENE: Corners = (RED, GREEN, BLUE, YELLOW)
"""Colours of the corners: upper left, upper right, lower left, lower right."""
HEIGHT_PX, WIDTH_PX = 96, 128

# How a camera stores the picture under an EXIF orientation (JEITA CP-3451, table of orientations).
STORED: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@dataclass(frozen=True)
class Case:
    """One file of the corpus.

    Attributes:
        name: of the file.
        make: writes it.
        fate: "used"; "refused" is an error; "left out" is told of, and the rest is used.
        told: what the report says of it, if it is not used.
        corners: colours that are read from it, if it is used.
        needs_user: root can read it all the same.
    """

    name: str
    make: Callable[[Path], None]
    fate: Literal["used", "refused", "left out"] = "used"
    told: str = ""
    corners: Corners = field(default=SCENE)
    needs_user: bool = False


def scene(height: int = HEIGHT_PX, width: int = WIDTH_PX) -> np.ndarray:
    """[H,W,3] uint8, a quarter of each colour."""
    pixels = np.zeros((height, width, 3), np.uint8)
    halves = (slice(None, height // 2), slice(height // 2, None))
    sides = (slice(None, width // 2), slice(width // 2, None))
    for place, colour in enumerate(SCENE):
        pixels[halves[place // 2], sides[place % 2]] = colour
    return pixels


def picture() -> Image.Image:
    return Image.fromarray(scene())


def encoded(kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    quality = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    picture().save(buffer, kind, **quality, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + data + chunk(b"IEND", b"")


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _torn(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def _turned(orientation: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(STORED[orientation](scene()))
        Image.fromarray(stored).save(path, exif=exif, quality=98, subsampling=0)

    return make


def _cmyk(path: Path) -> None:
    picture().convert("CMYK").save(path, quality=98)


def _palette(path: Path) -> None:
    image = picture().quantize(4, dither=Image.Dither.NONE)
    image.save(path, transparency=image.getpixel((0, 0)))


def _sixteen_bit(path: Path) -> None:
    levels = np.zeros((HEIGHT_PX, WIDTH_PX), np.uint16)
    levels[:, WIDTH_PX // 2 :] = 65535
    Image.fromarray(levels).save(path)


def _animated(path: Path) -> None:
    blank = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "black")
    picture().save(path, save_all=True, append_images=[blank, blank], duration=50)


def _of_size(width: int, height: int) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (width, height), "red").save(path)


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "secret.png"
    outside.write_bytes(encoded("PNG"))
    path.symlink_to(outside)


def _link_nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "nothing.png")


def _locked(path: Path) -> None:
    path.write_bytes(encoded("PNG"))
    path.chmod(0)


_BLACK, _TINY = (0, 0, 0), "is too small"
CASES = (
    Case("torn.jpg", _torn, "refused", "damaged or incomplete"),
    Case("text.jpg", _bytes(b"just some text\n"), "refused", "not an image"),
    Case("a png.jpg", _bytes(encoded("PNG"))),
    Case("a jpeg.png", _bytes(encoded())),
    Case("empty.png", _bytes(b""), "refused", "the file is empty"),
    Case("cmyk.jpg", _cmyk),
    Case("palette.png", _palette, corners=(WHITE, GREEN, BLUE, YELLOW)),
    Case("16-bit.png", _sixteen_bit, corners=(_BLACK, WHITE, _BLACK, WHITE)),
    Case("animated.gif", _animated),
    *(Case(f"turned {turn}.jpg", _turned(turn)) for turn in STORED),
    Case("dot.png", _of_size(1, 1), "refused", f"1x1 px {_TINY}"),
    Case("thread.png", _of_size(30_000, 10), "refused", f"30000x10 px {_TINY}"),
    Case("banner.png", _of_size(1000, 100), "refused", "too long a strip"),
    Case("bomb.png", _bytes(png_header(60_000, 60_000)), "refused", "too many pixels"),
    Case("small bomb.png", _bytes(png_header(10_000, 10_000)), "refused", "too many pixels"),
    Case("out.png", _link_out, "left out", "a link that leads out of the folder"),
    Case("gone.png", _link_nowhere, "left out", "a link that leads nowhere"),
    Case("locked.png", _locked, "refused", "cannot be read: Permission denied", needs_user=True),
    Case(".hidden.png", _bytes(encoded("PNG")), "left out", "hidden"),
    Case("phone.heic", _bytes(b"\0"), "left out", "convert it to PNG or JPEG"),
    Case("größe 子犬 🐶.png", _bytes(encoded("PNG"))),
    Case("with  two spaces .png", _bytes(encoded("PNG"))),
    Case("line\nbreak.png", _bytes(encoded("PNG"))),
    Case("escape \x1b[31m.png", _bytes(encoded("PNG"))),
    Case("torn\nin two.jpg", _torn, "refused", "damaged or incomplete"),
    Case("torn \x1b[2J.jpg", _torn, "refused", "damaged or incomplete"),
    Case("turned \u202egpj.png", _of_size(2, 2), "refused", f"2x2 px {_TINY}"),
    Case("left\nout \x1b[1m.md", _bytes(b"x"), "left out", "not a photo"),
)


def make(folder: Path, *fates: str) -> tuple[Case, ...]:
    """Write the corpus, or those of its files that have one of these fates; returns their cases."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = tuple(case for case in CASES if not fates or case.fate in fates)
    for case in cases:
        case.make(folder / case.name)
    return cases


def obey_permissions() -> None:
    """For `subprocess.run(preexec_fn=...)`: the program that follows obeys permissions, also if root runs it.

    Linux lets root read everything by two capabilities; those are taken from what is executed next. To become
    another user would not do: the interpreter itself may lie in root's home.
    """
    if sys.platform == "linux" and os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            if libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl(PR_CAPBSET_DROP) failed")
